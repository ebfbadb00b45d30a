"""Losses for the long tail: constants worked out by hand, identities, and schedules."""

import math

import losses_by_hand as hand
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import timm_lt
from timm_lt import losses
from timm_lt.losses import ClassLoss, create_loss, list_losses, register_loss
from timm_lt.losses.reweighted import effective_number_weights, inverse_frequency_weights
from timm_lt.training import start_classifier
from timm_lt.utils.checks import UsageError

COUNTS = [500, 120, 30, 8, 5]
LN2 = math.log(2)


def batch(n=9, classes=5):
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (n,), generator=generator)


# Constants ----------------------------------------------------------------------------------------


CONSTANTS = [
    # The softmax is 3/4 and 1/4; of the target 3/4 is for the label.
    (
        "cross_entropy",
        [2, 1],
        {"smoothing": 0.5},
        [math.log(3), 0],
        0,
        (3 * math.log(4 / 3) + math.log(4)) / 4,
    ),
    # 1 of 3 + 1, and of 3^2 + 1.
    ("balanced_softmax", [3, 1], {}, [0, 0], 1, math.log(4)),
    ("logit_adjustment", [3, 1], {"tau": 2}, [0, 0], 1, math.log(10)),
    # The largest class is smoothed by 1/2, the smallest by 0.
    (
        "label_aware_smoothing",
        [3, 1],
        {"head": 0.5},
        [math.log(3), 0],
        0,
        (math.log(4 / 3) + math.log(4)) / 2,
    ),
    ("label_aware_smoothing", [3, 1], {"head": 0.5}, [math.log(3), 0], 1, math.log(4)),
    # 1/3 and 1/1, of mean 2/3: weights 1/2 and 3/2.
    ("inverse_frequency", [3, 1], {}, [0, 0], 0, LN2 / 2),
    ("inverse_frequency", [3, 1], {}, [0, 0], 1, 1.5 * LN2),
    ("inverse_frequency", [9, 1], {"exponent": 0.5}, [0, 0], 1, 1.5 * LN2),
    # E = (1 - 1/4) / (1/2) = 3/2 and 1; 1/E = 2/3 and 1: weights 4/5 and 6/5.
    ("class_balanced", [2, 1], {"beta": 0.5}, [0, 0], 0, 0.8 * LN2),
    ("class_balanced", [2, 1], {"beta": 0.5, "form": "sigmoid"}, [0, 0], 1, 1.2 * 2 * LN2),
    ("class_balanced", [2, 1], {"beta": 0.5, "form": "focal"}, [0, 0], 1, 1.2 * LN2),
    ("class_balanced_focal", [2, 1], {"beta": 0.5, "gamma": 2}, [0, 0], 1, 0.3 * 2 * LN2),
    (
        "class_balanced_focal",
        [3, 1],
        {"beta": 0.999999, "form": "softmax", "probability": "weighted"},
        [0, 0],
        1,
        # exp(-1.5 log 2) is 2^-1.5.
        1.5 * (1 - 2**-1.5) * LN2,
    ),
    ("focal", [2, 1], {}, [0, 0], 0, LN2 / 4),
    # The softmax is 3/4 and 1/4.
    ("focal", [2, 1], {"gamma": 1}, [math.log(3), 0], 0, math.log(4 / 3) / 4),
    (
        "focal",
        [2, 1],
        {"form": "sigmoid"},
        [math.log(3), 0],
        0,
        (math.log(4 / 3) / 4 + LN2) / 4,
    ),
    (
        "deferred_reweighting",
        [2, 1],
        {"start": 0, "beta": 0.5, "normalization": "batch"},
        [0, 0],
        0,
        0.8 * LN2,
    ),
    # Margins 1/2 and 1/4.
    ("ldam", [16, 1], {"scale": 4}, [0.5, 0], 0, math.log(1 + math.exp(-1))),
    ("ldam", [16, 1], {"scale": 4}, [0, 0.5], 1, LN2),
    ("ldam", [16, 1], {"scale": 4, "logits": "scaled"}, [0, 2], 1, LN2),
    ("seesaw", [16, 1], {"mitigation": 0.5, "compensation": 0}, [0, 0], 0, math.log(1.25)),
    ("seesaw", [16, 1], {"mitigation": 0.5, "compensation": 0}, [0, 0], 1, LN2),
    ("seesaw", [16, 1], {"mitigation": 0, "compensation": 1}, [0, LN2], 0, math.log(5)),
    ("seesaw", [16, 1], {"mitigation": 0, "compensation": 1}, [LN2, 0], 0, math.log(1.5)),
]


def test_every_loss_has_a_constant():
    # The others in their own files, of pairs of rows and of features.
    others = {"bilateral", "range", "lifted_structure"}
    assert {name for name, *_ in CONSTANTS} == set(list_losses()) - others


