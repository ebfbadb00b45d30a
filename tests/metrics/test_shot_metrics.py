"""Accuracy by shot group and calibration: against loops, scikit-learn and torchmetrics."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gmean, hmean
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from timm_lt.metrics import (
    OBJECTIVES,
    ShotMetrics,
    ShotReport,
    calibration_error,
    evaluate_logits,
    objective_value,
    reliability,
    shot_accuracy,
)
from timm_lt.utils.checks import UsageError

GROUPS = ("many_shot", "medium_shot", "few_shot")
# The last class has no test image.
COUNTS = [500, 200, 100, 60, 15, 3, 1]


def group_of(count, rule):
    """The two rules as their papers' evaluation states them."""
    if rule == "fb":
        return "many_shot" if count > 100 else "few_shot" if count < 20 else "medium_shot"
    return "many_shot" if count >= 100 else "few_shot" if count <= 20 else "medium_shot"


def shot_accuracy_by_hand(preds, targets, counts, rule):
    """Kang et al.: the mean over a group of the accuracies of the classes that are present."""
    accuracies = {name: [] for name in GROUPS}
    for c, count in enumerate(counts):
        hits = [p == t for p, t in zip(preds, targets, strict=True) if t == c]
        if hits:
            accuracies[group_of(count, rule)].append(sum(hits) / len(hits))
    return {name: sum(a) / len(a) if a else None for name, a in accuracies.items()}


def random_logits(n=400, num_classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, num_classes, generator=generator)
    return logits, torch.randint(num_classes - 1, (n,), generator=generator)


# Accuracy -----------------------------------------------------------------------------------------


@st.composite
def predictions(draw):
    num_classes = draw(st.integers(1, 8))
    label = st.integers(0, num_classes - 1)
    n = draw(st.integers(1, 40))
    counts = st.sampled_from([0, 1, 19, 20, 21, 50, 99, 100, 101, 900])
    class_counts = draw(st.lists(counts, min_size=num_classes, max_size=num_classes).filter(any))
    pairs = draw(st.lists(st.tuples(label, label), min_size=n, max_size=n))
    preds, targets = (list(column) for column in zip(*pairs, strict=True))
    return preds, targets, class_counts


@settings(max_examples=100, deadline=None, derandomize=True)
@given(predictions(), st.sampled_from(["fb", "oltr"]))
def test_against_loops_and_scikit_learn(case, rule):
    preds, targets, class_counts = case
    report = shot_accuracy(preds, torch.tensor(targets), class_counts, rule)
    by_hand = shot_accuracy_by_hand(preds, targets, class_counts, rule)
    for name in GROUPS:
        assert getattr(report, name) == pytest.approx(by_hand[name])
    assert report.all == pytest.approx(accuracy_score(targets, preds))
    assert report.macro_f1 == pytest.approx(f1_score(targets, preds, average="macro"))
    precision = precision_score(targets, preds, average="macro", zero_division=0)
    assert report.macro_precision == pytest.approx(precision)
    present = sorted(set(targets))
    recall = recall_score(targets, preds, labels=present, average=None)
    assert report.class_mean == pytest.approx(recall.mean())
    assert report.worst_class == min(recall)
    assert report.harmonic_mean == pytest.approx(hmean(recall) if all(recall) else 0)
    assert report.geometric_mean == pytest.approx(gmean(recall) if all(recall) else 0)
    figures = [by_hand[name] for name in GROUPS if by_hand[name] is not None]
    assert report.group_harmonic_mean == pytest.approx(hmean(figures) if all(figures) else 0)
    assert report.test_images.tolist() == [targets.count(c) for c in range(len(class_counts))]
    assert report.predicted.tolist() == [preds.count(c) for c in range(len(class_counts))]
    expected = [math.nan] * len(class_counts)
    for c, value in zip(present, recall, strict=True):
        expected[c] = value
    assert report.per_class.dtype == torch.float64
    assert report.per_class.tolist() == pytest.approx(expected, nan_ok=True)
    assert (report.ece, report.ece_per_group, report.reliability, report.top5) == (None,) * 4
    assert report.rule == rule
    # JSON and back, and the integer counts behind the accuracies.
    again = ShotReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    assert again.to_dict() == report.to_dict()
    right, images = again.right_and_images()
    hits = [
        sum(p == t == c for p, t in zip(preds, targets, strict=True)) for c in range(len(right))
    ]
    assert (right.tolist(), images.dtype) == (hits, torch.int64)


