"""Whose classes a classifier is for, where as many are not enough."""

import logging

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from timm.data import ImageNetInfo
from timm.models._hub import save_for_hf

import timm_lt
from timm_lt.models.create import is_for, keeps_classifier, label_names
from timm_lt.run.network import has_classifier, start_network
from timm_lt.run.recipe import ModelRecipe, Recipe

SUBSETS = {"imagenet-1k": 1000, "imagenet-12k": 11821, "imagenet-22k": 21841}
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


@pytest.mark.parametrize(
    ("names", "kept"), [(IMAGENET.label_names(), True), (OWN, False), (None, True)]
)
def test_a_pretrained_classifier_of_as_many_classes_is_kept_for_the_same_ones(names, kept):
    recipe = Recipe(model=ModelRecipe("test_resnet", pretrained=True))
    assert has_classifier(recipe.model, timms(), 1000, names) is kept
    # Training starts from a classifier of the same classes only.
    model = timms()
    before = model.fc.weight.clone()
    start_network(recipe, timm_lt.create_loss("cross_entropy"), model, 1000, names)
    assert model.fc.weight.equal(before) is kept
    assert model.conv1[0].weight.equal(timms().conv1[0].weight)


@pytest.mark.parametrize(
    ("config", "names", "kept", "level"),
    [
        ({}, IMAGENET.label_names(), True, None),
        ({}, OWN, False, None),
        ({"source": "hf-hub", "hf_hub_id": "me/birds"}, OWN, True, logging.WARNING),
        ({"source": "hf-hub", "hf_hub_id": "me/birds"}, None, True, logging.INFO),
    ],
)
def test_an_assumption_about_a_classifier_is_logged(config, names, kept, level, caplog):
    with caplog.at_level(logging.INFO, "timm_lt"):
        assert keeps_classifier(timms(**config), names, "the model", "--fresh-classifier") is kept
    assert [record.levelno for record in caplog.records] == ([] if level is None else [level])
    message = "its classifier is assumed to be for the classes of the data (--fresh-classifier fits"
    assert level is None or message in caplog.text
