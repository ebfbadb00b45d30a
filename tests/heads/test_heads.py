"""Heads: a contract that every registered head keeps, and each formula against a naive loop."""

import copy
import io
import json
import math
import pickle  # noqa: TID251
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import HEAD_OPTIONS, fill, usable_head
from torch import nn

from timm_lt.heads import HEADS, Head, create_head, head_option_names, list_heads, register_head
from timm_lt.utils.checks import UsageError

NEED_A_FIT = ["ncm", "lws", "logit_adjusted", "fslwf", "oltr"]
every_head = pytest.mark.parametrize("name", list_heads())


@pytest.fixture
def features():
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(1))


def usable(name):
    return usable_head(name, **HEAD_OPTIONS[name])


def f64(tensor):
    return tensor.detach().double().numpy()


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # noqa: TID251


# ---- the contract --------------------------------------------------------------------------------


@every_head
def test_forward_is_linear_of_transform_and_effective(name, features):
    head = usable(name)
    weight, bias = head.effective()
    expected = f64(head.transform(features)) @ f64(weight).T + (0 if bias is None else f64(bias))
    np.testing.assert_allclose(f64(head(features)), expected, rtol=1e-5, atol=1e-5)
    stacked = head(features.view(5, 10, 6)).view(50, 4)
    np.testing.assert_allclose(f64(stacked), expected, rtol=1e-5, atol=1e-5)


@every_head
def test_copies_and_pickles_compute_the_same(name, features):
    head = usable(name)
    head.selection = {"split": "val"}
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), saved_and_loaded(head)):
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
def test_options_and_state_create_the_head_again(name, features):
    head = usable(name)
    options = json.loads(json.dumps(head.options(), allow_nan=False))
    assert options == HEAD_OPTIONS[name]
    extra = {"logit_adjusted": {"class_counts"}}.get(name, set())
    assert set(head_option_names(name)) == {*options, *extra}
    again = create_head(name, 6, 4, **options)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(features), head(features))
    shown = [f"{key}={value!r}" for key, value in options.items()]
    assert all(part in repr(again) for part in ["in_features=6, out_features=4", *shown])
    state = set(head.state_dict())
    assert {"weight", "bias", *head.own_state, *head.fitted_state} <= state
    assert set(head.fixed_options) <= set(options)


