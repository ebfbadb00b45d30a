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

DIGITS = "lt_test_resnet.digits_lt"
FEW = ["--epochs", "1", "--quiet", "--heads", "{linear: {}}", "--mixed_precision", "no"]


def main(capsys, *arguments):
    AcceleratorState._reset_state(reset_partial_state=True)
    status = train_lt.main([DIGITS, *map(str, arguments)])
    return status, capsys.readouterr().err


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "joint"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train_lt.main([DIGITS, "--output", str(folder), *FEW]) == 0
    return folder


def parts(folder):
    """The weights by what they belong to: the statistics of batch norm, the rest by module."""
    weights = load_file(folder / "model.safetensors")
    return {key: value for key, value in weights.items() if "num_batches" not in key}


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
    options = [*FEW, "--model.name", f"local-dir:{joint}", "--model.pretrained", "true"]
    options += ["--model.trained", json.dumps(trained), "--sampler.name", "class_balanced"]
    folder = tmp_path / "run"
    assert main(capsys, "--output", folder, *options, "--model.fresh_classifier", "true")[0] == 0
    before, after = parts(joint), parts(folder)
    changed = {key for key, value in after.items() if not value.equal(before[key])}
    assert changed == {key for key in before if key.startswith(moving)}
    # The same again, from its state, and no other recipe.
    metrics = (folder / "metrics.json").read_bytes()
    (folder / "metrics.json").unlink()
    (folder / "model.safetensors").unlink()
    again = ["--output", folder, *options, "--resume", "--model.fresh_classifier"]
    assert main(capsys, *again, "true")[0] == 0
    assert parts(folder).keys() == after.keys()
    assert all(value.equal(after[key]) for key, value in parts(folder).items())
    assert (
        json.loads(metrics)["logits_sha256"]
        == json.loads((folder / "metrics.json").read_text())["logits_sha256"]
    )
    status, error = main(capsys, *again, "false")
    assert status == 2
    assert "model.fresh_classifier True there, False now" in error


def test_a_fresh_classifier_is_drawn_from_the_seed():
    name = "lt_test_resnet.glyph_lt"

    def network(seed, *, fresh):
        recipe = Recipe(model=ModelRecipe(name, True, fresh_classifier=fresh), seed=seed)
        return create_network(recipe, 100)

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
    recipe = Recipe(model=ModelRecipe(name, True, fresh_classifier=True))
    start_network(recipe, timm_lt.create_loss("focal", form="sigmoid"), first, 100)
    torch.testing.assert_close(first.fc.bias, torch.full((100,), -math.log(99)))


@pytest.mark.slow
def test_what_was_trained_with_a_cosine_head_goes_on_with_a_new_one(tmp_path, capsys, monkeypatch):
    """Its checkpoint has the folded classifier, whose directions are those of the head."""
    models = []

    def untrained(trainer, _):
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        models.append(copy.deepcopy(model))
        return Training(model, [EpochRecord(1, 1.0, 0.1, 100.0, 1.0, {})], 1)

    monkeypatch.setattr(RepresentationTrainer, "run", untrained)
    cosine = {"head": "cosine", "scale": 1.0}
    options = [*FEW, "--model.options", json.dumps(cosine), "--loss.name", "ldam"]
    assert main(capsys, "--output", tmp_path / "run", *options)[0] == 0
    name = f"local-dir:{tmp_path / 'run'}"
    weight = normalize(models[0].get_classifier().weight)
    for given in ({}, cosine):
        recipe = Recipe(model=ModelRecipe(name, True, options=given))
        head = create_network(recipe, 10).get_classifier()
        torch.testing.assert_close(normalize(head.weight), weight)
    assert (head.kind, head.options()) == ("cosine", {"scale": 1.0, "learn_scale": False})
    plain = timm.create_model(name, pretrained=True).get_classifier()
    assert plain.bias.eq(0).all()
