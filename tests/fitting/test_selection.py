"""Options of fits: selection on validation by objectives, the best of several heads, bad input."""

import sys

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
    fit,
    objective_by_hand,
)

from timm_lt.features import Features
from timm_lt.fitting import create_fit, gradient, register_fit, take_best
from timm_lt.fitting.gradient import WEIGHT_DECAYS
from timm_lt.heads import list_heads
from timm_lt.metrics import OBJECTIVES, shot_accuracy
from timm_lt.utils.checks import UsageError

SGD, LBFGS = {"solver": "sgd"}, {"solver": "lbfgs"}
TARGETS = VAL.targets.numpy()
by_objective = pytest.mark.parametrize("objective", OBJECTIVES)


def by_hand(head, objective):
    return objective_by_hand(head(VAL.values).argmax(1).numpy(), TARGETS, objective)


@by_objective
def test_crt_selects_the_weight_decay_by_the_objective_and_records_it(objective):
    head = fit("crt", objective=objective)
    selection, compared = head.selection, dict(head.selection["compared"])
    assert (selection["objective"], selection["split"]) == (objective, "val")
    assert list(compared) == list(WEIGHT_DECAYS)
    cold = {d: by_hand(fit("crt", weight_decay=d), objective) for d in WEIGHT_DECAYS}
    # Warm starts and cold ones end at the same minimum, give or take an image of a class.
    assert compared == pytest.approx(cold, abs=1 / 20 + 1e-9)
    assert selection["val_accuracy"] == pytest.approx(by_hand(head, objective))
    assert selection["val_accuracy"] == max(compared.values())
    best = [d for d in WEIGHT_DECAYS if compared[d] == max(compared.values())]
    assert selection["weight_decay"] in best
    assert fit("crt", weight_decay=1e-3).selection == {}


@by_objective
@pytest.mark.parametrize("name", ["tau_norm", "logit_adjusted"])
def test_the_selected_tau_is_not_beaten_in_a_brute_force_sweep(name, objective):
    head = fit(name, objective=objective)
    weight = JOINT.weight.detach().double().numpy()
    scores, bias = VAL.values.double().numpy() @ weight.T, JOINT.bias.detach().numpy()
    prior = COUNTS.numpy() / COUNTS.sum().item()
    swept = []
    for tau in np.linspace(0, 4, 1001):
        if name == "tau_norm":
            logits = scores / np.sqrt((weight**2).sum(1)) ** tau
        else:
            logits = scores + bias - tau * np.log(prior)
        swept.append(objective_by_hand(logits.argmax(1), TARGETS, objective))
    assert by_hand(head, objective) >= max(swept) - 1e-9
    assert head.selection == {
        "tau": head.tau,
        "objective": objective,
        "split": "val",
        "val_accuracy": pytest.approx(by_hand(head, objective), abs=1e-12),
    }
    given = fit(name, tau=0.7)
    assert (given.tau, given.selection) == (0.7, {})
    # From validation alone.
    assert fit(name, train=TEST, objective=objective).tau == head.tau


def test_tau_norm_with_its_bias_selects_from_a_grid():
    head = fit("tau_norm", keep_bias=True)
    swept = {tau: accuracy(fit("tau_norm", keep_bias=True, tau=tau), VAL) for tau in (0, 0.5, 1, 2)}
    compared = dict(head.selection["compared"])
    assert accuracy(head, VAL) == max(compared.values()) >= max(swept.values())
    assert {tau: compared[tau] for tau in swept} == pytest.approx(swept)
    assert head.tau == head.selection["tau"]


@pytest.mark.parametrize(("name", "options"), [("crt", SGD), ("lws", {})])
def test_the_best_of_ten_looks_is_kept(name, options):
    options = {"steps": 50, "lr": 2.0} | options
    best, last = fit(name, keep="best", **options), fit(name, **options)
    compared = dict(best.selection["compared"])
    assert list(compared) == [5, 10, 15, 20, 25, 30, 35, 40, 45, 50]
    assert compared[50] == accuracy(last, VAL)
    assert accuracy(best, VAL) == best.selection["val_accuracy"] == max(compared.values())
    assert compared[best.selection["steps"]] == max(compared.values())
    assert last.selection == {}


