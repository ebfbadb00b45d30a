"""Metrics: accuracy per shot group, macro F1 and calibration, from predictions or logits."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timm_lt.longtail import (
    Labels,
    ShotRule,
    check_class_counts,
    check_labels,
    shot_groups,
    shot_rule_texts,
)
from timm_lt.registry import UsageError

ECE_BINS = 15


@dataclass(frozen=True, eq=False)
class ShotReport:
    """What a classifier gets right, over all test images and per shot group; all are fractions.

    Attributes:
        all: Accuracy over the images.
        class_mean: Mean of the per-class accuracies over the classes that the split has; equal to
            ``all`` if the split is balanced.
        many_shot: Mean of the per-class accuracies of the many-shot classes; None if the split has
            no image of them.
        medium_shot: The same of the medium-shot classes.
        few_shot: The same of the few-shot classes.
        macro_f1: Mean of the per-class F1 over the classes in the targets or the predictions.
        per_class: Accuracy of each class, (C,) float64; NaN for a class that the split lacks.
        rule: The rule that defines the shot groups.
        ece: Expected calibration error; None without logits.
        ece_per_group: The same over the images of each shot group's classes; None without logits.
        reliability: The bins of :func:`reliability` over all images; None without logits.
    """

    all: float
    class_mean: float
    many_shot: float | None
    medium_shot: float | None
    few_shot: float | None
    macro_f1: float
    per_class: Tensor
    rule: ShotRule
    ece: float | None = None
    ece_per_group: dict[str, float | None] | None = None
    reliability: list[dict[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns every field in types that JSON has; a class that the split lacks is None."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        per_class = [None if math.isnan(a) else a for a in self.per_class.tolist()]
        return fields | {"per_class": per_class}

    def summary(self) -> dict[str, Any]:
        """Returns the fields of :meth:`to_dict` but the rule and those per class and per bin."""
        long = ("per_class", "rule", "reliability")
        return {k: v for k, v in self.to_dict().items() if k not in long}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ShotReport":
        """Returns the report that :meth:`to_dict` described."""
        per_class = [math.nan if a is None else a for a in fields["per_class"]]
        return cls(**fields | {"per_class": torch.tensor(per_class, dtype=torch.float64)})

    def __str__(self) -> str:
        texts = shot_rule_texts(self.rule)
        values: dict[str, float | None] = {"all": self.all}
        values |= {f"{name} ({text})": getattr(self, name) for name, text in texts.items()}
        values |= {"class mean": self.class_mean, "macro F1": self.macro_f1, "ECE": self.ece}
        return ", ".join(f"{name} {_percent(value)}" for name, value in values.items())


def _percent(fraction: float | None) -> str:
    return "none" if fraction is None else f"{100 * fraction:.1f} %"


def shot_accuracy(
    preds: Labels, targets: Labels, class_counts: Labels, rule: ShotRule = "fb"
) -> ShotReport:
    """Computes the accuracy over all images, per shot group and per class, and the macro F1.

    A group's accuracy is the mean of ``a_c``, the accuracy on class c, over the group's classes
    that the split has. Macro F1 is the mean of ``2 TP_c / (2 TP_c + FP_c + FN_c)`` over the classes
    in the targets or the predictions.

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
    counts = check_class_counts(class_counts)
    num_classes = len(counts)
    preds = check_labels(preds, num_classes, noun="preds")
    targets = check_labels(targets, num_classes, noun="targets")
    if preds.shape != targets.shape:
        raise UsageError(
            f"preds {tuple(preds.shape)} and targets {tuple(targets.shape)} must have one shape"
        )
    correct, total, predicted = (
        torch.bincount(labels, minlength=num_classes).double()
        for labels in (targets[preds == targets], targets, preds)
    )
    # TP = correct, FP = predicted - correct, FN = total - correct.
    f1 = 2 * correct / (predicted + total)
    # 0 / 0 is NaN: no such class in the split.
    per_class = correct / total
    groups = shot_groups(counts, rule)
    return ShotReport(
        all=float(correct.sum() / total.sum()),
        class_mean=float(per_class.nanmean()),
        many_shot=_nanmean(per_class[groups["many_shot"]]),
        medium_shot=_nanmean(per_class[groups["medium_shot"]]),
        few_shot=_nanmean(per_class[groups["few_shot"]]),
        macro_f1=float(f1.nanmean()),
        per_class=per_class,
        rule=rule,
    )


def _nanmean(values: Tensor) -> float | None:
    """Returns the mean of the values that are not NaN, None if there are none."""
    mean = float(values.nanmean())
    return None if math.isnan(mean) else mean


