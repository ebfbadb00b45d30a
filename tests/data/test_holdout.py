"""Validation held out of the training images, class by class."""

from itertools import product
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from timm_lt.data import Splits, create_dataset, create_splits, hold_out, register_dataset
from timm_lt.data.decode import encoded_images
from timm_lt.data.given import folder_of, given_splits
from timm_lt.data.sources import DATASETS
from timm_lt.utils.checks import UsageError

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
    assert torch.bincount(torch.tensor([int(key[0]) for key in before])).tolist() == [
        *(20, 6, 2, 1, 1)
    ]
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
        ([0, 0, 1, 2, 2, 3], 0.2, "2 of 4 classes have one training image.*: 1, 3; give a val"),
        ([0, 0, 10**18], 0.2, "1 of 2 classes have one training image.*: 1000000000000000000;"),
        ([0, 0], 0.0, r"fraction must be a number in \(0, 1\)"),
        ([0, 0], 1.0, r"fraction must be a number in \(0, 1\)"),
        ([], 0.2, "must not be empty"),
    ],
)
def test_what_cannot_be_held_out_is_refused(labels, fraction, message):
    with pytest.raises(UsageError, match=message):
        hold_out(labels, fraction)


@pytest.fixture
def without_val():
    """A registered data set that has no validation split."""

    @register_dataset("without_val")
    def source(split, *, rows=40):
        if split == "val":
            return None
        column = datasets.Features(
            {"image": datasets.Value("int64"), "label": datasets.ClassLabel(2)}
        )
        given = {"image": list(range(rows)), "label": [i % 2 for i in range(rows)]}
        return datasets.Dataset.from_dict(given, column)

    yield "without_val"
    del DATASETS._parts["without_val"]


def test_a_data_set_without_validation_split_gives_a_part_of_train(without_val):
    splits = create_splits(without_val, val_fraction=0.25)
    assert splits.val_source == "train"
    rows = {split: splits.datasets[split]["image"][:] for split in ("train", "val", "test")}
    assert len(rows["val"]) == 10
    assert sorted(rows["train"] + rows["val"]) == list(range(40)) == rows["test"]
    # Class counts are those that are trained on.
    assert splits.class_counts.tolist() == [15, 15]
    assert splits.labels["val"].tolist() == [row % 2 for row in rows["val"]]
    with pytest.raises(UsageError, match="has no val split: hold out a part of train"):
        create_dataset(without_val, split="val")


def test_a_split_that_is_there_is_not_touched():
    splits = create_splits("digits_lt")
    assert splits.val_source == "val"
    assert len(splits.datasets["val"]) == 200
    assert isinstance(splits, Splits)


def test_the_message_of_a_class_of_one_image_says_whose_it_is(without_val):
    with pytest.raises(UsageError, match="train split: 2 of 2 classes have one training image"):
        create_splits(without_val, rows=2)


def _dealt(door, root, tmp_path):
    """Returns the names of the images of each split, whichever door the images came through."""
    files = sorted(path for path in root.rglob("*.png") if "test" not in path.parts)
    labels = [["cat", "dog"].index(path.parent.name) for path in files]
    if door == "list":
        lines = [f"{f.relative_to(root)} {c}\n" for f, c in zip(files, labels, strict=True)]
        (tmp_path / "train.txt").write_text("".join(lines))
        splits = create_splits("list", root=str(root), train=tmp_path / "train.txt")
    elif door == "folder":
        splits = create_splits("folder", root=str(root / "2019"))
    elif door == "folder with train":
        splits = create_splits("folder", root=str(root))
    elif door == "parquet":
        rows = {"image": [{"bytes": f.read_bytes(), "path": "1.png"} for f in files]}
        rows = datasets.Dataset.from_dict(
            rows | {"label": labels, "file": [f.name for f in files]},
            datasets.Features(
                image=datasets.Image(), label=datasets.Value("int64"), file=datasets.Value("string")
            ),
        )
        rows.to_parquet(tmp_path / "train.parquet")
        splits = create_splits(
            "hub", root=str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "cache")
        )
    else:
        pairs = list(zip(map(str, files), labels, strict=True))
        data = pairs if door == "pairs" else ImageFolder(str(root / "2019"))
        splits = Splits.from_datasets(given_splits(data), root=folder_of(data))
    known = {path.read_bytes(): path.name for path in root.rglob("*.png")}
    return {
        split: {
            known[image["bytes"] or Path(image["path"]).read_bytes()]
            for image in encoded_images(rows)["image"]
        }
        for split, rows in splits.datasets.items()
    }


@pytest.mark.parametrize(
    ("door", "splits", "added"),
    [
        ("folder", ("val", "test"), "2019/dog/new.png"),
        ("folder with train", ("val",), "train/dog/new.png"),
        ("list", ("val", "test"), "2020/dog/new.png"),
        ("pairs", ("val", "test"), "2020/dog/new.png"),
        ("ImageFolder", ("val", "test"), "2019/dog/new.png"),
        ("parquet", ("val", "test"), "2019/dog/new.png"),
    ],
)
def test_an_image_of_another_class_or_folder_moves_nothing(tmp_path, door, splits, added):
    root, start = tmp_path / "photos", "train" if door == "folder with train" else "2019"
    noise = np.random.default_rng(0)

    def save(path):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (4, 4, 3), np.uint8)).save(root / path)

    for name, count in {"cat": 20, "dog": 8}.items():
        for number in range(count):
            save(f"{start}/{name}/{name} {number}.png")
    if door == "folder with train":
        save("test/cat/0.png")
        save("test/dog/0.png")
    before = _dealt(door, root, tmp_path)
    for number in range(8):
        place = added.replace("new", f"new {number}")
        save(place)
        after = _dealt(door, root, tmp_path)
        (root / place).unlink()
        for split in splits:
            assert {n for n in after[split] if "cat" in n} == {
                n for n in before[split] if "cat" in n
            }
            # Into the place of one that is displaced, or without displacing one.
            assert len(before[split] - after[split]) <= (f"new {number}.png" in after[split])
            assert len(after[split] - before[split]) <= 1


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
