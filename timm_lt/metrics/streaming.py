"""Accuracy and calibration of a split, counted batch by batch and over processes."""

import copy
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from timm_lt.metrics.shot_report import ShotReport
from timm_lt.utils.checks import UsageError, check_integer
from timm_lt.utils.longtail import (
    ClassCounts,
    Labels,
    ShotRule,
    check_class_counts,
    check_labels,
    shot_groups,
)

TOP = 5
ECE_BINS = 15
# Confidences are summed as integers in units of 2^-32: the sum does not depend on the order, and
# that of 2^31 - 1 confidences fits int64.
CONFIDENCE_UNITS, MAX_SCORED = 2**32, 2**31 - 1
# Logits (elements) per block in `judge`.
BLOCK = 2**22


class Outcomes(NamedTuple):
    """Predictions of some images, each (N,) on the CPU."""

    preds: Tensor
    confidences: Tensor
    in_top: Tensor


def are_logits(outputs: object) -> TypeGuard[Tensor]:
    """Tells whether outputs are logits: a floating-point tensor with two dimensions."""
    return isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.is_floating_point()


def check_logits(logits: object, num_images: int, num_classes: int) -> None:
    """Checks that logits are finite, floating point and of shape (num_images, num_classes)."""
    if not are_logits(logits) or logits.shape != (num_images, num_classes):
        shape, found = (num_images, num_classes), f"a {type(logits).__name__}"
        if isinstance(logits, Tensor):
            found = f"{tuple(logits.shape)} of {logits.dtype}"
        raise UsageError(f"logits must be a floating-point tensor (N, C) = {shape}, got {found}")
    finite = logits.isfinite().all(1)
    if not finite.all():
        raise UsageError(f"logits must be finite: row {int(finite.int().argmin())} is not")


