"""The record from which the plots and the HTML report are drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from timm_lt.fitting import AccuracyCurve
from timm_lt.metrics import Objective, ShotReport
from timm_lt.report.tables import JOINT
from timm_lt.training.state import EpochRecord
from timm_lt.utils.checks import UsageError, unknown_name
from timm_lt.utils.console import one_line
from timm_lt.utils.longtail import ShotRule, shot_groups

# Heads compared with the joint classifier; more would make the report large.
MAX_COMPARED = 8
NAME_LENGTH = 40


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of a head on the test images.

    Args:
        preds: Predicted classes, (N,), of any integer type.
        confidences: Their probabilities, (N,); None if unknown.
    """

    preds: Tensor
    confidences: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ExampleImages:
    """Data sets from which example images are shown.

    Args:
        train: Training images, with a column ``image``.
        train_labels: Their labels, (M,) int64.
        test: Test images, with a column ``image``.
        test_rows: Row in ``test`` of each evaluated image, (N,) int64. With None no test image is
            shown.
    """

    train: Dataset
    train_labels: Tensor
    test: Dataset
    test_rows: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Report:
    """Figures of several heads on the same test images.

    Only the first five arguments are required; the report has no section for what is missing.

    Args:
        title: Name of the run.
        reports: Test figures by head.
        class_counts: Training images per class, (C,).
        targets: True classes of the test images, (N,).
        predictions: Predictions on the test images by head.
        label_names: Names of the classes, (C,).
        curves: Curve of the validation accuracy against tau, and the tau of the head, by head.
        selections: How each head's options were selected, see :func:`timm_lt.fit_head`.
        seconds: Time to make each head.
        joint: Name of the joint classifier. If it is not among the heads, nothing is compared.
        recommended: Name of the head that is best on validation.
        images: Example images.
        history: Epochs of the representation's training.
        kept_epoch: Epoch whose weights were kept.
        recipe: Resolved recipe, as YAML.
        facts: Further lines for the top of the page, by their headings.
        warning: Warning to show before any figure.

    Raises:
        UsageError: If there are no heads, a head lacks a prediction for each target, or the
            recommended head is not among them.
    """

    title: str
    reports: Mapping[str, ShotReport]
    class_counts: Tensor
    targets: Tensor
    predictions: Mapping[str, Predictions]
    label_names: Sequence[str] | None = None
    curves: Mapping[str, tuple[AccuracyCurve, float]] = field(default_factory=dict)
    selections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    joint: str = JOINT
    recommended: str | None = None
    images: ExampleImages | None = None
    history: Sequence[EpochRecord] = ()
    kept_epoch: int | None = None
    recipe: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    warning: str | None = None

    def __post_init__(self) -> None:
        shapes = {
            name: tuple(self.predictions[name].preds.shape) if name in self.predictions else None
            for name in self.reports
        }
        wrong = {name: shape for name, shape in shapes.items() if shape != self.targets.shape}
        if wrong or not shapes:
            raise UsageError(
                "a report needs at least one head, each with predictions of the shape of the "
                f"targets, {tuple(self.targets.shape)}; got {wrong or 'no head'}"
            )
        if self.recommended is not None and self.recommended not in shapes:
            raise unknown_name("recommended head", self.recommended, list(shapes))

    @property
    def rule(self) -> ShotRule:
        """Rule of the shot groups."""
        return next(iter(self.reports.values())).rule

    @property
    def base(self) -> str | None:
        """Name of the joint classifier, None if it is not among the heads."""
        return self.joint if self.joint in self.reports else None

    @cached_property
    def compared(self) -> list[str]:
        """Heads that are compared with the joint classifier; the recommended one is among them."""
        others = [name for name in self.reports if name != self.base]
        if self.recommended in others[MAX_COMPARED:]:
            return [*others[: MAX_COMPARED - 1], self.recommended]
        return others[:MAX_COMPARED]

    @cached_property
    def by_frequency(self) -> Tensor:
        """Classes from the most to the least frequent, (C,)."""
        return self.class_counts.argsort(descending=True, stable=True)

    @cached_property
    def names(self) -> list[str]:
        """Names of the classes, one short line each."""
        names = self.label_names or [""] * len(self.class_counts)
        return [one_line(name, NAME_LENGTH) or f"class {c}" for c, name in enumerate(names)]

    @cached_property
    def group_of(self) -> Tensor:
        """Index of each class's shot group, (C,) int64."""
        groups = shot_groups(self.class_counts, self.rule)
        return torch.stack(list(groups.values())).int().argmax(0)

    @cached_property
    def images_per_class(self) -> Tensor:
        """Test images of each class, (C,) int64."""
        return torch.bincount(self.targets, minlength=len(self.class_counts))

    def objective(self, head: str) -> Objective | None:
        """Returns the objective that a head's tau maximises; None for a tau that was given."""
        selection = self.selections.get(head, {})
        return selection.get("objective") if "tau" in selection else None
