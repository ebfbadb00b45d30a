"""Heads trained on images: against hand-written loops, and what becomes of the model."""

import copy
import hashlib
import json
import random
import re

import numpy as np
import pytest
import timm
import torch
from naive_sgd import naive_sgd
from torch import nn
from training_runs import new_accelerator, own_accelerator  # noqa: F401

import timm_lt
import train_lt
from timm_lt.data import create_augmentation, create_splits
from timm_lt.data.images import ImageTensors
from timm_lt.heads import head_statistics, seeded_linear
from timm_lt.training import HeadTrainer, train_head_on_images

COUNTS = (24, 10, 6, 2)
LABELS = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))
N, C, SIDE = len(LABELS), len(COUNTS), 32
STEPS, BATCH, LR, DECAY = 12, 14, 0.1, 0.05


@pytest.fixture(scope="module")
def pixels():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (N, 3, SIDE, SIDE), generator=generator)
    drawn[:, 0] = drawn[:, 0] // 2 + 32 * LABELS[:, None, None]
    return drawn.to(torch.uint8)


@pytest.fixture
def data(pixels):
    return ImageTensors(pixels, LABELS)


def normalised(pixels):
    return (pixels.float() / 255 - 0.5) / 0.25


@pytest.fixture(scope="module")
def trained(pixels):
    """A model whose batch-norm statistics are not those of a new one."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=C)
    with torch.no_grad():
        for part in normalised(pixels).split(8):
            model(part)
        nn.init.normal_(model.fc.bias)
    return model


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


def train(name, model, data, accelerator=None, **options):
    settings = {"steps": STEPS, "batch_size": BATCH, "lr": LR, "weight_decay": DECAY, "seed": 3}
    accelerator = accelerator or new_accelerator()
    return train_head_on_images(name, model, data, accelerator=accelerator, **settings | options)


def with_dropout():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=C, drop_rate=0.3)


def by_hand(name, model, pixels, *, shift=False, scale_bias=True):
    """Trains what a head has, from the paper; returns its parameters and the network."""
    network = copy.deepcopy(model).train(shift)
    dimension = network.fc.in_features
    weight, bias = (p.detach().clone() for p in network.fc.parameters())
    scale = torch.ones(C)
    if name == "crt":
        generator = torch.Generator().manual_seed(3)
        bound = dimension**-0.5
        weight = torch.empty(C, dimension).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(C).uniform_(-bound, bound, generator=generator)
    learned = [weight, bias] if name == "crt" else [scale]
    for parameter in learned:
        parameter.requires_grad_()

    def loss(rows):
        with torch.no_grad():
            features = network.forward_features(normalised(pixels[rows])).mean((2, 3))
        plain = features @ weight.T
        logits = scale * (plain + bias) if scale_bias else scale * plain + bias
        return -logits.log_softmax(1)[torch.arange(BATCH), LABELS[rows]].mean()

    draws = timm_lt.create_sampler("class_balanced", LABELS, num_samples=STEPS * BATCH, seed=3)
    naive_sgd(learned, loss, draws.epoch_indices().split(BATCH), LR, DECAY)
    return {"weight": weight, "bias": bias, "scale": scale}, network


def statistics(model):
    ends = ("running_mean", "running_var", "num_batches_tracked")
    return {key: value for key, value in model.state_dict().items() if key.endswith(ends)}


@pytest.mark.parametrize(
    ("name", "options"), [("crt", {}), ("lws", {}), ("lws", {"scale_bias": False})]
)
@pytest.mark.parametrize("bn", ["frozen", "shift"])
def test_follows_a_hand_written_loop(model, data, pixels, name, options, bn):
    head = train(name, model, data, bn=bn, **options)
    expected, network = by_hand(name, model, pixels, shift=bn == "shift", **options)
    assert head.kind == name
    assert not head.training
    for key, value in head.named_parameters():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    start = expected["scale"] * 0 + 1 if name == "lws" else seeded_linear(96, C, seed=3).weight
    moved = head.scale if name == "lws" else head.weight
    assert (moved - start).abs().max() > 1e-3
    if bn == "frozen":
        assert head.backbone_statistics is None
        return
    # Of training mode on the frozen backbone, and moved far from those that the model came with.
    found, wanted = head.backbone_statistics, statistics(network)
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found["bn1.running_mean"], model.bn1.running_mean, rtol=0.01)


def test_accumulated_gradients_are_those_of_one_batch(model, data, pixels):
    head = train("crt", model, data, new_accelerator(accumulation_steps=2))
    expected, _ = by_hand("crt", model, pixels)
    torch.testing.assert_close(head.weight, expected["weight"], rtol=1e-4, atol=1e-5)


def test_a_frozen_backbone_has_no_dropout(data):
    model = with_dropout()
    heads = [train("crt", model, data, steps=3)]
    model.drop_rate = 0.0
    heads.append(train("crt", model, data, steps=3))
    assert heads[0].weight.equal(heads[1].weight)


def test_mixed_precision_is_the_accelerators(model, data):
    full = train("crt", model, data)
    half = train("crt", model, data, new_accelerator(mixed_precision="bf16"))
    assert half.weight.dtype == torch.float32
    difference = (half.weight - full.weight).norm() / full.weight.norm()
    # bf16 has 8 bits: the features were rounded to them, and no more.
    assert 1e-5 < difference < 0.05


def test_the_same_seed_gives_the_same_bits(pixels):
    model, heads = with_dropout(), []
    data = ImageTensors(pixels, LABELS, augmentation=create_augmentation("affine"), seed=5)
    for seed in (1, 1, 2):
        torch.rand(7)
        np.random.rand(3)  # noqa: NPY002
        heads.append(train("crt", model, data, bn="shift", steps=4, seed=seed))
    heads.append(train("crt", model, ImageTensors(pixels, LABELS), bn="shift", steps=4, seed=1))
    first, again, other, unmoved = heads
    assert torch.equal(first.weight, again.weight)
    for key, value in first.backbone_statistics.items():
        assert torch.equal(value, again.backbone_statistics[key])
    assert not torch.allclose(first.weight, other.weight, rtol=0.1)
    assert not torch.allclose(first.weight, unmoved.weight, atol=1e-3)


def test_global_random_states_stay_as_they_are(pixels):
    model, drawn = with_dropout(), []
    for trains in (False, True):
        random.seed(5), np.random.seed(6), torch.manual_seed(7)  # noqa: NPY002
        if trains:
            data = ImageTensors(pixels, LABELS, augmentation=create_augmentation("affine"))
            train("crt", model, data, bn="shift", steps=1)
            with pytest.raises(timm_lt.UsageError, match=r"head 'crt': lower its lr"):
                train("crt", model, data, lr=1e38, steps=2, weight_decay=1e10)
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("name", "bn"), [("crt", "frozen"), ("lws", "shift")])
def test_the_model_stays_as_it_is(model, data, name, bn):
    model.train()
    model.layer2.eval()
    model.conv1.requires_grad_(False)
    before, joint, accelerator = copy.deepcopy(model), model.fc, new_accelerator()
    # As inside of an update of the caller's own, which goes on afterwards.
    accelerator.step = 1
    train(name, model, data, accelerator, bn=bn, steps=2)
    assert accelerator.step == 1
    assert not accelerator._models
    assert model.fc is joint
    assert type(joint) is nn.Linear
    assert not {"reset_classifier", "forward"} & vars(model).keys()
    states = [m.state_dict(keep_vars=True) for m in (model, before)]
    for (key, now), then in zip(states[0].items(), states[1].values(), strict=True):
        assert torch.equal(now, then), key
        assert now.stride() == then.stride()
        assert now.requires_grad == then.requires_grad
        assert now.grad is None
    for now, then in zip(model.modules(), before.modules(), strict=True):
        assert now.training == then.training


def test_a_classifier_that_is_a_convolution(data, pixels):
    torch.manual_seed(0)
    size = {"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 32), "num_classes": C}
    model = timm.create_model("resnetv2_18", **size)
    head = train("lws", model, data, bn="shift", steps=3)
    images = normalised(pixels[:6])
    loader = [(images, LABELS[:6])]
    with head_statistics(model, head), torch.no_grad():
        expected = head(timm_lt.extract_features(model, loader).values)
    with torch.no_grad():
        logits = timm_lt.set_head(model, head).eval()(images)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("name", ["crt", "lws"])
def test_a_checkpoint_keeps_the_statistics(model, data, pixels, tmp_path, name):
    heads = {"plain": train(name, model, data), name: train(name, model, data, bn="shift")}
    timm_lt.save_checkpoint(tmp_path, model, heads=heads, class_counts=list(COUNTS))
    images, found = normalised(pixels[::3]), {}
    for key, head in heads.items():
        loaded = timm_lt.create_model(f"local-dir:{tmp_path}", head=key).eval()
        with head_statistics(model, head):
            found[key] = timm_lt.extract_features(model, [(images, LABELS[::3])]).values
        with torch.inference_mode():
            assert torch.equal(loaded(images), head(found[key]))
    assert not torch.allclose(found[name], found["plain"], atol=1e-3)


def test_a_model_has_the_statistics_of_a_head_for_a_while(model, data):
    head = train("crt", model, data, bn="shift", steps=2)
    before, other = copy.deepcopy(model.state_dict()), timm.create_model("test_vit")

    def has(state):
        return all(torch.equal(model.state_dict()[key], value) for key, value in state.items())

    with head_statistics(model, head) as same:
        assert same is model
        assert has(head.backbone_statistics)
    assert has(before)
    with pytest.raises(timm_lt.UsageError, match="gave 0 images, "), head_statistics(model, head):
        timm_lt.extract_features(model, [])
    assert has(before)
    message = "statistics are not the model's"
    with pytest.raises(timm_lt.UsageError, match=message), head_statistics(other, head):
        pass


def many(number):
    """Images that take no memory."""
    pixels = torch.zeros(1, 3, 4, 4, dtype=torch.uint8).expand(number, -1, -1, -1)
    return ImageTensors(pixels, torch.arange(number) % C)


@pytest.mark.parametrize(
    ("name", "number", "options", "batch_size", "updates"),
    [
        # ImageNet-LT has 115,846 training images: 226 batches of 512 an epoch.
        ("crt", 115_846, {}, 512, 10 * 226),
        ("lws", 115_846, {}, 512, 5 * 226),
        ("crt", 115_846, {"steps": 7}, 512, 7),
        ("crt", 10_847, {"epochs": 2, "batch_size": 128}, 128, 2 * 84),
        ("lws", 102, {}, 100, 500),
    ],
)
def test_lengths(model, name, number, options, batch_size, updates):
    accelerator = new_accelerator(accumulation_steps=4)
    plan = HeadTrainer(name, model, many(number), accelerator, **options)
    assert (plan.batch_size, plan.updates) == (batch_size, updates)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ncm", {}, "'ncm' is not trained on images; crt and lws are"),
        ("crtt", {}, "unknown head 'crtt'.*'crt'"),
        ("crt", {"bn": "moving"}, "unknown bn 'moving'.*frozen, shift"),
        ("crt", {"scale_bias": False}, "unknown option of head 'crt' on images: 'scale_bias'"),
        ("lws", {"epochs": 2, "steps": 2}, "steps and epochs exclude each other"),
        ("crt", {"epochs": 0}, "head 'crt' on images: epochs must be an integer >= 1"),
        ("crt", {"momentum": 1}, r"momentum must be a number in \[0, 1\)"),
        ("crt", {"batch_size": N + 1}, f"batch_size {N + 1} .* at most {N}, the images"),
        ("crt", {"seed": -1}, "seed must be an integer >= 0"),
        ("crt", {"sampler": "balanced"}, "sampler of head 'crt': unknown sampler 'balanced'"),
    ],
)
def test_wrong_options_are_named(model, data, name, options, message):
    with pytest.raises(timm_lt.UsageError, match=message):
        train_head_on_images(name, model, data, accelerator=new_accelerator(), **options)


def test_wrong_models_and_data_are_named(model, data):
    with pytest.raises(timm_lt.UsageError, match=r"accumulation_steps 3: .* a multiple of 3"):
        train("crt", model, data, new_accelerator(accumulation_steps=3))
    vit = timm.create_model("test_vit", img_size=SIDE, num_classes=C)
    cosine = timm_lt.create_model("test_resnet", num_classes=C, head="cosine")
    five = timm.create_model("test_resnet", num_classes=5)
    for wrong, options, message in (
        (vit, {"bn": "shift"}, "no batch-norm statistics"),
        (cosine, {}, "carries a 'cosine' head"),
        (five, {}, "1 of 5 classes have no training image"),
        (model, {"bn": "shift", "batch_size": 1}, "cannot normalise over 1 images"),
        (model, {"lr": 1e20, "steps": 3, "weight_decay": 1e10}, "of head 'crt': lower its lr"),
    ):
        with pytest.raises(timm_lt.UsageError, match=message):
            train("crt", wrong, data, **options)
    # Without statistics the other mode is as good as for any model.
    train("crt", vit, data, steps=1)


DIGITS = ["hub_configs/lt_test_resnet.digits_lt.yaml", "--epochs", "1", "--quiet"]


@pytest.mark.slow
def test_a_run_evaluates_what_its_checkpoint_gives(tmp_path):
    folder = tmp_path / "run"
    on_images = "{stage: images, bn: shift, steps: 6, batch_size: 64}"
    heads = f"{{ncm: {{}}, crt: {on_images}, linear: {{}}, lws: {{stage: images, steps: 3}}}}"
    assert train_lt.main([*DIGITS, "--heads", heads, "--output", str(folder)]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["heads"]) == ["ncm", "crt", "linear", "lws"]
    assert metrics["stages"] == {
        "crt": {"stage": "images", "bn": "shift", "batch_size": 64, "updates": 6},
        "lws": {"stage": "images", "bn": "frozen", "batch_size": 389, "updates": 3},
    }
    assert set(metrics["seconds"]["heads"]) == set(metrics["heads"])
    entries = json.loads((folder / "config.json").read_text())["timm_lt"]["heads"]
    moved = {name: entry["backbone_statistics"] for name, entry in entries.items()}
    assert moved == {"ncm": False, "crt": True, "linear": False, "lws": False}
    size = {"size": (32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    test = create_splits("digits_lt").images("test", **size)
    images, _ = test.__getitems__(list(range(len(test))))
    for name in ("crt", "lws", "linear"):
        model = timm_lt.create_model(f"local-dir:{folder}", head=name).eval()
        with torch.inference_mode():
            logits = torch.cat([model(part) for part in images.split(256)])
        digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
        assert digest == metrics["logits_sha256"][name]


def test_a_mistake_in_a_recipe_is_named_before_training(tmp_path, capsys):
    heads = ["--heads", "{lws: {stage: images, batch_size: 390}}"]
    assert train_lt.main([*DIGITS, *heads, "--output", str(tmp_path / "run")]) == 2
    assert re.search("batch_size 390 .*at most 389", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
