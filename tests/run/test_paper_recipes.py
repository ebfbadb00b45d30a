"""Recipes of published results: the settings of the papers, and the first update of each.

The real data are not here. A source with as many classes, and images of the right size, stands in
for each; the recipe is otherwise as it is shipped, but for the batch, and that ResNets of 50 layers
or more leave out blocks between the first and the last.
"""

import dataclasses
import functools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import train_lt
from timm_lt.data import register_dataset
from timm_lt.data.sources import DATASETS, SELECTED_ON_TEST, check_protocol, dataset_from_files
from timm_lt.losses import create_loss
from timm_lt.models.pretrained import PUBLISHED
from timm_lt.run.parse import load_recipe, shipped_recipes
from timm_lt.run.recipe import LossRecipe, OptimizerRecipe, RunOptions, SchedulerRecipe
from timm_lt.run.setup import create_run
from timm_lt.training.parts import Schedule
from timm_lt.utils.checks import check_options
from timm_lt.utils.files import read_yaml

CATALOGUE = (Path(train_lt.__file__).parent / "hub_configs" / "README.md").read_text()
IMAGENET, PLACES, INAT = "imagenet_lt", "places_lt", "inat2018"
CLASSES = {IMAGENET: 1000, PLACES: 365, INAT: 8142, "cifar10_lt": 10, "cifar100_lt": 100}
SELECTED_BY_THE_PAPERS_ON_TEST = (INAT, "cifar10_lt", "cifar100_lt")
FILES = shipped_recipes()
DATA = {name: read_yaml(path)["data"]["name"] for name, path in FILES.items()}
RECIPES = [name for name, data in DATA.items() if data in CLASSES]
CIFAR = [name for name in RECIPES if DATA[name].startswith("cifar")]
LDAM = [name for name in CIFAR if name.endswith("_ldam")]
BBN = [name for name in RECIPES if name.startswith("lt_bbn_")]
OLTR = "lt_oltr_resnet10.imagenet_lt"
KANG = [name for name in RECIPES if name not in [*CIFAR, *BBN, OLTR]]
# Recipes that differ in some keys of these parts alone, or in all of a part.
FAMILIES = {
    IMAGENET: ([n for n in KANG if DATA[n] == IMAGENET], {"model": ["name"], "sampler": None}),
    INAT: ([n for n in KANG if DATA[n] == INAT], {"model": ["name"], "epochs": None}),
    "ldam": (LDAM, {"model": ["name"], "data": ["name", "options"]}),
    "bbn": ([n for n in CIFAR if n in BBN], {"model": ["name"], "data": ["name", "options"]}),
}


@functools.cache
def load(name):
    return load_recipe(FILES[name])


# What there is ------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_every_result():
    kang = {f"lt_resnet{depth}.imagenet_lt" for depth in (10, 50, 101, 152)}
    kang |= {f"lt_resnext{depth}.imagenet_lt" for depth in (50, 101, 152)}
    kang |= {f"lt_resnet{n}.inat2018{e}" for n in (50, 101, 152) for e in ("", "_e90")}
    kang |= {name for name in KANG if name.startswith("lt_resnext50.imagenet_lt_")}
    assert set(KANG) == kang | {"lt_resnet152.places_lt"}
    cifar = [f"cifar{c}_lt_if{factor}" for c in (10, 100) for factor in (10, 50, 100)]
    assert set(LDAM) == {f"lt_resnet32.{name}_ldam" for name in cifar}
    bbn = {"lt_bbn_resnet50.inat2018", "lt_bbn_resnet50.inat2018_e90"}
    assert set(BBN) == bbn | {f"lt_bbn_resnet32.{name}" for name in cifar}


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_says_what_is_quoted_and_where_the_paper_selected(name):
    lines = FILES[name].read_text().splitlines()
    header = " ".join(line[2:] for line in lines if line.startswith("# "))
    for words in ("Quoted, not measured here", "Estimated", "Differs from the paper", "bf16"):
        assert words in header
    (row,) = [line for line in CATALOGUE.splitlines() if line.startswith(f"| `{name}`")]
    # The same figures in three places: header, catalogue, and published block.
    quoted = header[header.index("Quoted") : header.index("Estimated")]
    for figure in re.findall(r"\d\d\.\d+", row.partition("|")[2].rpartition("|")[0]):
        assert figure in quoted
    # The data set itself permits the protocol, or not, and takes the recipe's options.
    data, recipe, paper = DATA[name], load(name), DATA[name] in SELECTED_BY_THE_PAPERS_ON_TEST
    assert recipe.protocol == ("paper" if paper else "standard")
    assert ("protocol: paper" in header) is paper
    check_protocol(data, recipe.protocol)
    assert (data in SELECTED_ON_TEST) is paper
    check_options(data, DATASETS[data], {"root": "FOLDER", **recipe.data.options})
    published = PUBLISHED[name].heads if name in PUBLISHED else {}
    for head, entry in published.items():
        if entry.quoted:
            groups = ("many_shot", "medium_shot", "few_shot", "all")
            figures = " / ".join(f"{100 * entry.quoted[group]:.1f}" for group in groups)
            assert f"{'joint' if head == 'linear' else head} {figures}" in header


