"""One contract for the fits of all registered heads, then each against an independent solver."""

import copy
import math
import os
import random
import subprocess
import sys
from pathlib import Path

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
    draw_rows,
    few_shot,
    fit,
    sklearn_classifier,
    start_of_a_linear_layer,
)
from naive_sgd import naive_sgd
from scipy import optimize, stats
from torch import nn

import timm_lt
from timm_lt.features import Features
from timm_lt.fitting import solvers
from timm_lt.fitting.closed_form import class_means
from timm_lt.fitting.gradient import WEIGHT_DECAYS, add_smote_rows
from timm_lt.fitting.solvers import solve_linear, train_head
from timm_lt.heads import HEADS, list_heads
from timm_lt.utils.checks import UsageError

LOG_COUNTS = COUNTS.double().log()
SGD = {"solver": "sgd", "steps": 30, "lr": 0.1, "seed": 3}
contract = pytest.mark.parametrize("name", list_heads())


def same_tensors(one, two):
    other = two.state_dict()
    return all(value.equal(other[key]) for key, value in one.state_dict().items())


def assert_close(found, *expected, **tolerance):
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(
            value.double(), wanted, **{"rtol": 1e-4, "atol": 1e-5} | tolerance
        )


@contract
def test_a_fitted_head_beats_chance_and_never_serves_rare_classes_worse(name):
    head = fit(name)
    assert isinstance(head, HEADS[name])
    assert not head.training
    assert accuracy(head) > 0.6
    assert few_shot(head) >= few_shot(fit("linear"))


def random_states():
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2], random.getstate()


@pytest.mark.parametrize("name", ["auto", *list_heads()])
def test_a_fit_repeats_exactly_and_leaves_the_global_generators_alone(name):
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = random_states()
        heads.append(fit(name, seed=5))
        assert random_states() == before
    first, second = heads
    assert first.options() == second.options()
    assert first.selection == second.selection
    assert same_tensors(first, second)


@contract
def test_the_arguments_do_not_change(name):
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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_features_of_every_floating_type_give_a_float32_head(name, dtype):
    typed = [Features(f.values.to(dtype), f.targets) for f in (TRAIN, VAL)]
    plain = [Features(f.values.float(), f.targets) for f in typed]
    classifier = copy.deepcopy(JOINT).to(dtype)
    head = fit(name, train=typed[0], val=typed[1], classifier=classifier)
    assert classifier.weight.dtype == dtype
    assert head.weight.dtype == torch.float32
    expected = fit(name, train=plain[0], val=plain[1], classifier=copy.deepcopy(classifier).float())
    assert same_tensors(head, expected)


@contract
def test_the_head_of_a_classifier_without_bias_can_be_saved_and_loaded(name, tmp_path):
    model = timm_lt.create_model("test_resnet", num_classes=C)
    joint = model.fc = nn.Linear(model.num_features, C, bias=False)
    g = torch.Generator().manual_seed(0)
    features = Features(torch.randn(len(TRAIN), joint.in_features, generator=g), TRAIN.targets)
    head = fit(name, train=features, val=features, classifier=joint, class_counts=None)
    timm_lt.save_checkpoint(tmp_path, model, heads={name: head}, class_counts=COUNTS)
    loaded = timm_lt.load_head(tmp_path, name, joint)
    with torch.no_grad():
        assert loaded(features.values).equal(head(features.values))


def float64_means(values, targets, space):
    x = values.double()
    x = x - x.mean(0) if space == "centered_l2" else x
    x = x if space == "raw" else x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return torch.stack([x[targets == c].mean(0) for c in range(int(targets.max()) + 1)])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("space", ["raw", "l2", "centered_l2"])
