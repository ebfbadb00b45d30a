"""The report: what a classifier gets right, and how one figure of it serves as an objective."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from timm_lt.utils.checks import UsageError, check_choice
from timm_lt.utils.longtail import ShotRule, shot_rule_texts

Objective = Literal["all", "class_mean", "few_shot", "harmonic_mean", "worst_class"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True, eq=False)
class ShotReport:
    """What a classifier gets right, over all test images and per shot group; all are fractions.

    Fields that default to None are None too in a report that was written before they existed.

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
        reliability: The bins of :func:`~timm_lt.metrics.reliability` over all images; None without
            logits.
        worst_class: Least of the per-class accuracies.
        harmonic_mean: Harmonic mean of the per-class accuracies; 0 if one of them is.
        geometric_mean: Geometric mean of the per-class accuracies; 0 if one of them is.
        group_harmonic_mean: Harmonic mean of the shot groups' figures that are not None.
        macro_precision: Mean of the per-class precision over the classes in the targets or the
            predictions; that of a class that is never predicted is 0.
        top5: Share of the images whose class is among the five of largest logit, or among all
            classes if there are fewer; None without logits. Equal logits rank by class.
        test_images: Images of each class in the split, (C,) int64.
        predicted: Images that were taken for each class, (C,) int64.
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
    worst_class: float | None = None
    harmonic_mean: float | None = None
    geometric_mean: float | None = None
    group_harmonic_mean: float | None = None
    macro_precision: float | None = None
    top5: float | None = None
    test_images: Tensor | None = None
    predicted: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns every field in types that JSON has; a class that the split lacks is None."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("test_images", "predicted"):
            if fields[name] is not None:
                fields[name] = fields[name].tolist()
        per_class = [None if math.isnan(a) else a for a in self.per_class.tolist()]
        return fields | {"per_class": per_class}

    def summary(self) -> dict[str, Any]:
        """Returns the fields of :meth:`to_dict` but the rule and those per class and per bin."""
        long = ("per_class", "rule", "reliability", "test_images", "predicted")
        return {k: v for k, v in self.to_dict().items() if k not in long}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ShotReport":
        """Returns the report that :meth:`to_dict` described, in this version or an older one."""
        per_class = [math.nan if a is None else a for a in fields["per_class"]]
        counted = {
            name: torch.tensor(fields[name], dtype=torch.long)
            for name in ("test_images", "predicted")
            if fields.get(name) is not None
        }
        accuracies = {"per_class": torch.tensor(per_class, dtype=torch.float64)}
        return cls(**fields | counted | accuracies)

    def right_and_images(self) -> tuple[Tensor, Tensor]:
        """Returns how many images of each class are right and how many there are, (C,) int64.

        Raises:
            UsageError: If the report was written before it had the images per class.
        """
        if self.test_images is None:
            raise UsageError(
                "the report has no test_images, since an older version wrote it: evaluate again"
            )
        # Exact: an accuracy is the quotient of these integers, rounded once.
        return (self.per_class.nan_to_num(0) * self.test_images).round().long(), self.test_images

    def __str__(self) -> str:
        texts = shot_rule_texts(self.rule)
        values: dict[str, float | None] = {"all": self.all}
        values |= {f"{name} ({text})": getattr(self, name) for name, text in texts.items()}
        values |= {"class mean": self.class_mean, "macro F1": self.macro_f1, "ECE": self.ece}
        return ", ".join(f"{name} {_percent(value)}" for name, value in values.items())


def _percent(fraction: float | None) -> str:
    return "none" if fraction is None else f"{100 * fraction:.1f} %"


def objective_field(objective: Objective) -> str:
    """Returns the field of a report that holds an objective.

    >>> objective_field("harmonic_mean")
    'group_harmonic_mean'

    Raises:
        UsageError: If the objective is unknown.
    """
    check_choice("objective", objective, OBJECTIVES)
    # The harmonic mean over the classes is 0 as soon as one class is: nothing to select by.
    return "group_harmonic_mean" if objective == "harmonic_mean" else objective


def objective_value(report: ShotReport, objective: Objective) -> float:
    """Returns the figure of a report that an objective names: the larger, the better.

    Args:
        report: Figures on validation.
        objective: ``"all"`` is the accuracy over the images, ``"class_mean"`` the mean over the
            classes, ``"few_shot"`` the few-shot figure, ``"harmonic_mean"`` the harmonic mean of
            the many-, medium- and few-shot figures, ``"worst_class"`` the least per-class accuracy.

    Raises:
        UsageError: If the objective is unknown, or the report has no such figure; says which to
            take instead.
    """
    value: float | None = getattr(report, objective_field(objective))
    if value is not None:
        return value
    known = [name for name in OBJECTIVES if getattr(report, objective_field(name)) is not None]
    reason = (
        "the split has no image of a few-shot class"
        if objective == "few_shot"
        else "an older version wrote it"
    )
    raise UsageError(
        f"the report has no value for the objective {objective!r}, since {reason}; take one of: "
        f"{', '.join(known)}"
    )
