"""One training run with 1, 2 and 4 CPU processes and the same global batch."""

import itertools
import json

import pytest
import torch

from timm_lt.losses import list_losses
from timm_lt.metrics import evaluate_logits, open_set_report

# What every rank runs: train in float64, note which draws it took and what they cost, and take the
# features of data sets of awkward sizes.
SCRIPT = """
import json
import sys
from functools import partial

import numpy as np
import timm
import torch
from losses_by_hand import BY_HAND, COUNTS
from timm.layers import GroupNorm
from torch import nn

import timm_lt
from timm_lt.utils.accelerator import create_accelerator
from timm_lt.models.networks import attach_attention
from timm_lt.data import create_augmentation
from timm_lt.data.images import ImageTensors, StoredImages
from timm_lt.data.sources import dataset_from_arrays
from timm_lt.training import TrainingOptions, train_head_on_images, train_representation
from timm_lt.training.parts import means_over_processes

N, C, SIDE = 42, 4, 32
arrays = np.random.default_rng(0).integers(0, 256, (N, SIDE, SIDE, 3), dtype=np.uint8)
labels = torch.arange(N) % C
labels[labels == 3] = (torch.arange(N)[labels == 3] > 30).long() * 3


class InFloat64(nn.Module):
    def __init__(self, name="test_vit", **options):
        super().__init__()
        torch.manual_seed(0)
        # A transformer: no batch normalisation, which depends on a process's share of the batch.
        options = options or {"img_size": SIDE}
        self.model = timm.create_model(name, num_classes=C, **options).double()

    def get_classifier(self):
        return self.model.get_classifier()

    def forward(self, images):
        return self.model(images.double())


class Bilateral(InFloat64):
    def __init__(self):
        super().__init__()
        options = {"base": "test_resnet", "norm_layer": "layernorm2d", "num_classes": C}
        self.model = timm.create_model("lt_bbn_resnet", **options).double()


# The losses of features as so many processes take them: each of its part of the batch.
class OfFeatures(nn.Module):
    needs_features = True

    def __init__(self, processes):
        super().__init__()
        self.processes = processes
        self.range = timm_lt.create_loss("range", weight=0.01, margin=9.0)
        self.lifted = timm_lt.create_loss("lifted_structure", weight=0.02)

    def forward(self, *batch):
        parts = list(zip(*(values.chunk(self.processes) for values in batch), strict=True))
        values = [loss(*part) for part in parts for loss in (self.range, self.lifted)]
        return sum(values) / len(parts)


# Of each loss of logits in the weights of a classifier, the mean over the processes.
def gradients():
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(24, 6, generator=generator, dtype=torch.float64)
    # A class is in some parts of the batch only, or in none.
    targets = torch.randint(4, (24,), generator=generator)
    size = len(inputs) // accelerator.num_processes
    share = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)
    by_weights, late = {"normalization": "weights"}, {"start": 0}
    names = ("inverse_frequency", "class_balanced", "class_balanced_focal")
    variants = [(name, options) for name, options, _ in BY_HAND]
    variants += [(name, by_weights) for name in names]
    variants += [("deferred_reweighting", late), ("bilateral", {})]
    variants += [("bilateral", {"loss": "deferred_reweighting", "loss_options": late})]
    found = {}
    for name, options in variants:
        weight = torch.linspace(-1, 1, 30, dtype=torch.float64).view(6, 5).requires_grad_()
        loss = timm_lt.create_loss(name, COUNTS, **options).double()
        loss.set_epoch(0, 10)
        with means_over_processes(loss):
            loss(inputs[share] @ weight, targets[share]).backward()
        found[f"{name} {options}"] = accelerator.reduce(weight.grad, "mean").flatten().tolist()
    return found


def in_memory(labels=labels):
    images = torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()[: len(labels)]
    return ImageTensors(images, labels, augmentation=create_augmentation("affine"), seed=5)


def decoded(labels=labels):
    rows = dataset_from_arrays(arrays[: len(labels)], labels.numpy(), [str(c) for c in range(N)])
    options = {"size": (SIDE, SIDE), "seed": 5, "workers": 1}
    options["preprocessing"] = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    augmentation = {"auto_augment": "rand-m9-mstd0.5", "scale": (0.5, 1.0)}
    return StoredImages(rows, labels, augmentation=augmentation, **options)


def with_attention():
    model = InFloat64("test_resnet", norm_layer=partial(GroupNorm, num_groups=4))
    attach_attention(model.model)
    nn.init.normal_(model.model.layer4.attention.output.weight, std=0.5)
    return model


def run(
    data, criterion=nn.CrossEntropyLoss(), sampler="class_balanced", given={}, network=InFloat64,
    epochs=3, **options,
):
    seen, losses = [], []

    class Noting(type(data)):
        def __getitems__(self, draws):
            seen.append(sorted(draws))
            return super().__getitems__(draws)

    noting = criterion.register_forward_hook(lambda *call: losses.append(call[-1].item()))
    if isinstance(data, ImageTensors):
        data.__class__ = Noting
    accelerator.free_memory()
    model, sampler = network(), timm_lt.create_sampler(sampler, data.labels, seed=3, **given)
    sgd = {"opt": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}
    options = TrainingOptions(epochs=epochs, batch_size=8, optimizer=sgd, **options)
    training = train_representation(
        model, data, sampler, criterion, options, accelerator=accelerator
    )
    noting.remove()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    epochs = [record.loss for record in training.history]
    return {"seen": seen, "losses": losses, "epochs": epochs, "norm": weights.norm().item()}


accelerator = create_accelerator(mixed_precision="no")
result = {"num_processes": accelerator.num_processes}
result["in_memory"] = run(in_memory())
result["decoded"] = run(decoded())
# Weights that differ, and their sum is over the images of all processes.
counts = timm_lt.class_counts(labels)
drw = timm_lt.create_loss("deferred_reweighting", counts, loss="focal", start=1)
given = {"start": 2, "second": "reversed"}
result["deferred"] = run(in_memory(), drw.double(), "deferred", given)
result["partly"] = run(in_memory(), trained=["model.blocks.5"])
result["attention"] = run(in_memory(), network=with_attention)
# Pairs that were torn apart would have other losses.
bbn = timm_lt.create_loss("bilateral")
given = {"num_samples": N}
result["bilateral"] = run(in_memory(), bbn, "bilateral", given, network=Bilateral)
result["gradients"] = gradients()
# One process does what several do: the losses of their parts, which pair no images of two.
result["of_features"] = {}
for processes in (2, 4) if accelerator.num_processes == 1 else (1,):
    options = {"given": {"samples_per_class": 2}, "epochs": 1}
    result["of_features"][processes] = run(in_memory(), OfFeatures(processes), **options)
accelerator.free_memory()
training = train_representation(
    timm.create_model("test_resnet", num_classes=C),
    in_memory(),
    timm_lt.create_sampler("instance_balanced", labels),
    timm_lt.create_loss("cross_entropy"),
    TrainingOptions(epochs=2, batch_size=8, ema={"decay": 0.5}),
    accelerator=accelerator,
    val=in_memory(),
)
state = training.model.state_dict()
result["batch_norm"] = [float(tensor.double().sum()) for tensor in state.values()]
options = {"accelerator": accelerator, "steps": 6, "batch_size": 8}
head = train_head_on_images("crt", InFloat64(), in_memory(), **options)
result["head"] = head.weight.flatten().tolist()
head = train_head_on_images("lws", training.model, in_memory(), bn="shift", **options)
moved = head.backbone_statistics.values()
result["moved"] = [float(tensor.double().sum()) for tensor in moved] + head.scale.tolist()
result["targets"] = []
for number in (1, 3, 8, 13, 42):
    for make in (in_memory, decoded):
        # Every image has a label of its own.
        loader = make(torch.arange(number)).eval_loader(8, accelerator)
        model = InFloat64().model.float()
        features = timm_lt.extract_features(model, loader, accelerator=accelerator)
        result["targets"].append(features.targets.tolist())
# In a cache: two views of every image, by one process's hand.
result["cached"], result["equal"] = [], []
folder = f"{sys.argv[1]}/cache_{accelerator.num_processes}"
for make in (in_memory, decoded):
    data, model = make(torch.arange(13)), InFloat64().model.float()
    options = {"accelerator": accelerator, "views": 2}
    there = [
        timm_lt.extract_features(model, data.views_loader(8, accelerator), **options, **more)
        for more in ({}, {"cache_dir": folder}, {"cache_dir": folder})
    ]
    result["equal"].append([there[0].values.equal(other.values) for other in there])
    result["cached"].append([there[1].targets.tolist(), there[1].values.norm(dim=1).tolist()])
# What one process cannot do, all say.
try:
    timm_lt.extract_features(model, data.eval_loader(8, accelerator), accelerator=accelerator,
                             cache_dir=__file__)
except timm_lt.utils.checks.UsageError as error:
    result["error"] = str(error)
# Every process counts the images that are its own, in batches of its own size.
generator = torch.Generator().manual_seed(1)
logits, classes = torch.randn(301, 7, generator=generator), torch.arange(301) % 6
share = slice(accelerator.process_index, None, accelerator.num_processes)
metrics = timm_lt.ShotMetrics([500, 200, 100, 60, 15, 3, 1])
for part in zip(logits[share].split(16), classes[share].split(16)):
    metrics.update(*part)
result["metrics"] = metrics.reduce(accelerator).compute().to_dict()
result["own_images"] = metrics.compute().test_images.sum().item()
# A loss whose mean is over all processes in training, taken by one of them alone.
if accelerator.is_main_process:
    given = {"loss": "class_balanced", "loss_options": {"normalization": "weights"}}
    timm_lt.fit_head("crt", timm_lt.Features(logits, classes), solver="sgd", steps=2, **given)
accelerator.wait_for_everyone()
# And fits that draw, in every process alike.
features, many = timm_lt.Features(logits, classes), [500, 200, 100, 60, 15, 3]
result["fitted"] = [
    timm_lt.fit_head(name, features, class_counts=many, steps=5, **more).weight.flatten().tolist()
    for name, more in (("oltr", {}), ("fslwf", {"episodes": 5}))
]
open_set = timm_lt.metrics.OpenSetMetrics(7, threshold=0.4)
open_set.update(logits[share], torch.where(classes == 5, -1, classes)[share])
result["open_set"] = open_set.reduce(accelerator).compute().to_dict()
with open(f"{sys.argv[1]}/{accelerator.num_processes}_{accelerator.process_index}.json", "w") as f:
    json.dump(result, f)
accelerator.wait_for_everyone()
accelerator.end_training()
"""


