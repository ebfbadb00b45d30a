"""The table of classes, and its file in CSV or JSON."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_lt.metrics.shot_report import ShotReport
from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import write_atomic, write_json
from timm_lt.utils.longtail import ClassCounts, check_class_counts, shot_groups

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
