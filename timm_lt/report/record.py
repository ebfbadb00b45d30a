"""The figures of a run for its plots and its report, and the changes of classes under a head."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from timm_lt.data.decode import encoded_images, read_image
from timm_lt.fitting import AccuracyCurve
from timm_lt.metrics import Objective, ShotReport
from timm_lt.report.tables import GROUPS, JOINT, percent
from timm_lt.training.state import EpochRecord
from timm_lt.utils.checks import UsageError, check_choice
from timm_lt.utils.console import one_line
from timm_lt.utils.longtail import ShotRule, shot_groups

NAME_LENGTH = 40
# At most so many classes that gained or lost, pictures of each, and confusions of a head.
CHANGES, PICTURES, MISTAKES = 5, 4, 6
# With fewer test images a class gains or loses by chance.
FEW_IMAGES = 5
# Pixels of a picture's longer side, and bytes of its file.
SIDE, MAX_BYTES = 88, 3000
QUALITIES = (80, 60, 40, 20)


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
    """Data sets for the example images of a report.

    Args:
        train: Training images, with a column ``image``.
        train_labels: Their labels, (M,) int64.
        test: Test images, with a column ``image``.
        test_rows: Row in ``test`` of each evaluated image, (N,) int64; None shows no test images.
    """

    train: Dataset
    train_labels: Tensor
    test: Dataset
    test_rows: Tensor | None = None

    def of_test(self, image: int) -> str | None:
        """Returns the picture of an evaluated image as a data URI; None if it cannot be shown."""
        return None if self.test_rows is None else _picture(self.test, int(self.test_rows[image]))

    def of_class(self, label: int) -> str | None:
        """Returns the picture of the first training image of a class."""
        rows = (self.train_labels == label).nonzero()
        return _picture(self.train, int(rows[0])) if len(rows) else None


def _picture(dataset: Dataset, row: int) -> str | None:
    encoded = encoded_images(dataset)[row]["image"]
    try:
        return data_uri(read_image(encoded, row, dataset.features["image"]))
    except UsageError:
        # The loader has reported unreadable images already.
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class Report:
    """Figures of several heads on the same test images; a report omits what is missing.

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
        if self.recommended is not None:
            check_choice("recommended head", self.recommended, tuple(shapes))

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
        """Heads that are compared with the joint classifier."""
        return [name for name in self.reports if name != self.base]

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

    def preds(self, head: str) -> Tensor:
        """Returns the predictions of a head, (N,) int64."""
        return self.predictions[head].preds.long()

    def objective(self, head: str) -> Objective | None:
        """Returns the objective that a head's tau maximises; None if the tau was given."""
        selection = self.selections.get(head, {})
        return selection.get("objective") if "tau" in selection else None


