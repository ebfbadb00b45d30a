"""Hold-out, the identity of images, and the checks of splits before training."""

import os
from itertools import product
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from timm_lt.data import create_dataset, create_splits, hold_out, register_dataset
from timm_lt.data.decode import encoded_images
from timm_lt.data.given import folder_of, given_splits
from timm_lt.data.images import label_tensor
from timm_lt.data.sources import DATASETS, dataset_from_arrays, dataset_from_files
from timm_lt.data.splits import Splits, image_keys, path_keys, split_digests
from timm_lt.utils.checks import UsageError

NAMES = ["ant", "bee", "cat"]


def dataset_of(labels, names=NAMES, *, named=True):
    """A data set whose images have their row in every pixel."""
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    images = np.broadcast_to(images, (len(labels), 4, 6, 3))
    # A ClassLabel refuses labels beyond its names itself; Value does not.
    dataset = dataset_from_arrays(np.ascontiguousarray(images), np.array(labels), names)
    return dataset if named else dataset.cast_column("label", datasets.Value("int64"))


def three(*, named=True, **changed):
    labels = {"train": [0, 0, 0, 1, 1, 2], "val": [0, 1, 2], "test": [0, 1, 2, 2], **changed}
    return {split: dataset_of(values, named=named) for split, values in labels.items()}


def test_splits_know_labels_counts_and_names_and_decode_their_images():
    splits = Splits.from_datasets(three())
    assert splits.class_counts.tolist() == [3, 2, 1]
    assert (splits.num_classes, splits.label_names) == (3, NAMES)
    labels = {split: values.tolist() for split, values in splits.labels.items()}
    assert labels == {"train": [0, 0, 0, 1, 1, 2], "val": [0, 1, 2], "test": [0, 1, 2, 2]}
    images = splits.images("test", size=None, mean=(0, 0, 0), std=(1, 1, 1))
    assert images.images.shape == (4, 3, 4, 6)
    assert images.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    batch, targets = images.__getitems__([3])
    torch.testing.assert_close(batch, torch.full((1, 3, 4, 6), 3 / 255))
    assert targets.tolist() == [2]


def test_a_missing_or_empty_split_is_named():
    for split, protocol in (("train", "standard"), ("test", "paper")):
        found = three()
        del found[split]
        with pytest.raises(UsageError, match=f"the {split} split has no images"):
            Splits.from_datasets(found, protocol=protocol)
    for split in ("train", "val", "test"):
        found = three()
        found[split] = found[split].select([])
        with pytest.raises(UsageError, match=f"the {split} split has no images"):
            Splits.from_datasets(found)


@pytest.mark.parametrize("with_val", [True, False])
def test_a_part_of_each_class_is_held_out_for_the_test(with_val):
    found = {"train": dataset_of([0] * 20 + [1] * 10 + [2] * 3)}
    if with_val:
        found["val"] = dataset_of([0, 1, 2])
    splits = Splits.from_datasets(found)
    assert torch.bincount(splits.labels["test"]).tolist() == [4, 2, 1]
    assert splits.class_counts.tolist() == ([16, 8, 2] if with_val else [13, 6, 1])
    assert splits.val_source == ("val" if with_val else "train")
    # Every pixel of an image is its row.
    parts = ["train", "test"] if with_val else ["train", "val", "test"]
    rows = [image.getpixel((0, 0))[0] for part in parts for image in splits.datasets[part]["image"]]
    assert sorted(rows) == list(range(33))
    larger = Splits.from_datasets(found, test_fraction=0.4)
    assert torch.bincount(larger.labels["test"]).tolist() == [8, 4, 1]


RENAMED = {"test": dataset_of([0, 1, 2], ["ant", "cat", "bee"])}
LONGER = {"test": dataset_of([0, 1, 2], [*NAMES, "dog"])}
# Counted without counting up to the largest label.
HUGE = {"train": [0, 0, 0, 1, 1, 1, *[2 * 10**18] * 3]}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (three(train=[0, 0, 2]), "train split: 1 of 3 classes have no image: bee; add images, or"),
        (three(val=[0, 1]), "val split: 1 of 3 classes have no image: cat; add"),
        (three(train=[0, 1], val=[2]), r"2 problems\n- train .*: cat;.*\n- val .*: ant, bee;"),
        (
            {"train": dataset_of([0, 0, 0, 1, 1, 2])},
            "train split: 2 of 3 .* fewer than 3 images, one each for train, val, test: bee, cat;",
        ),
        (
            three(named=False, **HUGE),
            r": 1,999,999,999,999,999,998 of 2.* image: 2, 3, 4, 5, 6,",
        ),
        (three(named=False, val=[3, 0, 1, 2]), r"val split: labels\[0\] = 3 is not below"),
        (three(named=False, test=[3, 0, 1, 2]), r"test split: labels\[0\] = 3 is not below"),
        (three(named=False, train=[-1, 0]), r"train split: labels\[0\] = -1 is negative"),
        (three(named=False, test=[-1, 0]), r"test split: labels\[0\] = -1 is negative"),
        (three() | RENAMED, "test split: label 1 is class 'cat', not 'bee'"),
        (three() | LONGER, "test split: label 3 is class 'dog', not None"),
    ],
)
def test_splits_that_cannot_be_trained_on_are_refused(found, message):
    with pytest.raises(UsageError, match=message):
        Splits.from_datasets(found)


