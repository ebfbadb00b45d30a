"""Modulated attention: against plain loops over the positions, at any size, and in a ResNet."""

import copy
import math

import pytest
import timm
import timm.optim
import torch
from torch.autograd import gradcheck

import timm_lt
from timm_lt.models.networks import ModulatedAttention, attach_attention
from timm_lt.utils.checks import UsageError

every_form = pytest.mark.parametrize("form", ["convolution", "linear"])


def random_weights(module, std=0.3):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return module


def attention(channels=6, **options):
    return random_weights(ModulatedAttention(channels, **options).double())


def maps(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(module, x, form):
    """y = x + m ⊙ SA(x), position by position, number by number."""

    def convolve(layer, v):
        w = layer.weight.flatten(1).tolist()
        b = [0.0] * len(w) if layer.bias is None else layer.bias.tolist()
        return [
            sum(a * c for a, c in zip(r, v, strict=True)) + s for r, s in zip(w, b, strict=True)
        ]

    def softmax(values):
        e = [math.exp(v - max(values)) for v in values]
        return [v / sum(e) for v in e]

    channels, height, width = x.shape
    at = [x[:, i, j].tolist() for i in range(height) for j in range(width)]
    if form == "linear":
        flat = [at[p][c] for c in range(channels) for p in range(len(at))]
        m = softmax(convolve(module.spatial, flat))
    else:
        m = softmax([convolve(module.spatial, v)[0] for v in at])
        m = [len(at) / 49 * weight for weight in m]
    keys, values = ([convolve(layer, v) for v in at] for layer in (module.key, module.value))
    y = []
    for p, v in enumerate(at):
        query = convolve(module.query, v)
        seen = softmax([sum(a * b for a, b in zip(query, key, strict=True)) for key in keys])
        mean = [sum(s * g[k] for s, g in zip(seen, values, strict=True)) for k in range(len(query))]
        y.append([a + m[p] * b for a, b in zip(v, convolve(module.output, mean), strict=True)])
    return torch.tensor(y, dtype=torch.float64).T.view(channels, height, width)


SIZES = [("convolution", (7, 7), 2), ("convolution", (3, 5), 3), ("linear", (7, 7), 2)]


@pytest.mark.parametrize(("form", "size", "reduction"), SIZES)
@torch.no_grad()
def test_is_the_naive_loop(form, size, reduction):
    module, x = attention(spatial=form, reduction=reduction), maps(2, 6, *size)
    expected = torch.stack([naive(module, one, form) for one in x])
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-12)
    # A batch of one is the same.
    torch.testing.assert_close(module(x[:1]), expected[:1], rtol=1e-9, atol=1e-12)
    assert (expected - x).abs().max() > 1e-3


@every_form
def test_it_starts_as_the_identity_and_learns_from_there(form):
    module, x = ModulatedAttention(6, spatial=form), maps(2, 6, 7, 7).float()
    assert torch.equal(module(x), x)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (module(x) * maps(2, 6, 7, 7, seed=3)).sum().backward()
        optimizer.step()
    # After the first step all have a gradient: none is there for nothing.
    assert all(p.grad.abs().max() > 1e-9 for p in module.parameters())


@pytest.mark.parametrize(("form", "size"), [("convolution", (2, 3)), ("linear", (7, 7))])
def test_gradients_of_images_and_weights(form, size):
    module, x = attention(2, spatial=form), maps(1, 2, *size).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert gradcheck(call, (x, *module.parameters()), fast_mode=form == "linear")


@pytest.mark.parametrize("size", [(7, 7), (3, 5)])
@torch.no_grad()
def test_a_constant_map_by_hand(size):
    """All positions are equal, with a weight of 1/49 each."""
    module = ModulatedAttention(2)
    module.value.weight.copy_(torch.tensor([1.0, 0]).view(1, 2, 1, 1))
    module.value.bias.zero_()
    module.output.weight.copy_(torch.tensor([49.0, 98]).view(2, 1, 1, 1))
    y = module(torch.tensor([3.0, 5]).view(1, 2, 1, 1).expand(1, 2, *size))
    # 3 + 3 and 5 + 6.
    torch.testing.assert_close(y, torch.tensor([6.0, 11]).view(1, 2, 1, 1).expand_as(y))


@every_form
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 3e-2)])
@torch.no_grad()
def test_half_precision(form, dtype, tolerance):
    module, x = ModulatedAttention(8, spatial=form), maps(2, 8, 7, 7).to(dtype)
    module = random_weights(module).to(dtype)
    exact = copy.deepcopy(module).double()(x.double())
    torch.testing.assert_close(module(x).double(), exact, rtol=tolerance, atol=tolerance)
    # Scores beyond the range of float16 stay finite.
    module, x = random_weights(module, std=2.0), 20 * x
    assert (module.query(x).float().square().sum(1) > 65504).any()
    out = module(x)
    assert out.dtype is dtype
    assert out.isfinite().all()


MISTAKES = [
    ({"channels": 1}, "channels must be an integer >= 2, got 1"),
    ({"channels": 4, "reduction": 5}, "reduction must be an integer from 1 to 4, got 5"),
    ({"channels": 4, "spatial": "fc"}, "unknown spatial 'fc'.*convolution, linear"),
]


def test_wrong_values_are_refused():
    for options, message in MISTAKES:
        with pytest.raises(UsageError, match=message):
            ModulatedAttention(**options)
    with pytest.raises(UsageError, match=r"7×7 maps.*224 pixels\), got 6×7;.*'convolution'"):
        attention(spatial="linear")(maps(1, 6, 6, 7))
    with pytest.raises(UsageError, match="not for a ByobNet"):
        attach_attention(timm.create_model("resnext26ts", num_classes=3))


@pytest.mark.parametrize("name", ["test_resnet", "lt_resnet32", "lt_resnet10"])
def test_attached_attention_changes_nothing_until_it_is_trained(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        before = model(images)
        attach_attention(model)
        assert torch.equal(model(images), before)
        last = model.feature_info[-1]["module"]
        random_weights(model.get_submodule(f"{last}.attention"))
        assert not torch.allclose(model(images), before)
        # The attended map is what the classifier, and timm's intermediates, take.
        taken = model.forward_features(images)
        final, maps = model.forward_intermediates(images)
    assert torch.equal(final, taken)
    assert maps[-1].shape[1] == model.feature_info[-1]["num_chs"] == model.num_features
    with pytest.raises(UsageError, match=f"already has {last}.attention"):
        attach_attention(model)


@every_form
def test_a_checkpoint_brings_the_attention_back(form, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("lt_oltr_resnet10", num_classes=3, spatial=form).eval()
    random_weights(model.layer4.attention)
    timm_lt.save_checkpoint(tmp_path, model, heads={}, class_counts=[9, 5, 1])
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for load in (timm.create_model, timm_lt.create_model):
            loaded = load(f"local-dir:{tmp_path}", pretrained=True).eval()
            assert torch.equal(loaded(images), model(images))
            assert loaded.layer4.attention.linear is (form == "linear")
