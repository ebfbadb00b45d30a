"""The data set list: splits of lists of images, and all mistakes in them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from timm_lt.data import create_splits, hold_out, read_image_list
from timm_lt.data.decode import encoded_images
from timm_lt.data.lists import joined, missing_rows
from timm_lt.data.sources import Paths, find_splits
from timm_lt.utils.checks import UsageError

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


def test_absolute_paths_of_every_system_do_not_start_at_the_root():
    absolute = ["/a/1.png", r"C:\a\1.png", "d:/a/1.png", r"\\server\a\1.png"]
    relative = ["a/1.png", r"a\1.png", "c:.png", "a/C:/1.png"]
    expected = absolute + [f"/root/{path}" for path in relative]
    # Backslashes become slashes, as there is no such file.
    expected = [path.replace("\\", "/") for path in expected]
    assert list(joined("/root", Paths(absolute + relative))) == expected


def test_without_a_test_list_a_part_of_training_is_held_out(root):
    found = find_splits("list", root=root, train="train.txt", test_fraction=0.4)
    labels = [0] * 6 + [1] * 4 + [2] * 3
    train, test = hold_out(labels, 0.4)
    assert {split: rows["label"][:] for split, rows in found.items()} == {
        "train": [labels[row] for row in train],
        "test": [labels[row] for row in test],
    }
    assert found["train"].column_names == ["image", "label"]
    assert not hasattr(found["train"].features["label"], "names")
    assert problems_of(root, test_fraction=1) == ["test fraction must be a number in (0, 1), got 1"]


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
    options = {"train": train, "test": test}
    (root / "names.txt").write_text("cat\r\nbee\r\nant\r\n")
    for names, order in (({}, "ant bee cat"), ({"label_names": "names.txt"}, "cat bee ant")):
        found = find_splits("list", root=root, **options, **names)
        own = found["test"].features["label"].names
        assert own == order.split()
        assert [own[label] for label in found["train"]["label"][:]] == [name for name, _ in images]
        assert [own[label] for label in found["test"]["label"][:]] == ["cat"]
    (root / "names.txt").write_text("cat\nbee\n")
    (root / "new.csv").write_text("path,label\nall photos/cat/test 0.png,dog\n")
    for options, fault in (
        ({"train": train, "label_names": "names.txt"}, "train list: .* not in label_names: ant;"),
        ({"train": train, "test": "new.csv"}, "test list: 1 .* not in the train list: dog;"),
        ({"test": test}, "test list: 1 classes are not in the train list: cat; .* be numbers"),
        ({"train": train, "test": "test.txt"}, "test list: 3 .* not in the train list: 0, 1, 2;"),
    ):
        (problem,) = problems_of(root, **options)
        assert re.match(fault, problem)


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
    found = problems_of(root, val="val.txt", test="test.txt", label_names="none.txt")
    assert found[0].startswith(f"val list: {root}/val.txt, line 1: expected a path, a blank and")
    assert found[1:3] + found[4:] == [
        f"train list: 8 of 24 files do not exist: {gone}, ...",
        f"test list: 1 of 5 files do not exist: {root}/no such folder/x.png",
        f"there is no file {root}/none.txt nor {Path.cwd()}/none.txt",
    ]
    assert found[3] == (
        "3 images are listed more than once, here with their splits and labels: "
        f"{root}/all photos/ant/train 0.png (train 0, train 1, train 2), "
        f"{root}/all photos/ant/train 1.png (train 0, train 4), "
        f"{root}/all photos/cat/train 2.png (train 2, test 2); keep one line for each"
    )


def test_a_missing_or_wrong_root_and_missing_lists(root):
    (problem,) = problems_of(root / "all photos", train=root / "train.txt")
    assert problem.endswith(f", ...; relative paths start at the root {root}/all photos")
    for wrong, fault in ((root / "none", "does not exist"), (root / "val.txt", "is not a folder")):
        assert problems_of(wrong, train=root / "train.txt") == [f"root '{wrong}' {fault}"]
    assert problems_of(root, val="v.txt", test=root / "t.txt") == [
        f"val list: there is no file {root}/v.txt nor {Path.cwd()}/v.txt",
        f"test list: there is no file {root}/t.txt",
    ]


@pytest.mark.parametrize(
    ("lists", "names", "problem"),
    [
        ({"train": [0] * 3 + [9] * 3 + [10**15] * 3}, "", "998 of 1,.* no image: 1, 2, 3, 4, 5,"),
        ({"train": [0, 0, 0, 1, 1]}, "", "1 of 2 .* fewer than 3 images, .* train, val, test: 1;"),
        (
            {"train": [0, 1], "val": [0, 1, 9**17], "test": [0]},
            "",
            r"val .* = 16677181699",
        ),
        ({"train": [0, 2], "val": [0, 2], "test": [2]}, "abc", "1 of 3 .* no image: b;"),
        ({"train": [0, 1], "val": [0, 1], "test": [0]}, "aA", "1 class names .*'a' and 'A'"),
        ({"train": [0, 1], "val": [0, 1], "test": [0]}, " a", "line 1 is empty"),
    ],
)
def test_classes_that_cannot_be_trained(tmp_path, lists, names, problem):
    (tmp_path / "names.txt").write_text("\n".join(names))
    options = {"label_names": "names.txt"} if names else {}
    for split, labels in lists.items():
        rows = [(f"{split}{row}.png", label) for row, label in enumerate(labels)]
        save(tmp_path, [path for path, _ in rows])
        (tmp_path / f"{split}.txt").write_text("".join(f"{path} {c}\n" for path, c in rows))
        options[split] = f"{split}.txt"
    (found,) = problems_of(tmp_path, **options)
    assert re.search(problem, found)


def test_annotations_say_how_many_classes_there_are(root):
    entries = [{"path": f"all photos/ant/train {i}.png", "category_id": 0} for i in range(4)]
    (root / "l.json").write_text(json.dumps({"annotations": entries, "num_classes": 2}))
    (problem,) = problems_of(root, train="l.json")
    assert problem.startswith("train split: 1 of 2 classes have no image: 1; ")
    assert problem.endswith("e.g. with the data option min_images=1")


def test_files_are_missing_where_there_is_no_file(tmp_path):
    save(tmp_path, ("a/b/1.png", "a/2.png", "c/3.png"))
    (tmp_path / "a/link").symlink_to(tmp_path / "c/3.png")
    (tmp_path / "a/broken").symlink_to(tmp_path / "c/none")
    there = ["c/3.png", "a/2.png", "a/b/1.png", "a/link"]
    missing = ["a/b", "a/b/2", "a/broken", "a/2.png/x", "d/4", "\0/5"]
    paths = Paths([f"{tmp_path}/{name}" for name in there + missing])
    assert missing_rows(paths).tolist() == [4, 5, 6, 7, 8, 9]


def save(root, paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (len(path), 0, 0)).save(root / path)


def files(found):
    return {
        split: [image["path"] for image in encoded_images(rows)["image"]]
        for split, rows in found.items()
    }


def listed_with_splits(root, kind, values):
    """A list of four images of each of two classes for each value of its column split."""
    rows = [(f"{v}/{c}{i}.png", c, v) for v in values for c in ("ant", "bee") for i in range(4)]
    save(root, [path for path, _, _ in rows])
    if kind == "csv":
        lines = [f"{path},{v},{c}" for path, c, v in rows]
        (root / "all.csv").write_text("\n".join(["path,Split,label", *lines]))
        return "all.csv", rows
    labels = [{"image_id": p, "category_id": int(c == "bee")} for p, c, _ in rows]
    images = [{"id": p, "file_name": p, "split": v} for p, _, v in rows]
    content = {
        "images": [{"id": "bare", "file_name": "bare.png", "split": "test"}, *images],
        "annotations": labels,
        "categories": [{"id": 0, "name": "ant"}, {"id": 1, "name": "bee"}],
    }
    if kind == "bbn":
        entries = [{"path": p, "split": v, "category_id": int(c == "bee")} for p, c, v in rows]
        content = {"annotations": entries}
    (root / "all.json").write_text(json.dumps(content))
    return "all.json", rows


@pytest.mark.parametrize("kind", ["csv", "bbn", "coco"])
@pytest.mark.parametrize("values", [("Train", "VALID", "Test"), ("TRAINING", "dev")])
def test_a_column_of_splits_is_used(tmp_path, kind, values):
    name, rows = listed_with_splits(tmp_path, kind, values)
    split = dict(zip(values, ("train", "val", "test"), strict=False))
    found = files(find_splits("list", root=tmp_path, train=name))
    assert ("val" in found, len(found["val"])) == (True, 8)
    if len(values) < 3:
        # Held out of train.
        assert sorted(found["train"] + found.pop("test")) == sorted(
            f"{tmp_path}/{path}" for path, _, value in rows if split[value] == "train"
        )
        return
    for path, _, value in rows:
        assert f"{tmp_path}/{path}" in found[split[value]]
    # The same list for each split is the same.
    assert files(find_splits("list", root=tmp_path, train=name, val=name, test=name)) == found


@pytest.mark.parametrize(
    ("values", "options", "owner", "present"),
    [
        (("train", "val"), {"train": "all.csv", "val": "val.txt"}, "all.csv", "train, val"),
        (("train", "val"), {"train": "train.txt", "test": "all.csv"}, "all.csv", "train, val"),
        (("train", "test"), {"train": "train.txt", "test": "all.csv"}, "all.csv", "train, test"),
        (("val", "test"), {"train": "all.csv"}, "all.csv", "val, test"),
    ],
)
def test_a_column_of_splits_that_does_not_fit_is_refused(root, values, options, owner, present):
    listed_with_splits(root, "csv", values)
    problem = problems_of(root, **options)[0]
    assert f"the split column of {root}/{owner} has images of {present}: give" in problem


def test_annotations_of_camera_traps_are_read_as_they_are(tmp_path, caplog):
    counts = {"empty": 5, "deer": 4, "lynx": 2}
    images = [(f"{c}\\{i}.png", f"id-{c}-{i}", c) for c, n in counts.items() for i in range(n)]
    save(tmp_path, [file.replace("\\", "/") for file, _, _ in images] + ["bare.png"])
    extra = {"seq_id": "s1", "seq_num_frames": 3, "location": 7, "license": 1, "width": 4}
    content = {
        "info": {"version": "1"},
        "licenses": [{"id": 1}],
        "images": [{"id": i, "file_name": file, **extra} for file, i, _ in images]
        + [{"id": "bare", "file_name": "bare.png"}],
        "annotations": [
            {"id": f"a{k}-{i}", "image_id": i, "category_id": [*counts].index(c), "bbox": [0] * 4}
            for _, i, c in images
            for k in range(2)
        ],
        "categories": [{"id": k, "name": c} for k, c in enumerate([*counts, "wolf", "bear"])],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    splits = create_splits("list", root=str(tmp_path), train="train.json", min_images=3)
    assert splits.label_names == ["empty", "deer"]
    for rows in splits.datasets.values():
        for image, label in zip(encoded_images(rows)["image"], rows["label"], strict=True):
            assert Path(image["path"]).parent.name == splits.label_names[label]
    for text in (
        "1 of 12 images have no annotation and are left out: bare.png",
        "categories that have no image are left out: 2 of 5 (wolf, bear)",
        "columns that are not used: license, location, seq_id, seq_num_frames, width",
    ):
        assert text in caplog.text
    # The numbering of the list itself stays, for it may be that of other lists.
    listed = read_image_list(tmp_path / "train.json")
    assert listed.names == ["empty", "deer", "lynx", "wolf", "bear"]


@pytest.mark.parametrize(
    ("given", "names", "left_out"),
    [
        ("", ["0", "1"], "1 of 3 classes: 2 (3)"),
        ("Ant\nBee\nCat\nDog\n", ["Ant", "Bee"], "2 of 4 classes: Cat (3), Dog (0)"),
    ],
)
def test_small_classes_are_left_out(root, caplog, given, names, left_out):
    (root / "names.txt").write_text(given)
    options = {"label_names": "names.txt"} if given else {}
    lists = {split: f"{split}.txt" for split in ("train", "val", "test")}
    caplog.set_level("INFO", "timm_lt")
    splits = create_splits("list", root=str(root), min_images=4, **lists, **options)
    assert splits.class_counts.tolist() == [6, 4]
    assert splits.label_names == names
    assert splits.labels["test"].tolist() == [0, 1]
    assert f"min_images 4 leaves out {left_out}" in caplog.text
    # Labels 0 and 2 are closed up.
    lines = (root / "train.txt").read_text().splitlines(keepends=True)
    (root / "gap.txt").write_text("".join(line for line in lines if not line.endswith("1\n")))
    splits = create_splits("list", root=str(root), train="gap.txt", min_images=1)
    assert splits.label_names == ["0", "2"]
