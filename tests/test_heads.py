"""Heads: a contract that every registered head keeps, and each formula against a naive loop."""

import copy
import io
import json
import math
import pickle  # noqa: TID251

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import HEAD_OPTIONS, fill, usable_head
from torch import nn

from timm_lt.heads import (
    HEADS,
    Head,
    as_joint,
    classifier_name,
    create_head,
    fold_head,
    get_head,
    head_option_names,
    list_heads,
    log_prior,
    register_head,
    set_head,
)
from timm_lt.heads.attach import statistics_of
from timm_lt.utils.checks import UsageError

NEED_A_FIT = ["ncm", "lws", "logit_adjusted", "fslwf", "oltr"]
every_head = pytest.mark.parametrize("name", list_heads())


@pytest.fixture
def features():
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(1))


def small_model(num_classes=4):
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=num_classes).eval()


def f64(tensor):
    return tensor.detach().double().numpy()


# ---- the contract -------------------------------------------------------------------------------


def test_the_heads_are_listed_and_have_test_options():
    assert sorted(list_heads()) == sorted(HEAD_OPTIONS)


@every_head
def test_forward_is_linear_of_transform_and_effective(name, features):
    head = usable_head(name, **HEAD_OPTIONS[name])
    weight, bias = head.effective()
    expected = f64(head.transform(features)) @ f64(weight).T
    if bias is not None:
        expected = expected + f64(bias)
    np.testing.assert_allclose(f64(head(features)), expected, rtol=1e-5, atol=1e-5)


@every_head
def test_state_dict_round_trip(name, features):
    head = usable_head(name, **HEAD_OPTIONS[name])
    other = create_head(name, 6, 4, **HEAD_OPTIONS[name])
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(features), head(features))
    assert {"weight", "bias"} <= set(head.state_dict())


@every_head
def test_copies_and_pickles_compute_the_same(name, features):
    head = usable_head(name, **HEAD_OPTIONS[name])
    head.selection = {"split": "val"}
    saved = io.BytesIO()
    torch.save(head, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)  # noqa: TID251
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), loaded):
        assert type(twin) is type(head)
        assert twin.options() == head.options()
        assert twin.selection == head.selection
        assert torch.equal(twin(features), head(features))
        flags = [p.requires_grad for p in head.parameters()]
        assert [p.requires_grad for p in twin.parameters()] == flags
        with torch.no_grad():
            twin.weight.add_(1)
        assert not torch.equal(twin.weight, head.weight)


@every_head
def test_options_create_the_head_again(name, features):
    head = usable_head(name, **HEAD_OPTIONS[name])
    options = json.loads(json.dumps(head.options(), allow_nan=False))
    assert options == HEAD_OPTIONS[name]
    again = create_head(name, 6, 4, **options)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(features), head(features))


@every_head
def test_repr_shows_the_options(name):
    text = repr(create_head(name, 6, 4, **HEAD_OPTIONS[name]))
    assert "in_features=6, out_features=4" in text
    for key, value in HEAD_OPTIONS[name].items():
        assert f"{key}={value!r}" in text


@every_head
def test_option_names_are_those_of_the_class(name):
    extra = {"logit_adjusted": {"class_counts"}}.get(name, set())
    assert set(head_option_names(name)) == {*HEAD_OPTIONS[name], *extra}


@every_head
def test_unknown_option_lists_the_valid_ones(name):
    valid = ", ".join(head_option_names(name)) or "none"
    with pytest.raises(UsageError, match=rf"head '{name}' has no option 'bogus'.*{valid}"):
        create_head(name, 6, 4, bogus=1)
    with pytest.raises(UsageError, match=rf"head '{name}' has no option 'bogus'.*{valid}"):
        HEADS[name].from_classifier(nn.Linear(6, 4), bogus=1)


def test_unknown_head_lists_the_heads():
    with pytest.raises(UsageError, match=r"unknown head 'cosin' \(did you mean 'cosine'\?\).*lws"):
        create_head("cosin", 6, 4)


