"""The accumulator of a split's images, batch by batch and over processes, and its two shortcuts.

Counting: integers per class and per bin of confidence, and the figures that follow from them.
"""

import math
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from timm_lt.metrics.calibration import ECE_BINS, bin_error, confidence_bins, describe_bins
from timm_lt.metrics.shot_report import ShotReport
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import (
    ClassCounts,
    Labels,
    ShotRule,
    check_class_counts,
    check_labels,
    shot_groups,
)

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


class ShotMetrics:
    """Counts a split's images batch by batch, and reports on all of them together.

    All that is kept are integers, four per class and 45 per shot group: the report is the same to
    the last bit for any order of the images, any batches and any number of processes.

    Images are counted as they come. With several processes, drop the duplicates that fill up the
    last batch (``accelerator.gather_for_metrics`` does) and images that could not be read (target
    -1) first: the former would be counted twice, the latter are refused. After gathering every
    process has all images and nothing is to be reduced; :meth:`reduce` is for processes that each
    count their own.

    >>> metrics = ShotMetrics(class_counts=[500, 50, 5])
    >>> metrics.update([0, 0, 1], [0, 0, 1])
    >>> metrics.update([1], [2])
    >>> print(metrics.compute())
    all 75.0 %, many_shot (> 100) 100.0 %, medium_shot (20 to 100) 100.0 %,
    few_shot (< 20) 0.0 %, class mean 66.7 %, macro F1 55.6 %, ECE none

    Args:
        class_counts: Training images per class, (C,).
        rule: Where the shot groups have their boundaries.

    Raises:
        UsageError: If the counts are not counts or the rule is unknown.
    """

    # Not a torchmetrics.Metric: importing torchmetrics takes a third of the time of importing
    # timm_lt, and one sum over the processes is all that it would do.

    def __init__(self, class_counts: ClassCounts, rule: ShotRule = "fb") -> None:
        groups = shot_groups(class_counts, rule)
        self.rule = rule
        self._group_names = list(groups)
        self._groups = torch.stack(list(groups.values()))
        # By row: images of the class that are wrong, those that are right, images that are taken
        # for it, images of the class that have it in their top 5.
        self._counts = torch.zeros(4, self.num_classes, dtype=torch.long)
        # By group and bin: images, those that are right, sum of their confidences.
        self._bins = torch.zeros(len(groups), 3, ECE_BINS, dtype=torch.long)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return self._groups.shape[1]

    def update(self, outputs: Labels, targets: Labels) -> None:
        """Counts some images; a mistake in them leaves the counts as they were.

        Args:
            outputs: Predicted classes or, for calibration and top-5 too, logits: a floating-point
                tensor with two dimensions, on any device.
            targets: True classes, integers in [0, C).

        Shape:
            outputs (N,) or (N, C), targets (N,); N may be 0.

        Raises:
            UsageError: If the shapes do not fit together, a label is not an integer in [0, C), a
                logit is not finite, or one update has predictions and another logits.
        """
        if len(outputs) == len(targets) == 0:
            return
        if are_logits(outputs):
            self.update_logits(outputs, targets)
        else:
            self._update_preds(outputs, targets)

    def _update_preds(self, preds: Labels, targets: Labels) -> None:
        preds = check_labels(preds, self.num_classes, noun="preds")
        targets = check_labels(targets, self.num_classes, noun="targets")
        if preds.shape != targets.shape:
            raise UsageError(
                f"preds {tuple(preds.shape)} and targets {tuple(targets.shape)} must have one shape"
            )
        self._check_kind(scored=False)
        count_classes(self._counts, preds, targets)

    def update_logits(self, logits: Tensor, targets: Labels) -> Outcomes:
        """Counts some images as :meth:`update` does, and returns what the logits say of each.

        Args:
            logits: Finite scores, (N, C), on any device.
            targets: True classes, integers in [0, C), (N,).

        Returns:
            ``preds`` (N,) int64, ``confidences`` (N,), the probabilities of these, and ``in_top``,
            whether the true class is among the first five, (N,), on the CPU.

        Raises:
            UsageError: As :meth:`update`.
        """
        check_logits(logits)
        targets = check_labels(targets, self.num_classes, noun="targets")
        if logits.shape != (len(targets), self.num_classes):
            raise UsageError(
                f"logits must be (N, C) = {(len(targets), self.num_classes)} as targets and "
                f"class_counts have it, got {tuple(logits.shape)}"
            )
        check_finite(logits)
        self._check_kind(scored=True)
        outcomes = judge(logits, targets)
        preds, confidences, in_top = outcomes
        count_classes(self._counts, preds, targets)
        self._counts[3].scatter_add_(0, targets, in_top.long())
        group_of = self._groups.int().argmax(0)[targets]
        count_bins(self._bins, confidences, preds == targets, group_of)
        return outcomes

    def _check_kind(self, scored: bool) -> None:
        """Checks that all images come with logits or none: half a calibration is none."""
        had_logits = bool(self._bins.any())
        if had_logits != scored and (had_logits or self._counts.any()):
            raise UsageError(
                "some updates have logits and others predictions: give logits in all of them or in "
                "none"
            )

    def merge(self, other: "ShotMetrics") -> None:
        """Counts the images that another accumulator counted.

        Raises:
            UsageError: If the two differ in their shot groups.
        """
        if self.rule != other.rule or not torch.equal(self._groups, other._groups):
            raise UsageError("only metrics with the same shot groups can be merged")
        self._counts += other._counts
        self._bins += other._bins

    def reduce(self, accelerator: Accelerator) -> "ShotMetrics":
        """Returns the metrics of the images that all processes have counted, the same on each.

        Every process must call it. This accumulator keeps what this process has counted.

        Args:
            accelerator: Adds up over the processes.
        """
        both = torch.cat([self._counts.flatten(), self._bins.flatten()])
        sums = accelerator.reduce(both.to(accelerator.device), reduction="sum").cpu()
        whole = object.__new__(type(self))
        vars(whole).update(vars(self))
        whole._counts = sums[: self._counts.numel()].view_as(self._counts)
        whole._bins = sums[self._counts.numel() :].view_as(self._bins)
        return whole

    def compute(self) -> ShotReport:
        """Returns the report on all images that were counted.

        Raises:
            UsageError: If there are none; if some came with logits and others, from another process
                or accumulator, without; or if 2^31 or more came with logits.
        """
        wrong, right, predicted, _ = self._counts.double()
        images = wrong + right
        if not images.any():
            raise UsageError("no images have been counted: call update with some first")
        present = images > 0
        columns = (right, images, self._groups.double())
        in_split = columns if present.all() else [values[..., present] for values in columns]
        figures: dict[str, Any] = {k: _known(v) for k, v in accuracy_figures(*in_split).items()}
        # TP = right, FP = predicted - right, FN = images - right. Of 0 / 0 nothing is right.
        either = predicted + images
        f1, precision = (part.nan_to_num(0) for part in (2 * right / either, right / predicted))
        num_either = (either > 0).sum()
        return ShotReport(
            **figures,
            macro_f1=float(f1.sum() / num_either),
            macro_precision=float(precision.sum() / num_either),
            # 0 / 0 is NaN: no such class in the split.
            per_class=right / images,
            rule=self.rule,
            test_images=self._counts[:2].sum(0),
            predicted=self._counts[2].clone(),
            **self._scores(),
        )

    def _scores(self) -> dict[str, Any]:
        """Returns the fields that need logits; none without them."""
        images, scored = int(self._counts[:2].sum()), int(self._bins[:, 0].sum())
        if scored == 0:
            return {}
        if scored != images:
            raise UsageError(
                f"{scored} of {images} images have logits, the others only predictions: give "
                "logits in all updates, on all processes, or in none"
            )
        if scored > MAX_SCORED:
            raise UsageError(
                f"{scored} images have logits, calibration is for {MAX_SCORED} or less"
            )
        groups = {
            name: _described(bins) for name, bins in zip(self._group_names, self._bins, strict=True)
        }
        bins = _described(self._bins.sum(0))
        return {
            "top5": int(self._counts[3].sum()) / images,
            "ece": bin_error(bins),
            "ece_per_group": {
                name: bin_error(of_group) if any(part["images"] for part in of_group) else None
                for name, of_group in groups.items()
            },
            "reliability": bins,
        }


