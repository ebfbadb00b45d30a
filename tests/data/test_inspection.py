"""Inspection against figures worked out by hand and naive loops, and ``timm-lt inspect``."""

import csv
import io
import itertools
import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from timm_lt.cli import main
from timm_lt.data import inspect_splits
from timm_lt.data.inspection import DuplicateImage as Copy
from timm_lt.data.inspection import find_duplicates
from timm_lt.data.items import as_rgb
from timm_lt.data.sources import dataset_from_images
from timm_lt.utils.console import pillow_warnings_ignored

NAMES = ["a", "b", "c"]
SPLITS = ["train", "val", "test"]


def png(color, size=(4, 3), mode="RGB"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (color, 2 * color % 256, 7)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def split_of(files, labels, names=NAMES):
    images = [{"bytes": file, "path": None} for file in files]
    return dataset_from_images(images, np.array(labels), names)


@pytest.fixture
def three_splits():
    train = [png(n) for n in range(12)] + [png(3), png(3), b"", png(50, (9, 2), "L"), b"xy"]
    labels = [0] * 8 + [1] * 4 + [0, 1, 2, 2, 2]
    return {
        "train": split_of(train, labels),
        "val": split_of([png(100), png(101), png(3)], [0, 1, 2]),
        "test": split_of([png(3), png(200), png(100), png(201)], [0, 1, 0, 2]),
    }


def test_counts_and_imbalance(three_splits):
    found = inspect_splits(three_splits, name="three", shot_rule="oltr")
    assert found.class_counts == {"train": [9, 5, 3], "val": [1, 1, 1], "test": [2, 1, 1]}
    assert (found.num_classes, found.label_names, found.val_source) == (3, NAMES, "val")
    assert found.imbalance_factor == 3
    assert found.imbalance_ratio == pytest.approx((1 + 9 / 5 + 3) / 3)
    assert found.shots == {
        "many_shot": {"classes": 0, "rule": ">= 100", "images": 0},
        "medium_shot": {"classes": 0, "rule": "21 to 99", "images": 0},
        "few_shot": {"classes": 3, "rule": "<= 20", "images": 17},
    }


@pytest.mark.parametrize("large", [3_000_000, 2**63 - 1])
def test_labels_far_apart_are_counted_by_name(large):
    train = split_of([png(n) for n in range(6)], [0, 0, 7, 7, large, large], None)
    found = inspect_splits({"train": train, "test": train})
    assert found.label_names == ["0", "7", str(large)]
    assert found.class_counts == {"train": [2, 2, 2], "test": [2, 2, 2]}
    assert any(f"of {large + 1:,} classes have no image" in problem for problem in found.problems)


def test_damage_and_sizes(three_splits):
    seen = []
    found = inspect_splits(three_splits, on_image=lambda: seen.append(1))
    assert len(seen) == 24
    train = [(one.row, one.reason[:9]) for one in found.unreadable["train"]]
    assert train == [(14, "0 bytes"), (16, "it is not")]
    assert found.unreadable["val"] == found.unreadable["test"] == []
    assert (found.sizes.modes, found.sizes.formats) == ({"RGB": 21, "L": 1}, {"PNG": 22})
    assert (found.sizes.width, found.sizes.height) == ((4, 4, 9), (2, 3, 3))
    assert found.sizes.most_frequent == [(4, 3, 21), (9, 2, 1)]
    (problem,) = found.problems
    assert problem.startswith("train split: 2 of 17 images cannot be decoded: image 14: 0 bytes, ")
    found = inspect_splits(three_splits, quick=True, on_image=pytest.fail)
    assert (found.duplicates, found.sizes) == (None, None)
    assert [one.row for one in found.unreadable["train"]] == [14, 16]


def test_transparency_levels_and_images_of_one_colour_are_counted(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 4), dtype=np.uint8)
    # Black on black, which is one colour.
    icon = np.zeros((9, 9, 4), np.uint8)
    icon[3:6, 3:6, 3] = 255
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    pictures = [Image.fromarray(noise), Image.fromarray(noise[..., :3]), Image.fromarray(icon)]
    pictures += [deep, deep.convert("I"), Image.fromarray(noise[..., 0] / np.float32(255))]
    pictures += [Image.new("RGB", (20, 20), "red")]
    files = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG" if picture.mode in ("RGB", "RGBA") else "TIFF")
        files.append(buffer.getvalue())
    split = split_of(files * 3, [0, 1, 2] * 7)
    for background, one_color in (("white", 1), ("black", 2)):
        shown = as_rgb(split, background=background)
        with pillow_warnings_ignored():
            sizes = inspect_splits({"train": shown, "val": shown, "test": shown}).sizes
        # Three splits, three times each.
        assert (sizes.transparent, sizes.deep, sizes.huge) == (2 * 9, 3 * 9, 9)
        assert sizes.one_color == one_color * 9


