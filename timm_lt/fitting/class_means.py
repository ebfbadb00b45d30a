"""Class means in every feature space, from one pass over the features."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_lt.fitting.rows import take_rows
from timm_lt.heads.metric import FeatureSpace
from timm_lt.longtail import class_counts

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

    In every space the sum over a class is a weighted sum of its rows: with ``m`` the mean,
    ``Σ x``, ``Σ x / ‖x‖`` and ``Σ x / ‖x − m‖ − m Σ 1 / ‖x − m‖``. So each row is fetched once, and
    those of a class that lie near each other are fetched and added up together. Memory is that of
    the sums and of a few hundred rows.

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
    # Of 1 / ‖x − m‖ in each class; in the other spaces nothing is subtracted.
    inverse_norms = torch.zeros(num_classes)
    for rows, labels in _by_class(targets, num_classes):
        block = take_rows(values, rows)
        present, sizes = labels.unique_consecutive(return_counts=True)
        offsets = sizes.cumsum(0) - sizes
        order = torch.arange(len(rows))
        for total, space in zip(sums, spaces, strict=True):
            weights = _weights(block, space, feature_mean)
            part = F.embedding_bag(order, block, offsets, mode="sum", per_sample_weights=weights)
            total.index_add_(0, present, part)
            if space == "centered_l2" and weights is not None:
                inverse_norms.index_add_(0, labels, weights)
    counts = class_counts(targets, num_classes)[:, None]
    means = {}
    for space, total in zip(spaces, sums, strict=True):
        if space == "centered_l2" and feature_mean is not None:
            total.addcmul_(inverse_norms[:, None], feature_mean.float(), value=-1)
        means[space] = total.div_(counts)
    return means


def _by_class(targets: Tensor, num_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields all rows, some at a time, ordered by class within a stretch; with their classes."""
    stretch = max(STRETCH, STRETCH_PER_CLASS * num_classes)
    for start in range(0, len(targets), stretch):
        labels, order = targets[start : start + stretch].sort(stable=True)
        yield from zip((order + start).split(ROWS), labels.split(ROWS), strict=True)


def _weights(block: Tensor, space: FeatureSpace, mean: Tensor | None) -> Tensor | None:
    """Returns the inverse lengths (B,) that rows have in a space, None if they stay as they are."""
    if space == "raw":
        return None
    if space == "centered_l2":
        assert mean is not None
        block = block - mean.float()
    norms: Tensor = torch.linalg.vector_norm(block, dim=1)
    return norms.clamp_min_(1e-12).reciprocal_()
