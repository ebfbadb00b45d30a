"""The training loop against a hand-written one, over processes, and across a restart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

import timm_lt
import train_lt
from timm_lt.accelerator import create_accelerator, native_precision, set_cpu_threads
from timm_lt.data.images import ImageTensors
from timm_lt.training import (
    TrainingState,
    check_batch_size,
    check_optimization,
    train_representation,
)

ROOT = Path(train_lt.__file__).parent
NUM_IMAGES, NUM_CLASSES, SIDE = 40, 4, 6


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield create_accelerator(mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)


def images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (NUM_IMAGES, 3, SIDE, SIDE), generator=generator)
    labels = torch.arange(NUM_IMAGES) % NUM_CLASSES
    pixels[:, 0] = pixels[:, 0] // 2 + 32 * labels[:, None, None]
    return ImageTensors(pixels.to(torch.uint8), labels)


def linear_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, NUM_CLASSES))


def train(accelerator, model, epochs=3, batch_size=8, state=None, **options):
    data = images()
    return train_representation(
        model,
        data,
        timm_lt.create_sampler("instance_balanced", data.labels, seed=0),
        timm_lt.create_loss("cross_entropy"),
        accelerator=accelerator,
        epochs=epochs,
        batch_size=batch_size,
        optimizer={"opt": "sgd", "lr": 0.01, "weight_decay": 0.1, "momentum": 0.9},
        scheduler=options.pop("scheduler", {"sched": "cosine"}),
        state=state,
        **options,
    )


def test_follows_a_hand_written_nesterov_loop(accelerator):
    model = linear_model()
    weight, bias = (p.detach().double().clone() for p in model[1].parameters())
    data = images()
    history = train(accelerator, model, epochs=3, batch_size=8, scheduler={"sched": "constant"})

    x = ((data.images.double() / 255 - 0.5) / 0.25).flatten(1)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    sampler = timm_lt.create_sampler("instance_balanced", data.labels, seed=0)
    losses = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        epoch_losses = []
        for start in range(0, NUM_IMAGES, 8):
            rows = order[start : start + 8]
            p = torch.softmax(x[rows] @ weight.T + bias, dim=1)
            targets = data.labels[rows]
            epoch_losses.append(-p[range(8), targets].log().mean())
            p[range(8), targets] -= 1
            # Weight decay is on the weight and not on the bias.
            gradients = [p.T @ x[rows] / 8 + 0.1 * weight, p.mean(0)]
            for k in range(2):
                velocity[k] = 0.9 * velocity[k] + gradients[k]
            weight -= 0.01 * (gradients[0] + 0.9 * velocity[0])
            bias -= 0.01 * (gradients[1] + 0.9 * velocity[1])
        losses.append(torch.stack(epoch_losses).mean().item())
    assert [record.loss for record in history] == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(model[1].weight.double(), weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model[1].bias.double(), bias, atol=1e-5, rtol=1e-4)


def test_cosine_goes_to_zero_per_update(accelerator):
    history = train(accelerator, linear_model(), epochs=4)
    rates = torch.tensor([record.lr for record in history])
    # The last update of epoch e (1-based, 5 updates each) has the rate of update 5 e - 1.
    expected = 0.005 * (1 + torch.cos(torch.pi * (5 * torch.arange(1, 5) - 1) / 20))
    torch.testing.assert_close(rates, expected)


def test_resumes_to_the_same_bits(accelerator, tmp_path):
    whole = linear_model()
    history = train(accelerator, whole, epochs=4)

    class StopError(Exception):
        pass

    class StopsAfterTwo(TrainingState):
        def save(self, history):
            super().save(history)
            if len(history) == 2:
                raise StopError

    def state(cls):
        AcceleratorState._reset_state(reset_partial_state=True)
        return cls(tmp_path, create_accelerator(mixed_precision="no"))

    interrupted = state(StopsAfterTwo)
    with pytest.raises(StopError):
        train(interrupted.accelerator, linear_model(), epochs=4, state=interrupted)
    # A write that was cut off leaves another name, which is not taken for a state.
    (tmp_path / ".partial_0003").mkdir()
    (tmp_path / ".partial_0003" / "model.safetensors").write_bytes(b"cut off")
    resumed, model = state(TrainingState), linear_model()
    with torch.no_grad():
        model[1].weight.fill_(7.0)
    after = train(resumed.accelerator, model, epochs=4, state=resumed)
    assert torch.equal(model[1].weight, whole[1].weight)
    assert torch.equal(model[1].bias, whole[1].bias)
    assert [record.loss for record in after] == [record.loss for record in history]
    assert resumed.saved_epochs() == [4]


def test_a_damaged_state_is_named(accelerator, tmp_path):
    state = TrainingState(tmp_path, accelerator)
    train(accelerator, linear_model(), epochs=2, state=state)
    (tmp_path / "epoch_0002" / "model.safetensors").write_bytes(b"no tensors")
    AcceleratorState._reset_state(reset_partial_state=True)
    state = TrainingState(tmp_path, create_accelerator(mixed_precision="no"))
    with pytest.raises(timm_lt.UsageError, match=r"epoch_0002 is damaged.*--overwrite"):
        train(state.accelerator, linear_model(), epochs=2, state=state)


def test_validation_is_counted_and_changes_nothing(accelerator):
    with_val, without = linear_model(), linear_model()
    counts = torch.tensor([200, 200, 50, 5])
    history = train(accelerator, with_val, val=images(), class_counts=counts)
    train(accelerator, without)
    assert torch.equal(with_val[1].weight, without[1].weight)
    data = images()
    with torch.inference_mode():
        x = (data.images.float() / 255 - 0.5) / 0.25
        right = (with_val(x).argmax(1) == data.labels).double()
    assert history[-1].val["all"] == pytest.approx(right.mean().item())
    few = right[data.labels == 3].mean().item()
    assert history[-1].val["few_shot"] == pytest.approx(few)


def test_a_loss_that_is_not_finite_stops_the_run(accelerator):
    model = linear_model()
    with torch.no_grad():
        model[1].weight.fill_(float("inf"))
    with pytest.raises(timm_lt.UsageError, match=r"loss became nan in epoch 1.*optimizer\.lr"):
        train(accelerator, model)


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "match"),
    [
        ({"opt": "sdg", "lr": 0.1}, {}, "did you mean 'sgd"),
        ({"opt": "sgd", "lr": 0.0}, {}, r"lr must be a number in \(0, inf\)"),
        ({"opt": "sgd", "lr": 0.1, "weight_decay": -1}, {}, "weight_decay"),
        ({"opt": "sgd", "lr": 0.1, "momentum": 1.0}, {}, "momentum"),
        ({"opt": "sgd", "lr": 0.1, "nesterof": True}, {}, "nesterof"),
        ({"opt": "sgd", "lr": 0.1}, {"sched": "cosin"}, "did you mean 'cosine'"),
        ({"opt": "sgd", "lr": 0.1}, {"warmup_epochs": 9}, r"\[0, 5\]"),
        ({"opt": "sgd", "lr": 0.1}, {"warmup": 1}, "warmup"),
    ],
)
def test_wrong_optimisation_is_named(optimizer, scheduler, match):
    with pytest.raises(timm_lt.UsageError, match=match):
        check_optimization(optimizer, scheduler, epochs=5)


def test_wrong_batch_sizes_are_named():
    check_batch_size(8, 8, 2)
    with pytest.raises(timm_lt.UsageError, match="exceeds the 7 images"):
        check_batch_size(8, 7, 1)
    with pytest.raises(timm_lt.UsageError, match="multiple of their number, 3"):
        check_batch_size(8, 80, 3)


def test_threads(monkeypatch):
    before = torch.get_num_threads()
    try:
        assert set_cpu_threads(2) == torch.get_num_threads() == 2
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        assert set_cpu_threads() == 2
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
        assert set_cpu_threads() == 1
        with pytest.raises(timm_lt.UsageError, match="threads"):
            set_cpu_threads(0)
    finally:
        torch.set_num_threads(before)


def test_auto_precision_is_one_that_this_machine_computes():
    assert native_precision() in ("no", "bf16")


RANKS = """
import json, sys
import torch
sys.path.insert(0, {tests!r})
from test_training import NUM_IMAGES, images, linear_model, train
from timm_lt.data.images import ImageTensors, batches
from timm_lt.features import extract_features
from timm_lt.accelerator import create_accelerator

