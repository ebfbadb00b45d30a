"""A long-tailed subset of a balanced data set."""

from typing import TYPE_CHECKING

import numpy as np

from timm_lt.longtail import Profile, class_counts, long_tailed_counts
from timm_lt.registry import UsageError, check_integer

if TYPE_CHECKING:
    from datasets import Dataset


def make_long_tailed(
    dataset: "Dataset",
    *,
    imbalance_factor: float,
    profile: Profile = "exponential",
    seed: int = 0,
) -> "Dataset":
    """Takes a long-tailed subset: class 0 keeps every image, the last class the fewest.

    The counts are those of :func:`timm_lt.longtail.long_tailed_counts` with ``n_max`` the largest
    class of the data set. The images are chosen as LDAM-DRW chooses them: for each class in order,
    shuffle its indices and take the first ``n_c``. With seed 0 the subset of CIFAR is therefore the
    one that most papers report on. Imbalance factor 1 keeps as many images as there are.

    Args:
        dataset: A data set with a ``label`` column; a class without images is an error.
        imbalance_factor: Largest class over smallest class, at least 1.
        profile: ``"exponential"``, ``"step"`` or ``"pareto"``.
        seed: Of the choice of images, a non-negative integer below 2^32.

    Returns:
        The subset, class by class.

    Raises:
        UsageError: If there is no ``label`` column, a class has fewer images than it should keep,
            or an option is out of range.

    References:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS
        2019, https://arxiv.org/abs/1906.07413
    """
    if "label" not in dataset.column_names:
        raise UsageError(f"the data set has no column 'label'; it has {dataset.column_names}")
    check_integer("seed", seed, minimum=0, maximum=2**32 - 1)
    labels = np.asarray(dataset.with_format("numpy")["label"][:], np.int64)
    available = class_counts(labels, getattr(dataset.features["label"], "num_classes", None))
    counts = long_tailed_counts(len(available), int(available.max()), imbalance_factor, profile)
    # LDAM-DRW's generator, so that the subset is the published one.
    shuffler = np.random.RandomState(seed)
    kept = []
    for label, count in enumerate(counts):
        if available[label] < count:
            raise UsageError(
                f"class {label} has {int(available[label])} images, fewer than the {count} it "
                f"should keep: make_long_tailed needs a balanced data set"
            )
        indices = np.flatnonzero(labels == label)
        shuffler.shuffle(indices)
        kept.append(indices[:count])
    return dataset.select(np.concatenate(kept))