def judge(logits: Tensor, targets: Tensor) -> Outcomes:
    """Computes predictions, confidences and top-5 hits from logits (N, C) and targets (N,)."""
    rows = max(BLOCK // logits.shape[1], 1)
    parts = map(_judge, logits.detach().split(rows), targets.to(logits.device).split(rows))
    return Outcomes(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _judge(logits: Tensor, targets: Tensor) -> Outcomes:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, preds = logits.max(dim=1)
    # Softmax probability of the prediction, without an (N, C) tensor.
    confidences = (top - logits.logsumexp(dim=1)).exp()
    own = logits.gather(1, targets[:, None])
    # Equal logits rank by class.
    earlier = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]
    ranks = ((logits > own) | ((logits == own) & earlier)).sum(1)
    return Outcomes(preds, confidences, (ranks < TOP) | (preds == targets))


def accuracy_figures(right: Tensor, images: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """Computes the figures of a report from the number of right images per class.

    right (..., C), images (C,) and the masks of the shot groups (3, C) are float64; each figure has
    shape (...,). An empty shot group is NaN and does not count in the harmonic mean of the groups.
    """
    accuracy = right / images
    sizes = groups.sum(1)
    means = accuracy @ groups.T / sizes
    many, medium, few = means.unbind(-1)
    # 1 / 0 = inf and log 0 = -inf: a class at 0 makes its mean 0.
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
    """Accumulates the accuracy of a split, batch by batch.

    The state is integers, four per class and 45 per shot group, so the report is the same to the
    last bit for any order of the images, any batches and any number of processes. Each process may
    count its own images and call :meth:`reduce`, or all of them what
    ``accelerator.gather_for_metrics`` returns. Images that could not be read (target -1) are
    refused.

    >>> metrics = ShotMetrics(class_counts=[500, 50, 5])
    >>> metrics.update([0, 0, 1], [0, 0, 1])
    >>> metrics.update([1], [2])
    >>> print(metrics.compute())
    all 75.0 %, many_shot (> 100) 100.0 %, medium_shot (20 to 100) 100.0 %,
    few_shot (< 20) 0.0 %, class mean 66.7 %, macro F1 55.6 %, ECE none

    Args:
        class_counts: Training images per class, (C,).
        rule: Bounds of the shot groups.
    """

    # Not a torchmetrics.Metric: its import is slow, and one sum over processes is all it would do.

    def __init__(self, class_counts: ClassCounts, rule: ShotRule = "fb") -> None:
        groups = shot_groups(class_counts, rule)
        self.rule = rule
        self._group_names = list(groups)
        self._groups = torch.stack(list(groups.values()))
        # Rows: wrong images of the class, right ones, predictions of the class, top-5 hits.
        self._counts = torch.zeros(4, self.num_classes, dtype=torch.long)
        # Images, right images and sum of confidences of each bin, group by group.
        self._bins = torch.zeros(3, len(groups) * ECE_BINS, dtype=torch.long)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return self._groups.shape[1]

    def update(self, outputs: Labels, targets: Labels) -> None:
        """Counts a batch; an error leaves the counts unchanged.

        Args:
            outputs: Predicted classes, (N,), or logits, (N, C) floating point on any device, which
                add calibration and top-5; N may be 0.
            targets: True classes, (N,), integers in [0, C).

        Raises:
            UsageError: If the shapes do not match, a label is not in [0, C), or a logit is not
                finite.
        """
        if len(outputs) == len(targets) == 0:
            return
        if are_logits(outputs):
            self.update_logits(outputs, targets)
            return
        preds = check_labels(outputs, self.num_classes, noun="preds")
        targets = check_labels(targets, self.num_classes, noun="targets")
        if preds.shape != targets.shape:
            raise UsageError(
                f"preds {tuple(preds.shape)} and targets {tuple(targets.shape)} must have one shape"
            )
        self._count(preds, targets)

    def update_logits(self, logits: Tensor, targets: Labels) -> Outcomes:
        """Counts logits (N, C) as :meth:`update` does and returns their predictions.

        These are ``preds`` (N,), their probabilities ``confidences`` (N,), and ``in_top`` (N,),
        whether the true class is among the top 5; on the CPU.
        """
        targets = check_labels(targets, self.num_classes, noun="targets")
        check_logits(logits, len(targets), self.num_classes)
        outcomes = judge(logits, targets)
        preds, confidences, in_top = outcomes
        self._count(preds, targets)
        self._counts[3].scatter_add_(0, targets, in_top.long())
        first_bin = ECE_BINS * self._groups.int().argmax(0)[targets]
        self._bins += bin_sums(confidences, preds == targets, first_bin, self._bins.shape[1])
        return outcomes

    def _count(self, preds: Tensor, targets: Tensor) -> None:
        """Counts the images in O(N), not O(C)."""
        ones = torch.ones_like(targets)
        # NumPy is faster than torch with integers.
        cells = np.multiply(preds.numpy() == targets.numpy(), self.num_classes, dtype=np.int64)
        cells += targets.numpy()
        self._counts.view(-1).scatter_add_(0, torch.from_numpy(cells), ones)
        self._counts[2].scatter_add_(0, preds, ones)

    def merge(self, other: "ShotMetrics") -> None:
        """Adds the counts of another accumulator; UsageError if their shot groups differ."""
        if self.rule != other.rule or not torch.equal(self._groups, other._groups):
            raise UsageError("only metrics with the same shot groups can be merged")
        self._counts += other._counts
        self._bins += other._bins

    def reduce(self, accelerator: Accelerator) -> "ShotMetrics":
        """Returns the sum over all processes, which must all call it; ``self`` keeps its counts."""
        both = torch.cat([self._counts.flatten(), self._bins.flatten()])
        sums = accelerator.reduce(both.to(accelerator.device), reduction="sum").cpu()
        total = copy.copy(self)
        total._counts = sums[: self._counts.numel()].view_as(self._counts)
        total._bins = sums[self._counts.numel() :].view_as(self._bins)
        return total

    def compute(self) -> ShotReport:
        """Returns the report on all counted images.

        Raises:
            UsageError: If there are none, or only some of them had logits.
        """
        wrong, right, predicted, _ = self._counts.double()
        images = wrong + right
        if not images.any():
            raise UsageError("no images have been counted: call update with some first")
        present = images > 0
        columns = (right, images, self._groups.double())
        in_split = columns if present.all() else [values[..., present] for values in columns]
        values = accuracy_figures(*in_split).items()
        figures: dict[str, Any] = {k: None if v.isnan() else float(v) for k, v in values}
        # TP = right, FP = predicted - right, FN = images - right; 0 / 0 counts as 0.
        either = predicted + images
        f1, precision = (part.nan_to_num(0) for part in (2 * right / either, right / predicted))
        num_either = (either > 0).sum()
        return ShotReport(
            **figures,
            macro_f1=float(f1.sum() / num_either),
            macro_precision=float(precision.sum() / num_either),
            # 0 / 0 is NaN: the split lacks the class.
            per_class=right / images,
            rule=self.rule,
            test_images=self._counts[:2].sum(0),
            predicted=self._counts[2].clone(),
            **self._scores(),
        )

    def _scores(self) -> dict[str, Any]:
        """Returns the report's fields that need logits, if there were any."""
        images, scored = int(self._counts[:2].sum()), int(self._bins[0].sum())
        if scored == 0:
            return {}
        if scored != images or scored > MAX_SCORED:
            raise UsageError(
                f"{scored} of {images} images have logits; pass logits in all updates, on all "
                f"processes, or in none, and of at most {MAX_SCORED} images"
            )
        of_groups = self._bins.view(3, len(self._groups), ECE_BINS)
        bins = _describe_bins(of_groups.sum(1))
        errors = [_bin_error(_describe_bins(sums)) for sums in of_groups.unbind(1)]
        return {
            "top5": int(self._counts[3].sum()) / images,
            "ece": _bin_error(bins),
            "ece_per_group": dict(zip(self._group_names, errors, strict=True)),
            "reliability": bins,
        }


def shot_accuracy(
    preds: Labels, targets: Labels, class_counts: ClassCounts, rule: ShotRule = "fb"
) -> ShotReport:
    """Computes the accuracy over all images, per shot group and per class, and the macro F1.

    A group's accuracy is the mean of the class accuracies over the group's classes in the split.
    Macro F1 is the mean of ``2 TP_c / (2 TP_c + FP_c + FN_c)`` over the classes in the targets or
    the predictions, macro precision that of ``TP_c / (TP_c + FP_c)``, or 0 without predictions.

    >>> print(shot_accuracy([0, 0, 1, 1], [0, 0, 1, 2], class_counts=[500, 50, 5]))
    all 75.0 %, many_shot (> 100) 100.0 %, medium_shot (20 to 100) 100.0 %,
    few_shot (< 20) 0.0 %, class mean 66.7 %, macro F1 55.6 %, ECE none

    Args:
        preds: Predicted classes, (N,), integers in [0, C).
        targets: True classes, (N,), integers in [0, C).
        class_counts: Training images per class, (C,).
        rule: Bounds of the shot groups.

    Raises:
        UsageError: If the shapes differ or a label is out of range.

    References:
        Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR
        2020, https://arxiv.org/abs/1910.09217
    """
    metrics = ShotMetrics(class_counts, rule)
    metrics.update(preds, targets)
    return metrics.compute()


def evaluate_logits(
    logits: Tensor, targets: Labels, class_counts: ClassCounts, rule: ShotRule = "fb"
) -> ShotReport:
    """Computes :func:`shot_accuracy` of the largest logits, top-5, and the calibration.

    The expected calibration error (:func:`~timm_lt.metrics.calibration_error` of the softmax) is
    given over all images and over those whose true class is in each shot group. The logits are
    finite scores, (N, C); the other arguments are those of :func:`shot_accuracy`.

    Raises:
        UsageError: If the shapes do not match, a logit is not finite, or a target is out of range.
    """
    num_classes = logits.shape[1] if are_logits(logits) else None
    metrics = ShotMetrics(check_class_counts(class_counts, num_classes), rule)
    metrics.update_logits(logits, targets)
    return metrics.compute()


def reliability(confidences: Tensor, right: Tensor, bins: int = ECE_BINS) -> list[dict[str, Any]]:
    """Computes the accuracy of predictions in each confidence bin, JSON-ready.

    With 15 bins, bin b has the images with a confidence in ``((b - 1) / 15, b / 15]``; confidence 0
    is in the first.

    >>> reliability(torch.tensor([0.25, 1.0, 0.75]), torch.tensor([1, 1, 0]), bins=2)
    [{'images': 1, 'confidence': 0.25, 'accuracy': 1.0},
     {'images': 2, 'confidence': 0.875, 'accuracy': 0.5}]

    Args:
        confidences: Probability of the predicted class, (N,) in [0, 1], N >= 1.
        right: Whether the prediction is right, (N,).
        bins: Number of bins of equal width.

    Returns:
        Images, mean confidence and accuracy of each bin; the last two are None for an empty one.

    Raises:
        UsageError: If there are no images, the shapes differ, or a value is out of range.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017,
        https://arxiv.org/abs/1706.04599
    """
    check_integer("bins", bins, minimum=1)
    if confidences.ndim != 1 or confidences.shape != right.shape or len(right) == 0:
        shapes = f"{tuple(confidences.shape)} and {tuple(right.shape)}"
        raise UsageError(f"confidences and right must be (N,) with N >= 1, got {shapes}")
    # NaN is in no range, since every comparison with it is false.
    valid = (confidences >= 0) & (confidences <= 1) & ((right == 0) | (right == 1))
    if not valid.all():
        row = int((~valid).nonzero()[0])
        found = f"row {row} has {confidences[row].item()} and {right[row].item()}"
        raise UsageError(f"confidences must be in [0, 1] and right 0 or 1; {found}")
    return _describe_bins(bin_sums(confidences, right, 0, bins, bins))


def calibration_error(confidences: Tensor, right: Tensor, bins: int = ECE_BINS) -> float:
    """Returns the expected calibration error: ``sum_b |B_b| / N |acc(B_b) - conf(B_b)|``.

    Arguments and errors are those of :func:`reliability`.

    >>> round(calibration_error(torch.tensor([0.9, 0.9, 0.9, 0.5]), torch.tensor([1, 1, 0, 1])), 3)
    0.3

    References:
        Guo et al., ICML 2017, equation 3, https://arxiv.org/abs/1706.04599
    """
    return _bin_error(reliability(confidences, right, bins)) or 0.0


def bin_sums(
    confidences: Tensor, right: Tensor, first_bin: Tensor | int, size: int, bins: int = ECE_BINS
) -> Tensor:
    """Sums images, right images and confidences (in units) per bin, from ``first_bin`` on."""
    confidences = confidences.double()
    # Not torchmetrics: it puts confidences of exactly 1, frequent in float32, into a bin of their
    # own, which overstates the error.
    cells = first_bin + (confidences * bins).ceil().long().sub(1).clamp(0, bins - 1)
    units = (confidences * CONFIDENCE_UNITS).round().long()
    amounts = torch.stack([torch.ones_like(cells), right.long(), units])
    sums = torch.zeros(3, size, dtype=torch.long)
    return sums.scatter_add_(1, cells.expand(3, -1), amounts)


def _describe_bins(sums: Tensor) -> list[dict[str, Any]]:
    """Returns the bins of :func:`reliability` from the sums of :func:`bin_sums`."""
    return [
        {
            "images": n,
            "confidence": units / CONFIDENCE_UNITS / n if n else None,
            "accuracy": right / n if n else None,
        }
        for n, right, units in sums.T.tolist()
    ]


def _bin_error(bins: list[dict[str, Any]]) -> float | None:
    """Returns the calibration error of bins; None if all are empty."""
    filled = [part for part in bins if part["images"]]
    gaps = [part["images"] * abs(part["accuracy"] - part["confidence"]) for part in filled]
    return sum(gaps) / sum(part["images"] for part in filled) if filled else None
