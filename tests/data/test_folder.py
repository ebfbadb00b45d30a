"""The data set folder, against torchvision's ImageFolder, and the message of every mistake."""

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from timm_lt.data import create_splits
from timm_lt.data.decode import encoded_images
from timm_lt.data.folder import find_images
from timm_lt.data.sources import find_splits
from timm_lt.utils.checks import UsageError

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))


def fill(root, counts, suffix="png"):
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            PICTURE.save(root / name / f"{number}.{suffix}")


def paths(dataset):
    return [image["path"] for image in encoded_images(dataset)["image"]]


def problems(root, **options):
    with pytest.raises(UsageError) as caught:
        find_splits("folder", root=root, **options)
    assert str(caught.value).startswith(f"folder {root}: ")
    return [problem.removeprefix(f"folder {root}: ") for problem in caught.value.problems]


@pytest.fixture
def three(tmp_path):
    fill(tmp_path, {"cat": 20, "dog": 10, "Emu": 5})
    return tmp_path


def test_classes_and_images_are_those_of_torchvision(tmp_path):
    counts = {"train/b": 4, "train/B2": 3, "train/a": 5, "train/a/2-x": 2, "train/a/2/x": 2}
    fill(tmp_path, counts | {"test/b": 1, "test/B2": 1, "test/a": 1}, "jpg")
    fill(tmp_path, {"train/a/.hidden": 1, "__MACOSX/a": 1, ".git/b": 1}, "jpg")
    (tmp_path / "README.txt").touch()
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".a.jpg"):
        (tmp_path / "train/a" / name).touch()
    splits = find_splits("folder", root=tmp_path)
    assert list(splits) == ["train", "test"]
    for split, dataset in splits.items():
        expected = ImageFolder(tmp_path / split)
        # torchvision lists hidden files too.
        samples = [(path, label) for path, label in expected.samples if "/." not in path]
        assert paths(dataset) == [path for path, _ in samples]
        assert dataset.with_format("numpy")["label"][:].tolist() == [label for _, label in samples]
        assert dataset.features["label"].names == expected.classes
    assert len(splits["train"]) == 16
    image = splits["train"][0]["image"]
    assert (image.mode, image.size) == ("RGB", (8, 6))


def test_the_test_part_is_stratified_and_stays_the_same(three, monkeypatch):
    first = find_splits("folder", root=three)
    assert [len(first[split]) for split in ("train", "test")] == [28, 7]
    labels = first["test"].with_format("numpy")["label"][:]
    # Upper case comes first.
    assert first["test"].features["label"].names == ["Emu", "cat", "dog"]
    assert torch.bincount(torch.from_numpy(labels)).tolist() == [1, 4, 2]
    assert not set(paths(first["train"])) & set(paths(first["test"]))
    real = os.scandir

    class Reversed(list):
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    monkeypatch.setattr(os, "scandir", lambda path: Reversed([*real(path)][::-1]))
    monkeypatch.chdir(three.parent)
    again = find_splits("folder", root=three.name)
    for split, dataset in first.items():
        assert paths(again[split]) == paths(dataset)
    other = find_splits("folder", root=three, seed=1, test_fraction=0.4)
    assert len(other["test"]) == 14
    assert not set(paths(first["test"])) <= set(paths(other["test"]))


@pytest.mark.parametrize(
    ("counts", "sizes", "names"),
    [
        ({"Train/a": 2, "Train/b": 1, "val/a": 1, "val/b": 1, "TEST/a": 1}, [3, 2, 1], "ab"),
        ({"train/a": 2, "train/b": 2, "Validation/a": 1, "Validation/b": 1}, [2, 2, 2], "ab"),
        ({"train": 4, "test": 4, "bus": 4}, [9, 0, 3], ["bus", "test", "train"]),
    ],
)
def test_directories_of_splits_go_by_several_names_and_may_be_classes(
    tmp_path, counts, sizes, names
):
    fill(tmp_path, counts)
    splits = find_splits("folder", root=tmp_path)
    assert [len(splits.get(split, ())) for split in ("train", "val", "test")] == sizes
    assert splits["train"].features["label"].names == list(names)


