"""Accuracy under shifted test priors: against loops and test sets that are really drawn."""

import math

import pytest
import torch

from timm_lt.metrics import shifted_accuracies, shifted_accuracy, shot_accuracy
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import long_tailed_counts


def shifted_by_hand(accuracies, counts, factor, backward):
    """LADE: n_i = n_max * factor^(-i / (C - 1)) over the classes by training images."""
    order = sorted(range(len(counts)), key=lambda c: (-counts[c], c))
    if backward:
        order.reverse()
    images = correct = 0.0
    for i, c in enumerate(order):
        if not math.isnan(accuracies[c]):
            images += factor ** (-i / max(len(counts) - 1, 1))
            correct += accuracies[c] * factor ** (-i / max(len(counts) - 1, 1))
    return correct / images


@pytest.mark.parametrize("factor", [1, 2, 50, 1e6])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_against_a_loop(direction, factor):
    # Ties in the counts, an empty class, an accuracy that is not known.
    counts = [7, 300, 7, 0, 20, 300, 7]
    accuracies = [0.1, 0.9, 0.2, 0.0, math.nan, 0.8, 0.7]
    values = torch.tensor(accuracies, dtype=torch.float64)
    found = shifted_accuracy(values, counts, direction, factor)
    expected = shifted_by_hand(accuracies, counts, factor, direction == "backward")
    assert found == pytest.approx(expected, rel=1e-12)


def test_against_a_test_set_that_is_drawn():
    # The test set of imbalance factor 10, to whole images, of 1000 per class.
    sizes = torch.tensor(long_tailed_counts(5, 1000, 10))
    accuracies = torch.tensor([0.95, 0.8, 0.55, 0.4, 0.25], dtype=torch.float64)
    for direction, of_class in (("forward", sizes), ("backward", sizes.flip(0))):
        targets = torch.arange(5).repeat_interleave(of_class)
        preds = targets.clone()
        for c in range(5):
            rows = (targets == c).nonzero().flatten()
            preds[rows[round(float(accuracies[c]) * len(rows)) :]] = (c + 1) % 5
        drawn = shot_accuracy(preds, targets, [900, 90, 50, 20, 5])
        expected = shifted_accuracy(accuracies, [900, 90, 50, 20, 5], direction, 10)
        assert drawn.all == pytest.approx(expected, abs=1e-3)


def test_uniform_is_the_mean_over_classes_and_so_is_factor_1():
    report = shot_accuracy([0, 0, 1, 1, 0], [0, 0, 1, 0, 1], [50, 60, 70])
    for direction in ("uniform", "forward", "backward"):
        found = shifted_accuracy(report, [50, 60, 70], direction)
        assert found == pytest.approx(report.class_mean)


def test_equal_counts_are_in_the_order_of_the_classes():
    accuracies = torch.tensor([1.0, 0.0])
    assert shifted_accuracy(accuracies, [9, 9], "forward", 3) == pytest.approx(3 / 4)
    assert shifted_accuracy(accuracies, [9, 9], "backward", 3) == pytest.approx(1 / 4)


def test_the_table_falls_from_head_to_tail():
    counts = long_tailed_counts(100, 500, 100)
    table = shifted_accuracies(torch.linspace(0.9, 0.1, 100), counts)
    assert len(table) == 11
    assert list(table.values()) == sorted(table.values(), reverse=True)
    assert table["uniform"] == pytest.approx(0.5)
    assert table["backward_25"] == pytest.approx(
        shifted_by_hand(torch.linspace(0.9, 0.1, 100).tolist(), counts, 25, True), rel=1e-6
    )


def test_one_class():
    assert shifted_accuracy(torch.tensor([0.5]), [5], "backward", 100) == 0.5


@pytest.mark.parametrize(
    ("accuracies", "arguments", "message"),
    [
        ([0.5, 0.5], ("sideways", 2), r"unknown direction 'sideways'.*forward, uniform, backward"),
        ([0.5, 0.5], ("forward", 0.1), r"imbalance_factor must be a number in \[1, inf\), got 0.1"),
        ([0.5, 0.5], ("uniform", 2), "needs imbalance_factor 1, got 2"),
        ([0.5], ("forward", 2), "class_counts has 2 classes, expected 1"),
        ([0.5, 50.0], ("forward", 2), r"must be in \[0, 1\].*class 1 has 50.0"),
        ([math.nan] * 2, ("forward", 2), "all are NaN"),
    ],
)
def test_bad_input_is_refused(accuracies, arguments, message):
    with pytest.raises(UsageError, match=message):
        shifted_accuracy(torch.tensor(accuracies), [50, 5], *arguments)
