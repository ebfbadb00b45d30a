"""Weights whose classes are numbered otherwise than those of the data."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import timm.data
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torchvision.datasets import ImageFolder

import timm_lt
from timm_lt.cli import main
from timm_lt.data import Splits, create_splits
from timm_lt.data.sources import dataset_from_arrays
from timm_lt.run.network import class_orders, match_data
from timm_lt.run.recipe import ModelRecipe, Recipe
from timm_lt.utils.checks import UsageError

# 2 and 10 change places, and so do a and B.
COLOURS = {"1": (250, 0, 0), "10": (0, 250, 0), "2": (0, 0, 250), "B": (250, 250, 0), "a": (9,) * 3}
COUNTS = {"1": 10, "10": 12, "2": 8, "B": 9, "a": 9}
GIVEN = Recipe(model=ModelRecipe("x", pretrained=True), epochs=0)
TIMM, SORTED = ["1", "2", "10", "a", "B"], ["1", "10", "2", "B", "a"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("order") / "photos"
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(COUNTS[name]):
            shade = tuple(max(0, value - i) for value in colour)
            Image.new("RGB", (32, 32), shade).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def model(photos):
    """Builds a model that is right about every image, its classes in the order of timm or not."""

    @torch.no_grad()
    def build(names):
        torch.manual_seed(0)
        made = timm.create_model("test_resnet", num_classes=len(names)).eval()
        transform = timm.data.create_transform(**timm.data.resolve_data_config(model=made))
        images = []
        for name in names:
            with Image.open(photos / name / "3.png") as image:
                images.append(transform(image))
        features = made.forward_head(made.forward_features(torch.stack(images)), pre_logits=True)
        # The class of the nearest image.
        made.get_classifier().weight.copy_(2 * features)
        made.get_classifier().bias.copy_(-features.square().sum(dim=1))
        return made

    return build


def constant(label):
    made = timm.create_model("test_resnet", num_classes=5)
    with torch.no_grad():
        made.get_classifier().weight.zero_()
        made.get_classifier().bias.copy_(torch.eye(5)[label])
    return made


def saved(made, path, **more):
    torch.save({"state_dict": made.state_dict(), **more}, path)
    return str(path)


@pytest.fixture
def run(capsys):
    """Returns a function: arguments of timm-lt -> exit status, output, messages in one line."""

    def command(*arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, " ".join(captured.err.split())

    return command


def test_orders_are_those_of_timm_and_torchvision(photos):
    orders = class_orders(list(COLOURS))
    reader = timm.data.create_dataset("", str(photos)).reader
    assert orders["timm"] == sorted(reader.class_to_idx, key=reader.class_to_idx.get) == TIMM
    assert orders["sorted"] == ImageFolder(photos).classes == SORTED


@pytest.mark.parametrize("names", [TIMM, SORTED], ids=["timm", "sorted"])
def test_images_tell_the_order_of_weights(photos, model, names, caplog):
    splits = create_splits("folder", root=str(photos))
    with caplog.at_level("INFO", "timm_lt"):
        found, kept = match_data(GIVEN, splits, model(names), kept=True)
    assert (found.label_names, kept) == (names, True)
    order = "timm's natural order" if names == TIMM else "sorted order"
    assert f"numbered as in the weights, in {order}: of 25 training images" in caplog.text
    hits = (25, 0) if names == TIMM else (0, 25)
    assert f"{hits[0]} are right in timm's natural order (1, 2, 10, a, B)" in caplog.text
    assert f"{hits[1]} are right in sorted order (1, 10, 2, B, a)" in caplog.text


def test_commands_find_the_order_of_a_file(photos, model, tmp_path, run):
    weights = ("--checkpoint", saved(model(TIMM), tmp_path / "best.pth"), "--workers", "0")
    folder, table = tmp_path / "run", tmp_path / "classes.csv"
    given = ("--model", "test_resnet", *weights, "--heads", "ncm", "--output", folder)
    status, _, said = run("heads", photos, *given)
    assert (status, said.count("has no names for its 5 classes")) == (0, 1)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["heads"]["linear"]["all"] == 1
    # Without the images that are held out for test and val.
    assert (metrics["label_names"], metrics["class_counts"]) == (TIMM, [6, 5, 8, 6, 6])
    config = json.loads((folder / "config.json").read_text())
    assert config["timm_lt"]["label_names"] == TIMM
    # Names decide for the folder, whatever the order of the data.
    for evaluated, looks in ((["test_resnet", photos, *weights], True), ([folder, photos], False)):
        status, _, said = run("evaluate", *evaluated, "--per-class", table)
        assert (status, "training images" in said) == (0, looks)
        rows = list(csv.DictReader(table.read_text().splitlines()))
        assert [(row["name"], row["accuracy_linear"]) for row in rows] == [(n, "1.0") for n in TIMM]
    status, _, said = run("evaluate", folder, photos, "--class-order", "sorted")
    assert status == 2
    assert "has no class names, and" in said


@pytest.mark.parametrize("of_folder", [str, ImageFolder])
def test_rebalance_finds_the_order(photos, model, of_folder):
    made = model(TIMM)
    found = timm_lt.rebalance(made, of_folder(photos), heads="ncm", workers=0)
    assert found.reports["linear"].all == found.reports["ncm"].all == 1
    assert torch.equal(found.heads["linear"].weight, made.fc.weight)
    assert found.reports["ncm"].test_images.tolist() == [round(COUNTS[name] / 5) for name in TIMM]


def test_predict_takes_names_in_the_order_of_the_weights(photos, model, tmp_path, run):
    file = saved(model(TIMM), tmp_path / "best.pth")
    (tmp_path / "names.txt").write_text("\n".join(SORTED))
    images = [photos / name / "0.png" for name in TIMM]
    command = ("predict", "test_resnet", *images, "--checkpoint", file, "--json", "--top", "1")
    names, order = ("--names", tmp_path / "names.txt"), ("--class-order", "timm")
    for options, expected in ((names, SORTED), ((*names, *order), TIMM)):
        status, out, said = run(*command, *options)
        assert status == 0
        assert [entry["classes"][0]["name"] for entry in json.loads(out)] == expected
        advice = "if they number the classes as timm does, say --class-order timm"
        assert (advice in said) is (expected == SORTED)
    status, _, said = run(*command, *order)
    assert status == 2
    assert "--class-order is for the names of --names" in said


def test_names_of_the_model_decide(photos, model):
    order = ["a", "10", "2", "1", "B"]
    made = model(order)
    made.pretrained_cfg["label_names"] = order
    found = timm_lt.rebalance(made, photos, heads="ncm", workers=0)
    assert found.reports["linear"].all == 1
    assert torch.equal(found.heads["linear"].weight, made.fc.weight)
    for more in ({}, {"fresh_classifier": True}):
        with pytest.raises(UsageError, match="class order timm only applies to a classifier that"):
            timm_lt.rebalance(made, photos, class_order="timm", workers=0, **more)


@pytest.mark.parametrize("label", [1, 3])
def test_an_order_that_images_do_not_tell_is_asked_for(photos, label, tmp_path, caplog):
    """A model that always gives the same answer is right as often in both orders."""
    splits, made = create_splits("folder", root=str(photos)), constant(label)

    def order_of(model, splits=splits):
        recipe = dataclasses.replace(GIVEN, model=model)
        return match_data(recipe, splits, made, kept=True)[0].label_names

    message = "it is not clear in which order.*choose --class-order timm or --class-order sorted"
    with pytest.raises(UsageError, match=message):
        order_of(GIVEN.model)
    for order, names in (("timm", TIMM), ("sorted", SORTED)):
        assert order_of(ModelRecipe("x", True, class_order=order)) == names
    # Data in the order of timm keep it, and so does a file as timm's train.py leaves it.
    assert order_of(GIVEN.model, splits.in_order(TIMM)) == TIMM
    file = saved(made, tmp_path / "best.pth.tar", arch="test_resnet", epoch=3)
    assert order_of(ModelRecipe("test_resnet", checkpoint=file)) == TIMM
    assert caplog.text.count("numbered in timm's natural order, as timm's train.py does") == 2


def test_a_clear_difference_is_needed(photos, model):
    """By class: many images of one class that is right by chance do not outweigh the others."""
    splits = create_splits("folder", root=str(photos))
    half = model(TIMM)
    # "10" and "B" are taken for the classes that are in their places in the other order.
    with torch.no_grad():
        half.fc.weight[[1, 2]] = half.fc.weight[[2, 1]]
        half.fc.bias[[1, 2]] = half.fc.bias[[2, 1]]
    with pytest.raises(UsageError, match="it is not clear"):
        match_data(GIVEN, splits, half, kept=True)
    # Training goes on with the order of the data.
    trained = dataclasses.replace(GIVEN, epochs=1)
    found, _ = match_data(trained, splits, half, kept=True)
    assert found.label_names == splits.label_names


def test_a_large_class_does_not_outweigh_a_small_one():
    """The same answer for all images is that of the large class in one of the orders."""
    labels = np.repeat([0, 1, 2], [4, 70, 4])
    black = np.zeros((len(labels), 32, 32, 3), np.uint8)
    splits = Splits.from_datasets({"train": dataset_from_arrays(black, labels, ["1", "10", "2"])})
    with pytest.raises(UsageError, match="it is not clear in which order"):
        match_data(GIVEN, splits, constant(1), kept=True)


def test_where_the_orders_are_the_same_nothing_is_looked_at(photos, monkeypatch):
    plain = create_splits("folder", root=str(photos)).in_order(["B", "a", "10", "2", "1"])
    assert match_data(GIVEN, plain, torch.nn.Identity(), kept=True)[0].labels is plain.labels
    glyphs = Splits(plain.datasets, plain.labels, plain.class_counts, None)
    assert match_data(GIVEN, glyphs, torch.nn.Identity(), kept=True)[0].labels is glyphs.labels
    asked = dataclasses.replace(GIVEN, model=ModelRecipe("x", True, class_order="timm"))
    with pytest.raises(UsageError, match="to data that have"):
        match_data(asked, glyphs, torch.nn.Identity(), kept=True)


def test_splits_in_another_order_are_the_same_images(photos):
    splits = create_splits("folder", root=str(photos))
    order = ["a", "1", "10", "2", "B"]
    other = splits.in_order(order)
    counts = splits.class_counts.tolist()
    assert other.class_counts.tolist() == [counts[SORTED.index(name)] for name in order]
    for split, rows in splits.datasets.items():
        there = other.datasets[split]
        names = [rows.features["label"].names[label] for label in rows["label"]]
        assert [there.features["label"].names[label] for label in there["label"]] == names
        assert other.labels[split].tolist() == there["label"][:]
        for before, after in zip(rows, there, strict=True):
            assert before["image"].tobytes() == after["image"].tobytes()
