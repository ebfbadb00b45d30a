"""The real command among faults: kills, full disks, lost processes, damaged images."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from multiprocessing import resource_sharer
from pathlib import Path

import pytest
import torch
from damaged import DAMAGE

import timm_lt
from timm_lt.data.loader import loaded
from timm_lt.training.state import find_damage

RECIPE = Path(__file__).parent.parent / "small_digits.yaml"
SEED = 0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finish(server, folder)
    return folder


def options(folder, *more):
    return RECIPE, "--output", folder, *more


def finish(server, folder, *more):
    run = server.run(*options(folder, "--resume", *more))
    assert run.status == 0, run.err
    return run


def failed(run, *words):
    """Checks that a run says in one line what is wrong."""
    errors = [line for line in run.err.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert run.status == 2, run.err
    assert len(errors) == 1, run.err
    assert errors[0].startswith("error: ")
    for word in words:
        assert word in errors[0]
    return errors[0]


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def bits(folder):
    """What an uninterrupted run has to the last bit."""
    files = [folder / "model.safetensors", *sorted((folder / "heads").iterdir())]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return digests | {key: metrics(folder)[key] for key in ("heads", "logits_sha256")}


def saved(folder):
    """The epochs whose state would be believed; checks that none of them is damaged."""
    states = sorted((folder / "state").glob("epoch_*"))
    assert [find_damage(state) for state in states] == [None] * len(states)
    return [int(state.name[6:]) for state in states]


def wait_for(condition, seconds=300):
    """Waits until something holds and returns it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.001)
    return found


# Kills -------------------------------------------------------------------------------------------

# Paths that a run is about to touch when it is killed; None is a random moment.
MOMENTS = ("*/state/.partial_*/optimizer.bin", None, "*/heads/.lws.*")
MORE_MOMENTS = (
    *("*/recipe.yaml", "*/state/.partial_0001", "*/state/.partial_*/manifest.json"),
    *("*/state/epoch_0004", "*/model.safetensors", "*/metrics.json", *[None] * 11),
)


@pytest.mark.first
@pytest.mark.parametrize("more", [(), pytest.param(MORE_MOMENTS, marks=pytest.mark.exhaustive)])
def test_kills_change_nothing(server, whole, tmp_path, more):
    rng, took = random.Random(SEED), metrics(whole)["seconds"]
    seconds = took["data"] + took["representation"] + took["features"] + sum(took["heads"].values())
    aimed = [*MOMENTS, *more]
    rng.shuffle(aimed)
    folders = [tmp_path / "0"]
    kills = in_folder = 0
    while kills < len(aimed):
        folder, moment = folders[-1], aimed[kills]
        run = server.start(*options(folder, "--resume"), at=moment)
        if moment is None:
            done = max(saved(folder), default=0)
            time.sleep(rng.uniform(0, seconds - done * took["representation"] / 5))
            run.kill()
        run.wait()
        assert run.status in (0, -signal.SIGKILL), run.err
        saved(folder)
        if run.status == -signal.SIGKILL:
            kills += 1
            in_folder += 1
            assert not (folder / "metrics.json").exists()
        if run.status == 0 or in_folder == 5:
            folders.append(tmp_path / str(len(folders)))
            in_folder = 0
    for folder in folders:
        finish(server, folder)
        assert bits(folder) == bits(whole)
        assert [path.name for path in folder.rglob(".*")] == []


# Full disks --------------------------------------------------------------------------------------

# Where the disk is full, how many bytes a file may have then, and words of the message.
FULL = (
    (None, 10_000, ["state after epoch 1", "complete states: []"]),
    ("*/heads/.crt*", 5000, ["results", "model.safetensors"]),
    ("*/run/.metrics.json*", 10_000, ["results", "metrics.json"]),
)
MORE_FULL = (
    ("*/run/.recipe.yaml*", 100, ["recipe.yaml", "cannot be written"]),
    ("*/state/.partial_0003", 500_000, ["state after epoch 3", "complete states: [1, 2]"]),
    ("*/state/.partial_0004/.history.json*", 100, ["after epoch 4", "history.json"]),
    ("*/heads/.crt*", 3000, ["results", "crt.safetensors"]),
    ("*/run/.config.json*", 500, ["results", "config.json"]),
    ("*/plots", 20_000, ["results", "accuracy_by_frequency.png"]),
    ("*/run/.README.md*", 5000, ["results", "README.md"]),
    ("*/run/.report.html*", 20_000, ["results", "report.html"]),
)


@pytest.mark.parametrize("full", [FULL, pytest.param(MORE_FULL, marks=pytest.mark.exhaustive)])
def test_full_disks_are_one_line_each_and_no_loss(server, whole, tmp_path, full):
    folder = tmp_path / "run"
    for at, limit, words in full:
        run = server.run(*options(folder, "--resume"), at=at, limit=limit)
        message = failed(run, *words, "File too large")
        if "recipe.yaml" not in message:
            assert "make room and go on with --resume" in message
        assert not (folder / "metrics.json").exists()
        saved(folder)
        assert [path for path in folder.rglob(".*") if path.name != ".lock"] == []
    finish(server, folder)
    assert bits(folder) == bits(whole)