ODD = ["a b", "ü", "日本", "new\nline", "#1", "50%", "a:", "--x", "*?[", "q'\"", "{y}", "\\", "  "]


def test_odd_names_are_read(tmp_path):
    root = tmp_path / "a:" / "b #%20"
    fill(root, dict.fromkeys(ODD, 0))
    for number, name in enumerate(ODD):
        for file in ODD[:4]:
            Image.new("RGB", (4, 4), (number * 10, 0, 0)).save(root / name / f"{file}.png")
    # Twice a slash: a name that looks like an address.
    splits = create_splits("folder", root=f"{tmp_path}/a://b #%20")
    assert splits.label_names == sorted(ODD)
    for split in ("train", "val", "test"):
        dataset = splits.datasets[split]
        images = splits.images(split, size=None, mean=(0.5,) * 3, std=(0.5,) * 3).images
        stored = splits.stored_images(split, size=(4, 4), preprocessing={})
        for row, label in enumerate(splits.labels[split].tolist()):
            red = ODD.index(splits.label_names[label]) * 10
            assert dataset[row]["image"].getpixel((0, 0)) == (red, 0, 0)
            assert images[row, :, 0, 0].tolist() == [red, 0, 0]
            assert stored[row][0].getpixel((0, 0)) == (red, 0, 0)
        assert len(stored.fingerprint()) == 64


def test_links_are_followed_but_each_directory_once(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    fill(elsewhere, {"cat": 3, "images": 3})
    fill(root, {"dog": 1})
    (root / "cat").symlink_to(elsewhere / "cat")
    for number in range(3):
        (root / "dog" / f"linked {number}.png").symlink_to(elsewhere / "images" / f"{number}.png")
    splits = find_splits("folder", root=root)
    assert len(splits["train"]) + len(splits["test"]) == 7
    (root / "dog" / "again").symlink_to(root / "dog")
    (root / "kitten").symlink_to(root / "cat")
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nothing")
    (root / "dog" / "self").symlink_to(root / "dog" / "self")
    empty, problem = problems(root)
    assert "1 of 3 classes have no image: kitten;" in empty
    assert problem.startswith("files and directories that cannot be used: 4 (")
    assert "dog/gone.png (neither a file nor a directory)" in problem
    assert f"dog/again (the same directory as {root}/dog, by a link)" in problem
    assert f"kitten (the same directory as {root}/cat, by a link)" in problem
    splits = find_splits("folder", root=root, other_files="skip", min_images=1)
    assert len(splits["train"]) == 5


def test_all_problems_are_reported_together(tmp_path):
    fill(tmp_path, {"train/cat": 2, "train/Cat": 2, "train/dog": 1, "train/empty": 0})
    fill(tmp_path, {"train/extra": 2, "val/cat": 1, "val/dog": 0, "val/fox": 1, "val/Cat": 1})
    for name in ("dog/notes.txt", "dog/a.csv", "dog/b.csv", "dog/photo.HEIC", "cat/zero.png"):
        (tmp_path / "train" / name).touch()
    (tmp_path / "val/cat/text.jpg").write_text("no image")
    PICTURE.save(tmp_path / "train" / "loose.png")
    found = problems(tmp_path)
    expected = [
        "1 class names differ only in case, blanks or composed letters: 'Cat' and 'cat'; rename",
        "train split: 2 of 6 classes have no image: empty, fox; add images, or leave these classes",
        "train split: 1 of 6 classes have fewer than 2 images, one each for train, test: dog; add",
        "val split: 2 of 6 classes have no image: dog, extra; add",
        "images in no class: 1 (train/loose.png); move",
        "files that are not images by their suffix (2 .csv, 1 .heic, 1 .txt): 4 (train/dog/",
        "train split: image 4 ({}/train/cat/zero.png) cannot be decoded: 0 bytes; repair",
        "val split: image 2 ({}/val/cat/text.jpg) cannot be decoded: it is not an image",
    ]
    assert len(found) == len(expected)
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start.format(tmp_path)), problem


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({".": 1}, "no images in directories of classes, 1 directly in it: make a"),
        ({"test/a": 1, "val/a": 1}, "there is no directory train beside test, val"),
        ({"train/a": 3, "val/a": 1, "valid/a": 1}, "2 directories are for val: val and valid"),
        ({"train/a": 3, "train/b": 3, "c": 3}, "train has directories and no images of its own"),
        ({"images/cat": 3, "images/dog": 3}, "images has directories and no images of its own"),
        ({"train/images/cat": 3}, "images has directories and no images of its own"),
        ({"a": 3, "b": 2}, "fewer than 3 images, one each for train, val, test: b;"),
        ({"e\u0301": 3, "\u00e9": 3}, "composed letters"),
        ({"a b": 3, "A  b ": 3}, "'A  b ' and 'a b'"),
    ],
)
def test_layouts_that_cannot_be_meant_are_refused(tmp_path, counts, message):
    fill(tmp_path, counts)
    with pytest.raises(UsageError, match=message):
        find_splits("folder", root=tmp_path)


