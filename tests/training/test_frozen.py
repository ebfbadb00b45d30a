"""Training parts of a model: against a hand-written loop, and with all that goes on around it."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from stopping import StopError, StopsAfterTwo, new_state
from timm.layers import DropPath
from torch import nn

import timm_lt
from timm_lt.data.images import ImageTensors
from timm_lt.run.recipe import ModelRecipe, Recipe
from timm_lt.training import check_statistics, check_trained, train_representation
from timm_lt.utils.accelerator import create_accelerator
from timm_lt.utils.checks import UsageError

N, C, SIDE = 24, 3, 32
RATE, DECAY = 0.02, 0.1


@pytest.fixture(autouse=True)
def _one_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def images():
    pixels = torch.randint(0, 256, (N, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    return ImageTensors(pixels.to(torch.uint8), torch.arange(N) % C)


def new_model(name="test_resnet", **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=C, **options)


def train(model, *, state=None, epochs=2, **options):
    data = images()
    settings = {
        "optimizer": {
            "opt": "momentum",
            "lr": RATE,
            "weight_decay": DECAY,
            "momentum": 0.9,
            "filter_bias_and_bn": False,
        },
        "scheduler": {"sched": "constant"},
    }
    return train_representation(
        model,
        data,
        timm_lt.create_sampler("instance_balanced", data.labels),
        timm_lt.create_loss("cross_entropy"),
        accelerator=create_accelerator(mixed_precision="no")
        if state is None
        else state.accelerator,
        epochs=epochs,
        state=state,
        **{"batch_size": 8} | settings | options,
    )


def is_trained(key):
    return key.startswith(("layer4.", "fc."))


def by_hand(bn, epochs=2):
    """SGD with momentum on layer4 and fc; everything else is a function without parameters."""
    model, data = new_model(), images()
    x = (data.images.float() / 255 - 0.5) / 0.25
    parameters = {k: p for k, p in model.named_parameters() if is_trained(k)}
    velocity = {key: torch.zeros_like(p) for key, p in parameters.items()}
    sampler = timm_lt.create_sampler("instance_balanced", data.labels)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, N, 8):
            rows = order[start : start + 8]
            model.train()
            if bn == "frozen":
                for name, child in model.named_children():
                    child.train(name in ("layer4", "fc"))
            loss = F.cross_entropy(model(x[rows]), data.labels[rows])
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            with torch.no_grad():
                for (key, p), gradient in zip(parameters.items(), gradients, strict=True):
                    velocity[key] = 0.9 * velocity[key] + gradient + DECAY * p
                    p.sub_(RATE * velocity[key])
    return model


@pytest.mark.parametrize("bn", ["frozen", "shift"])
def test_follows_a_hand_written_loop(bn):
    model, before = new_model(), new_model().state_dict()
    train(model, trained=["layer4"], bn=bn)
    expected = by_hand(bn).state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=1e-4, msg=key)
        statistic = key.endswith(("running_mean", "running_var", "num_batches_tracked"))
        moves = is_trained(key) or (statistic and bn == "shift")
        assert value.equal(before[key]) is not moves, key
    # What comes after trains what it likes.
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_every_module_is_training_the_model():
    model, whole = new_model(), new_model()
    train(model, trained=[name for name, child in model.named_children() if [*child.parameters()]])
    train(whole)
    for key, value in model.state_dict().items():
        assert value.equal(whole.state_dict()[key]), key


def test_a_module_within_a_module_and_the_classifier_alone():
    for trained, moved in ((["layer4.0.conv2", "fc"], {"layer4.0.conv2", "fc"}), ([], {"fc"})):
        model, before = new_model(), new_model().state_dict()
        train(model, trained=trained, epochs=1)
        changed = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
        assert {key.rpartition(".")[0] for key in changed} == moved


def test_a_classifier_that_is_a_convolution_is_trained_too():
    model, before = new_model("dla46x_c"), new_model("dla46x_c").state_dict()
    assert isinstance(model.fc, nn.Conv2d)
    train(model, trained=[], epochs=1)
    changed = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
    assert changed == {"fc.weight", "fc.bias"}


def test_dropout_of_frozen_modules_is_off_or_on():
    modes = {}
    for bn in ("frozen", "shift"):
        model = new_model(drop_path_rate=0.5)
        for layer in (model.layer1, model.layer4):
            layer[0].drop_path = DropPath(0.5)
        parts = [model.layer1[0].drop_path, model.layer4[0].drop_path]
        seen = []
        for part in parts:
            part.register_forward_hook(lambda module, *_, seen=seen: seen.append(module.training))
        train(model, trained=["layer4"], bn=bn, epochs=1)
        modes[bn] = seen[:2]
    assert modes == {"frozen": [False, True], "shift": [True, True]}


@pytest.mark.parametrize("bn", ["frozen", "shift"])
@pytest.mark.parametrize("ema", [None, {"decay": 0.5}])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, bn, ema):
    options = {"trained": ["layer4"], "bn": bn, "ema": ema, "val": images(), "keep": "last"}
    whole = train(new_model(), epochs=3, **options).model

    with pytest.raises(StopError):
        train(new_model(), epochs=3, state=new_state(tmp_path, StopsAfterTwo), **options)
    resumed = train(new_model(), epochs=3, state=new_state(tmp_path), **options).model
    for key, value in resumed.state_dict().items():
        assert value.equal(whole.state_dict()[key]), key
    start = new_model().state_dict()
    assert resumed.conv1[0].weight.equal(start["conv1.0.weight"])
    assert not resumed.fc.weight.equal(start["fc.weight"])


@pytest.mark.parametrize(
    "options",
    [
        {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.1},
        {"opt": "sgd", "lr": 0.01, "weight_decay": 0.1, "layer_decay": 0.7},
        {"opt": "lookahead_sgd", "lr": 0.01, "weight_decay": 0.1, "filter_bias_and_bn": False},
    ],
    ids=["groups by decay", "groups by layer", "one group"],
)
def test_frozen_weights_stay_whatever_the_groups_of_the_optimiser(options):
    model, before = new_model(), new_model().state_dict()
    train(model, trained=["layer4"], optimizer=options, clip_grad=1.0, clip_mode="agc")
    changed = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
    assert all(map(is_trained, changed))
    # Through a batch norm that starts at 0, little reaches what is before it.
    assert {"fc.bias", "layer4.0.downsample.1.weight", "layer4.0.bn2.weight"} <= changed


def test_wrong_modules_are_named_with_the_right_ones_there():
    model = new_model()
    for names, message in (
        (
            ["layer5"],
            r"'layer5' \(did you mean 'layer4'\?\).*: conv1, bn1.*layer4, global_pool, fc",
        ),
        (["layer4.2"], r"'layer4.2'.*choose one of: layer4.0$"),
        (["layer4.0.conv2.weight"], r"choose one of: layer4.0.conv2$"),
        (["layer4", ""], r"unknown module in trained: ''.*conv1"),
        (["maxpool"], "'maxpool' in trained has no parameters"),
        ("layer4", r"trained must be a list of modules, got 'layer4'"),
    ):
        with pytest.raises(timm_lt.UsageError, match=message):
            train(model, trained=names)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_bn_without_effect_is_refused():
    with pytest.raises(timm_lt.UsageError, match=r"bn shift is for what is frozen.*leave it out"):
        check_trained(new_model(), None, "shift")
    with pytest.raises(timm_lt.UsageError, match=r"VisionTransformer has no batch-norm stat"):
        check_trained(new_model("test_vit", img_size=SIDE), ["blocks.5"], "shift")
    with pytest.raises(timm_lt.UsageError, match=r"unknown bn 'moving'.*frozen, shift"):
        check_trained(new_model(), [], "moving")
    check_trained(new_model(), None, "frozen")


def test_the_recipe_has_it():
    assert Recipe().model == ModelRecipe(
        "lt_test_resnet", pretrained=False, fresh_classifier=False, bn="frozen"
    )


def test_an_average_of_frozen_weights_is_those_weights():
    model = new_model()
    before = copy.deepcopy(model.state_dict())
    averaged = train(model, trained=["layer4"], ema={"decay": 0.9}, val=images()).model
    for key, value in averaged.state_dict().items():
        if not is_trained(key):
            assert value.equal(before[key]), key


def test_batches_without_a_variance_are_refused():
    """At 32 pixels the last maps of the network have one; those that are frozen need no batch."""
    model, size = new_model(), (SIDE, SIDE)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=r"over 1 images in a process's batch \(Expected more"):
        check_statistics(model, size, batch=1)
    check_statistics(model, size, batch=2)
    check_statistics(model, (2 * SIDE, SIDE), batch=1)
    check_statistics(model, size, batch=1, trained=[])
    bilateral = new_model("lt_bbn_resnet", base="test_resnet")
    with pytest.raises(UsageError, match=r"over 2 images .*one for each branch"):
        check_statistics(bilateral, size, batch=2)
    check_statistics(bilateral, size, batch=4)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    with pytest.raises(UsageError, match="batch norm cannot normalise"):
        train(model, batch_size=1)