def test_the_rule_moves_the_groups_of_an_objective():
    counts = torch.tensor([120, 40, 20, 20])  # few-shot by oltr alone
    head = fit("tau_norm", objective="few_shot", class_counts=counts, rule="oltr")
    report = shot_accuracy(head(VAL.values).argmax(1), VAL.targets, counts, "oltr")
    assert head.selection["val_accuracy"] == pytest.approx(report.few_shot)


def test_counts_are_those_of_the_images_and_views_count_once():
    views = Features(TRAIN.values.repeat(3, 1), TRAIN.targets.repeat(3), views=3)
    given = fit("logit_adjusted", objective="few_shot")
    for train in (TRAIN, views):
        counted = fit("logit_adjusted", train=train, class_counts=None, objective="few_shot")
        assert counted.log_prior.equal(given.log_prior)
        assert counted.selection == given.selection


@pytest.mark.parametrize("name", ["tau_norm", "logit_adjusted", "crt", "auto"])
def test_where_an_objective_is_the_same_for_all_the_mean_over_the_classes_decides(name):
    """Images of class 3 lie where it never wins, so the worst class is 0 for all candidates."""
    far = -100 * JOINT.weight[3].detach()
    val = Features(VAL.values.where(VAL.targets[:, None] != 3, far), VAL.targets)
    heads = [fit(name, val=val, objective=o) for o in ("worst_class", "class_mean")]
    reports = [shot_accuracy(h(val.values).argmax(1), val.targets, COUNTS) for h in heads]
    assert heads[0].selection["val_accuracy"] == 0
    assert reports[0].class_mean == pytest.approx(reports[1].class_mean)


HEADS = {name: fit(name) for name in ("linear", "tau_norm", "crt")}
PREDS = {name: head(VAL.values).argmax(1) for name, head in HEADS.items()}


@by_objective
def test_values_and_intervals_are_those_of_redrawn_images(objective):
    record = take_best(HEADS, PREDS, VAL.targets, COUNTS, objective).selection
    values = {name: by_hand(head, objective) for name, head in HEADS.items()}
    assert dict(record["compared"]) == pytest.approx(values)
    assert record["val_accuracy"] == pytest.approx(max(values.values()))
    assert values[record["head"]] == max(values.values())
    rng, of_class = np.random.default_rng(7), [np.flatnonzero(c == TARGETS) for c in range(C)]
    samples = []
    for _ in range(3000):
        rows = np.concatenate([rng.choice(own, len(own)) for own in of_class])
        preds = [p.numpy()[rows] for p in PREDS.values()]
        samples.append([objective_by_hand(p, TARGETS[rows], objective) for p in preds])
    samples = np.array(samples)
    best = samples[:, [*PREDS].index(record["head"])]
    # A percentile of the worst class is a number of its 20 images.
    tolerance = 0.051 if objective == "worst_class" else 0.03
    for sample, name in zip(samples.T, PREDS, strict=True):
        for key, drawn in (("intervals", sample), ("behind", best - sample)):
            expected = np.quantile(drawn, [0.025, 0.975])
            assert record[key][name] == pytest.approx(expected, abs=tolerance)
    assert record["behind"][record["head"]] == [0.0, 0.0]


def test_auto_is_the_best_head_on_validation_and_records_what_it_compared():
    head = fit("auto")
    compared, chosen = dict(head.selection["compared"]), head.selection["head"]
    by_name = {name: accuracy(fit(name), VAL) for name in ("linear", "crt", "tau_norm", "ncm")}
    assert set(compared) == {"linear", "crt", "tau_norm", "lws", "ncm", "logit_adjusted"}
    assert by_name == pytest.approx({name: compared[name] for name in by_name})
    assert compared[chosen] == max(compared.values()) == accuracy(head, VAL)
    assert head.kind == fit(chosen).kind
    assert accuracy(head, TEST) == accuracy(fit(chosen), TEST)


