"""Bootstrap intervals against resampled rows, and accuracy under shifted class distributions."""

import math

import numpy as np
import pytest
import torch

from timm_lt.metrics import (
    OBJECTIVES,
    confidence_intervals,
    objective_value,
    paired_difference,
    shifted_accuracies,
    shifted_accuracy,
    shot_accuracy,
)
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import long_tailed_counts

COUNTS = [500, 200, 60, 30, 9, 4]
SCALARS = [
    *("all", "class_mean", "many_shot", "medium_shot", "few_shot", "worst_class"),
    *("harmonic_mean", "geometric_mean", "group_harmonic_mean"),
]


def predictions(per_class=25, seed=0, accuracies=(0.9, 0.8, 0.7, 0.6, 0.5, 0.35)):
    generator = np.random.default_rng(seed)
    targets = np.repeat(np.arange(6), per_class)
    right = generator.random(len(targets)) < np.array(accuracies)[targets]
    return np.where(right, targets, (targets + 1) % 6), targets


def resampled_rows(targets, generator):
    """Rows drawn anew, with replacement, within each class."""
    return np.concatenate([generator.choice(np.flatnonzero(targets == c), 25) for c in range(6)])


def test_against_resampled_rows():
    preds, targets = predictions()
    generator = np.random.default_rng(1)
    drawn = []
    for _ in range(1500):
        rows = resampled_rows(targets, generator)
        report = shot_accuracy(preds[rows], targets[rows], COUNTS)
        drawn.append([getattr(report, name) for name in SCALARS])
    expected = np.quantile(drawn, [0.05, 0.95], axis=0).T
    report = shot_accuracy(preds, targets, COUNTS)
    found = confidence_intervals(report, COUNTS, level=0.9, samples=4000)
    assert list(found) == SCALARS
    # Accuracies of a class are multiples of 0.04, of two classes of 0.02: one step is allowed.
    for name, (low, high) in zip(SCALARS, expected, strict=True):
        step = 0.041 if name == "worst_class" else 0.021 if "shot" in name else 0.013
        assert found[name] == pytest.approx((low, high), abs=step)


def test_width_of_one_class_by_hand():
    # The standard error of 750 of 1000 is sqrt(.75 * .25 / 1000).
    report = shot_accuracy([0] * 750 + [1] * 250, [0] * 1000, [500, 5])
    low, high = confidence_intervals(report, [500, 5], samples=4000)["all"]
    error = (0.75 * 0.25 / 1000) ** 0.5
    assert (low, high) == pytest.approx((0.75 - 1.96 * error, 0.75 + 1.96 * error), abs=2e-3)


def test_empty_groups_and_certain_classes():
    report = shot_accuracy([0, 0, 1], [0, 0, 0], [500, 50, 5])
    found = confidence_intervals(report, [500, 50, 5])
    assert {"medium_shot", "few_shot"}.isdisjoint(found)
    right = shot_accuracy([0, 1], [0, 1], [500, 5])
    assert set(confidence_intervals(right, [500, 5]).values()) == {(1.0, 1.0)}


def test_draws_in_parts_are_the_same(monkeypatch):
    preds, targets = predictions()
    report = shot_accuracy(preds, targets, COUNTS)
    whole = confidence_intervals(report, COUNTS, samples=50, seed=3)
    paired = paired_difference(preds, targets, targets, COUNTS, samples=50)
    monkeypatch.setattr("timm_lt.metrics.intervals.BLOCK", 50)
    assert confidence_intervals(report, COUNTS, samples=50, seed=3) == whole
    assert confidence_intervals(report, COUNTS, samples=50, seed=4) != whole
    assert paired_difference(preds, targets, targets, COUNTS, samples=50) == paired


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_paired_against_resampled_rows(objective):
    preds_a, targets = predictions()
    # b is a, but for some rows.
    preds_b = preds_a.copy()
    preds_b[::7] = targets[::7]
    preds_b[3::11] = (targets[3::11] + 2) % 6
    generator = np.random.default_rng(1)

    def difference(rows):
        a, b = (
            objective_value(shot_accuracy(preds[rows], targets[rows], COUNTS), objective)
            for preds in (preds_a, preds_b)
        )
        return a - b

    drawn = [difference(resampled_rows(targets, generator)) for _ in range(600)]
    low, high = np.quantile(drawn, [0.05, 0.95])
    found = paired_difference(
        preds_a, preds_b, targets, COUNTS, objective=objective, level=0.9, samples=3000
    )
    assert found.difference == pytest.approx(difference(np.arange(len(targets))))
    near = 0.04 if objective == "worst_class" else 0.02
    assert (found.low, found.high) == pytest.approx((low, high), abs=near)
    assert found.low <= found.difference <= found.high


def test_pairing_narrows_the_interval():
    preds, targets = predictions()
    better = np.where(np.arange(len(preds)) % 25 < 2, targets, preds)
    found = paired_difference(better, preds, targets, COUNTS)
    alone = confidence_intervals(shot_accuracy(preds, targets, COUNTS), COUNTS)["all"]
    assert found.high - found.low < (alone[1] - alone[0]) / 2
    assert paired_difference(preds, preds, targets, COUNTS) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 1.0}, r"level must be a number in \(0, 1\), got 1.0"),
        ({"samples": 0}, "samples must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"class_counts": [5]}, "class_counts has 1 classes, expected 2"),
    ],
)
def test_invalid_arguments_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        confidence_intervals(shot_accuracy([0], [0], [5, 5]), **{"class_counts": [5, 5]} | options)
    with pytest.raises(UsageError, match="no value for the objective"):
        paired_difference([0], [0], [0], [500, 5], objective="few_shot")


# Shifted class distributions ----------------------------------------------------------------------


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


@pytest.mark.parametrize("factor", [1, 2, 1e6])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_shifted_accuracy_against_a_loop(direction, factor):
    # Ties in the counts, which are in the order of the classes; an empty class; a NaN.
    counts = [7, 300, 7, 0, 20, 300, 7]
    accuracies = [0.1, 0.9, 0.2, 0.0, math.nan, 0.8, 0.7]
    values = torch.tensor(accuracies, dtype=torch.float64)
    found = shifted_accuracy(values, counts, direction, factor)
    expected = shifted_by_hand(accuracies, counts, factor, direction == "backward")
    assert found == pytest.approx(expected, rel=1e-12)
    assert shifted_accuracy(torch.tensor([0.5]), [5], direction, factor) == 0.5


def test_the_shifts_of_the_papers_tables():
    report = shot_accuracy([0, 0, 1, 1, 0], [0, 0, 1, 0, 1], [50, 60, 70])
    assert shifted_accuracy(report, [50, 60, 70], "uniform") == pytest.approx(report.class_mean)
    counts, accuracies = long_tailed_counts(100, 500, 100), torch.linspace(0.9, 0.1, 100)
    table = shifted_accuracies(accuracies, counts)
    assert len(table) == 11
    assert list(table.values()) == sorted(table.values(), reverse=True)
    expected = shifted_by_hand(accuracies.tolist(), counts, 25, True)
    assert table["backward_25"] == pytest.approx(expected, rel=1e-6)


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
def test_invalid_shifts_are_refused(accuracies, arguments, message):
    with pytest.raises(UsageError, match=message):
        shifted_accuracy(torch.tensor(accuracies), [50, 5], *arguments)
