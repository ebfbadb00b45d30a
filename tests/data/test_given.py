"""Data sets passed as objects, against their own items and what torchvision and timm read."""

import io
import struct
import tarfile

import datasets
import numpy as np
import pandas as pd
import pytest
import timm.data
import torch
import torchvision
from PIL import Image
from timm.data import AugMixDataset, ImageDataset
from timm.data.readers.reader_hfds import ReaderHfds
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.data.readers.reader_image_tar import ReaderImageTar
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

import timm_lt
from timm_lt.data import given as module
from timm_lt.data import sources
from timm_lt.data.given import given_splits
from timm_lt.utils.checks import UsageError

NAMES = ["ant", "bee", "cat"]
LABELS = [0, 0, 0, 1, 1, 2]
NO_IMAGE = b"decoding this fails"


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


class Merged(ImageFolder):
    def __getitem__(self, row):
        image, label = super().__getitem__(row)
        return image, min(label, 1)


class Renumbered(Subset):
    def __getitem__(self, row):
        image, label = super().__getitem__(row)
        return image, label + 10

    def __getitems__(self, rows):
        return [self[row] for row in rows]


class Endless(Dataset):
    def __getitem__(self, row):
        return "image", row % 3


@pytest.fixture
def folder(tmp_path):
    """Files that are not images, so that decoding one fails."""
    for name, count in {"ant": 3, "bee": 2, "cat": 1}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "images" / name / f"{i}.png").write_bytes(NO_IMAGE)
    return tmp_path / "images"


def rows(**columns):
    files = [{"bytes": NO_IMAGE, "path": None}] * len(LABELS)
    features = {"image": datasets.Image(), **dict.fromkeys(columns, datasets.Value("int64"))}
    return datasets.Dataset.from_dict({"image": files, **columns}, datasets.Features(features))


def labels_of(dataset, **options):
    labels = timm_lt.dataset_labels(dataset, **options)
    assert labels.dtype == torch.int64
    return labels.tolist()


def test_labels_of_folders_and_tars(folder, tmp_path):
    tar = tmp_path / "tars" / "all.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as file:
        file.add(folder, arcname=".")
    readers = ReaderImageTar(str(tar)), ReaderImageInTar(str(tar.parent))
    files = [ImageDataset(str(folder)), ImageDataset(str(tar)), ImageFolder(folder)]
    for data in (*files, *(ImageDataset("", reader=reader) for reader in readers)):
        assert labels_of(data) == LABELS


def test_labels_of_columns():
    assert labels_of(rows(labels=LABELS)) == LABELS
    both = rows(fine=[5] * 6, label=LABELS)
    assert labels_of(both) == LABELS
    assert labels_of(both, column="fine") == [5] * 6
    assert labels_of(both.select([5, 0])) == [2, 0]
    with pytest.raises(UsageError, match=r"no column of labels; .* fine \(int64\)"):
        labels_of(rows(fine=LABELS))
    with pytest.raises(UsageError, match=r"no column 'coarse' of labels; .* fine .int64., label"):
        labels_of(both, column="coarse")


def test_labels_of_timm_reader_of_a_hugging_face_data_set(tmp_path, monkeypatch):
    data = rows(label=LABELS).cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: data)
    assert labels_of(ImageDataset("", reader=ReaderHfds("any"))) == LABELS
    (tmp_path / "map.txt").write_text("c\nb\na\n")
    mapped = ImageDataset("", reader=ReaderHfds("any", class_map=str(tmp_path / "map.txt")))
    assert labels_of(mapped) == [2 - label for label in LABELS]


def test_labels_of_wrappers_and_transforms(folder):
    inner = ImageFolder(folder)
    assert labels_of(Subset(Subset(inner, [5, 3, 0]), np.array([2, 0]))) == [0, 2]
    assert labels_of(ConcatDataset([inner, rows(label=LABELS)])) == LABELS * 2
    assert labels_of(ConcatDataset([inner, Subset(inner, [])])) == LABELS
    assert labels_of(AugMixDataset(ImageDataset(str(folder)))) == LABELS
    tensors = TensorDataset(torch.zeros(6, 3, 2, 2), torch.tensor(LABELS), torch.zeros(6))
    assert labels_of(tensors) == LABELS
    for kind in (ImageDataset, ImageFolder):
        reversed_ = kind(str(folder), target_transform=lambda label: 2 - label)
        assert labels_of(reversed_) == [2 - label for label in LABELS]