def test_names_that_differ_in_case_and_a_class_without_test_image_are_allowed():
    names = ["a", "A", "b"]
    parts = {split: dataset_of([0, 1, 2], names) for split in ("train", "val")}
    splits = Splits.from_datasets(parts | {"test": dataset_of([0, 0], names)})
    assert splits.label_names == names


def test_digests_tell_which_split_has_other_images_wherever_the_files_lie():
    def digests(root, files, labels=(0, 1, 1)):
        whole = dataset_from_files([f"{root}/{file}" for file in files], np.array(labels), None)
        rows = {"train": whole.select([1, 0]), "test": whole.select([2])}
        return split_digests(rows, {name: label_tensor(part) for name, part in rows.items()}, root)

    first = digests("/a", ["x/1", "y/2", "y/3"])
    assert digests("/b c", ["x/1", "y/2", "y/3"]) == first
    for files, labels, changed in [
        (["x/1", "y/2", "y/4"], (0, 1, 1), {"test"}),
        (["y/2", "x/1", "y/3"], (0, 1, 1), {"train"}),
        (["x/1y", "/2", "y/3"], (0, 1, 1), {"train"}),
        (["x/1", "y/2", "y/3"], (0, 1, 0), {"test"}),
    ]:
        now = digests("/a", files, labels)
        assert {split for split in first if now[split] != first[split]} == changed


def test_digests_and_keys_of_images_in_memory():
    images = np.zeros((3, 4, 4, 3), np.uint8)
    other = images + np.array([0, 1, 2], np.uint8)[:, None, None, None]
    digests = set()
    for part in (images, images[:2], np.zeros((3, 4, 8, 3), np.uint8), other):
        dataset = dataset_from_arrays(part, np.zeros(len(part), np.int64), ["a"])
        keys = image_keys(dataset)
        assert len({*keys}) == (3 if part is other else 1)
        assert image_keys(dataset.select([1, 0])) == [keys[1], keys[0]]
        found = split_digests({"train": dataset}, {"train": label_tensor(dataset)})["train"]
        assert found["images"] == len(part)
        digests.add(found["sha256"])
    assert len(digests) == 4


def test_keys_are_the_same_on_windows(monkeypatch):
    monkeypatch.setattr(os, "sep", "\\")
    assert path_keys([r"C:\photos\train\cat\1.jpg"]) == ["cat/1.jpg"]
    assert path_keys([r"/photos\train\cat\1.jpg"], "/photos") == ["cat/1.jpg"]


COUNTS = [100, 30, 8, 3, 2]
LABELS = torch.repeat_interleave(torch.arange(5), torch.tensor(COUNTS))[torch.randperm(143)]


def test_every_class_gives_its_share_and_keeps_an_image():
    train, val = hold_out(LABELS, 0.2, seed=1)
    # 0.2 n, rounded: 20, 6, 1.6, 0.6, 0.4 (but at least one).
    assert torch.bincount(LABELS[val]).tolist() == [20, 6, 2, 1, 1]
    assert torch.bincount(LABELS[train]).tolist() == [80, 24, 6, 2, 1]
    assert sorted(train.tolist() + val.tolist()) == list(range(143))
    assert torch.bincount(LABELS[hold_out(LABELS, 0.9)[0]]).tolist() == [10, 3, 1, 1, 1]


def test_it_depends_on_the_seed_alone_and_on_every_image_alike():
    one, again, other = (hold_out(LABELS, seed=seed)[1] for seed in (3, 3, 4))
    assert one.equal(again)
    assert not one.equal(other)
    hits = torch.zeros(143)
    for seed in range(500):
        hits[hold_out(LABELS, 0.2, seed=seed)[1]] += 1
    # Each image of the largest class is held out with probability 1 / 5: sd 8.9 of 500.
    assert (hits[LABELS == 0] - 100).abs().max() < 4.5 * 8.95


def test_with_keys_an_added_image_moves_one_other_at_most_and_rows_do_not_matter():
    def held(keys, labels):
        return {keys[row] for row in hold_out(labels, 0.2, seed=1, keys=keys)[1].tolist()}

    labels = LABELS.tolist()
    keys = [f"{label}/{row}.jpg" for row, label in enumerate(labels)]
    before = held(keys, labels)
    order = torch.randperm(143).tolist()
    assert held([keys[row] for row in order], [labels[row] for row in order]) == before
    assert [sum(key.startswith(str(c)) for key in before) for c in range(5)] == [20, 6, 2, 1, 1]
    for number in range(20):
        new = f"1/new {number}.jpg"
        # Of 31 images 6 are held out too, so a new one among them takes the place of one.
        moved = held([new, *keys], [1, *labels]) ^ before
        assert len(moved) in (0, 2)
        assert len(moved - {new}) <= 1
        assert all(key.startswith("1/") for key in moved)
    hits = torch.zeros(143)
    for seed in range(500):
        hits[hold_out(LABELS, 0.2, seed=seed, keys=keys)[1]] += 1
    assert (hits[LABELS == 0] - 100).abs().max() < 4.5 * 8.95
    with pytest.raises(UsageError, match="142 keys, 143 labels"):
        hold_out(LABELS, keys=keys[1:])


