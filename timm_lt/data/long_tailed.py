"""Long-tailed subsets of balanced data sets, and manifests to compare them by."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from timm_lt.utils.checks import UsageError, check_integer, shown_names
from timm_lt.utils.console import one_line
from timm_lt.utils.files import sha256
from timm_lt.utils.longtail import Labels, Profile, check_labels, class_counts, long_tailed_counts

from .given import dataset_labels
from .items import check_dataset, label_column

if TYPE_CHECKING:
    from datasets import Dataset


def make_long_tailed(
    dataset: "Dataset",
    *,
    imbalance_factor: float,
    profile: Profile = "exponential",
    seed: int = 0,
    column: str | None = None,
) -> "Dataset":
    """Returns a long-tailed subset: class 0 keeps all of its images, the last class the fewest.

    The indices of each class in turn are shuffled, and the first ones are kept. With seed 0, the
    subset of CIFAR is that of LDAM-DRW if the rows are in the official order. Imbalance factor 1
    keeps every image.

    Args:
        dataset: A ``datasets.Dataset`` with a column of labels and images of every class.
        imbalance_factor: Largest class over smallest class, at least 1.
        profile: ``"exponential"``, ``"step"`` or ``"pareto"``.
        seed: Seed of the choice of images, a non-negative integer below 2^32.
        column: The column of labels; None takes ``"label"`` or ``"labels"``.

    Returns:
        The subset, class by class.

    Raises:
        UsageError: If the data set is a stream or has no such column, a class has too few images,
            or an option is out of range.

    References:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS
        2019, https://arxiv.org/abs/1906.07413
    """
    check_dataset(dataset)
    column = label_column(dataset, column)
    indices = long_tailed_indices(
        dataset_labels(dataset, column),
        imbalance_factor=imbalance_factor,
        profile=profile,
        seed=seed,
        num_classes=getattr(dataset.features[column], "num_classes", None),
    )
    return dataset.select(indices)


def long_tailed_indices(
    labels: Labels,
    *,
    imbalance_factor: float,
    profile: Profile = "exponential",
    seed: int = 0,
    num_classes: int | None = None,
) -> NDArray[np.int64]:
    """Returns the indices of the subset of :func:`make_long_tailed`, chosen as LDAM-DRW does."""
    check_integer("seed", seed, minimum=0, maximum=2**32 - 1)
    available = class_counts(labels, num_classes)
    counts = long_tailed_counts(len(available), int(available.max()), imbalance_factor, profile)
    pairs = zip(available.tolist(), counts, strict=True)
    short = [f"class {c} has {n}, not {k}" for c, (n, k) in enumerate(pairs) if n < k]
    if short:
        raise UsageError(
            f"{len(short)} of {len(counts)} classes have fewer images than they should keep: "
            f"{shown_names(short)}; make_long_tailed needs a balanced data set"
        )
    values = check_labels(labels).numpy()
    # LDAM-DRW's generator: gives the published subset.
    shuffler = np.random.RandomState(seed)
    kept = []
    for label, count in enumerate(counts):
        indices = np.flatnonzero(values == label)
        shuffler.shuffle(indices)
        kept.append(indices[:count])
    return np.concatenate(kept)


COMPARED = ("num_images", "class_counts", "indices_sha256", "labels_sha256", "all_labels_sha256")


def subset_manifest(
    labels: Labels, indices: Labels, *, num_classes: int | None = None, **description: Any
) -> dict[str, Any]:
    """Returns a description of a subset for JSON: counts and hashes of its indices and labels.

    >>> subset_manifest([1, 0, 1], [2, 1], seed=0)["class_counts"]
    [1, 1]

    Args:
        labels: Labels of the whole data set, (N,).
        indices: Indices of the subset, in order.
        num_classes: Number of classes; None takes the largest label plus one.
        description: Further entries, e.g. how the subset was made.

    Returns:
        The description, ``num_images``, ``class_counts`` (C,), the SHA-256 of ``indices``,
        ``labels`` and ``all_labels`` as 64-bit little-endian integers, and ``indices``.
    """
    everything = check_labels(labels)
    rows = check_labels(indices, len(everything), noun="indices")
    chosen = everything[rows]
    total = num_classes or int(everything.max()) + 1
    return {
        **description,
        "num_images": len(rows),
        "class_counts": class_counts(chosen, total).tolist(),
        "indices_sha256": _digest(rows),
        "labels_sha256": _digest(chosen),
        "all_labels_sha256": _digest(everything),
        "indices": rows.tolist(),
    }


def manifest_differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Returns the differences of a manifest from the entries of another one."""
    if not set(COMPARED) & set(expected):
        return [f"that is not a manifest: it has none of {', '.join(COMPARED)}"]
    return [
        f"{name} is {one_line(str(found[name]))}, not {one_line(str(expected[name]))}"
        for name in COMPARED
        if name in expected and expected[name] != found[name]
    ]


def _digest(values: Labels) -> str:
    return sha256(np.asarray(values, "<i8").tobytes())