@every_head
def test_from_classifier_copies_weight_and_bias(name):
    torch.manual_seed(0)
    classifier = nn.Linear(6, 4).eval()
    head = HEADS[name].from_classifier(classifier, **HEAD_OPTIONS[name])
    assert torch.equal(head.weight, classifier.weight)
    assert torch.equal(head.bias, classifier.bias)
    assert head.weight.data_ptr() != classifier.weight.data_ptr()
    assert not head.training
    assert HEADS[name].from_classifier(nn.Linear(6, 4, bias=False)).bias is None


@every_head
def test_unused_and_frozen_parameters_ask_for_no_gradient(name, features):
    head = usable_head(name, **HEAD_OPTIONS[name])
    if any(p.requires_grad for p in head.parameters()):
        head(features).square().sum().backward()
    for key, parameter in head.named_parameters():
        got = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert got == parameter.requires_grad, key


@every_head
@pytest.mark.parametrize("options", [{}, None])
def test_uses_bias_says_whether_the_logits_depend_on_it(name, options, features):
    head = usable_head(name, **(HEAD_OPTIONS[name] if options is None else options))
    before = head(features)
    with torch.no_grad():
        head.bias.add_(3)
    assert torch.equal(before, head(features)) != head.uses_bias


@every_head
def test_own_and_fitted_state_exist(name):
    head = create_head(name, 6, 4)
    assert {*head.own_state, *head.fitted_state} <= set(head.state_dict())
    assert set(head.fixed_options) <= set(head.options())


@every_head
def test_leading_dimensions(name, features):
    head = usable_head(name, **HEAD_OPTIONS[name])
    stacked = head(features.view(5, 10, 6))
    np.testing.assert_allclose(f64(stacked.view(50, 4)), f64(head(features)), rtol=1e-5, atol=1e-6)


@every_head
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_has_the_logits_up_to_rounding(name, dtype, features):
    head, x = usable_head(name, **HEAD_OPTIONS[name]).to(dtype), features.to(dtype)
    exact = copy.deepcopy(head).double()(x.double())
    found = head(x)
    assert found.dtype is dtype
    error = (found.double() - exact).abs().max() / exact.abs().max()
    assert error < 4 * torch.finfo(dtype).eps


@every_head
@torch.no_grad()
def test_ten_thousand_classes(name):
    head = usable_head(name, 8, 10_000, **HEAD_OPTIONS[name])
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(head).double()(x.double())
    assert exact.shape == (3, 10_000)
    torch.testing.assert_close(head(x).double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head(x[:1]), head(x)[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NEED_A_FIT)
def test_unfitted_head_raises_until_it_is_fitted(name, features):
    head = create_head(name, 6, 4)
    assert not head.is_fitted()
    for use in (lambda: head(features), head.fold, head.check_fitted):
        with pytest.raises(UsageError, match=f"'{name}'") as caught:
            use()
        cure = "class_counts=" if name == "logit_adjusted" else f"fit_head('{name}'"
        assert cure in str(caught.value)
    # An unfitted state that was saved and loaded is unfitted still.
    other = usable_head(name)
    other.load_state_dict(head.state_dict())
    assert not other.is_fitted()
    fill(head)
    head.check_fitted()
    assert head(features).isfinite().all()


@pytest.mark.parametrize("name", [n for n in HEAD_OPTIONS if n not in NEED_A_FIT])
def test_other_heads_work_at_once(name, features):
    assert create_head(name, 6, 4)(features).isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tau_norm", {"tau": -0.1}, r"tau must be a number in \[0, inf\), got -0.1"),
        ("tau_norm", {"tau": math.nan}, "tau must be a number"),
        ("tau_norm", {"tau": "1"}, "tau must be a number"),
        ("tau_norm", {"keep_bias": "false"}, "keep_bias must be true or false, got 'false'"),
        ("lws", {"scale_bias": 1}, "scale_bias must be true or false, got 1"),
        ("cosine", {"scale": 0}, r"scale must be a number in \(0, inf\), got 0"),
        ("cosine", {"learn_scale": "no"}, "learn_scale must be true or false"),
        ("logit_adjusted", {"tau": -1}, "tau must be a number"),
        ("logit_adjusted", {"class_counts": [1, 2]}, "class_counts has 2 classes, expected 4"),
        (
            "logit_adjusted",
            {"class_counts": [1, 2, 0, 4]},
            "1 of 4 classes have no training image: 2",
        ),
        ("ncm", {"metric": "l2"}, "unknown metric of head 'ncm' 'l2'.*cosine, euclidean"),
        ("ncm", {"features": "cl2n"}, "unknown features of head 'ncm'.*raw, l2, centered_l2"),
    ],
)
def test_wrong_values_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_head(name, 6, 4, **options)


