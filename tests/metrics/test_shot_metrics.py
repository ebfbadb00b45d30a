import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gmean, hmean
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from timm_lt.metrics import (
    OBJECTIVES,
    ShotReport,
    calibration_error,
    evaluate_logits,
    objective_value,
    reliability,
    shot_accuracy,
)
from timm_lt.utils.checks import UsageError

GROUPS = ("many_shot", "medium_shot", "few_shot")


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
    assert report.ece is None
    assert report.ece_per_group is None
    assert report.reliability is None
    assert report.top5 is None
    assert report.rule == rule


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
    as_json = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert as_json["per_class"] == [0.75, 0.5, 0.0, None, None]
    assert as_json["few_shot"] is None
    assert as_json["medium_shot"] == 0.25
    assert as_json["rule"] == "fb"
    assert str(report) == (
        "all 50.0 %, many_shot (> 100) 75.0 %, medium_shot (20 to 100) 25.0 %, "
        "few_shot (< 20) none, class mean 41.7 %, macro F1 31.2 %, ECE none"
    )


def test_rules_move_the_boundary_classes():
    arguments = ([0, 1, 0], [0, 1, 2], [100, 20, 21])
    fb, oltr = shot_accuracy(*arguments), shot_accuracy(*arguments, rule="oltr")
    assert (fb.many_shot, fb.medium_shot, fb.few_shot) == (None, pytest.approx(2 / 3), None)
    assert (oltr.many_shot, oltr.medium_shot, oltr.few_shot) == (1.0, 0.0, 1.0)
    assert "few_shot (<= 20) 100.0 %" in str(oltr)


@pytest.mark.parametrize(
    ("preds", "targets", "message"),
    [
        ([0, 1], [0], r"preds \(2,\) and targets \(1,\)"),
        ([0, 3], [0, 1], r"preds\[1\] = 3 is not below num_classes=3"),
        ([0, 1], [-1, 1], r"targets\[0\] = -1 is negative"),
        (np.array([0, np.nan]), [0, 1], r"preds\[1\] = nan is not an integer"),
        (torch.zeros(2, 3), [0, 1], "preds must be one-dimensional"),
        (torch.zeros(2, 3).long(), [0, 1], r"preds must be one-dimensional, got shape \(2, 3\)"),
        ([], [], "preds must not be empty"),
    ],
)
def test_bad_predictions_are_refused(preds, targets, message):
    with pytest.raises(UsageError, match=message):
        shot_accuracy(preds, targets, [5, 5, 5])


def softmax_confidence(row):
    exps = [math.exp(z - max(row)) for z in row]
    return max(exps) / sum(exps)


def ece_by_hand(confidences, right, bins=15):
    """Guo et al., equation 3: bins (b/M, (b+1)/M]."""
    error = 0.0
    for b in range(bins):
        inside = [i for i, c in enumerate(confidences) if b / bins < c <= (b + 1) / bins]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            confidence = sum(confidences[i] for i in inside) / len(inside)
            error += len(inside) / len(confidences) * abs(accuracy - confidence)
    return error


def random_logits(n=400, num_classes=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, num_classes, generator=generator)
    return logits, torch.randint(num_classes, (n,), generator=generator)


@pytest.mark.parametrize("rule", ["fb", "oltr"])
def test_evaluate_logits(rule):
    class_counts = [500, 100, 60, 21, 20, 4]
    logits, targets = random_logits()
    report = evaluate_logits(logits, targets, class_counts, rule)
    plain = shot_accuracy(logits.argmax(1), targets, class_counts, rule)
    for name in ("all", "class_mean", "macro_f1", *GROUPS):
        assert getattr(report, name) == getattr(plain, name)
    confidences = [softmax_confidence(row) for row in logits.tolist()]
    right = (logits.argmax(1) == targets).tolist()
    assert report.ece == pytest.approx(ece_by_hand(confidences, right), abs=1e-6)
    for name in GROUPS:
        rows = [i for i, t in enumerate(targets) if group_of(class_counts[t], rule) == name]
        expected = ece_by_hand([confidences[i] for i in rows], [right[i] for i in rows])
        assert report.ece_per_group[name] == pytest.approx(expected, abs=1e-6)
    assert json.loads(json.dumps(report.to_dict()))["ece_per_group"] == report.ece_per_group


