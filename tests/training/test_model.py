"""Training parts of a model: the last block, and a hand-written loop."""

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
from timm_lt.training import TrainingOptions, train_representation
from timm_lt.training.model import FrozenParts, last_block
from timm_lt.utils.accelerator import create_accelerator
from timm_lt.utils.checks import UsageError

N, C, SIDE = 24, 3, 32
RATE, DECAY = 0.02, 0.1
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
        ([], r"its feature_info names no module of it \("),
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


def train(model, *, state=None, val=None, **options):
    data = images()
    settings = {
        "epochs": 2,
        "batch_size": 8,
        "optimizer": {
            "opt": "momentum",
            "lr": RATE,
            "weight_decay": DECAY,
            "momentum": 0.9,
            "filter_bias_and_bn": False,
        },
        "scheduler": {"sched": "constant"},
    }
    given = create_accelerator(mixed_precision="no") if state is None else state.accelerator
    return train_representation(
        model,
        data,
        timm_lt.create_sampler("instance_balanced", data.labels),
        timm_lt.create_loss("cross_entropy"),
        TrainingOptions(**settings | options),
        accelerator=given,
        val=val,
        state=state,
    )


def is_trained(key):
    return key.startswith(("layer4.", "fc."))


def changed(model, start):
    return {key for key, value in model.state_dict().items() if not value.equal(start[key])}


def by_hand(bn):
    """SGD with momentum on layer4 and fc; everything else is a function without parameters."""
    model, data = new_model(), images()
    x = (data.images.float() / 255 - 0.5) / 0.25
    parameters = {k: p for k, p in model.named_parameters() if is_trained(k)}
    velocity = {key: torch.zeros_like(p) for key, p in parameters.items()}
    sampler = timm_lt.create_sampler("instance_balanced", data.labels)
    for epoch in range(2):
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
    # Later training may train everything.
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_every_module_is_training_the_model():
    model, whole = new_model(), new_model()
    train(model, trained=[name for name, child in model.named_children() if [*child.parameters()]])
    train(whole)
    assert not changed(model, whole.state_dict())


@pytest.mark.parametrize(
    ("name", "trained", "moved"),
    [
        (
            "test_resnet",
            ["layer4.0.conv2", "fc"],
            {"layer4.0.conv2.weight", "fc.weight", "fc.bias"},
        ),
        ("test_resnet", [], {"fc.weight", "fc.bias"}),
        # Its classifier is a convolution.
        ("dla46x_c", [], {"fc.weight", "fc.bias"}),
    ],
)
def test_a_module_within_a_module_and_the_classifier_alone(name, trained, moved):
    model = new_model(name)
    train(model, trained=trained, epochs=1)
    assert changed(model, new_model(name).state_dict()) == moved | {"fc.weight", "fc.bias"}


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


@pytest.mark.parametrize(("bn", "ema"), [("frozen", None), ("shift", {"decay": 0.5})])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, bn, ema):
    options = {"trained": ["layer4"], "bn": bn, "ema": ema, "val": images(), "keep": "last"}
    whole = train(new_model(), epochs=3, **options).model
    with pytest.raises(StopError):
        train(new_model(), epochs=3, state=new_state(tmp_path, StopsAfterTwo), **options)
    resumed = train(new_model(), epochs=3, state=new_state(tmp_path), **options).model
    assert not changed(resumed, whole.state_dict())
    # Also an average of frozen weights is those weights.
    keys = {name for name, _ in new_model().named_parameters() if not is_trained(name)}
    assert not keys & changed(resumed, new_model().state_dict())


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
    model = new_model()
    train(model, trained=["last_block"], optimizer=options, clip_grad=1.0, clip_mode="agc")
    moved = changed(model, new_model().state_dict())
    assert all(map(is_trained, moved))
    # Through a batch norm that starts at 0, little reaches the layers before it.
    assert {"fc.bias", "layer4.0.downsample.1.weight", "layer4.0.bn2.weight"} <= moved


def test_wrong_modules_are_named_with_the_right_ones_there():
    model = new_model()
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
    vit = new_model("test_vit", img_size=SIDE)
    for parts, message in (
        ((model, None, "shift"), "no effect, since no modules are named in trained: remove it"),
        ((vit, ["blocks.5"], "shift"), "VisionTransformer has no batch-norm statistics"),
        ((model, [], "moving"), "unknown bn 'moving'.*frozen, shift"),
    ):
        with pytest.raises(UsageError, match=message):
            FrozenParts(*parts)


def test_batches_without_a_variance_are_refused():
    """At 32 pixels the last maps of the network have one; frozen batch norm needs no batch."""
    model, size = new_model(), (SIDE, SIDE)
    parts = FrozenParts(model, None)
    with pytest.raises(UsageError, match=r"over 1 images in a process's batch \(Expected more"):
        parts.try_batch(model, size, 1)
    parts.try_batch(model, size, 2)
    parts.try_batch(model, (2 * SIDE, SIDE), 1)
    FrozenParts(model, []).try_batch(model, size, 1)
    assert not changed(model, new_model().state_dict())
    bilateral = new_model("lt_bbn_resnet", base="test_resnet")
    with pytest.raises(UsageError, match=r"over 2 images .*one for each branch"):
        FrozenParts(bilateral, None).try_batch(bilateral, size, 2)
    FrozenParts(bilateral, None).try_batch(bilateral, size, 4)
    with pytest.raises(UsageError, match="batch norm cannot normalise"):
        train(model, batch_size=1)