def test_a_registered_head_is_a_head_like_the_others(features):
    try:

        @register_head("doubled")
        class Doubled(Head):
            def effective(self):
                return 2 * self.weight, None

        head = create_head("doubled", 6, 4)
        assert head.kind == "doubled"
        assert torch.allclose(head(features), 2 * features @ head.weight.T, atol=1e-6)
        with pytest.raises(UsageError, match="'doubled' is registered already"):
            register_head("doubled")
    finally:
        HEADS._parts.pop("doubled", None)


# ---- effective weights are kept in evaluation mode ----------------------------------------------


def counted(head, monkeypatch):
    calls, effective = [], type(head).effective
    monkeypatch.setattr(type(head), "effective", lambda self: calls.append(self) or effective(self))
    return calls


def fresh_logits(head, features):
    """What a head that has never computed anything says."""
    other = create_head(head.kind, head.in_features, head.out_features, **head.options())
    other.load_state_dict(head.state_dict())
    return other.to(head.weight.dtype).eval()(features)


@every_head
def test_evaluation_computes_the_effective_weights_once(name, features, monkeypatch):
    head = usable_head(name, **HEAD_OPTIONS[name])
    expected = head.train()(features).detach()
    calls = counted(head.eval(), monkeypatch)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(head(features), expected)
    assert len(calls) == 1
    # What was kept in inference mode can be used where gradients are wanted.
    given = features.clone().requires_grad_()
    for parameter in head.parameters():
        parameter.requires_grad_(False)
    head(given).sum().backward()
    assert given.grad.abs().sum() > 0
    assert len(calls) == 1
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(twin(features), expected)
    assert len(calls) == 3


def sgd_step(head):
    head.weight.requires_grad_(True).grad = torch.ones_like(head.weight)
    torch.optim.SGD([head.weight], lr=0.5).step()
    head.weight.requires_grad_(False)


def replace_weight(head):
    head.weight = nn.Parameter(head.weight + 1)


def replace_weight_twice(head):
    # Without hold on the first memory, the second could come to lie there.
    head.weight.data = head.weight.data + 1
    head.weight.data = head.weight.data - 3


def load_state(head):
    head.load_state_dict({key: value + 1 for key, value in head.state_dict().items()})


CHANGES = {
    "in place": lambda head: head.weight.add_(1),
    "a row": lambda head: head.weight[2].zero_(),
    "optimizer": sgd_step,
    "another parameter": replace_weight,
    "other data": replace_weight_twice,
    "loading": load_state,
    "loading by assignment": lambda head: head.load_state_dict(
        {key: value + 1 for key, value in head.state_dict().items()}, assign=True
    ),
    "type": lambda head: head.double(),
    "data in place, then eval": lambda head: (head.weight.data.add_(1), head.eval()),
}


@every_head
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_once(name, change, features):
    head = usable_head(name, **HEAD_OPTIONS[name])
    with torch.no_grad():
        before = head(features)
        assert torch.equal(head(features), before)
        CHANGES[change](head)
        values = features.to(head.weight.dtype)
        assert torch.equal(head(values), fresh_logits(head, values))
        assert change == "type" or not torch.equal(head(values), before)


