"""digits_lt: counts by hand, splits that share no digit, real digits under their own labels."""

import sys

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn.datasets import load_digits

from timm_lt.data import create_dataset
from timm_lt.data.digits_lt import enlarge, split_indices
from timm_lt.utils.checks import UsageError

SPLITS = ("train", "val", "test")
# int(120 * 24^(-c / 9)), by hand with 24^(1/9) = 1.42347
TRAIN_COUNTS = [120, 84, 59, 41, 29, 20, 14, 10, 7, 5]


def test_train_has_all_three_shot_groups():
    labels = np.array(create_dataset("digits_lt", split="train")["label"][:])
    counts = np.bincount(labels)
    assert_array_equal(counts, TRAIN_COUNTS)
    assert ((counts > 100).sum(), (counts < 20).sum()) == (1, 4)


@pytest.mark.parametrize(("split", "per_class"), [("val", 20), ("test", 30)])
def test_evaluation_splits_are_balanced(split, per_class):
    labels = create_dataset("digits_lt", split=split)["label"][:]
    assert_array_equal(np.bincount(labels), [per_class] * 10)


def test_splits_share_no_digit():
    parts = split_indices(load_digits().target, seed=0)
    everything = np.concatenate(list(parts.values()))
    assert len(set(everything.tolist())) == len(everything) == 10 * (120 + 20 + 30)


def test_images_are_scikit_learns_digits_of_that_class():
    digits = load_digits()
    known = {enlarge(image).tobytes(): label for image, label in zip(*unpack(digits), strict=True)}
    for split in SPLITS:
        for row in create_dataset("digits_lt", split=split):
            assert row["image"].size == (32, 32)
            assert known[np.asarray(row["image"]).tobytes()] == row["label"]


def unpack(digits):
    return digits.images, digits.target


def test_enlarging_keeps_the_mean_and_the_extremes_of_flat_digits():
    assert_array_equal(enlarge(np.full((8, 8), 16.0)), np.full((32, 32, 3), 255))
    half = np.zeros((8, 8))
    half[:, 4:] = 16
    enlarged = enlarge(half)
    assert enlarged.mean() == pytest.approx(127.5, abs=1)
    assert_array_equal(enlarged[:, [0, -1], 0], np.tile([0, 255], (32, 1)))


def test_seed_decides_the_choice():
    first, again, other = (
        create_dataset("digits_lt", split="val", seed=seed).data.column("image").to_pylist()
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_without_scikit_learn_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r'pip install "timm_lt\[digits\]"'):
        create_dataset("digits_lt")


def test_negative_seed_is_refused():
    with pytest.raises(UsageError, match=r"seed must be an integer from 0"):
        create_dataset("digits_lt", seed=-1)
