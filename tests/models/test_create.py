"""Models with a head, by name, from folders and by timm's call; and the names of their classes."""

import logging

import pytest
import timm
import torch
from conftest import HEAD_OPTIONS
from huggingface_hub import constants
from timm.data import ImageNetInfo
from timm.models._hub import save_for_hf

import timm_lt
from timm_lt.heads import get_head
from timm_lt.models.create import is_for, keeps_classifier, label_names
from timm_lt.models.weights_file import create_from_file
from timm_lt.utils.checks import UsageError


def images(model):
    config = model.pretrained_cfg
    size = config["input_size"][-1] if config["fixed_input_size"] else 32
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


MISTAKES = [
    ("", {"head": "taunorm"}, r"did you mean 'tau_norm'\?"),
    ("", {"head": "tau_norm", "taux": 0.5}, r"no option 'taux'.*head 'tau_norm': tau, keep_bias"),
    ("", {"tau": 0.5}, r"no option 'tau'; is head= missing"),
    ("", {"head": "tau_norm", "tau": -1}, r"tau must be a number in \[0, inf\)"),
    ("x", {}, "unknown architecture '.*test_resnetx'"),
    (".glyph", {}, "tag of '.*test_resnet': 'glyph'.*"),
]


@pytest.mark.parametrize("architecture", ["test_resnet", "lt_test_resnet"])
def test_wrong_names_list_the_right_ones(architecture):
    for more, options, message in MISTAKES:
        with pytest.raises(UsageError, match=message):
            timm_lt.create_model(f"{architecture}{more}", **options)
    with pytest.raises(UsageError, match=r"lt_resnet10 has no pretrained weights; load a file"):
        timm_lt.create_model("lt_resnet10", True)


def test_plain_timm_call_takes_head_and_options():
    torch.manual_seed(0)
    plain = timm.create_model("test_resnet", num_classes=4).eval()
    torch.manual_seed(0)
    model = timm.create_model("lt_test_resnet", num_classes=4, head="tau_norm", tau=0.7).eval()
    assert get_head(model).options() == {"tau": 0.7, "keep_bias": False}
    model.load_state_dict(plain.state_dict())
    x = images(plain)
    with torch.no_grad():
        features = plain.forward_head(plain.forward_features(x), pre_logits=True)
        weight = plain.fc.weight / plain.fc.weight.norm(dim=1, keepdim=True) ** 0.7
        torch.testing.assert_close(model(x), features @ weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", HEAD_OPTIONS)
def test_every_head_by_the_plain_timm_call(head):
    model = timm.create_model("lt_test_resnet", num_classes=4, head=head, **HEAD_OPTIONS[head])
    assert (get_head(model).kind, get_head(model).options()) == (head, HEAD_OPTIONS[head])
    # The head stays, also with another pooling.
    model.reset_classifier(2, global_pool="max")
    assert (get_head(model).kind, get_head(model).out_features) == (head, 2)
    assert model.global_pool.pool_type == "max"
    if head in ("ncm", "lws", "logit_adjusted"):
        with pytest.raises(UsageError, match=f"'{head}'"):
            model(images(model))


@pytest.mark.parametrize("create", [timm.create_model, timm_lt.create_model])
def test_features_only_swallows_the_head(create):
    model = create("lt_test_resnet", features_only=True, head="tau_norm", tau=0.5)
    plain = timm.create_model("test_resnet", features_only=True)
    shapes = [[t.shape for t in part.eval()(images(plain))] for part in (model, plain)]
    assert shapes[0] == shapes[1]
    with pytest.raises(UsageError, match="unknown head"):
        create("lt_test_resnet", features_only=True, head="tau")


@pytest.mark.parametrize("create", [timm.create_model, timm_lt.create_model])
@pytest.mark.parametrize("name", ["lt_test_resnet.glyph_lt", "lt_resnet32"])
def test_a_head_needs_classes(create, name):
    with pytest.raises(UsageError, match="create a timm model with num_classes >= 1"):
        create(name, num_classes=0, head="tau_norm", pretrained="." in name)


def test_a_folder_is_loaded_by_its_path(tmp_path, monkeypatch):
    model = timm.create_model("test_resnet", num_classes=3).eval()
    timm_lt.save_checkpoint(tmp_path / "run", model, heads={}, class_counts=None)
    monkeypatch.chdir(tmp_path)
    for name in ("./run", "run", tmp_path / "run", "local-dir:run"):
        head = get_head(timm_lt.create_model(name, head="tau_norm"))
        assert (head.kind, torch.equal(head.weight, model.fc.weight)) == ("tau_norm", True)
    # A name of timm stays one, whatever folder has the same.
    (tmp_path / "run").rename(tmp_path / "test_vit")
    assert type(timm_lt.create_model("test_vit")).__name__ == "VisionTransformer"
    assert type(timm_lt.create_model("./test_vit")).__name__ == "ResNet"
    (tmp_path / "photos").mkdir()
    (tmp_path / "w.pth").touch()
    not_folder, file = "is not a checkpoint folder", "is a file of weights: name its architecture"
    for name, message in (
        *(("photos", not_folder), ("./photos", not_folder), (tmp_path / "none", not_folder)),
        *(("w.pth", file), (tmp_path / "w.pth", file)),
    ):
        with pytest.raises(UsageError, match=message):
            timm_lt.create_model(name)


def test_weights_that_cannot_be_had_are_one_sentence(loopback_hub, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"no model repo resnet18\.a1_in1k"):
        timm_lt.create_model("resnet18.a1_in1k", True, cache_dir=tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"resnet18\.a1_in1k.* HF_HUB_OFFLINE is set"):
        timm_lt.create_model("resnet18.a1_in1k", True, cache_dir=tmp_path)


SUBSETS = {"imagenet-1k": 1000, "imagenet-12k": 11821, "imagenet-22k": 21841}
IMAGENET = ImageNetInfo()
WORDS = IMAGENET.label_descriptions()
OWN = [f"person_{label:04d}" for label in range(1000)]


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


SPELLINGS = [
    (IMAGENET.label_names(), True),
    (WORDS, True),
    ([text.split(",")[0].replace(" ", "_") for text in WORDS], True),
    ([text.split(",")[-1].strip().title() for text in WORDS], True),
    (IMAGENET.label_names()[::-1], False),
    (OWN, False),
    ([str(label) for label in range(1000)], None),
    (None, None),
]


@pytest.mark.parametrize(("names", "same"), SPELLINGS)
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
    assert timm_lt.create_model(tmp_path / "m", num_classes=0).num_classes == 0
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
    return create_from_file("test_resnet", folder / "w.pth")


REPO = {"source": "hf-hub", "hf_hub_id": "me/birds"}
ASSUMED = [
    ({}, IMAGENET.label_names(), True, None),
    ({}, OWN, False, None),
    (REPO, OWN, True, logging.WARNING),
    (REPO, None, True, logging.INFO),
]


@pytest.mark.parametrize(("config", "names", "kept", "level"), ASSUMED)
def test_an_assumption_about_a_classifier_is_logged(config, names, kept, level, caplog):
    with caplog.at_level(logging.INFO, "timm_lt"):
        assert keeps_classifier(timms(**config), names, "the model", "--fresh-classifier") is kept
    assert [record.levelno for record in caplog.records] == ([] if level is None else [level])
    message = "its classifier is assumed to be for the classes of the data (--fresh-classifier fits"
    assert level is None or message in caplog.text
