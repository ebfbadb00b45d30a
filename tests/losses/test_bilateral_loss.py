"""The loss of a bilateral network, against the paper's equations in plain Python."""

import math

import pytest
import torch
from losses_by_hand import COUNTS, batch, effective_number_weight, slopes
from torch.nn import functional as F

from timm_lt.losses import create_loss
from timm_lt.utils.checks import UsageError


def at(epoch, epochs, **options):
    loss = create_loss("bilateral", COUNTS, **options)
    loss.set_epoch(epoch, epochs)
    return loss


def by_hand(logits, targets, alpha, weights=(1,) * 5):
    """Equations 1 and 3, one pair at a time; with weights n_j, of balanced softmax."""
    logits, targets, losses = logits.tolist(), targets.tolist(), []
    for i in range(0, len(logits), 2):
        z = [alpha * c + (1 - alpha) * r for c, r in zip(logits[i], logits[i + 1], strict=True)]
        total = sum(w * math.exp(zj) for w, zj in zip(weights, z, strict=True))
        p = [w * math.exp(zj) / total for w, zj in zip(weights, z, strict=True)]
        y_c, y_r = targets[i], targets[i + 1]
        losses.append(-alpha * math.log(p[y_c]) - (1 - alpha) * math.log(p[y_r]))
    return losses


@pytest.mark.parametrize(("epoch", "alpha"), [(0, 1.0), (6, 0.64), (9, 0.19)])
@pytest.mark.parametrize(
    ("inner", "weights"), [("cross_entropy", (1,) * 5), ("balanced_softmax", COUNTS)]
)
def test_values_and_gradients(epoch, alpha, inner, weights):
    logits, targets = batch()
    expected = by_hand(logits, targets, alpha, weights)
    for reduction, reduce in (("none", list), ("sum", sum), ("mean", lambda x: sum(x) / len(x))):
        found = at(epoch, 10, loss=inner, reduction=reduction)(logits, targets)
        assert found.tolist() == pytest.approx(reduce(expected), rel=1e-6)
    logits.requires_grad_()
    at(epoch, 10, loss=inner, reduction="sum")(logits, targets).backward()
    rise = slopes(lambda moved: sum(by_hand(moved, targets, alpha, weights)), logits)
    torch.testing.assert_close(logits.grad, rise, rtol=0, atol=1e-5)


def test_at_alpha_1_it_is_the_conventional_branch():
    logits, targets = batch()
    logits.requires_grad_()
    value = at(0, 10)(logits, targets)
    assert torch.equal(value, F.cross_entropy(logits[0::2], targets[0::2]))
    value.backward()
    # Zeros and not None: every parameter of the other branch has a gradient.
    assert not logits.grad[1::2].any()


# From the authors' code, where alpha is never 0, and from the paper: 1 - (89 / 90)^2 and so on.
LAST = {("code", 90): 0.208, ("code", 100): 0.020, ("code", 180): 0.199, ("code", 200): 0.010}
LAST |= {("epochs", 90): 0.022, ("epochs", 180): 0.011}


@pytest.mark.parametrize(("divisor", "epochs"), LAST)
def test_the_last_alpha(divisor, epochs):
    loss = at(epochs - 1, epochs, divisor=divisor)
    assert loss.alpha == pytest.approx(LAST[divisor, epochs], abs=5e-4)
    loss.set_epoch(0, epochs)
    assert loss.alpha == 1


@pytest.mark.parametrize(
    ("adaptor", "alphas"),
    [
        ("parabolic_decay", [1, 15 / 16, 3 / 4, 7 / 16]),
        ("linear_decay", [1, 3 / 4, 1 / 2, 1 / 4]),
        ("cosine_decay", [1, 0.92387953, 0.70710678, 0.38268343]),
        ("parabolic_increment", [0, 1 / 16, 1 / 4, 9 / 16]),
        ("equal", [1 / 2] * 4),
    ],
)
def test_adaptors_of_table_4(adaptor, alphas):
    found = [at(epoch, 4, adaptor=adaptor).alpha for epoch in range(4)]
    assert found == pytest.approx(alphas, abs=1e-8)
    loss = create_loss("bilateral", adaptor=adaptor)
    if adaptor == "equal":
        assert loss(*batch()).isfinite()
    else:
        with pytest.raises(UsageError, match="BilateralLoss depends on the epoch"):
            loss(*batch())