# What the papers say ------------------------------------------------------------------------------

JITTER = [0.4, 0.4, 0.4, 0.0]
DECAYS_ALL = {"filter_bias_and_bn": False}
# Learning rate and weight decay, of the heads too; batch; epochs, those of crt, and color jitter.
# Places-LT starts from weights of ImageNet, whose layers move less.
KANG_SETTINGS = {
    "lt_resnext50.imagenet_lt": (0.2, 5e-4, 512, 90, 10, JITTER, {}),
    "lt_resnet152.places_lt": (0.1, 5e-4, 256, 30, 10, JITTER, {"layer_decay": 0.1}),
    "lt_resnet50.inat2018": (0.2, 1e-4, 512, 200, 30, None, {}),
    "lt_resnet50.inat2018_e90": (0.2, 1e-4, 512, 90, 30, None, {}),
}


@pytest.mark.parametrize(("name", "settings"), KANG_SETTINGS.items())
def test_settings_of_kang_et_al(name, settings):
    recipe = load(name)
    lr, decay, batch, epochs, crt_epochs, jitter, layers = settings
    assert recipe.optimizer == OptimizerRecipe("momentum", lr, decay, 0.9, DECAYS_ALL | layers)
    assert recipe.scheduler == SchedulerRecipe("cosine", 0)
    found = (recipe.epochs, recipe.batch_size, recipe.loss, recipe.shot_rule)
    assert found == (epochs, batch, LossRecipe(), "fb")
    images = {"stage": "images", "bn": "shift", "batch_size": batch, "lr": lr, "momentum": 0.9}
    images |= {"weight_decay": decay, "sampler": "class_balanced"}
    images |= {"sampler_options": {"samples_per_class": 4}}
    assert recipe.heads == {
        "linear": {},
        "crt": images | {"epochs": crt_epochs},
        "lws": images | {"epochs": 5},
        "tau_norm": {},
        "ncm": {"metric": "euclidean", "features": "centered_l2"},
    }
    options = {"scale": [0.08, 1.0], "hflip": 0.5, "color_jitter": jitter}
    assert (recipe.data.augmentation, recipe.data.augmentation_options) == ("timm", options)


def test_samplings_and_epochs_of_kang_et_al():
    """The four samplings are those of figure 1."""
    assert {load(name).sampler.name: load(name).sampler.options for name in KANG} == {
        "instance_balanced": {},
        "class_balanced": {"samples_per_class": 4},
        "square_root": {},
        "progressively_balanced": {"schedule": "t/(T-1)"},
    }
    for name in FAMILIES[INAT][0]:
        assert load(name).epochs == (90 if name.endswith("_e90") else 200)


