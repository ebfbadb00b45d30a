"""Entry points on a GPU, and on a simulated device, compared with the CPU.

Each check runs in a process of its own: ``python test_gpu.py CHECK DEVICE FOLDER``, where the
device is ``cuda`` or the simulated ``sim``.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import timm_lt
from timm_lt.cli import main
from timm_lt.data.images import ImageTensors
from timm_lt.run.execution import main as train_main
from timm_lt.training import TrainingOptions, TrainingState, train_representation
from timm_lt.utils.accelerator import create_accelerator, default_device, fresh_accelerate

ROOT = Path(timm_lt.__file__).parents[1]
TARGETS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
COUNTS = torch.tensor([300, 40, 6])
OPTIONS = {"fslwf": {"base": 3}, "crt": {"solver": "sgd"}}
NEED_FEATURES = ("range", "lifted_structure")
DIGITS = ROOT / "hub_configs" / "lt_test_resnet.digits_lt.yaml"


def small_model():
    torch.manual_seed(0)
    return timm.create_model("lt_test_resnet", num_classes=3)


def images():
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def features(device="cpu"):
    values = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)) + TARGETS[:, None]
    return timm_lt.Features(values.to(device), TARGETS.to(device))


def close(value, expected):
    torch.testing.assert_close(value.cpu(), expected.cpu(), rtol=1e-3, atol=1e-4)


def run(*arguments):
    """Runs a command and returns what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(list(map(str, arguments))) == 0
    return out.getvalue()


