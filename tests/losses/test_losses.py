"""Losses of logits: formulas in plain Python, constants by hand, identities, schedules."""

import math

import losses_by_hand as hand
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_by_hand import BY_HAND, COUNTS, batch, slopes
from torch.nn import functional as F

import timm_lt
from timm_lt import losses
from timm_lt.losses import ClassLoss, create_loss, list_losses, register_loss
from timm_lt.losses.reweighted import effective_number_weights, inverse_frequency_weights
from timm_lt.training import start_classifier
from timm_lt.utils.checks import UsageError

# Their values are those of a batch or of pairs: test_metric_losses.py and test_bilateral_loss.py.
OTHERS = {"range", "lifted_structure", "bilateral"}
LN2, LN3 = math.log(2), math.log(3)
variants = pytest.mark.parametrize(("name", "options", "by_hand"), BY_HAND)


def in_first_epoch(name, class_counts=COUNTS, **options):
    loss = create_loss(name, class_counts, **options)
    loss.set_epoch(0, 10)
    return loss


def every(name, **options):
    """Returns a loss of single images."""
    return in_first_epoch(name, reduction="none", **options)


@variants
def test_values_and_gradients(name, options, by_hand):
    logits, targets = batch()
    pairs = list(zip(logits.tolist(), targets.tolist(), strict=True))
    expected = torch.tensor([by_hand(z, y, **options) for z, y in pairs]).double()
    reductions = {"none": lambda losses: losses, "sum": torch.sum, "mean": torch.mean}
    for reduction, reduced in reductions.items():
        found = in_first_epoch(name, reduction=reduction, **options)(logits, targets)
        torch.testing.assert_close(found, reduced(expected), rtol=1e-5, atol=1e-7)
    assert torch.equal(in_first_epoch(name, **options)(logits, targets), found)
    logits.requires_grad_()
    every(name, **options)(logits, targets).sum().backward()
    for (z, y), grad in zip(pairs, logits.grad, strict=True):
        # The compensation of seesaw is a constant.
        fixed = options | ({"at": z} if name == "seesaw" else {})
        rise = slopes(lambda moved, y=y, fixed=fixed: by_hand(moved.tolist(), y, **fixed), z)
        torch.testing.assert_close(grad, rise, rtol=0, atol=2e-5)


WEIGHTED = {"beta": 0.999999, "form": "softmax", "probability": "weighted"}
DEFERRED = {"beta": 0.5, "start": 0, "normalization": "batch"}
# Loss, class counts, options, logits, label, value.
CONSTANTS = [
    # The softmax is 3/4 and 1/4; of the target 3/4 is for the label.
    ("cross_entropy", [2, 1], {"smoothing": 0.5}, [LN3, 0], 0, 2 * LN2 - 3 / 4 * LN3),
    # 1 of 3 + 1, and of 3^2 + 1.
    ("balanced_softmax", [3, 1], {}, [0, 0], 1, math.log(4)),
    ("logit_adjustment", [3, 1], {"tau": 2}, [0, 0], 1, math.log(10)),
    # The largest class is smoothed by 1/2, the smallest by 0.
    ("label_aware_smoothing", [3, 1], {"head": 0.5}, [LN3, 0], 0, 2 * LN2 - LN3 / 2),
    ("inverse_frequency", [9, 1], {"exponent": 0.5}, [0, 0], 1, 1.5 * LN2),
    # E = (1 - 1/4) / (1/2) = 3/2 and 1; 1/E = 2/3 and 1: weights 4/5 and 6/5.
    ("class_balanced", [2, 1], {"beta": 0.5, "form": "sigmoid"}, [0, 0], 1, 1.2 * 2 * LN2),
    ("class_balanced", [2, 1], {"beta": 0.5, "form": "focal"}, [0, 0], 1, 1.2 * LN2),
    # exp(-1.5 log 2) is 2^-1.5.
    ("class_balanced_focal", [3, 1], WEIGHTED, [0, 0], 1, 1.5 * (1 - 2**-1.5) * LN2),
    ("deferred_reweighting", [2, 1], DEFERRED, [0, 0], 0, 0.8 * LN2),
    # The softmax is 3/4 and 1/4.
    ("focal", [2, 1], {"gamma": 1}, [LN3, 0], 0, (2 * LN2 - LN3) / 4),
    ("focal", [2, 1], {"form": "sigmoid"}, [LN3, 0], 0, ((2 * LN2 - LN3) / 4 + LN2) / 4),
    # Margins 1/2 and 1/4.
    ("ldam", [16, 1], {"scale": 4}, [0.5, 0], 0, math.log(1 + math.exp(-1))),
    ("ldam", [16, 1], {"scale": 4, "logits": "scaled"}, [0, 2], 1, LN2),
    ("seesaw", [16, 1], {"mitigation": 0.5, "compensation": 0}, [0, 0], 0, math.log(1.25)),
    ("seesaw", [16, 1], {"mitigation": 0, "compensation": 1}, [0, LN2], 0, math.log(5)),
]


