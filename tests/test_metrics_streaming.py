"""The accumulator: any batches, any order, any split into parts give the same bits."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from timm_lt.metrics import ShotMetrics, ShotReport, evaluate_logits, shot_accuracy
from timm_lt.utils.checks import UsageError

COUNTS = [500, 200, 100, 60, 15, 3, 1]


def cases(n=500, num_classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, num_classes, generator=generator)
    # The last class has no image.
    return logits, torch.randint(num_classes - 1, (n,), generator=generator)


def streamed(outputs, targets, sizes, **options):
    metrics = ShotMetrics(COUNTS, **options)
    for part in zip(outputs.split(sizes), targets.split(sizes), strict=True):
        metrics.update(*part)
    return metrics


@pytest.mark.parametrize("size", [1, 7, 64, 500])
@pytest.mark.parametrize("kind", ["logits", "preds"])
def test_batches_do_not_matter(size, kind):
    logits, targets = cases()
    outputs = logits if kind == "logits" else logits.argmax(1)
    whole = (evaluate_logits if kind == "logits" else shot_accuracy)(outputs, targets, COUNTS)
    report = streamed(outputs, targets, size).compute()
    # Floats that are equal to the last bit.
    assert report.to_dict() == whole.to_dict()
    assert (report.ece is None) == (kind == "preds")


def test_an_update_says_what_the_logits_say_of_each_image():
    logits, targets = cases()
    outcomes = ShotMetrics(COUNTS).update_logits(logits, targets)
    assert torch.equal(outcomes.preds, logits.argmax(1))
    exact = logits.double().softmax(1).amax(1)
    torch.testing.assert_close(outcomes.confidences.double(), exact, rtol=1e-6, atol=0)


def test_order_and_parts_do_not_matter():
    logits, targets = cases()
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    whole = evaluate_logits(logits, targets, COUNTS, "oltr").to_dict()
    assert streamed(logits[order], targets[order], 9, rule="oltr").compute().to_dict() == whole
    first = streamed(logits[:123], targets[:123], 11, rule="oltr")
    first.merge(streamed(logits[123:], targets[123:], 50, rule="oltr"))
    assert first.compute().to_dict() == whole


def test_many_classes_are_judged_in_blocks(monkeypatch):
    logits, targets = cases()
    whole = evaluate_logits(logits, targets, COUNTS).to_dict()
    monkeypatch.setattr("timm_lt.metrics.streaming.BLOCK", 30)
    assert evaluate_logits(logits, targets, COUNTS).to_dict() == whole


def test_the_most_images_with_logits_are_summed_exactly():
    def sure_and_right(number):
        metrics = ShotMetrics([5, 5])
        metrics.update(torch.tensor([[200.0, -200.0]]), [0])
        metrics._counts *= number
        metrics._bins *= number
        return metrics

    assert sure_and_right(2**31 - 1).compute().reliability[-1] == {
        "images": 2**31 - 1,
        "confidence": 1.0,
        "accuracy": 1.0,
    }
    # 2^31 confidences in units of 2^-32 are 2^63, one more than the largest int64.
    with pytest.raises(UsageError, match=r"2147483648 images have logits.*2147483647 or less"):
        sure_and_right(2**31).compute()


def test_the_sum_of_confidences_does_not_drift():
    # In float32 the sum of 200,000 confidences of 0.1 is wrong in the fourth digit.
    logits = torch.zeros(200_000, 10)
    report = evaluate_logits(logits, torch.arange(200_000) % 10, [9] * 10)
    assert report.reliability[1]["confidence"] == pytest.approx(0.1, abs=1e-8)
    assert report.ece == pytest.approx(0, abs=1e-8)


def test_computing_does_not_end_the_counting():
    logits, targets = cases()
    metrics = streamed(logits[:100], targets[:100], 10)
    early = metrics.compute()
    assert early.test_images.sum() == 100
    metrics.update(logits[100:], targets[100:])
    assert metrics.compute().to_dict() == evaluate_logits(logits, targets, COUNTS).to_dict()
    # A report keeps what it has.
    assert early.test_images.sum() == early.predicted.sum() == 100


@pytest.fixture
def accelerator():
    """One of a single process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_reducing_over_one_process_gives_a_copy(accelerator):
    logits, targets = cases()
    metrics = streamed(logits[:400], targets[:400], 50)
    before = metrics.compute().to_dict()
    whole = metrics.reduce(accelerator)
    assert whole.compute().to_dict() == before
    whole.update(logits[400:], targets[400:])
    assert whole.compute().to_dict() == evaluate_logits(logits, targets, COUNTS).to_dict()
    # What this process has counted is still its own.
    assert metrics.compute().to_dict() == before


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
        ([0, 1], [0, -1], r"targets\[1\] = -1 is negative"),
        ([0, 1], [0], r"preds \(2,\) and targets \(1,\)"),
        ([], [0], "preds must not be empty"),
        (torch.zeros(2, 6), [0, 1], r"\(2, 7\).*got \(2, 6\)"),
        (torch.full((1, 7), torch.nan), [0], "row 0 is not"),
        (torch.zeros(2, 7).long(), [0, 1], r"preds must be one-dimensional, got shape \(2, 7\)"),
        (torch.zeros(2), [0, 1], r"preds\[0\] = 0.0 is not an integer"),
        (torch.zeros(2, 7), torch.tensor([0, 2**62]), r"targets\[1\] = 4611686018427387904"),
    ],
)
def test_a_mistake_leaves_the_counts_as_they_were(outputs, targets, message):
    logits, right = cases(20)
    metrics = streamed(logits, right, 20)
    before = metrics.compute().to_dict()
    with pytest.raises(UsageError, match=message):
        metrics.update(outputs, targets)
    assert metrics.compute().to_dict() == before


def test_logits_and_predictions_do_not_mix():
    logits, targets = cases(20)
    metrics, others = streamed(logits, targets, 20), streamed(logits.argmax(1), targets, 20)
    with pytest.raises(UsageError, match="pass logits in all or in none"):
        metrics.update(logits.argmax(1), targets)
    with pytest.raises(UsageError, match="pass logits in all or in none"):
        others.update(logits, targets)
    metrics.merge(others)
    with pytest.raises(UsageError, match="20 of 40 images have logits"):
        metrics.compute()


def test_only_metrics_of_the_same_groups_merge():
    metrics = ShotMetrics([500, 20])
    for other in (ShotMetrics([500, 20], "oltr"), ShotMetrics([500, 5]), ShotMetrics([500])):
        with pytest.raises(UsageError, match="same shot groups"):
            metrics.merge(other)
    with pytest.raises(UsageError, match="unknown shot rule"):
        ShotMetrics([5], "kang")
    with pytest.raises(UsageError, match="class_counts must not be all 0"):
        ShotMetrics([0, 0])


def test_the_extremes_of_calibration():
    # Confidence 1 in float32, and 1/C: the first and the last bin.
    sure = evaluate_logits(torch.tensor([[90.0, 0.0], [0.0, 90.0]]), [0, 0], [500, 5])
    assert sure.reliability[-1] == {"images": 2, "confidence": 1.0, "accuracy": 0.5}
    assert sure.ece == sure.ece_per_group["many_shot"] == 0.5
    unsure = evaluate_logits(torch.zeros(1, 1000), [0], [5] * 1000)
    assert unsure.reliability[0]["confidence"] == pytest.approx(1e-3, abs=1e-9)
    assert isinstance(unsure, ShotReport)