def data_uri(image: Image.Image) -> str | None:
    """Returns an RGB image as a JPEG of at most 88 pixels and 3,000 bytes; None if larger."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    for quality in QUALITIES:
        file = io.BytesIO()
        small.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= MAX_BYTES:
            return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return None


def evaluated_rows(size: int, unreadable: list[int], evaluated: int) -> Tensor | None:
    """Returns the evaluated rows of a data set, None if not all unreadable rows are known."""
    readable = torch.ones(size, dtype=torch.bool)
    readable[unreadable] = False
    rows = readable.nonzero().flatten()
    return rows if len(rows) == evaluated else None


def min_images(report: Report) -> dict[str, int]:
    """Returns the test images that a class needs for its change to be shown, by shot group.

    These are five or, in a group where no class has five, as many as its largest class has.
    """
    images = report.images_per_class
    of_groups = {group: images[report.group_of == k] for k, group in enumerate(GROUPS)}
    return {group: min(FEW_IMAGES, int(n.max())) for group, n in of_groups.items() if n.any()}


def compare(report: Report, head: str) -> dict[str, Any]:
    """Compares a head with the joint classifier class by class.

    Returns the numbers of classes that are ``better`` and ``worse``, and those that ``gained`` and
    ``lost`` most: label, test images, those right ``before`` (joint classifier) and ``after``, and
    pictures of images on which the two differ.
    """
    before, images = report.reports[report.joint].right_and_images()
    after, _ = report.reports[head].right_and_images()
    change = ((after - before) / images.double()).nan_to_num(0)
    needed = min_images(report)
    enough = images >= torch.tensor([needed.get(g, 0) for g in GROUPS])[report.group_of]

    def most(gain: Tensor, right: str, wrong: str) -> list[dict[str, Any]]:
        """Returns the classes with the largest gain; among equals, those with more images."""
        classes: list[int] = ((gain > 0) & enough).nonzero().flatten().tolist()
        classes.sort(key=lambda c: (-float(gain[c]), -int(images[c])))
        return [
            {
                "label": c,
                "before": int(before[c]),
                "after": int(after[c]),
                "images": int(images[c]),
                "pictures": _differing(report, c, right, wrong),
            }
            for c in classes[:CHANGES]
        ]

    return {
        "gained": most(change, head, report.joint),
        "lost": most(-change, report.joint, head),
        "better": int((change > 0).sum()),
        "worse": int((change < 0).sum()),
    }


def _differing(report: Report, label: int, right: str, wrong: str) -> list[dict[str, str]]:
    """Returns pictures of a class's images on which one head is right and the other wrong."""
    who = "the joint classifier" if wrong == report.joint else "this head"
    preds, name = report.preds(wrong), report.names[label]
    rows = (report.targets == label) & (report.preds(right) == label) & (preds != label)
    pictures = []
    for row in rows.nonzero().flatten()[:PICTURES].tolist():
        if report.images and (uri := report.images.of_test(row)):
            pred = report.names[int(preds[row])]
            text = f"{name}, which {who} takes for {pred}{_confidence(report, wrong, row)}"
            pictures.append({"uri": uri, "text": text, "note": pred})
    return pictures


def _confidence(report: Report, head: str, row: int) -> str:
    confidences = report.predictions[head].confidences
    return "" if confidences is None else f" ({percent(float(confidences[row]))} % sure)"


def confused_groups(report: Report, head: str) -> Mapping[str, Mapping[str, float]]:
    """Returns the outcomes of each shot group's test images, as shares that sum to 1.

    The outcomes are ``right`` and, for wrong predictions, the shot group of the predicted class.
    """
    preds, targets = report.preds(head), report.targets
    outcomes = [*GROUPS, "right"]
    outcome = torch.where(preds == targets, len(GROUPS), report.group_of[preds])
    cells = report.group_of[targets] * len(outcomes) + outcome
    counts = torch.bincount(cells, minlength=len(GROUPS) * len(outcomes)).double()
    return {
        group: dict(zip(outcomes, (row / row.sum()).tolist(), strict=True))
        for group, row in zip(GROUPS, counts.view(len(GROUPS), -1), strict=True)
        if row.sum() > 0
    }


def frequent_mistakes(report: Report, head: str) -> list[dict[str, Any]]:
    """Returns the most frequent confusions of a head, with two pictures of each.

    Only pairs of classes that occur are counted, so memory does not grow with C².
    """
    preds, targets, names = report.preds(head), report.targets, report.names
    wrong = preds != targets
    pairs, times = (targets[wrong] * len(names) + preds[wrong]).unique(return_counts=True)
    mistakes = []
    for k in times.argsort(descending=True, stable=True)[:MISTAKES].tolist():
        label, pred = divmod(int(pairs[k]), len(names))
        row = int(((targets == label) & (preds == pred)).nonzero()[0])
        images, pictures = report.images, []
        if images and (test := images.of_test(row)) and (train := images.of_class(pred)):
            text = f"{names[label]}, taken for {names[pred]}{_confidence(report, head, row)}"
            like = f"a training image of {names[pred]}"
            pictures = [
                {"uri": test, "text": text, "note": "test"},
                {"uri": train, "text": like, "note": "train"},
            ]
        share = int(times[k]) / int(report.images_per_class[label])
        mistake = {"label": label, "pred": pred, "images": int(times[k]), "share": share}
        mistakes.append(mistake | {"pictures": pictures})
    return mistakes
