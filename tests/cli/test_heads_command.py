"""Heads for a model as it is: ``timm-lt heads``, ``evaluate``, ``predict`` and ``run``."""

import csv
import json
import shutil

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config

import timm_lt
from timm_lt.cli import main
from timm_lt.data import create_dataset

MODEL = "lt_test_resnet.glyph_lt"
# Training images of the classes; test has as many of each.
COUNTS, TESTED = {"a": 40, "b b": 30, "c": 12, "ü": 10, "e": 10}, 8


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of glyphs, with splits for training and test."""
    root = tmp_path_factory.mktemp("own") / "photos"
    for split, number in (("train", None), ("test", TESTED)):
        dataset = create_dataset("glyph_lt", split=split)
        labels = torch.tensor(dataset["label"])
        for label, (name, count) in enumerate(COUNTS.items()):
            folder = root / split / name
            folder.mkdir(parents=True)
            # Frequent classes of GlyphLT: there are enough images of each.
            for row in torch.nonzero(labels == label).flatten()[: number or count].tolist():
                dataset[row]["image"].save(folder / f"{row}.png")
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """The folder that ``timm-lt heads`` writes, and its output."""
    folder = tmp_path_factory.mktemp("heads") / "run"
    arguments = ["heads", str(photos), "--model", MODEL, "--output", str(folder), "--workers", "0"]
    assert main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def metrics(run):
    return json.loads((run / "metrics.json").read_text())


def shares(model, paths):
    """Softmax of a plain model for image files, with timm's transform, one image at a time."""
    transform = create_transform(**resolve_data_config(model=model))
    images = (transform(Image.open(path).convert("RGB"))[None] for path in paths)
    with torch.inference_mode():
        return torch.cat([model.eval()(image).softmax(1) for image in images])


def accuracy(model, photos):
    paths, labels = images_of_test(photos)
    return pytest.approx((shares(model, paths).argmax(1) == labels).float().mean().item())


def images_of_test(photos):
    """Test images with their labels; classes are sorted by name."""
    names = sorted(COUNTS)
    paths = [path for name in names for path in sorted((photos / "test" / name).iterdir())]
    return paths, torch.tensor([names.index(path.parent.name) for path in paths])


def test_figures_are_those_of_the_written_model(photos, run, metrics):
    """Plain timm, image by image, has the accuracy that the run found from its features."""
    model = timm.create_model(f"local-dir:{run}", pretrained=True)
    assert metrics["heads"]["linear"]["all"] == accuracy(model, photos)
    for head in ("crt", "tau_norm", "auto"):
        model = timm_lt.create_model(f"local-dir:{run}", head=head)
        assert metrics["heads"][head]["all"] == accuracy(model, photos)


def test_nothing_but_the_classifier_is_trained(run, metrics):
    whole = timm.create_model(MODEL, pretrained=True).state_dict()
    written = load_file(run / "model.safetensors")
    changed = {key for key in whole if not torch.equal(whole[key], written[key])}
    assert changed == {"fc.weight", "fc.bias"}
    assert metrics["kept_epoch"] == 0
    report = (run / "report.html").read_text(encoding="utf-8")
    assert 'id="training"' not in report
    assert "best on validation" in report
    assert report.count("<img ") > 4
    for name, count in zip(sorted(COUNTS), metrics["class_counts"], strict=True):
        assert count == pytest.approx(0.8 * COUNTS[name], abs=1)


def test_the_table_says_how_sure_and_which_head(photos, run, metrics, capsys):
    arguments = ["heads", str(photos), "--model", MODEL, "--output", str(run), "--resume"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    best = metrics["selection"]["auto"]["head"]
    assert f"Recommended: {best}" in shown
    report = timm_lt.ShotReport.from_dict(metrics["heads"]["crt"])
    low, high = timm_lt.confidence_intervals(report, metrics["class_counts"])["all"]
    assert f"{100 * low:.0f}-{100 * high:.0f}" in shown


def test_evaluate_finds_what_the_run_found(photos, run, metrics, tmp_path, capsys):
    figures, table = tmp_path / "figures.json", tmp_path / "classes.csv"
    arguments = ["evaluate", str(run), str(photos), "--json", str(figures), "--workers", "0"]
    assert main([*arguments, "--per-class", str(table)]) == 0
    found = json.loads(figures.read_text())
    assert found["heads"] == metrics["heads"]
    assert found["label_names"] == sorted(COUNTS)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["name"] for row in rows] == sorted(COUNTS)
    assert [int(row["test_images"]) for row in rows] == [TESTED] * len(COUNTS)
    assert "tau_norm" in capsys.readouterr().out


def test_evaluate_takes_heads_with_batch_norm_of_their_own(photos, run, tmp_path, capsys):
    model, two = timm_lt.create_model(f"local-dir:{run}"), tmp_path / "two"
    heads = {
        name: timm_lt.create_model(f"local-dir:{run}", head=name).get_classifier()
        for name in ("ncm", "crt")
    }
    state = model.state_dict().items()
    statistics = {key: 0.5 * value for key, value in state if key.endswith(("_mean", "_var"))}
    heads["crt"].backbone_statistics = statistics
    timm_lt.save_checkpoint(two, model, heads=heads, class_counts=[40, 30, 12, 10, 10])
    expected = {
        name: accuracy(timm_lt.create_model(f"local-dir:{two}", head=name), photos)
        for name in ("linear", "ncm", "crt")
    }
    # In any order: the backbone has its own statistics again after each head.
    for names in (("crt", "ncm", "linear"), ("linear", "crt", "ncm")):
        arguments = ["evaluate", str(two), str(photos), "--workers", "0", "--json"]
        assert main([*arguments, "--head", *names]) == 0
        found = json.loads(capsys.readouterr().out)["heads"]
        assert {name: part["all"] for name, part in found.items()} == expected


