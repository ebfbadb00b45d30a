"""One contract for the fits of all registered heads, then each against an independent solver."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from gaussian_features import (
    COUNTS,
    JOINT,
    TEST,
    TRAIN,
    VAL,
    C,
    D,
    accuracy,
    few_shot,
    fit,
    naive_sgd,
    sklearn_classifier,
    start_of_a_linear_layer,
    tensors,
)
from torch import nn

import timm_lt
from timm_lt.features import Features
from timm_lt.fitting import FITS, check_fit_options, gradient, tau_curve
from timm_lt.fitting.base import register_fit
from timm_lt.fitting.gradient import WEIGHT_DECAYS
from timm_lt.fitting.sgd import solve_linear, train_head
from timm_lt.heads import HEADS, LWSHead, list_heads
from timm_lt.samplers import create_sampler
from timm_lt.utils.checks import UsageError

contract = pytest.mark.parametrize("name", list_heads())


# The contract ------------------------------------------------------------------------------------


def test_every_head_has_a_fit():
    assert set(FITS) == set(list_heads())


@contract
def test_a_fitted_head_beats_chance_and_never_serves_rare_classes_worse(name):
    head = fit(name)
    assert isinstance(head, HEADS[name])
    assert not head.training
    assert accuracy(head) > 0.6
    assert few_shot(head) >= few_shot(fit("linear"))


@contract
def test_a_fit_repeats_exactly_whatever_the_global_random_state(name):
    torch.manual_seed(1)
    first = fit(name, seed=5)
    torch.manual_seed(2)
    second = fit(name, seed=5)
    assert first.options() == second.options()
    assert first.selection == second.selection
    for key, value in tensors(first).items():
        # The bias of a cosine or ncm head without classifier is not used.
        assert value.equal(tensors(second)[key]), key


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("crt", {"solver": "sgd", "steps": 30}),
        ("lws", {}),
        ("cosine", {}),
        ("fslwf", {}),
        ("crt", {}),
    ],
)
def test_the_seed_matters_only_where_batches_are_drawn(name, options):
    one, two = (fit(name, seed=seed, **options) for seed in (0, 1))
    same = all(value.equal(tensors(two)[key]) for key, value in tensors(one).items())
    assert same == (name == "crt" and not options)


@contract
def test_what_is_passed_in_stays_as_it_is(name):
    classifier = copy.deepcopy(JOINT).train()
    classifier.weight.requires_grad_(False)
    before = [value.clone() for value in (classifier.weight, TRAIN.values, COUNTS)]
    head = fit(name, classifier=classifier)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    after = (classifier.weight, TRAIN.values, COUNTS)
    assert all(one.equal(two) for one, two in zip(before, after, strict=True))
    assert classifier.training
    assert not classifier.weight.requires_grad


@contract
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_every_floating_type_give_a_float32_head(name, dtype):
    typed = [Features(f.values.to(dtype), f.targets) for f in (TRAIN, VAL)]
    plain = [Features(f.values.float(), f.targets) for f in typed]
    classifier = copy.deepcopy(JOINT).to(dtype)
    head = fit(name, train=typed[0], val=typed[1], classifier=classifier)
    # Of a model on another device or in another type, it stays there.
    assert classifier.weight.dtype == dtype
    rounded = copy.deepcopy(JOINT).to(dtype).float()
    expected = fit(name, train=plain[0], val=plain[1], classifier=rounded)
    assert head.weight.dtype == torch.float32
    for key, value in tensors(head).items():
        assert value.equal(tensors(expected)[key]), key


@contract
def test_the_head_of_a_classifier_without_bias_can_be_saved_and_loaded(name, tmp_path):
    torch.manual_seed(0)
    model = timm_lt.create_model("test_resnet", num_classes=C)
    joint = nn.Linear(model.num_features, C, bias=False)
    model.fc = joint
    g = torch.Generator().manual_seed(0)
    values = torch.randn(len(TRAIN), model.num_features, generator=g)
    features = Features(values, TRAIN.targets)
    head = fit(name, train=features, val=features, classifier=joint, class_counts=None)
    timm_lt.save_checkpoint(tmp_path, model, heads={name: head}, class_counts=COUNTS)
    loaded = timm_lt.load_head(tmp_path, name, joint)
    with torch.no_grad():
        assert loaded(features.values).equal(head(features.values))


@contract
def test_ten_thousand_classes(name):
    """With a row or two of each, far apart: their means tell them from each other."""
    classes = 10_000
    options = {
        "tau_norm": {"tau": 0.0, "keep_bias": True},
        "logit_adjusted": {"tau": 1.0},
        "lws": {"steps": 2},
        "crt": {"weight_decay": 1e-4, "max_iterations": 1},
        "cosine": {"steps": 2},
        "fslwf": {"base": 2, "steps": 2, "episodes": 2},
        "oltr": {"steps": 2},
    }
    g = torch.Generator().manual_seed(0)
    targets = torch.cat([torch.arange(classes), torch.arange(50)])
    means = 3 * torch.randn(classes, 16, generator=g)
    train = Features(means[targets] + 0.1 * torch.randn(len(targets), 16, generator=g), targets)
    joint = nn.Linear(16, classes)
    with torch.no_grad():
        joint.weight.copy_(means)
        joint.bias.copy_(-means.square().sum(1) / 2)
    given = {"classifier": joint, "class_counts": torch.bincount(targets)}
    head = timm_lt.fit_head(name, train, **given, **options.get(name, {}))
    if name == "oltr":
        # Its classifier starts at random, and two updates show it few of the classes.
        assert head.centroids[50:].equal(train.values[50:classes])
        assert head(train.values[:3]).isfinite().all()
        return
    with torch.no_grad():
        right = head(train.values[::20]).argmax(1) == targets[::20]
    assert right.double().mean() > 0.4


@contract
def test_every_option_has_a_default_and_none_is_unknown(name):
    with pytest.raises(UsageError, match=f"head '{name}' has no option 'tua'.*valid options"):
        fit(name, tua=1)
    check_fit_options(name, {})


# Each fit against something independent ----------------------------------------------------------


def test_linear_is_the_joint_classifier():
    head = fit("linear")
    assert head.weight.equal(JOINT.weight)
    assert head.bias.equal(JOINT.bias)


def naive_ncm(train, test, metric, space):
    """Nearest class mean as its definition says, one row at a time in float64."""

    def unit(x):
        return x / math.sqrt(sum(v * v for v in x))

    rows, labels = train.values.double().numpy(), train.targets.tolist()
    center = sum(rows) / len(rows)

    def into_space(x):
        return {"raw": x, "l2": unit(x), "centered_l2": unit(x - center)}[space]

    means = [
        sum(into_space(row) for row, label in zip(rows, labels, strict=True) if label == c)
        / labels.count(c)
        for c in range(C)
    ]
    preds = []
    for row in test.values.double().numpy():
        x = into_space(row)
        if metric == "cosine":
            scores = [float(unit(x) @ unit(mean)) for mean in means]
        else:
            scores = [-float(((x - mean) ** 2).sum()) for mean in means]
        preds.append(int(np.argmax(scores)))
    return np.stack(means), preds


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("space", ["raw", "l2", "centered_l2"])
def test_ncm_is_the_naive_loop(metric, space):
    head = fit("ncm", metric=metric, features=space, classifier=None)
    means, preds = naive_ncm(TRAIN, TEST, metric, space)
    np.testing.assert_allclose(head.weight.numpy(), means, rtol=1e-5, atol=1e-6)
    assert head(TEST.values).argmax(1).tolist() == preds
    assert not head.weight.requires_grad


@pytest.mark.parametrize("decay", [1e-1, 1e-2, 1e-3])
def test_crt_is_the_class_balanced_logistic_regression_of_sklearn(decay):
    head = fit("crt", weight_decay=decay, max_iterations=500)
    # sklearn: sum_i w_i l_i + |W|^2 / (2 C'), with w_i = N / (C n_y). Ours is that over N, so the
    # decay is 1 / (N C').
    expected = sklearn_classifier(c=1 / (decay * len(TRAIN)), class_weight="balanced")
    with torch.no_grad():
        ours = head(TEST.values).softmax(1)
        theirs = expected(TEST.values).softmax(1)
    assert (ours - theirs).abs().max() < 0.01
    torch.testing.assert_close(head.weight, expected.weight, rtol=0.02, atol=0.01)
    # The bias is not decayed: shrinking it would move it by far more than this.
    bias = expected.bias - expected.bias.mean()
    torch.testing.assert_close(head.bias - head.bias.mean(), bias, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("decay", WEIGHT_DECAYS)
def test_a_hundred_iterations_of_crt_end_at_the_minimum(decay):
    """Gradient and value of the objective in float64, at the answer with default settings."""
    head = fit("crt", weight_decay=decay)
    weight, bias = (p.detach().double().requires_grad_() for p in (head.weight, head.bias))

    def objective(weight, bias):
        logits = TRAIN.values.double() @ weight.T + bias
        log_p = logits.log_softmax(1)
        per_class = [-log_p[TRAIN.targets == c, c].mean() for c in range(C)]
        return sum(per_class) / C + decay / 2 * weight.square().sum()

    value = objective(weight, bias)
    value.backward()
    # For a function that is decay-strongly convex in W the excess is below |g|^2 / (2 decay).
    assert weight.grad.norm() < 2e-3
    best = sklearn_classifier(c=1 / (decay * len(TRAIN)), class_weight="balanced")
    assert value.item() <= objective(best.weight.double(), best.bias.double()).item() + 1e-4


@pytest.mark.parametrize("scale", [1.0, 0.01, 1e-4])
def test_crt_converges_with_many_classes_and_small_features(scale):
    """Features divided by s with a decay divided by s^2 have the same minimum, at weights times s.

    All gradients shrink with s and with the number of classes, which is not convergence.
    """
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 4, generator=g), torch.arange(200)
    start = torch.zeros(200, 4), torch.zeros(200)
    decay = 1e-3 * scale**2
    weight, bias = solve_linear(
        *start, Features(scale * x, y), weight_decay=decay, max_iterations=100
    )
    weight = weight * scale
    loss = nn.functional.cross_entropy(x @ weight.T + bias, y) + 5e-4 * weight.square().sum()
    # sklearn's answer at scale 1 is 3.1569.
    assert loss.item() == pytest.approx(3.1569, abs=1e-3)


def test_crt_balances_by_the_features_and_not_by_the_counts_of_the_joint_classifier():
    ours = fit("crt", weight_decay=1e-2)
    other = fit("crt", weight_decay=1e-2, class_counts=torch.tensor([9, 900, 9, 90]))
    assert other.weight.equal(ours.weight)


def test_crt_selects_the_best_weight_decay_and_says_so():
    head = fit("crt")
    by_hand = {decay: accuracy(fit("crt", weight_decay=decay), VAL) for decay in WEIGHT_DECAYS}
    selection = head.selection
    compared = dict(selection["compared"])
    assert list(compared) == list(WEIGHT_DECAYS)
    # Warm starts and cold ones end at the same minimum, give or take an image.
    assert compared == pytest.approx(by_hand, abs=1 / len(VAL) + 1e-9)
    assert selection["val_accuracy"] == max(compared.values()) == accuracy(head, VAL)
    # Of equals the strongest decay.
    best = [decay for decay in WEIGHT_DECAYS if compared[decay] == max(compared.values())]
    assert selection["weight_decay"] == best[0]
    assert (selection["objective"], selection["split"]) == ("all", "val")
    assert fit("crt", weight_decay=1e-3).selection == {}


def class_balanced_rows(steps, seed, batch_size=512):
    stream = create_sampler(
        "class_balanced", TRAIN.targets, num_samples=steps * batch_size, seed=seed
    )
    return torch.tensor(list(stream)).view(steps, batch_size)


@pytest.mark.parametrize("scale_bias", [True, False])
def test_lws_is_naive_sgd_on_the_scales(scale_bias):
    head = fit("lws", steps=40, lr=0.1, weight_decay=0.01, scale_bias=scale_bias, seed=3)
    x, y = TRAIN.values.double(), TRAIN.targets
    z, b = x @ JOINT.weight.detach().double().T, JOINT.bias.detach().double()
    scale = torch.ones(C, dtype=torch.float64, requires_grad=True)

    def loss(batch):
        logits = scale * (z[batch] + b) if scale_bias else scale * z[batch] + b
        return -logits.log_softmax(1)[torch.arange(len(batch)), y[batch]].mean()

    naive_sgd([scale], loss, class_balanced_rows(40, 3), lr=0.1, weight_decay=0.01)
    torch.testing.assert_close(head.scale.double(), scale, rtol=1e-4, atol=1e-5)
    assert (scale - 1).abs().max() > 0.05
    assert head.weight.equal(JOINT.weight)
    assert head.bias.equal(JOINT.bias)


def test_lws_nearly_minimises_the_class_balanced_loss():
    head = fit("lws", steps=500, weight_decay=0.0)
    scale = head.scale.detach().double().requires_grad_()
    logits = scale * JOINT(TRAIN.values).detach().double()
    log_p = logits.log_softmax(1)
    loss = -sum(log_p[TRAIN.targets == c, c].mean() for c in range(C)) / C
    (gradient,) = torch.autograd.grad(loss, scale)
    assert gradient.abs().max() < 0.01


def test_crt_by_sgd_is_naive_sgd_from_the_default_start_of_a_linear_layer():
    head = fit("crt", solver="sgd", steps=30, lr=0.1, seed=3)
    weight, bias = start_of_a_linear_layer(seed=3)
    x, y = TRAIN.values.double(), TRAIN.targets

    def loss(batch):
        return nn.functional.cross_entropy(x[batch] @ weight.T + bias, y[batch])

    naive_sgd([weight, bias], loss, class_balanced_rows(30, 3), lr=0.1, weight_decay=5e-4)
    torch.testing.assert_close(head.weight.double(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.bias.double(), bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learn_scale", [False, True])
def test_cosine_is_naive_sgd_from_the_joint_directions(learn_scale):
    head = fit("cosine", scale=8.0, learn_scale=learn_scale, steps=30, lr=0.1, seed=3)
    weight = JOINT.weight.detach().double().requires_grad_()
    scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=learn_scale)
    x, y = TRAIN.values.double(), TRAIN.targets
    x = x / x.norm(dim=1, keepdim=True)

    def loss(batch):
        directions = weight / weight.norm(dim=1, keepdim=True)
        return nn.functional.cross_entropy(scale * x[batch] @ directions.T, y[batch])

    trained = [weight, scale] if learn_scale else [weight]
    naive_sgd(trained, loss, class_balanced_rows(30, 3), lr=0.1, weight_decay=5e-4)
    torch.testing.assert_close(head.weight.double(), weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(head.scale.double(), scale.detach(), rtol=1e-4, atol=1e-4)
    assert head.scale.requires_grad == learn_scale


@pytest.mark.parametrize("name", ["tau_norm", "logit_adjusted"])
def test_the_selected_tau_is_not_beaten_in_a_brute_force_sweep(name):
    head = fit(name)
    weight = JOINT.weight.detach().double().numpy()
    scores = VAL.values.double().numpy() @ weight.T
    swept = []
    for tau in np.linspace(0, 4, 4001):
        if name == "tau_norm":
            logits = scores / np.sqrt((weight**2).sum(1)) ** tau
        else:
            prior = COUNTS.numpy() / COUNTS.sum().item()
            logits = scores + JOINT.bias.detach().numpy() - tau * np.log(prior)
        swept.append((logits.argmax(1) == VAL.targets.numpy()).mean())
    assert accuracy(head, VAL) == max(swept)
    assert head.selection == {
        "tau": head.tau,
        "objective": "all",
        "split": "val",
        "val_accuracy": pytest.approx(max(swept), abs=1e-12),
    }
    assert fit(name, tau=0.7).selection == {}
    assert fit(name, tau=0.7).tau == 0.7


def test_tau_is_selected_on_validation_and_on_nothing_else():
    assert fit("tau_norm", train=VAL, class_counts=None).tau == fit("tau_norm").tau
    assert fit("tau_norm").tau == tau_curve(JOINT, VAL).best_tau


def test_tau_norm_with_its_bias_selects_from_a_grid():
    head = fit("tau_norm", keep_bias=True)
    swept = {tau: accuracy(fit("tau_norm", keep_bias=True, tau=tau), VAL) for tau in (0, 0.5, 1, 2)}
    assert head.keep_bias
    assert accuracy(head, VAL) >= max(swept.values())
    compared = dict(head.selection["compared"])
    assert {tau: compared[tau] for tau in swept} == pytest.approx(swept)
    assert head.tau == head.selection["tau"]


def test_logit_adjusted_takes_the_prior_of_the_class_counts():
    counts = torch.tensor([1000, 10, 10, 10])
    head = fit("logit_adjusted", tau=0.5, class_counts=counts)
    logits = JOINT(TEST.values) - 0.5 * torch.log(counts / 1030)
    torch.testing.assert_close(head(TEST.values), logits)


def test_class_counts_are_counted_if_they_are_not_given():
    given, counted = (fit("logit_adjusted", class_counts=c) for c in (COUNTS, None))
    assert given.log_prior.equal(counted.log_prior)


def test_the_sampler_of_train_head_is_class_balanced():
    """Copies of images of one class change the data but not the loss of class-balanced batches."""
    rare = TRAIN.targets == 3
    more = Features(
        torch.cat([TRAIN.values, TRAIN.values[rare].repeat(20, 1)]),
        torch.cat([TRAIN.targets, TRAIN.targets[rare].repeat(20)]),
    )
    one, two = fit("lws", steps=300), fit("lws", train=more, steps=300)
    torch.testing.assert_close(one.scale, two.scale, atol=0.02, rtol=0)


def test_without_a_joint_classifier_linear_is_fitted_to_the_rows_as_they_are():
    """At the minimum of the mean cross-entropy plus decay, the gradient is 0; and it is unique."""
    head = fit("linear", classifier=None, weight_decay=1e-2)
    weight, bias = (p.detach().double().requires_grad_() for p in (head.weight, head.bias))
    x, y = TRAIN.values.double(), TRAIN.targets
    loss = sum(
        torch.logsumexp(row @ weight.T + bias, 0) - (row @ weight.T + bias)[label]
        for row, label in zip(x, y, strict=True)
    ) / len(x)
    (loss + 0.5e-2 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-4
    assert bias.grad.abs().max() < 1e-4
    # The weight decay is selected like that of crt, whose classes are balanced.
    selected = fit("linear", classifier=None)
    assert selected.selection["weight_decay"] in dict(selected.selection["compared"])
    assert not torch.equal(selected.weight, fit("crt", weight_decay=1e-2).weight)
    close = fit("linear", classifier=None, solver="sgd", weight_decay=1e-2)
    assert accuracy(close, TRAIN) == pytest.approx(accuracy(head, TRAIN), abs=0.05)
    with pytest.raises(UsageError, match="of head 'linear' have no effect with a joint"):
        fit("linear", weight_decay=1e-2)


def test_large_problems_are_solved_by_sgd(monkeypatch):
    whole = fit("crt", weight_decay=1e-2)
    monkeypatch.setattr(gradient, "LARGE", len(TRAIN) * C * D - 1)
    large = fit("crt", weight_decay=1e-2)
    assert torch.equal(large.weight, fit("crt", solver="sgd", weight_decay=1e-2).weight)
    assert not torch.equal(large.weight, whole.weight)


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tau_norm", "lws", "logit_adjusted"])
def test_heads_that_start_from_the_joint_classifier_ask_for_it(name):
    with pytest.raises(UsageError, match=f"head '{name}' .*joint classifier: pass classifier="):
        fit(name, classifier=None)


@pytest.mark.parametrize("name", ["ncm", "crt", "cosine", "fslwf"])
def test_the_other_heads_do_without_it(name):
    assert accuracy(fit(name, classifier=None)) > 0.6


@pytest.mark.parametrize(
    ("name", "option"), [("tau_norm", "tau"), ("logit_adjusted", "tau"), ("crt", "weight_decay")]
)
def test_what_is_selected_asks_for_validation_features(name, option):
    with pytest.raises(UsageError, match=f"selects {option} .*pass val=, or {option}="):
        fit(name, val=None)
    fit(name, val=None, **{option: 0.5})


def swap(features, old, new):
    return Features(features.values, features.targets.where(features.targets != old, new))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": swap(TRAIN, 2, 1)}, "1 of 4 classes have no training image: 2"),
        ({"val": swap(VAL, 1, 0)}, "1 of 4 classes have no validation image: 1"),
        ({"class_counts": torch.tensor([5, 0, 5, 5])}, "1 of 4 classes have no training image: 1"),
        ({"class_counts": COUNTS[:3]}, "class_counts has 3 classes, expected 4"),
        ({"class_counts": torch.tensor([5.0, 1.0, 5.0, 5.0])}, "is not an integer"),
        ({"train": swap(TRAIN, 2, 4)}, r"targets of features\[\d+\] = 4 is not below"),
        ({"val": swap(VAL, 2, 9)}, r"targets of val\[\d+\] = 9 is not below num_classes=4"),
        (
            {"train": Features(TRAIN.values[:, :5], TRAIN.targets)},
            "features has 5 features per row, the classifier takes 6",
        ),
        (
            {"val": Features(VAL.values[:, :5], VAL.targets)},
            "val has 5 features per row, the classifier takes 6",
        ),
        (
            {"val": Features(VAL.values[:, :5], VAL.targets), "classifier": None},
            "val has 5 features per row, the training features 6",
        ),
        (
            {"classifier": None, "class_counts": COUNTS[:3]},
            r"targets of features\[\d+\] = 3 is not below num_classes=3",
        ),
        ({"seed": -1}, "seed must be an integer >= 0"),
    ],
)
def test_features_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        fit("ncm", **options)


def test_a_head_that_is_not_the_joint_classifier_is_refused():
    with pytest.raises(UsageError, match="takes the joint classifier, got a 'cosine' head"):
        fit("tau_norm", classifier=fit("cosine"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("crt", {"solver": "adam"}, "choose one of: lbfgs, sgd"),
        ("crt", {"weight_decay": -1e-4}, r"weight_decay of head 'crt' must be .* \[0, inf\)"),
        ("crt", {"max_iterations": 0}, "max_iterations of head 'crt' must be an integer from 1"),
        ("crt", {"steps": 1.5}, "steps of head 'crt' must be an integer from 1 .*got 1.5"),
        ("lws", {"steps": 0}, "steps of head 'lws'"),
        ("lws", {"lr": 0.0}, r"lr of head 'lws' must be a number in \(0, inf\)"),
        ("lws", {"lr": math.nan}, "got nan"),
        ("cosine", {"scale": 0.0}, "scale must be"),
        ("tau_norm", {"tau": -0.1}, r"tau must be a number in \[0, inf\)"),
        ("logit_adjusted", {"tau": math.inf}, "tau must be"),
        ("ncm", {"metric": "manhattan"}, "choose one of: cosine, euclidean"),
        ("ncm", {"features": "l1"}, "choose one of: raw, l2, centered_l2"),
        ("tau_nrom", {}, "did you mean 'tau_norm'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_fitted(name, options, message):
    with pytest.raises(UsageError, match=message):
        check_fit_options(name, options)
    with pytest.raises(UsageError, match=message):
        fit(name, **options)


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"batch_size": 0}, {"momentum": 1.0}, {"lr": -1.0}]
)
def test_train_head_checks_its_numbers(options):
    head = LWSHead.from_classifier(JOINT)
    with pytest.raises(UsageError, match=next(iter(options))):
        train_head(head, TRAIN, seed=0, **{"steps": 1, "lr": 0.1, **options})


def test_a_fit_needs_a_head_of_its_name():
    with pytest.raises(UsageError, match="unknown head 'no_such_head'"):
        register_fit("no_such_head")
    with pytest.raises(UsageError, match="registered already"):
        register_fit("ncm")


def random_states():
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2], random.getstate()


@pytest.mark.parametrize("name", ["auto", *timm_lt.list_heads()])
def test_fits_leave_the_global_generators_alone(name):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(600, 8, generator=generator)
    targets = torch.cat([torch.zeros(200), torch.ones(150), torch.arange(250) % 5]).long()
    features, val = (timm_lt.Features(values[i:], targets[i:]) for i in (0, 350))
    classifier = timm_lt.create_head("linear", 8, 5)
    options = {"steps": 20} if name in {"lws", "cosine", "oltr"} else {}
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = random_states()
        head = timm_lt.fit_head(name, features, classifier=classifier, val=val, seed=3, **options)
        if name not in {"fslwf", "oltr"}:
            head.fold()
        assert random_states() == before
        heads.append(head.state_dict())
    for key, value in heads[0].items():
        assert torch.equal(value, heads[1][key])
