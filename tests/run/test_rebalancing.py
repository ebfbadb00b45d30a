"""``timm_lt.rebalance``: what it takes, what it says of where weights and data are from."""

import json

import datasets
import pytest
import timm
import torch
import yaml
from PIL import Image
from torchvision.datasets import ImageFolder

import timm_lt
from timm_lt.checkpoint import background_of, read_checkpoint
from timm_lt.cli import main
from timm_lt.run.parse import load_recipe

COLOURS = {"blue": (10, 20, 200), "green": (20, 180, 30), "red": (220, 20, 10)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of coloured images, without directories for the splits."""
    root = tmp_path_factory.mktemp("rebalance") / "photos"
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for number in range(12):
            shade = tuple(min(255, value + 3 * number) for value in colour)
            Image.new("RGB", (32, 32), shade).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("lt_test_resnet", num_classes=3)


@pytest.fixture(scope="module")
def found(photos, tmp_path_factory):
    """A model with a tag, though its weights are drawn, on torchvision's folder."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet.r160_in1k", num_classes=3)
    assert model.pretrained_cfg["tag"] == "r160_in1k"
    output = tmp_path_factory.mktemp("out") / "run"
    result = timm_lt.rebalance(model, ImageFolder(photos), heads="ncm", output=output, workers=0)
    assert model.pretrained_cfg["tag"] == "r160_in1k"
    return result


def test_what_is_written_says_that_it_was_given_in_python(found):
    assert repr(found) == f"Rebalanced(head={found.head!r}, folder={found.folder!r})"
    assert list(found.heads) == ["linear", "ncm"]
    assert found.report == found.folder / "report.html"
    recipe = load_recipe(found.folder / "recipe.yaml")
    assert not recipe.model.pretrained
    assert (recipe.model.name, recipe.model.checkpoint) == (
        "test_resnet",
        "a model given in Python",
    )
    assert (recipe.data.name, recipe.data.root) == ("data given in Python", None)
    card = (found.folder / "README.md").read_text(encoding="utf-8")
    assert (
        "timm's `test_resnet` with the weights of a model given in Python as they were; its "
        "classifiers were made for data given in Python, with 3 classes." in card
    )
    assert "datasets" not in yaml.safe_load(card.split("---")[1])
    config = json.loads((found.folder / "config.json").read_text())
    assert config["timm_lt"]["dataset"] == "data given in Python"
    for file in ("recipe.yaml", "README.md", "config.json", "report.html"):
        text = (found.folder / file).read_text(encoding="utf-8")
        assert "r160_in1k" not in text
    assert not {"tag", "license", "origin_url"} & set(config["pretrained_cfg"])


def test_such_a_recipe_is_not_run_again_but_its_checkpoint_is_used(found, photos, tmp_path, capsys):
    written = str(found.folder / "recipe.yaml")
    assert main(["train", written, "--output", str(tmp_path / "run")]) == 2
    assert "unknown data set 'data given in Python'" in capsys.readouterr().err
    own = ["--data.name", "folder", "--data.root", str(photos), "--workers", "0"]
    assert main(["train", written, *own, "--output", str(tmp_path / "run")]) == 2
    assert "a model given in Python cannot be read as weights" in capsys.readouterr().err
    assert main(["evaluate", str(found.folder), str(photos), "--json", "--workers", "0"]) == 0
    reports = json.loads(capsys.readouterr().out)["heads"]
    assert {name: report["all"] for name, report in reports.items() if name != "auto"} == {
        name: report.all for name, report in found.reports.items()
    }


def test_a_folder_of_the_library_datasets_and_one_data_set_have_a_part_held_out(
    photos, model, tmp_path
):
    both = datasets.load_dataset("imagefolder", data_dir=str(photos), cache_dir=str(tmp_path))
    assert list(both) == ["train"]
    results = [
        timm_lt.rebalance(model, data, heads="ncm", workers=0)
        for data in (both, both["train"], photos)
    ]
    # Of the same files the same are held out, a fifth of twelve of each class.
    expected = {name: report.to_dict() for name, report in results[-1].reports.items()}
    for result in results:
        assert result.folder is result.report is None
        assert result.reports["ncm"].test_images.tolist() == [2, 2, 2]
        assert {name: report.to_dict() for name, report in result.reports.items()} == expected


def test_options_are_those_of_the_folder(photos, model, tmp_path):
    (photos / "red" / "notes.txt").touch()
    try:
        with pytest.raises(timm_lt.UsageError, match="with the data option other_files=skip"):
            timm_lt.rebalance(model, photos)
        skip = {"other_files": "skip", "test_fraction": 0.5}
        out = tmp_path / "run"
        timm_lt.rebalance(model, photos, options=skip, heads="ncm", workers=0, output=out)
    finally:
        (photos / "red" / "notes.txt").unlink()
    recipe = load_recipe(out / "recipe.yaml")
    assert (recipe.data.name, recipe.data.root) == ("folder", str(photos))
    assert recipe.data.options == skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["class_counts"] == [5, 5, 5]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "resnet50"}, "timm_lt.create_model(NAME, pretrained=True)"),
        ({"model": torch.nn.Linear(3, 3), "fresh_classifier": True}, "Linear has no classifier"),
        ({"dataset": None}, "a NoneType is not a data set"),
        ({"heads": "linear"}, "give a head besides linear"),
        ({"heads": "ctr"}, "did you mean 'crt'?"),
        ({"heads": 5}, "heads: 'int' object is not iterable"),
        ({"heads": {"crt": 5}}, "head 'crt' must be a mapping"),
        ({"options": {"min_image": 3}}, "did you mean 'min_images'?"),
        ({"options": {"root": "x"}}, "multiple values for keyword argument 'root'"),
        ({"options": {"min_images": 0}}, "min_images must be an integer >= 1"),
        ({"dataset": [], "options": {"min_images": 3}}, "options (min_images) only apply when"),
        ({"output": "PHOTOS/run"}, "where the next run would take it for a class"),
    ],
)
def test_a_mistake_says_what_is_right(changed, words, photos, model):
    given = {"model": model, "dataset": photos, **changed}
    if "output" in given:
        given["output"] = given["output"].replace("PHOTOS", str(photos))
    with pytest.raises(timm_lt.UsageError) as caught:
        timm_lt.rebalance(given.pop("model"), given.pop("dataset"), **given)
    assert words in str(caught.value)