def test_ece_against_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    logits, targets = random_logits(seed=3)
    expected = functional.multiclass_calibration_error(
        logits.softmax(1), targets, num_classes=6, n_bins=15, norm="l1"
    )
    assert evaluate_logits(logits, targets, [9] * 6).ece == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_calibration_error_of_few_images(seed):
    # Few, so that neighbouring bins have errors of either sign and cannot be confounded.
    generator = torch.Generator().manual_seed(seed)
    confidences = torch.rand(20, generator=generator, dtype=torch.float64)
    right = torch.rand(20, generator=generator) < 0.5
    expected = ece_by_hand(confidences.tolist(), right.tolist())
    assert calibration_error(confidences, right) == pytest.approx(expected)


def reliability_by_hand(confidences, right, bins):
    """The bins (b/M, (b+1)/M], with 0 in the first."""
    found = []
    for b in range(bins):
        inside = [
            (c, r)
            for c, r in zip(confidences, right, strict=True)
            if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0)
        ]
        n = len(inside)
        found.append([n, *(sum(column) / n if n else None for column in zip(*inside, strict=True))])
        found[-1] += [None] * (3 - len(found[-1]))
    return found


@pytest.mark.parametrize(("seed", "bins"), [(0, 15), (1, 15), (2, 10), (3, 1)])
def test_reliability_against_a_loop(seed, bins):
    generator = torch.Generator().manual_seed(seed)
    confidences = torch.rand(40, generator=generator, dtype=torch.float64)
    confidences[:2] = torch.tensor([0.0, 1.0])
    right = torch.rand(40, generator=generator) < 0.5
    found = reliability(confidences, right, bins)
    expected = reliability_by_hand(confidences.tolist(), right.tolist(), bins)
    assert [part["images"] for part in found] == [n for n, _, _ in expected]
    assert sum(part["images"] for part in found) == 40
    for part, (_, confidence, accuracy) in zip(found, expected, strict=True):
        assert part["confidence"] == pytest.approx(confidence)
        assert part["accuracy"] == pytest.approx(accuracy)


def test_a_report_has_the_reliability_of_its_logits():
    logits, targets = random_logits()
    report = evaluate_logits(logits, targets, [500, 100, 60, 21, 20, 4])
    confidences = [softmax_confidence(row) for row in logits.tolist()]
    right = (logits.argmax(1) == targets).tolist()
    expected = reliability_by_hand(confidences, right, 15)
    assert [list(part) for part in report.reliability] == [
        ["images", "confidence", "accuracy"]
    ] * 15
    for part, values in zip(report.reliability, expected, strict=True):
        assert list(part.values()) == pytest.approx(values, abs=1e-6)
    # The first bin of six classes is empty: confidence is at least 1/6.
    assert report.reliability[0] == {"images": 0, "confidence": None, "accuracy": None}
    as_json = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert ShotReport.from_dict(as_json).reliability == report.reliability
    assert "reliability" not in report.summary()
    del as_json["reliability"]
    assert ShotReport.from_dict(as_json).reliability is None


@pytest.mark.parametrize(
    ("confidences", "right", "bins", "message"),
    [
        ([], [], 15, r"must be \(N,\) with N >= 1, got \(0,\)"),
        ([[0.5]], [[1]], 15, r"must be \(N,\) .*got \(1, 1\)"),
        ([0.5, 0.5], [1], 15, r"got \(2,\) and \(1,\)"),
        ([0.5], [1], 0, "bins must be an integer >= 1, got 0"),
        ([0.5], [1], 1.5, r"bins must be an integer >= 1, got 1\.5"),
        ([0.5, 2.0], [1, 1], 15, r"confidences\[1\] = 2\.0"),
        ([0.5, -0.1], [1, 1], 15, r"confidences\[1\] = -0\.1"),
        ([0.5, 0.5, math.nan], [1, 1, 1], 15, r"confidences\[2\] = nan"),
        ([0.5, 0.5], [1, 2], 15, r"right\[1\] = 2"),
        ([0.5], [0.5], 15, r"right\[0\] = 0\.5"),
    ],
)
@pytest.mark.parametrize("function", [calibration_error, reliability])
def test_confidences_that_are_none_are_refused(function, confidences, right, bins, message):
    arguments = torch.tensor(confidences, dtype=torch.float64), torch.tensor(right), bins
    with pytest.raises(UsageError, match=message):
        function(*arguments)


