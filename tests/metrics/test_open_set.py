"""Open-set metrics: both F measures by hand, by a naive loop, in pieces, and the best threshold."""

import json
import math

import pytest
import torch
from accelerate import Accelerator

from timm_lt.metrics import OpenSetMetrics, choose_threshold, open_set_report
from timm_lt.utils.checks import UsageError

C = 4


def images(n=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, C, generator=generator, dtype=torch.float64)
    targets = torch.randint(-1, C, (n,), generator=generator)
    # Better than chance, and not by much.
    known = targets >= 0
    logits[known, targets[known]] += 1.5
    return logits, targets


def naive(logits, targets, threshold, rule):
    """Counts image by image: (F, share right, known right, open rejected)."""
    tp = fp = fn = right = known = open_ones = open_right = 0
    for z, y in zip(logits.tolist(), targets.tolist(), strict=True):
        p = [math.exp(v - max(z)) for v in z]
        confidence = 1 / sum(p)
        answer = -1 if confidence < threshold else z.index(max(z))
        right += answer == y
        known += y != -1
        open_ones += y == -1
        open_right += y == answer == -1
        tp += y != -1 and answer == y
        wrong = y != -1 and answer != y
        fp += wrong and (rule == "oltr" or answer != -1)
        fn += y == -1 and answer != -1
    f = 0.0
    if tp:
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        f = 2 * precision * recall / (precision + recall)
    return f, right / len(targets), tp / known, open_right / open_ones


@pytest.mark.parametrize(("rule", "precision", "f"), [("fb", 2 / 3, 2 / 3), ("oltr", 1 / 2, 4 / 7)])
def test_by_hand(rule, precision, f):
    # Of two classes: two right, one wrong, one rejected though right, one rejected open image, and
    # one open image that is accepted. P = 2/3 or, with the rejected one, 2/4; R = 2/3.
    logits = torch.tensor([[4.0, 0], [0, 4], [4, 0], [0.1, 0], [0, 0.2], [0, 4]])
    report = open_set_report(logits, [0, 1, 1, 0, -1, -1], threshold=0.9, rule=rule)
    found = (report.precision, report.recall, report.f_measure)
    assert found == pytest.approx((precision, 2 / 3, f))
    assert (report.all, report.known, report.open) == (0.5, 0.5, 0.5)
    assert (report.rejected_known, report.images) == (0.25, (4, 2))
    assert json.loads(json.dumps(report.to_dict()))["rule"] == rule


@pytest.mark.parametrize("rule", ["fb", "oltr"])
def test_is_the_naive_loop(rule):
    logits, targets = images()
    for threshold in (0.0, 0.4, 0.9):
        report = open_set_report(logits, targets, threshold=threshold, rule=rule)
        found = (report.f_measure, report.all, report.known, report.open)
        assert found == pytest.approx(naive(logits, targets, threshold, rule), rel=1e-12)


def test_any_pieces_and_half_precision_are_the_same():
    logits, targets = images()
    logits = logits.half()
    whole = OpenSetMetrics(C, threshold=0.5)
    whole.update(logits, targets)
    parts = [OpenSetMetrics(C, threshold=0.5) for _ in range(2)]
    for start in range(0, 200, 7):
        parts[start % 2].update(logits[start : start + 7].float(), targets[start : start + 7])
    parts[0].update(logits[:0], targets[:0])
    parts[0].merge(parts[1])
    assert parts[0].compute() == whole.compute()
    assert whole.reduce(Accelerator(cpu=True)).compute() == whole.compute()


@pytest.mark.parametrize("rule", ["fb", "oltr"])
def test_no_threshold_is_better_than_the_chosen_one(rule):
    logits, targets = images(60)
    threshold = choose_threshold(logits, targets, rule=rule)
    best = naive(logits, targets, threshold, rule)[0]
    confidences = logits.softmax(1).amax(1).tolist()
    # Just above each confidence as well as at it.
    every = [t for c in confidences for t in (c, c + 1e-9) if t < max(confidences)]
    swept = {t: naive(logits, targets, t, rule)[0] for t in every if t > 0}
    assert best == pytest.approx(max(swept.values()), rel=1e-12)
    assert min(confidences) < threshold
    report = open_set_report(logits, targets, threshold=threshold, rule=rule)
    assert report.f_measure == pytest.approx(best, rel=1e-12)


def test_equal_confidences_are_accepted_together():
    logits = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 0]])
    assert choose_threshold(logits, [0, 0, -1, -1]) == pytest.approx(1 / (1 + math.exp(-1)))
    assert choose_threshold(logits, [0, 0, 0, -1]) == pytest.approx(1 / (1 + math.exp(-1)))


def test_what_cannot_be_said_is_none():
    logits = torch.tensor([[1.0, 0], [1, 0]])
    only_open = open_set_report(logits, [-1, -1])
    assert (only_open.known, only_open.rejected_known, only_open.precision) == (None, None, None)
    assert (only_open.open, only_open.f_measure, only_open.recall) == (0.0, 0.0, 0.0)
    nothing = open_set_report(logits, [0, 0], threshold=1.0, rule="fb")
    assert (nothing.f_measure, nothing.precision, nothing.open) == (None, None, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: open_set_report(z, y, threshold=1.5), r"threshold must be .*\[0, 1\]"),
        (lambda z, y: open_set_report(z, y, rule="kang"), "unknown rule 'kang'.*fb, oltr"),
        (lambda z, y: open_set_report(z, y[:3]), r"\(N, C\) = \(3, 4\).*got \(5, 4\)"),
        (lambda z, y: open_set_report(z, y - 1), r"targets\[0\] = -2 is negative"),
        (lambda z, y: open_set_report(z / 0, y), "logits must be finite"),
        (lambda z, y: OpenSetMetrics(C).compute(), "no images have been counted"),
        (lambda z, y: OpenSetMetrics(C).merge(OpenSetMetrics(C, rule="fb")), "the same rule"),
        (lambda z, y: choose_threshold(z, y.clamp_min(0)), "needs open images"),
        (lambda z, y: choose_threshold(z, y.clamp_max(-1)), "known ones that are right"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UsageError, match=message):
        call(torch.ones(5, C), torch.tensor([-1, 0, 1, 2, 3]))
