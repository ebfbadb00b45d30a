"""Registry and factory of data sets, and data sets made of files or arrays."""

import datasets
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from timm_lt.data import create_dataset, register_dataset
from timm_lt.data.sources import DATASETS, dataset_from_arrays, dataset_from_files, find_splits
from timm_lt.utils.checks import UsageError

BUILT_IN = ["digits_lt", "glyph_lt"]


@pytest.fixture
def calls():
    """Options of two data sets that are registered for one test."""
    calls = []
    images = np.arange(6 * 12, dtype=np.uint8).reshape(-1, 2, 2, 3)
    rows = dataset_from_arrays(images, np.zeros(6, np.int64), ["a"])

    @register_dataset("one_by_one")
    def one(split, *, root=None, size=1):
        calls.append((split, root, size))
        return rows

    @register_dataset("together")
    def both(*, root, size=1):
        calls.append((root, size))
        return {"train": rows.select(range(size)), "test": rows.select(range(size, 2 * size))}

    yield calls
    del DATASETS._parts["one_by_one"], DATASETS._parts["together"]


def test_a_data_set_that_makes_all_splits_together_is_called_once(calls):
    found = find_splits("together", root="here", size=3)
    assert {split: len(dataset) for split, dataset in found.items()} == {"train": 3, "test": 3}
    assert calls == [("here", 3)]
    test = create_dataset("together", split="test", root="here", size=3)
    assert_array_equal(np.asarray(test[0]["image"]), np.arange(36, 48).reshape(2, 2, 3))
    with pytest.raises(UsageError, match="no val split: hold out"):
        create_dataset("together", split="val", root="here")
    with pytest.raises(UsageError, match="needs the option 'root'"):
        create_dataset("together")


def test_split_and_options_reach_the_data_set(calls):
    create_dataset("one_by_one")
    create_dataset("one_by_one", split="val", root="here", size=3)
    assert calls == [("train", None, 1), ("val", "here", 3)]
    with pytest.raises(UsageError, match="registered already"):
        register_dataset("one_by_one")


def test_files_become_a_data_set_that_opens_them_when_drawn(tmp_path):
    Image.new("L", (3, 2), 7).save(tmp_path / "grey.png")
    rows = dataset_from_files([str(tmp_path / "grey.png"), "not there"], np.array([1, 0]), None)
    assert rows["label"][:] == [1, 0]
    assert_array_equal(np.asarray(rows[0]["image"]), np.full((2, 3, 3), 7))
    named = dataset_from_files(["x"], np.array([1]), ["a", "b"])
    assert named.features["label"].names == ["a", "b"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_data_set_has_images_and_named_labels(name):
    sizes = {}
    for split in ("train", "val", "test"):
        dataset = create_dataset(name, split=split)
        sizes[split] = len(dataset)
        assert dataset.column_names == ["image", "label"]
        assert isinstance(dataset.features["image"], datasets.Image)
        assert set(dataset["label"][:]) == set(range(dataset.features["label"].num_classes))
        assert dataset[0]["image"].mode == "RGB"
    assert sizes["train"] > sizes["val"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("glyph-lt", {}, r"did you mean 'glyph_lt'\?.*digits_lt, .*places_lt"),
        ("glyph_lt", {"split": "validation"}, r"'validation'.*one of: train, val, test"),
        ("glyph_lt", {"sede": 1}, r"no option 'sede' \(did you mean 'seed'\?\).*: seed"),
        ("glyph_lt", {"root": "somewhere"}, "no option 'root'"),
    ],
)
def test_wrong_names_and_options_list_the_right_ones(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_dataset(name, **options)