def test_ncm_takes_the_nearest_class_mean(metric, space):
    head = fit("ncm", metric=metric, features=space, classifier=None)
    means = float64_means(TRAIN.values, TRAIN.targets, space)
    assert_close([head.weight], means)
    center = TRAIN.values.double().mean(0) if space == "centered_l2" else 0
    preds = []
    for row in TEST.values.double():
        x = row - center
        x = x if space == "raw" else x / x.norm()
        if metric == "cosine":
            scores = [float(x @ mean / mean.norm()) for mean in means]
        else:
            scores = [-float((x - mean).square().sum()) for mean in means]
        preds.append(int(np.argmax(scores)))
    assert head(TEST.values).argmax(1).tolist() == preds
    assert not head.weight.requires_grad


@pytest.mark.parametrize("space", ["raw", "l2", "centered_l2"])
@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_class_means_are_right_far_from_the_origin(space, offset):
    values = TRAIN.values + offset
    means = class_means(values, TRAIN.targets, C, (space,), values.double().mean(0))[space]
    expected = float64_means(values, TRAIN.targets, space)
    torch.testing.assert_close(means.double(), expected, rtol=1e-5, atol=2e-7 * offset)


def test_features_whose_norm_is_beyond_float32_are_an_error():
    with pytest.raises(UsageError, match="too large"):
        fit("ncm", train=Features(TRAIN.values * 1e30, TRAIN.targets), features="l2")


def test_linear_is_the_joint_classifier():
    head = fit("linear")
    assert head.weight.equal(JOINT.weight)
    assert head.bias.equal(JOINT.bias)


@pytest.mark.parametrize("decay", [1e-1, 1e-2, 1e-3])
def test_crt_is_the_class_balanced_logistic_regression_of_sklearn(decay):
    head = fit("crt", weight_decay=decay, max_iterations=500)
    # sklearn: sum_i w_i l_i + |W|^2 / (2 C'), with w_i = N / (C n_y). Ours is that over N, so the
    # decay is 1 / (N C').
    expected = sklearn_classifier(c=1 / (decay * len(TRAIN)), class_weight="balanced")
    with torch.no_grad():
        ours, theirs = (classifier(TEST.values).softmax(1) for classifier in (head, expected))
    assert (ours - theirs).abs().max() < 0.01
    torch.testing.assert_close(head.weight, expected.weight, rtol=0.02, atol=0.01)
    # The bias is not decayed: shrinking it would move it by far more than this.
    bias = expected.bias - expected.bias.mean()
    torch.testing.assert_close(head.bias - head.bias.mean(), bias, rtol=0.02, atol=0.02)


def gradients_at(name, decay, **options):
    """Returns the gradients, in float64, of the objective from its definition at the answer."""
    head = fit(name, weight_decay=decay, **options)
    weight, bias = (p.detach().double().requires_grad_() for p in (head.weight, head.bias))
    logits = TRAIN.values.double() @ weight.T + bias
    if options.get("loss") == "balanced_softmax":
        logits = logits + LOG_COUNTS
    losses = -logits.log_softmax(1)[torch.arange(len(TRAIN)), TRAIN.targets]
    if name == "crt" and "loss" not in options:
        loss = sum(losses[TRAIN.targets == c].mean() for c in range(C)) / C
    else:
        loss = losses.mean()
    return torch.autograd.grad(loss + decay / 2 * weight.square().sum(), (weight, bias))


@pytest.mark.parametrize("decay", WEIGHT_DECAYS)
def test_a_hundred_iterations_end_at_the_minimum(decay):
    # A decay-strongly convex function exceeds its minimum by at most |g|^2 / (2 decay).
    assert all(gradient.norm() < 2e-3 for gradient in gradients_at("crt", decay))
    balanced = gradients_at("crt", decay, loss="balanced_softmax")
    assert all(gradient.norm() < 2e-3 for gradient in balanced)
    assert all(g.norm() < 2e-3 for g in gradients_at("linear", decay, classifier=None))


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_crt_converges_with_many_classes_and_small_features(scale):
    """Features divided by s with a decay divided by s^2 have the same minimum, at weights times s.

    All gradients shrink with s and with the number of classes, which is not convergence.
    """
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 4, generator=g), torch.arange(200)
    features, decay = Features(scale * x, y), 1e-3 * scale**2
    start = torch.zeros(200, 4), torch.zeros(200)
    shares = torch.full((200,), 1 / 200)
    weight, bias = solve_linear(*start, features, weight_decay=decay, shares=shares)
    weight = weight * scale
    loss = nn.functional.cross_entropy(x @ weight.T + bias, y) + 5e-4 * weight.square().sum()
    # sklearn's answer at scale 1 is 3.1569.
    assert loss.item() == pytest.approx(3.1569, abs=1e-3)