def test_constants():
    for name, counts, options, z, y, expected in CONSTANTS:
        loss = create_loss(name, counts, **options)
        found = loss(torch.tensor([z], dtype=torch.float64), torch.tensor([y]))
        assert found.item() == pytest.approx(expected, rel=1e-5), (name, options)
    for table in (BY_HAND, CONSTANTS):
        assert {name for name, *_ in table} == set(list_losses()) - OTHERS


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1 - 1e-12])
def test_weights_are_stable_and_have_a_mean_of_one(beta):
    counts = torch.tensor([1e6, 1000, 1]).double()
    weights = effective_number_weights(counts, beta)
    by_frequency = inverse_frequency_weights(counts, 1.0)
    # The effective number is this sum; here it is short.
    if beta in {0.9, 0.9999}:
        numbers = torch.tensor([sum(beta**k for k in range(int(n))) for n in counts]).double()
        torch.testing.assert_close(weights, 1 / numbers / (1 / numbers).mean())
    else:
        expected = torch.ones(3).double() if beta == 0 else by_frequency
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-8)
    for found in (weights, by_frequency, inverse_frequency_weights(counts, 80.0)):
        assert found.mean().item() == pytest.approx(1)
        assert torch.isfinite(found).all()


@variants
def test_half_precision_and_extreme_logits_lose_nothing(name, options, by_hand):
    loss = every(name, **options)
    for dtype in (torch.float16, torch.bfloat16):
        # Confident and right: half precision would lose the loss, about 4 e^-8.
        logits = torch.tensor([[8.0, 0, 0, 0, 0], [0, 0, 0, 8, 0]], dtype=dtype)
        if "ldam" in {name, options.get("loss")} and options.get("logits") != "scaled":
            logits /= 32
        targets = torch.tensor([0, 3])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(logits, targets)
        assert found.dtype == torch.float32
        # With tau = 2.5 the first is 1e-5, a difference of numbers of size 7 in float32.
        tiny = 5e-7 if options.get("tau") == 2.5 else 0
        exact = loss(logits.double(), targets)
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=tiny)
    logits = torch.tensor([[6e4, -6e4, 0, 0, 0]] * 2, dtype=torch.float16, requires_grad=True)
    # Wrong and right.
    targets = torch.tensor([1, 0])
    values = loss(logits, targets)
    values.sum().backward()
    assert values[0].item() > 1e4
    torch.testing.assert_close(values.double(), loss(logits.double(), targets), rtol=1e-5, atol=0)
    assert torch.isfinite(logits.grad).all()


@variants
def test_a_soft_target_is_a_mean_of_losses(name, options, by_hand):
    """A loss that is linear in a distribution over the labels, as mixup needs it."""
    loss = every(name, **options)
    if not loss.takes_soft_targets:
        pytest.skip("takes labels only")
    logits, _ = batch(6)
    first, second = torch.arange(6) % 5, torch.arange(6) * 3 % 5
    soft = 0.3 * F.one_hot(first, 5) + 0.7 * F.one_hot(second, 5)
    expected = 0.3 * loss(logits, first) + 0.7 * loss(logits, second)
    torch.testing.assert_close(loss(logits, soft), expected)
    torch.testing.assert_close(loss(logits, F.one_hot(first, 5).double()), loss(logits, first))


