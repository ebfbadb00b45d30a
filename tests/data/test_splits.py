"""Splits are checked before training; what is wrong is named by split and class."""

import os

import numpy as np
import pytest
import torch
from datasets import Value

from timm_lt.data import create_splits
from timm_lt.data.images import label_tensor
from timm_lt.data.sources import dataset_from_arrays, dataset_from_files
from timm_lt.data.splits import Splits, image_keys, path_keys, split_digests
from timm_lt.utils.checks import UsageError

NAMES = ["ant", "bee", "cat"]


def dataset_of(labels, names=NAMES, *, named=True):
    """A data set whose images have their row in every pixel."""
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    images = np.broadcast_to(images, (len(labels), 4, 6, 3))
    # A ClassLabel refuses labels beyond its names itself; Value does not.
    dataset = dataset_from_arrays(np.ascontiguousarray(images), np.array(labels), names)
    return dataset if named else dataset.cast_column("label", Value("int64"))


def three(*, named=True, **changed):
    labels = {"train": [0, 0, 0, 1, 1, 2], "val": [0, 1, 2], "test": [0, 1, 2, 2], **changed}
    return {split: dataset_of(values, named=named) for split, values in labels.items()}


def test_splits_know_labels_counts_and_names():
    splits = Splits.from_datasets(three())
    assert splits.class_counts.tolist() == [3, 2, 1]
    assert splits.num_classes == 3
    assert splits.label_names == NAMES
    assert {split: labels.tolist() for split, labels in splits.labels.items()} == {
        "train": [0, 0, 0, 1, 1, 2],
        "val": [0, 1, 2],
        "test": [0, 1, 2, 2],
    }


def test_without_names_the_training_labels_say_how_many_classes():
    splits = Splits.from_datasets(three(named=False))
    assert splits.label_names is None
    assert splits.num_classes == 3


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_empty_split_is_named(split):
    datasets = three()
    datasets[split] = datasets[split].select([])
    with pytest.raises(UsageError, match=f"the {split} split has no images"):
        Splits.from_datasets(datasets)


def test_a_missing_split_is_named():
    datasets = three()
    del datasets["train"]
    with pytest.raises(UsageError, match="the train split has no images"):
        Splits.from_datasets(datasets)
    datasets = three()
    del datasets["test"]
    with pytest.raises(UsageError, match="the test split has no images"):
        Splits.from_datasets(datasets, protocol="paper")


@pytest.mark.parametrize("with_val", [True, False])
def test_a_part_of_each_class_is_held_out_for_the_test(with_val):
    train = [0] * 20 + [1] * 10 + [2] * 3
    datasets = {"train": dataset_of(train)}
    if with_val:
        datasets["val"] = dataset_of([0, 1, 2])
    splits = Splits.from_datasets(datasets)
    assert torch.bincount(splits.labels["test"]).tolist() == [4, 2, 1]
    assert splits.class_counts.tolist() == ([16, 8, 2] if with_val else [13, 6, 1])
    assert splits.val_source == ("val" if with_val else "train")
    # Every pixel of an image is its row.
    parts = ["train", "test"] if with_val else ["train", "val", "test"]
    rows = [image.getpixel((0, 0))[0] for part in parts for image in splits.datasets[part]["image"]]
    assert sorted(rows) == list(range(33))
    larger = Splits.from_datasets(datasets, test_fraction=0.4)
    assert torch.bincount(larger.labels["test"]).tolist() == [8, 4, 1]


def test_a_class_with_too_few_images_for_the_splits_is_named():
    message = (
        r"^train split: 2 of 3 classes have fewer than 3 images, one each for train, val, test: "
        r"1 \(bee\), 2 \(cat\); give splits"
    )
    with pytest.raises(UsageError, match=message):
        Splits.from_datasets({"train": dataset_of([0, 0, 0, 1, 1, 2])})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": [0, 0, 2]}, r"^train split: 1 of 3 classes have no image: 1 \(bee\)$"),
        ({"train": [1]}, r"^train split: 2 of 3 classes have no image: 0 \(ant\), 2 \(cat\)$"),
        ({"val": [0, 1]}, r"^val split: 1 of 3 classes have no image: 2 \(cat\)$"),
    ],
)
def test_a_class_without_image_is_named(changed, message):
    with pytest.raises(UsageError, match=message):
        Splits.from_datasets(three(**changed))


def test_a_class_without_image_is_named_by_number_where_it_has_no_name():
    with pytest.raises(UsageError, match=r"^val split: 1 of 3 classes have no image: 2$"):
        Splits.from_datasets(three(named=False, val=[0, 1]))


