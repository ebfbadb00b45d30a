"""``timm-lt compare``: runs side by side, kills and failures, and mistakes before anything runs."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

import timm_lt
from timm_lt.cli import main
from timm_lt.run import comparison as runs
from timm_lt.run.comparison import (
    Outcome,
    Run,
    check_runs,
    child_environment,
    default_jobs,
    last_words,
    run_all,
    visible_devices,
)
from timm_lt.run.folder import OCCUPIED, lock_folder, release_run_folder
from timm_lt.run.recipe import Recipe

# What a process of the tests does in place of training: notes when, and leaves figures.
FINISH = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
times = folder.parent / "times.txt"
started = time.time()
time.sleep(0.6)
with times.open("a") as file:
    file.write(f"{folder.name} {started} {time.time()} {os.environ['OMP_NUM_THREADS']}\\n")
(folder / "metrics.json").write_text("{}")
"""
FAIL = "print('one'); print('error: there is no data'); print('two'); raise SystemExit(2)"
KILL = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
HANG = "import time; time.sleep(60)"


class Stub(Run):
    """A run whose process is a few lines of Python."""

    def command(self, threads):
        script = getattr(self, "script", FINISH)
        return [sys.executable, "-S", "-c", script, str(self.folder)]


def stub(folder, name, after=None, script=FINISH):
    run = Stub(name, 0, Recipe(), folder / f"{name}.yaml", folder / name, after)
    object.__setattr__(run, "script", script)
    return run


def statuses(outcomes):
    return {run.representation: outcome.status for run, outcome in outcomes.items()}


def test_so_many_run_side_by_side_and_each_behind_its_source(tmp_path):
    first = stub(tmp_path, "first")
    others = [stub(tmp_path, name) for name in ("b", "c")]
    made = [first, stub(tmp_path, "after", first), *others]
    outcomes = run_all(made, tmp_path / "logs", jobs=2, threads=1)
    assert statuses(outcomes) == dict.fromkeys(["first", "after", "b", "c"], "finished")
    lines = [line.split() for line in (tmp_path / "times.txt").read_text().splitlines()]
    spans = {name: (float(start), float(end)) for name, start, end, _ in lines}
    assert {threads for *_, threads in lines} == {"1"}
    assert spans["after"][0] >= spans["first"][1]
    running = [sum(s <= t < e for s, e in spans.values()) for t, _ in spans.values()]
    assert max(running) == 2
    # All of them are kept as they are the next time.
    again = run_all(made, tmp_path / "logs", jobs=2, threads=1)
    assert set(statuses(again).values()) == {"kept"}
    assert len((tmp_path / "times.txt").read_text().splitlines()) == 4


