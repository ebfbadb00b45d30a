"""Training parts of a model: the last block, and a hand-written loop."""

import pytest
import timm
import torch
import torch.nn.functional as F
from naive_sgd import naive_sgd
from timm.layers import DropPath
from torch import nn
from training_runs import images, interrupted, network, own_accelerator  # noqa: F401
from training_runs import train as train_with

import timm_lt
from timm_lt.training.parts import FrozenParts, last_block
from timm_lt.utils.checks import UsageError

SIDE, RATE, DECAY = 32, 0.02, 0.1
MOMENTUM = {"opt": "momentum", "lr": RATE, "weight_decay": DECAY, "momentum": 0.9}
OPTIONS = {
    "optimizer": MOMENTUM | {"filter_bias_and_bn": False},
    "scheduler": {"sched": "constant"},
    "epochs": 2,
}
# By the architecture's own code: the last of the repeated blocks in front of the classifier.
BLOCKS = {
    "test_resnet": "layer4.0",
    "test_vit": "blocks.5",
    "resnet50": "layer4.2",
    "lt_resnet32": "layer3.4",
    "lt_bbn_resnet32": "layer3.4",
    "lt_oltr_resnet10": "layer4.0",
    "convnext_tiny": "stages.3.blocks.2",
    "vit_tiny_patch16_224": "blocks.11",
    "swin_tiny_patch4_window7_224": "layers.3.blocks.1",
    "efficientnet_b0": "blocks.6.0",
    # It is followed by a 1×1 convolution, which is not a block.
    "mobilenetv3_small_050": "blocks.4.2",
    "regnety_002": "s4.b7",
    "densenet121": "features.denseblock4.denselayer16",
    "inception_v3": "Mixed_7c",
    "mixer_s32_224": "blocks.7",
    "crossvit_9_240": "blocks.2",
    "repvgg_a0": "stages.3.0",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_last_block_of_an_architecture(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert last_block(model) == BLOCKS[name]


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (None, r"its feature_info names no module of it \("),
        ([{"num_chs": 96}], r"its feature_info names no module of it \(.module"),
        ([{"module": "layer9"}], r"its feature_info names no module of it \(.*layer9"),
        ([{"module": "conv1"}], "conv1 and all before it are single layers"),
    ],
)
def test_an_unknown_last_block_is_an_error(info, reason):
    model = timm.create_model("test_resnet")
    model.feature_info = info
    model.conv1 = nn.Conv2d(3, 3, 1)
    with pytest.raises(UsageError, match=f"{reason}.*: name the modules in trained, from conv1"):
        last_block(model)


def train(model, **options):
    train_with(model, data=images(side=SIDE), **OPTIONS | options)


def is_trained(key):
    return key.startswith(("layer4.", "fc."))


def changed(model, start):
    return {key for key, value in model.state_dict().items() if not value.equal(start[key])}


def by_hand(bn):
    """SGD with momentum on layer4 and fc; everything else is a function without parameters."""
    model, data = network(), images(side=SIDE)
    x = (data.images.float() / 255 - 0.5) / 0.25
    parameters = [p for k, p in model.named_parameters() if is_trained(k)]
    sampler, batches = timm_lt.create_sampler("instance_balanced", data.labels), []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches += torch.tensor(list(sampler)).split(8)

    def loss(rows):
        model.train()
        if bn == "frozen":
            for name, child in model.named_children():
                child.train(name in ("layer4", "fc"))
        return F.cross_entropy(model(x[rows]), data.labels[rows])

    naive_sgd(parameters, loss, batches, RATE, DECAY, rate=lambda *_: 1)
    return model


@pytest.mark.parametrize("bn", ["frozen", "shift"])
def test_follows_a_hand_written_loop(bn):
    model, before = network(), network().state_dict()
    train(model, trained=["layer4"], bn=bn)
    expected = by_hand(bn).state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=1e-4, msg=key)
        statistic = key.endswith(("running_mean", "running_var", "num_batches_tracked"))
        moves = is_trained(key) or (statistic and bn == "shift")
        assert value.equal(before[key]) is not moves, key
    # Later training may train everything.
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "trained", "moved"),
    [
        ("test_resnet", ["layer4.0.conv2", "fc"], {"layer4.0.conv2.weight"}),
        ("test_resnet", [], set()),
        # Its classifier is a convolution.
        ("dla46x_c", [], set()),
    ],
)
def test_a_module_within_a_module_and_the_classifier_alone(name, trained, moved):
    model = network(name)
    train(model, trained=trained, epochs=1)
    assert changed(model, network(name).state_dict()) == moved | {"fc.weight", "fc.bias"}


