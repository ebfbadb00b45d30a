"""The classifier stage of a run: views, what is selected, the best of the heads."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState

import timm_lt
import train_lt
from timm_lt.data import create_dataset, register_dataset
from timm_lt.data.sources import DATASETS
from timm_lt.metrics import ShotReport


@pytest.fixture
def run(tmp_path):
    """Returns a function: name of a folder, heads, options -> metrics of a run there."""

    def command(name, heads, *options):
        AcceleratorState._reset_state(reset_partial_state=True)
        given = ["lt_test_resnet.digits_lt", "--epochs", "1", "--quiet", "--heads", heads]
        assert train_lt.main([*given, "--output", str(tmp_path / name), *options]) == 0
        return json.loads((tmp_path / name / "metrics.json").read_text())

    return command


@pytest.mark.slow
def test_the_best_of_the_heads_is_one_more_head_and_heads_have_names_of_their_own(run, tmp_path):
    heads = (
        "{linear: {}, ncm: {}, crt: {stage: images, bn: shift, steps: 6}, half: {kind: tau_norm, "
        "tau: 0.5}, crt_5: {kind: crt, solver: sgd, steps: 5}, auto: {}}"
    )
    metrics = run("run", heads, "--objective", "worst_class")
    record = metrics["selection"]["auto"]
    compared = dict(record["compared"])
    assert list(compared) == ["linear", "ncm", "crt", "half", "crt_5"]
    assert record["objective"] == "worst_class"
    assert compared[record["head"]] == max(compared.values())
    # Its test figures are those of the head that it is.
    chosen, auto = (ShotReport.from_dict(metrics["heads"][h]) for h in (record["head"], "auto"))
    assert auto.all == chosen.all
    assert auto.per_class.equal(chosen.per_class)
    assert metrics["logits_sha256"]["auto"] == metrics["logits_sha256"][record["head"]]
    models = {
        name: timm_lt.create_model(f"local-dir:{tmp_path / 'run'}", head=name).eval()
        for name in ("auto", record["head"], "half", "crt", "crt_5")
    }
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        assert models["auto"](images).equal(models[record["head"]](images))
    found = {name: model.get_classifier() for name, model in models.items()}
    kinds = {name: found[name].kind for name in ("half", "crt", "crt_5")}
    assert kinds == {"half": "tau_norm", "crt": "crt", "crt_5": "crt"}
    assert not torch.equal(found["crt"].weight, found["crt_5"].weight)


@pytest.mark.slow
def test_views_of_training_images_are_augmented_and_only_theirs(run):
    heads = "{linear: {}, crt: {weight_decay: 0.01}}"
    augmented = ("--data.augmentation", "crop")
    plain, views = run("a", heads, *augmented), run("b", heads, *augmented, "--features.views", "2")
    assert plain["logits_sha256"]["linear"] == views["logits_sha256"]["linear"]
    assert plain["logits_sha256"]["crt"] != views["logits_sha256"]["crt"]
    assert plain["class_counts"] == views["class_counts"]


@pytest.fixture
def without_val():
    def load(split):
        return None if split == "val" else create_dataset("digits_lt", split=split)

    register_dataset("digits_without_val")(load)
    yield "digits_without_val"
    del DATASETS._parts["digits_without_val"]


@pytest.mark.slow
def test_validation_that_is_held_out_is_recorded_and_judged_by_class(run, tmp_path, without_val):
    data = ("--data.name", without_val, "--data.val_fraction", "0.3")
    metrics = run("run", "{tau_norm: {}, linear: {}, auto: {}}", *data)
    whole = timm_lt.class_counts(create_dataset("digits_lt", split="train")["label"])
    held_out = (whole * 0.3).round().clamp(min=1).long()
    assert metrics["class_counts"] == (whole - held_out).tolist()
    for record in metrics["selection"].values():
        assert record["objective"] == "class_mean"
        assert record["split"] == record.get("options", record)["split"] == "train, held out"
    assert metrics["validation"] == "train, held out"
    assert "on train, held out" in (tmp_path / "run" / "README.md").read_text()