def test_a_changed_option_or_state_is_seen_at_once(features):
    head = usable_head("tau_norm", tau=0.5)
    with torch.no_grad():
        head(features)
        head.tau = 1.5
        assert torch.equal(head(features), usable_head("tau_norm", tau=1.5)(features))
        lws = usable_head("lws")
        before = lws(features)
        lws.scale[1] *= 2
        assert torch.allclose(lws(features)[:, 1], 2 * before[:, 1])
        ncm = usable_head("ncm", features="centered_l2")
        before = ncm(features)
        ncm.feature_mean.add_(1)
        assert not torch.equal(ncm(features), before)


def test_gradients_in_evaluation_mode_reach_the_weight(features):
    head = usable_head("tau_norm", tau=0.5)
    with torch.no_grad():
        head(features)
    head(features).sum().backward()
    assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_of_a_fused_optimizer_is_seen(optimizer, features):
    head = usable_head("tau_norm", tau=0.5)
    with torch.no_grad():
        before = head(features)
    step = optimizer(head.parameters(), lr=0.5, fused=True)
    head(features).square().sum().backward()
    step.step()
    with torch.no_grad():
        assert torch.equal(head(features), fresh_logits(head, features))
        assert not torch.equal(head(features), before)


def test_a_parametrised_weight_is_computed_anew(features):
    head = usable_head("tau_norm", tau=0.5)
    torch.nn.utils.parametrizations.weight_norm(head)
    with torch.no_grad():
        before = head(features)
        head.parametrizations.weight.original0.mul_(4)
        torch.testing.assert_close(head(features), 2 * before)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")
def test_tracing_leaves_no_placeholder_behind(features):
    head = usable_head("tau_norm", tau=0.5)
    with torch.no_grad():
        graph = torch.fx.symbolic_trace(head)
        logits = head(features)
        assert type(logits) is torch.Tensor
        torch.testing.assert_close(graph(features), logits)
        torch.testing.assert_close(torch.jit.trace(head, features)(features), logits)


def test_heads_work_under_functional_transforms(features):
    head = usable_head("tau_norm", tau=0.5)
    with torch.no_grad():
        before = head(features)
        doubled = {"weight": 2 * head.weight, "bias": head.bias}
        swapped = torch.func.functional_call(head, doubled, (features,))
        torch.testing.assert_close(swapped, 2**0.5 * before)
        assert torch.equal(head(features), before)
        stacked = {"weight": torch.stack([head.weight, 2 * head.weight])}

        def call(parameters, x):
            return torch.func.functional_call(head, parameters, (x,))

        both = torch.func.vmap(call, in_dims=(0, None))(stacked, features)
        torch.testing.assert_close(both, torch.stack([before, 2**0.5 * before]))
        assert torch.equal(head(features), before)


def test_another_view_of_the_same_memory_is_another_weight():
    head = usable_head("tau_norm", 4, 4, tau=0.5)
    x = torch.eye(4)
    with torch.no_grad():
        head(x)
        turned = torch.func.functional_call(head, {"weight": head.weight.T}, (x,))
        norms = head.weight.norm(dim=0) ** 0.5
        torch.testing.assert_close(turned, head.weight / norms)


def test_a_head_created_in_inference_mode_works(features):
    with torch.inference_mode():
        head = usable_head("tau_norm", tau=0.5)
        before = head(features)
        head.weight.mul_(4)
        torch.testing.assert_close(head(features), 2 * before)


# ---- folding ------------------------------------------------------------------------------------

FOLDS = [
    ("linear", {}, True),
    ("crt", {}, True),
    ("tau_norm", {"tau": 0.7}, True),
    ("tau_norm", {"tau": 1.3, "keep_bias": True}, True),
    ("lws", {}, True),
    ("lws", {"scale_bias": False}, True),
    ("logit_adjusted", {"tau": 1.2}, True),
    ("ncm", {"metric": "euclidean"}, True),
    ("ncm", {"metric": "cosine"}, False),
    ("ncm", {"metric": "cosine", "features": "l2"}, False),
    ("ncm", {"metric": "cosine", "features": "centered_l2"}, False),
    ("cosine", {}, False),
    ("fslwf", {}, False),
]


