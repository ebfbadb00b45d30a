"""Whose classes a classifier is for, where as many are not enough."""

import json
import logging

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from timm.data import ImageNetInfo
from timm.models._hub import save_for_hf

import timm_lt
from timm_lt.cli import main
from timm_lt.cli.predict import class_names
from timm_lt.data import Splits
from timm_lt.models.label_names import is_for, label_names
from timm_lt.run.network import has_classifier, match_data
from timm_lt.run.recipe import ModelRecipe, Recipe

SUBSETS = {
    "imagenet-1k": 1000,
    "imagenet-12k": 11821,
    "imagenet-21k-miil": 11221,
    "imagenet-21k-goog": 21843,
    "imagenet-22k": 21841,
    "imagenet-22k-ms": 21842,
}
IMAGENET = ImageNetInfo()
WORDS = IMAGENET.label_descriptions()
OWN = [f"person_{label:04d}" for label in range(1000)]


@pytest.fixture(autouse=True)
def _own_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


def timms(classes=1000, **config):
    """A model as timm.create_model(NAME, pretrained=True) gives it, but for its weights."""
    torch.manual_seed(0)
    overlay = {"num_classes": classes, **config}
    return timm.create_model("test_resnet", num_classes=classes, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize("subset", SUBSETS)
def test_timms_own_models_are_for_the_classes_of_their_imagenet(subset):
    known = ImageNetInfo(subset)
    model = timms(SUBSETS[subset])
    assert label_names(model) == known.label_descriptions()
    assert is_for(model, known.label_names()) is True
    assert is_for(model, [f"own {label}" for label in range(SUBSETS[subset])]) is False


@pytest.mark.parametrize(
    ("names", "same"),
    [
        (IMAGENET.label_names(), True),
        (WORDS, True),
        ([text.split(",")[0].replace(" ", "_") for text in WORDS], True),
        ([text.split(",")[-1].strip().title() for text in WORDS], True),
        (IMAGENET.label_names()[::-1], False),
        (OWN, False),
        ([str(label) for label in range(1000)], None),
        (None, None),
    ],
)
def test_names_decide(names, same):
    assert is_for(timms(), names) is same
    # Names of its own come first, and have no other spelling.
    named = timms(label_names=OWN)
    assert is_for(named, names) is (None if same is None else names == OWN)
    assert label_names(named) == OWN


def test_names_by_label_are_read_as_timm_writes_them(tmp_path):
    by_label = {"label_names": {label: f"class {label}" for label in (1, 2, 0)}}
    save_for_hf(timms(3), tmp_path / "m", model_config=by_label, safe_serialization=True)
    model = timm_lt.create_model(str(tmp_path / "m"))
    assert label_names(model) == ["class 0", "class 1", "class 2"]
    assert label_names(timms(3, label_names={1: "a", 2: "b", 3: "c"})) is None


def test_other_models_of_a_thousand_classes_are_not_imagenets(tmp_path):
    models = {
        "a folder": save_for_hf(timms(), tmp_path / "m", safe_serialization=True)
        or timm_lt.create_model(tmp_path / "m"),
        "a repo": timms(source="hf-hub", hf_hub_id="me/birds"),
        "another number": timm.create_model("test_resnet", num_classes=11821),
        "a file": from_file(tmp_path),
    }
    for what, model in models.items():
        assert label_names(model) is None, what
        assert is_for(model, IMAGENET.label_names()[: model.num_classes]) is None, what
    assert label_names(timms(source="hf-hub", hf_hub_id="timm/test_resnet.r160_in1k")) == WORDS


def from_file(folder):
    torch.save(timms().state_dict(), folder / "w.pth")
    return timm_lt.models.weights_file.create_from_file("test_resnet", folder / "w.pth")


def test_predictions_of_ones_own_weights_are_not_called_imagenets(tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    files = [str(tmp_path / "a.png")]
    assert class_names(timms().eval(), None, None) == WORDS
    from_file(tmp_path)
    save_for_hf(timms(), tmp_path / "m", safe_serialization=True)
    for model in (["test_resnet", "--checkpoint", str(tmp_path / "w.pth")], [str(tmp_path / "m")]):
        assert main(["predict", *model, *files, "--json"]) == 0
        (entry,) = json.loads(capsys.readouterr().out)
        assert all(part["name"].isdigit() for part in entry["classes"])


@pytest.mark.parametrize(
    ("names", "kept"), [(IMAGENET.label_names(), True), (OWN, False), (None, True)]
)
def test_a_pretrained_classifier_of_as_many_classes_is_kept_for_the_same_ones(names, kept):
    recipe = Recipe(model=ModelRecipe("test_resnet", pretrained=True))
    model, counts = timms(), torch.ones(1000, dtype=torch.int64)
    assert has_classifier(recipe.model, model, 1000)
    # No images are needed: the names decide.
    assert match_data(recipe, Splits({}, {}, counts, names), model, kept=True)[1] is kept


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    root = tmp_path_factory.mktemp("own") / "people"
    draw = np.random.default_rng(0)
    for name in OWN:
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(draw.integers(0, 255, (8, 8, 3), np.uint8)).save(
                root / name / f"{i}.png"
            )
    return root


def test_heads_and_evaluate_say_what_they_take_a_classifier_for(people, tmp_path, capsys):
    from_file(tmp_path)
    small = ["--image-size", "32", "--workers", "0", "--checkpoint", str(tmp_path / "w.pth")]
    message = (
        "has no names for its 1000 classes; its classifier is assumed to be for the classes of"
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    run = ["--heads", "tau_norm", "--output", str(tmp_path / "run")]
    assert main(["heads", str(people), *run, *small, "--model", "test_resnet"]) == 0
    assert capsys.readouterr().err.count(message) == 1
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["evaluate", "test_resnet", str(people), *small]) == 0
    assert message in capsys.readouterr().err


def test_rebalance_keeps_a_classifier_without_names_and_warns(people, caplog):
    model = timms(input_size=(3, 32, 32))
    with caplog.at_level(logging.WARNING, "timm_lt"):
        found = timm_lt.rebalance(model, str(people), heads="tau_norm", workers=0)
    assert "its classifier is assumed to be for the classes of the data" in caplog.text
    assert found.heads["linear"].weight.equal(model.fc.weight)
    named = timms(input_size=(3, 32, 32), label_names=[name.upper() for name in OWN])
    found = timm_lt.rebalance(named, str(people), heads="tau_norm", workers=0)
    assert not found.heads["linear"].weight.equal(named.fc.weight)
