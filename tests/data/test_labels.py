"""The labels of every kind of data set, none of whose images can be decoded."""

import tarfile

import datasets
import numpy as np
import pytest
import torch
import torchvision
from timm.data import AugMixDataset, ImageDataset
from timm.data.readers.reader_hfds import ReaderHfds
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.data.readers.reader_image_tar import ReaderImageTar
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

import timm_lt

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
    with pytest.raises(timm_lt.UsageError, match="no column 'label' or 'labels', only image, fine"):
        labels_of(rows(fine=LABELS))
    with pytest.raises(timm_lt.UsageError, match="no column 'coarse', only image, fine, label"):
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
    assert labels_of(AugMixDataset(ImageDataset(str(folder)))) == LABELS
    tensors = TensorDataset(torch.zeros(6, 3, 2, 2), torch.tensor(LABELS), torch.zeros(6))
    assert labels_of(tensors) == LABELS


def test_target_transforms_are_applied(folder):
    def reverse(label):
        return 2 - label

    expected = [2 - label for label in LABELS]
    for kind in (ImageDataset, torchvision.datasets.ImageFolder):
        assert labels_of(kind(str(folder), target_transform=reverse)) == expected


def test_attributes():
    class Own(Dataset):
        def __init__(self, **attributes):
            vars(self).update(attributes)

    for labels in (LABELS, np.array(LABELS, np.uint8), torch.tensor(LABELS)):
        for name in ("labels", "targets", "_labels"):
            assert labels_of(Own(**{name: labels})) == LABELS
    assert labels_of(Own(samples=[("file", label) for label in LABELS])) == LABELS


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (torchvision.datasets.FakeData(4), "labels of a FakeData are not known .* pass a tensor"),
        (TensorDataset(torch.zeros(3)), "labels of a TensorDataset are not known"),
        (rows(label=[0, 0, 0, -1, 0, 0]), r"labels\[3\] = -1 is negative"),
        (TensorDataset(torch.zeros(2), torch.zeros(2, 4).long()), "must be one-dimensional"),
        (TensorDataset(torch.zeros(2), torch.tensor([0.0, 1.5])), r"labels\[1\] = 1.5 is not an"),
    ],
)
def test_what_has_no_labels_is_refused(dataset, message):
    with pytest.raises(timm_lt.UsageError, match=message):
        timm_lt.dataset_labels(dataset)
