"""The real command: what it prints and writes, resuming, several processes, and user's mistakes."""

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import timm_lt
import train_lt
from timm_lt.data import create_splits
from timm_lt.utils.checks import UsageError

ROOT = Path(train_lt.__file__).parent
DIGITS = "hub_configs/lt_test_resnet.digits_lt.yaml"
HEADS = ["linear", "crt", "tau_norm", "lws", "ncm", "logit_adjusted"]


def run(server, folder, *options):
    finished = server.run(DIGITS, "--output", folder, *options)
    assert finished.status == 0, finished.err
    return finished


@pytest.fixture(scope="module")
def digits_run(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    return folder, run(server, folder)


@pytest.fixture(scope="module")
def digits_test_images():
    normalized = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    images = create_splits("digits_lt").images("test", size=(32, 32), **normalized)
    return images.__getitems__(list(range(len(images))))


@pytest.mark.slow
def test_writes_the_folder_and_prints_the_table(digits_run):
    folder, finished = digits_run
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert set(HEADS) <= set(re.findall(r"</svg>(\w+)", report))
    assert report.count("<img ") > 10
    assert {path.stem for path in (folder / "heads").iterdir()} == {"crt", "lws", "ncm"}
    assert all(path.read_bytes()[1:4] == b"PNG" for path in (folder / "plots").iterdir())
    assert (folder / "README.md").is_file()
    # torch.save writes a zip archive, pickle a protocol of 2 or later: in the training state alone.
    files = [path for path in folder.rglob("*") if path.is_file()]
    pickles = [file for file in files if file.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04")]
    assert {file.relative_to(folder).parts[0] for file in pickles} == {"state"}
    assert {file.name for file in pickles} == {"optimizer.bin", "random_states_0.pkl"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["heads"]) == HEADS
    facts = metrics["protocol"], metrics["validation"], metrics["note"], metrics["class_counts"][0]
    assert facts == ("standard", "val", None, 120)
    # Not those of the packaged checkpoint.
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("test_resnet", 10)
    assert "tag" not in config["pretrained_cfg"]
    assert metrics["shots"]["few_shot"]["rule"] == "< 20"
    with (folder / "per_class.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["training_images"]) for row in rows] == metrics["class_counts"]
    for head, figures in metrics["heads"].items():
        line = next(line for line in finished.out.splitlines() if line.strip().startswith(head))
        shown = [float(number) for number in re.findall(r"\d+\.\d", line)[:4]]
        expected = [figures[k] for k in ("many_shot", "medium_shot", "few_shot", "all")]
        assert shown == [round(100 * value, 1) for value in expected]
        assert [float(row[f"accuracy_{head}"]) for row in rows] == figures["per_class"]


@pytest.mark.slow
def test_the_log_has_times_rates_and_a_summary(digits_run):
    folder, finished = digits_run
    history = json.loads((folder / "state" / "epoch_0005" / "history.json").read_text())["epochs"]
    lines = [line for line in finished.err.splitlines() if "  loss " in line]
    assert len(lines) == len(history) == 5
    for line, record in zip(lines, history, strict=True):
        assert f"loss {record['loss']:.3f}" in line
        assert f"val {100 * record['val']['all']:.1f} %" in line
        assert f"{record['images_per_second']:,.0f} images/s  {record['seconds']:.1f} s" in line
    scores = [record["val"]["all"] for record in history]
    best = scores.index(max(scores)) + 1
    assert json.loads((folder / "metrics.json").read_text())["kept_epoch"] == best
    (summary,) = (line for line in finished.err.splitlines() if "trained 5 epochs in" in line)
    assert f"best on validation: epoch {best} with {100 * max(scores):.1f} %" in summary


@pytest.mark.slow
def test_loaded_heads_give_the_bits_that_the_run_evaluated(digits_run, digits_test_images):
    folder, _ = digits_run
    images, targets = digits_test_images
    metrics = json.loads((folder / "metrics.json").read_text())
    for head in HEADS:
        model = timm_lt.create_model(f"local-dir:{folder}", head=head).eval()
        with torch.inference_mode():
            logits = torch.cat([model(batch) for batch in images.split(256)])
        digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
        assert digest == metrics["logits_sha256"][head]
        right = (logits.argmax(1) == targets).double()
        assert metrics["heads"][head]["all"] == pytest.approx(right.mean().item())
        recalls = [right[targets == label].mean().item() for label in range(10)]
        few = [r for r, n in zip(recalls, metrics["class_counts"], strict=True) if n < 20]
        assert metrics["heads"][head]["few_shot"] == pytest.approx(sum(few) / len(few))


@pytest.mark.slow
def test_plain_timm_loads_the_joint_classifier(
    plain_server, digits_run, digits_test_images, tmp_path
):
    folder, images = digits_run[0], digits_test_images[0][:8]
    np.save(tmp_path / "images.npy", images.numpy())
    plain = plain_server.python(
        "import sys, numpy, timm, torch\n"
        f"model = timm.create_model('local-dir:{folder}', pretrained=True).eval()\n"
        f"images = torch.from_numpy(numpy.load(r'{tmp_path}/images.npy'))\n"
        f"numpy.save(r'{tmp_path}/logits.npy', model(images).detach().numpy())\n"
        "assert not any(name.startswith('timm_lt') for name in sys.modules)\n"
    )
    assert plain.status == 0, plain.err
    model = timm_lt.create_model(f"local-dir:{folder}", head="linear").eval()
    with torch.inference_mode():
        np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), model(images).numpy())


@pytest.mark.slow
def test_resuming_a_finished_run_shows_its_table_and_touches_nothing(server, digits_run):
    folder, finished = digits_run
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = run(server, folder, "--resume")
    assert again.out == finished.out
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.first
@pytest.mark.timeout(1800)  # 30 epochs: 70 s with two free cores, ten times that with one busy one
def test_the_readme_command_shows_what_heads_do_to_rare_classes(tmp_path):
    """The default recipe: order and margins of DESIGN section 7, not values."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "train_lt.py"]
    launch += ["--output", str(tmp_path / "run")]
    if "PYTEST_XDIST_WORKER" in os.environ:
        # The other cores are taken: two threads that wait for each other would crawl.
        launch += ["--threads", "1"]
    subprocess.run(launch, cwd=ROOT, check=True)
    heads = json.loads((tmp_path / "run" / "metrics.json").read_text())["heads"]
    joint = heads.pop("linear")
    assert joint["all"] == pytest.approx(0.612, abs=0.04)
    assert list(heads) == HEADS[1:]
    for figures in heads.values():
        assert figures["all"] >= joint["all"] + 0.06
        assert figures["few_shot"] >= joint["few_shot"] + 0.20
        assert figures["many_shot"] < joint["many_shot"]


TIMM = ["--data.augmentation", "timm"]


def failing(capsys, *arguments):
    """Runs the command in this process; returns its error message."""
    assert train_lt.main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    return said


# One of each part: the refusal of its constructor, with the recipe's key.
MISTAKES = [
    (["--heads", "{'tau_nrom': {}}"], ["did you mean 'tau_norm'", "lws"]),
    (["--heads", "{ncm: {}, auto: {tau: 1}}"], ["auto", "takes no options"]),
    (["--heads.tau_norm.tau", "-1"], ["tau", "[0, inf)", "-1"]),
    (["--heads.fslwf.base", "1"], ["'fslwf' needs two base classes and a novel one: 10 of 10"]),
    (["--heads.lws", "{stage: image}"], ["stage of head 'lws'", "features, images"]),
    (["--heads", "{ncm: {kind: crt}}"], ["'ncm' is a 'crt' head, but 'ncm' is the name of"]),
    (["--heads", "{../mine: {kind: crt}}"], ["ASCII letters"]),
    (["--sampler.name", "balanced"], ["sampler: unknown sampler", "class_balanced"]),
    (["--loss.name", "CE"], ["loss: unknown loss", "cross_entropy"]),
    ([*TIMM, "--data.augmentation_options.mean", "[0, 0, 0]"], ["mean", "set automatically"]),
    (["--data.background", "blurple"], ["data: background 'blurple'"]),
    (["--model.options", "{'head': 'lws'}"], ["'lws' is not fitted yet"]),
    (["--optimizer.name", "sdg"], ["sdg", "sgd"]),
    (["--optimizer.options.lr", "0.001"], ["optimizer.options: ", "'lr'"]),
    (["--batch_size", "100000"], ["batch_size", "389"]),
    (["--mixup.mixup_alpha", "-1"], ["mixup_alpha", "[0, inf)"]),
    (["--ema.decay", "1"], ["ema.decay", "[0, 1)"]),
    (["--tracker", "tensorbord"], ["tensorbord", "tensorboard"]),
    (["--mixed_precision", "fp16"], ["fp16", "GPU"]),
    (["--workers", "2"], ["--workers", "augmentation timm"]),
    (["--private"], ["--push_to_hub"]),
    (["--features.cache_dir", "pyproject.toml/x"], ["pyproject.toml/x cannot be written"]),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_a_mistake_is_named_before_anything_is_written(capsys, tmp_path, arguments, words):
    folder = tmp_path / "run"
    message = failing(capsys, DIGITS, "--output", str(folder), *arguments)
    assert all(word in message for word in words), message
    assert not folder.exists()


def test_a_run_does_not_go_on_with_other_images(capsys, tmp_path, monkeypatch):
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (8, 8)).save(tmp_path / "photos" / label / f"{number}.png")
    data = ["--data.name", "folder", "--data.root", str(tmp_path / "photos"), "--batch_size", "6"]
    arguments = [DIGITS, "--output", str(tmp_path / "run"), *data, "--quiet"]

    def stop(run):
        raise UsageError("stopped after the data were made")

    monkeypatch.setattr(timm_lt.run, "train", stop)
    for more in ([], ["--resume"]):
        assert "stopped" in failing(capsys, *arguments, *more)
    added = tmp_path / "photos" / "b" / "added.png"
    Image.new("RGB", (8, 8)).save(added)
    message = failing(capsys, *arguments, "--resume")
    assert "train: 6 images there, 7 now" in message
    assert "--overwrite" in message
    assert "stopped" in failing(capsys, *arguments, "--overwrite")
    added.unlink()
    assert "train: 7 images there, 6 now" in failing(capsys, *arguments, "--resume")


@pytest.mark.slow
def test_a_tracker_by_one_option(server, tmp_path):
    pytest.importorskip("tensorboard")
    options = ["--epochs", "1", "--quiet", "--heads", "{linear: {}}"]
    run(server, tmp_path / "run", "--tracker", "tensorboard", *options)
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