@every_head
def test_from_classifier_copies_weight_and_bias(name):
    torch.manual_seed(0)
    classifier = nn.Linear(6, 4).eval()
    state = torch.get_rng_state()
    head = HEADS[name].from_classifier(classifier, **HEAD_OPTIONS[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(head.weight, classifier.weight)
    assert torch.equal(head.bias, classifier.bias)
    assert head.weight.data_ptr() != classifier.weight.data_ptr()
    assert not head.training
    assert HEADS[name].from_classifier(nn.Linear(6, 4, bias=False)).bias is None


@every_head
def test_unused_and_frozen_parameters_require_no_gradient(name, features):
    head = usable(name)
    if any(p.requires_grad for p in head.parameters()):
        head(features).square().sum().backward()
    for key, parameter in head.named_parameters():
        got = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert got == parameter.requires_grad, key


@every_head
def test_uses_bias_says_whether_the_logits_depend_on_it(name, features):
    for head in (usable_head(name), usable(name)):
        before = head(features)
        with torch.no_grad():
            head.bias.add_(3)
        assert torch.equal(before, head(features)) != head.uses_bias


@every_head
def test_a_head_that_needs_a_fit_raises_until_it_is_fitted(name, features):
    head = create_head(name, 6, 4)
    assert head.is_fitted() == (name not in NEED_A_FIT)
    if name in NEED_A_FIT:
        for use in (lambda: head(features), head.fold, head.check_fitted):
            with pytest.raises(UsageError, match=f"'{name}'") as caught:
                use()
            cure = "class_counts=" if name == "logit_adjusted" else f"fit_head('{name}'"
            assert cure in str(caught.value)
        # State that is saved and loaded without a fit is still not fitted.
        other = usable_head(name)
        other.load_state_dict(head.state_dict())
        assert not other.is_fitted()
    fill(head).check_fitted()
    assert head(features).isfinite().all()


@every_head
@torch.no_grad()
def test_a_low_rank_update_can_be_merged_into_heads_with_unchanged_weights(name, features):
    head, update = usable(name), torch.randn(4, 2) @ torch.randn(2, 6)
    trained = head(features) + features @ update.T
    head.weight += update
    same = torch.allclose(head(features), trained, atol=1e-4)
    # As docs/choose-a-head.md says of LoRA.
    assert same == (name in ("linear", "crt", "logit_adjusted"))


@every_head
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_has_the_logits_up_to_rounding(name, dtype, features):
    head, x = usable(name).to(dtype), features.to(dtype)
    exact = copy.deepcopy(head).double()(x.double())
    found = head(x)
    assert found.dtype is dtype
    assert (found.double() - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("name", [name for name in list_heads() if name not in ("oltr", "crt")])
def test_torch_export_keeps_the_logits(name, features):
    head = usable(name)
    exported = torch.export.export(head, (features,))
    torch.testing.assert_close(exported.module()(features), head(features))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosin", {}, r"unknown head 'cosin' \(did you mean 'cosine'\?\).*lws"),
        ("crt", {"bogus": 1}, "head 'crt' has no option 'bogus'; valid options: none"),
        ("tau_norm", {"tau": -0.1}, r"tau must be a number in \[0, inf\), got -0.1"),
        ("tau_norm", {"keep_bias": "false"}, "keep_bias must be true or false, got 'false'"),
        ("lws", {"scale_bias": 1}, "scale_bias must be true or false, got 1"),
        ("cosine", {"scale": 0}, r"scale must be a number in \(0, inf\), got 0"),
        ("logit_adjusted", {"class_counts": [1, 2]}, "class_counts has 2 classes, expected 4"),
        ("logit_adjusted", {"class_counts": [1, 2, 0, 4]}, "1 of 4 classes have no training image"),
        ("ncm", {"metric": "l2"}, "unknown metric of head 'ncm' 'l2'.*cosine, euclidean"),
        ("ncm", {"features": "cl2n"}, "unknown features of head 'ncm'.*raw, l2, centered_l2"),
    ],
)
def test_wrong_values_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_head(name, 6, 4, **options)


def test_a_registered_head_is_a_head_like_the_others(features):
    try:

        @register_head("scaled")
        class Scaled(Head):
            def __init__(self, *size, factor=2):
                super().__init__(*size)
                self.factor = factor

            def effective(self):
                return self.factor * self.weight, None

        head = create_head("scaled", 6, 4, factor=3)
        assert head.kind == "scaled"
        assert head.options() == {"factor": 3}
        assert torch.allclose(head(features), 3 * features @ head.weight.T, atol=1e-6)
        with pytest.raises(UsageError, match="'scaled' is registered already"):
            register_head("scaled")
    finally:
        HEADS._parts.pop("scaled", None)


# ---- effective weights are cached in evaluation mode ---------------------------------------------


def uncached_logits(head, features):
    other = create_head(head.kind, head.in_features, head.out_features, **head.options())
    other.load_state_dict(head.state_dict())
    return other.to(head.weight.dtype).eval()(features)


@every_head
def test_evaluation_computes_the_effective_weights_once(name, features, monkeypatch):
    head = usable(name)
    expected = head.train()(features).detach()
    calls, effective = [], type(head).effective
    monkeypatch.setattr(type(head), "effective", lambda self: calls.append(self) or effective(self))
    head.eval()
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(head(features), expected)
    assert len(calls) == 1
    # A cache made in inference mode can be used with gradients.
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


def replace_data_twice(head):
    # Without a reference to the first memory, the second could have its address.
    head.weight.data = head.weight.data + 1
    head.weight.data = head.weight.data - 3


def load_state(head, **options):
    state = {key: value + 1 for key, value in head.state_dict().items()}
    head.load_state_dict(state, **options)


CHANGES = {
    "in place": lambda head: head.weight.add_(1),
    "a row": lambda head: head.weight[2].zero_(),
    "optimizer": sgd_step,
    "another parameter": lambda head: setattr(head, "weight", nn.Parameter(head.weight + 1)),
    "other data": replace_data_twice,
    "loading": load_state,
    "loading by assignment": lambda head: load_state(head, assign=True),
    "type": lambda head: head.double(),
    "data in place, then eval": lambda head: (head.weight.data.add_(1), head.eval()),
}


@every_head
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_at_once(name, change, features):
    head = usable(name)
    with torch.no_grad():
        before = head(features)
        assert torch.equal(head(features), before)
        CHANGES[change](head)
        values = features.to(head.weight.dtype)
        assert torch.equal(head(values), uncached_logits(head, values))
        assert change == "type" or not torch.equal(head(values), before)


def test_a_changed_option_or_buffer_is_noticed_at_once(features):
    head, ncm = usable_head("tau_norm", tau=0.5), usable_head("ncm", features="centered_l2")
    with torch.no_grad():
        head(features)
        head.tau = 1.5
        assert torch.equal(head(features), usable_head("tau_norm", tau=1.5)(features))
        before = ncm(features)
        ncm.feature_mean.add_(1)
        assert not torch.equal(ncm(features), before)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_of_a_fused_optimizer_is_noticed(optimizer, features):
    head = usable_head("tau_norm", tau=0.5)
    with torch.no_grad():
        before = head(features)
    step = optimizer(head.parameters(), lr=0.5, fused=True)
    head(features).square().sum().backward()
    step.step()
    with torch.no_grad():
        assert torch.equal(head(features), uncached_logits(head, features))
        assert not torch.equal(head(features), before)


@pytest.fixture
def tau_norm():
    return usable_head("tau_norm", tau=0.5)


@torch.no_grad()
def test_a_parametrised_weight_is_not_cached(features, tau_norm):
    torch.nn.utils.parametrizations.weight_norm(tau_norm)
    before = tau_norm(features)
    tau_norm.parametrizations.weight.original0.mul_(4)
    torch.testing.assert_close(tau_norm(features), 2 * before)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")
@torch.no_grad()
def test_tracing_leaves_no_placeholder_behind(features, tau_norm):
    graph = torch.fx.symbolic_trace(tau_norm)
    logits = tau_norm(features)
    assert type(logits) is torch.Tensor
    torch.testing.assert_close(graph(features), logits)
    torch.testing.assert_close(torch.jit.trace(tau_norm, features)(features), logits)


@torch.no_grad()
def test_heads_work_under_functional_transforms(features, tau_norm):
    def call(parameters, x):
        return torch.func.functional_call(tau_norm, parameters, (x,))

    before, weight = tau_norm(features), tau_norm.weight
    doubled = call({"weight": 2 * weight, "bias": tau_norm.bias}, features)
    torch.testing.assert_close(doubled, 2**0.5 * before)
    assert torch.equal(tau_norm(features), before)
    stacked = {"weight": torch.stack([weight, 2 * weight])}
    both = torch.func.vmap(call, in_dims=(0, None))(stacked, features)
    torch.testing.assert_close(both, torch.stack([before, 2**0.5 * before]))
    assert torch.equal(tau_norm(features), before)


@torch.no_grad()
def test_another_view_of_the_same_memory_is_another_weight():
    head, x = usable_head("tau_norm", 4, 4, tau=0.5), torch.eye(4)
    head(x)
    turned = torch.func.functional_call(head, {"weight": head.weight.T}, (x,))
    torch.testing.assert_close(turned, head.weight / head.weight.norm(dim=0) ** 0.5)


@torch.inference_mode()
def test_a_head_created_in_inference_mode_works(features):
    head = usable_head("tau_norm", tau=0.5)
    before = head(features)
    head.weight.mul_(4)
    torch.testing.assert_close(head(features), 2 * before)


# ---- folding -------------------------------------------------------------------------------------

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


def test_heads_that_are_not_linear_in_the_features_refuse_to_fold():
    # tests/fitting/test_oltr.py has the other one.
    assert {name for name, _, _ in FOLDS} | {"oltr"} == set(list_heads())
    for space in ("l2", "centered_l2"):
        with pytest.raises(UsageError, match=f"features='{space}'.*cannot be folded"):
            usable_head("ncm", metric="euclidean", features=space).fold()


# ---- formulas, each against a loop in float64 ----------------------------------------------------


def dot(x, w):
    return sum(a * b for a, b in zip(x, w, strict=True))


def length(x):
    return math.sqrt(dot(x, x))


def ncm(x, w, s):
    x = x - s.feature_mean if s.features == "centered_l2" else x
    x = x if s.features == "raw" else x / length(x)
    if s.metric == "cosine":
        return dot(x, w) / length(x) / length(w)
    return -(length(x - w) ** 2)


def cosine(x, w, s):
    return s.scale * dot(x, w) / length(x) / length(w)


# The logit of a feature x and a class with weight w and state s.
FORMULAS = {
    "crt": lambda x, w, s: dot(x, w) + s.bias,
    "tau_norm": lambda x, w, s: dot(x, w) / length(w) ** s.tau + s.keep_bias * s.bias,
    "lws": lambda x, w, s: s.scale * dot(x, w) + s.bias * (s.scale if s.scale_bias else 1),
    "logit_adjusted": lambda x, w, s: dot(x, w) + s.bias - s.tau * s.log_prior,
    "ncm": ncm,
    "cosine": cosine,
    "fslwf": cosine,
}
CASES = [
    ("crt", {}),
    *(("tau_norm", {"tau": tau, "keep_bias": tau > 0.5}) for tau in (0.0, 0.5, 2.0, 8.0)),
    *(("lws", {"scale_bias": flag}) for flag in (True, False)),
    ("logit_adjusted", {"tau": 1.5}),
    *(
        ("ncm", {"metric": metric, "features": space})
        for metric in ("cosine", "euclidean")
        for space in ("raw", "l2", "centered_l2")
    ),
    ("cosine", {"scale": 7.0}),
    ("fslwf", {}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_formula(name, options, features):
    head = usable_head(name, **options).double()
    state = {key: f64(value) for key, value in head.state_dict().items()}
    by_class = [SimpleNamespace(**head.options()) for _ in range(4)]
    for c, s in enumerate(by_class):
        for key, value in state.items():
            setattr(s, key, value[c] if len(value.shape) and len(value) == 4 else value)
    expected = np.array([[FORMULAS[name](x, s.weight, s) for s in by_class] for x in f64(features)])
    found = f64(head(features.double()))
    if options.get("metric") == "euclidean":
        # The negative squared distances, up to a term that all classes share.
        found, expected = found - found[:, :1], expected - expected[:, :1]
    np.testing.assert_allclose(found, np.squeeze(expected), rtol=1e-6, atol=1e-9)


def test_only_the_scale_of_lws_learns():
    head = usable_head("lws")
    assert [name for name, p in head.named_parameters() if p.requires_grad] == ["scale"]


@pytest.mark.parametrize("tau", [0.0, 0.5, 8.0])
def test_tau_norm_of_a_zero_row_is_zero(tau, features):
    head = usable_head("tau_norm", tau=tau)
    expected = head(features).detach()
    expected[:, 2] = 0
    with torch.no_grad():
        head.weight[2] = 0
    assert torch.equal(head(features), expected)
    head(features).sum().backward()
    assert head.weight.grad.isfinite().all()


def test_identities_with_the_joint_classifier(features):
    linear = usable_head("linear")

    def made(name, **options):
        return fill(HEADS[name].from_classifier(linear, **options))

    assert torch.equal(made("tau_norm", tau=0.0)(features), F.linear(features, linear.weight))
    with_bias = made("tau_norm", tau=0.0, keep_bias=True)
    assert torch.equal(with_bias(features), linear(features))
    norms = made("tau_norm", tau=1.0).effective()[0].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(4))
    ones = made("lws")
    torch.nn.init.ones_(ones.scale)
    assert torch.equal(ones(features), linear(features))
    zero = HEADS["logit_adjusted"].from_classifier(linear, tau=0.0, class_counts=[50, 20, 7, 3])
    assert torch.equal(zero(features), linear(features))
    balanced = HEADS["logit_adjusted"].from_classifier(linear, class_counts=torch.full((4,), 9))
    assert torch.equal(balanced(features).argmax(1), linear(features).argmax(1))


def test_cosine_options_follow_a_learned_scale():
    head = usable_head("cosine", scale=7.0, learn_scale=True)
    assert head.scale.requires_grad
    torch.nn.init.constant_(head.scale, 3.25)
    assert head.options() == {"scale": 3.25, "learn_scale": True}


def test_the_log_prior_is_that_of_the_class_counts(features):
    counts = [50, 20, 7, 3]
    head = create_head("logit_adjusted", 6, 4, bias=False, class_counts=counts)
    by_hand = [math.log(count / 80) for count in counts]
    assert head.log_prior.tolist() == pytest.approx(by_hand)
    expected = features @ head.weight.T - torch.tensor(by_hand)
    torch.testing.assert_close(head(features), expected)
