"""The labels of every kind of data set, against those of its items or of its files."""

import itertools
import json
import struct
import tarfile

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from timm.data import AugMixDataset, ImageDataset
from timm.data.readers.reader_hfds import ReaderHfds
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.data.readers.reader_image_tar import ReaderImageTar
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

import timm_lt
from timm_lt.data import labels as module

NAMES = {"ant": 3, "bee": 2, "cat": 1}
LABELS = [0, 0, 0, 1, 1, 2]

NO_IMAGE = b"decoding this fails"


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for name, count in NAMES.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(NO_IMAGE)
    return root


@pytest.fixture
def tar(folder, tmp_path):
    path = tmp_path / "tars" / "all.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as file:
        file.add(folder, arcname=".")
    return path


def rows(**columns):
    files = [{"bytes": NO_IMAGE, "path": None}] * len(LABELS)
    features = {"image": datasets.Image(), **dict.fromkeys(columns, datasets.Value("int64"))}
    return datasets.Dataset.from_dict({"image": files, **columns}, datasets.Features(features))


def labels_of(dataset, **options):
    labels = timm_lt.dataset_labels(dataset, **options)
    assert labels.dtype == torch.int64
    return labels.tolist()


def test_folders_and_tars(folder, tar):
    assert labels_of(torchvision.datasets.ImageFolder(folder)) == LABELS
    assert labels_of(ImageDataset(str(folder))) == LABELS
    assert labels_of(ImageDataset(str(tar))) == LABELS
    assert labels_of(ImageDataset("", reader=ReaderImageTar(str(tar)))) == LABELS
    assert labels_of(ImageDataset("", reader=ReaderImageInTar(str(tar.parent)))) == LABELS


def test_columns():
    assert labels_of(rows(label=LABELS)) == LABELS
    assert labels_of(rows(labels=LABELS)) == LABELS
    both = rows(fine=[5] * 6, label=LABELS)
    assert labels_of(both) == LABELS
    assert labels_of(both, column="fine") == [5] * 6
    assert labels_of(both.select([5, 0])) == [2, 0]
    with pytest.raises(timm_lt.UsageError, match=r"no column of labels; .* fine \(int64\)"):
        labels_of(rows(fine=LABELS))
    with pytest.raises(
        timm_lt.UsageError, match=r"no column 'coarse' of labels; .* fine .int64., label"
    ):
        labels_of(both, column="coarse")


def test_timm_reader_of_a_hugging_face_data_set(tmp_path, monkeypatch):
    names = datasets.ClassLabel(names=["a", "b", "c"])
    data = rows(label=LABELS).cast_column("label", names)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: data)
    plain = ImageDataset("", reader=ReaderHfds("any"))
    assert labels_of(plain) == LABELS
    (tmp_path / "map.txt").write_text("c\nb\na\n")
    mapped = ImageDataset("", reader=ReaderHfds("any", class_map=str(tmp_path / "map.txt")))
    assert labels_of(mapped) == [2 - label for label in LABELS]


def test_wrappers(folder):
    inner = torchvision.datasets.ImageFolder(folder)
    assert labels_of(Subset(inner, [5, 3, 0])) == [2, 1, 0]
    assert labels_of(Subset(Subset(inner, [5, 3, 0]), np.array([2, 0]))) == [0, 2]
    assert labels_of(ConcatDataset([inner, rows(label=LABELS)])) == LABELS * 2
    assert labels_of(ConcatDataset([inner, Subset(inner, [])])) == LABELS
    assert labels_of(AugMixDataset(ImageDataset(str(folder)))) == LABELS
    tensors = TensorDataset(torch.zeros(6, 3, 2, 2), torch.tensor(LABELS), torch.zeros(6))
    assert labels_of(tensors) == LABELS


def test_target_transforms_are_applied(folder):
    def reverse(label):
        return 2 - label

    expected = [2 - label for label in LABELS]
    for kind in (ImageDataset, torchvision.datasets.ImageFolder):
        assert labels_of(kind(str(folder), target_transform=reverse)) == expected


# Data sets whose items are drawn ------------------------------------------------------------------


class Items(Dataset):
    """Items that a function makes of each row; whatever else is given are attributes."""

    def __init__(self, item, size, **attributes):
        self.item, self.size, self.drawn = item, size, 0
        vars(self).update(attributes)

    def __len__(self):
        return self.size

    def __getitem__(self, row):
        self.drawn += 1
        return self.item(row)


