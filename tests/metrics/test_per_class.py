"""The table of classes and its file."""

import csv
import json
import math

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from timm_lt.metrics import compare_per_class, per_class_table, shot_accuracy, write_per_class
from timm_lt.utils.checks import UsageError

COUNTS = [500, 50, 19, 5, 3]
NAMES = ["cat", 'a "comma", here', "two\nlines", "=1+1", "ü"]
PREDS, TARGETS = [0, 0, 1, 2, 2, 0, 4], [0, 0, 0, 1, 2, 2, 1]


def rows():
    return per_class_table(shot_accuracy(PREDS, TARGETS, COUNTS), COUNTS, NAMES)


def test_rows_against_scikit_learn():
    precision, recall, f1, support = precision_recall_fscore_support(
        TARGETS, PREDS, labels=range(5), zero_division=np.nan
    )
    columns = {key: [row[key] for row in rows()] for key in rows()[0]}
    assert columns["class"] == [0, 1, 2, 3, 4]
    assert (columns["name"], columns["training_images"]) == (NAMES, COUNTS)
    groups = ["many_shot", "medium_shot", "few_shot", "few_shot", "few_shot"]
    assert (columns["shot_group"], columns["test_images"]) == (groups, support.tolist())
    # Class 3 is nowhere, class 4 is predicted but has no image.
    for name, values in (("accuracy", recall), ("precision", precision), ("f1", f1)):
        expected = [None if math.isnan(value) else pytest.approx(value) for value in values]
        assert columns[name] == expected


def test_files_read_back(tmp_path):
    write_per_class(tmp_path / "classes.csv", rows())
    data = (tmp_path / "classes.csv").read_bytes()
    with (tmp_path / "classes.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["name"].removeprefix("'") for row in found] == NAMES
    assert found[3]["name"] == "'=1+1"
    assert (found[3]["accuracy"], found[3]["training_images"]) == ("", "5")
    # To the last bit.
    accuracies = [float(row["accuracy"]) if row["accuracy"] else None for row in found]
    assert accuracies == [row["accuracy"] for row in rows()]
    assert "ü".encode() in data
    write_per_class(tmp_path / "classes.json", rows())
    assert json.loads((tmp_path / "classes.json").read_text(encoding="utf-8")) == rows()


@pytest.mark.parametrize(
    "name", ["=A1", "+1", "-1", "@SUM(A1)", "\t=A1", "\r=A1", "\n=A1", "\uff1dA1", "'n sync"]
)
def test_no_name_is_a_formula_in_csv(tmp_path, name):
    write_per_class(tmp_path / "names.csv", [{"name": name}, {"name": "a=b"}])
    with (tmp_path / "names.csv").open(encoding="utf-8", newline="") as file:
        _, first, second = csv.reader(file)
    # One apostrophe more, which is to be taken away.
    assert first == [f"'{name}"]
    assert second == ["a=b"]


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("classes.xlsx", [{"class": 0}], r"must end in \.csv or \.json"),
        ("classes.csv", [], "at least one row"),
        ("classes.csv", [{"class": 0}, {"name": "a"}], "all must have the same columns"),
        ("classes.csv", [{"name": "\ud800"}], "surrogates not allowed"),
        ("classes.json", [{"f1": 0.5}, {"f1": math.nan}], "not JSON compliant"),
        ("classes.json", [{"class": np.int64(3)}], "int64 is not JSON"),
    ],
)
def test_bad_rows_write_nothing(tmp_path, path, content, message):
    with pytest.raises(UsageError, match=message):
        write_per_class(tmp_path / path, content)
    assert list(tmp_path.iterdir()) == []


def test_classifiers_side_by_side():
    reports = {
        name: shot_accuracy(p, TARGETS, COUNTS) for name, p in (("a", PREDS), ("b", TARGETS))
    }
    found = compare_per_class(reports, COUNTS, NAMES)
    for row, single in zip(found, rows(), strict=True):
        assert row["accuracy_a"] == single["accuracy"]
        assert row["accuracy_b"] == (1.0 if single["test_images"] else None)
        assert {**row, **single} == {**single, **row}
        assert list(row)[:5] == ["class", "name", "training_images", "shot_group", "test_images"]
    reports["c"] = shot_accuracy([0], [0], COUNTS)
    with pytest.raises(UsageError, match="reports of 'a' and 'c' are on different splits"):
        compare_per_class(reports, COUNTS)


def test_invalid_tables_are_refused():
    report = shot_accuracy(PREDS, TARGETS, COUNTS)
    assert "name" not in per_class_table(report, COUNTS)[0]
    with pytest.raises(UsageError, match="class_counts has 2 classes, expected 5"):
        per_class_table(report, [5, 5])
    for names in (["cat"], "abcde", [*NAMES[:4], 7]):
        with pytest.raises(UsageError, match="label_names must be 5 names, got "):
            per_class_table(report, COUNTS, names)
