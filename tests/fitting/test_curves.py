"""The exact curve of accuracy against tau, against the heads themselves, image by image."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from timm_lt.features import Features
from timm_lt.fitting import curves as intervals
from timm_lt.fitting import fit_head, tau_curve
from timm_lt.fitting.curves import AccuracyCurve, logit_blocks
from timm_lt.heads import HEADS
from timm_lt.metrics import OBJECTIVES, objective_value, shot_accuracy
from timm_lt.utils.checks import UsageError

TAUS = [0.0, 0.013, 0.2, 0.51, 0.9, 1.03, 1.77, 2.4, 3.9]
COUNTS = torch.tensor([500, 120, 40, 21, 6, 2])
NAMES = {"norm": "tau_norm", "prior": "logit_adjusted"}


def classifier_of(weight, bias=None):
    weight = torch.as_tensor(weight)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(torch.as_tensor(bias))
    return linear


def problem(seed=0, n=300, d=8, c=6):
    """Float64 weights with norms that shrink from class to class, and features around them."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(c, d, generator=g, dtype=torch.float64)
    weight *= torch.linspace(1.6, 0.4, c, dtype=torch.float64)[:, None]
    targets = torch.arange(n) % c
    noise = torch.randn(n, d, generator=g, dtype=torch.float64)
    bias = torch.randn(c, generator=g, dtype=torch.float64)
    return classifier_of(weight, bias), Features(weight[targets] + noise, targets)


def right_by_head(name, classifier, features, tau, **options):
    head = HEADS[name].from_classifier(classifier, tau=tau, **options)
    with torch.inference_mode():
        return head(features.values).argmax(1) == features.targets


def right_by_curve(curve, tau):
    return (curve.low <= tau) & (tau <= curve.high)


@pytest.mark.parametrize("tau", TAUS)
def test_every_image_is_right_exactly_where_the_heads_say_so(tau):
    classifier, features = problem()
    norm = tau_curve(classifier, features)
    assert right_by_curve(norm, tau).equal(right_by_head("tau_norm", classifier, features, tau))
    prior = tau_curve(classifier, features, adjust="prior", class_counts=COUNTS)
    expected = right_by_head("logit_adjusted", classifier, features, tau, class_counts=COUNTS)
    assert right_by_curve(prior, tau).equal(expected)
    assert 0 < expected.sum() < len(features)
    assert prior(tau) == expected.double().mean()


def only_negative_logits():
    """Non-negative weights and negative features."""
    classifier, features = problem()
    with torch.no_grad():
        classifier.weight.abs_()
    return classifier, Features(-features.values.abs(), features.targets)


def with_every_label(weight, values):
    classes = len(weight)
    targets = torch.arange(classes).repeat(len(values))
    return classifier_of(weight), Features(values.repeat_interleave(classes, 0), targets)


def zero_rows_and_zero_features():
    weight = torch.tensor([[0.0, 0.0], [3.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]).double()
    values = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, -1.0], [1.0, 1.2], [0.0, -1.0]]).double()
    return with_every_label(weight, values)


def equal_norms_and_equal_rows():
    """Rows of equal norm keep their order at every tau; equal rows go to the lower index."""
    weight = torch.tensor([[3.0, 4.0], [4.0, 3.0], [3.0, 4.0], [0.0, 1.0]]).double()
    g = torch.Generator().manual_seed(0)
    return with_every_label(weight, torch.randint(-3, 4, (30, 2), generator=g).double())


@pytest.mark.parametrize(
    "case", [only_negative_logits, zero_rows_and_zero_features, equal_norms_and_equal_rows]
)
def test_special_logits_are_judged_rightly(case):
    classifier, features = case()
    curve = tau_curve(classifier, features)
    for tau in TAUS:
        expected = right_by_head("tau_norm", classifier, features, tau)
        assert right_by_curve(curve, tau).equal(expected)
        assert expected.any()


