"""The classifier stage of a run: views, the cache, what is selected, the best of the heads."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState

import timm_lt
import train_lt
from timm_lt.data import create_dataset, register_dataset
from timm_lt.data.sources import DATASETS
from timm_lt.metrics import ShotReport

DIGITS = ["hub_configs/lt_test_resnet.digits_lt.yaml", "--epochs", "1", "--quiet"]


def run(folder, *arguments, recipe=DIGITS):
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train_lt.main([*recipe, "--output", str(folder), *arguments]) == 0
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.slow
def test_the_best_of_the_heads_is_one_more_head(tmp_path):
    heads = "{linear: {}, ncm: {}, crt: {stage: images, bn: shift, steps: 6}, auto: {}}"
    metrics = run(tmp_path / "run", "--heads", heads, "--objective", "worst_class")
    record = metrics["selection"]["auto"]
    compared = dict(record["compared"])
    assert list(compared) == ["linear", "ncm", "crt"]
    assert record["objective"] == "worst_class"
    assert compared[record["head"]] == max(compared.values())
    # Its test figures are those of the head that it is.
    chosen, auto = (ShotReport.from_dict(metrics["heads"][h]) for h in (record["head"], "auto"))
    assert auto.all == chosen.all
    assert auto.per_class.equal(chosen.per_class)
    assert metrics["logits_sha256"]["auto"] == metrics["logits_sha256"][record["head"]]
    model = timm_lt.create_model(f"local-dir:{tmp_path / 'run'}", head="auto")
    named = timm_lt.create_model(f"local-dir:{tmp_path / 'run'}", head=record["head"])
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        assert model.eval()(images).equal(named.eval()(images))


@pytest.mark.slow
def test_features_in_a_cache_give_the_same_run_and_are_read_by_the_next(tmp_path):
    heads = ("--heads", "{linear: {}, ncm: {}}")
    cache = ("--features.cache_dir", str(tmp_path / "cache"))
    plain = run(tmp_path / "plain", *heads)
    first = run(tmp_path / "first", *heads, *cache)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.npy")}
    second = run(tmp_path / "second", *heads, *cache)
    assert len(files) == 6
    assert plain["logits_sha256"] == first["logits_sha256"] == second["logits_sha256"]
    assert {path: path.stat().st_mtime_ns for path in files} == files
    # Other weights have other features.
    run(tmp_path / "third", *heads, *cache, "--seed", "1")
    assert len([*(tmp_path / "cache").glob("*.npy")]) == 12


@pytest.mark.slow
def test_views_of_training_images_are_augmented_and_only_theirs(tmp_path):
    heads = ("--heads", "{linear: {}, crt: {weight_decay: 0.01}}")
    augmented = ("--data.augmentation", "crop")
    plain = run(tmp_path / "plain", *heads, *augmented)
    views = run(tmp_path / "views", *heads, *augmented, "--features.views", "2")
    assert plain["logits_sha256"]["linear"] == views["logits_sha256"]["linear"]
    assert plain["logits_sha256"]["crt"] != views["logits_sha256"]["crt"]
    assert plain["class_counts"] == views["class_counts"]


@pytest.fixture
def register():
    """Returns a function that registers a data set while the test runs."""
    names = []

    def add(name, load):
        names.append(name)
        register_dataset(name)(load)
        return name

    yield add
    for name in names:
        del DATASETS._parts[name]


@pytest.mark.slow
def test_validation_that_is_held_out_is_recorded_and_judged_by_class(tmp_path, register):
    def load(split):
        return None if split == "val" else create_dataset("digits_lt", split=split)

    name = register("digits_without_val", load)
    metrics = run(
        tmp_path / "run",
        *("--data.name", name, "--data.val_fraction", "0.3"),
        *("--heads", "{tau_norm: {}, linear: {}}", "--heads.auto", "{}"),
    )
    whole = timm_lt.class_counts(create_dataset("digits_lt", split="train")["label"])
    held_out = (whole * 0.3).round().clamp(min=1).long()
    assert metrics["class_counts"] == (whole - held_out).tolist()
    for record in metrics["selection"].values():
        assert record["objective"] == "class_mean"
        assert record["split"] == "train, held out"
        assert record.get("options", record)["split"] == "train, held out"
    assert metrics["validation"] == "train, held out"
    assert "on train, held out" in (tmp_path / "run" / "README.md").read_text()


def test_an_objective_that_the_data_cannot_answer_is_named_before_training(
    tmp_path, capsys, register
):
    name = register("digits_without_few_shot", lambda _: create_dataset("digits_lt", split="test"))
    arguments = [*DIGITS, "--data.name", name, "--objective", "few_shot"]
    assert train_lt.main([*arguments, "--output", str(tmp_path / "run")]) == 2
    assert "no few-shot class" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_heads_have_names_of_their_own(tmp_path):
    heads = (
        "{linear: {}, crt: {solver: sgd, steps: 5},"
        " crt_rs: {kind: crt, solver: sgd, steps: 5, sampler: square_root},"
        " half: {kind: tau_norm, tau: 0.5}, auto: {}}"
    )
    metrics = run(tmp_path / "run", "--heads", heads)
    assert list(metrics["heads"]) == ["linear", "crt", "crt_rs", "half", "auto"]
    weights = {}
    for name, kind in {"crt": "crt", "crt_rs": "crt", "half": "tau_norm"}.items():
        model = timm_lt.create_model(f"local-dir:{tmp_path / 'run'}", head=name)
        head = model.get_classifier()
        assert head.kind == kind
        weights[name] = head.weight
    assert not torch.equal(weights["crt"], weights["crt_rs"])