POWER = {"sampler": "power", "sampler_options": {"q": 0.5}}


@pytest.mark.parametrize(
    ("options", "offset", "drawn"),
    [
        ({}, 0, {}),
        ({"loss": "balanced_softmax"}, LOG_COUNTS, {"sampler": "instance_balanced"}),
        (
            {"loss": "logit_adjustment", "loss_options": {"tau": 0.5}, **POWER},
            0.5 * LOG_COUNTS,
            {"sampler": "power", "q": 0.5},
        ),
        ({"max_norm": 0.6, "lr": 0.5}, 0, {}),
    ],
)
def test_crt_by_sgd_is_naive_sgd_from_the_default_start_of_a_linear_layer(options, offset, drawn):
    options = SGD | options
    head = fit("crt", **options)
    weight, bias = start_of_a_linear_layer(seed=3)
    x, y = TRAIN.values.double(), TRAIN.targets

    def loss(batch):
        return nn.functional.cross_entropy(x[batch] @ weight.T + bias + offset, y[batch])

    def shorten():
        for row in weight.data:
            row.mul_(min(1.0, options.get("max_norm", math.inf) / math.hypot(*row.tolist())))

    rows = draw_rows(30, 3, **drawn)
    naive_sgd([weight, bias], loss, rows, options["lr"], 5e-4, after=shorten)
    assert_close([head.weight, head.bias], weight, bias)
    if "max_norm" in options:
        assert max(map(math.hypot, *head.weight.T.tolist())) == pytest.approx(0.6, abs=1e-4)


@pytest.mark.parametrize("scale_bias", [True, False])
def test_lws_is_naive_sgd_on_the_scales(scale_bias):
    head = fit("lws", steps=40, lr=0.1, weight_decay=0.01, scale_bias=scale_bias, seed=3)
    x, y = TRAIN.values.double(), TRAIN.targets
    z, b = x @ JOINT.weight.detach().double().T, JOINT.bias.detach().double()
    scale = torch.ones(C, dtype=torch.float64, requires_grad=True)

    def loss(batch):
        logits = scale * (z[batch] + b) if scale_bias else scale * z[batch] + b
        return nn.functional.cross_entropy(logits, y[batch])

    naive_sgd([scale], loss, draw_rows(40, 3), 0.1, 0.01)
    assert_close([head.scale], scale)
    assert (scale - 1).abs().max() > 0.05
    assert head.weight.equal(JOINT.weight)
    assert head.bias.equal(JOINT.bias)


@pytest.mark.parametrize("learn_scale", [False, True])
def test_cosine_is_naive_sgd_from_the_joint_directions(learn_scale):
    head = fit("cosine", scale=8.0, learn_scale=learn_scale, steps=30, lr=0.1, seed=3)
    weight = JOINT.weight.detach().double().requires_grad_()
    scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=learn_scale)
    x, y = nn.functional.normalize(TRAIN.values.double()), TRAIN.targets

    def loss(batch):
        directions = weight / weight.norm(dim=1, keepdim=True)
        return nn.functional.cross_entropy(scale * x[batch] @ directions.T, y[batch])

    trained = [weight, scale] if learn_scale else [weight]
    naive_sgd(trained, loss, draw_rows(30, 3), 0.1, 5e-4)
    assert_close([head.weight, head.scale], weight, scale, rtol=1e-3, atol=1e-4)
    assert head.scale.requires_grad == learn_scale