def test_a_classifier_of_other_names_is_fitted_anew(photos, model, tmp_path):
    """As many classes are not the same classes."""
    named = timm_lt.create_model("lt_test_resnet", num_classes=3)
    named.load_state_dict(model.state_dict())
    named.pretrained_cfg["label_names"] = sorted(COLOURS)
    kept = timm_lt.rebalance(named, photos, heads="ncm", workers=0)
    assert torch.equal(kept.heads["linear"].weight, model.fc.weight)
    named.pretrained_cfg["label_names"] = ["ant", "bee", "cat"]
    fresh = timm_lt.rebalance(named, photos, heads="ncm", workers=0)
    assert not torch.equal(fresh.heads["linear"].weight, model.fc.weight)


@pytest.fixture
def icons(tmp_path):
    """Black shapes on nothing, which differ in their alpha alone."""
    for label, box in (("left", (0, 0, 12, 32)), ("right", (20, 0, 32, 32))):
        (tmp_path / "icons" / label).mkdir(parents=True)
        for number in range(12):
            icon = Image.new("RGBA", (32, 32))
            icon.paste((0, 0, 0, 255 - number), box)
            icon.save(tmp_path / "icons" / label / f"{number}.png")
    return tmp_path / "icons"


def test_icons_are_told_apart_on_white_and_the_background_is_recorded(icons, tmp_path, caplog):
    torch.manual_seed(0)
    model = timm.create_model("lt_test_resnet.glyph_lt", pretrained=True)
    found = timm_lt.rebalance(
        model, icons, heads="ncm", output=tmp_path / "white", cache_dir=tmp_path / "c", workers=0
    )
    assert found.reports["ncm"].all == 1
    config = json.loads((found.folder / "config.json").read_text())
    assert config["timm_lt"]["background"] == "#ffffff"
    # On black they are all the same; the features on white are not taken for those.
    arguments = {"heads": "ncm", "cache_dir": tmp_path / "c", "workers": 0, "background": "black"}
    found = timm_lt.rebalance(model, icons, output=tmp_path / "black", **arguments)
    assert found.reports["ncm"].all == 0.5
    assert read_checkpoint(found.folder).background == background_of(found.model) == "#000000"
    card = (found.folder / "README.md").read_text(encoding="utf-8")
    assert 'timm_lt.load_image("photo.jpg", background="#000000")' in card
    # A model that was loaded from there goes on with black.
    loaded = timm_lt.create_model(f"local-dir:{found.folder}")
    again = timm_lt.rebalance(loaded, icons, heads="ncm", output=tmp_path / "again", workers=0)
    assert read_checkpoint(again.folder).background == "#000000"


def test_huge_images_are_one_line(icons, model, monkeypatch, caplog):
    # Each of them would be a warning, and warnings are errors here.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    timm_lt.rebalance(model, icons, heads="ncm", fresh_classifier=True, workers=0)
    said = [record.getMessage().partition(" images have") for record in caplog.records]
    assert [number for number, huge, _ in said if huge] == [
        "16 of 16 train",
        "4 of 4 val",
        "4 of 4 test",
    ]
