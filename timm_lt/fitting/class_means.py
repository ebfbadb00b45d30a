"""Class means in every feature space, from one pass over the features."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_lt.fitting.rows import take_rows
from timm_lt.heads.metric import FeatureSpace
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import class_counts

# Rows that are summed at a time: in three spaces, they are to come from the processor's cache.
ROWS = 512
# Rows among which those of a class are brought together. With few of each class, adding up the sums
# would cost as much as they do; with many, reading is no longer sequential.
STRETCH, STRETCH_PER_CLASS = 2**14, 16


def class_means(
    values: Tensor,
    targets: Tensor,
    num_classes: int,
    spaces: Sequence[FeatureSpace] = ("raw",),
    feature_mean: Tensor | None = None,
) -> dict[FeatureSpace, Tensor]:
    """Returns the mean of the rows of each class in each space, from one pass over the rows.

    Each row is fetched once, for all spaces; those of a class that lie near each other are fetched
    and added up together, weighted with their inverse norms. Memory is that of the sums and of a
    few hundred rows.

    Args:
        values: Features, which may lie in a mapped file.
        targets: Their classes, in [0, C).
        num_classes: C.
        spaces: Feature spaces, as of the ``ncm`` head.
        feature_mean: Mean of the training features, for ``"centered_l2"``.

    Shape:
        values (N, D), targets (N,), feature_mean (D,); the means are (C, D) float32, NaN for a
        class without rows.

    >>> values, targets = torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1])
    >>> class_means(values, targets, 2)["raw"].tolist()
    [[2.0], [5.0]]
    """
    sums = torch.zeros(len(spaces), num_classes, values.shape[1])
    for rows, labels in _by_class(targets, num_classes):
        block = take_rows(values, rows)
        present, sizes = labels.unique_consecutive(return_counts=True)
        offsets = sizes.cumsum(0) - sizes
        order = torch.arange(len(rows))
        for total, space in zip(sums, spaces, strict=True):
            values_there, weights = _in_space(block, space, feature_mean)
            part = F.embedding_bag(
                order, values_there, offsets, mode="sum", per_sample_weights=weights
            )
            total.index_add_(0, present, part)
    counts = class_counts(targets, num_classes)[:, None]
    return {space: total.div_(counts) for space, total in zip(spaces, sums, strict=True)}


def _by_class(targets: Tensor, num_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields all rows, some at a time, ordered by class within a stretch; with their classes."""
    stretch = max(STRETCH, STRETCH_PER_CLASS * num_classes)
    for start in range(0, len(targets), stretch):
        labels, order = targets[start : start + stretch].sort(stable=True)
        yield from zip((order + start).split(ROWS), labels.split(ROWS), strict=True)


def _in_space(
    block: Tensor, space: FeatureSpace, mean: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns rows (B, D) and their weights (B,), which make them what they are in a space."""
    if space == "raw":
        return block, None
    if space == "centered_l2":
        assert mean is not None
        block = block - mean.float()
    norms: Tensor = torch.linalg.vector_norm(block, dim=1)
    if not norms.isfinite().all():
        raise UsageError("features are too large: the norm of a row is beyond float32")
    return block, norms.clamp_min_(1e-12).reciprocal_()
