"""Counting: integers per class and per bin of confidence, and the figures that follow from them."""

from typing import NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from timm_lt.metrics.calibration import ECE_BINS, confidence_bins
from timm_lt.utils.checks import UsageError

TOP = 5
# Confidences are summed as integers, in units of 2^-32: a sum of integers does not depend on its
# order, and that of 2^31 - 1 confidences of 1 fits int64, whose largest number is 2^63 - 1.
CONFIDENCE_UNITS, MAX_SCORED = 2**32, 2**31 - 1
# Entries of the logits that are judged at a time.
BLOCK = 2**22


class Outcomes(NamedTuple):
    """What the logits of a few images say, each (N,) on the CPU."""

    preds: Tensor
    confidences: Tensor
    in_top: Tensor


def count_classes(counts: Tensor, preds: Tensor, targets: Tensor) -> None:
    """Adds images to the rows wrong, right and predicted of ``counts``, int64 (3 or more, C).

    The cost is that of a few passes over the images; none is over the classes.

    Args:
        counts: What was counted before.
        preds: Checked, (N,) int64.
        targets: Checked, (N,) int64.
    """
    ones = torch.ones_like(targets)
    # In NumPy, which computes with integers faster than torch does.
    right = preds.numpy() == targets.numpy()
    cells = np.multiply(right, counts.shape[1], dtype=np.int64)
    cells += targets.numpy()
    counts.view(-1).scatter_add_(0, torch.from_numpy(cells), ones)
    counts[2].scatter_add_(0, preds, ones)


def are_logits(outputs: object) -> TypeGuard[Tensor]:
    """Returns whether outputs are logits: a floating-point tensor with two dimensions."""
    return isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.is_floating_point()


def check_logits(logits: object) -> None:
    """Refuses what :func:`are_logits` denies."""
    if not are_logits(logits):
        kind = type(logits).__name__
        if isinstance(logits, Tensor):
            kind = f"a tensor {tuple(logits.shape)} of {logits.dtype}"
        raise UsageError(
            f"logits must be a floating-point tensor (N, C), got {kind}; torch.as_tensor makes a "
            "tensor of an array"
        )


def check_finite(logits: Tensor) -> None:
    """Checks that all logits (N, C) are finite; the message names the first row that is not."""
    # A sum over the row is finite unless a logit is not, or the row overflows.
    suspects = (~logits.sum(1).isfinite()).nonzero().flatten()
    if not len(suspects):
        return
    wrong: list[int] = suspects[~logits[suspects].isfinite().all(1)].tolist()
    if wrong:
        raise UsageError(
            f"logits must be finite: row {wrong[0]} is not ({len(wrong)} of {len(logits)} rows)"
        )


def judge(logits: Tensor, targets: Tensor) -> Outcomes:
    """Returns what finite logits (N, C) say of images with the given targets (N,)."""
    rows = max(BLOCK // logits.shape[1], 1)
    parts = zip(logits.detach().split(rows), targets.to(logits.device).split(rows), strict=True)
    return Outcomes(*(torch.cat(column).cpu() for column in zip(*map(_judge, parts), strict=True)))


def _judge(part: tuple[Tensor, Tensor]) -> Outcomes:
    logits, targets = part
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, preds = logits.max(dim=1)
    # The largest softmax probability, without an (N, C) tensor of the others.
    confidences = (top - logits.logsumexp(dim=1)).exp()
    own = logits.gather(1, targets[:, None])
    last = logits.topk(min(TOP, logits.shape[1])).values[:, -1:]
    in_top = (own > last).flatten()
    # Which of several equal logits topk takes is left open; here the first classes come first.
    level = (own == last).flatten().nonzero().flatten()
    rows, own = logits[level], own[level]
    earlier = torch.arange(logits.shape[1], device=logits.device) < targets[level, None]
    in_top[level] = ((rows > own) | ((rows == own) & earlier)).sum(1) < TOP
    return Outcomes(preds, confidences, in_top | (preds == targets))


def count_bins(bins: Tensor, confidences: Tensor, right: Tensor, group_of: Tensor) -> None:
    """Adds images to ``bins``, int64 (groups, 3, bins): images, right and confidence in units.

    Args:
        bins: What was counted before.
        confidences: In [0, 1], (N,).
        right: Whether the prediction is right, (N,).
        group_of: Shot group of each image, (N,) int64.
    """
    confidences = confidences.double()
    cells = group_of * ECE_BINS + confidence_bins(confidences)
    units = (confidences * CONFIDENCE_UNITS).round().long()
    for row, amount in enumerate((torch.ones_like(cells), right.long(), units)):
        sums = torch.zeros(len(bins) * ECE_BINS, dtype=torch.long).scatter_add_(0, cells, amount)
        bins[:, row] += sums.view(len(bins), ECE_BINS)


def accuracy_figures(right: Tensor, images: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """Returns the figures that follow from how many images of each class are right.

    Those of a shot group without classes, NaN, are left out of the harmonic mean of the groups.

    Args:
        right: Images that are right, float64, in one or more draws.
        images: Images of each class, float64, at least 1.
        groups: The shot groups' masks, float64.

    Shape:
        right (..., C), images (C,), groups (G, C) in the order many, medium, few; each figure has
        the shape (...,).
    """
    accuracy = right / images
    sizes = groups.sum(1)
    means = accuracy @ groups.T / sizes
    many, medium, few = means.unbind(-1)
    # 1 / 0 is infinity and log 0 minus infinity, so that one class at 0 makes the mean 0.
    return {
        "all": right.sum(-1) / images.sum(),
        "class_mean": accuracy.mean(-1),
        "many_shot": many,
        "medium_shot": medium,
        "few_shot": few,
        "worst_class": accuracy.amin(-1),
        "harmonic_mean": 1 / accuracy.reciprocal().mean(-1),
        "geometric_mean": accuracy.log().mean(-1).exp(),
        "group_harmonic_mean": 1 / means[..., sizes > 0].reciprocal().mean(-1),
    }