def judged_naively(classifier, features, adjust, counts, tau):
    """Returns by how much each label's line is the highest, relative to the logits; float64.

    Written image by image, class by class; NaN if the label is right or wrong by a tie.
    """
    classifier = copy.deepcopy(classifier).double().requires_grad_(False)
    weight, values = classifier.weight, features.values.double()
    margins = []
    for x, target in zip(values, features.targets.tolist(), strict=True):
        scores = []
        for c, w in enumerate(weight):
            if adjust == "norm":
                norm = float((w * w).sum()) ** 0.5
                scores.append(float(w @ x) / (norm or 1.0) ** tau)
            else:
                prior = math.log(float(counts[c]) / float(counts.sum()))
                scores.append(float(w @ x) + float(classifier.bias[c]) - tau * prior)
        others = max(scores[:target] + scores[target + 1 :])
        size = max(abs(others), abs(scores[target]))
        margins.append((scores[target] - others) / size if size else math.nan)
    return torch.tensor(margins)


@pytest.mark.parametrize("adjust", ["norm", "prior"])
@pytest.mark.parametrize("seed", range(3))
def test_float32_is_right_wherever_the_margin_is_above_its_rounding(adjust, seed):
    classifier, features = problem(seed, n=80)
    classifier, features = classifier.float(), Features(features.values.float(), features.targets)
    curve = tau_curve(classifier, features, adjust=adjust, class_counts=COUNTS)
    judged = 0
    for tau in [0.0, 0.11, 0.3, 0.77, 1.0, 1.31, 2.0, 3.3, 5.0, 9.0]:
        margins = judged_naively(classifier, features, adjust, COUNTS, tau)
        clear = margins.abs() > 3e-6
        assert right_by_curve(curve, tau)[clear].equal((margins > 0)[clear])
        judged += int(clear.sum())
    assert judged > 790


def test_norms_that_differ_by_a_rounding_are_not_equal():
    """Two heavier classes: the bound of one is 1 up to rounding, that of the other is 1.2."""
    log_norm = torch.tensor([0.0, 3e-7, 1.0], dtype=torch.float64)
    norms = log_norm.exp().float()
    lead = torch.tensor([0.0, 3e-7, 1.2], dtype=torch.float64).exp().float()
    # The norm of each row lies in the second column, the logit is the first.
    weight = torch.stack([lead / 64, (norms**2 - (lead / 64) ** 2).sqrt()], 1)
    features = Features(torch.tensor([[64.0, 0.0]]), torch.tensor([0]))
    curve = tau_curve(classifier_of(weight), features)
    assert not right_by_curve(curve, 1.15)
    assert right_by_curve(curve, 5.0)
    assert curve.low == pytest.approx(1.2, abs=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_that_differ_by_one_rounding_are_told_apart_at_tau_0(sign):
    base = torch.tensor(1.5)
    steps = [base, torch.nextafter(base, torch.tensor(2.0)), torch.nextafter(base, base - 1), base]
    logits = sign * torch.stack(steps)
    weight = torch.stack([logits, torch.tensor([0.0, 1.0, 2.0, 0.5])], 1)
    features = Features(torch.tensor([[1.0, 0.0]]).expand(4, 2), torch.arange(4))
    for order in (torch.arange(4), torch.tensor([2, 0, 3, 1]), torch.tensor([3, 2, 1, 0])):
        for adjust in ("norm", "prior"):
            classifier = classifier_of(weight[order], torch.zeros(4))
            curve = tau_curve(classifier, features, adjust=adjust, class_counts=COUNTS[:4])
            right = right_by_curve(curve, 0.0)
            assert right.nonzero().tolist() == [[int(logits[order].argmax())]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_ties_at_tau_1_go_to_the_lower_index(dtype, scale):
    """Logits that are as their norms, 1, 4, 2, tie at tau = 1, where all divisions are exact."""
    weight = torch.tensor([[1.0], [4.0], [2.0]], dtype=dtype)
    for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1], [1, 0, 2]):
        features = Features(torch.full((3, 1), scale, dtype=dtype), torch.arange(3))
        classifier = classifier_of(weight[order])
        curve = tau_curve(classifier, features)
        for tau in (0.0, 0.999, 1.0, 1.001, 2.0):
            expected = right_by_head("tau_norm", classifier, features, tau)
            assert right_by_curve(curve, tau).equal(expected)


integers = st.integers(-3, 3)