@pytest.mark.parametrize(("name", "options", "exact"), FOLDS)
def test_fold_gives_a_plain_linear_with_the_same_predictions(name, options, exact, features):
    head = usable_head(name, **options)
    folded = head.fold()
    assert type(folded) is nn.Linear
    assert not folded.training
    logits, expected = folded(features), head(features)
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    assert len(expected.argmax(1).unique()) > 1
    if exact:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_every_head_has_a_fold_test():
    # tests/fitting/test_oltr.py sees that it refuses.
    assert {name for name, _, _ in FOLDS} | {"oltr"} == set(list_heads())


@pytest.mark.parametrize("space", ["l2", "centered_l2"])
def test_ncm_that_is_not_linear_in_the_features_refuses_to_fold(space):
    head = usable_head("ncm", metric="euclidean", features=space)
    with pytest.raises(UsageError, match=f"features='{space}'.*cannot be folded"):
        head.fold()
    model = small_model()
    set_head(model, usable_head("ncm", get_head(model).in_features, metric="euclidean",
                                features=space))  # fmt: skip
    with pytest.raises(UsageError, match="cannot be folded"):
        fold_head(model)
    assert get_head(model).kind == "ncm"


# ---- formulas, each against a loop in float64 ----------------------------------------------------


def loop(features, num_classes, logit):
    rows = f64(features)
    return np.array([[logit(x, c) for c in range(num_classes)] for x in rows])


def close(head, features, expected):
    np.testing.assert_allclose(f64(head.double()(features.double())), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "crt"])
def test_linear_formula(name, features):
    head = usable_head(name)
    w, b = f64(head.weight), f64(head.bias)
    close(head, features, loop(features, 4, lambda x, c: sum(x * w[c]) + b[c]))


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("keep_bias", [False, True])
def test_tau_norm_formula(tau, keep_bias, features):
    head = usable_head("tau_norm", tau=tau, keep_bias=keep_bias)
    w, b = f64(head.weight), f64(head.bias)

    def logit(x, c):
        norm = math.sqrt(sum(v * v for v in w[c]))
        return sum(x * w[c]) / norm**tau + (b[c] if keep_bias else 0)

    close(head, features, loop(features, 4, logit))


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0, 8.0])
def test_tau_norm_of_a_zero_row_is_zero(tau, features):
    head = usable_head("tau_norm", tau=tau)
    with torch.no_grad():
        head.weight[2] = 0
    expected = usable_head("tau_norm", tau=tau)(features)
    expected[:, 2] = 0
    assert torch.equal(head(features), expected)
    head(features).sum().backward()
    assert head.weight.grad.isfinite().all()


def test_tau_norm_identities(features):
    linear = usable_head("linear")
    zero = HEADS["tau_norm"].from_classifier(linear, tau=0.0)
    assert torch.equal(zero(features), F.linear(features, linear.weight))
    with_bias = HEADS["tau_norm"].from_classifier(linear, tau=0.0, keep_bias=True)
    assert torch.equal(with_bias(features), linear(features))
    one = HEADS["tau_norm"].from_classifier(linear, tau=1.0)
    norms = one.effective()[0].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(4))


@pytest.mark.parametrize("scale_bias", [False, True])
def test_lws_formula(scale_bias, features):
    head = usable_head("lws", scale_bias=scale_bias)
    w, b, s = f64(head.weight), f64(head.bias), f64(head.scale)
    if scale_bias:
        expected = loop(features, 4, lambda x, c: s[c] * (sum(x * w[c]) + b[c]))
    else:
        expected = loop(features, 4, lambda x, c: s[c] * sum(x * w[c]) + b[c])
    close(head, features, expected)


def test_lws_trains_its_scale_only():
    head = usable_head("lws")
    assert [name for name, p in head.named_parameters() if p.requires_grad] == ["scale"]


def test_lws_with_scales_of_one_is_linear(features):
    linear = usable_head("linear")
    head = HEADS["lws"].from_classifier(linear)
    torch.nn.init.ones_(head.scale)
    assert torch.equal(head(features), linear(features))