@pytest.mark.parametrize("scale_bias", [True, False])
def test_lws_ends_near_the_minimum_of_its_loss(scale_bias):
    """Minimum of the class-balanced cross-entropy in the scales, by L-BFGS in float64."""
    x, y = TRAIN.values.double(), TRAIN.targets
    z, b = x @ JOINT.weight.detach().double().T, JOINT.bias.detach().double()

    def loss(scale):
        logits = scale * (z + b) if scale_bias else scale * z + b
        losses = nn.functional.cross_entropy(logits, y, reduction="none")
        return sum(losses[y == c].mean() for c in range(C)) / C

    def value_and_gradient(scale):
        scale = torch.tensor(scale, requires_grad=True)
        value = loss(scale)
        value.backward()
        return value.item(), scale.grad.numpy()

    scale = torch.from_numpy(optimize.minimize(value_and_gradient, np.ones(C), jac=True).x)
    head = fit("lws", steps=2000, weight_decay=0.0, scale_bias=scale_bias)
    start, found, least = (loss(s).item() for s in (torch.ones(C), head.scale, scale))
    assert found - least < 0.02 * (start - least)
    assert_close([head.scale], scale, rtol=0.05, atol=0.02)


def test_a_loss_gets_the_epochs_and_may_take_features():
    class Loss(nn.CrossEntropyLoss):
        needs_features, epochs = True, []

        def set_epoch(self, *epoch):
            self.epochs.append(epoch)

        def forward(self, logits, targets, features):
            assert features.shape == (len(logits), D) == (half, D)
            return super().forward(logits, targets)

    half, loss = len(TRAIN) // 2, Loss()
    train_head(fit("crt"), TRAIN, seed=0, steps=5, lr=0.1, batch_size=half, loss=loss)
    assert loss.epochs == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("loss", ["class_balanced", "focal"])
def test_a_loss_of_sigmoids_starts_the_bias_and_keeps_it_from_decay(loss):
    options = SGD | {"loss": loss, "loss_options": {"form": "sigmoid"}, "steps": 2, "lr": 1e-9}
    head, decayed = (fit("crt", **options, weight_decay=decay) for decay in (5e-4, 1e9))
    torch.testing.assert_close(head.bias, torch.full((C,), -math.log(C - 1)))
    torch.testing.assert_close(decayed.bias, head.bias)
    assert decayed.weight.abs().max() < head.weight.abs().max() / 2


def test_epochs_are_as_many_steps():
    more = Features(TRAIN.values.repeat(9, 1), TRAIN.targets.repeat(9))  # 1,620 rows
    one, two = fit("lws", train=more, steps=None, epochs=2), fit("lws", train=more, steps=6)
    assert one.scale.equal(two.scale)


def test_smote_rows_lie_between_a_row_and_one_of_its_nearest_in_the_class():
    grown = add_smote_rows(TRAIN, C, 60, seed=1)
    assert torch.bincount(grown.targets).tolist() == [120, 60, 60, 60]
    assert grown.values[: len(TRAIN)].equal(TRAIN.values)
    for label, n in enumerate(COUNTS.tolist()):
        real = TRAIN.values[TRAIN.targets == label].double()
        distance = torch.cdist(real, real).fill_diagonal_(math.inf)
        nearest = distance.argsort(1)[:, : min(5, n - 1)]
        made = grown.values[len(TRAIN) :][grown.targets[len(TRAIN) :] == label].double()
        # On the segment a to b the distances to the two ends add up to its length.
        ends = torch.cdist(made, real)
        excess = ends[:, :, None] + ends[:, nearest] - distance.gather(1, nearest)
        assert (excess.flatten(1) < 1e-5).any(1).all()


def test_smote_fills_up_classes_and_draws_all_of_a_segment():
    features = Features(torch.arange(10.0).view(5, 2), torch.tensor([0, 0, 0, 1, 2]))
    grown, again = (add_smote_rows(features, 4, "largest", seed=0) for _ in range(2))
    assert torch.bincount(grown.targets).tolist() == [3, 3, 3]
    assert grown.values[grown.targets == 1].equal(torch.tensor([[6.0, 7.0]]).repeat(3, 1))
    assert again.values.equal(grown.values)
    features = Features(torch.tensor([[0.0], [1.0], [3.0], [3.0]]), torch.tensor([0, 0, 1, 1]))
    assert add_smote_rows(features, 2, "largest").values.equal(features.values)
    made = add_smote_rows(features, 2, 1002).values[4:].flatten()
    assert stats.kstest(made[:1000], "uniform").pvalue > 1e-3
    assert made[1000:].eq(3).all()