@pytest.mark.parametrize("adjust", ["norm", "prior"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=60, deadline=None)
@given(
    weight=st.lists(st.lists(integers, min_size=3, max_size=3), min_size=2, max_size=5),
    values=st.lists(st.lists(integers, min_size=3, max_size=3), min_size=1, max_size=6),
    bias=st.lists(integers, min_size=5, max_size=5) | st.none(),
    counts=st.lists(st.integers(1, 3), min_size=5, max_size=5),
    tau=st.sampled_from([0.0, 0.1, 0.37, 0.83, 1.1, 1.9, 2.7]),
)
def test_small_integers_full_of_ties(adjust, dtype, weight, values, bias, counts, tau):
    c = len(weight)
    bias = None if bias is None else torch.tensor(bias[:c], dtype=dtype)
    classifier = classifier_of(torch.tensor(weight, dtype=dtype), bias)
    counts = torch.tensor(counts[:c])
    rows = torch.tensor(values, dtype=dtype)
    features = Features(rows.repeat_interleave(c, 0), torch.arange(c).repeat(len(values)))
    curve = tau_curve(classifier, features, adjust=adjust, class_counts=counts)
    right = right_by_curve(curve, tau).view(len(values), c)
    # Of all labels of an image one is right: no tie is counted twice, or not at all.
    assert (right.sum(1) == 1).all()
    options = {} if adjust == "norm" else {"class_counts": counts}
    head = HEADS[NAMES[adjust]].from_classifier(classifier, tau=tau, **options)
    with torch.inference_mode():
        logits = head(rows)
    # Away from tau 0 a tie is one up to rounding.
    chosen = logits.gather(1, right.int().argmax(1, keepdim=True))[:, 0]
    rounding = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(chosen, logits.amax(1), rtol=rounding, atol=4 * rounding)
    if tau == 0:
        assert right.int().argmax(1).equal(logits.argmax(1))


@pytest.mark.parametrize("adjust", ["norm", "prior"])
@pytest.mark.parametrize("seed", range(3))
def test_best_tau_is_not_beaten_on_a_dense_grid(seed, adjust):
    classifier, features = problem(seed, n=60)
    curve = tau_curve(classifier, features, adjust=adjust, class_counts=COUNTS)

    def accuracy(tau):
        name, options = NAMES[adjust], {} if adjust == "norm" else {"class_counts": COUNTS}
        return right_by_head(name, classifier, features, tau, **options).double().mean()

    best, swept = accuracy(curve.best_tau), max(accuracy(step / 200) for step in range(800))
    # The peak may be narrower than the grid, but the grid comes near it.
    assert swept <= best <= swept + 3 / 60
    assert curve(curve.best_tau) == best


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_is_what_the_heads_have(objective):
    classifier, features = problem(n=100)
    curve = tau_curve(classifier, features, class_counts=COUNTS)
    edges, values = curve.steps(objective)
    for tau in TAUS:
        head = HEADS["tau_norm"].from_classifier(classifier, tau=tau)
        with torch.inference_mode():
            preds = head(features.values).argmax(1)
        report = shot_accuracy(preds, features.targets, COUNTS)
        expected = objective_value(report, objective)
        assert curve(tau, objective=objective) == pytest.approx(expected, abs=1e-12)
        assert float(values[edges <= tau][-1]) == pytest.approx(expected, abs=1e-12)


INF = math.inf


@pytest.mark.parametrize(
    ("low", "high", "best"),
    # The last two: taus beyond 10 are out of reach, and the wider of two best stretches.
    [
        *(([0.0], [INF], 0.5), ([0.0], [1e9], 0.5), ([3.0], [INF], 3.5), ([INF], [-INF], 0.5)),
        *(([1e6], [INF], 0.5), ([0.0, 0.2, 0.5], [1.0, 0.3, 0.9], 0.7)),
    ],
)
def test_best_tau_is_always_a_usable_number(low, high, best):
    best_tau = AccuracyCurve(torch.tensor(low), torch.tensor(high)).best_tau
    assert best_tau == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(("block", "part"), [(1, 2**18), (2**21, 7 * 6), (1, 1)])
def test_blocks_of_a_mapped_file_do_not_show(tmp_path, monkeypatch, block, part):
    classifier, features = problem()
    whole = tau_curve(classifier, features)
    features.values.numpy().tofile(tmp_path / "values")
    size, shape = features.values.numel(), features.values.shape
    mapped = torch.from_file(str(tmp_path / "values"), size=size, dtype=torch.float64).view(shape)
    monkeypatch.setattr(intervals, "BLOCK", block)
    monkeypatch.setattr(intervals, "BLOCK_ROWS", 9)
    monkeypatch.setattr(intervals, "PART", part)
    blocks = list(logit_blocks(mapped, classifier.weight.detach(), None))
    assert len(blocks) == (34 if block == 1 else 1)
    parts = tau_curve(classifier, Features(mapped, features.targets))
    torch.testing.assert_close(parts.low, whole.low)
    torch.testing.assert_close(parts.high, whole.high)


@pytest.mark.parametrize("rule", ["fb", "oltr"])
def test_a_group_has_the_accuracy_that_the_report_gives_it(rule):
    classifier, features = problem()
    given = {"class_counts": torch.tensor([500, 100, 60, 30, 20, 2]), "rule": rule}
    whole = tau_curve(classifier, features, **given)
    with torch.inference_mode():
        preds = HEADS["tau_norm"].from_classifier(classifier, tau=0.7)(features.values).argmax(1)
    report = shot_accuracy(preds, features.targets, *given.values())
    for group in ("many_shot", "medium_shot", "few_shot"):
        curve = tau_curve(classifier, features, group=group, **given)
        assert curve.low.equal(whole.groups[group].low)
        assert curve(0.7) == pytest.approx(getattr(report, group), abs=1e-12)
    counts = torch.tensor([500, 110, 60, 30, 20, 20])
    assert tau_curve(classifier, features, class_counts=counts).groups["few_shot"] is None
    assert tau_curve(classifier, features).groups == {}


def test_one_image_and_one_class():
    features = Features(torch.tensor([[-1.0, 2.0]]), torch.tensor([0]))
    one_class = tau_curve(classifier_of([[1.0, 0.0]]), features)
    assert (one_class.low.tolist(), one_class.high.tolist()) == ([0.0], [math.inf])
    wrong = tau_curve(classifier_of([[1.0, 0.0], [0.0, 1.0]]), features)
    assert wrong.steps()[1].tolist() == [0.0]


def test_very_many_classes():
    g = torch.Generator().manual_seed(0)
    classifier, values = classifier_of(torch.randn(100_000, 3, generator=g)), torch.randn(40, 3)
    taus = (0.0, 0.5, 2.0)
    heads = [HEADS["tau_norm"].from_classifier(classifier, tau=tau) for tau in taus]
    winners = torch.stack([head(values).argmax(1) for head in heads])
    # Each image has the label that wins at one of three taus.
    features = Features(values, winners[torch.arange(40) % 3, torch.arange(40)])
    curve = tau_curve(classifier, features)
    for tau, winner in zip(taus, winners, strict=True):
        assert right_by_curve(curve, tau).equal(winner == features.targets)


def test_half_precision_is_computed_in_float32():
    (classifier, features), dtype = problem(), torch.bfloat16
    half = Features(features.values.to(dtype), features.targets)
    single = Features(half.values.float(), features.targets)
    expected = tau_curve(classifier.to(dtype).float(), single)
    assert tau_curve(classifier.to(dtype), half).low.equal(expected.low)
    assert expected.low.unique().numel() > 20


SHORT = "class_counts has 4 classes, expected 6"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adjust": "nrom"}, "did you mean 'norm'"),
        ({"adjust": "prior"}, "class_counts="),
        ({"group": "few_shot"}, "class_counts="),
        ({"group": "tail", "class_counts": COUNTS}, "many_shot, medium_shot, few_shot"),
        ({"adjust": "prior", "class_counts": COUNTS[:4]}, SHORT),
        ({"group": "few_shot", "class_counts": COUNTS + 50}, "group with images: 'few_shot'"),
        ({}, "weight of class 4 is not finite"),
    ],
)
def test_wrong_options_are_refused(options, message):
    classifier, features = problem()
    classifier.weight.data[4, 2] = math.nan if "finite" in message else 0.0
    with pytest.raises(UsageError, match=message):
        tau_curve(classifier, features, **options)


def test_a_head_whose_weight_is_not_its_classifier_is_refused():
    _, features = problem()
    for_floats = Features(features.values.float(), features.targets)
    ncm = fit_head("ncm", for_floats)
    with pytest.raises(UsageError, match="takes the joint classifier, got a 'ncm' head"):
        tau_curve(ncm, for_floats)
    assert 0 < tau_curve(ncm.fold(), for_floats)(0.0) < 1