def test_bins_contain_their_upper_end():
    # .6 = 9/15 and .58 lie in one bin, (8/15, 9/15]: |-.6 + .42| / 2.
    confidences = torch.tensor([0.6, 0.58], dtype=torch.float64)
    assert calibration_error(confidences, torch.tensor([0, 1])) == pytest.approx(0.09)


def test_saturated_confidences_share_the_last_bin():
    # Confidences 1, 1 (wrong) and .96 lie in one bin: |2 - 2.96| / 3.
    found = calibration_error(torch.tensor([1.0, 1.0, 0.96]), torch.tensor([1, 0, 1]))
    assert found == pytest.approx(0.96 / 3)
    assert calibration_error(torch.tensor([1.0, 1.0]), torch.tensor([1, 1])) == 0


def test_group_without_images_has_no_ece():
    report = evaluate_logits(torch.eye(3)[:2], [0, 1], [500, 50, 5])
    assert report.ece_per_group["few_shot"] is None
    assert report.few_shot is None
    assert report.to_dict()["ece_per_group"]["few_shot"] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_float_dtype(dtype):
    logits, targets = random_logits()
    logits = logits.to(dtype)
    report = evaluate_logits(logits, targets, [9] * 6)
    exact = evaluate_logits(logits.double(), targets, [9] * 6)
    assert report.all == exact.all
    assert report.ece == pytest.approx(exact.ece, abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    logits, targets = random_logits()
    logits[17, 2] = logits[17, 3] = logits[30, 0] = bad
    with pytest.raises(UsageError, match=r"row 17 is not \(2 of 400 rows\)"):
        evaluate_logits(logits, targets, [9] * 6)


@pytest.mark.parametrize(
    ("logits", "found"),
    [
        (np.eye(2), "a ndarray"),
        ([[1.0, 0.0], [0.0, 1.0]], "a list"),
        (torch.eye(2).bool(), r"\(2, 2\) of torch\.bool"),
        (torch.eye(2).long(), r"\(2, 2\) of torch\.int64"),
        (torch.ones(2), r"\(2,\) of torch\.float32"),
    ],
)
def test_logits_that_are_none_are_refused(logits, found):
    with pytest.raises(UsageError, match=rf"logits must be a floating-point .* got {found}"):
        evaluate_logits(logits, [0, 1], [5, 5])


def test_logits_of_a_wrong_shape_are_refused():
    logits, targets = random_logits()
    with pytest.raises(UsageError, match="class_counts has 5 classes, expected 6"):
        evaluate_logits(logits, targets.clamp(max=4), [9] * 5)
    with pytest.raises(UsageError, match=r"\(399, 6\).*got \(400, 6\)"):
        evaluate_logits(logits, targets[1:], [9] * 6)


def in_top5(row, target):
    """Sorted by logit, then by class."""
    return target in sorted(range(len(row)), key=lambda c: (-row[c], c))[:5]


@pytest.mark.parametrize(("num_classes", "values"), [(12, 100), (12, 4), (6, 3), (3, 2), (1, 2)])
def test_top5_against_sorting(num_classes, values):
    # Few values: most rows have ties, also around the fifth.
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randint(values, (200, num_classes), generator=generator).float()
    targets = torch.randint(num_classes, (200,), generator=generator)
    expected = [in_top5(*row) for row in zip(logits.tolist(), targets.tolist(), strict=True)]
    report = evaluate_logits(logits, targets, [9] * num_classes)
    assert report.top5 == np.mean(expected)
    assert report.top5 >= report.all
    assert num_classes > 5 or report.top5 == 1


def test_top5_against_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    logits, targets = random_logits(num_classes=30)
    expected = functional.multiclass_accuracy(
        logits, targets, num_classes=30, top_k=5, average="micro"
    )
    found = evaluate_logits(logits, targets, [9] * 30).top5
    assert found == pytest.approx(expected.item())
    assert 0.1 < found < 0.3


def test_counting_does_not_loop_over_classes_or_images():
    # As many images and classes as iNaturalist 2018; quadratic code would take minutes.
    generator = torch.Generator().manual_seed(0)
    preds, targets = torch.randint(8142, (2, 437_513), generator=generator)
    report = shot_accuracy(preds, targets, [50] * 8142)
    assert report.all == pytest.approx((preds == targets).double().mean().item())


def test_a_report_reads_back_from_its_dictionary():
    counts = torch.tensor([200, 50, 5, 5])
    report = shot_accuracy([0, 1, 1, 0], [0, 0, 1, 2], counts)
    again = ShotReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert str(again) == str(report)
    assert torch.equal(again.per_class.isnan(), torch.tensor([False, False, False, True]))
    assert again.per_class[:3].tolist() == [0.5, 1.0, 0.0]
    assert "per_class" not in report.summary()
    assert report.summary()["many_shot"] == 0.5


def test_a_report_of_before_the_new_fields_still_reads():
    fields = shot_accuracy([0, 1], [0, 0], [200, 5]).to_dict()
    old = ("all", "class_mean", *GROUPS, "macro_f1", "per_class", "rule", "ece")
    report = ShotReport.from_dict({name: fields[name] for name in old})
    assert report.all == 0.5
    assert report.worst_class is report.test_images is report.predicted is None
    assert report.to_dict()["test_images"] is None
    with pytest.raises(UsageError, match=r"no test_images.*evaluate again"):
        report.right_and_images()
    with pytest.raises(UsageError, match=r"'worst_class'.*older version wrote it.*all"):
        objective_value(report, "worst_class")


def test_counts_read_back_from_a_report():
    generator = torch.Generator().manual_seed(0)
    preds, targets = torch.randint(40, (2, 3000), generator=generator).square() // 40
    report = shot_accuracy(preds, targets, [9] * 40)
    right, images = report.right_and_images()
    by_class = [[(preds[targets == c] == c).sum(), (targets == c).sum()] for c in range(40)]
    assert torch.stack([right, images], 1).tolist() == [list(map(int, row)) for row in by_class]
    assert 0 in images
    again = ShotReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert torch.equal(again.test_images, report.test_images)
    assert torch.equal(again.predicted, report.predicted)
    assert again.test_images.dtype == torch.int64
    assert {"test_images", "predicted"}.isdisjoint(report.summary())
    assert {"worst_class", "top5", "macro_precision"} <= set(report.summary())


def test_objectives():
    # Per class 1, 1/2, 1/2 and 1/4: many 1, medium 1/2, few 3/8.
    targets = torch.arange(4).repeat_interleave(4)
    preds = torch.tensor([0, 0, 0, 0, 1, 1, 0, 0, 2, 2, 0, 0, 3, 0, 0, 0])
    report = shot_accuracy(preds, targets, [500, 50, 5, 3])
    found = [objective_value(report, objective) for objective in OBJECTIVES]
    assert OBJECTIVES == ("all", "class_mean", "few_shot", "harmonic_mean", "worst_class")
    assert found == pytest.approx([9 / 16, 9 / 16, 3 / 8, 3 / (1 + 2 + 8 / 3), 1 / 4])
    assert report.harmonic_mean == pytest.approx(4 / (1 + 2 + 2 + 4))
    assert report.geometric_mean == pytest.approx((1 / 16) ** 0.25)


def test_an_objective_without_images_names_the_others():
    report = shot_accuracy([0], [0], [500, 5])
    words = "few_shot.*choose one of: all, class_mean, harmonic_mean, worst_class"
    with pytest.raises(UsageError, match=words):
        objective_value(report, "few_shot")
    with pytest.raises(
        UsageError, match=r"unknown objective 'few'.*choose one of: all, class_mean"
    ):
        objective_value(report, "few")


@pytest.mark.parametrize("preds", [[0], [1]])
def test_one_image_of_one_class(preds):
    report = shot_accuracy(preds, [0], [5, 5])
    hit = float(preds == [0])
    assert (report.all, report.worst_class, report.harmonic_mean) == (hit, hit, hit)
    # Class 1 counts in the macro figures where it is predicted.
    assert (report.macro_f1, report.macro_precision) == (hit, hit)
    alone = shot_accuracy([0], [0], [7])
    assert (alone.all, alone.few_shot, alone.macro_f1) == (1.0, 1.0, 1.0)


def test_a_class_without_training_images_is_few_shot():
    report = shot_accuracy([0, 1], [0, 1], [500, 0])
    assert (report.many_shot, report.few_shot) == (1.0, 1.0)


def test_a_hundred_thousand_classes():
    targets = torch.arange(200_000) // 2
    preds = targets.clone()
    preds[1::2] = 7
    report = shot_accuracy(preds, targets, torch.arange(1, 100_001))
    # Of two images of each class one is right; of class 7 both are.
    assert report.worst_class == 0.5
    assert report.all == pytest.approx(0.5 + 0.5 / 100_000)
    assert report.predicted[7] == 100_001