seen = []
take = ImageTensors.__getitems__
def noting(self, indices):
    seen.append([self.epoch, *indices])
    return take(self, indices)
ImageTensors.__getitems__ = noting

accelerator = create_accelerator(mixed_precision="no")
model = linear_model()
history = train(accelerator, model, epochs=2)
training = list(seen)
model = accelerator.unwrap_model(model)
model.get_classifier = lambda: model[1]
# A last batch of 40 - 3 * 12 = 4 images, padded among the ranks and cut again.
loader = accelerator.prepare_data_loader(batches(images(), 12))
features = extract_features(model, loader, accelerator=accelerator)
result = dict(
    num_processes=accelerator.num_processes,
    losses=[record.loss for record in history],
    weight=model[1].weight.tolist(),
    seen=training,
    targets=features.targets.tolist(),
    features=features.values.tolist(),
)
name = f"{{accelerator.num_processes}}_{{accelerator.process_index}}.json"
with open("{folder}/" + name, "w") as file:
    json.dump(result, file)
accelerator.wait_for_everyone()
accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_are_one_training_run(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
    }
    for processes in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        subprocess.run(
            [sys.executable, *launch, str(script)], env=environment, cwd=tmp_path, check=True
        )
    one = json.loads((tmp_path / "1_0.json").read_text())
    ranks = [json.loads((tmp_path / f"2_{rank}.json").read_text()) for rank in (0, 1)]
    assert one["num_processes"] == 1
    assert [rank["num_processes"] for rank in ranks] == [2, 2]
    # Each global batch is the same images, half of them on each rank; none is seen twice.
    for alone, first, second in zip(one["seen"], *(rank["seen"] for rank in ranks), strict=True):
        assert alone[0] == first[0] == second[0]
        assert len(first) == len(second) == 1 + 4
        assert sorted(first[1:] + second[1:]) == sorted(alone[1:])
    for rank in ranks:
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-5)
        torch.testing.assert_close(
            torch.tensor(rank["weight"]), torch.tensor(one["weight"]), atol=1e-6, rtol=1e-5
        )
        assert rank["targets"] == images().labels.tolist() == one["targets"]
        torch.testing.assert_close(
            torch.tensor(rank["features"]), torch.tensor(one["features"]), atol=1e-6, rtol=0
        )
