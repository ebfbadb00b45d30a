"""cifar10_lt and cifar100_lt: the long-tailed CIFAR that most papers report on."""

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from timm_lt.data.cifar.copies import Part, StoredPart, open_copy
from timm_lt.data.cifar.facts import CIFAR10, CIFAR100, CifarFacts, check_counts, official_rows
from timm_lt.data.long_tailed import long_tailed_indices
from timm_lt.data.manifest import check_manifest, subset_manifest
from timm_lt.data.sources import Split, register_dataset
from timm_lt.utils.checks import Problems, UsageError, check_choice, check_integer
from timm_lt.utils.longtail import Profile

if TYPE_CHECKING:
    from datasets import Dataset

CifarName = Literal["cifar10_lt", "cifar100_lt"]
FACTS: dict[CifarName, CifarFacts] = {"cifar10_lt": CIFAR10, "cifar100_lt": CIFAR100}
# Papers that keep the best epoch on the test split, as their code has it.
BEST_TEST_EPOCH = "Cao et al., NeurIPS 2019, and Zhou et al., CVPR 2020"
ORDER = "torchvision's: the training files one after the other, data_batch_1 to 5 for CIFAR-10"


@register_dataset("cifar10_lt", selected_on_test=BEST_TEST_EPOCH)
def cifar10_lt(
    *,
    root: str | Path | None = None,
    imbalance_factor: float = 100.0,
    profile: Profile = "exponential",
    seed: int = 0,
    manifest: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> "dict[Split, Dataset]":
    """Builds CIFAR-10-LT: 5,000 training images of the first class, fewer of each later one.

    Train is a subset of the 50,000 training images, test all 10,000 test images; a run holds
    validation images out of train, or selects on the test split as papers did
    (``protocol="paper"``). With seed 0 the subset is LDAM-DRW's: the rows of every copy are
    brought into the official order first, and a copy whose order is not recognised is refused.

    Args:
        root: A local copy: the folder that holds ``cifar-10-batches-py``, ``cifar-10-batches-bin``
            or the parquet files of ``uoft-cs/cifar10``. None loads the Hub's copy.
        imbalance_factor: Largest class over smallest class, from 1, the balanced set, to 5,000.
        profile: ``"exponential"``, ``"step"`` or ``"pareto"``.
        seed: Of the choice of images, a non-negative integer below 2^32.
        manifest: JSON file of :func:`cifar_manifest` that the subset must agree with.
        cache_dir: Where the ``datasets`` library keeps what it prepares of the Hub's copy.

    Raises:
        UsageError: If there is no copy, it is not CIFAR-10 as published, or an option is out of
            range.

    References:
        Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009,
        https://www.cs.toronto.edu/~kriz/cifar.html
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS
        2019, https://arxiv.org/abs/1906.07413
    """
    options = {"imbalance_factor": imbalance_factor, "profile": profile, "seed": seed}
    return _splits("cifar10_lt", root, manifest, cache_dir, options)


@register_dataset("cifar100_lt", selected_on_test=BEST_TEST_EPOCH)
def cifar100_lt(
    *,
    root: str | Path | None = None,
    imbalance_factor: float = 100.0,
    profile: Profile = "exponential",
    seed: int = 0,
    manifest: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> "dict[Split, Dataset]":
    """Builds CIFAR-100-LT over the 100 fine classes; 500 training images of the first.

    All else is as for :func:`cifar10_lt`.

    Args:
        root: A local copy: the folder that holds ``cifar-100-python``, ``cifar-100-binary`` or the
            parquet files of ``uoft-cs/cifar100``. None loads the Hub's copy.
        imbalance_factor: Largest class over smallest class, from 1, the balanced set, to 500.
        profile: ``"exponential"``, ``"step"`` or ``"pareto"``.
        seed: Of the choice of images, a non-negative integer below 2^32.
        manifest: JSON file of :func:`cifar_manifest` that the subset must agree with.
        cache_dir: Where the ``datasets`` library keeps what it prepares of the Hub's copy.

    Raises:
        UsageError: If there is no copy, it is not CIFAR-100 as published, or an option is out of
            range.
    """
    options = {"imbalance_factor": imbalance_factor, "profile": profile, "seed": seed}
    return _splits("cifar100_lt", root, manifest, cache_dir, options)


def cifar_manifest(
    name: CifarName,
    *,
    root: str | Path | None = None,
    imbalance_factor: float = 100.0,
    profile: Profile = "exponential",
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Describes the training images of ``cifar10_lt`` or ``cifar100_lt``, ready for JSON.

    The indices count in the official order, whatever the order of the copy. Whoever has the same
    ``indices_sha256`` and ``all_labels_sha256`` trains on the same images.

    Args:
        name: ``"cifar10_lt"`` or ``"cifar100_lt"``.
        root: As for :func:`cifar10_lt`.
        imbalance_factor: As for :func:`cifar10_lt`.
        profile: As for :func:`cifar10_lt`.
        seed: As for :func:`cifar10_lt`.
        cache_dir: As for :func:`cifar10_lt`.

    Returns:
        What :func:`~timm_lt.data.manifest.subset_manifest` returns, and how the subset was made.

    Raises:
        UsageError: As :func:`cifar10_lt`.
    """
    check_choice("data set", name, get_args(CifarName))
    options = {"imbalance_factor": imbalance_factor, "profile": profile, "seed": seed}
    parts = _opened(FACTS[name], root, cache_dir)
    return _manifest(name, parts["train"], options)[0]


def published_counts(name: CifarName) -> dict[int, list[int]]:
    """Returns the images per class of the subsets that papers report on, by imbalance factor.

    >>> {factor: sum(counts) for factor, counts in published_counts("cifar100_lt").items()}
    {10: 19573, 50: 12608, 100: 10847, 200: 9502}
    """
    text = files("timm_lt.data.cifar").joinpath("class_counts.json").read_text(encoding="utf-8")
    return {int(factor): counts for factor, counts in json.loads(text)[name].items()}


def _splits(
    name: CifarName,
    root: str | Path | None,
    manifest: str | Path | None,
    cache_dir: str | Path | None,
    options: dict[str, Any],
) -> "dict[Split, Dataset]":
    parts = _opened(FACTS[name], root, cache_dir)
    found, rows = _manifest(name, parts["train"], options)
    if manifest is not None:
        check_manifest(found, Path(manifest).expanduser())
    everything = np.arange(len(parts["test"].labels))
    return {"train": parts["train"].take(rows), "test": parts["test"].take(everything)}


def _opened(
    facts: CifarFacts, root: str | Path | None, cache_dir: str | Path | None
) -> dict[Part, StoredPart]:
    parts = open_copy(facts, None if root is None else Path(root).expanduser(), cache_dir)
    problems = Problems(f"the copy of {facts.name} in {facts.repo if root is None else root}")
    per_class: dict[Part, int] = {"train": facts.train_per_class, "test": facts.test_per_class}
    for part, number in per_class.items():
        with problems.collected(f"{part}: "):
            check_counts(facts, parts[part].labels, number)
    problems.check()
    return parts


def _manifest(
    name: CifarName, train: StoredPart, options: dict[str, Any]
) -> "tuple[dict[str, Any], np.ndarray[Any, np.dtype[np.int64]]]":
    """Returns the manifest of the subset, and its rows as the copy stores them."""
    check_integer("seed", options["seed"], minimum=0, maximum=2**32 - 1)
    facts = FACTS[name]
    order = official_rows(facts, train.labels)
    labels = train.labels[order]
    chosen = long_tailed_indices(labels, num_classes=facts.num_classes, **options)
    found = subset_manifest(
        labels, chosen, num_classes=facts.num_classes, data=name, **options, order=ORDER
    )
    published = published_counts(name).get(options["imbalance_factor"])
    if options["profile"] == "exponential" and published not in (None, found["class_counts"]):
        raise UsageError(f"the classes of {name} have {found['class_counts']} images: a defect")
    return found, order[chosen]