@pytest.mark.parametrize("name", list_losses())
def test_state_dict_is_empty_and_buffers_move(name):
    loss = in_first_epoch(name)
    assert loss.state_dict() == {}
    assert not list(loss.parameters())
    if not loss.needs_features:
        targets = torch.zeros(2, device="meta", dtype=torch.long)
        assert loss.to("meta")(torch.zeros(2, 5, device="meta"), targets).is_meta


CROSS_ENTROPY = [
    ("logit_adjustment", {"tau": 0.0}),
    ("inverse_frequency", {"exponent": 0}),
    ("class_balanced", {"beta": 0}),
    ("class_balanced_focal", {"beta": 0, "gamma": 0, "form": "softmax"}),
    ("class_balanced_focal", {"beta": 0, "gamma": 0, "form": "softmax", "probability": "weighted"}),
    ("focal", {"gamma": 0}),
    ("ldam", {"max_margin": 0, "scale": 1}),
    ("label_aware_smoothing", {"head": 0}),
    ("seesaw", {"mitigation": 0, "compensation": 0}),
    ("deferred_reweighting", {"start": 0, "beta": 0}),
    ("deferred_reweighting", {"start": 0.8}),
]
CROSS_ENTROPY_OF_EQUAL_COUNTS = [
    ("logit_adjustment", {"tau": 2.5}),
    ("inverse_frequency", {}),
    ("class_balanced", {}),
    ("class_balanced", {"normalization": "weights"}),
    ("seesaw", {"compensation": 0}),
    ("deferred_reweighting", {"start": 0}),
]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(1, 10**6), min_size=1, max_size=6), data=st.data())
def test_identities(counts, data):
    row = st.lists(st.floats(-20, 20), min_size=len(counts), max_size=len(counts))
    logits = torch.tensor([data.draw(row)], dtype=torch.float64)
    targets = torch.tensor([data.draw(st.integers(0, len(counts) - 1))])

    def value(name, class_counts, **options):
        return in_first_epoch(name, class_counts, **options)(logits, targets).item()

    def same(expected):
        return pytest.approx(expected, rel=1e-5, abs=1e-5)

    plain = F.cross_entropy(logits, targets).item()
    for name, options in CROSS_ENTROPY:
        assert value(name, counts, **options) == same(plain), (name, options)
    for name, options in CROSS_ENTROPY_OF_EQUAL_COUNTS:
        assert value(name, [7] * len(counts), **options) == same(plain), (name, options)
    adjusted = value("logit_adjustment", counts)
    assert adjusted == value("balanced_softmax", counts)
    assert value("logit_adjustment", [2 * n for n in counts]) == same(adjusted)


def test_more_identities():
    logits, targets = batch()

    def same(name, options, expected, counts=COUNTS):
        found = every(name, class_counts=counts, **options)(logits, targets)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    one_hot = F.one_hot(targets, 5).double()
    bce = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(1)
    same("focal", {"form": "sigmoid", "gamma": 0}, bce)
    same("class_balanced", {"form": "sigmoid", "beta": 0}, bce)
    same("class_balanced", {"beta": 1 - 1e-9}, every("inverse_frequency")(logits, targets))
    smoothed = F.cross_entropy(logits, targets, label_smoothing=0.2, reduction="none")
    same("label_aware_smoothing", {"head": 0.2, "spread": "all"}, smoothed, [9] * 5)


