"""Recipes that go on from a finished run: what is trained again, what is drawn anew, what stays."""

import copy
import json
import math

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.nn.functional import normalize

import timm_lt
import train_lt
from timm_lt.run.network import create_network, start_network
from timm_lt.run.recipe import ModelRecipe, Recipe
from timm_lt.training.loop import RepresentationTrainer, Training
from timm_lt.training.state import EpochRecord

FEW = ["--epochs", "1", "--quiet", "--heads", "{linear: {}}", "--mixed_precision", "no"]


def run(folder, *arguments):
    AcceleratorState._reset_state(reset_partial_state=True)
    given = ["lt_test_resnet.digits_lt", "--output", folder, *FEW, *arguments]
    return train_lt.main(list(map(str, given)))


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "joint"
    assert run(folder) == 0
    return folder


def results(folder):
    """The weights but batch norm's counters, and the digests of the logits."""
    weights = load_file(folder / "model.safetensors")
    weights = {key: value for key, value in weights.items() if "num_batches" not in key}
    return weights, json.loads((folder / "metrics.json").read_text())["logits_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained", "moving"),
    [(None, ""), (["last_block"], ("layer4.0.", "fc.")), ([], "fc.")],
    ids=["B + C", "last block + C", "C"],
)
def test_a_run_goes_on_from_a_finished_one_offline(
    joint, tmp_path, capsys, monkeypatch, trained, moving
):
    # Whoever asks the network is refused.
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asks the network"))
    options = ["--model.name", f"local-dir:{joint}", "--model.pretrained", "true"]
    options += ["--model.trained", json.dumps(trained), "--sampler.name", "class_balanced"]
    folder, fresh = tmp_path / "run", "--model.fresh_classifier"
    assert run(folder, *options, fresh, "true") == 0
    before, (after, digests) = results(joint)[0], results(folder)
    changed = {key for key, value in after.items() if not value.equal(before[key])}
    assert changed == {key for key in before if key.startswith(moving)}
    # The same again, from its state, and no other recipe.
    (folder / "metrics.json").unlink()
    (folder / "model.safetensors").unlink()
    assert run(folder, *options, "--resume", fresh, "true") == 0
    again = results(folder)
    assert all(value.equal(after[key]) for key, value in again[0].items())
    assert (again[0].keys(), again[1]) == (after.keys(), digests)
    assert run(folder, *options, "--resume", fresh, "false") == 2
    assert "model.fresh_classifier True there, False now" in capsys.readouterr().err


def test_a_fresh_classifier_is_drawn_from_the_seed():
    def model(**options):
        return ModelRecipe("lt_test_resnet.glyph_lt", True, **options)

    def network(seed, *, fresh):
        return create_network(Recipe(model=model(fresh_classifier=fresh), seed=seed), 100)

    stored, first = network(0, fresh=False), network(0, fresh=True)
    for key, value in first.state_dict().items():
        assert value.equal(stored.state_dict()[key]) is not key.startswith("fc."), key
    assert network(0, fresh=True).fc.weight.equal(first.fc.weight)
    assert not network(1, fresh=True).fc.weight.equal(first.fc.weight)
    # As nn.Linear draws it: uniform within 1 / sqrt(D).
    bound = first.fc.in_features**-0.5
    assert 0.99 * bound < first.fc.weight.abs().max() <= bound
    assert first.fc.bias.abs().max() <= bound
    # And starts where the loss has it start, as a classifier from scratch.
    recipe = Recipe(model=model(fresh_classifier=True))
    start_network(recipe, timm_lt.create_loss("focal", form="sigmoid"), first, 100)
    torch.testing.assert_close(first.fc.bias, torch.full((100,), -math.log(99)))


@pytest.mark.slow
def test_what_was_trained_with_a_cosine_head_goes_on_with_a_new_one(tmp_path, monkeypatch):
    """Its checkpoint has the folded classifier, whose directions are those of the head."""
    models = []

    def untrained(trainer, _):
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        models.append(copy.deepcopy(model))
        return Training(model, [EpochRecord(1, 1.0, 0.1, 100.0, 1.0, {})], 1)

    monkeypatch.setattr(RepresentationTrainer, "run", untrained)
    cosine = {"head": "cosine", "scale": 1.0}
    options = ["--model.options", json.dumps(cosine), "--loss.name", "ldam"]
    assert run(tmp_path / "run", *options) == 0
    name = f"local-dir:{tmp_path / 'run'}"
    weight = normalize(models[0].get_classifier().weight)
    for given in ({}, cosine):
        recipe = Recipe(model=ModelRecipe(name, True, options=given))
        head = create_network(recipe, 10).get_classifier()
        torch.testing.assert_close(normalize(head.weight), weight)
    assert (head.kind, head.options()) == ("cosine", {"scale": 1.0, "learn_scale": False})
    assert timm.create_model(name, pretrained=True).get_classifier().bias.eq(0).all()