def test_report_by_hand():
    # Class 3 has no test image, class 4 (few-shot) neither, so the few-shot group is empty.
    report = shot_accuracy(
        preds=[0, 0, 0, 1, 1, 2, 0, 3],
        targets=[0, 0, 0, 0, 1, 1, 2, 2],
        class_counts=[1000, 100, 20, 50, 3],
    )
    assert report.all == 4 / 8
    assert report.many_shot == 3 / 4
    assert report.medium_shot == (1 / 2 + 0) / 2
    assert report.few_shot is None
    assert report.class_mean == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    # F1: 2*3/(4+4), 2*1/(2+2), 0, and 0 for class 3, predicted though absent; class 4 has none.
    assert report.macro_f1 == pytest.approx((3 / 4 + 1 / 2 + 0 + 0) / 4)
    assert report.to_dict()["per_class"] == [0.75, 0.5, 0.0, None, None]
    assert str(report) == (
        "all 50.0 %, many_shot (> 100) 75.0 %, medium_shot (20 to 100) 25.0 %, "
        "few_shot (< 20) none, class mean 41.7 %, macro F1 31.2 %, ECE none"
    )
    long = {"per_class", "rule", "reliability", "test_images", "predicted"}
    assert set(report.summary()) == set(report.to_dict()) - long


def test_the_cost_does_not_grow_with_images_times_classes():
    # As many images and classes as iNaturalist 2018; quadratic code would take minutes.
    generator = torch.Generator().manual_seed(0)
    preds, targets = torch.randint(8142, (2, 437_513), generator=generator)
    report = shot_accuracy(preds, targets, [50] * 8142)
    assert report.all == pytest.approx((preds == targets).double().mean().item())


def test_a_report_of_an_older_version_is_readable():
    fields = shot_accuracy([0, 1], [0, 0], [200, 5]).to_dict()
    old = ("all", "class_mean", *GROUPS, "macro_f1", "per_class", "rule", "ece")
    report = ShotReport.from_dict({name: fields[name] for name in old})
    assert (report.all, report.worst_class, report.to_dict()["test_images"]) == (0.5, None, None)
    with pytest.raises(UsageError, match=r"no test_images.*evaluate again"):
        report.right_and_images()
    with pytest.raises(UsageError, match=r"'worst_class'.*older version wrote it.*all"):
        objective_value(report, "worst_class")


def test_objectives():
    # Per class 1, 1/2, 1/2 and 1/4: many 1, medium 1/2, few 3/8.
    targets = torch.arange(4).repeat_interleave(4)
    preds = torch.tensor([0, 0, 0, 0, 1, 1, 0, 0, 2, 2, 0, 0, 3, 0, 0, 0])
    report = shot_accuracy(preds, targets, [500, 50, 5, 3])
    found = [objective_value(report, objective) for objective in OBJECTIVES]
    assert OBJECTIVES == ("all", "class_mean", "few_shot", "harmonic_mean", "worst_class")
    assert found == pytest.approx([9 / 16, 9 / 16, 3 / 8, 3 / (1 + 2 + 8 / 3), 1 / 4])
    report = shot_accuracy([0], [0], [500, 5])
    for objective, message in (
        ("few_shot", "few_shot.*choose one of: all, class_mean, harmonic_mean, worst_class"),
        ("few", r"unknown objective 'few'.*choose one of: all"),
    ):
        with pytest.raises(UsageError, match=message):
            objective_value(report, objective)


# Calibration and top 5 ----------------------------------------------------------------------------


def reliability_by_hand(confidences, right, bins=15):
    """Images, confidence and accuracy of the bins (b/M, (b+1)/M], with 0 in the first."""
    found, pairs = [], list(zip(confidences, right, strict=True))
    for b in range(bins):
        low, high = b / bins if b else -1, (b + 1) / bins
        inside = [(c, r) for c, r in pairs if low < c <= high]
        means = [sum(column) / len(inside) for column in zip(*inside, strict=True)]
        found.append([len(inside), *(means or [None, None])])
    return found


def ece_by_hand(confidences, right, bins=15):
    """Guo et al., equation 3."""
    parts = [part for part in reliability_by_hand(confidences, right, bins) if part[0]]
    return sum(n * abs(accuracy - c) for n, c, accuracy in parts) / len(right)


