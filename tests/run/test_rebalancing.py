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
NCM = {"heads": "ncm", "workers": 0}


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
    output = tmp_path_factory.mktemp("out") / "run"
    result = timm_lt.rebalance(model, ImageFolder(photos), output=output, **NCM)
    assert model.pretrained_cfg["tag"] == "r160_in1k"
    return result


def test_what_is_written_says_that_it_was_given_in_python(found):
    assert repr(found) == f"Rebalanced(head={found.head!r}, folder={found.folder!r})"
    assert list(found.heads) == ["linear", "ncm"]
    assert found.report == found.folder / "report.html"
    recipe = load_recipe(found.folder / "recipe.yaml")
    weights = (recipe.model.name, recipe.model.pretrained, recipe.model.checkpoint)
    assert weights == ("test_resnet", False, "a model given in Python")
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
        assert "r160_in1k" not in (found.folder / file).read_text(encoding="utf-8")
    assert not {"tag", "license", "origin_url"} & set(config["pretrained_cfg"])


def test_such_a_recipe_is_not_run_again_but_its_checkpoint_is_used(found, photos, tmp_path, capsys):
    again = ["train", str(found.folder / "recipe.yaml"), "--output", str(tmp_path / "run")]
    own = ["--data.name", "folder", "--data.root", str(photos), "--workers", "0"]
    for more, words in (
        ([], "unknown data set 'data given in Python'"),
        (own, "a model given in Python cannot be read as weights"),
    ):
        assert main([*again, *more]) == 2
        assert words in capsys.readouterr().err
    assert main(["evaluate", str(found.folder), str(photos), "--json", "--workers", "0"]) == 0
    reports = json.loads(capsys.readouterr().out)["heads"]
    assert {name: report["all"] for name, report in reports.items() if name != "auto"} == {
        name: report.all for name, report in found.reports.items()
    }


def test_of_the_same_files_the_same_are_held_out(photos, model, tmp_path):
    """A fifth of twelve of each class, from a folder or from a data set of the library."""
    both = datasets.load_dataset("imagefolder", data_dir=str(photos), cache_dir=str(tmp_path))
    figures = []
    for data in (both, both["train"], photos):
        result = timm_lt.rebalance(model, data, **NCM)
        assert result.folder is result.report is None
        assert result.reports["ncm"].test_images.tolist() == [2, 2, 2]
        figures.append({name: report.to_dict() for name, report in result.reports.items()})
    assert figures[0] == figures[1] == figures[2]


def test_options_are_those_of_the_folder(photos, model, tmp_path):
    notes, out = photos / "red" / "notes.txt", tmp_path / "run"
    notes.touch()
    skip = {"other_files": "skip", "test_fraction": 0.5}
    try:
        with pytest.raises(timm_lt.UsageError, match="with the data option other_files=skip"):
            timm_lt.rebalance(model, photos)
        timm_lt.rebalance(model, photos, options=skip, output=out, **NCM)
    finally:
        notes.unlink()
    data = load_recipe(out / "recipe.yaml").data
    assert (data.name, data.root, data.options) == ("folder", str(photos), skip)
    assert json.loads((out / "metrics.json").read_text())["class_counts"] == [5, 5, 5]


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
        ({"dataset": [], "options": {"min_images": 3}}, "options (min_images) only apply when"),
    ],
)
def test_a_mistake_says_what_is_right(changed, words, photos, model):
    given = {"model": model, "dataset": photos, **changed}
    with pytest.raises(timm_lt.UsageError) as caught:
        timm_lt.rebalance(**given)
    assert words in str(caught.value)


def test_a_classifier_of_other_names_is_fitted_anew(photos, model):
    """As many classes are not the same classes."""
    named = timm_lt.create_model("lt_test_resnet", num_classes=3)
    named.load_state_dict(model.state_dict())
    for names, kept in ((sorted(COLOURS), True), (["ant", "bee", "cat"], False)):
        named.pretrained_cfg["label_names"] = names
        linear = timm_lt.rebalance(named, photos, **NCM).heads["linear"]
        assert torch.equal(linear.weight, model.fc.weight) is kept


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


def test_icons_are_told_apart_on_white_and_the_background_is_recorded(icons, tmp_path):
    model = timm.create_model("lt_test_resnet.glyph_lt", pretrained=True)
    cached = {"cache_dir": tmp_path / "c", **NCM}
    found = timm_lt.rebalance(model, icons, output=tmp_path / "white", **cached)
    assert found.reports["ncm"].all == 1
    assert read_checkpoint(found.folder).background == "#ffffff"
    # On black they are all the same; the features on white are not taken for those.
    found = timm_lt.rebalance(model, icons, output=tmp_path / "x", background="black", **cached)
    assert found.reports["ncm"].all == 0.5
    assert read_checkpoint(found.folder).background == background_of(found.model) == "#000000"
    card = (found.folder / "README.md").read_text(encoding="utf-8")
    assert 'timm_lt.load_image("photo.jpg", background="#000000")' in card
    # A model that was loaded from there goes on with black.
    loaded = timm_lt.create_model(f"local-dir:{found.folder}")
    again = timm_lt.rebalance(loaded, icons, output=tmp_path / "again", **NCM)
    assert read_checkpoint(again.folder).background == "#000000"


def test_huge_images_are_one_line(icons, model, monkeypatch, caplog):
    # Each of them would be a warning, and warnings are errors here.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    timm_lt.rebalance(model, icons, fresh_classifier=True, **NCM)
    said = [record.getMessage().partition(" images have") for record in caplog.records]
    numbers = [number for number, huge, _ in said if huge]
    assert numbers == ["16 of 16 train", "4 of 4 val", "4 of 4 test"]