@pytest.mark.parametrize("name", ["inverse_frequency", "class_balanced"])
def test_weighted_means_are_those_of_torch(name):
    logits, targets = batch(9, seed=3)
    by_batch, by_weights = (
        create_loss(name, COUNTS, normalization=divisor) for divisor in ("batch", "weights")
    )
    weights = by_weights.class_weights.double()
    soft = torch.softmax(torch.randn(9, 5, dtype=torch.float64), 1)
    total = F.cross_entropy(logits, soft, weights, reduction="sum")
    one, one_hot = (logits[:1], targets[:1]), F.one_hot(targets, 5).double()
    for found, expected in [
        (by_weights(logits, targets), F.cross_entropy(logits, targets, weights)),
        (by_batch(logits, targets), F.cross_entropy(logits, targets, weights, reduction="sum") / 9),
        # For distributions torch divides by the batch size; our mean by weights agrees with labels.
        (by_batch(logits, soft), F.cross_entropy(logits, soft, weights)),
        (by_weights(logits, one_hot), by_weights(logits, targets)),
        (by_weights(logits, soft), total / (soft * weights).sum()),
        # The weight of a single image cancels.
        (by_weights(*one), F.cross_entropy(*one)),
    ]:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("start", "epochs", "first"),
    [(160, 200, 160), (0.8, 200, 160), (0.29, 100, 29), (0.5, 3, 1), (0.9, 1, 0), (0, 5, 0)],
)
def test_weights_begin_in_their_epoch(start, epochs, first):
    loss = create_loss("deferred_reweighting", COUNTS, start=start)
    logits, targets = batch(9, seed=3)
    plain = create_loss("cross_entropy")(logits, targets)
    weighted = create_loss("class_balanced", COUNTS, normalization="weights")(logits, targets)
    assert plain.item() != pytest.approx(weighted.item(), rel=0.1)
    # A resumed run begins anywhere.
    for epoch in [epochs - 1, *range(epochs)]:
        loss.set_epoch(epoch, epochs)
        torch.testing.assert_close(loss(logits, targets), plain if epoch < first else weighted)


def test_a_loss_with_a_schedule_needs_the_epoch():
    wrapped = {"start": 0, "loss": "deferred_reweighting", "loss_options": {"start": 160}}
    for options in ({"start": 160}, wrapped):
        loss = create_loss("deferred_reweighting", COUNTS, **options)
        with pytest.raises(UsageError, match=r"depends on the epoch: call loss.set_epoch\("):
            loss(*batch())
        with pytest.raises(UsageError, match="start 160 is not within the 160 epochs"):
            loss.set_epoch(0, 160)
        loss.set_epoch(0, 161)


def test_the_wrapped_loss_decides_on_its_input():
    decided = {"focal": (False, True), "seesaw": (False, False), "range": (True, False)}
    for name, expected in decided.items():
        loss = create_loss("deferred_reweighting", COUNTS, loss=name, start=0)
        assert (loss.needs_features, loss.takes_soft_targets) == expected
    logits, targets = batch(9)
    features = torch.arange(18.0).view(9, 2)
    losses = create_loss("range", reduction="none")(logits, targets, features)
    weights = loss.class_weights[targets]
    expected = (weights * losses).sum() / weights.sum()
    torch.testing.assert_close(loss(logits, targets, features), expected)