@pytest.mark.parametrize("name", CIFAR)
def test_settings_of_ldam_and_bbn(name):
    recipe = load(name)
    ldam = name.endswith("_ldam")
    # timm's sgd has Nesterov momentum.
    kind, milestones = ("momentum", [160, 180]) if ldam else ("sgd", [120, 160])
    assert recipe.optimizer == OptimizerRecipe(kind, 0.1, 2e-4, 0.9, DECAYS_ALL)
    steps = {"decay_milestones": milestones, "decay_rate": 0.01}
    assert recipe.scheduler == SchedulerRecipe("multistep", 5, steps)
    # Of both streams of BBN, each 128 as in the paper.
    assert (recipe.epochs, recipe.batch_size, recipe.keep) == (200, 128 if ldam else 256, "best")
    assert recipe.model.name == f"lt_{'' if ldam else 'bbn_'}resnet32.{recipe.data.name}"
    assert recipe.sampler.name == ("instance_balanced" if ldam else "bilateral")
    assert (recipe.loss.name == "bilateral") is not ldam
    factor = int(re.search(r"_if(\d+)", name)[1])
    data = {"imbalance_factor": factor, "profile": "exponential", "seed": 0}
    assert recipe.data.options == data
    options = {"padding": 4, "border": "zero", "hflip": 0.5}
    assert (recipe.data.augmentation, recipe.data.augmentation_options) == ("crop", options)


@pytest.mark.parametrize(("epochs", "steps"), [(90, [60, 80]), (180, [120, 160])])
def test_settings_of_bbn_on_inaturalist(epochs, steps):
    recipe = load("lt_bbn_resnet50.inat2018" + ("_e90" if epochs == 90 else ""))
    assert dataclasses.replace(recipe.optimizer, options={}) == OptimizerRecipe("sgd", 0.05, 1e-4)
    multistep = {"decay_milestones": steps, "decay_rate": 0.1}
    assert recipe.scheduler == SchedulerRecipe("multistep", 0, multistep)
    found = (recipe.epochs, recipe.batch_size, recipe.sampler.name, recipe.loss)
    assert found == (epochs, 256, "bilateral", LossRecipe("bilateral", {"divisor": "code"}))
    assert PUBLISHED[recipe.model.name].mean == (0.485, 0.456, 0.406)


def test_settings_of_oltr():
    recipe = load(OLTR)
    assert dataclasses.replace(recipe.optimizer, options={}) == OptimizerRecipe("momentum", 0.1)
    assert (recipe.batch_size, recipe.epochs, recipe.shot_rule) == (128, 30, "oltr")
    step = {"decay_epochs": 10, "decay_rate": 0.1}
    assert recipe.scheduler == SchedulerRecipe("step", 0, step)
    fit = {"centroids": "learned", "epochs": 60, "lr": 0.1, "weight_decay": 5e-4}
    assert recipe.heads == {"linear": {}, "oltr": fit}
    # One rate for each ten epochs.
    found = rates(OLTR)
    assert found[[0, 8, 10, 18, 20, 29], 5] == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3])


@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_of_a_family_differ_in_nothing_else(family):
    names, may_differ = FAMILIES[family]
    first, *others = [dataclasses.asdict(load(name)) for name in names]
    assert len(others) >= 5
    for values in (first, *others):
        for part, keys in may_differ.items():
            values[part] = keys and {k: v for k, v in values[part].items() if k not in keys}
    assert all(other == first for other in others)


def ldam_by_hand(cosines, label, counts):
    """Cross-entropy at temperature 1 / 30, with 1/2 for the smallest class, as n^(-1/4)."""
    margin = 0.5 * (min(counts) / counts[label]) ** 0.25
    z = [30 * (c - margin * (j == label)) for j, c in enumerate(cosines)]
    return math.log(sum(math.exp(value) for value in z)) - z[label]


def test_ldam_has_margins_between_cosines_and_late_weights():
    recipe = load(LDAM[0])
    assert recipe.model.options == {"head": "cosine", "scale": 1.0}
    counts = [400, 60, 9, 2]
    cosines = [[0.9, -0.2, 0.1, 0.5], [0.3, 0.2, -0.7, 0.4]]
    labels = [0, 3]
    losses = [ldam_by_hand(z, y, counts) for z, y in zip(cosines, labels, strict=True)]
    raw = [(1 - 0.9999) / (1 - 0.9999 ** counts[y]) for y in labels]
    weighted = sum(w * loss for w, loss in zip(raw, losses, strict=True)) / sum(raw)
    loss = create_loss(recipe.loss.name, class_counts=counts, **recipe.loss.options)
    for epoch, expected in ((0, sum(losses) / 2), (159, sum(losses) / 2), (160, weighted)):
        loss.set_epoch(epoch, recipe.epochs)
        found = loss(torch.tensor(cosines), torch.tensor(labels)).item()
        assert found == pytest.approx(expected, rel=1e-4)


