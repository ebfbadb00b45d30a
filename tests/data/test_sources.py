"""The factory: what every data set promises, and what every mistake is told."""

import io

import datasets
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from timm_lt.data import create_dataset, register_dataset, sources
from timm_lt.data.sources import (
    DATASETS,
    dataset_from_arrays,
    dataset_from_files,
    encode_bmp,
    find_splits,
)
from timm_lt.utils.checks import UsageError

BUILT_IN = ["digits_lt", "glyph_lt"]


@pytest.fixture
def source():
    """A data set that is registered for one test; it reports what it was asked for."""
    calls = []

    @register_dataset("for_this_test")
    def build(split, *, root=None, size=1):
        calls.append((split, root, size))
        return dataset_from_arrays(np.zeros((1, 2, 2, 3), np.uint8), np.array([0]), ["a"])

    yield calls
    del DATASETS._parts["for_this_test"]


@pytest.fixture
def whole_source():
    """A data set that makes both of its splits together; it counts how often."""
    calls = []

    @register_dataset("for_this_test")
    def build(*, root, size=1):
        calls.append((root, size))
        images = np.arange(2 * size * 12, dtype=np.uint8).reshape(-1, 2, 2, 3)
        both = dataset_from_arrays(images, np.zeros(len(images), np.int64), ["a"])
        return {"train": both.select(range(size)), "test": both.select(range(size, 2 * size))}

    yield calls
    del DATASETS._parts["for_this_test"]


def test_a_data_set_that_makes_all_splits_together_is_asked_once(whole_source):
    found = find_splits("for_this_test", root="here", size=3)
    assert {split: len(dataset) for split, dataset in found.items()} == {"train": 3, "test": 3}
    assert whole_source == [("here", 3)]
    test = create_dataset("for_this_test", split="test", root="here", size=3)
    assert_array_equal(np.asarray(test[0]["image"]), np.arange(36, 48).reshape(2, 2, 3))
    with pytest.raises(UsageError, match="no val split: hold out"):
        create_dataset("for_this_test", split="val", root="here")
    with pytest.raises(UsageError, match="needs the option 'root'"):
        create_dataset("for_this_test")


def test_files_become_a_data_set_that_opens_them_when_drawn(tmp_path):
    Image.new("L", (3, 2), 7).save(tmp_path / "grey.png")
    rows = dataset_from_files([str(tmp_path / "grey.png"), "not there"], np.array([1, 0]), None)
    assert rows["label"][:] == [1, 0]
    assert_array_equal(np.asarray(rows[0]["image"]), np.full((2, 3, 3), 7))
    named = dataset_from_files(["x"], np.array([1]), ["a", "b"])
    assert named.features["label"].names == ["a", "b"]


def test_more_files_than_a_column_holds(monkeypatch):
    monkeypatch.setattr(sources, "FILES", 2)
    rows = dataset_from_files([f"{row}.png" for row in range(5)], np.arange(5), None)
    stored = rows.with_format("arrow")[:]["image"].to_pylist()
    assert [image["path"] for image in stored] == [f"{row}.png" for row in range(5)]
    assert rows["label"][:] == [0, 1, 2, 3, 4]
    assert len(dataset_from_files([], np.arange(0), None)) == 0


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_data_set_has_images_and_named_labels(name):
    sizes = {}
    for split in ("train", "val", "test"):
        dataset = create_dataset(name, split=split)
        sizes[split] = len(dataset)
        assert isinstance(dataset, datasets.Dataset)
        assert dataset.column_names == ["image", "label"]
        assert isinstance(dataset.features["image"], datasets.Image)
        assert isinstance(dataset.features["label"], datasets.ClassLabel)
        assert set(dataset["label"][:]) == set(range(dataset.features["label"].num_classes))
        assert isinstance(dataset[0]["image"], Image.Image)
        assert dataset[0]["image"].mode == "RGB"
    assert sizes["train"] > sizes["val"]


def test_split_is_train_unless_told_and_options_arrive(source):
    create_dataset("for_this_test")
    create_dataset("for_this_test", split="val", root="here", size=3)
    assert source == [("train", None, 1), ("val", "here", 3)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("glyph-lt", {}, r"did you mean 'glyph_lt'\?.*digits_lt, .*places_lt"),
        ("glyph_lt", {"split": "validation"}, r"'validation'.*one of: train, val, test"),
        ("glyph_lt", {"sede": 1}, r"no option 'sede' \(did you mean 'seed'\?\).*: seed"),
        ("glyph_lt", {"root": "somewhere"}, "reads no files; remove the root 'somewhere'"),
    ],
)
def test_wrong_names_and_options_list_the_right_ones(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_dataset(name, **options)


def test_name_is_registered_once(source):
    with pytest.raises(UsageError, match="registered already"):
        register_dataset("for_this_test")


@pytest.mark.parametrize("shape", [(3, 32, 32, 3), (2, 5, 7, 3), (1, 1, 2, 3), (2, 4, 3, 3)])
def test_pillow_reads_back_what_was_encoded(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    decoded = [np.asarray(Image.open(io.BytesIO(file.tobytes()))) for file in encode_bmp(images)]
    assert_array_equal(np.stack(decoded), images)