class Merged(torchvision.datasets.ImageFolder):
    def __getitem__(self, row):
        path, label = self.samples[row]
        return path, min(label, 1)


class Files(torchvision.datasets.ImageFolder):
    """Paths in place of images, which cannot be decoded."""

    def __init__(self, root):
        super().__init__(root, loader=str)


class FirstTwo(Files):
    def __len__(self):
        return 2


class Renumbered(Subset):
    def __getitem__(self, row):
        image, label = super().__getitem__(row)
        return image, label + 10

    def __getitems__(self, rows):
        return [self[row] for row in rows]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


class Endless(Dataset):
    def __getitem__(self, row):
        return "image", row % 3


def shown(dataset):
    return [int(dataset[row][1]) for row in range(len(dataset))]


def test_a_class_with_items_of_its_own_is_not_taken_for_the_one_that_it_is_derived_from(folder):
    assert labels_of(Merged(folder)) == [0, 0, 0, 1, 1, 1]
    assert labels_of(FirstTwo(folder)) == [0, 0]
    assert labels_of(Renumbered(FirstTwo(folder), [1, 0])) == [10, 10]
    assert labels_of(Subset(Merged(folder), [5, -6])) == [1, 0]
    both = ConcatDataset([Merged(folder), rows(label=LABELS)])
    assert labels_of(both) == [0, 0, 0, 1, 1, 1, *LABELS]
    edited = torchvision.datasets.ImageFolder(folder)
    # Its items are of samples alone.
    edited.samples = edited.samples[2:4]
    assert labels_of(edited) == [0, 1]


@pytest.mark.parametrize(
    "item",
    [
        lambda row: ("image", row % 3),
        lambda row: ("image", row % 3, "file"),
        lambda row: {"x": "image", "target": torch.tensor(row % 3)},
        lambda row: ["image", np.uint8(row % 3)],
        lambda row: ("image", np.array(row % 3)),
    ],
)
def test_items_of_any_layout(item):
    assert labels_of(Items(item, 5)) == [0, 1, 2, 0, 1]
    assert labels_of([item(row) for row in range(5)]) == [0, 1, 2, 0, 1]


MANY = [0] * 6 + [1] * 4 + [2] * 2 + [3] * 8


@pytest.mark.parametrize(
    "attributes",
    [
        {"targets": MANY},
        {"targets": MANY[::-1], "own": np.array(MANY)},
        {"index": [(label, "file") for label in MANY]},
        {"attributes": torch.tensor([[9, label] for label in MANY])},
        {"table": pd.DataFrame({"file": ["a"] * 20, "label": MANY}, index=range(5, 25))},
        {"inner": TensorDataset(torch.zeros(20), torch.tensor(MANY))},
        {"labels": [label + 1 for label in MANY], "target_transform": lambda label: label - 1},
    ],
)
def test_an_attribute_of_many_items_is_verified(attributes, monkeypatch):
    monkeypatch.setattr(module, "VERIFIED", 3)
    data = Items(lambda row: ("image", MANY[row]), 20, **attributes)
    assert labels_of(data) == MANY
    # Three, and the first of each of four classes.
    assert data.drawn <= 7 < 20


RENUMBERED = [[7 if label == number else label for label in MANY] for number in range(4)]


ALL_BUT_FIRST = [label if row in (0, 6, 10, 12) else 7 for row, label in enumerate(MANY)]


@pytest.mark.parametrize("expected", [*RENUMBERED, ALL_BUT_FIRST])
def test_an_attribute_that_disagrees_is_not_taken(expected, monkeypatch, caplog):
    """However rare a class with other labels is, the first of its images is drawn."""
    monkeypatch.setattr(module, "VERIFIED", 3)
    data = Items(lambda row: ("image", expected[row]), 20, targets=MANY, samples=[("a", 0)] * 3)
    with caplog.at_level("INFO", logger="timm_lt"):
        assert labels_of(data) == expected
    assert data.drawn == 20
    assert "drawing all 20 items of a Items for their labels" in caplog.text


def test_drawing_leaves_the_random_state():
    data = Items(lambda row: (torch.rand(2), row % 2), 4)
    before = torch.get_rng_state()
    assert labels_of(data) == [0, 1, 0, 1]
    assert torch.get_rng_state().equal(before)