def test_items_count_for_a_class_that_overrides_them(folder):
    class FirstTwo(ImageFolder):
        def __len__(self):
            return 2

    merged, two = Merged(folder, loader=str), FirstTwo(folder, loader=str)
    assert labels_of(merged) == [0, 0, 0, 1, 1, 1]
    assert labels_of(two) == [0, 0]
    assert labels_of(Renumbered(two, [1, 0])) == [10, 10]
    assert labels_of(Subset(merged, [5, -6])) == [1, 0]
    assert labels_of(ConcatDataset([merged, rows(label=LABELS)])) == [0, 0, 0, 1, 1, 1, *LABELS]
    edited = ImageFolder(folder)
    edited.samples = edited.samples[2:4]
    assert labels_of(edited) == [0, 1]


@pytest.mark.parametrize(
    "item",
    [
        lambda row: ("image", row % 3, "file"),
        lambda row: {"x": "image", "target": torch.tensor(row % 3)},
        lambda row: ["image", np.array(row % 3)],
    ],
)
def test_items_of_any_layout(item):
    before = torch.get_rng_state()
    assert labels_of(Items(lambda row: torch.rand(1) and item(row), 5)) == [0, 1, 2, 0, 1]
    assert torch.get_rng_state().equal(before)
    assert labels_of([item(row) for row in range(5)]) == [0, 1, 2, 0, 1]


MANY = [0] * 6 + [1] * 4 + [2] * 2 + [3] * 8


@pytest.mark.parametrize(
    "attributes",
    [
        {"targets": MANY[::-1], "own": np.array(MANY)},
        {"index": [(label, "file") for label in MANY]},
        {"table": pd.DataFrame({"file": ["a"] * 20, "label": MANY}, index=range(5, 25))},
        {"labels": [label + 1 for label in MANY], "target_transform": lambda label: label - 1},
    ],
)
def test_an_attribute_of_many_items_is_verified(attributes, monkeypatch):
    monkeypatch.setattr(module, "VERIFIED", 3)
    data = Items(lambda row: ("image", MANY[row]), 20, **attributes)
    assert labels_of(data) == MANY
    # Three, and the first of each of four classes.
    assert data.drawn <= 7 < 20


@pytest.mark.parametrize("changed", range(5))
def test_an_attribute_that_disagrees_is_not_taken(changed, monkeypatch, caplog):
    """However rare a class with other labels is, the first of its images is drawn."""
    expected = [7 if label == changed else label for label in MANY]
    if changed == 4:
        expected = [label if row in (0, 6, 10, 12) else 7 for row, label in enumerate(MANY)]
    monkeypatch.setattr(module, "VERIFIED", 3)
    data = Items(lambda row: ("image", expected[row]), 20, targets=MANY, samples=[("a", 0)] * 3)
    with caplog.at_level("INFO", logger="timm_lt"):
        assert labels_of(data) == expected
    assert data.drawn == 20
    assert "drawing all 20 items of a Items for their labels" in caplog.text


def test_labels_of_a_hugging_face_data_set_with_a_transform(monkeypatch):
    plain = datasets.Dataset.from_dict({"id": range(8), "label": [0, 1] * 4})
    changed = plain.with_transform(
        lambda batch: {"x": batch["id"], "label": [9] * len(batch["id"])}
    )
    assert labels_of(changed) == [9] * 8
    assert labels_of(plain.with_format("torch")) == [0, 1] * 4
    monkeypatch.setattr(module, "VERIFIED", 2)
    kept = plain.select([1, 2, 3]).with_transform(lambda batch: {**batch, "x": batch["id"]})
    assert labels_of(kept) == [1, 0, 1]


def test_labels_that_a_data_set_of_torchvision_keeps_as_a_property(tmp_path, monkeypatch):
    raw, drawn = tmp_path / "MNIST" / "raw", []
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        images = struct.pack(">iiii", 2051, 6, 2, 2) + bytes(24)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">ii6B", 2049, 6, *LABELS))
    # Of a large one, two items and the first of each class are drawn.
    monkeypatch.setattr(module, "VERIFIED", 2)
    assert labels_of(torchvision.datasets.MNIST(tmp_path, transform=drawn.append)) == LABELS
    assert len(drawn) < 6


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (TensorDataset(torch.zeros(3)), "of a TensorDataset are not known: item 0 .* or pass"),
        (rows(label=[0, 0, 0, -1, 0, 0]), r"labels\[3\] = -1 is negative"),
        (TensorDataset(torch.zeros(2), torch.zeros(2, 4).long()), "must be one-dimensional"),
        (Subset(rows(label=LABELS), []), "empty"),
        (Items(lambda row: ("image", "cat"), 2), r"labels\[0\] = 'cat' is not an integer"),
        (Items(lambda row: [][row], 2), r"item 0 of a Items cannot be drawn \(IndexError"),
        (DataLoader([1]), "a DataLoader is not a data set .*; pass its attribute dataset"),
        (rows(label=LABELS).to_iterable_dataset(), "a IterableDataset is not .* streaming=True"),
        ("images", "a str is not a data set"),
        (Endless(), "a Endless is not a data set with a length and random access"),
    ],
)
def test_a_data_set_without_labels_is_refused(dataset, message):
    with pytest.raises(UsageError, match=message):
        timm_lt.dataset_labels(dataset)