def test_auto_compares_the_heads_that_it_is_given_by_the_objective():
    heads = {"linear": {}, "tau_norm": {"tau": 0.1}, "ncm": {"metric": "euclidean"}}
    head = fit("auto", heads=heads, objective="few_shot")
    assert [name for name, _ in head.selection["compared"]] == list(heads)
    assert head.selection["objective"] == "few_shot"
    named = fit("auto", heads=["linear", "tau_norm"]).selection["compared"]
    assert named == fit("auto", heads={"linear": None, "tau_norm": {}}).selection["compared"]
    assert set(dict(fit("auto", classifier=None).selection["compared"])) == {"crt", "ncm"}


def test_a_choice_keeps_what_was_selected_before_and_the_heads_as_they_are():
    before = dict(HEADS["crt"].selection)
    preds = {"crt": VAL.targets, "linear": PREDS["linear"]}  # as if crt were always right
    best = take_best(HEADS, preds, VAL.targets, COUNTS)
    assert best.selection["head"] == "crt"
    assert best.selection["options"] == before == HEADS["crt"].selection
    assert best is not HEADS["crt"]
    assert best.weight.equal(HEADS["crt"].weight)


def test_the_solver_goes_by_the_size_of_the_problem(monkeypatch):
    exact, by_sgd = (fit("crt", solver=s, weight_decay=1e-2) for s in ("lbfgs", "sgd"))
    assert fit("crt", weight_decay=1e-2).weight.equal(exact.weight)
    # Rows of SMOTE count.
    monkeypatch.setattr(gradient, "LARGE", len(TRAIN) * C * D)
    smote = {"smote": "largest", "weight_decay": 1e-2}
    assert fit("crt", **smote).weight.equal(fit("crt", solver="sgd", **smote).weight)
    assert fit("crt", weight_decay=1e-2).weight.equal(exact.weight)
    monkeypatch.setattr(gradient, "LARGE", len(TRAIN) * C * D - 1)
    assert fit("crt", weight_decay=1e-2).weight.equal(by_sgd.weight)
    lbfgs = {"weight_decay": 1e-2, "max_iterations": 3}
    assert fit("crt", **lbfgs).weight.equal(fit("crt", solver="lbfgs", **lbfgs).weight)
    assert fit("crt", steps=5).weight.equal(fit("crt", steps=5, solver="sgd").weight)


