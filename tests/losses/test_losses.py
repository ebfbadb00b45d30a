import inspect

import losses_by_hand
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_by_hand import BY_HAND, COUNTS
from torch.nn import functional as F

import timm_lt
from timm_lt import losses
from timm_lt.losses import ClassLoss, list_losses, register_loss
from timm_lt.utils.checks import UsageError

# Their values are those of a batch: tests/test_metric_losses.py has them by hand.
OF_FEATURES = [name for name in list_losses() if losses.LOSSES[name].needs_features]


def create_loss(name, class_counts=None, **options):
    """Creates a loss that takes logits and targets; one that needs features is given random ones.

    They depend on how many there are only. One that has a schedule is in its first epoch.
    """
    loss = timm_lt.create_loss(name, class_counts, **options)
    loss.set_epoch(0, 10)
    if loss.needs_features:

        def with_features(_, inputs):
            features = torch.randn(len(inputs[0]), 3, generator=torch.Generator().manual_seed(0))
            return *inputs, features.to(inputs[0].device)

        loss.register_forward_pre_hook(with_features)
    return loss


def batch(seed=0, n=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, len(COUNTS), generator=generator, dtype=dtype)
    return logits, torch.randint(len(COUNTS), (n,), generator=generator)


variants = pytest.mark.parametrize(("name", "options", "by_hand"), BY_HAND)


