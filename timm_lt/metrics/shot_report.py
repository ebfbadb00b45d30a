"""The report of a classifier, its objectives, and the table of classes as CSV or JSON."""

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from timm_lt.utils.checks import UsageError, check_choice, shown_names, user_errors
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
    """Accuracies of a classifier over a split and per shot group, as fractions.

    Fields that default to None are also None in a report of an older version that lacks them.

    Attributes:
        all: Accuracy over the images.
        class_mean: Mean of the per-class accuracies over the classes that the split has; equal to
            ``all`` if the split is balanced.
        many_shot, medium_shot, few_shot: Mean accuracy of the classes of a shot group; None if the
            split has no image of them.
        macro_f1: Mean of the per-class F1 over the classes in the targets or the predictions.
        per_class: Accuracy of each class, (C,) float64; NaN for a class that the split lacks.
        rule: The rule that defines the shot groups.
        ece: Expected calibration error; None without logits, as the next two.
        ece_per_group: Expected calibration error of each shot group.
        reliability: The bins of :func:`~timm_lt.metrics.reliability` over all images.
        worst_class: Lowest per-class accuracy.
        harmonic_mean, geometric_mean: Means of the per-class accuracies; 0 if one of them is.
        group_harmonic_mean: Harmonic mean of the shot groups' accuracies that are not None.
        macro_precision: Mean of the per-class precision over the classes in the targets or the
            predictions; 0 for a class without predictions.
        top5: Top-5 accuracy; None without logits. Equal logits rank by class.
        test_images: Images of each class in the split, (C,) int64.
        predicted: Predictions of each class, (C,) int64.
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
        """Returns all fields, JSON-ready; a class that the split lacks is None."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {k: v.tolist() for k, v in fields.items() if isinstance(v, Tensor)}
        fields["per_class"] = [None if math.isnan(a) else a for a in fields["per_class"]]
        return fields

    def summary(self) -> dict[str, Any]:
        """Returns the scalar fields of :meth:`to_dict`."""
        long = ("per_class", "rule", "reliability", "test_images", "predicted")
        return {k: v for k, v in self.to_dict().items() if k not in long}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ShotReport":
        """Restores a report from :meth:`to_dict`, also of an older version."""
        per_class = [math.nan if a is None else a for a in fields["per_class"]]
        tensors = {
            name: torch.tensor(fields[name], dtype=torch.long)
            for name in ("test_images", "predicted")
            if fields.get(name) is not None
        }
        tensors["per_class"] = torch.tensor(per_class, dtype=torch.float64)
        return cls(**fields | tensors)

    def right_and_images(self) -> tuple[Tensor, Tensor]:
        """Returns the right images and all images of each class, (C,) int64."""
        if self.test_images is None:
            raise UsageError("the report has no test_images (an older version): evaluate again")
        # Exact: the accuracy is the quotient of these integers.
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
    """Returns the name of a report's field for an objective."""
    check_choice("objective", objective, OBJECTIVES)
    # The harmonic mean over classes is 0 if any class is, and so cannot select.
    return "group_harmonic_mean" if objective == "harmonic_mean" else objective


def objective_value(report: ShotReport, objective: Objective) -> float:
    """Returns a report's value of an objective; larger is better.

    The objective is ``"all"`` (accuracy over images), ``"class_mean"``, ``"few_shot"``,
    ``"harmonic_mean"`` (of the many-, medium- and few-shot accuracies) or ``"worst_class"``. It is
    a UsageError if the report has no value for it.
    """
    value: float | None = getattr(report, objective_field(objective))
    if value is None:
        known = [name for name in OBJECTIVES if getattr(report, objective_field(name)) is not None]
        raise UsageError(
            f"the report has no value for the objective {objective!r} (the split has no image of "
            f"these classes, or an older version wrote it); choose one of: {', '.join(known)}"
        )
    return value