@pytest.mark.parametrize(
    ("smote", "views", "rows", "epochs"),
    [(None, 1, 180, 6), ("largest", 1, 480, 3), (None, 2, 360, 3)],
)
def test_a_schedule_that_starts_after_the_training_is_refused(smote, views, rows, epochs):
    """2 steps of 512 rows are 6 passes over the 180 rows, or 3 over the 480 of SMOTE."""
    for start in (epochs - 1, epochs):
        loss = {"loss": "deferred_reweighting", "loss_options": {"start": start}}
        fit = create_fit("crt", steps=2, sampler="instance_balanced", smote=smote, **loss)
        if start < epochs:
            fit.check_classes(COUNTS, views=views)
    with pytest.raises(UsageError, match=rf"an epoch is {rows} rows\): start {epochs} is not with"):
        fit.check_classes(COUNTS, views=views)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tau_nrom", {}, "did you mean 'tau_norm'"),
        *((name, {"tua": 1}, f"head '{name}' has no option 'tua'.*valid") for name in list_heads()),
        ("cosine", {"scale": 0.0}, "scale of head 'cosine' must be"),
        ("tau_norm", {"tau": -0.1}, r"tau must be a number in \[0, inf\)"),
        ("ncm", {"metric": None}, "unknown metric of head 'ncm'.* None"),
        ("lws", {"steps": 0}, "steps of head 'lws' must be an integer from 1"),
        ("lws", {"lr": None}, r"lr of head 'lws' must be a number in \(0, inf\), got None"),
        ("lws", {"steps": 5, "epochs": 5}, "give one of them"),
        ("crt", {"smote": "all"}, "or 'largest', must be an integer from 1"),
        ("crt", {"loss": "ldam"}, "loss of head 'crt', a linear classifier: .*cosine"),
        ("crt", {"loss": "bilateral"}, "'bilateral' takes pairs"),
        ("crt", {"loss_options": {"tau": 1}}, "loss of head 'crt'.*has no option 'tau'"),
        ("crt", {"loss_options": {"reduction": "sum"}}, "reduction in loss_options"),
        ("crt", {"sampler": "deferred", "sampler_options": {"start": 3}}, "from epoch to epoch"),
        ("crt", LBFGS | {"keep": "best"}, "keep of head .crt. has no effect with the solver"),
        ("crt", {"steps": 5, "max_iterations": 9}, "steps of head .crt. has no effect"),
        ("crt", SGD | {"max_iterations": 9}, "max_iterations of head 'crt' has no effect"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_fitted(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_fit(name, **options)


def test_smote_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "imblearn.over_sampling", None)
    with pytest.raises(UsageError, match=r"smote: .*imblearn.*; pip install 'timm_lt\[smote\]'"):
        create_fit("crt", smote=50)


def test_a_fit_needs_a_head_of_its_name():
    with pytest.raises(UsageError, match="unknown head 'no_such_head'"):
        register_fit("no_such_head")
    with pytest.raises(UsageError, match="registered already"):
        register_fit("ncm")


def swap(features, old, new):
    return Features(features.values, features.targets.where(features.targets != old, new))


def narrow(features):
    return Features(features.values[:, :5], features.targets)


FEW = {"objective": "few_shot", "class_counts": torch.tensor([500, 400, 300, 200])}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ncm", {"train": swap(TRAIN, 2, 1)}, "1 of 4 classes have no training image: 2"),
        ("ncm", {"val": swap(VAL, 1, 0)}, "1 of 4 classes have no validation image: 1"),
        ("ncm", {"class_counts": COUNTS - 5}, "1 of 4 classes have no training image: 3"),
        ("ncm", {"class_counts": COUNTS[:3]}, "class_counts has 3 classes, expected 4"),
        ("ncm", {"val": swap(VAL, 2, 9)}, r"targets of val\[\d+\] = 9 is not below num_classes=4"),
        ("ncm", {"train": narrow(TRAIN)}, "features has 5 features per row; expected 6"),
        ("ncm", {"val": narrow(VAL), "classifier": None}, "val has 5 features per row"),
        ("ncm", {"seed": -1}, "seed must be an integer >= 0"),
        ("ncm", {"objective": "f1"}, "choose one of: all, class_mean, few_shot"),
        ("tau_norm", {"classifier": fit("cosine")}, "takes the joint classifier, got a 'cosine'"),
        ("linear", {"weight_decay": 1e-2}, "takes no solver or weight_decay"),
        *((name, FEW, "few_shot") for name in ("tau_norm", "crt")),
        *(
            (name, {"classifier": None}, f"head '{name}' .*joint classifier: pass classifier=")
            for name in ("tau_norm", "lws", "logit_adjusted")
        ),
        ("tau_norm", {"val": None}, "selects tau .*pass val=, or tau="),
        ("lws", {"val": None, "keep": "best"}, "pass val=, or keep='last'"),
        ("auto", {"val": None}, "head 'auto' selects a head on validation features: pass val="),
        ("auto", {"heads": {}}, "auto needs at least one head"),
        ("auto", {"heads": {"linear": 3}}, "options of head 'linear' must be a mapping"),
        ("auto", {"tau": 1.0}, "head 'auto' has no option 'tau'.*heads"),
        ("auto", {"classifier": None, "heads": ["tau_norm"]}, "starts from the joint classifier"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        fit(name, **options)


@pytest.mark.parametrize("name", ["ncm", "crt", "cosine", "fslwf", "oltr"])
def test_some_heads_need_no_joint_classifier(name):
    assert accuracy(fit(name, classifier=None)) > 0.6
