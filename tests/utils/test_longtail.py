import json
from collections import Counter
from fractions import Fraction

import datasets
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import timm_lt
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import (
    check_class_counts,
    check_no_empty_class,
    class_counts,
    describe_shots,
    long_tailed_counts,
    shot_groups,
)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(0, 5))
def test_class_counts_count(labels, spare):
    num_classes = max(labels) + 1 + spare
    expected = [labels.count(c) for c in range(num_classes)]
    for given_labels in (
        labels,
        tuple(labels),
        np.array(labels, dtype=np.uint8),
        np.array(labels, dtype=object),
        torch.tensor(labels, dtype=torch.int32),
        [np.int64(label) for label in labels],
        tuple(torch.tensor(labels)),
        [np.array(label) for label in labels],
        pd.Series(labels, index=range(7, 7 + len(labels))),
        datasets.Dataset.from_dict({"label": labels})["label"],
    ):
        counts = class_counts(given_labels, num_classes)
        assert counts.dtype == torch.int64
        assert counts.tolist() == expected
    assert class_counts(labels).tolist() == expected[: max(labels) + 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1, -2], r"labels\[2\] = -1 is negative"),
        ([0, 3, 4], r"labels\[1\] = 3 is not below num_classes=3"),
        (torch.tensor([0, 7]), r"labels\[1\] = 7 is not below num_classes=3"),
        ([0, 1.0, 2], r"labels\[1\] = 1.0 is not an integer"),
        (np.array(["cat", "dog"]), r"labels\[0\] = 'cat' is not an integer; number the classes"),
        (Counter([0, 0, 1]), "labels must be a sequence or an array of integers, got a Counter"),
        (np.array([0.0, 1.0, np.nan, 0.5]), r"labels\[0\] = 0.0 is not an integer.*float64"),
        (torch.tensor([0.0, 1.0]), r"labels\[0\] = 0.0 is not an integer.*torch.float32"),
        (torch.tensor([1.5], dtype=torch.bfloat16), r"labels\[0\] = 1.5.*torch.bfloat16"),
        ([0, 1, True], r"labels\[2\] = True is not an integer"),
        ([], "labels must not be empty"),
        (np.eye(2), r"labels must be one-dimensional, got shape \(2, 2\)"),
        ([[0, 1], [1]], r"labels\[0\] = \[0, 1\] is not an integer"),
        (torch.tensor(1), r"labels must be one-dimensional, got shape \(\)"),
        (5, "got a int"),
        (datasets.Dataset.from_dict({"label": [0]}), r"pass timm_lt.dataset_labels\(dataset\)"),
    ],
)
def test_class_counts_names_the_culprit(labels, message):
    with pytest.raises(UsageError, match=message):
        class_counts(labels, num_classes=3)


def test_empty_classes_are_named():
    with pytest.raises(UsageError, match=r"7 of 8 .*: 0, 1, 3, 4, 5, \.\.\.$"):
        check_no_empty_class([0, 0, 9, 0, 0, 0, 0, 0])
    with pytest.raises(UsageError, match="all 0"):
        check_no_empty_class([0, 0])
    with pytest.raises(UsageError, match=r"class_counts\[1\] = -3 is negative"):
        check_no_empty_class([4, -3])


# The sizes of CIFAR-LT as published by Cao et al. and its successors.
@pytest.mark.parametrize(
    ("num_classes", "max_count", "sizes"),
    [
        (10, 5000, {10: 20431, 50: 13996, 100: 12406, 200: 11203}),
        (100, 500, {10: 19573, 50: 12608, 100: 10847, 200: 9502}),
    ],
)
def test_exponential_profile_has_the_published_sizes(num_classes, max_count, sizes):
    for factor, size in sizes.items():
        assert sum(long_tailed_counts(num_classes, max_count, factor)) == size


@pytest.mark.parametrize(
    ("num_classes", "max_count", "factor"), [(7, 640, 64), (4, 500, 8), (12, 300, 100), (3, 77, 7)]
)
def test_exponential_profile_is_exact(num_classes, max_count, factor):
    # n_i = floor(n_max r^(-i/m)) is the largest k with k^m <= n_max^m / r^i.
    m = num_classes - 1
    for i, count in enumerate(long_tailed_counts(num_classes, max_count, factor)):
        assert count**m <= Fraction(max_count**m, factor**i) < (count + 1) ** m


