"""make_long_tailed against LDAM-DRW's construction, written as its paper and code describe it."""

import random

import datasets
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from timm_lt.data import make_long_tailed
from timm_lt.registry import UsageError


def balanced(num_classes, per_class):
    labels = list(range(num_classes)) * per_class
    random.Random(0).shuffle(labels)
    features = datasets.Features(
        {
            "label": datasets.ClassLabel(names=[f"class {c}" for c in range(num_classes)]),
            "row": datasets.Value("int64"),
        }
    )
    return datasets.Dataset.from_dict(
        {"label": labels, "row": list(range(len(labels)))}, features=features
    )


def naive_subset(labels, counts):
    """The first n_c of each class's indices after a shuffle, from NumPy's global generator."""
    np.random.seed(0)  # noqa: NPY002
    chosen = []
    for label, count in enumerate(counts):
        indices = np.where(np.array(labels) == label)[0]
        np.random.shuffle(indices)  # noqa: NPY002
        chosen.extend(indices[:count].tolist())
    return chosen


@pytest.mark.parametrize(
    ("profile", "counts"),
    # int(80 * 0.1^(i/4)) and, for step, 5 // 2 = 2 classes in full
    [("exponential", [80, 44, 25, 14, 8]), ("step", [80, 80, 8, 8, 8])],
)
def test_subset_is_that_of_ldam_drw(profile, counts):
    dataset = balanced(5, 80)
    subset = make_long_tailed(dataset, imbalance_factor=10, profile=profile)
    assert_array_equal(np.bincount(subset["label"][:]), counts)
    assert subset["row"][:] == naive_subset(dataset["label"][:], counts)


def test_global_generator_is_left_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    make_long_tailed(balanced(3, 10), imbalance_factor=2)
    assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_factor_one_keeps_every_image():
    dataset = balanced(4, 6)
    subset = make_long_tailed(dataset, imbalance_factor=1)
    assert sorted(subset["row"][:]) == list(range(24))
    assert subset.features == dataset.features


def test_seed_decides_the_images_not_the_counts():
    dataset = balanced(4, 50)
    rows = [make_long_tailed(dataset, imbalance_factor=5, seed=seed)["row"][:] for seed in (0, 1)]
    assert len(rows[0]) == len(rows[1])
    assert set(rows[0]) != set(rows[1])


def test_label_without_names_will_do():
    dataset = datasets.Dataset.from_dict({"label": [0, 1] * 10})
    subset = make_long_tailed(dataset, imbalance_factor=5)
    assert subset["label"][:] == [0] * 10 + [1] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imbalance_factor": 0.01}, "inverted: their 0.01 is 100 here"),
        ({"imbalance_factor": 11}, "rarest class empty"),
        ({"imbalance_factor": 2, "profile": "linear"}, "exponential, step, pareto"),
        ({"imbalance_factor": 2, "seed": -1}, "seed must be an integer from 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        make_long_tailed(balanced(3, 10), **options)


def test_data_set_without_labels_is_refused():
    with pytest.raises(UsageError, match=r"no column 'label'; it has \['target'\]"):
        make_long_tailed(datasets.Dataset.from_dict({"target": [0, 1]}), imbalance_factor=2)


def test_unbalanced_data_set_is_refused():
    dataset = datasets.Dataset.from_dict({"label": [0] * 3 + [1] * 20})
    with pytest.raises(UsageError, match="class 0 has 3 images, fewer than the 20"):
        make_long_tailed(dataset, imbalance_factor=2)