@pytest.mark.parametrize(("name", "counts", "options", "z", "y", "expected"), CONSTANTS)
def test_constants(name, counts, options, z, y, expected):
    loss = create_loss(name, counts, **options)
    found = loss(torch.tensor([z], dtype=torch.float64), torch.tensor([y]))
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [0.5, 0.3, 0.1]),
        ("concave", [0.5, 0.1 + 0.4 / math.sqrt(2), 0.1]),
        ("convex", [0.5, 0.5 - 0.4 / math.sqrt(2), 0.1]),
    ],
)
def test_the_smoothing_of_three_classes(shape, expected):
    loss = create_loss("label_aware_smoothing", [3, 2, 1], head=0.5, tail=0.1, shape=shape)
    assert loss.smoothing.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1 - 1e-12])
def test_weights_are_stable_and_have_a_mean_of_one(beta):
    counts = [10**6, 1000, 1]
    weights = effective_number_weights(counts, beta)
    # The effective number as the sum that it is, where that is short.
    if beta in {0.9, 0.9999}:
        numbers = torch.tensor([sum(beta**k for k in range(n)) for n in counts])
        torch.testing.assert_close(weights, (1 / numbers / (1 / numbers).mean()).double())
    expected = torch.ones(3).double() if beta == 0 else inverse_frequency_weights(counts)
    if beta in {0, 1 - 1e-12}:
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-8)
    for found in (weights, inverse_frequency_weights(counts, 80.0)):
        assert found.mean().item() == pytest.approx(1)
        assert torch.isfinite(found).all()


# Identities ---------------------------------------------------------------------------------------