# The learning rate --------------------------------------------------------------------------------

UPDATES = 10


def rates(name):
    """The learning rate of every update (epochs, updates per epoch)."""
    recipe = load(name)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], recipe.optimizer.lr)
    options = recipe.scheduler.arguments("sched")
    schedule = Schedule(optimizer, options, epochs=recipe.epochs, updates_per_epoch=UPDATES)
    values = []
    for step in range(recipe.epochs * UPDATES):
        schedule.before_update(step)
        values.append(optimizer.param_groups[0]["lr"])
    return np.array(values).reshape(recipe.epochs, UPDATES)


@pytest.mark.parametrize("name", ["lt_resnext50.imagenet_lt", "lt_resnet50.inat2018"])
def test_the_cosine_passes_through_that_of_the_paper(name):
    found = rates(name)
    epochs = len(found)
    # The authors' code has one rate for each epoch, 1-based: the last is 0.
    of_epoch = [0.1 * (1 + math.cos(math.pi * epoch / epochs)) for epoch in range(epochs + 1)]
    np.testing.assert_allclose(found[:, 0], of_epoch[:-1], atol=1e-12)
    assert (found > np.array(of_epoch[1:])[:, None] - 1e-12).all()
    assert (np.diff(found.ravel()) < 0).all()


@pytest.mark.parametrize(("name", "first", "second"), [(LDAM[0], 160, 180), (BBN[0], 120, 160)])
def test_the_steps_are_those_of_the_paper(name, first, second):
    found = rates(name)
    for epoch in range(1, 201):
        if epoch <= 5:
            # A line to where the paper's stairs are at the end of the epoch.
            low, high = 0.1 * (epoch - 1) / 5, 0.1 * epoch / 5
            assert found[epoch - 1] == pytest.approx(np.linspace(low, high, 11)[:-1], abs=1e-5)
            continue
        rate = 0.1 * (0.01 if epoch > first else 1) * (0.01 if epoch > second else 1)
        # timm drops one update early.
        early = epoch in (first, second)
        assert found[epoch - 1, : -1 if early else None] == pytest.approx(rate, rel=1e-9)
        if early:
            assert found[epoch - 1, -1] == pytest.approx(rate * 0.01, rel=1e-9)


# The first update ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A source of any number of classes: noise, and a tail as long as its class 0 is large."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for side in (32, 256):
        for number in range(4):
            noise = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((side, side)).save(folder / f"{side}_{number}.png")

    @register_dataset("stand_in", selected_on_test="the papers")
    def source(*, root, classes, imbalance_factor=0, profile="", seed=0):
        side, tail = 32 if profile else 256, np.arange(classes)
        labels = {"train": np.concatenate([np.zeros(600, np.int64), tail]), "test": tail}
        labels |= {"val": tail} if side == 256 and classes != CLASSES[INAT] else {}
        names = [f"class {label}" for label in tail]
        return {
            split: dataset_from_files(
                [f"{folder}/{side}_{row % 4}.png" for row in range(len(values))], values, names
            )
            for split, values in labels.items()
        }

    yield str(folder)
    del DATASETS._parts["stand_in"], SELECTED_ON_TEST["stand_in"]


@pytest.fixture
def prepared(stand_in, tmp_path):
    """Returns a function: the run of a recipe with the stand-in, in batches of a few images."""
    runs = []

    def prepare(name):
        recipe = load(name)
        options = {"classes": CLASSES[recipe.data.name], **recipe.data.options}
        model, batch = recipe.model.options, 8 if name in CIFAR else 2
        if name not in CIFAR and "resnet10" not in re.split(r"[_.]", recipe.model.name):
            # Fewer blocks where there are many: the last keeps its name.
            model = model | {"layers": [1, 1, 1, 3]}
        sampling, own = recipe.sampler.options | {"num_samples": 3 * batch}, dataclasses.replace
        data = {"name": "stand_in", "root": stand_in, "options": options, "verify": False}
        recipe = own(
            recipe,
            data=own(recipe.data, **data),
            # Nothing can be downloaded.
            model=own(recipe.model, pretrained=False, options=model),
            sampler=own(recipe.sampler, options=sampling),
            batch_size=batch,
            mixed_precision="no",
            features=own(recipe.features, cache_dir=None),
        )
        options = RunOptions(threads=1, workers=0, quiet=True)
        runs.append(create_run(name, tmp_path / "run", recipe, options))
        return runs[-1]

    AcceleratorState._reset_state(reset_partial_state=True)
    yield prepare
    for run in runs:
        run.close()
    AcceleratorState._reset_state(reset_partial_state=True)