@pytest.mark.parametrize(
    ("labels", "fraction", "message"),
    [
        ([0, 0, 1, 2, 2, 3], 0.2, "2 of 4 classes have only one image.*: 1, 3; give a val"),
        ([0, 0, 10**18], 0.2, "1 of 2 classes have only one image.*: 1000000000000000000;"),
        ([0, 0], 0.0, r"fraction must be a number in \(0, 1\)"),
        ([0, 0], 1.0, r"fraction must be a number in \(0, 1\)"),
        ([], 0.2, "must not be empty"),
    ],
)
def test_what_cannot_be_held_out_is_refused(labels, fraction, message):
    with pytest.raises(UsageError, match=message):
        hold_out(labels, fraction)


def test_a_data_set_without_validation_split_gives_a_part_of_train():
    @register_dataset("without_val")
    def source(split, *, rows=40):
        column = datasets.Features(image=datasets.Value("int64"), label=datasets.ClassLabel(2))
        given = {"image": list(range(rows)), "label": [i % 2 for i in range(rows)]}
        return None if split == "val" else datasets.Dataset.from_dict(given, column)

    try:
        splits = create_splits("without_val", val_fraction=0.25)
        with pytest.raises(UsageError, match="has no val split: hold out a part of train"):
            create_dataset("without_val", split="val")
    finally:
        del DATASETS._parts["without_val"]
    assert splits.val_source == "train"
    rows = {split: splits.datasets[split]["image"][:] for split in ("train", "val", "test")}
    assert len(rows["val"]) == 10
    assert sorted(rows["train"] + rows["val"]) == list(range(40)) == rows["test"]
    # Class counts are those that are trained on.
    assert splits.class_counts.tolist() == [15, 15]
    assert splits.labels["val"].tolist() == [row % 2 for row in rows["val"]]


def _held_out(door, root, tmp_path):
    """Returns the names of the images of each split of a folder, a list or a table."""
    files = sorted(root.rglob("*.png"))
    labels = [["cat", "dog"].index(path.parent.name) for path in files]
    if door == "folder":
        splits = create_splits("folder", root=str(root / "2019"))
    elif door == "list":
        lines = [f"{f.relative_to(root)} {c}\n" for f, c in zip(files, labels, strict=True)]
        (tmp_path / "train.txt").write_text("".join(lines))
        splits = create_splits("list", root=str(root), train=tmp_path / "train.txt")
    else:
        table = tmp_path / "train.parquet"
        rows = {"image": [{"bytes": f.read_bytes(), "path": "1.png"} for f in files]}
        columns = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
        datasets.Dataset.from_dict(rows | {"label": labels}, columns).to_parquet(table)
        splits = create_splits("hub", root=str(table), cache_dir=str(tmp_path / "cache"))
    known = {path.read_bytes(): path.name for path in files}
    return {
        split: {
            known[image["bytes"] or Path(image["path"]).read_bytes()]
            for image in encoded_images(rows)["image"]
        }
        for split, rows in splits.datasets.items()
    }


@pytest.mark.parametrize(("door", "year"), [("folder", 2019), ("list", 2020), ("table", 2019)])
def test_an_image_of_another_class_or_folder_moves_nothing(tmp_path, door, year):
    root = tmp_path / "photos"
    noise = np.random.default_rng(0)

    def save(path):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (4, 4, 3), np.uint8)).save(root / path)

    for name, count in {"cat": 20, "dog": 8}.items():
        for number in range(count):
            save(f"2019/{name}/{name} {number}.png")
    before = _held_out(door, root, tmp_path)
    for number in range(8):
        place = f"{year}/dog/new {number}.png"
        save(place)
        after = _held_out(door, root, tmp_path)
        (root / place).unlink()
        for split in ("val", "test"):
            cats = [{name for name in part[split] if "cat" in name} for part in (before, after)]
            assert cats[0] == cats[1]
            # Into the place of one that is displaced, or without displacing one.
            assert len(before[split] - after[split]) <= (f"new {number}.png" in after[split])
            assert len(after[split] - before[split]) <= 1
    root = root.rename(tmp_path / "moved photos")
    assert _held_out(door, root, tmp_path) == before


def test_the_same_files_are_held_out_through_every_door(tmp_path):
    root = tmp_path / "photos"
    for split, name, number in product(("train", "test"), ("cat", "dog"), range(12)):
        path = root / split / name / "2020" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
    data = {split: ImageFolder(str(root / split)) for split in ("train", "test")}
    found = Splits.from_datasets(given_splits(data), root=folder_of(data))
    expected = create_splits("folder", root=str(root))
    for split, rows in expected.datasets.items():
        files = [image["path"] for image in encoded_images(rows)["image"]]
        assert [i["path"] for i in encoded_images(found.datasets[split])["image"]] == files