def test_a_label_that_is_far_too_large_is_told_without_counting_up_to_it():
    datasets = three(named=False, train=[0, 0, 1, 1, 2 * 10**18, 2 * 10**18])
    message = r"^train split: 1999999999999999998 of 2000000000000000001 .*: 2, 3, 4, 5, 6, \.\.\.$"
    with pytest.raises(UsageError, match=message):
        Splits.from_datasets(datasets)
    del datasets["val"]
    with pytest.raises(UsageError, match=message):
        Splits.from_datasets(datasets)


def test_only_the_first_missing_classes_are_named():
    names = [f"c{i}" for i in range(9)]
    datasets = {split: dataset_of(range(9), names) for split in ("train", "val", "test")}
    datasets["val"] = dataset_of([0], names)
    with pytest.raises(UsageError, match=r"8 of 9 .*: 1 \(c1\).*, 5 \(c5\), \.\.\.$"):
        Splits.from_datasets(datasets)


def test_a_class_without_test_image_is_allowed():
    assert Splits.from_datasets(three(test=[0, 0])).num_classes == 3


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_label_beyond_the_classes_is_named(split):
    with pytest.raises(UsageError, match=rf"^{split} split: labels\[1\] = 3 is not below"):
        Splits.from_datasets(three(named=False, **{split: [0, 3, 1, 2]}))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_negative_label_is_named(split):
    with pytest.raises(UsageError, match=rf"^{split} split: labels\[0\] = -1 is negative"):
        Splits.from_datasets(three(named=False, **{split: [-1, 0, 1, 2]}))


def test_splits_that_number_their_classes_differently_are_refused():
    datasets = three()
    datasets["test"] = dataset_of([0, 1, 2], ["ant", "cat", "bee"])
    with pytest.raises(UsageError, match=r"test split: label 1 is class 'cat', in .* 'bee'"):
        Splits.from_datasets(datasets)
    datasets["test"] = dataset_of([0, 1, 2], [*NAMES, "dog"])
    with pytest.raises(UsageError, match=r"test split: label 3 is class 'dog', in .* None"):
        Splits.from_datasets(datasets)


def test_images_of_a_split_are_decoded_with_its_labels():
    splits = Splits.from_datasets(three())
    images = splits.images("test", size=None, mean=(0, 0, 0), std=(1, 1, 1))
    assert images.images.shape == (4, 3, 4, 6)
    assert images.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert images.labels.tolist() == [0, 1, 2, 2]
    batch, targets = images.__getitems__([3])
    torch.testing.assert_close(batch, torch.full((1, 3, 4, 6), 3 / 255))
    assert targets.tolist() == [2]


def test_create_splits_makes_all_three_of_a_data_set():
    splits = create_splits("digits_lt")
    assert splits.num_classes == 10
    assert set(splits.datasets) == {"train", "val", "test"}
    assert splits.class_counts.equal(torch.bincount(splits.labels["train"]))
    with pytest.raises(UsageError, match="unknown data set 'digitslt'"):
        create_splits("digitslt")
    with pytest.raises(UsageError, match="needs no root"):
        create_splits("digits_lt", root="somewhere")


def test_the_problems_of_all_splits_are_reported_together():
    with pytest.raises(UsageError) as caught:
        Splits.from_datasets(three(train=[0, 1], val=[2]))
    assert caught.value.problems == [
        "train split: 1 of 3 classes have no image: 2 (cat)",
        "val split: 2 of 3 classes have no image: 0 (ant), 1 (bee)",
    ]


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
    digests = []
    for part in (images, images[:2], np.zeros((3, 4, 8, 3), np.uint8), other):
        dataset = dataset_from_arrays(part, np.zeros(len(part), np.int64), ["a"])
        assert len({*image_keys(dataset)}) == (3 if part is other else 1)
        assert image_keys(dataset.select([1, 0])) == [image_keys(dataset)[i] for i in (1, 0)]
        digests.append(split_digests({"train": dataset}, {"train": label_tensor(dataset)})["train"])
    assert [digest["images"] for digest in digests] == [3, 2, 3, 3]
    assert len({digest["sha256"] for digest in digests}) == 4


def test_keys_are_the_same_on_windows(monkeypatch):
    monkeypatch.setattr(os, "sep", "\\")
    assert path_keys([r"C:\photos\train\cat\1.jpg"]) == ["cat/1.jpg"]
    assert path_keys([r"/photos\train\cat\1.jpg"], "/photos") == ["cat/1.jpg"]