def test_the_beta_adaptor_draws_for_each_batch():
    options = {"adaptor": "beta", "reduction": "none"}
    loss, same, other = at(3, 4, **options), at(3, 4, **options), at(3, 4, seed=1, **options)
    logits, targets = batch(2)
    state = torch.get_rng_state()
    draws = [loss.alpha]
    for number in range(2000):
        found = loss(logits, targets)
        assert found.tolist() == pytest.approx(by_hand(logits, targets, loss.alpha))
        # Reading it changes nothing; before the first batch it is that of the first.
        assert loss.alpha == (draws[0] if number == 0 else loss.alpha)
        draws.append(loss.alpha)
    drawn = torch.tensor(draws[1:])
    # Beta(.2, .2): mean 1/2, variance 1 / (4 (2 * .2 + 1)); most of it lies at the ends.
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.03)
    assert drawn.var().item() == pytest.approx(1 / 5.6, abs=0.01)
    assert torch.equal(torch.get_rng_state(), state)
    # A function of seed, epoch and number of the batch.
    assert same.alpha == draws[0] != other.alpha
    loss.set_epoch(2, 4)
    assert loss.alpha != draws[0]
    loss.set_epoch(3, 4)
    again, first = ([each(logits, targets).item() for _ in range(3)] for each in (loss, same))
    assert again == first


def test_half_precision_and_extremes():
    confident = torch.tensor([[8.0, 0, 0, 0, 0], [8, 0, 0, 0, 0]])
    for dtype in (torch.float16, torch.bfloat16):
        found = at(3, 4, reduction="none")(confident.to(dtype), torch.tensor([0, 0]))
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(math.log(1 + 4 * math.exp(-8)), rel=1e-3)
    loss, targets = at(3, 4), torch.tensor([1, 0])
    extreme = torch.tensor([[6e4, -6e4, 0, 0, 0], [-6e4, 6e4, 0, 0, 0]], dtype=torch.float16)
    value = loss(extreme.requires_grad_(), targets)
    value.backward()
    assert extreme.grad.isfinite().all()
    assert value.item() == pytest.approx(loss(extreme.double(), targets).item(), rel=1e-5)


def test_wrapped_losses_get_options_and_epochs():
    logits, targets = batch()
    plain = at(2, 4, loss="logit_adjustment", loss_options={"tau": 0.0})
    torch.testing.assert_close(plain(logits, targets), at(2, 4)(logits, targets))
    # Deferred weights from epoch 2 on.
    options = {"loss": "deferred_reweighting", "loss_options": {"start": 2}, "reduction": "sum"}
    for epoch, alpha in ((1, 15 / 16), (3, 7 / 16)):
        # Both labels the same: the cross-entropy of the mixed logits.
        losses = [by_hand(logits, targets[i::2].repeat_interleave(2), alpha) for i in (0, 1)]
        expected = 0
        for row, y in enumerate(targets.tolist()):
            share = alpha if row % 2 == 0 else 1 - alpha
            weight = effective_number_weight(y) if epoch >= 2 else 1
            expected += share * weight * losses[row % 2][row // 2]
        assert at(epoch, 4, **options)(logits, targets).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptor": "linear"}, "'linear'.*linear_decay.*parabolic_increment, equal, beta"),
        ({"divisor": "T"}, "unknown divisor 'T'.*epochs, code"),
        ({"loss": "bilateral"}, "BilateralLoss cannot wrap bilateral"),
        ({"loss": "range"}, "mixes logits, but range needs features"),
        ({"loss": "balanced_softmax"}, "BalancedSoftmaxLoss needs class_counts"),
        ({"loss_options": {"normalization": "batch"}}, "normalization is set by BilateralLoss"),
        ({"loss": "ldam", "class_counts": COUNTS}, "has a linear classifier: loss ldam"),
        ({}, r"BilateralLoss needs pairs, .* got 3 rows"),
    ],
)
def test_bad_options_and_half_a_pair_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        create_loss("bilateral", **options)(torch.zeros(3, 5), torch.zeros(3).long())
