"""Options of the fits: losses, lengths, SMOTE, what is kept; features in a file; objectives."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gaussian_features import (
    COUNTS,
    TEST,
    TRAIN,
    VAL,
    C,
    D,
    accuracy,
    few_shot,
    fit,
    naive_sgd,
    start_of_a_linear_layer,
    tensors,
)
from scipy import stats
from torch import nn

from timm_lt.features import Features
from timm_lt.fitting import check_fit_classes, check_fit_options, gradient
from timm_lt.fitting import sgd as rows
from timm_lt.fitting.closed_form import class_means
from timm_lt.fitting.gradient import WEIGHT_DECAYS
from timm_lt.fitting.sgd import add_smote_rows, train_head
from timm_lt.heads.linear import CRT_LENGTH
from timm_lt.metrics import shot_accuracy
from timm_lt.samplers import create_sampler
from timm_lt.utils.checks import UsageError

LOG_COUNTS = COUNTS.double().log()
SGD = {"solver": "sgd"}

# Balanced softmax --------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [1e-1, 1e-3])
def test_balanced_softmax_ends_at_the_minimum_of_its_definition(decay):
    head = fit("crt", loss="balanced_softmax", weight_decay=decay)
    weight, bias = (p.detach().double().requires_grad_() for p in (head.weight, head.bias))
    logits = TRAIN.values.double() @ weight.T + bias + LOG_COUNTS
    loss = nn.functional.cross_entropy(logits, TRAIN.targets)
    (loss + decay / 2 * weight.square().sum()).backward()
    assert weight.grad.norm() < 2e-3
    assert bias.grad.norm() < 2e-3
    # Unlike the head of cross-entropy, which the many-shot classes draw to them.
    assert few_shot(head) > few_shot(fit("linear"))


def test_balanced_softmax_by_sgd_draws_rows_as_they_are_distributed():
    options = {"solver": "sgd", "loss": "balanced_softmax", "steps": 30, "lr": 0.1, "seed": 3}
    head = fit("crt", **options)
    weight, bias = start_of_a_linear_layer(seed=3)
    x, y = TRAIN.values.double(), TRAIN.targets

    def loss(batch):
        logits = x[batch] @ weight.T + bias + LOG_COUNTS
        return nn.functional.cross_entropy(logits, y[batch])

    stream = create_sampler("instance_balanced", y, num_samples=30 * 512, seed=3)
    batches = torch.tensor(list(stream)).view(30, 512)
    naive_sgd([weight, bias], loss, batches, lr=0.1, weight_decay=5e-4)
    torch.testing.assert_close(head.weight.double(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.bias.double(), bias, rtol=1e-4, atol=1e-5)


def test_max_norm_shortens_class_weights_after_each_update():
    options = {"solver": "sgd", "steps": 10, "lr": 0.5, "seed": 3}
    head = fit("crt", **options, max_norm=0.6)
    weight, bias = start_of_a_linear_layer(seed=3)
    x, y = TRAIN.values.double(), TRAIN.targets

    def loss(batch):
        # Before each forward pass but the first, the weights are those after an update.
        if started:
            for row in weight.data:
                row.mul_(min(1.0, 0.6 / math.hypot(*row.tolist())))
        started.append(True)
        return nn.functional.cross_entropy(x[batch] @ weight.T + bias, y[batch])

    started = []
    batches = create_sampler("class_balanced", y, num_samples=10 * 512, seed=3).epoch_indices()
    naive_sgd([weight, bias], loss, batches.view(10, 512), lr=0.5, weight_decay=5e-4)
    loss(batches[:1])
    torch.testing.assert_close(head.weight.double(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.bias.double(), bias, rtol=1e-4, atol=1e-5)
    assert max(map(math.hypot, *head.weight.T.tolist())) == pytest.approx(0.6, abs=1e-4)
    assert max(map(math.hypot, *fit("crt", **options).weight.T.tolist())) > 0.7


# Other losses and samplers ----------------------------------------------------------------------


def test_sgd_takes_any_loss_and_sampler():
    options = {"solver": "sgd", "steps": 30, "lr": 0.1, "seed": 3}
    head = fit(
        "crt",
        **options,
        loss="logit_adjustment",
        loss_options={"tau": 0.5},
        sampler="power",
        sampler_options={"q": 0.5},
    )
    weight, bias = start_of_a_linear_layer(seed=3)
    x, y = TRAIN.values.double(), TRAIN.targets

    def loss(batch):
        return nn.functional.cross_entropy(x[batch] @ weight.T + bias + 0.5 * LOG_COUNTS, y[batch])

    batches = create_sampler("power", y, num_samples=30 * 512, seed=3, q=0.5).epoch_indices()
    naive_sgd([weight, bias], loss, batches.view(30, 512), lr=0.1, weight_decay=5e-4)
    torch.testing.assert_close(head.weight.double(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.bias.double(), bias, rtol=1e-4, atol=1e-5)


def test_a_loss_hears_of_epochs_of_all_rows_and_may_take_them():
    class Loss(nn.Module):
        needs_features = True

        def __init__(self):
            super().__init__()
            self.heard, self.widths = [], set()

        def set_epoch(self, epoch, epochs):
            self.heard.append((epoch, epochs))

        def forward(self, logits, targets, features):
            self.widths.add((len(logits), *features.shape))
            return nn.functional.cross_entropy(logits, targets)

    loss = Loss()
    half = len(TRAIN) // 2
    train_head(fit("crt"), TRAIN, seed=0, steps=5, lr=0.1, batch_size=half, loss=loss)
    assert loss.heard == [(0, 3), (1, 3), (2, 3)]
    assert loss.widths == {(half, half, D)}


@pytest.mark.parametrize(
    ("loss", "options"), [("class_balanced", {"form": "sigmoid"}), ("focal", {"form": "sigmoid"})]
)
def test_a_loss_of_sigmoids_starts_the_bias_and_keeps_it_from_decay(loss, options):
    fitted = {"solver": "sgd", "loss": loss, "loss_options": options, "seed": 3, "steps": 2}
    fitted |= {"lr": 1e-9, "sampler": "instance_balanced"}
    head = fit("crt", **fitted)
    torch.testing.assert_close(head.bias, torch.full((C,), -math.log(C - 1)))
    # Of a decay that would take it to 0 at once, nothing shows.
    decayed = fit("crt", **fitted, weight_decay=1e9)
    torch.testing.assert_close(decayed.bias, head.bias)
    assert decayed.weight.abs().max() < head.weight.abs().max() / 2


def test_a_schedule_that_starts_after_the_training_is_refused_before_it():
    """Of 2 steps of 512 rows are 6 passes over the 180 rows, or 3 over the 480 of SMOTE."""
    drw = {**SGD, "loss": "deferred_reweighting", "steps": 2, "sampler": "instance_balanced"}

    def check(**options):
        check_fit_classes("crt", {**drw, **options}, COUNTS)

    check(loss_options={"start": 5})
    with pytest.raises(UsageError, match="an epoch is 180 rows\\): start 6 is not within"):
        check(loss_options={"start": 6})
    check(loss_options={"start": 2}, smote="largest")
    with pytest.raises(UsageError, match=r"480 rows\): start 3"):
        check(loss_options={"start": 3}, smote="largest")
    with pytest.raises(UsageError, match=r"360 rows\): start 3"):
        check_fit_classes("crt", {**drw, "loss_options": {"start": 3}}, COUNTS, views=2)


# Length and what is kept -------------------------------------------------------------------------


def test_the_length_goes_by_epochs_on_large_data_and_by_steps_on_small():
    # ImageNet-LT has 115,846 images: 226 updates of 512.
    assert CRT_LENGTH.updates(115_846) == 2260
    assert CRT_LENGTH.updates(115_846, epochs=3) == 678
    assert CRT_LENGTH.updates(100) == 1000
    assert CRT_LENGTH.updates(100, epochs=3) == 3
    assert CRT_LENGTH.updates(115_846, steps=7) == 7


def test_epochs_are_as_many_steps():
    more = Features(TRAIN.values.repeat(9, 1), TRAIN.targets.repeat(9))  # 1,620 rows
    one, two = fit("lws", train=more, steps=None, epochs=2), fit("lws", train=more, steps=6)
    assert one.scale.equal(two.scale)


@pytest.mark.parametrize("name", ["crt", "lws"])
def test_the_best_of_ten_looks_is_kept(name):
    options = {"steps": 50, "lr": 2.0} | ({"solver": "sgd"} if name == "crt" else {})
    best, last = fit(name, keep="best", **options), fit(name, **options)
    compared = dict(best.selection["compared"])
    assert list(compared) == [5, 10, 15, 20, 25, 30, 35, 40, 45, 50]
    assert compared[50] == accuracy(last, VAL)
    assert accuracy(best, VAL) == best.selection["val_accuracy"] == max(compared.values())
    assert compared[best.selection["steps"]] == max(compared.values())
    assert last.selection == {}


def test_a_training_that_blows_up_is_an_error():
    with pytest.raises(UsageError, match="head 'crt' became infinite or NaN"):
        fit("crt", solver="sgd", steps=20, lr=1e30)


# SMOTE -------------------------------------------------------------------------------------------


def test_smote_rows_lie_between_a_row_and_one_of_its_nearest_in_the_class():
    grown = add_smote_rows(TRAIN, C, 60, seed=1)
    assert torch.bincount(grown.targets).tolist() == [120, 60, 60, 60]
    assert grown.values[: len(TRAIN)].equal(TRAIN.values)
    for label, n in enumerate(COUNTS.tolist()):
        real = TRAIN.values[TRAIN.targets == label].double()
        distance = torch.cdist(real, real).fill_diagonal_(math.inf)
        nearest = distance.argsort(1)[:, : min(5, n - 1)]
        made = grown.values[len(TRAIN) :][grown.targets[len(TRAIN) :] == label].double()
        for row in made:
            # On the segment a to b the distances to the two ends add up to its length.
            excess = min(
                float((row - real[a]).norm() + (row - real[b]).norm() - distance[a, b])
                for a in range(n)
                for b in nearest[a].tolist()
            )
            assert excess < 1e-5


def test_smote_fills_up_to_the_largest_class_and_repeats_a_row_that_is_alone():
    features = Features(torch.arange(10.0).view(5, 2), torch.tensor([0, 0, 0, 1, 2]))
    grown = add_smote_rows(features, 4, "largest", seed=0)
    assert torch.bincount(grown.targets).tolist() == [3, 3, 3]
    assert grown.values[grown.targets == 1].equal(torch.tensor([[6.0, 7.0]]).repeat(3, 1))
    again = add_smote_rows(features, 4, "largest", seed=0)
    assert again.values.equal(grown.values)


def test_smote_of_thousands_of_classes():
    targets = torch.cat([torch.arange(3000), torch.arange(20)])
    values = torch.randn(len(targets), 4, generator=torch.Generator().manual_seed(0))
    grown = add_smote_rows(Features(values, targets), 3000, 3)
    assert torch.bincount(grown.targets).eq(3).all()


def test_smote_adds_nothing_to_equal_classes_and_draws_all_of_a_segment():
    features = Features(torch.tensor([[0.0], [1.0], [3.0], [3.0]]), torch.tensor([0, 0, 1, 1]))
    assert add_smote_rows(features, 2, "largest").values.equal(features.values)
    made = add_smote_rows(features, 2, 1002).values[4:].flatten()
    assert stats.kstest(made[:1000], "uniform").pvalue > 1e-3
    assert made[1000:].eq(3).all()


@pytest.mark.parametrize("solver", ["sgd", "lbfgs"])
def test_crt_with_smote_is_crt_on_the_rows_that_it_adds(solver):
    options = {"solver": solver, "weight_decay": 1e-2}
    options |= {"steps": 20} if solver == "sgd" else {}
    head = fit("crt", smote=50, seed=3, **options)
    expected = fit("crt", train=add_smote_rows(TRAIN, C, 50, seed=3), seed=3, **options)
    assert head.weight.equal(expected.weight)
    assert not head.weight.equal(fit("crt", seed=3, **options).weight)


def test_smote_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imblearn.over_sampling", None)
    with pytest.raises(UsageError, match=r"pip install 'timm_lt\[smote\]'"):
        fit("crt", smote=50)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("crt", {"smote": "all"}, "or 'largest', must be an integer from 1"),
        ("crt", {"smote": 0}, "must be an integer from 1"),
        ("crt", {"smote": 10**13}, "must be an integer from 1"),
        ("crt", {"solver": "sgd", "steps": 10**12}, "steps of head 'crt' must be an integer from"),
        ("crt", {"loss": "fokal"}, "loss of head 'crt': unknown loss 'fokal'.*balanced_softmax"),
        (
            "crt",
            {"loss": "logit_adjustment"},
            "needs solver: sgd; lbfgs solves cross_entropy and b",
        ),
        ("crt", {**SGD, "loss": "ldam"}, "loss 'ldam' of head 'crt', which is linear: "),
        ("crt", {**SGD, "loss": "bilateral"}, "loss 'bilateral' of head 'crt' takes pairs"),
        ("crt", {"sampler": "square_root"}, "sampler of head 'crt' has no effect with solver 'lbf"),
        ("crt", {**SGD, "sampler": "sqrt"}, "sampler of head 'crt': unknown sampler 'sqrt'"),
        ("crt", {**SGD, "sampler_options": {"q": 1}}, "of head 'crt'.*has no option 'q'"),
        ("crt", {**SGD, "sampler_options": {"seed": 1}}, "has no option 'seed'"),
        ("crt", {**SGD, "sampler": "deferred", "sampler_options": {"start": 3}}, "single epoch"),
        ("crt", {**SGD, "loss_options": {"tau": 1}}, "loss of head 'crt'.*has no option 'tau'"),
        (
            "crt",
            {**SGD, "loss_options": {"reduction": "sum"}},
            "reduction in loss_options",
        ),
        ("crt", {**SGD, "loss_options": 3}, "loss_options of head 'crt' must be a mapping .*got 3"),
        ("crt", {"solver": "sgd", "steps": 5, "epochs": 5}, "give one of them"),
        ("lws", {"steps": 5, "epochs": 5}, "give one of them"),
        ("lws", {"epochs": 0}, "epochs of head 'lws' must be an integer from 1"),
        ("crt", {"epochs": 3}, "epochs of head 'crt' has no effect with solver 'lbfgs'"),
        ("crt", {"max_norm": 1.0}, "max_norm of head 'crt' has no effect with solver 'lbfgs'"),
        ("crt", {"solver": "sgd", "max_norm": 0}, r"max_norm of head 'crt' must be .* \(0, inf\)"),
        ("crt", {"keep": "best"}, "keep of head 'crt' has no effect with solver 'lbfgs'"),
        ("lws", {"keep": "worst"}, "choose one of: last, best"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_fitted(name, options, message):
    with pytest.raises(UsageError, match=message):
        check_fit_options(name, options)


def test_options_of_crt_are_those_of_the_solver_that_goes_by_size(monkeypatch):
    fit("crt", max_iterations=2)
    with pytest.raises(UsageError, match="steps of head 'crt' has no effect with solver 'lbfgs'"):
        fit("crt", steps=5)
    monkeypatch.setattr(gradient, "LARGE", len(TRAIN) * C * D - 1)
    given = {"steps": 5, "lr": 0.1, "sampler": "square_root", "seed": 3}
    assert fit("crt", **given).weight.equal(fit("crt", solver="sgd", **given).weight)
    with pytest.raises(UsageError, match=r"max_iterations .* no effect with solver 'sgd'; remove"):
        fit("crt", max_iterations=2)
    with pytest.raises(UsageError, match=r"max_iterations .* no effect with solver 'sgd'; remove"):
        fit("auto", heads={"ncm": {}, "crt": {"max_iterations": 2}})
    fit("crt", solver="lbfgs", max_iterations=2)
    # Rows of SMOTE count.
    monkeypatch.setattr(gradient, "LARGE", len(TRAIN) * C * D)
    fit("crt", max_iterations=2)
    fit("crt", steps=5, smote="largest")


def test_keeping_the_best_asks_for_validation_features():
    with pytest.raises(UsageError, match="pass val=, or keep='last'"):
        fit("lws", keep="best", val=None)


# Features that lie in a file, read in blocks -----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ncm", {"features": "raw"}),
        ("ncm", {"features": "centered_l2"}),
        ("crt", {"weight_decay": 1e-2}),
        ("crt", {"solver": "sgd", "steps": 20}),
        ("crt", {"weight_decay": 1e-2, "smote": 50}),
        ("lws", {"steps": 20}),
        ("lws", {"steps": 20, "scale_bias": False}),
        ("cosine", {"steps": 20}),
        ("tau_norm", {}),
        ("logit_adjusted", {}),
    ],
)
def test_blocks_of_features_in_a_file_give_the_same_head(name, options, tmp_path, monkeypatch):
    half = Features(TRAIN.values.half(), TRAIN.targets)
    expected = fit(name, train=half, **options)
    (tmp_path / "values").write_bytes(half.values.numpy().tobytes())
    shape = half.values.shape
    mapped = torch.from_file(str(tmp_path / "values"), size=half.values.numel(), dtype=torch.half)
    monkeypatch.setattr(rows, "ENTRIES", 7 * D)
    monkeypatch.setattr(rows, "MAX_BYTES", 0)  # the logits of lws are computed for each batch
    head = fit(name, train=Features(mapped.view(shape), TRAIN.targets), **options)
    # L-BFGS ends near the minimum, by a way that depends on every rounding.
    tolerance = 3e-3 if "weight_decay" in options else 1e-4
    for key, value in tensors(head).items():
        torch.testing.assert_close(value, tensors(expected)[key], rtol=1e-3, atol=tolerance)


# Objectives --------------------------------------------------------------------------------------


def by_hand(head, objective):
    """An objective on validation, from its definition."""
    preds = head(VAL.values).argmax(1).numpy()
    targets = VAL.targets.numpy()
    recalls = [float((preds[targets == c] == c).mean()) for c in range(C)]
    groups = [recalls[0], recalls[1], (recalls[2] + recalls[3]) / 2]  # 120 | 40 | 15, 5 images
    return {
        "all": float((preds == targets).mean()),
        "class_mean": float(np.mean(recalls)),
        "few_shot": groups[2],
        "harmonic_mean": 3 / sum(1 / g for g in groups) if all(groups) else 0.0,
        "worst_class": min(recalls),
    }[objective]


OBJECTIVES = ["all", "class_mean", "few_shot", "harmonic_mean", "worst_class"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weight_decay_is_chosen_by_the_objective(objective):
    head = fit("crt", objective=objective)
    values = [by_hand(fit("crt", weight_decay=decay), objective) for decay in WEIGHT_DECAYS]
    assert head.selection["objective"] == objective
    assert head.selection["val_accuracy"] == pytest.approx(by_hand(head, objective))
    assert by_hand(head, objective) >= max(values) - 1 / 20 - 1e-9
    assert head.selection["val_accuracy"] == max(value for _, value in head.selection["compared"])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["tau_norm", "logit_adjusted"])
def test_tau_is_chosen_by_the_objective(name, objective):
    head = fit(name, objective=objective)
    swept = [by_hand(fit(name, tau=tau), objective) for tau in np.linspace(0, 4, 401).tolist()]
    assert by_hand(head, objective) >= max(swept) - 1e-9
    assert head.selection["val_accuracy"] == pytest.approx(by_hand(head, objective))


def test_an_unknown_objective_is_refused():
    with pytest.raises(UsageError, match="choose one of: all, class_mean, few_shot"):
        fit("tau_norm", objective="f1")


def test_few_shot_needs_a_few_shot_class():
    with pytest.raises(UsageError, match="few_shot"):
        fit("tau_norm", objective="few_shot", class_counts=torch.tensor([500, 400, 300, 200]))
    with pytest.raises(UsageError, match="few_shot"):
        fit("crt", objective="few_shot", class_counts=torch.tensor([500, 400, 300, 200]))


def test_the_rule_moves_the_groups_of_an_objective():
    counts = torch.tensor([120, 40, 20, 20])  # few-shot by oltr alone
    head = fit("tau_norm", objective="few_shot", class_counts=counts, rule="oltr")
    preds = head(VAL.values).argmax(1)
    report = shot_accuracy(preds, VAL.targets, counts, "oltr")
    assert head.selection["val_accuracy"] == pytest.approx(report.few_shot)


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

N, D, C = 120_000, 512, 20
values = torch.from_file("values", shared=True, size=N * D).view(N, D)
targets = torch.arange(N) % C
for start in range(0, N, 10_000):
    part = slice(start, start + 10_000)
    values[part] = torch.randn(10_000, D) + targets[part, None]
features = Features(values, targets)
joint = torch.nn.Linear(D, C)
val = Features(values[:1000].clone(), targets[:1000])
options = {"val": val, "classifier": joint}
fit_head("tau_norm", Features(values[:40].clone(), targets[:40]), **options)  # warm up
threading.Thread(target=watch, daemon=True).start()
before = anonymous()
for name, more in FITS:
    peak = 0
    head = fit_head(name, features, **options, **more)
    print(name, (peak - before) // 1024)
"""