class Results(dict):
    """By number of processes, what each rank noted; they run when they are asked for."""

    def __init__(self, server, folder):
        self.server, self.folder = server, folder
        (folder / "ranks.py").write_text(SCRIPT)

    def __missing__(self, processes):
        for rank in self.server.on_ranks(processes, self.folder, script=self.folder / "ranks.py"):
            assert rank.status == 0, rank.err
        files = [self.folder / f"{processes}_{rank}.json" for rank in range(processes)]
        self[processes] = [json.loads(file.read_text()) for file in files]
        return self[processes]


@pytest.fixture(scope="module")
def results(server, tmp_path_factory):
    return Results(server, tmp_path_factory.mktemp("ranks"))


pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.exhaustive)])
def ranks(results, request):
    return results[request.param]


@pytest.fixture
def alone(results):
    return results[1][0]


@pytest.mark.parametrize("kind", ["in_memory", "deferred"])
def test_every_global_batch_is_the_same_images(ranks, alone, kind):
    processes, batches = len(ranks), alone[kind]["seen"]
    assert [rank["num_processes"] for rank in ranks] == [processes] * processes
    # 42 images in batches of 8, three times; each rank takes an equal share of every batch.
    assert len(batches) == 3 * 5
    for batch, *parts in zip(batches, *(rank[kind]["seen"] for rank in ranks), strict=True):
        assert [len(part) for part in parts] == [8 // processes] * processes
        assert sorted(itertools.chain(*parts)) == batch
        # Numbered draws: one image twice in a batch is two draws.
        assert len(set(batch)) == 8


def means_of(found):
    return [sum(losses) / len(losses) for losses in zip(*(r["losses"] for r in found), strict=True)]


@pytest.mark.parametrize(
    "kind", ["in_memory", "decoded", "partly", "deferred", "bilateral", "attention"]
)
def test_the_loss_curve_is_the_same(ranks, alone, kind):
    """In float64 and without batch normalisation the runs differ by rounding only.

    The augmentation is part of it: it would show if a draw's depended on its process.
    """
    found, alone = [rank[kind] for rank in ranks], alone[kind]
    means = means_of(found)
    assert means == pytest.approx(alone["losses"], abs=1e-9)
    epochs = [sum(means[first : first + 5]) / 5 for first in (0, 5, 10)]
    assert found[0]["epochs"] == pytest.approx(epochs, abs=1e-9)
    assert [rank["norm"] for rank in found] == pytest.approx([alone["norm"]] * len(ranks), rel=1e-9)
    # The runs are not trivially equal: the curve moves.
    assert max(means) - min(means) > 0.01


def test_every_loss_has_the_gradient_of_the_whole_batch(ranks, alone):
    others = {"range", "lifted_structure"}
    assert {name.split()[0] for name in alone["gradients"]} == set(list_losses()) - others
    for rank in ranks:
        for name, gradient in rank["gradients"].items():
            assert gradient == pytest.approx(alone["gradients"][name], rel=1e-6, abs=1e-9), name
            assert max(map(abs, gradient)) > 1e-3


def test_losses_of_features_are_those_of_the_parts_of_a_batch(ranks, alone):
    """Each process pairs the images that it takes, and the gradients are averaged."""
    found, parts = [rank["of_features"]["1"] for rank in ranks], alone["of_features"]
    expected = parts[str(len(ranks))]
    assert means_of(found) == pytest.approx(expected["losses"], abs=1e-9)
    for rank in found:
        assert rank["norm"] == pytest.approx(expected["norm"], rel=1e-9)
    # The parts matter.
    assert parts["2"]["losses"] != pytest.approx(parts["4"]["losses"], rel=0.01)


def test_every_image_is_evaluated_once_and_in_order(ranks, alone):
    expected = [list(range(number)) for number in (1, 3, 8, 13, 42) for _ in range(2)]
    for rank in (alone, *ranks):
        assert rank["targets"] == expected


def test_every_process_ends_with_the_same_model_and_heads(ranks, alone):
    for rank in ranks:
        # Averaged batch-norm statistics too, which each process takes of its own images.
        for key in ("batch_norm", "moved"):
            assert rank[key] == ranks[0][key]
        # Trained in float64 and returned in float32.
        assert rank["head"] == pytest.approx(alone["head"], abs=1e-6)
        for found, expected in zip(rank["fitted"], alone["fitted"], strict=True):
            assert found == pytest.approx(expected, rel=1e-6)
    assert ranks[0]["moved"] != pytest.approx(alone["moved"], rel=1e-6)


def test_features_in_a_cache_are_those_in_memory_whatever_the_processes(ranks, alone):
    for rank in (alone, *ranks):
        assert rank["equal"] == [[True] * 3] * 2
        for (targets, norms), (_, expected) in zip(rank["cached"], alone["cached"], strict=True):
            assert targets == [*range(13)] * 2
            assert norms == pytest.approx(expected, rel=1e-7)
            # The two views are not the same.
            assert norms[:13] != pytest.approx(norms[13:], rel=1e-6)
        assert "ranks.py cannot be written" in rank["error"]


def test_metrics_of_all_processes_are_those_of_one_to_the_last_bit(ranks):
    generator = torch.Generator().manual_seed(1)
    logits, classes = torch.randn(301, 7, generator=generator), torch.arange(301) % 6
    expected = evaluate_logits(logits, classes, [500, 200, 100, 60, 15, 3, 1]).to_dict()
    assert all(rank["metrics"] == expected for rank in ranks)
    assert sum(rank["own_images"] for rank in ranks) == 301
    assert 0 < expected["ece"] < 1
    expected = open_set_report(logits, torch.where(classes == 5, -1, classes), threshold=0.4)
    assert all(rank["open_set"] == expected.to_dict() for rank in ranks)
    assert 0 < expected.open < 1
