"""Losses of features, against the papers' formulas in plain Python."""

import math
import sys

import pytest
import torch
from losses_by_hand import lifted_by_hand, range_by_hand, slopes

from timm_lt.losses import LOSSES, create_loss, list_losses
from timm_lt.utils.checks import UsageError

FORMULAS = {"range": range_by_hand, "lifted_structure": lifted_by_hand}
metric = pytest.mark.parametrize("name", FORMULAS)
# Three classes with several images, one with one, one absent.
TARGETS = torch.tensor([2, 0, 0, 2, 0, 3, 4, 2, 4, 0])


def features(n=10, d=4, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def term(name, x, targets=TARGETS, weight=1.0, **options):
    """Returns the term that a loss adds to the cross-entropy."""
    logits = torch.zeros(len(targets), 5, dtype=torch.float64)
    return create_loss(name, weight=weight, **options)(logits, targets, x) - math.log(5)


variants = pytest.mark.parametrize(
    ("name", "options"),
    [
        ("range", {}),
        ("range", {"k": 1, "margin": 30.0}),
        ("range", {"k": 4, "alpha": 0.0, "beta": 2.0, "margin": 5.0}),
        ("range", {"k": 100, "alpha": 3.0}),
        ("lifted_structure", {}),
        ("lifted_structure", {"normalize": True}),
        ("lifted_structure", {"neg_margin": 0.2, "pos_margin": 1.5}),
    ],
)


@variants
def test_values_and_gradients(name, options):
    assert set(FORMULAS) == {name for name in list_losses() if LOSSES[name].needs_features}
    for seed in range(5):
        x = features(seed=seed)
        expected = FORMULAS[name](x, TARGETS, **options)
        assert term(name, x, **options).item() == pytest.approx(expected, rel=1e-9)
        assert term(name, x, weight=0.25, **options).item() == pytest.approx(expected / 4, rel=1e-9)
    x = features(seed=1).requires_grad_()
    term(name, x, **options).backward()
    rise = slopes(lambda moved: FORMULAS[name](moved, TARGETS, **options), x)
    torch.testing.assert_close(x.grad, rise, rtol=0, atol=1e-6)


def test_range_by_numbers():
    """On a line: class 0 at 0, 1, 3, class 1 at 5, 5.5."""
    x = torch.tensor([[0.0], [1.0], [3.0], [5.0], [5.5]])
    targets = torch.tensor([0, 0, 0, 1, 1])
    # Largest squared distances 9 and 4: 2 / (1/9 + 1/4); a single pair: 0.25. Means 4/3 and 5.25.
    intra = 72 / 13 + 0.25
    inter = 20 - (5.25 - 4 / 3) ** 2
    found = term("range", x, targets, margin=20.0, alpha=1.0, beta=0.1)
    assert found.item() == pytest.approx(intra + 0.1 * inter, rel=1e-6)
    expected = range_by_hand(features(), TARGETS, margin=9.0, power=1)
    found = term("range", features(), margin=9.0, distance="euclidean")
    assert found.item() == pytest.approx(expected)


def test_lifted_structure_by_numbers():
    """On a line: class 0 at 0 and 1, class 1 at 3, so the negatives are at 3 and 2."""
    x = torch.tensor([[0.0], [1.0], [3.0]])
    # For the only pair, J is the logarithm of 1/e^2 + 1/e, plus 1.
    expected = math.log(math.exp(-1) + 1) ** 2 / 2
    found = term("lifted_structure", x, torch.tensor([0, 0, 1]))
    assert found.item() == pytest.approx(expected, rel=1e-6)


@metric
@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([0], 0.0),  # one image
        ([0, 1, 2], 0.0),  # no pair, and means at a distance of at least 1
        ([3, 3, 3, 3], None),  # one class: no negatives and no other mean
    ],
)
def test_batches_without_pairs_or_without_a_second_class(name, targets, expected):
    x = (3 * torch.eye(4, dtype=torch.float64)[: len(targets)]).requires_grad_()
    value = term(name, x, torch.tensor(targets))
    if expected is None:
        # All distances are sqrt(18).
        expected = 0.5 * 18 if name == "range" else 0.0
    assert value.item() == pytest.approx(expected, abs=1e-12)
    value.backward()
    assert x.grad.isfinite().all()


# Without distances J is log(2 e (negatives)), class by class with its pairs.
WITHOUT_DISTANCES = [p * (1 + math.log(2 * n)) ** 2 / 20 for p, n in ((6, 6), (3, 7), (1, 8))]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # Half of the margin; three classes with a pair add a clamped distance each.
        ("range", {}, 0.05),
        ("range", {"distance": "euclidean"}, 0.05),
        ("lifted_structure", {}, sum(WITHOUT_DISTANCES)),
    ],
)
def test_equal_features(name, options, expected):
    x = torch.ones(len(TARGETS), 4).requires_grad_()
    value = term(name, x, **options)
    value.backward()
    assert x.grad.isfinite().all()
    assert value.item() == pytest.approx(expected, rel=1e-3)
    # Two equal images of a class.
    x = features()
    x[2] = x[1]
    value = term(name, x.requires_grad_())
    value.backward()
    assert value.item() == pytest.approx(FORMULAS[name](x, TARGETS))
    assert x.grad.isfinite().all()


@metric
def test_reductions_and_weight(name):
    """The loss of each image includes the whole term; its weight 0 is cross-entropy."""
    x, logits = features(), features(d=5, seed=1)
    losses = {
        reduction: create_loss(name, weight=1.0, reduction=reduction)(logits, TARGETS, x)
        for reduction in ("none", "mean", "sum")
    }
    plain = torch.nn.functional.cross_entropy(logits, TARGETS, reduction="none")
    torch.testing.assert_close(losses["none"], plain + term(name, x))
    torch.testing.assert_close(losses["mean"], losses["none"].mean())
    torch.testing.assert_close(losses["sum"], losses["none"].sum())
    off = create_loss(name, weight=0.0, reduction="none")(logits, TARGETS, x)
    assert torch.equal(off, plain)


@metric
def test_half_precision_and_large_features(name):
    x = (100 * features(dtype=torch.float32)).half()
    exact = term(name, x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = create_loss(name, weight=1.0)(torch.zeros(len(x), 5), TARGETS, x)
    assert found.dtype == torch.float32
    assert found.item() - math.log(5) == pytest.approx(exact.item(), rel=1e-3)
    extreme = torch.full((len(x), 4), 6e4, dtype=torch.float16)
    extreme[::2] *= -1
    value = create_loss(name, weight=1e-6)(torch.zeros(10, 5), TARGETS, extreme.requires_grad_())
    value.backward()
    assert value.isfinite()
    assert extreme.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("range", {"k": 0}, "k must be an integer >= 1, got 0"),
        ("range", {"distance": "cosine"}, "unknown distance 'cosine'.*squared, euclidean"),
        ("lifted_structure", {"neg_margin": math.nan}, "neg_margin must be a number"),
        ("lifted_structure", {"normalize": "no"}, "normalize must be true or false, got 'no'"),
    ],
)
def test_bad_options_and_features_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_loss(name, **options)
    for wrong in ([], [torch.zeros(9, 4)], [torch.zeros(10)]):
        with pytest.raises(UsageError, match=r"needs the classifier's input \(N, D\) as features"):
            create_loss(name)(torch.zeros(10, 5), TARGETS, *wrong)


def test_lifted_structure_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    with pytest.raises(UsageError, match=r"pip install 'timm_lt\[metric\]'"):
        create_loss("lifted_structure")