def photos(folder):
    """A folder of three classes, and a checkpoint with a head for them."""
    for number, name in enumerate("abc"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(8):
            image = Image.new("RGB", (32, 32), (90 * number, 20 * i, 200 - 90 * number))
            image.save(folder / "photos" / name / f"{i}.png")
    model = small_model().eval()
    taken = timm_lt.extract_features(model, [(images(), TARGETS)])
    heads = {"ncm": timm_lt.fit_head("ncm", taken)}
    names = {"class_counts": COUNTS.tolist(), "label_names": list("abc")}
    timm_lt.save_checkpoint(folder / "model", model, heads=heads, **names)
    return folder / "photos", folder / "model"


def on_cpu(folder, head):
    """Logits of a checkpoint's head for the images of a folder, with their class."""
    model = timm_lt.create_model(f"local-dir:{folder / 'model'}", head=head).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    paths = sorted((folder / "photos").rglob("*.png"))
    with torch.inference_mode():
        logits = model(torch.stack([transform(Image.open(path)) for path in paths]))
    return {str(p): (row, "abc".index(p.parent.name)) for p, row in zip(paths, logits, strict=True)}


def check_features(device, folder):
    """Batches on the CPU and on the device, into memory and into a cache."""
    expected = timm_lt.extract_features(small_model(), [(images(), TARGETS)])
    model = small_model().to(device)
    for batch in ((images(), TARGETS), (images().to(device), TARGETS.to(device))):
        for options in ({}, {"cache_dir": folder, "key": "x"}):
            found = timm_lt.extract_features(model, [batch], **options)
            close(found.values, expected.values)
            assert found.values.device.type == found.targets.device.type == "cpu"
    low = timm_lt.extract_features(model, [batch], compute_dtype="bfloat16")
    torch.testing.assert_close(low.values, expected.values, rtol=0.1, atol=0.1)


def check_heads(device, _):
    """Every head: fitted on features of the device, on a model there, with other classes."""
    here, there, linear = features(), features(device), torch.nn.Linear(5, 3)
    for name in timm_lt.list_heads():
        head, found = (
            timm_lt.fit_head(
                name,
                given,
                val=given,
                classifier=linear.to(given.values.device),
                class_counts=timm_lt.class_counts(given.targets),
                **OPTIONS.get(name, {}),
            )
            for given in (here, there)
        )
        assert all(map(torch.equal, found.state_dict().values(), head.state_dict().values())), name
        linear.cpu()
    for name, options in (("tau_norm", {"tau": 0.5}), ("ncm", {})):
        model = timm_lt.set_head(small_model(), name, **options)
        moved = timm_lt.set_head(small_model().to(device), name)
        moved.load_state_dict(model.state_dict())
        moved.reset_classifier(4)
        assert moved.get_classifier().weight.device.type == device
    model = timm_lt.set_head(small_model(), "logit_adjusted", class_counts=COUNTS)
    moved = small_model().to(device)
    moved = timm_lt.set_head(moved, "logit_adjusted", class_counts=COUNTS.to(device))
    close(moved.eval()(images().to(device)), model.eval()(images()))


def check_tau_curve(device, _):
    """The exact curve of features on the device."""
    linear = torch.nn.Linear(5, 3)
    expected = timm_lt.tau_curve(linear, features())
    curve = timm_lt.tau_curve(linear.to(device), features(device))
    assert curve.best_tau == expected.best_tau
    assert [curve(tau) for tau in (0.0, 0.7, 1.3)] == [expected(tau) for tau in (0.0, 0.7, 1.3)]


def check_fold(device, folder):
    """Folded heads on the device, and the command."""
    for name, options in (("tau_norm", {"tau": 0.7}), ("logit_adjusted", {"class_counts": COUNTS})):
        model = timm_lt.set_head(small_model(), name, **options).to(device).eval()
        expected = model(images().to(device))
        close(timm_lt.fold_head(model)(images().to(device)), expected)
        assert type(model.get_classifier()) is torch.nn.Linear
    photos(folder)
    run("fold", folder / "model", folder / "folded", "--head", "ncm")
    folded = timm.create_model(f"local-dir:{folder / 'folded'}", pretrained=True).eval()
    whole = timm_lt.create_model(f"local-dir:{folder / 'model'}", head="ncm").eval()
    assert folded(images()).argmax(1).equal(whole(images()).argmax(1))


def check_evaluate(_, folder):
    """The accuracy of each head on a folder."""
    root, model = photos(folder)
    found = json.loads(run("evaluate", model, root, "--json", "--workers", 0))["heads"]
    assert "ncm" in found
    for name, figures in found.items():
        right = [int(row.argmax()) == label for row, label in on_cpu(folder, name).values()]
        assert abs(figures["all"] - sum(right) / len(right)) < 1e-6


def check_predict(_, folder):
    """The probabilities of each image."""
    root, model = photos(folder)
    shown = run("predict", model, root, "--head", "ncm", "--format", "json", "--workers", 0)
    expected = on_cpu(folder, "ncm")
    assert len(json.loads(shown)) == len(expected)
    for entry in json.loads(shown):
        share = expected[entry["image"]][0].softmax(0).max()
        assert abs(entry["classes"][0]["probability"] - share.item()) < 1e-3


def check_loader(device, folder):
    """Batches, drawn by a sampler, are on the device that accelerate computes on."""
    assert default_device().type == device
    dataset = timm.data.ImageDataset(str(photos(folder)[0]))
    sampler = timm_lt.create_sampler("class_balanced", timm_lt.dataset_labels(dataset))
    training = {"is_training": True, "re_prob": 0.5, "sampler": sampler}
    pinned = {"pin_memory": device == "cuda", "num_workers": int(device == "cuda")}
    for options in ({"num_workers": 0}, {"num_workers": 0} | training, training | pinned):
        loader = timm_lt.create_loader(dataset, (3, 32, 32), 4, **options)
        for shown, labels in loader:
            assert shown.device.type == labels.device.type == device
    here, there = (timm_lt.create_sampler("reversed", TARGETS.to(d)) for d in ("cpu", device))
    assert list(here) == list(there)


def check_resume(device, folder):
    """Training with an EMA, clipped gradients and validation, in one session and in two."""
    pixels = (images() * 64 + 128).clamp(0, 255).byte()
    data = ImageTensors(pixels, TARGETS, mean=(0.5,) * 3, std=(0.5,) * 3)
    optimizer = {"opt": "sgd", "lr": 0.1, "momentum": 0.9}

    class Stops(TrainingState):
        def save(self, history, **kwargs):
            super().save(history, **kwargs)
            raise InterruptedError

    def train(kind=None):
        with fresh_accelerate():
            accelerator = create_accelerator(mixed_precision="no")
            assert accelerator.device.type == device
            options = {"ema": {"decay": 0.5}, "clip_grad": 1.0, "keep": "last"}
            return train_representation(
                small_model(),
                data,
                timm_lt.create_sampler("class_balanced", TARGETS),
                timm_lt.create_loss("balanced_softmax", class_counts=COUNTS),
                TrainingOptions(epochs=2, batch_size=4, optimizer=optimizer, **options),
                accelerator=accelerator,
                val=data,
                class_counts=COUNTS,
                state=None if kind is None else kind(folder / "state", accelerator),
            ).model

    whole = train()
    if device == "sim":
        # Its tensors have no storage that can be saved.
        assert all(value.isfinite().all() for value in whole.state_dict().values())
        return
    with contextlib.suppress(InterruptedError):
        train(Stops)
    resumed = train(TrainingState).state_dict()
    torch.testing.assert_close(resumed, whole.state_dict(), rtol=1e-3, atol=1e-4)


def check_run_fp16(_, folder, precision="fp16"):
    """The main job over two epochs."""
    options = ["--epochs", "2", "--mixed_precision", precision, "--quiet"]
    assert train_main([str(DIGITS), *options, "--output", str(folder / "run")]) == 0
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["mixed_precision"] == precision
    assert all(0.2 < head["all"] <= 1 for head in metrics["heads"].values())


def check_run_bf16(device, folder):
    """The main job over two epochs."""
    check_run_fp16(device, folder, "bf16")


def check_losses(device, _):
    """Values and gradients of losses, and figures of logits."""
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    for name in timm_lt.list_losses():
        results = []
        for place in ("cpu", device):
            loss = timm_lt.create_loss(name, class_counts=COUNTS.to(place)).to(place)
            loss.set_epoch(2, 3)
            given = logits.detach().to(place).requires_grad_()
            extra = {"features": given} if name in NEED_FEATURES else {}
            value = loss(given, TARGETS.to(place), **extra)
            value.backward()
            results.append((value.detach(), given.grad))
        for found, expected in zip(*results, strict=True):
            close(found, expected)
    there, targets, counts = (tensor.to(device) for tensor in (logits, TARGETS, COUNTS))
    expected = timm_lt.evaluate_logits(logits, TARGETS, COUNTS)
    assert timm_lt.evaluate_logits(there, targets, counts).to_dict() == expected.to_dict()
    report = timm_lt.shot_accuracy(there.argmax(1), targets, counts)
    assert report.all == expected.all
    low, high = timm_lt.confidence_intervals(report, counts)["all"]
    assert low <= report.all <= high
    pair = timm_lt.paired_difference(there.argmax(1), there.argmin(1), targets, counts)
    assert pair == timm_lt.paired_difference(logits.argmax(1), logits.argmin(1), TARGETS, COUNTS)


CHECKS = [name.removeprefix("check_") for name in globals() if name.startswith("check_")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check, tmp_path):
    subprocess.run([sys.executable, __file__, check, "cuda", tmp_path], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("check", [name for name in CHECKS if not name.startswith("run_")])
def test_on_a_simulated_device(check, server, tmp_path):
    """An operation that mixes the device with the CPU fails there."""
    done = server.run(check, "sim", tmp_path, script=Path(__file__))
    assert done.status == 0, done.err


if __name__ == "__main__":
    name, device, folder = sys.argv[1:]
    simulated = contextlib.nullcontext()
    if device == "sim":
        from simulated_device import Simulation

        simulated = Simulation()
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ["ACCELERATE_TORCH_DEVICE"] = device
    with simulated:
        globals()[f"check_{name}"](device, Path(folder))
