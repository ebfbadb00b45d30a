"""Checks on a device other than the CPU: ``python device_checks.py CHECK DEVICE FOLDER``.

Each check compares a device with the CPU. The device is ``cuda``, or the simulated ``sim``.
"""

import contextlib
import io
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
from PIL import Image

import timm_lt
from timm_lt.cli import main
from timm_lt.data.images import ImageTensors
from timm_lt.training import train_representation
from timm_lt.utils.accelerator import default_device, temporary_accelerator

TARGETS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
COUNTS = torch.tensor([300, 40, 6])
OPTIONS = {"fslwf": {"base": 3}, "crt": {"solver": "sgd"}}
NEED_FEATURES = ("range", "lifted_structure")


def small_model():
    torch.manual_seed(0)
    return timm.create_model("lt_test_resnet", num_classes=3)


def images():
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def close(value, expected):
    torch.testing.assert_close(value.cpu(), expected.cpu(), rtol=1e-3, atol=1e-4)


def run(*arguments):
    """Runs a command and returns what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(list(map(str, arguments))) == 0
    return out.getvalue()


def photos(folder):
    for number, name in enumerate("abc"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(8):
            image = Image.new("RGB", (32, 32), (90 * number, 20 * i, 200 - 90 * number))
            image.save(folder / "photos" / name / f"{i}.png")
    return folder / "photos"


def check_features(device, folder):
    """Batches on the CPU and on the device, into memory and into a cache."""
    expected = timm_lt.extract_features(small_model(), [(images(), TARGETS)])
    model = small_model().to(device)
    for batch in ((images(), TARGETS), (images().to(device), TARGETS.to(device))):
        found = timm_lt.extract_features(model, [batch])
        close(found.values, expected.values)
        assert found.values.device.type == found.targets.device.type == "cpu"
    found = timm_lt.extract_features(model, [batch], cache_dir=folder, key="x")
    close(found.values, expected.values)
    low = timm_lt.extract_features(model, [batch], compute_dtype="bfloat16")
    torch.testing.assert_close(low.values, expected.values, rtol=0.1, atol=0.1)


def check_fits(device, _):
    """Every head, of features on the device."""
    values = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)) + TARGETS[:, None]
    here = timm_lt.Features(values, TARGETS)
    there = timm_lt.Features(values.to(device), TARGETS.to(device))
    linear = torch.nn.Linear(5, 3)
    for name in timm_lt.list_heads():
        options = OPTIONS.get(name, {})
        head = timm_lt.fit_head(name, here, classifier=linear, val=here, **options)
        linear.to(device)
        options |= {"class_counts": timm_lt.class_counts(TARGETS.to(device))}
        found = timm_lt.fit_head(name, there, classifier=linear, val=there, **options)
        linear.cpu()
        assert all(map(torch.equal, found.state_dict().values(), head.state_dict().values())), name
    curve, expected = (timm_lt.tau_curve(linear, features) for features in (there, here))
    assert curve.best_tau == expected.best_tau


def check_heads(device, _):
    """Heads on a model of the device, their folding, and a change of the classes."""
    features = timm_lt.extract_features(small_model(), [(images(), TARGETS)])
    for name in timm_lt.list_heads():
        options = OPTIONS.get(name, {})
        linear = small_model().get_classifier()
        head = timm_lt.fit_head(name, features, classifier=linear, val=features, **options)
        expected = timm_lt.set_head(small_model(), head).eval()(images())
        model = timm_lt.set_head(small_model().to(device), head).eval()
        close(model(images().to(device)), expected)
        if name != "oltr":
            model = timm_lt.fold_head(model)
            assert (model(images().to(device)).argmax(1).cpu() == expected.argmax(1)).all()
        model.reset_classifier(4)
        assert model.get_classifier().weight.device.type == device
    for name, options in (("tau_norm", {}), ("logit_adjusted", {"class_counts": COUNTS})):
        model = timm_lt.set_head(small_model(), name, **options)
        there = {key: value.to(device) for key, value in options.items()}
        moved = timm_lt.set_head(small_model().to(device), name, **there)
        close(moved.eval()(images().to(device)), model.eval()(images()))


def check_losses(device, _):
    """Values and gradients."""
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    for name in timm_lt.list_losses():
        results = []
        for place in ("cpu", device):
            loss = timm_lt.create_loss(name, class_counts=COUNTS.to(place)).to(place)
            loss.set_epoch(2, 3)
            given = logits.detach().to(place).requires_grad_()
            features = {"features": given} if name in NEED_FEATURES else {}
            value = loss(given, TARGETS.to(place), **features)
            value.backward()
            results.append((value.detach(), given.grad))
        (expected, gradient), (value, found) = results
        close(value, expected)
        close(found, gradient)


def check_samplers(device, _):
    """Samplers and class counts of labels on the device."""
    labels = TARGETS.to(device)
    assert torch.equal(timm_lt.class_counts(labels).cpu(), torch.tensor([3, 2, 3]))
    for name in ("instance_balanced", "class_balanced", "square_root", "reversed", "over_sampled"):
        sampler = timm_lt.create_sampler(name, labels)
        assert list(sampler) == list(timm_lt.create_sampler(name, TARGETS))


def check_metrics(device, _):
    """Figures of logits, predictions and counts on the device."""
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    there, targets, counts = (tensor.to(device) for tensor in (logits, TARGETS, COUNTS))
    expected = timm_lt.evaluate_logits(logits, TARGETS, COUNTS).to_dict()
    assert timm_lt.evaluate_logits(there, targets, counts).to_dict() == expected
    metrics = timm_lt.ShotMetrics(counts)
    metrics.update(there, targets)
    assert metrics.compute().to_dict() == expected
    report = timm_lt.shot_accuracy(there.argmax(1), targets, counts)
    assert report.all == timm_lt.shot_accuracy(logits.argmax(1), TARGETS, COUNTS).all
    low, high = timm_lt.confidence_intervals(report, counts)["all"]
    assert low <= report.all <= high
    pair = timm_lt.paired_difference(there.argmax(1), there.argmin(1), targets, counts)
    assert pair == timm_lt.paired_difference(logits.argmax(1), logits.argmin(1), TARGETS, COUNTS)


def check_loader(device, folder):
    """Batches are on the device that accelerate computes on."""
    assert default_device().type == device
    dataset = timm.data.ImageDataset(str(photos(folder)))
    sampler = timm_lt.create_sampler("class_balanced", timm_lt.dataset_labels(dataset))
    for options in ({}, {"is_training": True, "re_prob": 0.5, "sampler": sampler}):
        loader = timm_lt.create_loader(dataset, (3, 32, 32), 4, num_workers=0, **options)
        for shown, labels in loader:
            assert shown.device.type == labels.device.type == device


def check_rebalance(device, folder):
    """Models on the CPU and on the device, which stay there."""
    root = photos(folder)
    for place in ("cpu", device):
        model = small_model().to(place)
        found = timm_lt.rebalance(model, root, heads=["ncm", "crt"], workers=0)
        assert {weight.device.type for weight in found.model.parameters()} == {place}
        assert next(model.parameters()).device.type == place
        logits = found.model(images().to(place))
        close(logits, found.model.cpu()(images()))


def check_commands(device, folder):
    """``heads``, ``evaluate``, ``predict`` and ``fold``, which agree."""
    root, out = photos(folder), folder / "run"
    model = "lt_test_resnet.glyph_lt"
    run("heads", root, "--model", model, "--heads", "ncm", "lws", "--output", out, "--workers", 0)
    metrics = json.loads((out / "metrics.json").read_text())["heads"]
    found = json.loads(run("evaluate", out, root, "--json", "--workers", 0))["heads"]
    assert {name: part["all"] for name, part in found.items()} == {
        name: part["all"] for name, part in metrics.items()
    }
    shown = run("predict", out, root / "a", "--head", "ncm", "--format", "json", "--workers", 0)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=small_model()))
    model = timm_lt.create_model(f"local-dir:{out}", head="ncm").eval()
    for entry in json.loads(shown):
        pixels = transform(Image.open(entry["image"]))[None]
        share = model(pixels).softmax(1).max()
        assert abs(entry["classes"][0]["probability"] - share.item()) < 1e-3
    run("fold", out, folder / "folded", "--head", "ncm")


def check_training(device, _):
    """An epoch with mixup, an EMA, clipped gradients and validation."""
    pixels = (images() * 64 + 128).clamp(0, 255).byte()
    options = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    data = ImageTensors(pixels, TARGETS, **options)
    with temporary_accelerator() as accelerator:
        assert accelerator.device.type == device
        training = train_representation(
            small_model(),
            data,
            timm_lt.create_sampler("class_balanced", TARGETS),
            timm_lt.create_loss("balanced_softmax", class_counts=COUNTS),
            accelerator=accelerator,
            epochs=2,
            batch_size=4,
            optimizer={"opt": "sgd", "lr": 0.1, "momentum": 0.9},
            scheduler={"sched": "cosine"},
            ema={"decay": 0.9},
            clip_grad=1.0,
            val=data,
            class_counts=COUNTS,
        )
        assert all(epoch.loss > 0 for epoch in training.history)
        assert next(training.model.parameters()).isfinite().all()


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


if __name__ == "__main__":
    name, device, folder = sys.argv[1:]
    simulated = nullcontext()
    if device == "sim":
        from simulated_device import Simulation

        simulated = Simulation()
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ["ACCELERATE_TORCH_DEVICE"] = device
    with simulated:
        CHECKS[name](device, Path(folder))
