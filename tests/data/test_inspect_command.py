"""``timm-lt inspect``: folders, lists and names; what it prints and writes."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from timm_lt.cli import main


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


def test_a_folder_is_looked_at_as_a_run_takes_it(photos, capsys):
    text = inspect(capsys, "photos", "--json", "figures.json")
    assert "photos: 21 images of 3 classes" in text
    assert "val (held out of train by a run)" in text
    assert "duplicates (images with the same bytes): none" in text
    assert "unreadable images (all were decoded): none" in text
    assert "width 6 / 6 / 6, height 5 / 5 / 5" in text
    assert text.endswith("none of this keeps a run from training\n")
    folder = photos.parent / "inspect_photos"
    with (folder / "classes.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
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
    assert "imbalance factor 8 (" in text
    assert "imbalance ratio 3.667 (mean" in text
    assert figures["class_counts"]["train"] == [4, 8, 1]


def test_the_source_folder_is_looked_at_as_its_root_is(photos, capsys):
    assert inspect(capsys, "folder", "--root", "photos") == inspect(capsys, "photos")
    (photos / "empty").mkdir()
    assert "1 problem would" in inspect(capsys, "folder", "--root", "photos", "--quick")
    assert "does not exist" in inspect(capsys, "folder", "--root", "gone", status=2)
    photos.rename("folder")
    assert "folder: 21 images of 4 classes" in inspect(capsys, "folder", "--quick")


def test_a_bad_folder_is_looked_at_and_its_problems_come_last(photos, capsys):
    (photos / "empty").mkdir()
    (photos / "cat" / "1.png").write_bytes(b"no image")
    (photos / "cat" / "2.png").write_bytes((photos / "cat" / "2.png").read_bytes()[:-50])
    shutil.copy(photos / "cat" / "3.png", photos / "owl" / "9.png")
    (photos / "owl" / "notes.txt").touch()
    text = inspect(capsys, "photos", "--output", "here")
    assert "photos: 22 images of 4 classes" in text
    assert "train (nothing is held out yet)" in text
    assert "  within train: 1\n" in text
    assert "  under two labels: 1\n" in text
    assert "unreadable images (all were decoded): 2\n" in text
    body, problems = text.split("3 problems would keep a run from training:\n")
    assert "[b]dog" in body
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
    assert "val (held out of train by a run)" in text
    assert "empty" not in text
    assert "would keep a run from training:\n- " in text


def test_a_list_is_looked_at(photos, capsys):
    lines = [f"{path.relative_to(photos)} {n % 2}" for n, path in enumerate(photos.glob("c*/*"))]
    (photos / "train.txt").write_text("\n".join(lines))
    assert "train: 12 images of 2 classes" in inspect(capsys, photos / "train.txt")
    lines += ["gone/1.png 0", "gone/2.png 1"]
    (photos.parent / "all.txt").write_text("\n".join(lines))
    text = inspect(capsys, "all.txt", "--root", "photos")
    assert "all: 14 images of 2 classes" in text
    assert "gone/1.png): No such file or directory" in text
    assert "1 problem would keep" in text
    assert "2 of 14 files do not exist" in text
    name = ("list", "--option", "train=../all.txt", "--root", "photos", "--output", "named")
    named = inspect(capsys, *name)
    assert named.replace("named", "inspect_all") == text


def test_a_name_is_looked_at(photos, capsys):
    text = inspect(capsys, "digits_lt", "--shot-rule", "oltr", "--option", "seed=1")
    assert "digits_lt: " in text
    assert "imbalance factor 24 (" in text
    assert "<= 20" in text
    assert (photos.parent / "inspect_digits_lt" / "classes.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown data set .and no such folder or list.: 'nothing'; choose one of"),
        (["photos", "--root", "photos"], "a folder is its own root"),
        (["photos", "--option", "min_image=3"], "did you mean 'min_images'"),
        (["photos", "--option", "min_images=0"], "min_images must be an integer >= 1"),
        (["photos", "--option", "test_fraction=2"], "test_fraction must be"),
        (["photos", "--option", "min_images"], "--option takes KEY=VALUE, e.g. min_images=5"),
        (["photos/cat"], "no images in directories of classes, 12 directly in it"),
        (["photos/cat/0.png"], "0.png is an image: give the folder"),
        (["x.parquet"], r"x\.parquet is a table, not a list: give hub, with --root x\.parquet"),
        (["photos", "--output", "file/here"], "--output: file is not a folder; choose another"),
        (["bad", "--option", "test_fraction=2"], "test_fraction must be"),
        (["bad.txt", "--option", "seed=-1"], "seed must be"),
        (["digits_lt", "--root", "photos"], "has no option .root."),
    ],
)
def test_mistakes_are_told(photos, capsys, arguments, message):
    (photos.parent / "bad" / "empty").mkdir(parents=True)
    shutil.copytree(photos / "cat", photos.parent / "bad" / "cat")
    (photos.parent / "bad.txt").write_text("gone.jpg 0\n")
    for name in ("x.parquet", "file"):
        (photos.parent / name).touch()
    error = inspect(capsys, *arguments, status=2)
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert not list(photos.parent.glob("inspect_*"))


@pytest.mark.parametrize("arguments", [["."], ["folder", "--root", "."], ["../photos/."]])
def test_nothing_is_written_among_the_images(photos, capsys, monkeypatch, arguments):
    monkeypatch.chdir(photos)
    before = sorted(photos.rglob("*"))
    error = inspect(capsys, *arguments, status=2)
    assert "inspect_photos would lie in the folder" in error
    assert f"--output {photos.parent}/inspect_photos" in error
    assert sorted(photos.rglob("*")) == before
    inspect(capsys, *arguments, "--quick", "--output", "../here")
    assert (photos.parent / "here" / "classes.csv").exists()