def test_dropout_of_frozen_modules_is_off_or_on():
    modes = {}
    for bn in ("frozen", "shift"):
        model = network(drop_path_rate=0.5)
        for layer in (model.layer1, model.layer4):
            layer[0].drop_path = DropPath(0.5)
        parts = [model.layer1[0].drop_path, model.layer4[0].drop_path]
        seen = []
        for part in parts:
            part.register_forward_hook(lambda module, *_, seen=seen: seen.append(module.training))
        train(model, trained=["layer4"], bn=bn, epochs=1)
        modes[bn] = seen[:2]
    assert modes == {"frozen": [False, True], "shift": [True, True]}


@pytest.mark.parametrize(("bn", "ema"), [("frozen", None), ("shift", {"decay": 0.5})])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, bn, ema):
    whole, resumed, data = network(), network(), images(side=SIDE)
    options = OPTIONS | {"trained": ["layer4"], "bn": bn, "ema": ema, "val": data, "keep": "last"}
    train_with(whole, data=data, **options)
    interrupted(tmp_path, (network(), resumed), 1, data=data, **options)
    assert not changed(resumed, whole.state_dict())
    # Also an average of frozen weights is those weights.
    keys = {name for name, _ in network().named_parameters() if not is_trained(name)}
    assert not keys & changed(resumed, network().state_dict())


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
    model = network()
    train(model, trained=["last_block"], optimizer=options, clip_grad=1.0, clip_mode="agc")
    moved = changed(model, network().state_dict())
    assert all(map(is_trained, moved))
    # Through a batch norm that starts at 0, little reaches the layers before it.
    assert {"fc.bias", "layer4.0.downsample.1.weight", "layer4.0.bn2.weight"} <= moved


def test_wrong_modules_are_named_with_the_right_ones_there():
    model = network()
    right = "conv1, bn1.*layer4, global_pool, fc"
    for names, message in (
        (["layer5"], rf"'layer5' \(did you mean 'layer4'\?\).*: {right}"),
        (["layer4.2"], r"'layer4.2'.*choose one of: layer4.0$"),
        (["layer4.0.conv2.weight"], r"choose one of: layer4.0.conv2$"),
        (["layer4", ""], r"unknown module in trained: ''.*conv1"),
    ):
        with pytest.raises(UsageError, match=message):
            train(model, trained=names)
    assert all(parameter.requires_grad for parameter in model.parameters())
    vit = network("test_vit", img_size=SIDE)
    for parts, message in (
        ((model, None, "shift"), "no effect, since no modules are named in trained: remove it"),
        ((vit, ["blocks.5"], "shift"), "VisionTransformer has no batch-norm statistics"),
        ((model, [], "moving"), "unknown bn 'moving'.*frozen, shift"),
    ):
        with pytest.raises(UsageError, match=message):
            FrozenParts(*parts)


def test_batches_without_a_variance_are_refused():
    """At 32 pixels the last maps of the network have one; frozen batch norm needs no batch."""
    model, size = network(), (SIDE, SIDE)
    parts = FrozenParts(model, None)
    with pytest.raises(UsageError, match=r"over 1 images in a process's batch: Expected more"):
        parts.try_batch(model, size, 1)
    parts.try_batch(model, size, 2)
    parts.try_batch(model, (2 * SIDE, SIDE), 1)
    FrozenParts(model, []).try_batch(model, size, 1)
    assert not changed(model, network().state_dict())
    bilateral = network("lt_bbn_resnet", base="test_resnet")
    with pytest.raises(UsageError, match=r"over 2 images .*one for each branch"):
        FrozenParts(bilateral, None).try_batch(bilateral, size, 2)
    FrozenParts(bilateral, None).try_batch(bilateral, size, 4)
    with pytest.raises(UsageError, match="batch norm cannot normalise"):
        train(model, batch_size=1)
