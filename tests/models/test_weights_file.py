"""Models from files of weights: their layouts, and what they say of the training."""

import argparse
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models._hub import save_for_hf
from torch import nn
from torch.optim.swa_utils import AveragedModel

import timm_lt
from timm_lt.cli import main
from timm_lt.models.create import image_config
from timm_lt.models.weights_file import classes_of_file, create_from_file
from timm_lt.utils.checks import UsageError


@pytest.fixture(autouse=True)
def _own_accelerate():
    """A run has the mixed precision of the processor, and other calls have none."""
    AcceleratorState._reset_state(reset_partial_state=True)


def plain(name="test_resnet", classes=3, seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=classes, **options).eval()


def prefixed(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


def saved(path, content):
    torch.save(content, path)
    return path


def same(model, expected, **tolerances):
    size = image_config(expected)["input_size"]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), expected(images), **tolerances)


STATE, OTHER = plain().state_dict(), plain(seed=1).state_dict()
COUNTERS = {key for key in STATE if key.endswith("num_batches_tracked")}
BACKBONE = {key: value for key, value in STATE.items() if not key.startswith("fc.")}
LOSS = {"criterion.weight": torch.ones(3), "loss_fn.ldam.m_list": torch.ones(3)}
HEAD = {key: value for key, value in STATE.items() if key not in BACKBONE}
AVERAGE = {**prefixed("module.", OTHER), "n_averaged": torch.tensor(3)}
WRAPPED = {"layer1.": "layer1._orig_mod.", "layer2.0.": "layer2.0._checkpoint_wrapped_module."}
COMPILED = {
    re.sub("^layer(1|2.0)[.]", lambda at: WRAPPED[at[0]], key): value
    for key, value in STATE.items()
}
LIGHTNING = {**prefixed("net.", STATE), **LOSS, "val_acc.tp": torch.zeros(3)}
LAYOUTS = {
    "bare": STATE,
    "parallel": prefixed("module.", STATE),
    "compiled in Lightning": {"state_dict": prefixed("model._orig_mod.", STATE)},
    "compiled blocks": COMPILED,
    "Lightning": {"state_dict": LIGHTNING, "optimizer_states": [{"state": {0: torch.zeros(3)}}]},
    "a Lightning module that is the network": {"state_dict": {**STATE, **LOSS}},
    "before counters": {key: value for key, value in STATE.items() if key not in COUNTERS},
    "counters in half precision": {k: v.half() if k in COUNTERS else v for k, v in STATE.items()},
    "values of NumPy and paths": {"net": STATE, "top1": np.float64(91), "args": {"o": Path("out")}},
    "profiled": {**STATE, "total_ops": torch.zeros(1), "layer1.0.total_params": torch.zeros(1)},
    "the tutorial": {"epoch": 3, "model_state_dict": STATE, "optimizer_state_dict": {}},
    "mmpretrain": {"state_dict": {**prefixed("backbone.", BACKBONE), **prefixed("head.", HEAD)}},
    "backbone and fc": {**prefixed("encoder.", BACKBONE), **HEAD},
    "timm": {"arch": "test_resnet", "state_dict": STATE, "state_dict_ema": None},
    "timm with an average": {"state_dict": STATE, "state_dict_ema": OTHER, "arch": "test_resnet"},
    "an average alone": {"state_dict_ema": STATE, "arch": "test_resnet"},
    "an average first": {"ema": OTHER, "model_state_dict": STATE},
    "an average in Lightning": {
        "state_dict": {**prefixed("ema_model.", OTHER), **prefixed("model.", STATE)}
    },
    "torchvision with an average": {
        "model": STATE,
        "model_ema": AVERAGE,
        "args": argparse.Namespace(lr=0.1, model="test_resnet"),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_every_layout_are_found(layout, tmp_path):
    model = create_from_file("test_resnet", saved(tmp_path / "w.pth", LAYOUTS[layout]))
    for key, value in model.state_dict().items():
        if layout != "before counters" or key not in COUNTERS:
            assert value.equal(STATE[key]), key
    assert classes_of_file(tmp_path / "w.pth", model) == 3


def test_torchs_own_averaged_model_and_safetensors_are_read(tmp_path):
    model = plain()
    saved(tmp_path / "swa.pth", AveragedModel(nn.DataParallel(model)).state_dict())
    same(create_from_file("test_resnet", tmp_path / "swa.pth"), model)
    save_file(prefixed("module.", model.state_dict()), tmp_path / "model.safetensors")
    same(create_from_file("test_resnet", tmp_path / "model.safetensors"), model)


SEVERAL = [
    ({"student": OTHER, "teacher": prefixed("module.", STATE)}, "teacher"),
    ({"state_dict": {**prefixed("m.", OTHER), **prefixed("target_m.", STATE)}}, "target_m"),
]


@pytest.mark.parametrize(("content", "key"), SEVERAL)
def test_of_several_networks_one_is_chosen_by_its_key(content, key, tmp_path):
    path = saved(tmp_path / "w.pth", content)
    with pytest.raises(UsageError, match=rf"several networks: .*{key}.*--checkpoint-key"):
        create_from_file("test_resnet", path)
    for given in (key, f"{key}."):
        model = create_from_file("test_resnet", path, key=given)
        assert model.fc.weight.equal(STATE["fc.weight"])
    assert classes_of_file(path, model, key) == 3
    with pytest.raises(UsageError, match="under 'teach'"):
        create_from_file("test_resnet", path, key="teach")
    options = ["--model", "test_resnet", "--checkpoint-key", key]
    assert main(["convert", str(path), str(tmp_path / "out"), *options]) == 0
    converted = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert converted.fc.weight.equal(STATE["fc.weight"])


def test_an_average_is_taken_if_asked_for(tmp_path, caplog):
    path = saved(tmp_path / "w.pth", {"state_dict": OTHER, "state_dict_ema": STATE})
    with caplog.at_level(logging.INFO, "timm_lt"):
        create_from_file("test_resnet", path)
    assert "loaded the weights under state_dict, not state_dict_ema" in caplog.text
    model = create_from_file("test_resnet", path, key="state_dict_ema")
    assert model.fc.weight.equal(STATE["fc.weight"])


SOME = {f"{at}bn1.{key}": torch.ones(3) for at in ("", "a.", "b.") for key in ("weight", "bias")}
HALF = {key if key == "fc.bias" else f"model.{key}": value for key, value in STATE.items()}
REFUSED = {
    "a foreign tensor": ({**STATE, "layer9.weight": torch.ones(1)}, r"it has layer9\.weight$"),
    "a foreign part": (prefixed("net.", {**STATE, "attn.q": torch.ones(1)}), r"it has attn\.q$"),
    "a missing tensor": (prefixed("net.", BACKBONE), r"lacks fc\.weight, fc\.bias"),
    "an empty part of a name": (prefixed("net..", BACKBONE), r"lacks fc\.weight, fc\.bias"),
    "half a prefix": (HALF, r"lacks fc\.bias$"),
    "another network": (plain("test_vit").state_dict(), r"no weights of test_resnet: it lacks"),
    "some of the names": (SOME, r"no weights of test_resnet: it lacks bn1\.running_mean"),
    "another width": ({**STATE, "fc.weight": torch.ones(3, 95)}, r"fc\.weight is \(3, 95\)"),
    "no tensors": ({"epoch": 3, "state_dict": {}}, "has no weights"),
    "a list": ([STATE], "found a list"),
    "text for a tensor": ({**STATE, "fc.bias": np.float64(3)}, r"fc\.bias is a Unread"),
    "a whole model": (plain(), r"asks for timm\.\S+, not only .* save the state_dict\(\)"),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS.*git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html><html></html>", "web page.*download the file again"),
    "nothing": (b"", "is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_files_are_refused(case, tmp_path):
    (content, message), path = REFUSED[case], tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        saved(path, content)
    with pytest.raises(UsageError, match=message) as caught:
        create_from_file("test_resnet", path)
    assert str(path) in str(caught.value)


ARGS = {
    "model": "test_resnet",
    "gp": "max",
    "mean": [0.1, 0.2, 0.3],
    "std": [0.9],
    "img_size": 96,
    "crop_pct": 0.8,
    "interpolation": "nearest",
    "crop_mode": "border",
    "in_chans": None,
    "model_kwargs": {"drop_rate": 0.1},
}
CONFIG = {
    "input_size": (3, 96, 96),
    "mean": (0.1, 0.2, 0.3),
    "std": (0.9, 0.9, 0.9),
    "crop_pct": 0.8,
    "interpolation": "nearest",
    "crop_mode": "border",
}


def timms_file(path, model, args=ARGS, **more):
    content = {"state_dict": model.state_dict(), "arch": args["model"], "args": args, **more}
    return saved(path, content)


def as_tuples(config):
    return {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()}


@pytest.mark.parametrize("kind", [dict, argparse.Namespace, "args.yaml"])
def test_the_arguments_of_timms_training_are_used(kind, tmp_path, caplog):
    expected = plain(global_pool="max")
    path = tmp_path / "model_best.pth.tar"
    content = {"state_dict": expected.state_dict()}
    if kind == "args.yaml":
        (tmp_path / kind).write_text(yaml.safe_dump(ARGS))
    else:
        content["args"] = kind(**ARGS)
    saved(path, content)
    with caplog.at_level(logging.INFO, "timm_lt"):
        model = create_from_file("test_resnet", path)
    assert "model_best.pth.tar was trained with drop_rate 0.1, global_pool max, mean" in caplog.text
    same(model, expected)
    assert as_tuples(timm.data.resolve_data_config(model=model)) == CONFIG
    assert model.drop_rate == 0.1
    # Other projects have an args.yaml, too.
    (tmp_path / "args.yaml").write_text("model: yolov8n-cls.pt\nmode: train\nimgsz: 640\n")
    saved(path, STATE)
    same(create_from_file("test_resnet", path), plain())


def test_what_is_given_by_hand_comes_first(tmp_path):
    path = timms_file(tmp_path / "w.pth", plain())
    model = create_from_file(
        "test_resnet", path, image_size=64, global_pool="avg", crop_pct=1.0, mean=[0.5] * 3
    )
    same(model, plain())
    config = as_tuples(timm.data.resolve_data_config(model=model))
    given = {"input_size": (3, 64, 64), "crop_pct": 1.0, "mean": (0.5, 0.5, 0.5)}
    assert config == {**CONFIG, **given}


def test_the_tag_of_the_trained_model_says_how_images_were_normalised(tmp_path):
    """timm's train.py normalises as the tag's configuration says, if nobody says otherwise."""
    name = "vit_small_patch16_224.augreg_in21k"
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    model = plain("vit_small_patch16_224", **options)
    args = {"model": "deit_small_patch16_224.fb_in1k", "model_kwargs": options}
    path = timms_file(tmp_path / "w.pth", model, args)
    found = create_from_file("deit_small_patch16_224", path)
    assert image_config(found)["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    # A ViT has the same tensors, and another normalisation.
    with pytest.raises(UsageError, match=r"has weights of deit_small_patch16_224\.fb_in1k, not of"):
        create_from_file(name, path)


def test_our_names_of_timms_architectures_take_its_files(tmp_path):
    path = timms_file(tmp_path / "w.pth", plain(), {"model": "test_resnet"})
    same(create_from_file("lt_test_resnet", path), plain())
    path = timms_file(tmp_path / "w.pth", plain(), {"model": "lt_test_resnet"})
    same(create_from_file("test_resnet", path), plain())


IMPOSSIBLE = [
    ({"std": [0.1, 0.2]}, {}, "beyond timm's: std must be 1 or 3 numbers, got 2"),
    ({"img_size": "large"}, {}, "training arguments beyond timm's"),
    ({"img_size": -32}, {}, "training arguments beyond timm's: images of -32 × -32 pixels"),
    ({"model_kwargs": ["x"]}, {}, "training arguments beyond timm's"),
    ({"model_kwargs": {"width": 2}}, {}, "no option 'width'"),
    ({"model_kwargs": {"layers": [10**9, 1, 1, 1]}}, {}, "far beyond the sizes"),
    ({}, {"mean": "red"}, r"mean must be a number in \(-inf, inf\), got 'red'"),
    ({}, {"crop_pct": -1}, r"crop_pct must be a number in \(0, inf\), got -1"),
    ({}, {"interpolation": "cubic"}, "unknown interpolation: 'cubic'"),
    (
        {},
        {"global_pool": "middle"},
        "cannot be built with .*'global_pool': 'middle'}: Invalid pool type",
    ),
]


def test_arguments_that_cannot_be_are_one_line(tmp_path):
    for args, options, message in IMPOSSIBLE:
        path = timms_file(tmp_path / "w.pth", plain(), {"model": "test_resnet", **args})
        with pytest.raises(UsageError, match=message) as caught:
            create_from_file("test_resnet", path, **options)
        assert "\n" not in str(caught.value)


VIT_SIZES = [
    *(({}, (96, 96)), ({"img_size": 96}, (96, 96)), ({"input_size": 96}, (96, 96))),
    ({"input_size": (3, 96, 128)}, (96, 128)),
]


@pytest.mark.parametrize(("args", "size"), VIT_SIZES)
def test_a_vit_is_built_for_the_size_that_it_was_trained_at(args, size, tmp_path):
    expected = plain("test_vit", img_size=size)
    path = timms_file(tmp_path / "w.pth", expected, {"model": "test_vit", **args})
    model = create_from_file("test_vit", path)
    same(model, expected)
    assert image_config(model)["input_size"] == (3, *size)


def test_a_vit_of_any_size_keeps_its_embeddings(tmp_path):
    expected = plain("test_vit", dynamic_img_size=True)
    args = {"model": "test_vit", "img_size": 96, "model_kwargs": {"dynamic_img_size": True}}
    path = timms_file(tmp_path / "w.pth", expected, args)
    assert main(["convert", str(path), str(tmp_path / "out")]) == 0
    for model in (
        create_from_file("test_vit", path),
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True),
    ):
        assert image_config(model)["input_size"] == (3, 96, 96)
        assert model.pos_embed.equal(expected.pos_embed)
        same(model, expected)


def test_another_size_resamples_position_embeddings_as_timm_does(tmp_path):
    trained = plain("test_vit", img_size=96)
    path = timms_file(tmp_path / "w.pth", trained, {"model": "test_vit", "img_size": 96})
    model = create_from_file("test_vit", path, image_size=64)
    grid, prefix = model.patch_embed.grid_size, model.num_prefix_tokens
    expected = resample_abs_pos_embed(trained.pos_embed.detach(), grid, num_prefix_tokens=prefix)
    torch.testing.assert_close(model.pos_embed.detach(), expected)
    assert model.pos_embed.shape[1] == grid[0] * grid[1] + prefix
    assert model.head.weight.equal(trained.head.weight)


def test_a_size_that_a_file_does_not_say_is_asked_for(tmp_path):
    """Tables of relative positions are as large as a window, which may be as large as the image."""
    name = "swin_tiny_patch4_window7_224"
    options = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)}
    expected = plain(name, img_size=128, **options)
    path = saved(tmp_path / "w.pth", expected.state_dict())
    with pytest.raises(UsageError, match=r"bias_table is \(\d+, 2\), not .*--image-size"):
        create_from_file(name, path, **options)
    same(create_from_file(name, path, image_size=128, **options), expected)
    # Embeddings with their width before the rows and columns.
    path = saved(tmp_path / "w.pth", plain("pit_ti_224", img_size=160).state_dict())
    with pytest.raises(UsageError, match=r"not \(1, 64, 27, 27\); give the size of its images"):
        create_from_file("pit_ti_224", path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("own") / "photos"
    for label in range(3):
        (root / "abc"[label]).mkdir(parents=True)
        for i in range(8):
            image = Image.new("RGB", (120, 96), (90 * label, 20 * i, 9))
            image.save(root / "abc"[label] / f"{i}.png")
    return root


def test_predictions_are_of_images_as_the_training_saw_them(photos, tmp_path, capsys):
    trained = plain(global_pool="max")
    path = timms_file(tmp_path / "w.pth", trained)
    assert main(["predict", "test_resnet", str(photos), "--checkpoint", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    transform = timm.data.create_transform(**CONFIG)
    for entry in found:
        with Image.open(entry["image"]) as image, torch.no_grad():
            expected = trained(transform(image.convert("RGB"))[None]).softmax(1)[0]
        shown = {int(part["name"]): part["probability"] for part in entry["classes"]}
        torch.testing.assert_close(torch.tensor([shown[c] for c in range(3)]), expected)


def test_a_model_of_gray_images_is_refused(tmp_path):
    args = {"model": "test_resnet", "in_chans": 1}
    model = create_from_file("test_resnet", timms_file(tmp_path / "w.pth", plain(in_chans=1), args))
    with pytest.raises(UsageError, match=r"takes images of 1 channels \(in_chans\), but images"):
        image_config(model)


def test_a_folder_of_timm_is_taken_at_the_size_of_its_arguments(tmp_path):
    """timm's configuration has the default size still, and only the arguments have the model's."""
    save_for_hf(plain("test_vit", img_size=96), tmp_path / "m", safe_serialization=True)
    model = timm_lt.create_model(tmp_path / "m")
    assert image_config(model)["input_size"] == (3, 96, 96)


@pytest.mark.parametrize("classes", [3, 10, 0])
def test_the_classifier_of_a_file_is_taken_if_it_has_as_many_classes(classes, tmp_path):
    state = plain(classes=classes).state_dict()
    path = saved(tmp_path / "w.pth", state)
    model = create_from_file("test_resnet", path, num_classes=3, classifier=None)
    assert model.conv1[0].weight.equal(state["conv1.0.weight"])
    assert model.fc.weight.shape == (3, 96)
    assert classes != 3 or model.fc.weight.equal(state["fc.weight"])


def test_evaluate_takes_the_image_size_and_the_split_of_a_run(photos, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--option", "test_fraction=0.4", "--option", "seed=3", "--image-size", "40"]
    heads = ["heads", str(photos), "--model", "lt_test_resnet.glyph_lt", "--heads", "ncm"]
    assert main([*heads, *options, "--output", str(run), "--workers", "0"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())["heads"]
    assert image_config(timm_lt.create_model(run, head="ncm"))["input_size"] == (3, 40, 40)
    for more, is_warned in (([], False), (["--option", "seed=4"], True)):
        capsys.readouterr()
        assert main(["evaluate", str(run), str(photos), *more, "--workers", "0", "--json"]) == 0
        shown = capsys.readouterr()
        assert ("it may have been fitted on images that are" in shown.err) is is_warned
        found = json.loads(shown.out)["heads"]
        assert is_warned or found == {name: metrics[name] for name in found}