def test_evaluate_compares_the_names_of_classes(photos, run, metrics, tmp_path, capsys):
    # The same names in another order are those of the weights.
    config = json.loads((run / "config.json").read_text())
    shuffled = shutil.copytree(run, tmp_path / "shuffled")
    names = config["label_names"]
    config["label_names"] = [*names[1:], names[0]]
    (shuffled / "config.json").write_text(json.dumps(config))
    command = ["evaluate", str(shuffled), str(photos), "--workers", "0", "--head", "ncm", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["label_names"] == config["label_names"]
    # The logits are the same, and the labels are those of other classes.
    assert found["heads"]["ncm"]["all"] < 0.3 < metrics["heads"]["ncm"]["all"]
    config["label_names"] = [*names[:-1], "ue"]
    (shuffled / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", str(shuffled), str(photos), "--workers", "0", "--head", "ncm"]) == 0
    assert "class 4 is 'ue' in " in capsys.readouterr().err


def test_predict_has_the_models_probabilities(photos, run, tmp_path, capsys):
    paths, _ = images_of_test(photos)
    expected = shares(timm_lt.create_model(f"local-dir:{run}", head="crt"), paths)
    assert main(["predict", str(run), *map(str, paths), "--head", "crt", "--format", "json"]) == 0
    found, names = json.loads(capsys.readouterr().out), sorted(COUNTS)
    assert [entry["image"] for entry in found] == list(map(str, paths))
    for entry, row in zip(found, expected, strict=True):
        top = row.topk(3)
        assert [c["name"] for c in entry["classes"]] == [names[i] for i in top.indices]
        values = [c["probability"] for c in entry["classes"]]
        assert values == pytest.approx(top.values.tolist(), abs=1e-5)
    file = tmp_path / "best.csv"
    arguments = ["predict", str(run), str(photos / "test"), "--head", "crt", "--format", "csv"]
    assert main([*arguments, "--top", "1", "--output", str(file)]) == 0
    rows = csv.DictReader(file.read_text().splitlines())
    best = {str(path): names[row.argmax()] for path, row in zip(paths, expected, strict=True)}
    assert {row["image"]: row["class_1"] for row in rows} == best


def test_rebalance_is_the_command(photos, metrics, tmp_path):
    model = timm.create_model(MODEL, pretrained=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = timm_lt.rebalance(model, photos, workers=0, output=tmp_path / "run")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert found.head == metrics["selection"]["auto"]["head"]
    for name, report in found.reports.items():
        assert report.to_dict() == metrics["heads"][name]
    assert found.reports[found.head].all == accuracy(found.model, photos)
    paths, _ = images_of_test(photos)
    loaded = timm_lt.create_model(f"local-dir:{tmp_path / 'run'}", head=found.head)
    torch.testing.assert_close(shares(loaded, paths[:3]), shares(found.model, paths[:3]))


def test_weights_of_ones_own(photos, run, tmp_path, metrics):
    """The classifier of a file is the joint one: nothing is fitted in its place."""
    file, weights = tmp_path / "model_best.pth.tar", load_file(run / "model.safetensors")
    # As a training leaves it: another classifier than the probe.
    weights["fc.bias"] += torch.arange(5.0) / 4
    wrapped = {f"module.{key}": value for key, value in weights.items()}
    torch.save({"state_dict": wrapped, "arch": "lt_test_resnet", "epoch": 3}, file)
    folder = tmp_path / "run"
    arguments = ["heads", str(photos), "--model", MODEL, "--checkpoint", str(file)]
    assert main([*arguments, "--heads", "linear", "ncm", "--output", str(folder)]) == 0
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(model.fc.bias.detach(), weights["fc.bias"])
    figures = json.loads((folder / "metrics.json").read_text())["heads"]
    assert figures["linear"]["all"] == accuracy(model, photos)
    assert figures["ncm"]["all"] == metrics["heads"]["ncm"]["all"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["heads", "nowhere", "--model", MODEL], ["nowhere", "glyph_lt"]),
        (["heads", "PHOTOS", "--model", "resnet5"], ["resnet5", "resnet50"]),
        (["heads", "PHOTOS", "--model", MODEL, "--option", "tets_fraction=1"], ["tets_fraction"]),
        (["heads", "ONE", "--model", MODEL], ["class"]),
        (["evaluate", MODEL, "PHOTOS"], ["100 classes", "5", "timm-lt heads"]),
        (["evaluate", "RUN", "PHOTOS", "--head", "svm"], ["svm", "crt"]),
        (["predict", "FILE", "PHOTOS"], ["file of weights", "--checkpoint"]),
        (["run", "validate.py"], ["validate.py", "repository"]),
    ],
)
def test_a_mistake_is_one_line(arguments, words, photos, run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    places = {"PHOTOS": photos, "RUN": run, "FILE": run / "model.safetensors"}
    places["ONE"] = shutil.copytree(photos / "train" / "a", tmp_path / "one" / "a").parent
    assert main([str(places.get(argument, argument)) for argument in arguments]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert shown[-1].startswith("error: ")
    for word in words:
        assert word in shown[-1]
    assert not list(folder.iterdir())
