"""The report: what a classifier gets right, and how one figure of it serves as an objective.

The table of classes, and its file in CSV or JSON.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from timm_lt.utils.checks import UsageError, check_choice
from timm_lt.utils.files import write_atomic, write_json
from timm_lt.utils.longtail import (
    ClassCounts,
    ShotRule,
    check_class_counts,
    shot_groups,
    shot_rule_texts,
)

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


# The columns that depend on the classifier.
FIGURES = ("accuracy", "precision", "f1")
# A spreadsheet takes a cell that begins with one of these for a formula, or drops the apostrophe.
FORMULA_STARTS = (*"=+-@\t\r\n'", *"\uff1d\uff0b\uff0d\uff20")


def per_class_table(
    report: ShotReport, class_counts: ClassCounts, label_names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Returns one row per class, JSON-ready.

    >>> from timm_lt.metrics import shot_accuracy
    >>> report = shot_accuracy([0, 1, 0, 1], [0, 0, 1, 1], class_counts=[500, 5])
    >>> per_class_table(report, [500, 5], ["cat", "lynx"])[1]
    {'class': 1, 'name': 'lynx', 'training_images': 5, 'shot_group': 'few_shot', 'test_images': 2,
     'accuracy': 0.5, 'precision': 0.5, 'f1': 0.5}

    Args:
        report: Figures of a split.
        class_counts: Training images per class, as for the report, (C,).
        label_names: Names of the classes, C of them; without, the rows have no name.

    Returns:
        Rows in the order of the classes. Accuracy is None for a class that the split lacks,
        precision for one that is never predicted, F1 for one that is neither in the split nor
        predicted.

    Raises:
        UsageError: If the sizes differ, or the report is of an older version that had no images per
            class.
    """
    right, images = report.right_and_images()
    counts = check_class_counts(class_counts, len(images), label_names)
    if len(counts) != len(images):
        raise UsageError(f"class_counts has {len(counts)} classes, the report has {len(images)}")
    predicted = torch.as_tensor(report.predicted)
    columns: dict[str, list[Any]] = {"class": list(range(len(counts)))}
    if label_names is not None:
        columns["name"] = _checked_names(label_names, len(counts))
    groups = {name: mask.tolist() for name, mask in shot_groups(counts, report.rule).items()}
    columns["training_images"] = counts.tolist()
    columns["shot_group"] = [
        next(name for name, mask in groups.items() if mask[c]) for c in columns["class"]
    ]
    columns["test_images"] = images.tolist()
    columns["accuracy"] = _quotients(right, images)
    columns["precision"] = _quotients(right, predicted)
    columns["f1"] = _quotients(2 * right, predicted + images)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def compare_per_class(
    reports: Mapping[str, ShotReport],
    class_counts: ClassCounts,
    label_names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Returns one row per class with the accuracy of each of several classifiers.

    >>> from timm_lt.metrics import shot_accuracy
    >>> report = shot_accuracy([0, 1], [0, 0], class_counts=[500, 5])
    >>> compare_per_class({"crt": report}, [500, 5])[0]
    {'class': 0, 'training_images': 500, 'shot_group': 'many_shot', 'test_images': 2,
     'accuracy_crt': 0.5}

    Args:
        reports: Figures of one split by classifier, at least one.
        class_counts: Training images per class, as for the reports, (C,).
        label_names: Names of the classes, C of them; without, the rows have no name.

    Raises:
        UsageError: As :func:`per_class_table`; or if there are no reports, or they are of different
            splits.
    """
    if not reports:
        raise UsageError("reports must not be empty")
    tables = {
        name: per_class_table(report, class_counts, label_names) for name, report in reports.items()
    }
    first, *others = tables
    shared = [{k: v for k, v in row.items() if k not in FIGURES} for row in tables[first]]
    for other in others:
        pairs = zip(shared, tables[other], strict=True)
        if not all(row.items() <= found.items() for row, found in pairs):
            raise UsageError(f"the reports of {first!r} and {other!r} are not of one split")
    for name, table in tables.items():
        for row, found in zip(shared, table, strict=True):
            row[f"accuracy_{name}"] = found["accuracy"]
    return shared


def _checked_names(label_names: Sequence[str], num_classes: int) -> list[str]:
    names = list(label_names)
    if isinstance(label_names, str) or len(names) != num_classes:
        raise UsageError(f"label_names must be {num_classes} names, got {len(names)}")
    for c, name in enumerate(names):
        if not isinstance(name, str):
            raise UsageError(f"label_names[{c}] = {name!r} is not a text")
    return names


def _quotients(numerators: Tensor, denominators: Tensor) -> list[float | None]:
    """Returns the quotients of integers; 0 / 0 is None."""
    # In float64: torch divides integers in float32.
    quotients = numerators.double() / denominators
    return [None if math.isnan(value) else value for value in quotients.tolist()]


def write_per_class(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows such as those of :func:`per_class_table` to a file, atomically, in UTF-8.

    A value that is None is an empty cell in CSV and null in JSON. JSON has texts as they are. CSV
    is opened in spreadsheets, which run a text that looks like a formula: there, a text that begins
    with ``=``, ``+``, ``-``, ``@``, a full-width form of these, a tab, a line break or an
    apostrophe gets one more apostrophe before it. To read texts back, take one leading apostrophe
    away.

    Args:
        path: Ends in ``.csv`` or ``.json``.
        rows: At least one; all have the same keys, the columns.

    Raises:
        UsageError: If the suffix is another, rows have other keys or there are none, a text has no
            UTF-8, or JSON has no word for a value, such as NaN or a number of NumPy's.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".json"):
        raise UsageError(f"{path} must end in .csv or .json, to say what it is")
    if not rows:
        raise UsageError(f"there are no rows to write to {path}")
    columns = list(rows[0])
    for number, row in enumerate(rows):
        if list(row) != columns:
            raise UsageError(f"row {number} has the columns {list(row)}, row 0 has {columns}")
    if path.suffix == ".json":
        _check_json(rows)
        write_json(path, [dict(row) for row in rows])
        return
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(map(_cell, columns))
    writer.writerows([_cell(value) for value in row.values()] for row in rows)
    try:
        content = text.getvalue().encode()
    except UnicodeEncodeError as error:
        bad = error.object[error.start : error.end]
        raise UsageError(f"a text of the rows has {bad!r}, which UTF-8 cannot hold") from error
    write_atomic(path, content)


def _check_json(rows: Sequence[Mapping[str, Any]]) -> None:
    for number, row in enumerate(rows):
        for column, value in row.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise UsageError(
                    f"row {number} has {value!r} in the column {column!r}, which JSON cannot hold: "
                    "take a Python number that is finite, a text or None"
                ) from error


def _cell(value: object) -> object:
    """Returns a value for CSV: None is empty, and no text is a formula."""
    if value is None:
        return ""
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    return value