def test_each_gpu_has_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices({}) == ["0", "1"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "3,GPU-ab"}) == ["3", "GPU-ab"]
    assert default_jobs(threads=1) == 2
    script = FINISH.replace("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    made = [stub(tmp_path, name, script=script) for name in "abc"]
    run_all(made, tmp_path / "logs", jobs=3, threads=1)
    lines = (tmp_path / "times.txt").read_text().splitlines()
    assert sorted(line.split()[3] for line in lines) == ["0", "0", "1"]


def test_a_failure_is_reported_and_the_others_go_on(tmp_path, caplog):
    broken = stub(tmp_path, "broken", script=FAIL)
    made = [broken, stub(tmp_path, "after", broken), stub(tmp_path, "dead", script=KILL)]
    made += [stub(tmp_path, "behind", made[1]), stub(tmp_path, "good")]
    outcomes = run_all(made, tmp_path / "logs", jobs=1, threads=1)
    messages = {run.representation: outcome.message for run, outcome in outcomes.items()}
    assert statuses(outcomes) == {
        "broken": "failed",
        "after": "left out",
        "dead": "failed",
        "behind": "left out",
        "good": "finished",
    }
    assert messages["broken"] == "there is no data"
    assert messages["dead"] == "killed by signal 9"
    assert messages["after"] == "broken.seed_0 failed"
    assert "broken.seed_0 failed: there is no data" in caplog.text
    # Another try leaves what the former printed.
    object.__setattr__(broken, "script", KILL)
    run_all([broken], tmp_path / "logs", jobs=1, threads=1)
    run_all([broken], tmp_path / "logs", jobs=1, threads=1)
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").glob("broken*")}
    assert "there is no data" in logs.pop("broken.seed_0.1.log")
    assert logs == {"broken.seed_0.2.log": "", "broken.seed_0.log": ""}


def test_a_process_that_outlived_its_comparison_is_waited_for(tmp_path):
    run = stub(tmp_path, "run")
    lock = lock_folder(run.folder)

    def finish():
        (run.folder / "metrics.json").write_text("{}")
        release_run_folder(lock)

    timer = threading.Timer(0.5, finish)
    started = time.perf_counter()
    timer.start()
    outcomes = run_all([run], tmp_path / "logs", jobs=1, threads=1)
    timer.join()
    assert time.perf_counter() - started > 0.5
    assert statuses(outcomes) == {"run": "finished"}


def test_a_process_that_was_only_starting_when_its_comparison_was_killed(tmp_path, caplog):
    """It takes the folder after the new one has looked: that is turned away, and tries again."""
    script = (
        "import pathlib, sys; folder = pathlib.Path(sys.argv[1])\n"
        "if folder.exists(): (folder / 'metrics.json').write_text('{}'); raise SystemExit\n"
        "folder.mkdir()\n"
        f"print(f'error: {OCCUPIED} {{folder}}: wait for it'); raise SystemExit(2)"
    )
    caplog.set_level("INFO")
    run = stub(tmp_path, "run", script=script)
    outcomes = run_all([run], tmp_path / "logs", jobs=1, threads=1)
    assert statuses(outcomes) == {"run": "finished"}
    assert "failed" not in caplog.text


def test_ctrl_c_ends_the_processes(tmp_path, monkeypatch):
    run = stub(tmp_path, "run", script=HANG)
    started, interrupts = [], []
    real, sleep = subprocess.Popen, time.sleep

    def popen(*args, **kwargs):
        started.append(real(*args, **kwargs))
        return started[-1]

    def interrupt(seconds):
        if started and not interrupts:
            interrupts.append(seconds)
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(runs.subprocess, "Popen", popen)
    monkeypatch.setattr(runs.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_all([run], tmp_path / "logs", jobs=1, threads=1)
    assert started[0].returncode == -signal.SIGTERM


def test_what_a_process_is_given_and_its_last_words(tmp_path):
    given = child_environment({"PYTHONPATH": "a", "OMP_NUM_THREADS": "8", "HOME": "h"}, threads=2)
    assert (given["OMP_NUM_THREADS"], given["MKL_NUM_THREADS"], given["HOME"]) == ("2", "2", "h")
    root, last = given["PYTHONPATH"].split(os.pathsep)
    assert (Path(root) / "timm_lt").is_dir()
    assert last == "a"
    log = tmp_path / "a.log"
    for text, words in (("", ""), ("a\n\nb\n \n", "b"), ("error: x\x1b[2J\nTraceback", "x [2J")):
        log.write_text(text)
        assert last_words(log) == words


# ---- mistakes ------------------------------------------------------------------------------------

DIGITS = ["--recipe", "lt_test_resnet.digits_lt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kang_tabel1"], ["no such file", "did you mean 'kang_table1'", "bbn_figure2"]),
        (["--epochs", "1"], ["GRID comes before", "kang_table2"]),
        (["kang_table1", "--seeds", "0,x"], ["--seeds", "integers", "0,x"]),
        (["kang_table1", "--seeds", "0,1,0"], ["--seeds", "twice"]),
        (["kang_table1", "--seeds", "-1"], ["--seeds", "integers >= 0"]),
        (["kang_table1", "--only", "B+C"], ["'B+C'", "LB + C"]),
        (["kang_table1", "--jobs", "0"], ["--jobs", "from 1"]),
        (["kang_table1", "--threads", "0"], ["--threads", "from 1"]),
        (["kang_table1", "--recipe", "digits"], ["digits", "lt_test_resnet.digits_lt"]),
        (["kang_table1", "--epoch", "1"], ["--epoch", "--epochs"]),
        (["kang_table1", "--seed", "1"], ["--seed", "--seeds"]),
        (["kang_table1", "--overwrite"], ["none of how to run one"]),
        (["kang_table1", "--sampler.name", "reversed"], ["--sampler.name", "'backbone' sets"]),
        (["kang_table1", "--optimizer.lr", "-1"], ["lr", "(0, inf)"]),
        (["kang_table1", "--data.name", "cifar"], ["cifar", "cifar100_lt"]),
        (["kang_table1", "--data.options.imbalance", "3"], ["no option 'imbalance'"]),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for word in words:
        assert word in error
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("timm_lt.cli.compare.run_all", lambda *_, **__: pytest.fail("runs"))
    arguments = ["compare", "kang_table1", *DIGITS, "--output", str(tmp_path)]
    (tmp_path / "thesis.tex").write_text("precious")
    assert main(arguments) == 2
    assert "not a comparison (thesis.tex)" in capsys.readouterr().err
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "comparison.yaml").write_text("grid: kang_table2\nrecipe: {epochs: 5}")
    run = tmp_path / "runs" / "joint" / "seed_0"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("epochs: 5")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "holds another comparison (grid 'kang_table2' there, 'kang_table1' now" in error


def test_a_command_of_which_no_run_has_begun_may_be_corrected(tmp_path, monkeypatch, capsys):
    """Such as one whose data were not where it said."""

    def fail(runs, logs, **_):
        return {run: Outcome("failed", message="no data") for run in runs}

    monkeypatch.setattr("timm_lt.cli.compare.run_all", fail)
    arguments = ["compare", "kang_table1", *DIGITS, "--seeds", "0", "--output", str(tmp_path)]
    assert main([*arguments, "--batch_size", "64"]) == 1
    assert main([*arguments, "--batch_size", "32"]) == 1
    written = yaml.safe_load((tmp_path / "comparison.yaml").read_text())
    assert written["recipe"]["batch_size"] == 32