@pytest.mark.parametrize("options", [{**SGD, "steps": 20}, {"seed": 3, "weight_decay": 1e-2}])
def test_crt_with_smote_is_crt_on_the_rows_that_it_adds(options):
    head = fit("crt", smote=50, **options)
    expected = fit("crt", train=add_smote_rows(TRAIN, C, 50, seed=3), **options)
    assert head.weight.equal(expected.weight)
    assert not head.weight.equal(fit("crt", **options).weight)


SHORT, BY_LBFGS = {"steps": 20}, {"weight_decay": 1e-2}
STREAMED = [
    *(("ncm", {"features": space}) for space in ("raw", "centered_l2")),
    *(("crt", more) for more in (BY_LBFGS, BY_LBFGS | {"smote": 50}, {"solver": "sgd"} | SHORT)),
    *(("lws", SHORT | {"scale_bias": scale_bias}) for scale_bias in (True, False)),
    *(("cosine", SHORT), ("tau_norm", {}), ("logit_adjusted", {})),
]


@pytest.mark.parametrize(("name", "options"), STREAMED)
def test_blocks_of_features_in_a_file_give_the_same_head(name, options, tmp_path, monkeypatch):
    half = Features(TRAIN.values.half(), TRAIN.targets)
    expected = fit(name, train=half, **options).state_dict()
    (tmp_path / "values").write_bytes(half.values.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "values"), size=half.values.numel(), dtype=torch.half)
    monkeypatch.setattr(solvers, "ENTRIES", 7 * D)
    monkeypatch.setattr(solvers, "MAX_BYTES", 0)  # the logits of lws are computed for each batch
    mapped = Features(mapped.view(half.values.shape), TRAIN.targets)
    # L-BFGS ends near the minimum, by a way that depends on every rounding.
    tolerance = 3e-3 if "weight_decay" in options else 1e-4
    for key, value in fit(name, train=mapped, **options).state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=tolerance)


FITS_IN_LITTLE_MEMORY = """
import threading, time, torch
from timm_lt import Features, fit_head

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.005)

N, D, C = 80_000, 512, 20
values = torch.from_file("values", shared=True, size=N * D).view(N, D)
targets = torch.arange(N) % C
for start in range(0, N, 10_000):
    part = slice(start, start + 10_000)
    values[part] = torch.randn(10_000, D) + targets[part, None]
features = Features(values, targets)
val = Features(values[:1000].clone(), targets[:1000])
options = {"val": val, "classifier": torch.nn.Linear(D, C)}
fit_head("tau_norm", Features(values[:40].clone(), targets[:40]), **options)  # warm up
threading.Thread(target=watch, daemon=True).start()
before = anonymous()
for name, more in [
    ("ncm", {"features": "centered_l2"}),
    ("lws", {"steps": 20}),
    ("crt", {"solver": "sgd", "steps": 20}),
    ("crt", {"weight_decay": 1e-2, "max_iterations": 2}),
    ("cosine", {"steps": 20}),
    ("logit_adjusted", {}),
]:
    peak = 0
    fit_head(name, features, **options, **more)
    # A few blocks of 16 MiB and their results, and what the allocator keeps.
    assert (peak - before) // 1024 < 110, (name, peak - before)
"""


@pytest.mark.exhaustive
def test_fits_on_features_larger_than_memory_need_memory_for_some_blocks(tmp_path):
    """160 MB of features in a file; the memory of a process beside the file is measured."""
    with (tmp_path / "values").open("wb") as file:
        file.truncate(80_000 * 512 * 4)
    path = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", FITS_IN_LITTLE_MEMORY]
    subprocess.run(command, cwd=tmp_path, check=True, env=environment)
