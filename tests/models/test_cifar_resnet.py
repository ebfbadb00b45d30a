"""The CIFAR ResNet: against a forward pass written from the paper, and within timm's interface."""

import pytest
import timm
import torch
from torch.nn import functional as F

from timm_lt.models.networks import CifarResNet
from timm_lt.utils.checks import UsageError

LAYERS = (2, 2, 2)


def create(layers=LAYERS, **options):
    """Creates a model in float64 whose batch normalisations are random, too."""
    torch.manual_seed(0)
    model = CifarResNet(layers, **options).double().eval()
    for name, value in model.state_dict().items():
        if "bn" in name and value.is_floating_point():
            value.uniform_(0.5, 1.5)
            if name.endswith(("bias", "running_mean")):
                value.sub_(1)
    return model


def images(channels=3, size=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, channels, size, size, generator=generator, dtype=torch.float64)


def reference(model, x, layers=LAYERS):
    """Section 4.2 of He et al.: the outputs of the stem and of the three stages."""
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def conv_bn(x, conv, bn, stride=1):
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        mean, variance = state[f"{bn}.running_mean"], state[f"{bn}.running_var"]
        if model.training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return x * state[f"{bn}.weight"][:, None, None] + state[f"{bn}.bias"][:, None, None]

    outputs = [F.relu(conv_bn(x, "conv1", "bn1"))]
    for stage, (blocks, width) in enumerate(zip(layers, (16, 32, 64), strict=True), 1):
        x = outputs[-1]
        for block in (f"layer{stage}.{index}" for index in range(blocks)):
            halves = x.shape[1] < width
            y = F.relu(conv_bn(x, f"{block}.conv1", f"{block}.bn1", stride=2 if halves else 1))
            y = conv_bn(y, f"{block}.conv2", f"{block}.bn2")
            if halves:
                zeros = torch.zeros_like(y)[:, : width // 4]
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
            x = F.relu(y + x)
        outputs.append(x)
    return outputs


def classify(model, features):
    return features @ model.fc.weight.T + model.fc.bias


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("layers", "size"), [((5, 5, 5), 32), ((1, 3, 2), 30)])
def test_forward_is_the_papers(layers, size, training):
    model, x = create(layers).train(training), images(size=size)
    expected = reference(model, x, layers)
    last, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(intermediates, expected)
    torch.testing.assert_close(last, expected[-1])
    model = create(layers).train(training)
    torch.testing.assert_close(model(x), classify(model, expected[-1].mean((2, 3))))


@pytest.mark.parametrize("n", [3, 5, 9])
def test_depth_and_parameters(n):
    model = CifarResNet((n, n, n), device="meta")
    assert len([p for p in model.parameters() if p.ndim > 1]) == 6 * n + 2
    stem, classifier = 9 * 3 * 16 + 2 * 16, 64 * 10 + 10
    blocks = sum(n * (2 * 9 * c * c + 2 * 2 * c) for c in (16, 32, 64))
    narrow = sum(9 * c * c // 2 for c in (32, 64))  # half the inputs where a stage begins
    number = sum(p.numel() for p in model.parameters())
    assert number == stem + blocks - narrow + classifier
    assert (number == 464_154) == (n == 5)


def test_initial_weights():
    torch.manual_seed(0)
    state = CifarResNet().state_dict()
    for name, fan_in in {"conv1": 27, "layer2.0.conv1": 144, "layer3.4.conv2": 576}.items():
        weight = state[f"{name}.weight"]
        assert weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.08)
    scales = [value for name, value in state.items() if "bn" in name and name.endswith("weight")]
    assert len(scales) == 31
    assert all((scale == 1).all() for scale in scales)
    model = CifarResNet(LAYERS, zero_init_last=True)
    assert not any(block.bn2.weight.any() for block in model.layer3)
    with pytest.raises(UsageError, match=r"three numbers.*got \(5, 5, 5, 5\)"):
        CifarResNet((5, 5, 5, 5))


@torch.no_grad()
@pytest.mark.parametrize("feature_cls", ["list", "getter"])
def test_timm_extracts_features(feature_cls):
    options = {"layers": LAYERS, "features_only": True, "feature_cls": feature_cls}
    model = timm.create_model("lt_resnet32", **options).double()
    assert model.feature_info.channels() == [16, 16, 32, 64]
    assert model.feature_info.reduction() == [1, 1, 2, 4]
    full = create()
    expected = reference(full, images())
    assert [output.shape[-1] for output in expected] == [32, 32, 16, 8]
    weights = {name: value for name, value in full.state_dict().items() if name[:3] != "fc."}
    getattr(model, "model", model).load_state_dict(weights)
    torch.testing.assert_close(model.eval()(images()), expected)


INDICES = [(2, [2, 3]), ([-1], [3]), ([0, -2], [0, 2]), (None, [0, 1, 2, 3])]


@torch.no_grad()
@pytest.mark.parametrize(("indices", "positions"), INDICES)
def test_intermediate_features_and_pruning(indices, positions):
    model = create()
    expected = [reference(model, images())[position] for position in positions]
    options = {"stop_early": True, "intermediates_only": True}
    taken = model.forward_intermediates(images(), indices, **options)
    torch.testing.assert_close(taken, expected)
    assert model.prune_intermediate_layers(indices, prune_head=False) == positions
    assert model.num_features == expected[-1].shape[1]
    # As in timm, the classifier goes with the stage that it was made for.
    assert model.num_classes == (10 if positions[-1] == 3 else 0)
    torch.testing.assert_close(model.forward_features(images()), expected[-1])


@torch.no_grad()
@pytest.mark.parametrize("pool", ["avg", "max", "catavgmax"])
def test_head_of_timm(pool):
    model, x = create(num_classes=7, in_chans=1, global_pool=pool), images(channels=1)
    last = reference(model, x)[-1]
    pooled = {"avg": last.mean((2, 3)), "max": last.amax((2, 3))}
    pooled["catavgmax"] = torch.cat([pooled["avg"], pooled["max"]], dim=1)
    torch.testing.assert_close(model.forward_head(last, pre_logits=True), pooled[pool])
    assert (model.num_features, model.head_hidden_size) == (64, pooled[pool].shape[1])
    torch.testing.assert_close(model(x), classify(model, pooled[pool]))
    model.reset_classifier(3, global_pool="max")
    torch.testing.assert_close(model(x), classify(model, pooled["max"]))