@pytest.mark.parametrize("rule", ["fb", "oltr"])
def test_logits_against_loops(rule):
    logits, targets = random_logits()
    report = evaluate_logits(logits, targets, COUNTS, rule)
    plain = shot_accuracy(logits.argmax(1), targets, COUNTS, rule)
    for name in ("all", "class_mean", "macro_f1", *GROUPS):
        assert getattr(report, name) == getattr(plain, name)
    exps = [[math.exp(z - max(row)) for z in row] for row in logits.tolist()]
    confidences = [max(row) / sum(row) for row in exps]
    outcomes = ShotMetrics(COUNTS).update_logits(logits, targets)
    assert torch.equal(outcomes.preds, logits.argmax(1))
    assert outcomes.confidences.tolist() == pytest.approx(confidences)
    right = (logits.argmax(1) == targets).tolist()
    assert report.ece == pytest.approx(ece_by_hand(confidences, right), abs=1e-6)
    for name in GROUPS:
        rows = [i for i, t in enumerate(targets) if group_of(COUNTS[t], rule) == name]
        expected = ece_by_hand([confidences[i] for i in rows], [right[i] for i in rows])
        assert report.ece_per_group[name] == pytest.approx(expected, abs=1e-6)
    expected = reliability_by_hand(confidences, right)
    for part, values in zip(report.reliability, expected, strict=True):
        assert list(part) == ["images", "confidence", "accuracy"]
        assert list(part.values()) == pytest.approx(values, abs=1e-6)
    as_json = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert as_json["ece_per_group"] == report.ece_per_group
    assert ShotReport.from_dict(as_json).reliability == report.reliability


@pytest.mark.parametrize(("seed", "bins"), [*((s, 15) for s in range(10)), (10, 10), (11, 1)])
def test_reliability_and_calibration_error_against_a_loop(seed, bins):
    # Few images, so that neighbouring bins have errors of either sign and cannot be confounded.
    generator = torch.Generator().manual_seed(seed)
    confidences = torch.rand(20, generator=generator, dtype=torch.float64)
    # The ends of bins; 0.6 is the upper end of the ninth of 15.
    confidences[:3] = torch.tensor([0.0, 1.0, 0.6], dtype=torch.float64)
    right = torch.rand(20, generator=generator) < 0.5
    found = reliability(confidences, right, bins)
    expected = reliability_by_hand(confidences.tolist(), right.tolist(), bins)
    for part, values in zip(found, expected, strict=True):
        assert list(part.values()) == pytest.approx(values)
    error = ece_by_hand(confidences.tolist(), right.tolist(), bins)
    assert calibration_error(confidences, right, bins) == pytest.approx(error)


def test_the_extremes_of_calibration():
    # Confidence 1 in float32: the last bin.
    sure = evaluate_logits(torch.tensor([[90.0, 0.0], [0.0, 90.0]]), [0, 0], [500, 5])
    assert sure.reliability[-1] == {"images": 2, "confidence": 1.0, "accuracy": 0.5}
    assert sure.ece == sure.ece_per_group["many_shot"] == 0.5
    assert sure.ece_per_group["few_shot"] is sure.few_shot is None
    # In float32 the sum of 200,000 confidences of 0.1 is wrong in the fourth digit.
    report = evaluate_logits(torch.zeros(200_000, 10), torch.arange(200_000) % 10, [9] * 10)
    assert report.reliability[1]["confidence"] == pytest.approx(0.1, abs=1e-8)


@pytest.mark.parametrize(
    ("confidences", "right", "bins", "message"),
    [
        ([], [], 15, r"must be \(N,\) with N >= 1, got \(0,\)"),
        ([0.5, 0.5], [1], 15, r"got \(2,\) and \(1,\)"),
        ([0.5], [1], 0, "bins must be an integer >= 1, got 0"),
        ([0.5, 2.0], [1, 1], 15, r"in \[0, 1\] and right 0 or 1; row 1 has 2\.0 and 1"),
        ([0.5, 0.5, math.nan], [1, 1, 1], 15, "row 2 has nan"),
        ([0.5, 0.5], [1, 2], 15, r"row 1 has 0\.5 and 2"),
    ],
)
def test_invalid_confidences_are_refused(confidences, right, bins, message):
    with pytest.raises(UsageError, match=message):
        calibration_error(torch.tensor(confidences), torch.tensor(right), bins)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision(dtype):
    logits, targets = random_logits()
    logits = logits.to(dtype)
    report, exact = (evaluate_logits(z, targets, COUNTS) for z in (logits, logits.double()))
    assert report.all == exact.all
    assert report.ece == pytest.approx(exact.ece, abs=1e-5)


