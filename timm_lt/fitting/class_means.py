"""Class means in every feature space, from one pass over the features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_lt.fitting.rows import row_blocks
from timm_lt.heads.metric import FeatureSpace
from timm_lt.longtail import class_counts

# Rows whose distances to the mean are taken at a time.
ROWS = 256
# Classes whose rows are added up at a time: fresh memory for all of them would take longer.
CLASSES = 512
# Rows of a block for each class: with few, adding up the sums of blocks costs as much as they do.
ROWS_PER_CLASS = 4


def class_means(
    values: Tensor,
    targets: Tensor,
    num_classes: int,
    spaces: Sequence[FeatureSpace] = ("raw",),
    feature_mean: Tensor | None = None,
) -> dict[FeatureSpace, Tensor]:
    """Returns the mean of the rows of each class in each space, from one pass over the rows.

    In every space the sum over a class is a weighted sum of its rows: with ``m`` the mean,
    ``Σ x``, ``Σ x / ‖x‖`` and ``Σ x / ‖x − m‖ − m Σ 1 / ‖x − m‖``. So a block of rows is sorted by
    class once and summed three times. Beside the answer and the sums of each class, memory is that
    of two blocks.

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
    start = 0
    for block in row_blocks(values, 1, at_least=ROWS_PER_CLASS * num_classes):
        labels, order = targets[start : start + len(block)].sort(stable=True)
        start += len(block)
        for number, space in enumerate(spaces):
            weights = _weights(block, space, feature_mean)
            weights = None if weights is None else weights[order]
            _add_by_class(sums[number], block, labels, order, weights)
            if space == "centered_l2" and weights is not None:
                inverse_norms.index_add_(0, labels, weights)
    counts = class_counts(targets, num_classes)[:, None]
    means = {}
    for space, total in zip(spaces, sums, strict=True):
        if space == "centered_l2" and feature_mean is not None:
            total.addcmul_(inverse_norms[:, None], feature_mean.float(), value=-1)
        means[space] = total.div_(counts)
    return means


def _add_by_class(
    sums: Tensor, block: Tensor, labels: Tensor, order: Tensor, weights: Tensor | None
) -> None:
    """Adds up the rows ``order`` of a block, whose labels ascend, times their weights."""
    present, sizes = labels.unique_consecutive(return_counts=True)
    first = 0
    for classes, lengths in zip(present.split(CLASSES), sizes.split(CLASSES), strict=True):
        rows = slice(first, first + int(lengths.sum()))
        part = F.embedding_bag(
            order[rows],
            block,
            lengths.cumsum(0) - lengths,
            mode="sum",
            per_sample_weights=None if weights is None else weights[rows],
        )
        sums.index_add_(0, classes, part)
        first = rows.stop


def _weights(block: Tensor, space: FeatureSpace, mean: Tensor | None) -> Tensor | None:
    """Returns the inverse lengths (B,) that rows have in a space, None if they stay as they are."""
    if space == "raw":
        return None
    if space == "l2":
        norms: Tensor = torch.linalg.vector_norm(block, dim=1)
        return norms.clamp_min_(1e-12).reciprocal_()
    assert mean is not None
    mean, away = mean.float(), torch.empty(ROWS, block.shape[1])
    norms = torch.cat(
        [
            torch.linalg.vector_norm(torch.sub(rows, mean, out=away[: len(rows)]), dim=1)
            for rows in block.split(ROWS)
        ]
    )
    return norms.clamp_min_(1e-12).reciprocal_()


def feature_mean(values: Tensor) -> Tensor:
    """Returns the mean of all rows, (D,) float64."""
    total = torch.zeros(values.shape[1], dtype=torch.float64)
    for block in row_blocks(values, 1):
        total += block.sum(0)
    return total / len(values)
