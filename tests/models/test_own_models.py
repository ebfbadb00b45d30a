"""Heads and figures of models as their users have them: files of weights, other image sizes."""

import json

import pytest
import timm
import torch

import timm_lt
from timm_lt.cli import main
from timm_lt.data import create_dataset

MODEL = "lt_test_resnet.glyph_lt"
COUNTS = {"a": 40, "b": 24, "c": 12, "d": 10}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of glyphs without splits."""
    root = tmp_path_factory.mktemp("own") / "photos"
    dataset = create_dataset("glyph_lt", split="train")
    labels = torch.tensor(dataset["label"])
    for label, (name, count) in enumerate(COUNTS.items()):
        (root / name).mkdir(parents=True)
        for row in torch.nonzero(labels == label).flatten()[:count].tolist():
            dataset[row]["image"].save(root / name / f"{row}.png")
    return root


def heads(photos, folder, *more):
    """Runs the command; returns what it wrote into metrics.json."""
    given = ["heads", str(photos), "--output", str(folder), "--workers", "0"]
    assert main([*given, *map(str, more)]) == 0
    return json.loads((folder / "metrics.json").read_text())


def evaluated(capsys, *arguments):
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--workers", "0", "--json"]) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out), shown.err


def test_evaluate_takes_the_image_size_and_the_split_of_the_run(photos, tmp_path, capsys):
    run = tmp_path / "run"
    options = ("--option", "test_fraction=0.4", "--option", "seed=3", "--image-size", 40)
    metrics = heads(photos, run, "--model", MODEL, "--heads", "ncm", *options)
    model = timm_lt.create_model(f"local-dir:{run}", head="ncm")
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 40, 40)
    found, log = evaluated(capsys, run, photos)
    assert found["heads"] == {name: metrics["heads"][name] for name in found["heads"]}
    assert "fitted on" not in log
    _, log = evaluated(capsys, run, photos, "--option", "seed=4")
    assert "(test_fraction=0.4, seed=3); it may have been fitted on images that are" in log


def weights(classes, seed=0):
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=classes).state_dict()


@pytest.mark.parametrize(
    ("classes", "more"),
    [(4, ()), (4, ("--fresh-classifier",)), (10, ()), (0, ())],
)
def test_the_classifier_of_a_file_is_taken_if_it_is_for_these_classes(
    classes, more, photos, tmp_path
):
    own, file = weights(classes), tmp_path / "mine.pth"
    torch.save(own, file)
    given = ("--model", "test_resnet", "--checkpoint", file, "--image-size", 32)
    heads(photos, tmp_path / "run", *given, "--heads", "ncm", *more)
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    written = model.state_dict()
    assert model.num_classes == 4
    same = classes == 4 and not more
    for key, value in own.items():
        if not key.startswith("fc.") or same:
            assert written[key].equal(value), key
    if classes == 4:
        assert written["fc.weight"].equal(own["fc.weight"]) is same
