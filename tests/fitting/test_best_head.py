"""Which of several heads: the choice, and intervals against a bootstrap that redraws rows."""

import numpy as np
import pytest
from gaussian_features import COUNTS, TEST, VAL, C, accuracy, fit

from timm_lt.fitting import take_best
from timm_lt.fitting.base import compare_heads
from timm_lt.utils.checks import UsageError

OBJECTIVES = ["all", "class_mean", "few_shot", "harmonic_mean", "worst_class"]
HEADS = {name: fit(name) for name in ("linear", "tau_norm", "crt")}
PREDS = {name: head(VAL.values).argmax(1) for name, head in HEADS.items()}


def by_hand(preds, targets, objective):
    recalls = [(preds[targets == c] == c).mean() for c in range(C)]
    groups = [recalls[0], recalls[1], (recalls[2] + recalls[3]) / 2]
    return {
        "all": (preds == targets).mean(),
        "class_mean": np.mean(recalls),
        "few_shot": groups[2],
        "harmonic_mean": 3 / sum(1 / g for g in groups) if all(groups) else 0.0,
        "worst_class": min(recalls),
    }[objective]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_values_and_intervals_are_those_of_redrawn_images(objective):
    record = compare_heads(PREDS, VAL.targets, COUNTS, objective=objective)
    targets = VAL.targets.numpy()
    values = {name: by_hand(preds.numpy(), targets, objective) for name, preds in PREDS.items()}
    assert dict(record["compared"]) == pytest.approx(values)
    assert record["val_accuracy"] == pytest.approx(max(values.values()))
    assert values[record["head"]] == max(values.values())
    rng = np.random.default_rng(7)
    samples = []
    for _ in range(3000):
        rows = np.concatenate(
            [rng.choice(np.flatnonzero(targets == c), (targets == c).sum()) for c in range(C)]
        )
        samples.append([by_hand(p.numpy()[rows], targets[rows], objective) for p in PREDS.values()])
    samples = np.array(samples)
    best = list(PREDS).index(record["head"])
    # A percentile of the worst class is a number of its 20 images.
    tolerance = 0.051 if objective == "worst_class" else 0.03
    for place, name in enumerate(PREDS):
        expected = np.quantile(samples[:, place], [0.025, 0.975])
        assert record["intervals"][name] == pytest.approx(expected, abs=tolerance)
        behind = np.quantile(samples[:, best] - samples[:, place], [0.025, 0.975])
        assert record["behind"][name] == pytest.approx(behind, abs=tolerance)
    assert record["behind"][record["head"]] == [0.0, 0.0]


def test_auto_is_the_best_head_on_validation_and_says_what_it_compared():
    head = fit("auto")
    by_name = {name: accuracy(fit(name), VAL) for name in ("linear", "crt", "tau_norm", "ncm")}
    compared = dict(head.selection["compared"])
    assert set(compared) == {"linear", "crt", "tau_norm", "lws", "ncm", "logit_adjusted"}
    assert by_name == pytest.approx({name: compared[name] for name in by_name})
    chosen = head.selection["head"]
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
    heads = {"crt": HEADS["crt"], "linear": HEADS["linear"]}
    before = dict(HEADS["crt"].selection)
    preds = {"crt": VAL.targets, "linear": PREDS["linear"]}  # as if crt were always right
    best = take_best(heads, preds, VAL.targets, COUNTS)
    assert best.selection["head"] == "crt"
    assert best.selection["options"] == before == HEADS["crt"].selection
    assert best is not HEADS["crt"]
    assert best.weight.equal(HEADS["crt"].weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": None}, "head 'auto' selects a head on validation features: pass val="),
        ({"heads": {}}, "there are no heads to choose from"),
        ({"heads": {"crtt": {}}}, "did you mean 'crt'"),
        ({"heads": "linear"}, "must be names of heads, or map each to its options; got 'linear'"),
        ({"heads": {"linear": 3}}, "must be names of heads, or map each to its options"),
        ({"heads": {"lws": {"tau": 1}}}, "head 'lws' has no option 'tau'"),
        ({"tau": 1.0}, "head 'auto' has no option 'tau'.*heads"),
        ({"classifier": None, "heads": {"tau_norm": {}}}, "starts from the joint classifier"),
    ],
)
def test_what_auto_cannot_do_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        fit("auto", **options)