CROSS_ENTROPY = [
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
OF_EQUAL_COUNTS = [
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
    plain = F.cross_entropy(logits, targets).item()
    cases = [(counts, *case) for case in CROSS_ENTROPY]
    cases += [([7] * len(counts), *case) for case in OF_EQUAL_COUNTS]
    for class_counts, name, options in cases:
        loss = create_loss(name, class_counts, **options)
        loss.set_epoch(0, 10)
        found = loss(logits, targets).item()
        assert found == pytest.approx(plain, rel=1e-5, abs=1e-6), (name, options)


def test_more_identities():
    logits, targets = batch()

    def loss(name, **options):
        return create_loss(name, COUNTS, reduction="none", **options)(logits, targets)

    def same(found, expected):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    bce = F.binary_cross_entropy_with_logits(
        logits, F.one_hot(targets, 5).double(), reduction="none"
    )
    same(loss("focal", form="sigmoid", gamma=0), bce.sum(1))
    same(loss("class_balanced", form="sigmoid", beta=0), bce.sum(1))
    same(loss("class_balanced", beta=1 - 1e-9), loss("inverse_frequency"))
    same(loss("class_balanced", form="focal", gamma=2.0), loss("class_balanced_focal", gamma=2))
    same(
        loss("ldam"),
        create_loss("ldam", COUNTS, reduction="none", logits="scaled")(30 * logits, targets),
    )
    equal = create_loss("label_aware_smoothing", [9] * 5, head=0.2, spread="all", reduction="none")
    same(equal(logits, targets), loss("cross_entropy", smoothing=0.2))
    same(loss("deferred_reweighting", start=0), loss("class_balanced"))


# Weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inverse_frequency", "class_balanced"])
def test_weighted_means_are_those_of_torch(name):
    logits, targets = batch()
    by_weights = create_loss(name, COUNTS, normalization="weights")
    weights = by_weights.weights.double()
    expected = F.cross_entropy(logits, targets, weights)
    torch.testing.assert_close(by_weights(logits, targets), expected)
    by_batch = create_loss(name, COUNTS)
    expected = F.cross_entropy(logits, targets, weights, reduction="sum") / len(targets)
    torch.testing.assert_close(by_batch(logits, targets), expected)
    # Of distributions torch's mean is over the batch; ours by weights agrees with that of labels.
    soft = torch.softmax(torch.randn(9, 5, dtype=torch.float64), 1)
    torch.testing.assert_close(by_batch(logits, soft), F.cross_entropy(logits, soft, weights))
    one_hot = F.one_hot(targets, 5).double()
    torch.testing.assert_close(by_weights(logits, one_hot), by_weights(logits, targets))
    total = (soft * weights).sum()
    expected = F.cross_entropy(logits, soft, weights, reduction="sum") / total
    torch.testing.assert_close(by_weights(logits, soft), expected)
    # Of one image nothing is left of its weight.
    one = logits[:1], targets[:1]
    torch.testing.assert_close(by_weights(*one), F.cross_entropy(*one))


@pytest.mark.parametrize(
    ("name", "options", "value", "weight"),
    [
        *(
            (
                "class_balanced",
                {"beta": 0.9, "form": form},
                hand.class_balanced,
                lambda y: hand.effective_number_weight(y, 0.9),
            )
            for form in ("sigmoid", "focal")
        ),
        *(
            (
                "class_balanced_focal",
                {"beta": 0.9, **options},
                hand.class_balanced_focal,
                lambda y: hand.effective_number_weight(y, 0.9),
            )
            for options in ({}, {"form": "softmax", "probability": "weighted"})
        ),
        (
            "deferred_reweighting",
            {"start": 0, "weights": "inverse_frequency"},
            hand.deferred_reweighting,
            hand.frequency_weight,
        ),
    ],
)
def test_means_by_weights_are_those_by_hand(name, options, value, weight):
    logits, targets = batch()
    pairs = list(zip(logits.tolist(), targets.tolist(), strict=True))
    expected = sum(value(z, y, **options) for z, y in pairs) / sum(weight(y) for _, y in pairs)
    found = create_loss(name, COUNTS, normalization="weights", **options)(logits, targets)
    assert found.item() == pytest.approx(expected, rel=1e-5)


# Deferred re-weighting ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "epochs", "first"),
    [(160, 200, 160), (0.8, 200, 160), (0.29, 100, 29), (0.5, 3, 1), (0.9, 1, 0), (0, 5, 0)],
)
def test_weights_begin_in_their_epoch(start, epochs, first):
    loss = create_loss("deferred_reweighting", COUNTS, start=start)
    logits, targets = batch()
    plain = create_loss("cross_entropy")(logits, targets)
    weighted = create_loss("class_balanced", COUNTS, normalization="weights")(logits, targets)
    assert plain.item() != pytest.approx(weighted.item(), rel=0.1)
    # A resumed run begins anywhere.
    for epoch in [epochs - 1, *range(epochs)]:
        loss.set_epoch(epoch, epochs)
        torch.testing.assert_close(loss(logits, targets), plain if epoch < first else weighted)


@pytest.mark.parametrize("start", [0.8, 1, 160])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_loss_with_a_schedule_needs_to_know_the_epoch(start, wrapped):
    loss = create_loss("deferred_reweighting", COUNTS, start=start)
    inputs = batch()
    if wrapped:
        options = {"loss": "deferred_reweighting", "loss_options": {"start": start}}
        loss = create_loss("deferred_reweighting", COUNTS, start=0, **options)
    with pytest.raises(UsageError, match=r"depends on the epoch: call loss.set_epoch\(epoch, ep"):
        loss(*inputs)
    loss.set_epoch(0, 200)
    weighted = create_loss("class_balanced", COUNTS, normalization="weights")
    expected = weighted if wrapped else create_loss("cross_entropy")
    torch.testing.assert_close(loss(*inputs), expected(*inputs))


def test_a_start_after_training_is_refused():
    loss = create_loss("deferred_reweighting", COUNTS, start=160)
    with pytest.raises(UsageError, match="start 160 is not within the 160 epochs"):
        loss.set_epoch(0, 160)
    loss.set_epoch(0, 161)


def test_the_wrapped_loss_says_what_it_takes(monkeypatch):
    monkeypatch.setattr(losses.LOSSES, "_parts", dict(losses.LOSSES._parts))
    heard = []

    @register_loss("of_features")
    class OfFeatures(ClassLoss):
        needs_features = True

        def forward(self, logits, targets, features):
            return features.sum(1)

        def set_epoch(self, epoch, epochs):
            heard.append((epoch, epochs))

    loss = create_loss("deferred_reweighting", COUNTS, loss="of_features", start=1)
    assert (loss.needs_features, loss.takes_soft_targets) == (True, False)
    logits, targets = batch()
    features = torch.arange(18.0).view(9, 2)
    loss.set_epoch(0, 2)
    assert loss(logits, targets, features).item() == pytest.approx(17)
    loss.set_epoch(1, 2)
    weights = loss.weights[targets]
    expected = (weights * features.sum(1)).sum() / weights.sum()
    assert loss(logits, targets, features).item() == pytest.approx(expected.item())
    assert heard == [(0, 2), (1, 2)]
    wrapped = {"focal": True, "ldam": True, "seesaw": False}
    for name, soft in wrapped.items():
        loss = create_loss("deferred_reweighting", COUNTS, loss=name)
        assert (loss.needs_features, loss.takes_soft_targets) == (False, soft)


# Models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deferred", [False, True])
def test_ldam_is_for_a_cosine_classifier(deferred):
    def loss(**options):
        if deferred:
            return create_loss("deferred_reweighting", COUNTS, loss="ldam", loss_options=options)
        return create_loss("ldam", COUNTS, **options)

    def model(**options):
        return timm_lt.create_model("test_resnet", num_classes=5, **options).fc

    loss().check_classifier(model(head="cosine", scale=1.0))
    loss(logits="scaled").check_classifier(model(head="cosine", scale=30.0))
    # No number of float32.
    loss(logits="scaled", scale=0.1).check_classifier(model(head="cosine", scale=0.1))
    message = r"needs a cosine classifier, and the model has linear.*\{head: cosine, scale: 1.0\}"
    with pytest.raises(UsageError, match=message):
        loss().check_classifier(model())
    with pytest.raises(UsageError, match=r"has cosine \(scale: 16.0, .*scale: 30.0\}"):
        loss(logits="scaled").check_classifier(model(head="cosine", scale=16.0))


@pytest.mark.parametrize(
    ("name", "options", "biased"),
    [
        ("focal", {"form": "sigmoid"}, True),
        ("class_balanced", {"form": "focal"}, True),
        ("class_balanced", {"form": "sigmoid"}, True),
        ("class_balanced_focal", {}, True),
        ("deferred_reweighting", {"loss": "class_balanced_focal"}, True),
        ("focal", {}, False),
        ("class_balanced", {}, False),
        ("class_balanced_focal", {"form": "softmax"}, False),
        ("deferred_reweighting", {}, False),
    ],
)
def test_a_sigmoid_starts_at_one_in_c(name, options, biased):
    model = timm_lt.create_model("test_resnet", num_classes=5)
    before = model.fc.bias.tolist()
    start_classifier(create_loss(name, COUNTS, **options), model, 5)
    # Sigmoid of -log 4 is 1/5.
    expected = [-math.log(4)] * 5 if biased else before
    assert model.fc.bias.tolist() == pytest.approx(expected)


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("inverse_frequency", {"exponent": -1}, r"exponent must be a number in \[0, inf\)"),
        ("inverse_frequency", {"normalization": "sum"}, "'sum'.*choose one of: batch, weights"),
        ("class_balanced", {"beta": 1}, r"beta must be a number in \[0, 1\), got 1"),
        ("class_balanced", {"gamma": 1}, "gamma only applies with form='focal'"),
        ("class_balanced", {"form": "relu"}, "choose one of: softmax, sigmoid, focal"),
        ("class_balanced_focal", {"probability": "weighted"}, "only applies with form='softmax'"),
        ("focal", {"gamma": -1}, "gamma must be a number"),
        ("focal", {"form": "focal"}, "choose one of: softmax, sigmoid"),
        ("ldam", {"max_margin": -0.1}, "max_margin must be a number"),
        ("ldam", {"scale": 0}, r"scale must be a number in \(0, inf\)"),
        ("ldam", {"logits": "raw"}, "choose one of: cosine, scaled"),
        ("label_aware_smoothing", {"head": 1}, r"head must be a number in \[0, 1\)"),
        ("label_aware_smoothing", {"tail": 0.4}, "head must be .* got 0.3"),
        ("label_aware_smoothing", {"shape": "exp"}, "choose one of: concave, linear, convex"),
        ("seesaw", {"min_probability": 1}, r"min_probability must be a number in \[0, 1\)"),
        ("deferred_reweighting", {"start": -1}, "start must be an integer >= 0"),
        (
            "deferred_reweighting",
            {"start": 160.0},
            r"start, an epoch .* must be a number in \(0, 1\)",
        ),
        ("deferred_reweighting", {"start": 1.5}, r"fraction of the epochs, must be .*\(0, 1\)"),
        ("deferred_reweighting", {"loss": "CE"}, "unknown loss 'CE'"),
        ("deferred_reweighting", {"loss": ["ldam"]}, r"unknown loss \['ldam'\]"),
        ("deferred_reweighting", {"loss_options": 5}, "loss_options must be a mapping.*got 5"),
        ("deferred_reweighting", {"loss_options": {"tau": 1}}, "has no option 'tau'"),
        ("deferred_reweighting", {"loss_options": {"reduction": "sum"}}, "reduction is set"),
        (
            "deferred_reweighting",
            {"loss_options": {"normalization": "batch"}},
            "normalization is set by Deferred",
        ),
        ("deferred_reweighting", {"exponent": 1}, "exponent only applies"),
        ("deferred_reweighting", {"weights": "inverse_frequency", "beta": 0}, "beta only applies"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_loss(name, COUNTS, **options)


@pytest.mark.parametrize(
    "name", ["inverse_frequency", "class_balanced", "ldam", "seesaw", "deferred_reweighting"]
)
def test_empty_classes_are_refused(name):
    with pytest.raises(UsageError, match="1 of 2 classes have no training image: 1"):
        create_loss(name, [3, 0])