def test_profiles_by_hand():
    assert long_tailed_counts(100, 500, 200)[-1] == 2
    assert long_tailed_counts(5, 5000, 100, "step") == [5000, 5000, 50, 50, 50]
    assert long_tailed_counts(4, 500, 10, "step") == [500, 500, 50, 50]
    # r = 2^6: the base falls from 1 to 2 in equal steps, 1, 1.5, 2.
    assert long_tailed_counts(3, 6400, 64, "pareto") == [6400, int(6400 / 1.5**6), 100]
    for profile in ("exponential", "step", "pareto"):
        assert long_tailed_counts(6, 12, 1, profile) == [12] * 6
        assert long_tailed_counts(1, 500, 100, profile) == [500]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 500, 0.01), r"LDAM-DRW writes the inverse.* in \[1, 500\], got 0.01"),
        ((10, 50, 100), r"must be a number in \[1, 50\], got 100"),
        ((0, 500, 10), "num_classes must be an integer >= 1, got 0"),
        ((10, 500, 10, "exp"), "unknown profile 'exp'.*exponential, step, pareto"),
    ],
)
def test_invalid_profiles_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        long_tailed_counts(*arguments)


def test_group_boundaries():
    counts = [0, 1, 19, 20, 21, 99, 100, 101]
    letter = {"many_shot": "m", "medium_shot": "d", "few_shot": "f"}
    for rule, expected in (("fb", "fffddddm"), ("oltr", "ffffddmm")):
        groups = shot_groups(counts, rule)
        assert list(groups) == list(letter)
        assert all(mask.dtype == torch.bool for mask in groups.values())
        found = ["".join(letter[g] for g in groups if groups[g][c]) for c in range(len(counts))]
        assert "".join(found) == expected


def test_groups_of_cifar100_lt_are_the_published_ones():
    counts = torch.tensor(long_tailed_counts(100, 500, 100))
    assert json.loads(json.dumps(describe_shots(counts))) == {
        "many_shot": {"classes": 35, "rule": "> 100"},
        "medium_shot": {"classes": 35, "rule": "20 to 100"},
        "few_shot": {"classes": 30, "rule": "< 20"},
    }
    assert [group["classes"] for group in describe_shots(counts, "oltr").values()] == [35, 34, 31]
    with pytest.raises(UsageError, match=r"unknown shot rule 'FB'.*fb, oltr"):
        describe_shots([1, 2], "FB")


# A rare class first, so that neither the order of keys nor that of frequency is that of labels.
TAIL_FIRST = [2] * 3 + [0] * 160 + [3] * 60 + [1] * 25
COUNTS = [160, 25, 3, 60]


def test_counts_by_label_or_name():
    series, names = pd.Series(TAIL_FIRST), ["owl", "auk", "emu", "jay"]
    numpy = {np.int64(label): np.int32(n) for label, n in Counter(TAIL_FIRST).items()}
    for by_label in (Counter(TAIL_FIRST), numpy, series.value_counts()):
        assert check_class_counts(by_label).tolist() == COUNTS
    by_name = series.map(dict(enumerate(names))).value_counts()
    assert check_class_counts(by_name, label_names=names).tolist() == COUNTS
    assert check_class_counts({"auk": 1, "owl": 2}, label_names=names).tolist() == [2, 1, 0, 0]
    assert check_class_counts({0: 9, 3: 1}, num_classes=5).tolist() == [9, 0, 0, 1, 0]
    # timm keeps the names of a folder's classes.
    model = timm.create_model("test_resnet", num_classes=4)
    model.pretrained_cfg["label_names"] = names
    timm_lt.set_head(model, "logit_adjusted", class_counts=by_name)
    torch.testing.assert_close(model.fc.log_prior.exp(), torch.tensor(COUNTS) / sum(COUNTS))
    with pytest.raises(UsageError, match=r"must be class names \(owl, .*unknown: 'eel'"):
        check_class_counts({"owl": 1, "eel": 2}, label_names=names)


@pytest.mark.parametrize(
    ("counts", "num_classes", "message"),
    [
        ({1: 5, 2: 3}, None, "must be the labels 0 to 1, .*; missing: 0, unknown: 2"),
        ({0: 5, -1: 4}, 3, "missing: 1, 2, unknown: -1"),
        ({"0": 5, "1": 4}, None, "unknown: '0', '1'"),
        ({True: 5, False: 1}, None, "unknown: True, False"),
        (Counter(torch.tensor([0, 0, 1])), None, r"unknown: tensor\(0\)"),
        (pd.Series([5, 4], index=[0, 0]), None, "each once"),
        ({}, None, "class_counts must not be empty"),
        ({0: 0}, None, "must not be all 0"),
        (Counter(TAIL_FIRST).most_common(), None, r"class_counts\[0\] = .* is not an integer"),
        (Counter(TAIL_FIRST).values(), None, "got a dict_values"),
    ],
)
def test_invalid_counts_by_label_are_refused(counts, num_classes, message):
    with pytest.raises(UsageError, match=message):
        check_class_counts(counts, num_classes)