def is_trained(recipe, key):
    if recipe.model.options.get("head") == "cosine" and key in {"fc.bias", "fc.scale"}:
        return False
    parts = [*(recipe.model.trained or []), "fc"]
    return recipe.model.trained is None or any(key.startswith(f"{part}.") for part in parts)


# One of each family of data and method, on its smallest network.
SAMPLE = {
    *("lt_resnet10.imagenet_lt", "lt_resnet50.inat2018_e90"),
    *("lt_resnet32.cifar10_lt_if10_ldam", "lt_bbn_resnet32.cifar10_lt_if10"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if name in SAMPLE else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in RECIPES
    ],
)
def test_first_update(name, prepared):
    run = prepared(name)
    recipe, classes, trainer = run.recipe, CLASSES[DATA[name]], run.trainer
    with torch.device("meta"):
        whole = timm.create_model(load(name).model.name, num_classes=classes)
    # While LDAM trains, the classifier is a cosine head.
    state = {k: v for k, v in run.model.state_dict().items() if k != "fc.scale" or name not in LDAM}
    expected = {key: tensor.shape for key, tensor in whole.state_dict().items()}
    assert {key: tensor.shape for key, tensor in state.items()}.items() <= expected.items()
    trainer.loader.set_epoch(0)
    getattr(trainer.loss, "set_epoch", lambda *_: None)(0, recipe.epochs)
    images, targets = next(iter(trainer.loader))
    logits = run.model.train()(images)
    loss = trainer.loss(logits, targets)
    loss.backward()
    side = 32 if name in CIFAR else 224
    assert images.shape[1:] == (3, side, side)
    assert logits.shape == (len(targets), classes)
    if name in LDAM:
        pairs = zip(logits.tolist(), targets.tolist(), strict=True)
        losses = [ldam_by_hand(z, y, [601] + [1] * (classes - 1)) for z, y in pairs]
        assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    else:
        # In the first epoch, the rows of BBN's uniform stream alone count, as its α is 1.
        counted = slice(0, None, 2 if recipe.loss.name == "bilateral" else 1)
        log_p, labels = torch.log_softmax(logits[counted], 1), targets[counted]
        assert loss.item() == pytest.approx(-log_p[range(len(labels)), labels].mean().item())
    for key, parameter in run.model.named_parameters():
        assert (parameter.grad is not None) is is_trained(recipe, key), key
    # SGD by hand, after the warm-up: m = g + decay * w, and w - lr * m, with Nesterov m + 0.9 m.
    before = {parameter: parameter.detach().clone() for parameter in run.model.parameters()}
    trainer.schedule.before_update(6 * trainer.updates)
    trainer.optimizer.step()
    momentum = 1.9 if recipe.optimizer.name == "sgd" else 1.0
    for group in trainer.optimizer.param_groups:
        assert 0 < group["lr"] <= recipe.optimizer.lr
        for moved in (p for p in group["params"] if p.grad is not None):
            gradient = moved.grad + recipe.optimizer.weight_decay * before[moved]
            torch.testing.assert_close(moved, before[moved] - group["lr"] * momentum * gradient)
    assert run.splits.val_source == ("test" if recipe.protocol == "paper" else "val")
    assert set(run.head_trainers) == ({"crt", "lws"} if name in KANG else set())
    for head, plan in run.head_trainers.items():
        options = recipe.heads[head]
        assert (plan.options.bn, plan.batch_size) == ("shift", options["batch_size"])
        assert plan.updates == options["epochs"] * ((600 + classes) // options["batch_size"])