# Data workers ------------------------------------------------------------------------------------

DECODED = ("--data.augmentation", "timm", "--epochs", "3")


@pytest.fixture(scope="module")
def decoded(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "decoded"
    finish(server, folder, *DECODED, "--workers", "0")
    return folder


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


EVERYTHING = (
    *("--data.augmentation", "timm", "--workers", "1"),
    *("--data.augmentation_options", "{auto_augment: rand-m5, re_prob: 0.3, hflip: 0}"),
    *("--mixup.mixup_alpha", "0.2", "--mixup.cutmix_alpha", "1", "--mixup.off_epoch", "4"),
    *("--mixup.remix_kappa", "3", "--max_norm", "0.5"),
    *("--optimizer.name", "adamw", "--optimizer.lr", "0.003", "--clip_grad", "1"),
    *("--ema.decay", "0.9", "--accumulation_steps", "2", "--loss.options.smoothing", "0.1"),
    *("--sampler.name", "progressively_balanced", "--validate_every", "2"),
)


def test_a_run_with_every_option_resumes_to_the_same_bits(server, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    finish(server, whole, *EVERYTHING)
    for epoch in (1, 3):
        run = server.start(*options(folder, *EVERYTHING, "--resume"))
        wait_for((folder / "state" / f"epoch_000{epoch}").exists)
        run.kill()
        run.wait()
    finish(server, folder, *EVERYTHING)
    assert bits(folder) == bits(whole)


def test_a_killed_worker_is_named(server, decoded, tmp_path):
    folder = tmp_path / "run"
    run = server.start(*options(folder, *DECODED, "--workers", "1"))
    (worker,) = wait_for(lambda: children(run.pid))
    os.kill(worker, signal.SIGKILL)
    run.wait()
    assert run.status == 2, run.err
    # If torch hears of it in a callback of Python, Python reports that as well.
    (message,) = re.findall(r"^error: .*", run.err, re.MULTILINE)
    assert message.startswith("error: a data worker died")
    assert message.endswith("; go on with --resume")
    # The signal is not always known; less memory is advised only where it is.
    assert ("fewer workers need less" in message) == ("killed by signal 9" in message)
    finish(server, folder, *DECODED, "--workers", "1")
    assert bits(folder) == bits(decoded)


class Ends(torch.utils.data.Dataset):
    def __init__(self):
        self.ended = multiprocessing.Event()

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index == 1:
            # The first batch is on its way, as a file that its receiver has to ask for.
            time.sleep(1)
            resource_sharer.stop()
            self.ended.set()
        return torch.zeros(1000)


def test_a_worker_that_ends_as_it_hands_over_a_batch_is_named():
    """Its connections are closed a moment before its parent can see that it is dead."""
    data = Ends()
    batches = iter(torch.utils.data.DataLoader(data, num_workers=1))
    assert data.ended.wait(60)
    with pytest.raises(timm_lt.UsageError, match=r"data worker died \(.*--resume"):
        list(loaded(batches))


def test_a_worker_that_raises_is_quoted(server, tmp_path):
    broken = ("--data.name", "failing_digits", *DECODED, "--data.options", "{row: 20}")
    run = server.run(*options(tmp_path / "run", *broken, "--workers", "1"))
    failed(run, "data worker failed", "a mistake in somebody's code", "--resume")
    # In this process: the author of the code wants to see where.
    run = server.run(*options(tmp_path / "own", *broken, "--workers", "0"))
    assert run.status == 1
    assert run.err.endswith("LookupError: a mistake in somebody's code\n")


# Images that cannot be read ----------------------------------------------------------------------

FAST = ("--epochs", "1", "--heads", "{linear: {}, ncm: {}}")
DAMAGED = ("--data.name", "damaged_digits", *FAST)
TIMM = ("--data.augmentation", "timm", "--workers")
PATHS = [(), (*TIMM, "0"), (*TIMM, "1")]
COUNTS = {split: len(rows) for split, rows in DAMAGE.items()}


@pytest.mark.parametrize(
    ("split", "path"),
    [
        ("train", PATHS[1]),
        ("test", PATHS[2]),
        *(pytest.param(split, (), marks=pytest.mark.exhaustive) for split in DAMAGE),
        pytest.param("val", PATHS[2], marks=pytest.mark.exhaustive),
    ],
)
def test_a_damaged_image_is_named(server, tmp_path, path, split):
    only = ("--data.options", f"{{damaged: {split}}}")
    run = server.run(*options(tmp_path / "run", *DAMAGED, *only, *path))
    message = failed(run, f"{split} split: ", "cannot be decoded", "--data.unreadable skip")
    named = re.findall(r"image (\d+) \((\w+)\.png\)", message)
    assert named == [(str(row), f"{split}_{row}") for row in DAMAGE[split]]
    assert not (tmp_path / "run").exists()


def test_damaged_images_are_left_out_and_counted(server, tmp_path):
    for number, path in enumerate(PATHS):
        folder = tmp_path / str(number)
        run = finish(server, folder, *DAMAGED, "--data.unreadable", "skip", *path)
        assert metrics(folder)["unreadable_images"] == COUNTS
        for split, rows in DAMAGE.items():
            shown = ", ".join(f"image {row} ({split}_{row}.png)" for row in rows)
            line = rf"{COUNTS[split]} of \d+ {split} images .* left out: {re.escape(shown)}\n"
            assert re.search(line, run.err)
    # With workers and without.
    assert bits(tmp_path / "1") == bits(tmp_path / "2")


# Signals and locks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)]
)
def test_a_signal_ends_the_run_in_one_line(server, whole, tmp_path, number):
    for attempt in range(3):
        folder = tmp_path / f"run_{attempt}"
        run = server.start(*options(folder))
        wait_for((folder / "state" / "epoch_0002").exists)
        # As a terminal and a scheduler do: to all processes of the run.
        os.killpg(run.pid, number)
        run.wait()
        # Python drops an exception in a callback, so a signal at that moment has no effect.
        if "Exception ignored" not in run.err:
            break
    assert run.status == 130, run.err
    assert "--resume" in run.err.splitlines()[-1]
    assert "Traceback" not in run.err
    assert 2 in saved(folder)
    finish(server, folder)
    assert bits(folder) == bits(whole)


def test_one_run_at_a_time_in_a_folder(server, whole, tmp_path):
    folder = tmp_path / "run"
    first = server.start(*options(folder))
    wait_for((folder / "state" / "epoch_0001").exists)
    for more in ("--resume", "--overwrite"):
        failed(server.run(*options(folder, more)), "another process runs in", "--output")
    assert first.wait().status == 0, first.err
    assert bits(folder) == bits(whole)
    assert not (folder / ".lock").exists()


def test_workers_of_a_killed_run_do_not_keep_its_folder(server, decoded, tmp_path):
    folder = tmp_path / "run"
    run = server.start(*options(folder, *DECODED, "--workers", "1"))
    wait_for((folder / "state" / "epoch_0001").exists)
    workers = wait_for(lambda: children(run.pid))
    run.kill()
    run.wait()
    assert any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert (folder / ".lock").exists()
    finish(server, folder, *DECODED, "--workers", "1")
    assert bits(folder) == bits(decoded)


# Several processes -------------------------------------------------------------------------------


def on_two(server, folder, *more, status=0):
    """Runs the command on two processes, as a launcher does, which would import all again."""
    runs = server.on_ranks(2, *options(folder, "--resume", *more))
    assert [run.status for run in runs] == [status, status], runs[0].err
    return "".join(run.err for run in runs)


@pytest.mark.multiprocess
def test_one_of_two_processes_is_killed(server, tmp_path):
    folder, untouched = tmp_path / "run", tmp_path / "whole"
    fast = ("--threads", "1", "--epochs", "4", "--heads", "{linear: {}, crt: {}, ncm: {}}")
    on_two(server, untouched, *fast)
    first, second = server.start_ranks(2, *options(folder, *fast))
    wait_for((folder / "state" / "epoch_0001").exists)
    second.kill()
    assert second.wait().status == -signal.SIGKILL
    failed(first.wait(), "another process of this run has ended", "--resume")
    assert saved(folder)
    assert not (folder / "metrics.json").exists()
    shutil.copytree(folder, tmp_path / "alone")
    on_two(server, folder, *fast)
    assert bits(folder) == bits(untouched)
    finish(server, tmp_path / "alone", *fast)
    alone, both = metrics(tmp_path / "alone"), metrics(folder)
    assert (alone["num_processes"], both["num_processes"]) == (1, 2)
    for head, figures in both["heads"].items():
        # 300 test images: a difference of .12 is three standard errors.
        assert alone["heads"][head]["all"] == pytest.approx(figures["all"], abs=0.12)


@pytest.mark.multiprocess
def test_two_processes_name_a_damaged_image_once_and_count_it_once(server, tmp_path):
    timm = (*DAMAGED, *TIMM, "1")
    said = on_two(server, tmp_path / "raises", *timm, "--data.options", "{damaged: test}", status=2)
    named = "image 130 (test_130.png): 0 bytes, image 250 (test_250.png): it is not an image"
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert lines
    assert all(f"test split: 2 of 300 images cannot be decoded: {named}" in line for line in lines)
    said = on_two(server, tmp_path / "skips", *timm, "--data.unreadable", "skip")
    assert said.count("left out: image 130 (test_130.png), image 250 (test_250.png)\n") == 1
    assert metrics(tmp_path / "skips")["unreadable_images"] == COUNTS