def picture(number, size=(5, 4)):
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def samples(dataset):
    stored = dataset.cast_column("image", datasets.Image(decode=False))
    return [(row["image"]["path"], row["label"]) for row in stored]


def pixels(dataset):
    return [np.asarray(image).tolist() for image in dataset["image"]]


def names_of(dataset):
    return getattr(dataset.features["label"], "names", None)


def test_files_of_folders_stay_files(folder):
    theirs = ImageFolder(folder, transform=lambda image: torch.zeros(3, 2, 2))
    found = given_splits(theirs)
    assert (list(found), samples(found["train"])) == (["train"], theirs.samples)
    assert names_of(found["train"]) == NAMES
    # timm sorts numbers in names as numbers.
    for old, new in (("bee", "class 10"), ("cat", "class 9")):
        (folder / old).rename(folder / new)
    theirs = ImageDataset(str(folder))
    found = given_splits({"training": theirs})["train"]
    assert samples(found) == [(str(path), label) for path, label in theirs.reader.samples]
    assert names_of(found) == ["ant", "class 9", "class 10"]


def test_parts_of_folders(folder):
    theirs = ImageFolder(folder)
    both = ConcatDataset([Subset(theirs, [-1, 2]), Subset(theirs, []), theirs])
    found = given_splits(both)["train"]
    assert samples(found) == [theirs.samples[-1], theirs.samples[2], *theirs.samples]
    assert names_of(found) == NAMES
    renamed = ImageFolder(folder)
    renamed.classes = [*"xyz"]
    assert names_of(given_splits(ConcatDataset([theirs, renamed]))["train"]) is None
    # Edited by hand, as many do, without touching the targets.
    theirs.samples = theirs.samples[:3]
    assert given_splits(theirs)["train"]["label"][:] == [0, 0, 0]
    theirs.target_transform = lambda label: label + 2
    found = given_splits(theirs)["train"]
    assert (found["label"][:], names_of(found)) == ([2, 2, 2], None)


def fold(folder, rows):
    """Some rows of a folder, whose list is kept as a whole."""

    def item(row):
        path, label = folder.samples[rows[row]]
        return Image.open(path), label, path

    return Items(item, len(rows), samples=folder.samples, classes=folder.classes)


class Grey(ImageDataset):
    def __getitem__(self, row):
        image, label = super().__getitem__(row)
        return {"image": image.convert("L"), "label": torch.tensor(label)}


def corner(path):
    with Image.open(path) as image:
        return image.crop((0, 0, 2, 2))


# timm's ImageDataset leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize(
    ("create", "named"),
    [
        (lambda root: fold(ImageFolder(root), [3, 0]), True),
        (Merged, False),
        (lambda root: ImageFolder(root, loader=corner), True),
        (lambda root: ConcatDataset([Merged(root), ImageFolder(root)]), False),
        (lambda root: Grey(str(root)), True),
        (lambda root: timm.data.ImageDataset(str(root), input_img_mode="L"), True),
    ],
)
def test_items_are_drawn_where_files_do_not_tell_them(create, named, tmp_path):
    for number, name in enumerate(("ant", "ant", "bee", "cat")):
        (tmp_path / name).mkdir(exist_ok=True)
        picture(number).save(tmp_path / name / f"{number}.png")
    theirs = create(tmp_path)
    items = [theirs[row] for row in range(len(theirs))]
    items = [(*item.values(),) if isinstance(item, dict) else item for item in items]
    found = given_splits(theirs)["train"]
    assert found["label"][:] == [int(item[1]) for item in items]
    assert pixels(found) == [np.asarray(item[0].convert("RGB")).tolist() for item in items]
    assert names_of(found) == (NAMES if named else None)