def space(x, features, mean):
    if features == "centered_l2":
        x = x - mean
    return x if features == "raw" else x / math.sqrt(sum(v * v for v in x))


@pytest.mark.parametrize("kind", ["raw", "l2", "centered_l2"])
def test_ncm_with_cosine_is_the_cosine_to_the_class_means(kind, features):
    head = usable_head("ncm", metric="cosine", features=kind)
    m, mean = f64(head.weight), f64(head.feature_mean)

    def cosine(x, c):
        z = space(x, kind, mean)
        return sum(z * m[c]) / math.sqrt(sum(z * z)) / math.sqrt(sum(m[c] * m[c]))

    close(head, features, loop(features, 4, cosine))


@pytest.mark.parametrize("kind", ["raw", "l2", "centered_l2"])
def test_ncm_with_euclidean_orders_classes_by_distance(kind, features):
    head = usable_head("ncm", metric="euclidean", features=kind)
    m, mean = f64(head.weight), f64(head.feature_mean)
    distance = loop(features, 4, lambda x, c: sum((space(x, kind, mean) - m[c]) ** 2))
    logits = f64(head.double()(features.double()))
    # The logits are the negative squared distances but for a term that all classes share.
    differences = logits - logits[:, :1]
    np.testing.assert_allclose(differences, -(distance - distance[:, :1]), atol=1e-6)
    assert (logits.argmax(1) == distance.argmin(1)).all()


@pytest.mark.parametrize("learn_scale", [False, True])
def test_cosine_formula(learn_scale, features):
    head = usable_head("cosine", scale=7.0, learn_scale=learn_scale)
    w = f64(head.weight)

    def logit(x, c):
        return 7 * sum(x * w[c]) / math.sqrt(sum(x * x)) / math.sqrt(sum(w[c] * w[c]))

    assert head.scale.requires_grad is learn_scale
    close(head, features, loop(features, 4, logit))


def test_fslwf_formula(features):
    head = usable_head("fslwf")
    w, scale = f64(head.weight), f64(head.scale)[0]

    def logit(x, c):
        return scale * sum(x * w[c]) / math.sqrt(sum(x * x)) / math.sqrt(sum(w[c] * w[c]))

    close(head, features, loop(features, 4, logit))


def test_cosine_options_follow_a_learned_scale():
    head = usable_head("cosine", scale=7.0, learn_scale=True)
    torch.nn.init.constant_(head.scale, 3.25)
    assert head.options() == {"scale": 3.25, "learn_scale": True}


def test_logit_adjusted_formula(features):
    counts = [50, 20, 7, 3]
    head = usable_head("linear")
    w, b = f64(head.weight), f64(head.bias)
    adjusted = HEADS["logit_adjusted"].from_classifier(head, tau=1.5, class_counts=counts)

    def logit(x, c):
        return sum(x * w[c]) + b[c] - 1.5 * math.log(counts[c] / sum(counts))

    np.testing.assert_allclose(f64(adjusted(features)), loop(features, 4, logit), rtol=1e-4)
    zero = HEADS["logit_adjusted"].from_classifier(head, tau=0.0, class_counts=counts)
    assert torch.equal(zero(features), head(features))
    no_bias = HEADS["logit_adjusted"](6, 4, False, class_counts=counts)
    expected = features @ no_bias.weight.T - log_prior(counts, 4)
    torch.testing.assert_close(no_bias(features), expected)


def test_logit_adjusted_of_balanced_counts_changes_no_prediction(features):
    linear = usable_head("linear")
    head = HEADS["logit_adjusted"].from_classifier(linear, class_counts=torch.full((4,), 9))
    assert torch.equal(head(features).argmax(1), linear(features).argmax(1))


def test_log_prior_by_hand():
    expected = torch.tensor([0.75, 0.25]).log()
    torch.testing.assert_close(log_prior([3, 1], 2), expected)
    torch.testing.assert_close(log_prior(torch.tensor([300, 100]), 2), expected)


# ---- on a model ---------------------------------------------------------------------------------