def test_a_transform_of_a_hugging_face_data_set_counts(monkeypatch):
    def transform(batch):
        return {"pixel_values": [0] * len(batch["label"]), "label": [9 for _ in batch["label"]]}

    plain = datasets.Dataset.from_dict({"id": range(8), "label": [0, 1] * 4})
    assert labels_of(plain.with_transform(transform)) == [9] * 8
    assert labels_of(plain.with_format("torch")) == [0, 1] * 4
    monkeypatch.setattr(module, "VERIFIED", 2)
    kept = plain.select([1, 2, 3]).with_transform(lambda batch: {**batch, "x": batch["id"]})
    assert labels_of(kept) == [1, 0, 1]


# Data sets of torchvision -------------------------------------------------------------------------


def write(path, text=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        Image.new("RGB", (4, 4)).save(path)
    else:
        path.write_text(text)


def i_naturalist(root, **options):
    for number, count in enumerate((3, 2, 1)):
        name = f"0000{number}_Plantae_A_b_c_d_e_f{number}"
        for image in range(count):
            write(root / "2021_train_mini" / name / f"{image}.jpg")
    return torchvision.datasets.INaturalist(root, "2021_train_mini", **options)


def caltech256(root, **options):
    for number, count in enumerate((3, 2, 1), 1):
        for image in range(count):
            folder = root / "caltech256" / "256_ObjectCategories" / f"{number:03d}.thing"
            write(folder / f"{number:03d}_{image + 1:04d}.jpg")
    return torchvision.datasets.Caltech256(root, **options)


def food101(root, **options):
    files = {name: [f"{name}/{i}" for i in range(count)] for name, count in NAMES.items()}
    write(root / "food-101" / "meta" / "train.json", json.dumps(files))
    for file in itertools.chain(*files.values()):
        write(root / "food-101" / "images" / f"{file}.jpg")
    return torchvision.datasets.Food101(root, **options)


def mnist(root, **options):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        images = struct.pack(">iiii", 2051, 6, 2, 2) + bytes(24)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">ii6B", 2049, 6, *LABELS))
    return torchvision.datasets.MNIST(root, **options)


@pytest.mark.parametrize(
    ("create", "options", "expected"),
    [
        (i_naturalist, {}, LABELS),
        (i_naturalist, {"target_type": "phylum"}, [0] * 6),
        (caltech256, {}, LABELS),
        (food101, {"target_transform": lambda label: 2 - label}, [2, 2, 2, 1, 1, 0]),
        (mnist, {}, LABELS),
    ],
)
def test_data_sets_of_torchvision(create, options, expected, tmp_path, monkeypatch):
    drawn = []

    def transform(image):
        drawn.append(image.size)
        image.close()

    data = create(tmp_path, transform=transform, **options)
    assert shown(data) == expected
    assert labels_of(data) == expected
    # As of a large one: two items, and the first of each class.
    monkeypatch.setattr(module, "VERIFIED", 2)
    drawn.clear()
    assert labels_of(data) == expected
    if options.get("target_type") is None:
        assert len(drawn) < 6


def test_labels_of_fake_data_are_only_in_its_items():
    data = torchvision.datasets.FakeData(7, (3, 4, 4), num_classes=3)
    assert labels_of(data) == shown(data)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            TensorDataset(torch.zeros(3)),
            "labels of a TensorDataset are not known: item 0 of a",
        ),
        (rows(label=[0, 0, 0, -1, 0, 0]), r"labels\[3\] = -1 is negative"),
        (TensorDataset(torch.zeros(2), torch.zeros(2, 4).long()), "must be one-dimensional"),
        (Subset(rows(label=LABELS), []), "empty"),
        (Items(lambda row: ("image", "cat"), 2), r"labels\[0\] = 'cat' is not an integer"),
        (
            Items(lambda row: "image", 2),
            "not known: item 0 .* is a str; expected .*; or pass a tensor",
        ),
        (
            Items(lambda row: {"a": 0, "image": 1}, 2),
            "item 0 of a Items is a dict with the keys a, image; expected an image and its",
        ),
        (Items(lambda row: [][row], 2), r"item 0 .* cannot be drawn \(IndexError: .*pass a tensor"),
        (DataLoader([1]), "a DataLoader is not a data set .*; pass its attribute dataset"),
        ("images", "a str is not a data set"),
        (Stream(), "a Stream is not a data set with a length and random access"),
        (Endless(), "a Endless is not a data set with a length and random access"),
    ],
)
def test_what_has_no_labels_is_refused(dataset, message):
    with pytest.raises(timm_lt.UsageError, match=message):
        timm_lt.dataset_labels(dataset)