def test_ldam_with_a_cosine_classifier():
    x, targets = batch(4)[0][:, :3], torch.tensor([0, 4, 2, 4])
    head = timm_lt.create_head("cosine", 3, 5, scale=1.0).double()
    create_loss("ldam", COUNTS, reduction="sum")(head(x), targets).backward()

    def by_hand(weight):
        cosines = F.normalize(x) @ F.normalize(weight).T
        return sum(map(hand.ldam, cosines.tolist(), targets.tolist()))

    torch.testing.assert_close(head.weight.grad, slopes(by_hand, head.weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("deferred", [False, True])
def test_ldam_needs_a_cosine_classifier(deferred):
    def loss(**options):
        if deferred:
            return create_loss("deferred_reweighting", COUNTS, loss="ldam", loss_options=options)
        return create_loss("ldam", COUNTS, **options)

    def classifier(head, **options):
        return timm_lt.create_head(head, 6, 5, **options)

    loss().check_classifier(classifier("cosine", scale=1.0))
    # 0.1 is not a number of float32.
    loss(logits="scaled", scale=0.1).check_classifier(classifier("cosine", scale=0.1))
    message = r"needs a cosine classifier, and the model has linear.*\{head: cosine, scale: 1.0\}"
    for linear in (torch.nn.Linear(6, 5), classifier("linear")):
        with pytest.raises(UsageError, match=message):
            loss().check_classifier(linear)
    with pytest.raises(UsageError, match=r"has cosine \(scale: 16.0, .*scale: 30.0\}"):
        loss(logits="scaled").check_classifier(classifier("cosine", scale=16.0))


def test_a_sigmoid_starts_at_one_in_c():
    for name, options, biased in [
        ("focal", {"form": "sigmoid"}, True),
        ("class_balanced", {"form": "focal"}, True),
        ("class_balanced", {"form": "sigmoid"}, True),
        ("deferred_reweighting", {"loss": "class_balanced_focal"}, True),
        ("focal", {}, False),
        ("class_balanced", {}, False),
        ("class_balanced_focal", {"form": "softmax"}, False),
    ]:
        model = timm_lt.create_model("test_resnet", num_classes=5)
        before = model.fc.bias.tolist()
        start_classifier(create_loss(name, COUNTS, **options), model, 5)
        # Sigmoid of -log 4 is 1/5.
        assert model.fc.bias.tolist() == pytest.approx([-math.log(4)] * 5 if biased else before)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("CE", {}, "unknown loss 'CE'.*cross_entropy, .*balanced_softmax"),
        ("balanced_softmax", {"class_counts": None}, "BalancedSoftmaxLoss needs class_counts"),
        ("balanced_softmax", {"tau": 1}, "has no option 'tau'; valid options: reduction"),
        ("logit_adjustment", {"tau": -1}, r"tau must be a number in \[0, inf\), got -1"),
        ("cross_entropy", {"smoothing": None}, "smoothing must be a number.*got None"),
        ("cross_entropy", {"reduction": "avg"}, "'avg'.*mean, sum, none"),
        ("class_balanced", {"gamma": 1}, "gamma only applies with form='focal'"),
        ("class_balanced", {"form": "focal", "gamma": -1}, "gamma must be a number"),
        ("class_balanced_focal", {"probability": "weighted"}, "only applies with form='softmax'"),
        ("label_aware_smoothing", {"tail": 0.4}, "head must be .* got 0.3"),
        ("deferred_reweighting", {"start": 1.5}, r"start, an epoch .* must be a number in \(0, 1"),
        ("deferred_reweighting", {"loss": "bilateral"}, "cannot wrap bilateral; use loss bilat"),
        ("deferred_reweighting", {"loss_options": 5}, "loss_options must be a mapping.*got 5"),
        ("deferred_reweighting", {"loss_options": {"reduction": "sum"}}, "reduction is set"),
        ("deferred_reweighting", {"exponent": 1}, "exponent does not apply with weights='eff"),
        ("deferred_reweighting", {"weights": "inverse_frequency", "beta": 0}, "beta does not appl"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_loss(name, **{"class_counts": COUNTS, **options})


@pytest.mark.parametrize("name", list_losses())
def test_empty_classes_and_bad_batches_are_refused(name):
    if name not in {"cross_entropy", "focal", *OTHERS}:
        with pytest.raises(UsageError, match="1 of 2 classes have no training image: 1"):
            create_loss(name, [3, 0])
    loss = in_first_epoch(name)
    for logits, targets, message in [
        (torch.zeros(4, 5), torch.zeros(3).long(), r"logits \(4, 5\) and targets \(3,\)"),
        (torch.zeros(4, 5), torch.zeros(4, 5).long(), r"\(4, 5\) and targets \(4, 5\)"),
        (torch.zeros(4, 6), torch.zeros(4).long(), r"class_counts has 5 classes, .*\(4, 6\)"),
        (torch.zeros(4, 5), torch.zeros(4), "targets must be integers, got torch.float32"),
        (torch.zeros(4, 5), torch.tensor([0, 5, 1, 2]), "must be from 0 to 4, got 0 to 5, logits"),
        (torch.zeros(4, 5), torch.tensor([0, -1, 1, 2]), "must be from 0 to 4, got -1 to 2"),
    ]:
        features = [torch.zeros(4, 3)] * loss.needs_features
        with pytest.raises(UsageError, match=message):
            loss(logits, targets, *features)


def test_a_new_loss_defines_per_example(monkeypatch):
    # Register it in a copy, which other tests do not see.
    monkeypatch.setattr(losses.LOSSES, "_parts", dict(losses.LOSSES._parts))

    @register_loss("zero_one")
    class ZeroOneLoss(ClassLoss):
        def __init__(self, class_counts=None, *, weight=1, reduction="mean"):
            super().__init__(class_counts, reduction=reduction)
            self.weight = weight

        def per_example(self, logits, targets):
            return self.weight * (logits.argmax(1) != targets).float()

    assert "zero_one" in list_losses()
    loss = create_loss("zero_one", reduction="sum", weight=3)
    assert loss(torch.eye(3), torch.tensor([0, 0, 1])).item() == 6