def evaluate_logits(
    logits: Tensor, targets: Labels, class_counts: Labels, rule: ShotRule = "fb"
) -> ShotReport:
    """Computes :func:`shot_accuracy` of the largest logits, and how well calibrated they are.

    The expected calibration error is that of :func:`calibration_error` for the softmax of the
    logits, over all images and over those whose true class is in each shot group.

    Args:
        logits: Finite scores.
        targets: True classes, integers in [0, C).
        class_counts: Training images per class.
        rule: Where the shot groups have their boundaries.

    Shape:
        logits (N, C), targets (N,), class_counts (C,).

    Raises:
        UsageError: If the shapes do not fit together, a logit is not finite (names the row), or a
            target is not an integer in [0, C).
    """
    counts = check_class_counts(class_counts)
    targets = check_labels(targets, len(counts), noun="targets")
    if logits.shape != (len(targets), len(counts)):
        raise UsageError(
            f"logits must be (N, C) = {(len(targets), len(counts))} as targets and class_counts "
            f"have it, got {tuple(logits.shape)}"
        )
    _check_finite(logits)
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    top, preds = logits.max(dim=1)
    # The largest softmax probability, without an (N, C) tensor of the others.
    confidences = (top - logits.logsumexp(dim=1)).exp().cpu()
    preds = preds.cpu()
    report = shot_accuracy(preds, targets, counts, rule)
    right = preds == targets
    per_group: dict[str, float | None] = {}
    for name, classes in shot_groups(counts, rule).items():
        rows = classes[targets]
        per_group[name] = calibration_error(confidences[rows], right[rows]) if rows.any() else None
    return dataclasses.replace(
        report,
        ece=calibration_error(confidences, right),
        ece_per_group=per_group,
        reliability=reliability(confidences, right),
    )


def _check_finite(logits: Tensor) -> None:
    wrong: list[int] = (~torch.isfinite(logits).all(dim=1)).nonzero().flatten().tolist()
    if wrong:
        raise UsageError(
            f"logits must be finite: row {wrong[0]} is not ({len(wrong)} of {len(logits)} rows)"
        )


def reliability(confidences: Tensor, right: Tensor, bins: int = ECE_BINS) -> list[dict[str, Any]]:
    """Returns how often predictions of each confidence are right, JSON-ready.

    Bin ``B_b`` has the images with a confidence in ``((b - 1) / 15, b / 15]``, for 15 bins; the
    first has those of confidence 0 too.

    >>> reliability(torch.tensor([0.25, 1.0, 0.75]), torch.tensor([1, 1, 0]), bins=2)
    [{'images': 1, 'confidence': 0.25, 'accuracy': 1.0},
     {'images': 2, 'confidence': 0.875, 'accuracy': 0.5}]

    Args:
        confidences: Probability of the predicted class, in [0, 1].
        right: Whether the prediction is right.
        bins: Number of bins of equal width.

    Shape:
        confidences (N,), right (N,).

    Returns:
        For each bin its number of images, their mean confidence and their accuracy; the last two
        are None for an empty bin.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017,
        https://arxiv.org/abs/1706.04599
    """
    # Not torchmetrics: it puts a confidence of exactly 1, which well-trained networks often reach
    # in float32, into a sixteenth bin and so overstates the error.
    confidences = confidences.double()
    bin_of = (confidences * bins).ceil().long().sub(1).clamp(0, bins - 1)
    images = torch.bincount(bin_of, minlength=bins)
    # 0 / 0 is NaN: no image in the bin.
    means = [
        torch.bincount(bin_of, values, minlength=bins) / images
        for values in (confidences, right.double())
    ]
    return [
        {"images": n, "confidence": c if n else None, "accuracy": a if n else None}
        for n, c, a in zip(images.tolist(), *(mean.tolist() for mean in means), strict=True)
    ]


def calibration_error(confidences: Tensor, right: Tensor, bins: int = ECE_BINS) -> float:
    """Returns the expected calibration error: ``sum_b |B_b| / N |acc(B_b) - conf(B_b)|``.

    The bins are those of :func:`reliability`.

    >>> round(calibration_error(torch.tensor([0.9, 0.9, 0.9, 0.5]), torch.tensor([1, 1, 0, 1])), 3)
    0.3

    Args:
        confidences: Probability of the predicted class, in [0, 1].
        right: Whether the prediction is right.
        bins: Number of bins of equal width.

    Shape:
        confidences (N,), right (N,) with N >= 1.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017,
        https://arxiv.org/abs/1706.04599
    """
    gaps = [
        part["images"] * abs(part["accuracy"] - part["confidence"])
        for part in reliability(confidences, right, bins)
        if part["images"]
    ]
    return float(sum(gaps) / len(confidences))