def test_duplicates_are_counted_within_and_across(three_splits):
    found = inspect_splits(three_splits).duplicates
    # png(3) is in train three times, once of class b, and in val as class c.
    assert found.within == {"train": 2, "val": 0, "test": 0}
    assert found.across == {"train, val": 1, "train, test": 1, "val, test": 2}
    assert found.conflicts == 2
    assert found.pairs["train"] == [
        (Copy("train", "image 3", 0), Copy("train", "image 12", 0)),
        (Copy("train", "image 3", 0), Copy("train", "image 13", 1)),
    ]
    assert found.pairs["train, test"] == [(Copy("train", "image 3", 0), Copy("test", "image 0", 0))]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("xyz"), st.sampled_from(SPLITS), st.integers(0, 1)), max_size=12
    )
)
def test_counts_of_duplicates_are_those_of_a_naive_loop(images):
    images.sort(key=lambda image: SPLITS.index(image[1]))
    given = [(c, Copy(split, str(n), label)) for n, (c, split, label) in enumerate(images)]
    found = find_duplicates(given, SPLITS)
    contents = {split: [c for c, copy in given if copy.split == split] for split in SPLITS}
    for split in SPLITS:
        assert found.within[split] == len(contents[split]) - len(set(contents[split]))
    for one, other in itertools.combinations(SPLITS, 2):
        number = sum(content in contents[one] for content in contents[other])
        assert found.across[f"{one}, {other}"] == number
    firsts = {content: copy.label for content, copy in given[::-1]}
    assert found.conflicts == sum(firsts[content] != copy.label for content, copy in given)


