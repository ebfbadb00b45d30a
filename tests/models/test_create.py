"""Models with a head: timm architectures, the registered lt_* ones, and checkpoint folders."""

import pytest
import timm
import torch
from conftest import HEAD_OPTIONS
from huggingface_hub import constants

import timm_lt
from timm_lt.heads import get_head
from timm_lt.utils.checks import UsageError


def images(model, channels=3, number=2):
    config = model.pretrained_cfg
    size = config["input_size"][-1] if config["fixed_input_size"] else 32
    generator = torch.Generator().manual_seed(0)
    return torch.randn(number, channels, size, size, generator=generator)


@pytest.mark.parametrize("architecture", ["test_resnet", "lt_test_resnet"])
def test_wrong_names_list_the_right_ones(architecture):
    with pytest.raises(UsageError, match=r"did you mean 'tau_norm'\?"):
        timm_lt.create_model(architecture, head="taunorm")
    with pytest.raises(UsageError, match=r"no option 'taux'.*head 'tau_norm': tau, keep_bias"):
        timm_lt.create_model(architecture, head="tau_norm", taux=0.5)
    with pytest.raises(UsageError, match=r"no option 'tau'; is head= missing"):
        timm_lt.create_model(architecture, tau=0.5)
    with pytest.raises(UsageError, match=r"tau must be a number in \[0, inf\)"):
        timm_lt.create_model(architecture, head="tau_norm", tau=-1)
    with pytest.raises(UsageError, match=rf"unknown architecture '{architecture}x'"):
        timm_lt.create_model(f"{architecture}x", head="tau_norm")
    with pytest.raises(UsageError, match=r"tag of 'lt_test_resnet': 'glyph'.*glyph_lt"):
        timm_lt.create_model("lt_test_resnet.glyph", head="tau_norm")
    with pytest.raises(UsageError, match=r"lt_resnet10 has no pretrained weights; load a file"):
        timm_lt.create_model("lt_resnet10", True)


# ---- the registered architectures ----------------------------------------------------------------


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
    assert get_head(model).kind == head
    assert get_head(model).options() == HEAD_OPTIONS[head]
    model.reset_classifier(2)
    assert get_head(model).kind == head
    if head in ("ncm", "lws", "logit_adjusted"):
        with pytest.raises(UsageError, match=f"'{head}'"):
            model(images(model))


def test_same_random_weights_as_timm():
    torch.manual_seed(3)
    ours = timm.create_model("lt_test_resnet", num_classes=7, head="cosine").state_dict()
    torch.manual_seed(3)
    theirs = timm.create_model("test_resnet", num_classes=7).state_dict()
    for key, value in theirs.items():
        if not key.startswith("fc."):
            assert torch.equal(value, ours[key]), key


def test_configuration_of_a_tag():
    model = timm.create_model("lt_test_resnet.glyph_lt")
    assert model.num_classes == 100
    config = timm.data.resolve_data_config(model=model)
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.5, 0.5, 0.5)
    assert {"lt_resnet10", "lt_resnet50", "lt_resnext50"} < set(timm.list_models("lt_*"))
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("lt_resnet10", pretrained=True)


@pytest.mark.parametrize("create", [timm.create_model, timm_lt.create_model])
def test_features_only_swallows_the_head(create):
    model = create("lt_test_resnet", features_only=True, head="tau_norm", tau=0.5)
    plain = timm.create_model("test_resnet", features_only=True)
    assert model.feature_info.channels() == plain.feature_info.channels()
    shapes = [tuple(t.shape) for t in model.eval()(images(plain))]
    assert shapes == [tuple(t.shape) for t in plain.eval()(images(plain))]
    with pytest.raises(UsageError, match="unknown head"):
        create("lt_test_resnet", features_only=True, head="tau")


@pytest.mark.parametrize("create", [timm.create_model, timm_lt.create_model])
@pytest.mark.parametrize("name", ["lt_test_resnet", "lt_test_resnet.glyph_lt", "lt_resnet32"])
def test_a_head_needs_classes(create, name):
    options = {"num_classes": 0, "head": "tau_norm", "pretrained": "." in name}
    with pytest.raises(UsageError, match="create the model with num_classes >= 1"):
        create(name, **options)


def test_a_folder_is_loaded_by_its_path(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    timm_lt.save_checkpoint(tmp_path / "run", model, heads={}, class_counts=None)
    monkeypatch.chdir(tmp_path)
    for name in ("./run", "run", str(tmp_path / "run"), tmp_path / "run", "local-dir:run"):
        loaded = timm_lt.create_model(name, head="tau_norm").eval()
        assert get_head(loaded).kind == "tau_norm"
        assert torch.equal(get_head(loaded).weight, model.fc.weight)
    # A name of timm stays one, whatever folder has the same.
    (tmp_path / "run").rename(tmp_path / "test_vit")
    assert type(timm_lt.create_model("test_vit")).__name__ == "VisionTransformer"
    assert type(timm_lt.create_model("./test_vit")).__name__ == "ResNet"
    (tmp_path / "photos").mkdir()
    for name in ("photos", "./photos", "./none", tmp_path / "none"):
        with pytest.raises(UsageError, match=r"is not a checkpoint folder"):
            timm_lt.create_model(name)
    (tmp_path / "w.pth").touch()
    for name in ("w.pth", tmp_path / "w.pth"):
        with pytest.raises(UsageError, match=r"is a file of weights: name its architecture"):
            timm_lt.create_model(name)


def test_reset_classifier_can_change_the_pooling():
    model = timm.create_model("lt_test_resnet", num_classes=4, head="cosine")
    model.reset_classifier(3, global_pool="max")
    assert get_head(model).kind == "cosine"
    assert model.global_pool.pool_type == "max"
    model.reset_classifier(num_classes=2)
    assert get_head(model).out_features == 2


def test_weights_that_cannot_be_had_are_one_sentence(loopback_hub, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"no model repo resnet18\.a1_in1k"):
        timm_lt.create_model("resnet18.a1_in1k", True, cache_dir=tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"resnet18\.a1_in1k.* HF_HUB_OFFLINE is set"):
        timm_lt.create_model("resnet18.a1_in1k", True, cache_dir=tmp_path)