@every_head
def test_set_head_keeps_the_kind_through_reset_copy_and_pickle(name):
    model = set_head(small_model(), name, **HEAD_OPTIONS[name])
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)  # noqa: TID251
    ema = timm.utils.ModelEmaV3(model).module
    for twin in (model, copy.deepcopy(model), loaded, ema):
        twin.reset_classifier(7)
        head = get_head(twin)
        assert type(head) is HEADS[name]
        assert head.options() == HEAD_OPTIONS[name]
        assert head.weight.shape == (7, 96)
        assert twin.num_classes == 7
        assert twin(torch.zeros(2, 3, 32, 32)).shape == (2, 7) if head.is_fitted() else True
    # The copies were reset, not the first model through them, and from nothing to something again.
    copied = copy.deepcopy(model)
    copied.reset_classifier(0)
    assert isinstance(copied.get_classifier(), nn.Identity)
    copied.reset_classifier(3)
    assert type(get_head(copied)) is HEADS[name]
    assert get_head(copied).out_features == 3
    assert get_head(model).out_features == 7


def test_reset_classifier_of_a_copy_leaves_the_first_model_alone():
    model = set_head(small_model(), "tau_norm")
    before = get_head(model)
    copy.deepcopy(model).reset_classifier(9)
    assert get_head(model) is before


def test_fold_head_undoes_the_stickiness():
    model = fold_head(set_head(small_model(), "tau_norm", tau=0.5))
    assert type(get_head(model)) is nn.Linear
    model.reset_classifier(5)
    assert type(get_head(model)) is nn.Linear
    plain = get_head(small_model())
    model = small_model()
    assert torch.equal(fold_head(model).get_classifier().weight, plain.weight)


def test_fold_head_keeps_the_predictions_of_the_model():
    model = set_head(small_model(), "tau_norm", tau=0.5)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        torch.testing.assert_close(fold_head(model)(images), before)


FOLDING = {
    **{name: {} for name in list_heads() if name not in ("oltr", "ncm")},
    "tau_norm": {"keep_bias": False},
    "ncm": {"metric": "euclidean"},
}


@pytest.mark.parametrize("name", FOLDING)
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_model_has_the_keys_of_timms(name, bias):
    model = set_head(small_model(), fill(create_head(name, 96, 4, bias=bias, **FOLDING[name])))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        plain = small_model()
        plain.load_state_dict(fold_head(model).state_dict())
        if name in ("cosine", "fslwf"):
            assert plain(images).argmax(1).equal(before.argmax(1))
        else:
            torch.testing.assert_close(plain(images), before, rtol=1e-4, atol=1e-4)


@every_head
def test_a_low_rank_update_can_be_merged_into_heads_that_use_their_weight_as_it_is(name, features):
    head = usable_head(name, **HEAD_OPTIONS[name])
    update = torch.randn(4, 2) @ torch.randn(2, 6)
    with torch.no_grad():
        trained = head(features) + features @ update.T
        head.weight += update
        same = torch.allclose(head(features), trained, atol=1e-4)
    # As docs/choose-a-head.md says of LoRA.
    assert same == (name in ("linear", "crt", "logit_adjusted"))


@pytest.mark.parametrize("name", ["tau_norm", "crt"])
def test_a_folded_model_has_no_bias_where_timms_has_none(name):
    bare = small_model()
    bare.fc = nn.Linear(96, 4, bias=False)
    head = create_head(name, 96, 4)
    nn.init.zeros_(head.bias)
    keys = set(bare.state_dict())
    assert set(fold_head(set_head(bare, head)).state_dict()) == keys


@pytest.mark.parametrize("name", NEED_A_FIT)
def test_set_head_by_name_alone_leaves_it_unfitted(name):
    model = set_head(small_model(), name)
    with pytest.raises(UsageError, match=f"'{name}'"):
        model(torch.zeros(1, 3, 32, 32))