def test_whatever_can_be_is_inspected_of_splits_that_cannot_be_trained_on():
    files = [png(n) for n in range(4)]
    bad, good = (split_of(files, labels, None) for labels in ([0, 0, -1, 3], [0, 0, 2, 3]))
    found = inspect_splits({"train": good, "val": bad})
    assert found.class_counts == {"train": [2, 0, 1, 1]}
    assert found.imbalance_factor == 2
    assert any("fewer than 2 images" in problem for problem in found.problems)
    assert any("labels[2] = -1 is negative" in problem for problem in found.problems)
    none = inspect_splits({"test": bad}, quick=True)
    assert (none.class_counts, none.imbalance_factor, none.num_classes) == ({}, None, 0)


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """12, 6 and 3 images of three classes; the working directory is beside them."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name, count in {"cat": 12, "[b]dog\n": 6, "owl": 3}.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def inspect(capsys, *arguments, status=0):
    assert main(["inspect", *map(str, arguments)]) == status
    output = capsys.readouterr()
    return output.err if status else output.out


def test_a_folder_is_inspected_as_a_run_takes_it(photos, capsys):
    text = inspect(capsys, "photos", "--json", "figures.json")
    for words in (
        "photos: 21 images of 3 classes",
        "val (held out of train by a run)",
        "duplicates (images with the same bytes): none",
        "unreadable images (all were decoded): none",
        "width 6 / 6 / 6, height 5 / 5 / 5",
        "imbalance factor 8 (",
        "imbalance ratio 3.667 (mean",
    ):
        assert words in text
    assert text.endswith("none of this keeps a run from training\n")
    folder = photos.parent / "inspect_photos"
    with (folder / "classes.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["label", "name", "train", "val", "test", "shot"],
            ["0", "[b]dog\n", "4", "1", "1", "few"],
            ["1", "cat", "8", "2", "2", "few"],
            ["2", "owl", "1", "1", "1", "few"],
        ]
    with Image.open(folder / "classes.png") as plot:
        assert plot.width > 500
    figures = json.loads((photos.parent / "figures.json").read_text())
    assert figures["imbalance_factor"] == 8
    assert figures["imbalance_ratio"] == pytest.approx((8 / 4 + 1 + 8) / 3)
    assert figures["class_counts"]["train"] == [4, 8, 1]
    assert inspect(capsys, "folder", "--root", "photos") == text


def test_a_bad_folder_is_inspected_and_its_problems_come_last(photos, capsys):
    (photos / "empty").mkdir()
    (photos / "cat" / "1.png").write_bytes(b"no image")
    (photos / "cat" / "2.png").write_bytes((photos / "cat" / "2.png").read_bytes()[:-50])
    shutil.copy(photos / "cat" / "3.png", photos / "owl" / "9.png")
    (photos / "owl" / "notes.txt").touch()
    text = inspect(capsys, "photos", "--output", "here")
    body, problems = text.split("3 problems would keep a run from training:\n")
    for words in (
        "photos: 22 images of 4 classes",
        "train (nothing is held out yet)",
        "[b]dog",
        "  within train: 1\n",
        "  under two labels: 1\n",
        "unreadable images (all were decoded): 2\n",
    ):
        assert words in body
    assert [line[:38] for line in problems.splitlines()] == [
        "- train split: 1 of 4 classes have no ",
        "- files that are not images by their s",
        "- train split: 2 of 22 images cannot b",
    ]
    assert (photos.parent / "here" / "classes.csv").exists()
    options = ("--option", "min_images=4", "--option", "other_files=skip", "--quick")
    text = inspect(capsys, "photos", *options)
    assert "duplicates: not looked for" in text
    assert "(by header and end of the files): 1\n" in text
    assert "empty" not in text


def test_a_list_and_a_name_are_inspected(photos, capsys):
    lines = [f"{path.relative_to(photos)} {n % 2}" for n, path in enumerate(photos.glob("c*/*"))]
    (photos / "train.txt").write_text("\n".join(lines))
    assert "train: 12 images of 2 classes" in inspect(capsys, photos / "train.txt")
    (photos.parent / "all.txt").write_text("\n".join([*lines, "gone/1.png 0", "gone/2.png 1"]))
    text = inspect(capsys, "all.txt", "--root", "photos")
    assert "all: 14 images of 2 classes" in text
    assert "gone/1.png): No such file or directory" in text
    assert "1 problem would keep" in text
    assert "2 of 14 files do not exist" in text
    name = ("list", "--option", "train=../all.txt", "--root", "photos", "--output", "named")
    assert inspect(capsys, *name).replace("named", "inspect_all") == text
    text = inspect(capsys, "digits_lt", "--shot-rule", "oltr", "--option", "seed=1")
    assert "imbalance factor 24 (" in text
    assert "<= 20" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nothing", "unknown data set .and no such folder or list.: 'nothing'; choose one of"),
        ("photos --root photos", "a folder is its own root"),
        ("photos --option min_image=3", "did you mean 'min_images'"),
        ("folder --root gone", "does not exist"),
        ("photos/cat", "no images in directories of classes, 12 directly in it"),
        ("x.parquet", r"x\.parquet is a table, not a list: give hub, with --root x\.parquet"),
        ("photos --output file/here", "--output: file is not a folder; choose another"),
        ("photos --output photos/here", "would lie in the folder photos"),
        ("digits_lt --root photos", "has no option .root."),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(photos, capsys, arguments, message):
    (photos.parent / "bad" / "empty").mkdir(parents=True)
    shutil.copytree(photos / "cat", photos.parent / "bad" / "cat")
    for name in ("x.parquet", "file"):
        (photos.parent / name).touch()
    before = sorted(photos.parent.rglob("*"))
    error = inspect(capsys, *arguments.split(), status=2)
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert sorted(photos.parent.rglob("*")) == before
