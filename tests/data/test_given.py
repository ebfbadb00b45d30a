"""Data sets that are given as objects, against what torchvision and timm read of the same files."""

import io

import datasets
import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)
from torchvision.datasets import ImageFolder

from timm_lt.data import Splits, create_splits
from timm_lt.data import given as module
from timm_lt.data.given import given_splits
from timm_lt.utils.checks import UsageError

COUNTS = {"ant": 9, "bee": 6, "class 10": 4, "class 9": 5}


class Pictures(Dataset):
    """Images in memory, as torchvision's CIFAR has them."""

    def __init__(self, images, labels, classes=None, transform=None):
        self.images, self.labels, self.classes = images, labels, classes
        self.transform = transform or (lambda image: image)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        if row >= len(self):
            raise IndexError(row)
        return self.transform(self.images[row]), self.labels[row]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def picture(number, size=(5, 4)):
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of images that are none: whatever opens one fails."""
    root = tmp_path_factory.mktemp("given") / "photos"
    for name, count in COUNTS.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(b"no image")
    return root


def paths(dataset):
    return [
        row["path"] for row in dataset.cast_column("image", datasets.Image(decode=False))["image"]
    ]


def pixels(dataset):
    return [np.asarray(image).tolist() for image in dataset["image"]]


def test_files_of_folders_stay_files(root):
    theirs = ImageFolder(root, transform=lambda image: torch.zeros(3, 2, 2))
    found = given_splits(theirs)
    assert list(found) == ["train"]
    assert list(zip(paths(found["train"]), found["train"]["label"], strict=True)) == theirs.samples
    assert found["train"].features["label"].names == sorted(COUNTS)
    # timm sorts numbers in names as numbers.
    theirs = timm.data.create_dataset("", root=str(root))
    found = given_splits({"training": theirs})["train"]
    expected = [(str(path), label) for path, label in theirs.reader.samples]
    assert list(zip(paths(found), found["label"], strict=True)) == expected
    assert found.features["label"].names == ["ant", "bee", "class 9", "class 10"]


def test_a_part_of_a_folder_and_samples_of_ones_own(root):
    theirs = ImageFolder(root)
    rows = [5, 0, 20]
    found = given_splits(Subset(theirs, rows))["train"]
    expected = [theirs.samples[row] for row in rows]
    assert list(zip(paths(found), found["label"], strict=True)) == expected
    # Left out by hand, as many do, without touching the targets.
    theirs.samples = theirs.samples[:3]
    assert given_splits(theirs)["train"]["label"][:] == [0, 0, 0]
    theirs.target_transform = lambda label: label + 2
    found = given_splits(theirs)["train"]
    assert found["label"][:] == [2, 2, 2]
    assert isinstance(found.features["label"], datasets.Value)


def test_folders_one_after_the_other(root):
    theirs = ImageFolder(root)
    both = ConcatDataset([Subset(theirs, [-1, 2]), Subset(theirs, []), theirs])
    found = given_splits(both)["train"]
    expected = [theirs.samples[-1], theirs.samples[2], *theirs.samples]
    assert list(zip(paths(found), found["label"], strict=True)) == expected
    assert found.features["label"].names == sorted(COUNTS)
    renamed = ImageFolder(root)
    renamed.classes = [*"wxyz"]
    found = given_splits(ConcatDataset([theirs, renamed]))["train"]
    assert isinstance(found.features["label"], datasets.Value)


class Fold(Dataset):
    """Some rows of a folder, whose list it keeps as a whole."""

    def __init__(self, folder, rows):
        self.samples, self.targets, self.rows = folder.samples, folder.targets, rows
        self.classes = folder.classes

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        path, label = self.samples[self.rows[row]]
        return Image.open(path), label, path


class Merged(ImageFolder):
    def __getitem__(self, row):
        image, label = super().__getitem__(row)
        return image, min(label, 1)


class Turned(ImageFolder):
    def __getitem__(self, row):
        image, label = super().__getitem__(row)
        return image.rotate(90), label


class Grey(timm.data.ImageDataset):
    def __getitem__(self, row):
        image, label = super().__getitem__(row)
        return {"image": image.convert("L"), "label": torch.tensor(label)}


def corner(path):
    with Image.open(path) as image:
        return image.crop((0, 0, 2, 2))


@pytest.fixture
def pictures(tmp_path):
    for number, name in enumerate(("ant", "ant", "bee", "cat")):
        (tmp_path / name).mkdir(exist_ok=True)
        picture(number).save(tmp_path / name / f"{number}.png")
    return tmp_path


# timm's ImageDataset leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize(
    ("create", "names"),
    [
        (lambda root: Fold(ImageFolder(root), [3, 0]), ["ant", "bee", "cat"]),
        (Merged, None),
        (Turned, ["ant", "bee", "cat"]),
        (lambda root: ImageFolder(root, loader=corner), ["ant", "bee", "cat"]),
        (lambda root: Subset(Merged(root), [3, 1]), None),
        (lambda root: ConcatDataset([Merged(root), ImageFolder(root)]), None),
        (lambda root: Grey(str(root)), None),
        (lambda root: timm.data.ImageDataset(str(root), input_img_mode="L"), ["ant", "bee", "cat"]),
    ],
)
def test_the_items_count_where_a_list_of_files_says_something_else(create, names, pictures):
    theirs = create(pictures)
    items = [theirs[row] for row in range(len(theirs))]
    items = [(*item.values(),) if isinstance(item, dict) else item for item in items]
    found = given_splits(theirs)["train"]
    assert found["label"][:] == [int(item[1]) for item in items]
    assert pixels(found) == [np.asarray(item[0].convert("RGB")).tolist() for item in items]
    assert getattr(found.features["label"], "names", None) == names


def test_a_transform_of_a_hugging_face_data_set_is_applied(pictures):
    images = [picture(number) for number in range(3)]
    rows = datasets.Dataset.from_dict(
        {"image": images, "label": [0, 1, 1]},
        datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[*"ab"])}),
    )

    def turned(batch):
        return {**batch, "image": [image.rotate(180) for image in batch["image"]]}

    def swapped(batch):
        return {**batch, "label": [1 - label for label in batch["label"]]}

    found = given_splits(rows.with_transform(turned).select([2, 0]))["train"]
    expected = [np.asarray(images[row])[::-1, ::-1].tolist() for row in (2, 0)]
    assert (pixels(found), found["label"][:]) == (expected, [1, 0])
    assert found.features["label"].names == ["a", "b"]
    found = given_splits(rows.with_transform(swapped))["train"]
    assert found["label"][:] == [1, 0, 0]
    assert isinstance(found.features["label"], datasets.Value)
    found = given_splits(rows.with_format("torch"))["train"]
    assert (pixels(found), found["label"][:]) == (
        [np.asarray(i).tolist() for i in images],
        [0, 1, 1],
    )
    with pytest.raises(UsageError, match=r"image 0 of a Dataset is a Tensor; remove a transform"):
        given_splits(
            rows.with_transform(lambda b: {**b, "image": [torch.zeros(3)] * len(b["label"])})
        )


def test_the_same_images_are_held_out_as_of_the_folder(root):
    expected = create_splits("folder", root=str(root))
    found = Splits.from_datasets(given_splits(ImageFolder(root)))
    assert found.val_source == expected.val_source == "train"
    for split, dataset in expected.datasets.items():
        assert paths(found.datasets[split]) == paths(dataset)


def test_pairs_of_images_keep_every_pixel(tmp_path):
    images = [picture(number) for number in range(4)]
    images[1].save(tmp_path / "one.png")
    stored = io.BytesIO()
    images[2].save(stored, "JPEG", quality=30)
    images[2] = Image.open(stored)
    lossy = images[2].copy()
    changed = Image.open(tmp_path / "one.png")
    changed.paste((1, 2, 3), (0, 0, 2, 2))
    given = [images[0], str(tmp_path / "one.png"), images[2], tmp_path / "one.png", changed]
    expected = [
        np.asarray(image).tolist() for image in (images[0], images[1], lossy, images[1], changed)
    ]
    found = given_splits([(image, row % 2) for row, image in enumerate(given)])["train"]
    assert pixels(found) == expected
    assert found["label"][:] == [0, 1, 0, 1, 0]
    with Image.open(tmp_path / "one.png") as lazy:
        found = given_splits([(lazy, 0)])["train"]
    assert paths(found) == [str(tmp_path / "one.png")]


def test_pixels_of_eight_bits_are_images():
    array = np.asarray(picture(3))
    given = [array, array[..., 0], torch.from_numpy(array.copy()).permute(2, 0, 1)]
    found = given_splits([(image, 0) for image in given])["train"]
    grey = np.repeat(array[..., :1], 3, 2)
    assert pixels(found) == [array.tolist(), grey.tolist(), array.tolist()]


def test_many_images_in_memory_become_tables_of_some_rows(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 2)
    images = [picture(number) for number in range(5)]
    given = Pictures(images, torch.tensor([0, 1, 2, 0, 1]), ["x", "y", "z"])
    found = given_splits(given)["train"]
    assert found.features["label"].names == ["x", "y", "z"]
    assert found["label"][:] == [0, 1, 2, 0, 1]
    assert pixels(found) == [np.asarray(image).tolist() for image in images]
    monkeypatch.setattr(module, "MAX_BYTES", 300)
    with pytest.raises(UsageError, match="need more than 0 GiB of memory; pass the paths"):
        given_splits(given)


def test_columns_may_have_the_names_of_others():
    given = {"image": [picture(0)], "labels": [0]}
    rows = datasets.Dataset.from_dict(given).cast_column("image", datasets.Image())
    rows = rows.rename_column("image", "img")
    found = given_splits(datasets.DatasetDict({"train": rows, "validation": rows}))
    assert {split: rows.column_names for split, rows in found.items()} == {
        "train": ["image", "label"],
        "val": ["image", "label"],
    }


def test_columns_of_a_data_set_that_are_not_used_are_named_once(caplog):
    given = {"image": [picture(0)], "label": [0], "split": ["test"], "site": [3]}
    rows = datasets.Dataset.from_dict(given).cast_column("image", datasets.Image())
    given_splits({"train": rows, "val": rows})
    assert [record.getMessage() for record in caplog.records] == [
        "the data set: columns that are not used: split, site"
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, ["a NoneType is not a data set", "datasets.Dataset", "ImageFolder"]),
        ({"train": "photos"}, ["train split: a str is not a data set", "ImageFolder"]),
        ([], ["labels must not be empty"]),
        ([(np.zeros((2, 2, 3)), 0)], ["image 0 of a list is a ndarray", "or the path"]),
        ([("a.png", "cat")], ["cat"]),
        ([("a.png", -1)], ["negative"]),
        (Pictures(["a.png"], [2], ["x", "y"]), ["num_classes=2"]),
        (
            TensorDataset(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])),
            ["is a Tensor", "remove a transform"],
        ),
        ([{"image": "a.png", "box": 3}], ["item 0 of a list is a dict with the keys image, box"]),
        ([("a.png", 0.0)], ["labels[0] = 0.0 is not an integer"]),
        (DataLoader([1]), ["a DataLoader is not a data set", "pass its attribute dataset"]),
        (Stream(), ["a Stream is not a data set"]),
        ({"train": datasets.IterableDataset.from_generator(lambda: iter(()))}, ["is a stream"]),
        (
            datasets.Dataset.from_dict({"label": [0]}),
            ["no column of images; the columns are label"],
        ),
        ({"unsupervised": [("a.png", 0)]}, ["unsupervised", "train, val, test"]),
        ({"val": [("a.png", 0)], "valid": [("b.png", 0)]}, ["(each at most once)", "valid"]),
    ],
)
def test_whatever_else_is_refused_with_what_is_accepted(data, words):
    with pytest.raises(UsageError) as caught:
        given_splits(data)
    for word in words:
        assert word in str(caught.value)
