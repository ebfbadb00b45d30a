"""The source ``list``: what it makes of lists, and all that it finds before training."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from timm_lt.data import create_dataset, create_splits, hold_out
from timm_lt.data.lists import Paths
from timm_lt.data.lists.presence import missing_rows
from timm_lt.data.sources import find_splits
from timm_lt.registry import UsageError

COLOURS = {"ant": (200, 0, 0), "bee": (0, 200, 0), "cat": (0, 0, 200)}
NUMBERS = {"ant": 6, "bee": 4, "cat": 3}


@pytest.fixture
def root(tmp_path):
    """Images of three classes in two folders, and lists of them."""
    lines = {"train": [], "val": [], "test": []}
    for label, (name, colour) in enumerate(COLOURS.items()):
        (tmp_path / "all photos" / name).mkdir(parents=True)
        for split in lines:
            for number in range(NUMBERS[name] if split == "train" else 1):
                path = f"all photos/{name}/{split} {number}.png"
                Image.new("RGB", (4, 4), colour).save(tmp_path / path)
                lines[split].append(f"{path} {label}\n")
    for split, listed in lines.items():
        (tmp_path / f"{split}.txt").write_text("".join(listed))
    return tmp_path


def problems_of(root, **options):
    with pytest.raises(UsageError) as caught:
        find_splits("list", root=root, **({"train": "train.txt"} | options))
    owner = f"lists of images in {root}: "
    # A single problem has its owner in front.
    return [problem.removeprefix(owner) for problem in caught.value.problems]


def test_lists_become_splits(root):
    (root / "names.txt").write_text("Ant\nHoney bee\nCat\n")
    lists = {split: f"{split}.txt" for split in ("train", "val", "test")}
    splits = create_splits("list", root=str(root), label_names="names.txt", **lists)
    assert splits.class_counts.tolist() == [6, 4, 3]
    assert splits.label_names == ["Ant", "Honey bee", "Cat"]
    assert splits.val_source == "val"
    assert splits.labels["test"].tolist() == [0, 1, 2]
    for split, dataset in splits.datasets.items():
        for row, label in zip(dataset, splits.labels[split], strict=True):
            assert_array_equal(np.asarray(row["image"])[0, 0], [*COLOURS.values()][label])


def test_without_names_classes_are_numbers(root):
    train = create_dataset("list", root=root, train="train.txt", test="test.txt")
    assert train.column_names == ["image", "label"]
    assert not hasattr(train.features["label"], "names")
    with pytest.raises(UsageError, match="no val split"):
        create_dataset("list", split="val", root=root, train="train.txt")


def test_without_a_test_list_a_part_of_training_is_held_out(root):
    found = find_splits("list", root=root, train="train.txt", test_fraction=0.4)
    labels = [0] * 6 + [1] * 4 + [2] * 3
    train, test = hold_out(labels, 0.4)
    assert {split: rows["label"][:] for split, rows in found.items()} == {
        "train": [labels[row] for row in train],
        "test": [labels[row] for row in test],
    }
    assert create_splits("list", root=str(root), train="train.txt").val_source == "train"
    assert problems_of(root, test_fraction=1) == ["test_fraction must be a number in (0, 1), got 1"]


def test_paths_start_at_the_root_and_lists_are_found_there_or_here(root, tmp_path, monkeypatch):
    (root / "here").mkdir()
    monkeypatch.chdir(root / "here")
    absolute = "".join(f"{root}/{line}\n" for line in (root / "test.txt").read_text().splitlines())
    (root / "here" / "elsewhere.txt").write_text(absolute)
    found = find_splits("list", root="..", train="train.txt", test="elsewhere.txt")
    assert len(found["test"]) == 3
    assert found["train"][12]["image"].getpixel((0, 0)) == COLOURS["cat"]
    # The root comes first.
    (root / "here" / "train.txt").write_text("")
    assert len(find_splits("list", root="..", train="train.txt")["train"]) > 0


def table(root, name, rows):
    content = "".join(f"all photos/{label}/{file},{label}\n" for label, file in rows)
    (root / name).write_text("path,label\n" + content)
    return name


def test_words_as_labels_mean_the_same_in_every_list(root):
    images = [(name, f"train {i}.png") for name in ("cat", "ant", "bee") for i in range(3)]
    train = table(root, "train.csv", images)
    # By itself, this list would number "cat" as 0.
    test = table(root, "test.csv", [("cat", "test 0.png")])
    found = find_splits("list", root=root, train=train, test=test)
    assert found["test"].features["label"].names == ["ant", "bee", "cat"]
    assert found["test"]["label"][:] == [2]
    assert found["train"]["label"][:] == [2] * 3 + [0] * 3 + [1] * 3
    (root / "names.txt").write_text("cat\r\nbee\r\nant\r\n")
    found = find_splits("list", root=root, train=train, test=test, label_names="names.txt")
    assert found["train"]["label"][:] == [0] * 3 + [2] * 3 + [1] * 3
    assert found["test"].features["label"].names == ["cat", "bee", "ant"]
    (root / "names.txt").write_text("cat\nbee\n")
    assert problems_of(root, train=train, test=test, label_names="names.txt") == [
        "train list: 1 classes are not in label_names: ant"
    ]
    (root / "new.csv").write_text("path,label\nall photos/cat/test 0.png,dog\n")
    assert problems_of(root, train=train, test="new.csv") == [
        "test list: 1 classes are not in train: dog"
    ]
    (problem,) = problems_of(root, test=test)
    assert "it has class names and the train list has numbers; give their order" in problem
    (problem,) = problems_of(root, train=train, test="test.txt")
    assert "it has numbers and the train list has class names; give their order" in problem


def test_everything_wrong_is_found_together(root):
    with (root / "train.txt").open("a") as file:
        file.write("".join(f"all photos/ant/gone {i}.png 0\n" for i in range(7)))
        file.write("all photos/ant/train 0.png 1\nall photos/ant/train 0.png 2\n")
        file.write("all photos/bee/../ant/./train 1.png 4\n")
        file.write("all photos/ant 0\n")
    with (root / "test.txt").open("a") as file:
        file.write("no such folder/x.png 1\nall photos/./cat//train 2.png 2\n")
    (root / "val.txt").write_text("all photos/cat/val 0.png\n")
    gone = ", ".join(f"{root}/all photos/ant/gone {i}.png" for i in range(5))
    twice = f"{root}/all photos/ant/train 0.png (0, 1), {root}/all photos/ant/train 1.png (0, 4)"
    assert problems_of(root, val="val.txt", test="test.txt", label_names="none.txt") == [
        f"val list: {root}/val.txt, line 1: label '0.png' is not a non-negative integer",
        f"train list: 8 of 24 files are not there: {gone}, ...",
        f"test list: 1 of 5 files are not there: {root}/no such folder/x.png",
        f"1 images are in both the train list and the test list: {root}/all photos/cat/train 2.png",
        f"train list: 2 images have different labels on different lines: {twice}",
        f"there is no file {root}/none.txt nor {Path.cwd()}/none.txt",
        "train list: 1 of 5 classes have no image: 3; labels must be 0 to C - 1",
    ]


def test_images_on_several_lines_are_no_images_for_two_splits(root):
    with (root / "train.txt").open("a") as file:
        file.write("".join(f"all photos/ant/../ant/train {number}.png 0\n" for number in range(6)))
        file.write("all photos/ant/train 2.png 0\nall photos/bee/train 0.png 0\n")
    lines = [f"{root}/all photos/ant/train {n}.png ({3 if n == 2 else 2} lines)" for n in range(5)]
    other = f"{root}/all photos/bee/train 0.png (1, 0)"
    assert problems_of(root, test="test.txt") == [
        f"train list: 1 images have different labels on different lines: {other}",
        f"train list: 6 images are on several lines: {', '.join(lines)}, ...; leave each on one",
    ]


def test_damaged_files_are_reported_with_what_else_is_wrong(root):
    (root / "all photos/ant/train 0.png").write_bytes(b"no image")
    (root / "all photos/cat/train 1.png").unlink()
    missing, damaged = problems_of(root, val="val.txt", test="test.txt")
    assert missing.startswith("train list: 1 of 13 files are not there: ")
    assert damaged.startswith(f"train split: image 0 ({root}/all photos/ant/train 0.png) cannot")


def test_a_missing_root_and_missing_lists(root):
    found = problems_of(root / "none", train=root / "train.txt", val="v.txt", test=root / "t.txt")
    assert found == [
        f"root {root}/none does not exist",
        f"val list: there is no file {root}/none/v.txt nor {Path.cwd()}/v.txt",
        f"test list: there is no file {root}/t.txt",
    ]
    (root / "file").write_text("")
    assert problems_of(root / "file", train=root / "train.txt") == [
        f"root {root}/file is no folder"
    ]


def test_a_wrong_root_is_named_where_no_file_is_there(root):
    (problem,) = problems_of(root / "all photos", train=root / "train.txt")
    assert problem.endswith(f", ...; relative paths start at the root {root}/all photos")


@pytest.mark.parametrize(
    ("train", "options", "problem"),
    [
        (
            [0, 0, 0, 9, 9, 9, *[10**15] * 3],
            {},
            "998 of 1,000,000,000,000,001 classes have no image: 1, 2, 3, 4, 5, ...",
        ),
        ([0, 0, 0, 1, 1], {}, "1 of 2 classes have fewer than 3 images, one for each split: 1;"),
        (
            [0, 0, 1],
            {"val": [0, 1]},
            "1 of 2 classes have fewer than 2 images, one for each split: 1",
        ),
        ([0, 1], {"val": [0], "test": [0]}, "val list: 1 of 2 classes have no image: 1"),
        (
            [0, 1],
            {"val": [0, 1], "test": [2]},
            "^.*test list: label 2 is beyond the 2 classes of the tr",
        ),
        (
            [0, 1],
            {"val": [0, 1, 9**17], "test": [0]},
            "val list: label 16677181699666569 is beyond",
        ),
        ([0, 2], {"val": [0, 2], "test": [2], "label_names": "abc"}, "1 of 3 .*: 1 \\(b\\)"),
        ([0, 1], {"val": [0, 1], "test": [2], "label_names": "ab"}, "label 2 is beyond the 2"),
        ([0, 1], {"val": [0, 1], "test": [0], "label_names": "aA"}, "1 class names .*'a' and 'A'"),
        ([0, 1], {"val": [0, 1], "test": [0], "label_names": "aa"}, "1 occur twice: a"),
        ([0, 1], {"val": [0, 1], "test": [0], "label_names": " a"}, "line 1 is empty"),
        ([0, 1], {"val": [0, 1], "test": [0], "label_names": ""}, "names.txt is empty"),
    ],
)
def test_classes_that_cannot_be_trained(tmp_path, train, options, problem):
    for split, labels in {"train": train, **options}.items():
        if split == "label_names":
            (tmp_path / "names.txt").write_text("\n".join(labels))
            options[split] = "names.txt"
            continue
        for row in range(len(labels)):
            Image.new("L", (1, 1)).save(tmp_path / f"{split}{row}.png")
        lines = [f"{split}{row}.png {label}\n" for row, label in enumerate(labels)]
        (tmp_path / f"{split}.txt").write_text("".join(lines))
        options = options | {split: f"{split}.txt"}
    with pytest.raises(UsageError, match=problem) as caught:
        find_splits("list", root=tmp_path, **options)
    assert len(caught.value.problems) == 1


def test_annotations_say_how_many_classes_there_are(root):
    entries = [{"path": f"all photos/ant/train {i}.png", "category_id": 0} for i in range(4)]
    (root / "l.json").write_text(json.dumps({"annotations": entries, "num_classes": 2}))
    assert problems_of(root, train="l.json") == [
        "train list: 1 of 2 classes have no image: 1; labels must be 0 to C - 1"
    ]


def test_files_are_missing_where_there_is_no_file(tmp_path):
    for name in ("a/b/1", "a/2", "c/3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/link").symlink_to(tmp_path / "c/3")
    (tmp_path / "a/broken").symlink_to(tmp_path / "c/none")
    names = ["c/3", "a/b", "a/2", "a/b/1", "a/b/2", "a/link", "a/broken", "a/2/x", "d/4", "\0/5"]
    paths = Paths([f"{tmp_path}/{name}" for name in names])
    assert missing_rows(paths).tolist() == [
        row for row, name in enumerate(names) if "\0" in name or not (tmp_path / name).is_file()
    ]