@variants
def test_values(name, options, by_hand):
    logits, targets = batch()
    expected = [
        by_hand(z, y, **options) for z, y in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    results = {
        reduction: create_loss(name, COUNTS, reduction=reduction, **options)(logits, targets)
        for reduction in ("none", "sum", "mean")
    }
    assert results["none"].tolist() == pytest.approx(expected, rel=1e-5)
    assert results["sum"].item() == pytest.approx(sum(expected), rel=1e-5)
    assert results["mean"].item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert torch.equal(create_loss(name, COUNTS, **options)(logits, targets), results["mean"])


def test_every_loss_has_a_value_by_hand():
    # Of pairs of rows: test_bilateral_loss.py.
    assert {name for name, *_ in BY_HAND} == set(list_losses()) - {"bilateral", *OF_FEATURES}


@variants
def test_gradients(name, options, by_hand):
    logits, targets = batch(seed=1, n=3)
    logits.requires_grad_()
    create_loss(name, COUNTS, reduction="sum", **options)(logits, targets).backward()
    step = 1e-6
    for i, z in enumerate(logits.tolist()):
        fixed = {"at": z} if "at" in inspect.signature(by_hand).parameters else {}
        for j in range(len(z)):
            high, low = [*z], [*z]
            high[j] += step
            low[j] -= step
            y = int(targets[i])
            rise = by_hand(high, y, **options, **fixed) - by_hand(low, y, **options, **fixed)
            assert logits.grad[i, j].item() == pytest.approx(rise / (2 * step), abs=2e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(1, 10**6), min_size=1, max_size=8),
    tau=st.floats(0, 3),
    data=st.data(),
)
def test_identities(counts, tau, data):
    row = st.lists(st.floats(-20, 20), min_size=len(counts), max_size=len(counts))
    logits = torch.tensor([data.draw(row)], dtype=torch.float64)
    targets = torch.tensor([data.draw(st.integers(0, len(counts) - 1))])

    def loss(name, class_counts=counts, **options):
        return create_loss(name, class_counts, **options)(logits, targets).item()

    assert loss("logit_adjustment", tau=1.0) == loss("balanced_softmax")
    assert loss("logit_adjustment", tau=0.0) == loss("cross_entropy")
    # Only the ratios of the counts matter, and equal counts do not matter at all.
    close = {"rel": 1e-5, "abs": 1e-5}
    doubled = [2 * n for n in counts]
    assert loss("logit_adjustment", doubled, tau=tau) == pytest.approx(
        loss("logit_adjustment", tau=tau), **close
    )
    equal = [3] * len(counts)
    assert loss("logit_adjustment", equal, tau=tau) == pytest.approx(loss("cross_entropy"), **close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@variants
def test_half_precision_logits_lose_nothing(name, options, by_hand, dtype):
    # Confident and right: the loss, about 4 e^-8, is lost if it is taken in half precision.
    logits = torch.tensor([[8.0, 0, 0, 0, 0], [0, 0, 0, 8, 0]], dtype=dtype)
    if "ldam" in {name, options.get("loss")} and options.get("logits") != "scaled":
        logits /= 32
    targets = torch.tensor([0, 3])
    loss = create_loss(name, COUNTS, reduction="none", **options)
    exact = loss(logits.double(), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(logits, targets)
    assert found.dtype == torch.float32
    # There the first is 1e-5, a difference of numbers of size 7 in float32.
    tiny = 5e-7 if options.get("tau") == 2.5 else 0
    assert torch.allclose(found.double(), exact, rtol=1e-3, atol=tiny)


@variants
def test_extreme_logits_stay_finite(name, options, by_hand):
    logits = torch.tensor([[6e4, -6e4, 0, 0, 0]] * 2, dtype=torch.float16, requires_grad=True)
    loss = create_loss(name, COUNTS, reduction="none", **options)
    # Wrong and right.
    targets = torch.tensor([1, 0])
    values = loss(logits, targets)
    values.sum().backward()
    assert values[0].item() > 1e4
    torch.testing.assert_close(values.double(), loss(logits.double(), targets), rtol=1e-5, atol=0)
    assert torch.isfinite(logits.grad).all()


@variants
def test_a_batch_may_be_one_image_and_lack_classes(name, options, by_hand):
    logits, _ = batch(seed=2)
    targets = torch.full((len(logits),), 3)
    loss = create_loss(name, COUNTS, reduction="none", **options)
    together = loss(logits, targets)
    alone = [create_loss(name, COUNTS, **options)(z[None], targets[:1]) for z in logits]
    # Of one image, the mean by weights would be without weight; no variant here has it.
    torch.testing.assert_close(together, torch.stack(alone))


@variants
def test_ten_thousand_classes(name, options, by_hand, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    counts = torch.arange(10_000, 0, -1)
    logits = torch.randn(3, 10_000, generator=generator, requires_grad=True)
    targets = torch.tensor([0, 5000, 9999])
    loss = create_loss(name, counts, reduction="none", **options)
    values = loss(logits, targets)
    monkeypatch.setattr(losses_by_hand, "COUNTS", counts.tolist())
    rows = zip(logits.tolist(), targets.tolist(), strict=True)
    assert values.tolist() == pytest.approx([by_hand(z, y, **options) for z, y in rows], rel=1e-4)
    values.sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", list_losses())
def test_state_dict_is_empty_and_buffers_move(name):
    loss = create_loss(name, COUNTS)
    assert loss.state_dict() == {}
    assert not list(loss.parameters())
    meta = loss.to("meta")
    if name == "lifted_structure":
        # Its library looks for the pairs that there are, for which the meta device has no values.
        return
    assert meta(torch.zeros(2, 5, device="meta"), torch.zeros(2, device="meta").long()).is_meta


@pytest.mark.parametrize(
    ("name", "class_counts", "options", "message"),
    [
        ("CE", None, {}, "unknown loss 'CE'.*cross_entropy, .*balanced_softmax, logit_adjustment"),
        ("balanced_softmax", None, {}, "BalancedSoftmaxLoss needs class_counts"),
        ("logit_adjustment", None, {}, "LogitAdjustmentLoss needs class_counts"),
        ("balanced_softmax", [3, 0], {}, "1 of 2 classes have no training image: 1"),
        ("balanced_softmax", [3, 1.5], {}, r"class_counts\[1\] = 1.5 is not an integer"),
        ("balanced_softmax", COUNTS, {"tau": 1}, "has no option 'tau'; valid options: reduction"),
        ("logit_adjustment", COUNTS, {"tau": -1}, r"tau must be a number in \[0, inf\), got -1"),
        ("cross_entropy", None, {"smoothing": 1}, r"smoothing must be a number in \[0, 1\)"),
        ("cross_entropy", None, {"reduction": "avg"}, "'avg'.*mean, sum, none"),
    ],
)
def test_bad_options_are_refused(name, class_counts, options, message):
    with pytest.raises(UsageError, match=message):
        create_loss(name, class_counts, **options)


@variants
def test_a_soft_target_is_a_mean_of_losses(name, options, by_hand):
    """A loss that is linear in a distribution over the labels, as mixup needs it."""
    loss = create_loss(name, COUNTS, reduction="none", **options)
    if not loss.takes_soft_targets:
        pytest.skip("takes labels only")
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    first, second = torch.arange(6) % 5, torch.arange(6) * 3 % 5
    soft = 0.3 * F.one_hot(first, 5) + 0.7 * F.one_hot(second, 5)
    expected = 0.3 * loss(logits, first) + 0.7 * loss(logits, second)
    torch.testing.assert_close(loss(logits, soft), expected)
    torch.testing.assert_close(loss(logits, F.one_hot(first, 5).double()), loss(logits, first))


@pytest.mark.parametrize("name", list_losses())
@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(4, 5), torch.zeros(3).long(), r"logits \(4, 5\) and targets \(3,\)"),
        (torch.zeros(4, 5), torch.zeros(4, 5).long(), r"\(4, 5\) and targets \(4, 5\)"),
        (torch.zeros(4, 6), torch.zeros(4).long(), r"class_counts has 5 classes, .*\(4, 6\)"),
        (torch.zeros(4, 5), torch.zeros(4), "targets must be integers, got torch.float32"),
        (torch.zeros(4, 5), torch.tensor([0, 5, 1, 2]), "must be from 0 to 4, got 0 to 5, logits"),
        (
            torch.zeros(4, 5),
            torch.tensor([0, -1, 1, 2]),
            "must be from 0 to 4, got -1 to 2",
        ),
    ],
)
def test_bad_batches_are_refused(name, logits, targets, message):
    with pytest.raises(UsageError, match=message):
        create_loss(name, COUNTS)(logits, targets)


def test_a_new_loss_is_a_new_per_example(monkeypatch):
    # Into a copy of the registry: no other test should meet this loss.
    monkeypatch.setattr(losses.LOSSES, "_parts", dict(losses.LOSSES._parts))

    @register_loss("zero_one")
    class ZeroOneLoss(ClassLoss):
        def per_example(self, logits, targets):
            return (logits.argmax(1) != targets).float()

    assert "zero_one" in list_losses()
    loss = create_loss("zero_one", reduction="sum")
    assert loss(torch.eye(3), torch.tensor([0, 0, 1])).item() == 2
