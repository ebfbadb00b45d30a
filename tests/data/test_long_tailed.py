"""make_long_tailed against LDAM-DRW's construction, written as its paper and code describe it."""

import random

import datasets
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from timm_lt.data import make_long_tailed
from timm_lt.utils.checks import UsageError


def balanced(num_classes, per_class):
    labels = list(range(num_classes)) * per_class
    random.Random(0).shuffle(labels)
    dataset = datasets.Dataset.from_dict({"label": labels, "row": list(range(len(labels)))})
    names = [f"class {c}" for c in range(num_classes)]
    return dataset.cast_column("label", datasets.ClassLabel(names=names))


def naive_subset(labels, counts):
    """The first n_c of each class's indices after a shuffle, from NumPy's global generator."""
    np.random.seed(0)  # noqa: NPY002
    chosen = []
    for label, count in enumerate(counts):
        indices = np.where(np.array(labels) == label)[0]
        np.random.shuffle(indices)  # noqa: NPY002
        chosen.extend(indices[:count].tolist())
    return chosen


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize("factor", [10, 50, 200])
@pytest.mark.parametrize("profile", ["exponential", "step"])
def test_a_subset_of_a_set_as_large_as_cifar_is_that_of_ldam_drw(num_classes, factor, profile):
    dataset = balanced(num_classes, 50_000 // num_classes)
    n_max, mu = 50_000 // num_classes, 1 / factor
    if profile == "exponential":
        counts = [int(n_max * mu ** (i / (num_classes - 1.0))) for i in range(num_classes)]
    else:
        counts = [n_max] * (num_classes // 2)
        counts += [int(n_max * mu)] * (num_classes - num_classes // 2)
    subset = make_long_tailed(dataset, imbalance_factor=factor, profile=profile)
    assert subset["row"][:] == naive_subset(dataset["label"][:], counts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imbalance_factor": 0.01}, r"LDAM-DRW writes the inverse.*got 0.01"),
        ({"imbalance_factor": 11}, r"must be a number in \[1, 10\], got 11"),
        ({"imbalance_factor": 2, "profile": "linear"}, "exponential, step, pareto"),
        ({"imbalance_factor": 2, "seed": -1}, "seed must be an integer from 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        make_long_tailed(balanced(3, 10), **options)


def test_the_seed_decides_the_images_and_the_global_generator_is_left_alone():
    dataset = balanced(4, 50)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    rows = [make_long_tailed(dataset, imbalance_factor=5, seed=seed)["row"][:] for seed in (0, 1)]
    assert len(rows[0]) == len(rows[1])
    assert set(rows[0]) != set(rows[1])
    assert sorted(make_long_tailed(dataset, imbalance_factor=1)["row"][:]) == list(range(200))
    assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_the_column_of_labels_can_be_named():
    rows = datasets.Dataset.from_dict({"fine": [1, 0] * 10, "labels": [0] * 20})
    subset = make_long_tailed(rows, imbalance_factor=5, column="fine")
    assert subset["fine"][:] == [0] * 10 + [1] * 2
    assert len(make_long_tailed(rows, imbalance_factor=1)) == 20


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (datasets.Dataset.from_dict({"score": [0, 1]}), r"columns are score \(int64\)"),
        (
            # int(20 * 2^(-i/3)) = 20, 15, 12, 10
            datasets.Dataset.from_dict({"label": [0] * 3 + [1] * 20 + [2] * 20 + [3]}),
            "2 of 4 classes .*: class 0 has 3, not 20, class 3 has 1, not 10; .* balanced",
        ),
        (balanced(3, 10).to_iterable_dataset(), "IterableDataset is not a data set with a length"),
        (datasets.DatasetDict(train=balanced(3, 10)), "pass one of its splits"),
    ],
)
def test_data_sets_without_labels_or_enough_images_are_refused(dataset, message):
    with pytest.raises(UsageError, match=message):
        make_long_tailed(dataset, imbalance_factor=2)