def test_fits_on_features_larger_than_memory_hold_some_blocks_of_them(tmp_path):
    """240 MB of features in a file; what a process holds beside the file is measured."""
    fits = [
        ("ncm", {"features": "centered_l2"}),
        ("lws", {"steps": 20}),
        ("crt", {"solver": "sgd", "steps": 20}),
        ("crt", {"weight_decay": 1e-2, "max_iterations": 2}),
        ("cosine", {"steps": 20}),
        ("logit_adjusted", {}),
    ]
    (tmp_path / "values").write_bytes(b"")
    with (tmp_path / "values").open("r+b") as file:
        file.truncate(120_000 * 512 * 4)
    output = subprocess.run(
        [sys.executable, "-c", FITS_IN_LITTLE_MEMORY.replace("FITS", repr(fits))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    ).stdout
    held = {line.split()[0]: int(line.split()[1]) for line in output.splitlines()}
    assert set(held) == {"ncm", "lws", "crt", "cosine", "logit_adjusted"}
    # A few blocks of 16 MiB and what is made of them, for all that the allocator keeps.
    assert max(held.values()) < 150, held


# Found by review ---------------------------------------------------------------------------------


def float64_means(values, targets, space):
    x = values.double()
    x = x - x.mean(0) if space == "centered_l2" else x
    x = x if space == "raw" else x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return torch.stack([x[targets == c].mean(0) for c in range(int(targets.max()) + 1)])


@pytest.mark.parametrize("space", ["raw", "l2", "centered_l2"])
@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
def test_class_means_are_right_far_from_the_origin(space, offset):
    values = TRAIN.values + offset
    means = class_means(values, TRAIN.targets, C, (space,), values.double().mean(0))[space]
    expected = float64_means(values, TRAIN.targets, space)
    torch.testing.assert_close(means.double(), expected, rtol=1e-5, atol=2e-7 * max(offset, 10))


@pytest.mark.parametrize("rows", [1, 40])
def test_features_that_are_all_the_same_have_centered_means_of_zero(rows):
    features = Features(torch.full((rows, 3), 0.7), torch.zeros(rows, dtype=torch.int64))
    head = fit(
        "ncm", train=features, val=None, classifier=None, features="centered_l2", class_counts=None
    )
    assert head.weight.abs().max() < 1e-5


def test_features_whose_norm_is_beyond_float32_are_an_error():
    with pytest.raises(UsageError, match="too large"):
        fit("ncm", train=Features(TRAIN.values * 1e30, TRAIN.targets), features="l2")


def test_crt_takes_features_of_any_size():
    for scale in (1e-25, 1e25):
        head = fit(
            "crt",
            train=Features(TRAIN.values * scale, TRAIN.targets),
            weight_decay=0.0,
            max_iterations=20,
            val=None,
        )
        preds = (TEST.values * scale @ head.weight.T + head.bias).argmax(1)
        assert (preds == TEST.targets).double().mean() > 0.6


def test_views_are_of_the_same_images_and_count_once():
    views = Features(TRAIN.values.repeat(3, 1), TRAIN.targets.repeat(3), views=3)
    one, three = (
        fit("logit_adjusted", train=train, class_counts=None, objective="few_shot")
        for train in (TRAIN, views)
    )
    assert three.log_prior.equal(one.log_prior)
    assert three.selection == one.selection


def test_where_an_objective_is_the_same_for_all_the_mean_over_the_classes_decides():
    """No image of class 3 is ever right, so the worst class is 0 at every tau and decay."""
    targets = VAL.targets.clone()
    targets[targets == 3] = 2
    targets[:1] = 3
    val = Features(-VAL.values.where(targets[:, None] == 3, -VAL.values), targets)
    for name in ("tau_norm", "logit_adjusted", "crt", "auto"):
        worst = fit(name, val=val, objective="worst_class")
        if worst.selection["val_accuracy"] == 0:
            mean = fit(name, val=val, objective="class_mean")
            report = [
                shot_accuracy(h(val.values).argmax(1), targets, COUNTS) for h in (worst, mean)
            ]
            assert report[0].class_mean == pytest.approx(report[1].class_mean)