@pytest.mark.parametrize(("num_classes", "values"), [(12, 100), (12, 4), (6, 3), (3, 2), (1, 2)])
def test_top5_against_sorting(num_classes, values):
    # Few values: most rows have ties, also around the fifth. Equal logits rank by class.
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randint(values, (200, num_classes), generator=generator).float()
    targets = torch.randint(num_classes, (200,), generator=generator)
    expected = [
        target in sorted(range(num_classes), key=lambda c, row=row: (-row[c], c))[:5]
        for row, target in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    report = evaluate_logits(logits, targets, [9] * num_classes)
    assert report.top5 == np.mean(expected)


# Batches and processes ----------------------------------------------------------------------------


def streamed(outputs, targets, size, **options):
    metrics = ShotMetrics(COUNTS, **options)
    for part in zip(outputs.split(size), targets.split(size), strict=True):
        metrics.update(*part)
    return metrics


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("kind", ["logits", "preds"])
def test_batches_order_and_parts_do_not_matter(size, kind, monkeypatch):
    logits, targets = random_logits()
    outputs = logits if kind == "logits" else logits.argmax(1)
    function = evaluate_logits if kind == "logits" else shot_accuracy
    whole = function(outputs, targets, COUNTS, "oltr").to_dict()
    # Floats that are equal to the last bit.
    assert streamed(outputs, targets, size, rule="oltr").compute().to_dict() == whole
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(1))
    shuffled = streamed(outputs[order][:123], targets[order][:123], size, rule="oltr")
    shuffled.merge(streamed(outputs[order][123:], targets[order][123:], 50, rule="oltr"))
    assert shuffled.compute().to_dict() == whole
    assert (whole["ece"] is None) == (kind == "preds")
    # Logits of many classes are judged in blocks.
    monkeypatch.setattr("timm_lt.metrics.streaming.BLOCK", 30)
    assert function(outputs, targets, COUNTS, "oltr").to_dict() == whole


def test_the_largest_number_of_images_with_logits_is_summed_exactly():
    metrics = ShotMetrics([5, 5])
    metrics.update(torch.tensor([[200.0, -200.0]]), [0])
    metrics._counts *= 2**31 - 1
    metrics._bins *= 2**31 - 1
    last = {"images": 2**31 - 1, "confidence": 1.0, "accuracy": 1.0}
    assert metrics.compute().reliability[-1] == last
    # One more confidence, in units of 2^-32, would make 2^63.
    metrics.update(torch.tensor([[200.0, -200.0]]), [0])
    with pytest.raises(UsageError, match=r"2147483648 images have logits.*at most 2147483647"):
        metrics.compute()


@pytest.fixture
def accelerator():
    """An accelerator of a single process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_counting_goes_on_after_computing_and_reducing(accelerator):
    logits, targets = random_logits()
    expected = evaluate_logits(logits, targets, COUNTS).to_dict()
    metrics = streamed(logits[:300], targets[:300], 50)
    early = metrics.compute().to_dict()
    # The reduced metrics are a copy.
    whole = metrics.reduce(accelerator)
    for part in (whole, metrics):
        assert part.compute().to_dict() == early
        part.update(logits[300:], targets[300:])
        assert part.compute().to_dict() == expected


def test_a_batch_may_be_empty():
    metrics = ShotMetrics([5, 5])
    metrics.update(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    metrics.update([], [])
    with pytest.raises(UsageError, match="no images have been counted"):
        metrics.compute()
    metrics.update([1], [1])
    assert metrics.compute().all == 1


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        ([0, 7], [0, 1], r"preds\[1\] = 7 is not below num_classes=7"),
        ([0, 1], [0], r"preds \(2,\) and targets \(1,\)"),
        ([], [0], "preds must not be empty"),
        (torch.zeros(2, 6), [0, 1], r"\(2, 7\).*got \(2, 6\)"),
        (torch.full((1, 7), torch.nan), [0], "row 0 is not"),
        (torch.tensor([[0.0] * 7, [0.0] * 6 + [-torch.inf]]), [0, 1], "row 1 is not"),
        (torch.zeros(2, 7), torch.tensor([0, 2**62]), r"targets\[1\] = 4611686018427387904"),
    ],
)
def test_a_mistake_leaves_the_counts_unchanged(outputs, targets, message):
    logits, right = random_logits(20)
    metrics = streamed(logits, right, 20)
    before = metrics.compute().to_dict()
    with pytest.raises(UsageError, match=message):
        metrics.update(outputs, targets)
    assert metrics.compute().to_dict() == before


def test_logits_and_predictions_or_other_groups_do_not_mix():
    logits, targets = random_logits(20)
    metrics, others = streamed(logits, targets, 20), streamed(logits.argmax(1), targets, 20)
    metrics.merge(others)
    with pytest.raises(UsageError, match="20 of 40 images have logits"):
        metrics.compute()
    for other in (ShotMetrics(COUNTS, "oltr"), ShotMetrics([*COUNTS[:6], 500]), ShotMetrics([500])):
        with pytest.raises(UsageError, match="same shot groups"):
            metrics.merge(other)