def test_a_transform_of_a_hugging_face_data_set_is_applied():
    images = [picture(number) for number in range(3)]
    names = datasets.ClassLabel(names=[*"ab"])
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1]})
    rows = rows.cast(datasets.Features({"image": datasets.Image(), "label": names}))
    turned = rows.with_transform(
        lambda batch: {**batch, "image": [image.rotate(180) for image in batch["image"]]}
    )
    found = given_splits(turned.select([2, 0]))["train"]
    expected = [np.asarray(images[row])[::-1, ::-1].tolist() for row in (2, 0)]
    assert (pixels(found), found["label"][:]) == (expected, [1, 0])
    assert names_of(found) == ["a", "b"]
    swapped = rows.with_transform(lambda batch: {**batch, "label": [1 - n for n in batch["label"]]})
    found = given_splits(swapped)["train"]
    assert (found["label"][:], names_of(found)) == ([1, 0, 0], None)
    found = given_splits(rows.with_format("torch"))["train"]
    assert pixels(found) == [np.asarray(image).tolist() for image in images]
    with pytest.raises(UsageError, match=r"image 0 of a Dataset is a Tensor; remove a transform"):
        given_splits(rows.with_transform(lambda batch: {**batch, "image": [torch.zeros(3)] * 3}))


def test_pairs_of_images_keep_every_pixel(tmp_path):
    images = [picture(number) for number in range(3)]
    images[1].save(tmp_path / "one.png")
    stored = io.BytesIO()
    images[2].save(stored, "JPEG", quality=30)
    lossy = Image.open(stored)
    array = np.asarray(picture(3))
    channels_first = torch.from_numpy(array.copy()).permute(2, 0, 1)
    changed = Image.open(tmp_path / "one.png")
    changed.paste((1, 2, 3), (0, 0, 2, 2))
    grey = np.repeat(array[..., :1], 3, 2)
    pairs = [
        (images[0], images[0]),
        (str(tmp_path / "one.png"), images[1]),
        (lossy, lossy.copy()),
        (tmp_path / "one.png", images[1]),
        (changed, changed.copy()),
        *((array, array), (array[..., 0], grey), (channels_first, array)),
    ]
    found = given_splits([(image, row % 2) for row, (image, _) in enumerate(pairs)])["train"]
    assert pixels(found) == [np.asarray(expected).tolist() for _, expected in pairs]
    assert found["label"][:] == [0, 1] * 4
    with Image.open(tmp_path / "one.png") as lazy:
        found = given_splits([(lazy, 0)])["train"]
    assert samples(found) == [(str(tmp_path / "one.png"), 0)]


def test_many_images_in_memory(monkeypatch):
    monkeypatch.setattr(sources, "ROWS", 2)
    images, labels = [picture(number) for number in range(5)], [0, 1, 2, 0, 1]
    data = Items(lambda row: (images[row], labels[row]), 5, classes=["x", "y", "z"])
    found = given_splits(data)["train"]
    assert (names_of(found), found["label"][:]) == (["x", "y", "z"], labels)
    assert pixels(found) == [np.asarray(image).tolist() for image in images]
    monkeypatch.setattr(module, "MAX_BYTES", 300)
    with pytest.raises(UsageError, match="need more than 0 GiB of memory; pass the paths"):
        given_splits(data)


def test_columns_are_renamed_and_others_are_named_once(caplog):
    rows = datasets.Dataset.from_dict({"img": [picture(0)], "labels": [0], "site": [3]})
    rows = rows.cast_column("img", datasets.Image())
    found = given_splits(datasets.DatasetDict({"train": rows, "validation": rows}))
    assert list(found) == ["train", "val"]
    assert all(set(rows.column_names) == {"image", "label", "site"} for rows in found.values())
    assert caplog.messages == ["the data set: columns that are not used: site"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "a NoneType is not a data set .*datasets.Dataset .*ImageFolder"),
        ({"train": "photos"}, "train split: a str is not a data set"),
        ([], "labels must not be empty"),
        ([(np.zeros((2, 2, 3)), 0)], "image 0 of a list is a ndarray; remove .* or the path"),
        ([("a.png", "cat")], "'cat' is not an integer"),
        ([("a.png", -1)], "negative"),
        (Items(lambda row: ("a.png", 2), 1, classes=["x", "y"]), "num_classes=2"),
        ([{"image": "a.png", "box": 3}], "item 0 of a list is a dict with the keys image, box"),
        (datasets.Dataset.from_dict({"label": [0]}), "no column of images; the columns are label"),
        ({"unsupervised": [("a.png", 0)]}, "unsupervised.*train, val, test"),
        ({"val": [("a.png", 0)], "valid": [("b.png", 0)]}, r"\(each at most once\).*'valid'"),
    ],
)
def test_other_objects_are_refused(data, message):
    with pytest.raises(UsageError, match=message):
        given_splits(data)