def test_a_run_whose_source_is_to_be_made_again_is_not_taken_as_it_is(tmp_path):
    recipe = Recipe()
    source = Run("joint", 0, recipe, tmp_path / "a.yaml", tmp_path / "joint", None)
    again = Run("again", 0, recipe, tmp_path / "b.yaml", tmp_path / "again", source)
    for run in (source, again):
        run.folder.mkdir()
        (run.folder / "recipe.yaml").write_text(recipe.to_yaml())
    (source.folder / "metrics.json").write_text("{}")
    check_runs([source, again])
    (source.folder / "metrics.json").unlink()
    with pytest.raises(timm_lt.UsageError, match=r"again goes on from .*joint, which is not fin"):
        check_runs([source, again])


def test_without_a_grid_the_shipped_ones_are_listed(capsys):
    assert main(["compare"]) == 0
    assert "kang_table1: What is re-trained" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--help"])
    assert stopped.value.code == 0
    assert "--only" in capsys.readouterr().out


# ---- the real command ----------------------------------------------------------------------------

GRID = {
    "title": "A small table",
    "source": "these tests",
    "recipe": "lt_test_resnet.digits_lt",
    "heads": {
        "half": {"kind": "tau_norm", "tau": 0.5},
        # Only the class counts show it.
        "bold": {"kind": "fslwf", "base": 1000},
    },
    "representations": {
        "joint": {"epochs": 1},
        "again": {
            "after": "joint",
            # So many that the kill comes before the last, on a slow machine too.
            "epochs": 5,
            "model": {"trained": ["last_block"], "fresh_classifier": True},
            "sampler": {"name": "class_balanced"},
        },
        "broken": {"epochs": 1},
    },
    "rows": [
        {"label": "joint", "representation": "joint", "head": "linear"},
        {"label": "half", "representation": "joint", "head": "half"},
        {"label": "LB + C", "representation": "again", "head": "linear"},
        {"label": "broken", "representation": "broken", "head": "bold"},
    ],
}


def killed_half_way(server, arguments, state):
    """Starts a comparison and kills it, with its runs, when a state is there."""
    script = state.parents[5] / "compare.py"
    script.write_text(
        f"import os, timm_lt.cli\nos.chdir({str(script.parent)!r})\ntimm_lt.cli.main({arguments})\n"
    )
    process = server.start(script=script)
    end = time.monotonic() + 300
    while not state.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait().status == -signal.SIGKILL


@pytest.mark.first
@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_comparison_goes_on_after_a_kill_and_tells_of_what_failed(
    server, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    arguments = ["compare", "mine.yaml", "--seeds", "3", "--threads", "1", "--output", "out"]
    folder = tmp_path / "out"
    epoch = folder / "runs" / "again" / "seed_3" / "state" / "epoch_0001"
    killed_half_way(server, [*arguments, "--jobs", "1"], epoch)
    joint = folder / "runs" / "joint" / "seed_3"
    times = {path: path.stat().st_mtime_ns for path in joint.rglob("*")}
    assert not (folder / "results.json").exists()

    assert main([*arguments, "--jobs", "2"]) == 1
    said = capsys.readouterr()
    assert "1 of 3 runs are finished already" in said.err
    assert "broken.seed_3 failed: " in said.err
    assert "fewer than two base classes" in said.err
    assert "Traceback" not in said.err
    assert "A small table" in said.out
    assert times == {path: path.stat().st_mtime_ns for path in joint.rglob("*")}
    log = (folder / "logs" / "again.seed_3.log").read_text()
    assert re.search(r"resumed after epoch [1-4]\n", log)
    assert "epoch   5/5" in log
    assert "epoch   1/5" not in log

    results = json.loads((folder / "results.json").read_text())
    status = {run["representation"]: run["status"] for run in results["runs"]}
    assert status == {"joint": "kept", "again": "finished", "broken": "failed"}
    metrics = json.loads((joint / "metrics.json").read_text())["heads"]
    figures = {cell["row"]: cell["per_seed"].get("3") for cell in results["cells"]}
    for row, head in (("joint", "linear"), ("half", "half")):
        assert figures[row] == {key: metrics[head][key] for key in figures[row]}
    assert figures["broken"] is None
    assert "| broken (0 of 1 seeds) | - | - | - | - | - |" in (folder / "results.md").read_text()

    # Another recipe does not go on with these runs.
    other = copy.deepcopy(GRID)
    other["representations"]["again"]["epochs"] = 3
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(other, sort_keys=False))
    assert main(arguments) == 2
    assert "another recipe (epochs 5 there, 3 now)" in capsys.readouterr().err