def _described(bins: Tensor) -> list[dict[str, Any]]:
    images, right, units = bins
    return describe_bins(images, right, units.double() / CONFIDENCE_UNITS)


def _known(value: Tensor) -> float | None:
    """Returns a figure, None if it is NaN: there is nothing to take it of."""
    figure = float(value)
    return None if math.isnan(figure) else figure


def shot_accuracy(
    preds: Labels, targets: Labels, class_counts: ClassCounts, rule: ShotRule = "fb"
) -> ShotReport:
    """Computes the accuracy over all images, per shot group and per class, and the macro F1.

    A group's accuracy is the mean of ``a_c``, the accuracy on class c, over the group's classes
    that the split has. Macro F1 is the mean of ``2 TP_c / (2 TP_c + FP_c + FN_c)`` over the classes
    in the targets or the predictions, macro precision that of ``TP_c / (TP_c + FP_c)``, taken as 0
    where nothing is predicted. The cost is O(N + C).

    >>> print(shot_accuracy([0, 0, 1, 1], [0, 0, 1, 2], class_counts=[500, 50, 5]))
    all 75.0 %, many_shot (> 100) 100.0 %, medium_shot (20 to 100) 100.0 %,
    few_shot (< 20) 0.0 %, class mean 66.7 %, macro F1 55.6 %, ECE none

    Args:
        preds: Predicted classes, integers in [0, C).
        targets: True classes, integers in [0, C).
        class_counts: Training images per class.
        rule: Where the shot groups have their boundaries.

    Shape:
        preds (N,), targets (N,), class_counts (C,).

    Raises:
        UsageError: If the shapes differ or a label is not an integer in [0, C).

    References:
        Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR
        2020, https://arxiv.org/abs/1910.09217
    """
    metrics = ShotMetrics(class_counts, rule)
    metrics._update_preds(preds, targets)
    return metrics.compute()


def evaluate_logits(
    logits: Tensor, targets: Labels, class_counts: ClassCounts, rule: ShotRule = "fb"
) -> ShotReport:
    """Computes :func:`shot_accuracy` of the largest logits, top-5, and the calibration.

    The expected calibration error is that of :func:`~timm_lt.metrics.calibration_error` for the
    softmax of the logits, over all images and over those whose true class is in each shot group;
    confidences are rounded to multiples of 2^-32.

    Args:
        logits: Finite scores.
        targets: True classes, integers in [0, C).
        class_counts: Training images per class.
        rule: Where the shot groups have their boundaries.

    Shape:
        logits (N, C), targets (N,), class_counts (C,).

    Raises:
        UsageError: If the logits are not a floating-point tensor, the shapes do not fit together, a
            logit is not finite (names the row), or a target is not an integer in [0, C).
    """
    num_classes = logits.shape[1] if are_logits(logits) else None
    metrics = ShotMetrics(check_class_counts(class_counts, num_classes), rule)
    metrics.update_logits(logits, targets)
    return metrics.compute()