def test_small_classes_are_left_out_and_logged(three, caplog):
    fill(three, {"none": 0, "one": 1, "two\n": 2})
    assert len(problems(three)) == 2
    with caplog.at_level("INFO", "timm_lt"):
        splits = find_splits("folder", root=three, min_images=3)
    assert splits["test"].features["label"].names == ["Emu", "cat", "dog"]
    left_out = "none (0), one (1), 'two\\n' (2)"
    assert caplog.messages == [f"min_images 3 leaves out 3 of 6 classes: {left_out}"]


SYSTEM = [
    *("@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", ".@__thumb/s100.png", ".thumbnails/0.png", "._0.png"),
    *(".AppleDouble/0.png", "__MACOSX/._0.png", "$RECYCLE.BIN/$R1.png", "#recycle/0.png"),
    *("System Volume Information/0.png", "lost+found/1.png", ".Trash-1000/files/0.png"),
    *(".ipynb_checkpoints/0-checkpoint.png", "@Recycle/0.png", ".picasaoriginals/0.png"),
    *(".picasa.ini", "Picasa.ini", "Thumbs.db", "desktop.ini", "Icon\r", "0.THM", "0.LRV"),
    *("0.AAE", "0.XMP", "0.png.xmp", "Thumbs.db:encryptable", "0.png:Zone.Identifier", "0.LRF"),
]


def test_thumbnails_and_sidecars_are_no_images_and_no_classes(three):
    expected = {split: paths(rows) for split, rows in find_splits("folder", root=three).items()}
    for place in ("", "cat/", "cat/2020/"):
        for name in SYSTEM:
            (three / place / name).parent.mkdir(parents=True, exist_ok=True)
            PICTURE.save(three / place / name, "png")
    found = find_splits("folder", root=three)
    assert {split: paths(rows) for split, rows in found.items()} == expected
    # The listing of predict.
    listed = find_images(str(three))
    assert sorted(listed.images) == sorted(path for part in expected.values() for path in part)
    assert not listed.others


def test_other_files_can_be_skipped_and_are_counted(three, caplog):
    (three / "cat/notes.txt").touch()
    (three / "cat/photo.heic").touch()
    PICTURE.save(three / "loose.png")
    with caplog.at_level("INFO", "timm_lt"):
        splits = find_splits("folder", root=three, other_files="skip")
    assert sum(map(len, splits.values())) == 35
    loose, others = caplog.messages
    assert loose == "images in no class, left out: 1 (loose.png)"
    assert others.endswith("(1 .heic, 1 .txt), left out: 2 (cat/notes.txt, cat/photo.heic)")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_no_text_are_refused(three):
    (three / os.fsdecode(b"caf\xe9")).mkdir()
    os.close(os.open(three / "cat" / os.fsdecode(b"\xff.png"), os.O_CREAT))
    (problem,) = problems(three)
    assert r": 2 (caf\udce9 (its name is not UTF-8), cat/\udcff.png (its name is not" in problem


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_fraction": 1.0}, r"test fraction must be a number in \(0, 1\)"),
        ({"min_images": 0}, "min_images must be an integer >= 1"),
        ({"min_images": 21}, "no class has 21 images, as min_images requires"),
        ({"other_files": "ignore"}, "choose one of: raise, skip"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_wrong_options_are_refused(three, options, message):
    with pytest.raises(UsageError, match=message):
        find_splits("folder", root=three, **options)