# A spreadsheet runs a cell that begins with one of these as a formula, or drops the apostrophe.
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
        report: Report on a split.
        class_counts: Training images per class, as for the report, (C,).
        label_names: Names of the classes, (C,); without them the rows have no name.

    Returns:
        Rows in class order. Accuracy is None for a class that the split lacks, precision for a
        class without predictions, F1 for a class without both.

    Raises:
        UsageError: If the sizes differ, or an older version wrote the report.
    """
    right, images = report.right_and_images()
    predicted = torch.as_tensor(report.predicted)
    columns = _class_columns(report, class_counts, label_names) | {
        "accuracy": _quotients(right, images),
        "precision": _quotients(right, predicted),
        "f1": _quotients(2 * right, predicted + images),
    }
    return _rows(columns)


def compare_per_class(
    reports: Mapping[str, ShotReport],
    class_counts: ClassCounts,
    label_names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Returns one row per class with the accuracies of several classifiers.

    >>> from timm_lt.metrics import shot_accuracy
    >>> report = shot_accuracy([0, 1], [0, 0], class_counts=[500, 5])
    >>> compare_per_class({"crt": report}, [500, 5])[0]
    {'class': 0, 'training_images': 500, 'shot_group': 'many_shot', 'test_images': 2,
     'accuracy_crt': 0.5}

    Args:
        reports: Reports on one split by classifier.
        class_counts: Training images per class, as for the reports, (C,).
        label_names: Names of the classes, (C,); without them the rows have no name.

    Raises:
        UsageError: If the reports are on different splits.
    """
    columns: dict[str, list[Any]] = {}
    for name, report in reports.items():
        shared = _class_columns(report, class_counts, label_names)
        if columns and not shared.items() <= columns.items():
            raise UsageError(
                f"the reports of {next(iter(reports))!r} and {name!r} are on different splits"
            )
        columns |= shared | {f"accuracy_{name}": _quotients(*report.right_and_images())}
    return _rows(columns)


def _class_columns(
    report: ShotReport, class_counts: ClassCounts, label_names: Sequence[str] | None
) -> dict[str, list[Any]]:
    """Returns the columns that do not depend on the classifier."""
    _, images = report.right_and_images()
    counts = check_class_counts(class_counts, len(images), label_names)
    columns: dict[str, list[Any]] = {"class": list(range(len(counts)))}
    if label_names is not None:
        names = list(label_names)
        wrong = isinstance(label_names, str) or len(names) != len(counts)
        if wrong or not all(isinstance(name, str) for name in names):
            raise UsageError(f"label_names must be {len(counts)} names, got {shown_names(names)}")
        columns["name"] = names
    groups = shot_groups(counts, report.rule)
    group_of = torch.stack(list(groups.values())).int().argmax(0)
    return columns | {
        "training_images": counts.tolist(),
        "shot_group": [list(groups)[k] for k in group_of.tolist()],
        "test_images": images.tolist(),
    }


def _quotients(numerators: Tensor, denominators: Tensor) -> list[float | None]:
    """Returns the quotients of integers in float64; 0 / 0 is None."""
    quotients = numerators.double() / denominators
    return [None if math.isnan(value) else value for value in quotients.tolist()]


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def write_per_class(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows such as those of :func:`per_class_table` to a file, atomically, in UTF-8.

    None is an empty cell in CSV and null in JSON. Spreadsheets run text that looks like a formula:
    in CSV, text that begins with ``=``, ``+``, ``-``, ``@`` (or a full-width form), a tab, a line
    break or an apostrophe gets an apostrophe in front, to be removed when it is read back.

    Args:
        path: Ends in ``.csv`` or ``.json``.
        rows: At least one; all with the keys of the first, the columns.

    Raises:
        UsageError: If the suffix is another, there are no rows, or a value cannot be written.
    """
    path = Path(path)
    with user_errors(f"{path} cannot be written", TypeError, ValueError):
        if path.suffix not in (".csv", ".json"):
            raise ValueError("the name must end in .csv or .json")
        if not rows or any(list(row) != list(rows[0]) for row in rows):
            raise ValueError("there must be at least one row, and all must have the same columns")
        if path.suffix == ".json":
            write_json(path, [dict(row) for row in rows])
            return
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(map(_cell, rows[0]))
        writer.writerows([_cell(value) for value in row.values()] for row in rows)
        write_atomic(path, text.getvalue().encode())


def _cell(value: object) -> object:
    """Returns a CSV cell whose text cannot run as a formula."""
    is_formula = isinstance(value, str) and value.startswith(FORMULA_STARTS)
    return f"'{value}" if is_formula else value