def test_set_head_takes_a_fitted_module_in_the_models_type_and_mode():
    model = small_model().to(torch.bfloat16).train()
    head = usable_head("ncm", 96, 4)
    assert get_head(set_head(model, head)) is head
    assert head.weight.dtype is torch.bfloat16
    assert head.training
    assert model(torch.zeros(2, 3, 32, 32, dtype=torch.bfloat16)).shape == (2, 4)


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (nn.Linear(96, 5), {}, r"the head is \(5, 96\).*classifier 'fc' is \(4, 96\)"),
        (nn.Linear(95, 4), {}, r"\(4, 95\)"),
        (nn.Linear(96, 4), {"tau": 1}, r"options \['tau'\] go with the name of a head"),
        ("tau_nrom", {}, "did you mean 'tau_norm'"),
        ("tau_norm", {"gamma": 1}, "has no option 'gamma'"),
        (None, {}, "a head is a name or an nn.Linear, got NoneType"),
    ],
)
def test_set_head_refuses(head, options, message):
    model = small_model()
    before = get_head(model)
    with pytest.raises(UsageError, match=message):
        set_head(model, head, **options)
    assert get_head(model) is before


def test_a_head_does_not_start_from_class_means():
    model = set_head(small_model(), usable_head("ncm", 96, 4))
    with pytest.raises(UsageError, match="fitted 'ncm' head is not a classifier"):
        set_head(model, "tau_norm")
    # Before it is fitted, it still has the classifier's weight.
    assert get_head(set_head(set_head(small_model(), "ncm"), "tau_norm")).kind == "tau_norm"


def test_a_model_without_a_linear_classifier_is_refused():
    with pytest.raises(UsageError, match="Sequential has no classifier"):
        get_head(nn.Sequential(nn.Linear(3, 2)))
    headless = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(UsageError, match=r"is Identity.*num_classes >= 1"):
        classifier_name(headless)


@pytest.mark.parametrize("wrong", ["fc", None, 3, nn.Linear, (nn.Linear(6, 4), "fc")])
def test_a_classifier_that_is_no_module_is_refused(wrong):
    with pytest.raises(UsageError, match=r"takes a module, such as model\.get_classifier\(\), got"):
        as_joint(wrong)

    class Model(nn.Module):
        def get_classifier(self):
            return wrong[1] if isinstance(wrong, tuple) else wrong

    with pytest.raises(UsageError, match="the classifier of Model is "):
        get_head(Model())


def test_the_classifier_in_a_list_is_found():
    linear = nn.Linear(6, 4)
    for listed in ([linear], (linear,), nn.ModuleList([linear]), [[nn.Sequential(linear)]]):
        assert as_joint(listed) is linear


def test_heads_with_different_statistics_do_not_go_on_one_model():
    model = small_model()
    heads = [usable_head("crt", 96, 4), usable_head("crt", 96, 4), usable_head("ncm", 96, 4)]
    moved = {"bn1.running_mean": torch.arange(32.0), "bn1.running_var": torch.ones(32)}
    for head in heads[:2]:
        head.backbone_statistics = {key: value.clone() for key, value in moved.items()}
    found = statistics_of(heads, model)
    assert list(found) == list(moved)
    assert all(torch.equal(found[key], value) for key, value in moved.items())
    heads[1].backbone_statistics["bn1.running_var"][-1] = 2.0
    with pytest.raises(UsageError, match=r"different batch-norm.*instance bn1\.running_var"):
        statistics_of(heads, model)


def test_a_head_copies_the_classifier():
    classifier = nn.Linear(6, 4)
    joint = HEADS["linear"].from_classifier(classifier)
    assert joint.kind == "linear"
    assert torch.equal(joint.weight, classifier.weight)
    with torch.no_grad():
        joint.weight.zero_()
        assert classifier.weight.abs().sum() > 0


@pytest.mark.parametrize("name", ["tau_norm", "lws", "cosine", "ncm", "logit_adjusted", "fslwf"])
def test_torch_export_keeps_the_logits(name, features):
    head = usable_head(name, **HEAD_OPTIONS[name])
    exported = torch.export.export(head, (features,))
    torch.testing.assert_close(exported.module()(features), head(features))
