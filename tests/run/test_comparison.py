"""Comparisons: grids and their recipes, processes, figures worked out by hand, and the command."""

import dataclasses
import json
import os
import signal
import subprocess
import threading

import pytest
import torch
import yaml

from timm_lt.cli import main
from timm_lt.run import comparison
from timm_lt.run.comparison import (
    Run,
    load_grid,
    make_runs,
    measure,
    run_all,
    shipped_grids,
    write_results,
)
from timm_lt.run.parse import find_recipe, load_recipe
from timm_lt.run.recipe import Recipe
from timm_lt.utils.accelerator import visible_devices
from timm_lt.utils.checks import UsageError

BASE = load_recipe(find_recipe("lt_test_resnet.digits_lt"))
AGAIN = {"after": "joint", "lr_factor": 0.1, "model.trained": ["last_block"], "epochs": 3}
ROW = {"label": "x", "representation": "joint", "head": "linear"}
GOOD = {
    "title": "What is re-trained",
    "source": "a paper",
    "recipe": "lt_test_resnet.digits_lt",
    "representations": {
        "joint": None,
        "again": AGAIN | {"model.fresh_classifier": True},
        "smooth": {"loss.name": "logit_adjustment", "loss.options": {"tau": 0.5}},
    },
    "heads": {"half": {"kind": "tau_norm", "tau": 0.5}},
    "rows": [
        ROW | {"label": "joint", "quoted": 0.5},
        ROW | {"label": "half", "head": "half"},
        ROW | {"label": "LWS", "head": "lws"},
        ROW | {"label": "LB + C", "representation": "again"},
        ROW | {"label": "LA", "representation": "smooth", "head": "ncm"},
    ],
}


@pytest.fixture
def grid(tmp_path):
    """Returns a function: changes to a good grid -> the grid of a file with them."""

    def load(**changes):
        path = tmp_path / "mine.yaml"
        values = {key: value for key, value in (GOOD | changes).items() if value is not ...}
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return load_grid(str(path))

    return load


def runs_of(grid, tmp_path, *, base=BASE, seeds=(0, 1), rows=None, **options):
    return make_runs(grid, rows or grid.rows, base, tmp_path / "out", seeds=seeds, **options)


# ---- grids and recipes ---------------------------------------------------------------------------


def test_runs_are_made_once_each_behind_their_source(grid, tmp_path):
    runs = {str(run): run for run in runs_of(grid(), tmp_path)}
    assert set(runs) == {f"{n}.seed_{s}" for n in ("joint", "again", "smooth") for s in (0, 1)}
    assert list(runs)[-2:] == ["again.seed_0", "again.seed_1"]
    joint, again, smooth = (runs[f"{name}.seed_1"] for name in ("joint", "again", "smooth"))
    assert (joint.after, again.after, smooth.after) == (None, joint, None)
    # A representation keeps what it does not change.
    plain = {"heads": {}, "seed": 0}
    assert dataclasses.replace(joint.recipe, **plain) == dataclasses.replace(BASE, **plain)
    assert {run.recipe.seed for run in runs.values()} == {0, 1}
    half = {"kind": "tau_norm", "tau": 0.5}
    assert joint.recipe.heads == {"linear": {}, "half": half, "lws": {"steps": 100}}
    model = again.recipe.model
    assert model.name == f"local-dir:{joint.folder}"
    assert (model.pretrained, model.fresh_classifier, model.trained) == (True, True, ["last_block"])
    assert again.recipe.optimizer.lr == pytest.approx(0.1 * BASE.optimizer.lr)
    assert (again.recipe.epochs, again.recipe.heads) == (3, {"linear": {}})
    assert smooth.recipe.loss.options == {"tau": 0.5}


def test_some_rows_have_their_runs_with_the_heads_of_all_rows(grid, tmp_path):
    some = grid()
    joint, again = runs_of(some, tmp_path, rows=some.rows[3:4], seeds=[5])
    assert (str(joint), str(again)) == ("joint.seed_5", "again.seed_5")
    # Else the other rows could not go on with the run.
    assert list(joint.recipe.heads) == ["linear", "half", "lws"]


def test_the_command_line_shortens_every_run_and_sets_nothing_of_the_grid(grid, tmp_path):
    base = dataclasses.replace(BASE, epochs=1)
    runs = runs_of(grid(), tmp_path, base=base, given=["epochs"])
    assert {run.recipe.epochs for run in runs} == {1}
    for key in ("loss.name", "seed", "heads.lws.steps"):
        with pytest.raises(UsageError, match=f"--{key} is set by the grid"):
            runs_of(grid(), tmp_path, given=[key])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "x"}, r"unknown key 'titel' \(did you mean 'title'"),
        ({"rows": ...}, "missing 1 required .* 'rows'"),
        ({"rows": [ROW, ROW]}, "rows must differ in label or column"),
        ({"rows": [{**ROW, "representation": "jiont"}]}, "of 'x': 'jiont'.*mean 'joint'"),
        ({"rows": [{**ROW, "quoted": 41.8}]}, r"quoted of 'x' must be a number in \[0, 1\]"),
        ({"metric": "loss"}, "unknown metric 'loss'.*accuracy, error"),
        ({"plot": True}, "plot and metric error need columns"),
        ({"representations": {"../a": {}}, "rows": []}, "must be letters, digits, underscores"),
        ({"representations": {"joint": {"after": "joint"}}}, "representation before 'joint'"),
    ],
)
def test_a_wrong_file_is_refused_and_named(grid, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        grid(**changes)
    assert str(caught.value).startswith(f"grid {tmp_path / 'mine.yaml'}: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.name": "focall"}, "unknown loss 'focall'"),
        ({"optimizer.lr": "fast"}, "optimizer.lr"),
        ({"model.trained": ["layer9"]}, "unknown module in trained: 'layer9'"),
        ({"after": "joint", "model.name": "resnet18"}, "model.name must be the same for all rows"),
        ({"data.options": {"imbalance_factor": 3}}, "data.options must be the same for all rows"),
        ({"accumulation_steps": 5}, "multiple of 5"),
    ],
)
def test_a_wrong_representation_is_refused_and_named(grid, tmp_path, changes, message):
    wrong = grid(representations=GOOD["representations"] | {"smooth": changes})
    with pytest.raises(UsageError, match=message) as caught:
        runs_of(wrong, tmp_path)
    assert str(caught.value).startswith("representation 'smooth': ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", shipped_grids())
def test_a_shipped_grid_says_its_command_and_its_runs_can_be_built(name, tmp_path):
    path = shipped_grids()[name]
    assert path.read_text(encoding="utf-8").startswith(f"# timm-lt compare {name}\n")
    grid = load_grid(f"{name}.yaml")
    base = load_recipe(find_recipe(grid.recipe))
    runs = {run.representation: run for run in runs_of(grid, tmp_path, base=base, seeds=[0])}
    assert set(runs) == set(grid.representations)
    if name == "kang_table1":
        lr, trained = base.optimizer.lr, {"last_block": ["last_block"], "classifier": []}
        for representation, run in runs.items():
            factor = 0.1 if representation == "backbone_low_lr" else 1
            assert run.recipe.optimizer.lr == pytest.approx(factor * lr)
            assert run.recipe.model.trained == trained.get(representation)


def test_a_folder_with_something_else_is_refused(grid, tmp_path):
    found = grid()
    run = runs_of(found, tmp_path)[0]
    run.folder.mkdir(parents=True)
    other = dataclasses.replace(run.recipe, epochs=7)
    (run.folder / "recipe.yaml").write_text(other.to_yaml())
    with pytest.raises(UsageError, match=r"another recipe.*epochs 7 there"):
        runs_of(found, tmp_path)
    (tmp_path / "out" / "results.json").write_text('{"name": "kang_table2"}')
    with pytest.raises(UsageError, match=r"results.json is of another grid"):
        runs_of(found, tmp_path)


# ---- processes -----------------------------------------------------------------------------------

# A process in place of training: it notes when it ran, and leaves figures.
FINISH = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
folder.mkdir(parents=True, exist_ok=True)
started = time.time()
time.sleep(0.6)
with (folder.parents[2] / "times.txt").open("a") as file:
    variable = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ["OMP_NUM_THREADS"]
    file.write(f"{folder.parent.name} {started} {time.time()} {variable}\\n")
(folder / "metrics.json").write_text("{}")
"""
FAIL = "print('one'); print('error: there is no data'); raise SystemExit(2)"
KILL = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
HANG = "import time; time.sleep(60)"


class Processes(dict):
    """Scripts by name of a run, which are run in place of training."""

    def __init__(self, folder):
        self.folder, self.started, self.popen = folder, [], subprocess.Popen

    def start(self, command, **options):
        name = next(name for name in self if f"/{name}/" in " ".join(command))
        command = [command[0], "-S", "-c", self[name], *command[1:]]
        self.started.append(self.popen(command, **options))
        return self.started[-1]

    def make(self, sources=None, /, **scripts):
        self.update(scripts)
        runs = {}
        for name in scripts:
            source = runs.get((sources or {}).get(name))
            runs[name] = Run(name, 0, Recipe(), self.folder, source)
        return [*runs.values()]

    def times(self):
        return [line.split() for line in (self.folder / "times.txt").read_text().splitlines()]


@pytest.fixture
def processes(tmp_path, monkeypatch):
    processes = Processes(tmp_path)
    monkeypatch.setattr(comparison.subprocess, "Popen", processes.start)
    return processes


def test_so_many_run_side_by_side_and_each_behind_its_source(processes):
    made = processes.make({"after": "first"}, first=FINISH, b=FINISH, after=FINISH)
    assert run_all(jobs=2, threads=1, runs=made) == {}
    spans = {name: (float(start), float(end)) for name, start, end, _ in processes.times()}
    assert {threads for *_, threads in processes.times()} == {"1"}
    assert spans["after"][0] >= spans["first"][1]
    running = [sum(s <= t < e for s, e in spans.values()) for t, _ in spans.values()]
    assert max(running) == 2


def test_each_gpu_has_a_run(processes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab")
    assert visible_devices() == ["3", "GPU-ab"]
    run_all(processes.make(a=FINISH, b=FINISH, c=FINISH), jobs=3, threads=1)
    used = sorted(line[3] for line in processes.times())
    assert used in (["3", "3", "GPU-ab"], ["3", "GPU-ab", "GPU-ab"])


def test_failures_are_reported_and_the_same_again_goes_on_from_there(processes, caplog):
    sources = {"after": "broken", "behind": "after"}
    scripts = {"broken": FAIL, "dead": KILL, "good": FINISH, "after": FINISH, "behind": FINISH}
    broken, dead, good, after, behind = processes.make(sources, **scripts)
    failures = run_all(jobs=1, threads=1, runs=[broken, dead, good, after, behind])
    assert failures == {
        broken: "there is no data",
        dead: "killed by signal 9",
        after: "left out, since broken.seed_0 failed",
        behind: "left out, since after.seed_0 failed",
    }
    assert "broken.seed_0 failed: there is no data" in caplog.text
    processes["dead"] = FINISH
    assert list(run_all(jobs=1, threads=1, runs=[broken, dead, good])) == [broken]
    assert [name for name, *_ in processes.times()] == ["good", "dead"]
    # Another try keeps what the former printed.
    assert broken.log.read_text().count("no data") == 2


def test_ctrl_c_ends_the_processes(processes, monkeypatch):
    def start(*args, **kwargs):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        return processes.start(*args, **kwargs)

    monkeypatch.setattr(comparison.subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        run_all(processes.make(a=HANG, b=HANG), jobs=1, threads=1)
    assert [process.returncode for process in processes.started] == [-signal.SIGTERM]


# ---- figures -------------------------------------------------------------------------------------

SHOTS = {
    "many_shot": {"classes": 1, "rule": "> 100"},
    "medium_shot": {"classes": 5, "rule": "20 to 100"},
    "few_shot": {"classes": 4, "rule": "< 20"},
}
COMMON = {
    "source": "a paper",
    "recipe": "lt_test_resnet.digits_lt",
    "representations": {"joint": None, "smooth": {"loss.name": "balanced_softmax"}},
}
TABLE = COMMON | {
    "title": "Three methods",
    "quoted_from": "another data set",
    "rows": [
        ROW | {"label": "joint", "quoted": 0.444},
        ROW | {"label": "NCM", "head": "ncm"},
        ROW | {"label": "B|S", "representation": "smooth", "quoted": 0.514},
    ],
}
MATRIX = COMMON | {
    "title": "A grid",
    "metric": "error",
    "rows_title": "classifier",
    "columns_title": "representation",
    "rows": [
        {"label": label, "column": column, "representation": representation, "head": head}
        for label, head in (("CE", "linear"), ("NC", "ncm"))
        for column, representation in (("J", "joint"), ("S", "smooth"))
    ],
}
# Overall accuracies by representation and head, with seeds 0, 1 and 2.
ALL = {
    ("joint", "linear"): (0.50, 0.54, 0.52),
    ("joint", "ncm"): (0.60, 0.58, 0.62),
    ("smooth", "linear"): (0.55, 0.65, 0.60),
    ("smooth", "ncm"): (0.40, 0.40, 0.40),
}


@pytest.fixture
def measured(tmp_path):
    """Returns a function: a grid, seeds, failed runs -> record, table in Markdown."""

    def make(values, seeds=(0, 1, 2), failed=(), few=None, class_mean=None):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        grid = load_grid(str(tmp_path / "mine.yaml"))
        made = runs_of(grid, tmp_path, seeds=seeds)
        for run in made:
            heads = {}
            for head in ("linear", "ncm"):
                value = ALL[run.representation, head][run.seed]
                mean = value if class_mean is None else class_mean
                heads[head] = {"many_shot": value + 0.2, "medium_shot": value, "few_shot": few}
                heads[head] |= {"all": value, "class_mean": mean}
            run.folder.mkdir(parents=True)
            metrics = {"heads": heads, "shots": SHOTS, "note": None}
            (run.folder / "metrics.json").write_text(json.dumps(metrics))
        failures = {run: "no data" for run in made if str(run) in failed}
        record = measure(grid, grid.rows, made, failures)
        text = write_results(tmp_path / "out", grid, record)
        assert (tmp_path / "out" / "results.md").read_text() == text
        return record, text.splitlines()

    return make


def test_the_table_of_shot_groups(measured):
    _, lines = measured(TABLE, few=0.125)
    assert lines[0] == "Three methods, test accuracy in percent."
    assert lines[2] == "| method | many | medium | few | all | all, to the first row | quoted |"
    # 50, 54, 52: mean 52, squared deviations 4 + 4 + 0, over n - 1 = 2, sd 2.
    assert lines[4] == "| joint | 72.0 ± 2.0 | 52.0 ± 2.0 | 12.5 ± 0.0 | 52.0 ± 2.0 |  | 44.4 |"
    # Differences 10, 4, 10: mean 8, squared deviations 4 + 16 + 4, sd sqrt(12).
    assert lines[5].endswith("| 60.0 ± 2.0 | +8.0 ± 3.5 |  |")
    # 5, 11, 8: mean 8 too, but sd 3: pairs matter.
    smooth = "80.0 ± 5.0 | 60.0 ± 5.0 | 12.5 ± 0.0 | 60.0 ± 5.0 | +8.0 ± 3.0 | 51.4"
    assert lines[6] == f"| B\\|S | {smooth} |"
    for words in ("seeds 0, 1, 2", "few < 20 (4)", "quoted, not measured here: another data set"):
        assert words in lines[8]


def test_what_failed_is_left_out_and_an_unbalanced_split_has_the_mean_over_classes(measured):
    record, lines = measured(TABLE, failed=["smooth.seed_1"], class_mean=0.3)
    assert lines[2].split(" | ")[4:6] == ["all", "class mean"]
    assert list(record["rows"][2]["by_seed"]) == [0, 2]
    # 55 and 60; differences 5 and 8, and no class is few-shot here.
    assert lines[6] == (
        "| B\\|S (2 of 3 seeds) | 77.5 ± 3.5 | 57.5 ± 3.5 | - | 57.5 ± 3.5 | 30.0 ± 0.0 | "
        "+6.5 ± 2.1 | 51.4 |"
    )
    assert record["runs"]["smooth.seed_1"] == "no data"


def test_a_matrix_shows_errors(measured):
    _, lines = measured(MATRIX, failed=["smooth.seed_1", "smooth.seed_2"])
    assert lines[0] == "A grid, test error in percent."
    assert lines[2] == "| classifier / representation | J | S |"
    assert lines[4] == "| CE | 48.0 ± 2.0 | 45.0 (1 of 3 seeds) |"
    assert lines[5] == "| NC | 40.0 ± 2.0 | 60.0 (1 of 3 seeds) |"


def test_a_plot_shows_shot_groups_by_row_and_column(measured, tmp_path, monkeypatch):
    save, drawn = comparison.save_spread_plot, {}

    def draw(path, spreads, **options):
        drawn.update(spreads)
        save(path, spreads, **options)

    monkeypatch.setattr(comparison, "save_spread_plot", draw)
    grid = MATRIX | {"metric": "accuracy", "plot": True}
    _, lines = measured(grid, seeds=[0, 1], failed=["smooth.seed_1"], few=0.125)
    assert list(drawn) == ["many", "medium", "few", "all"]
    assert drawn["all"]["NC", "J"] == pytest.approx((0.59, 0.02**0.5 / 10))
    # The table has a row for each cell.
    assert lines[2].startswith("| classifier | representation | many |")
    assert lines[7] == "| NC (1 of 2 seeds) | S | 60.0 | 40.0 | 12.5 | 40.0 | -10.0 |"
    assert (tmp_path / "out" / "plots" / "mine.png").read_bytes()[1:4] == b"PNG"


# ---- the command ---------------------------------------------------------------------------------


def test_a_mistake_is_one_line_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        (["kang_tabel1"], ["no such file", "did you mean 'kang_table1'", "bbn_figure2"]),
        (["kang_table1", "--only", "B+C"], ["'B+C'", "LB + C"]),
        (["kang_table1", "--overwrite"], ["options of the recipe and its own"]),
    ):
        assert main(["compare", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert all(word in error for word in words)
    assert not list(tmp_path.iterdir())
    assert main(["compare"]) == 0
    assert "kang_table1: What is re-trained" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.exhaustive
def test_a_comparison_continues_and_tells_of_what_failed(grid, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {
        # Only the class counts show that one head is wrong.
        "heads": GOOD["heads"] | {"bold": {"kind": "fslwf", "base": 1000}},
        "representations": {
            "joint": {"epochs": 1},
            "again": AGAIN | {"epochs": 1},
            "broken": {"epochs": 1},
        },
        "rows": [*GOOD["rows"][:2], GOOD["rows"][3]],
    }
    changes["rows"].append(ROW | {"label": "broken", "representation": "broken", "head": "bold"})
    grid(**changes)
    arguments = ["compare", "mine.yaml", "--seeds", "3", "--threads", "1", "--output", "out"]
    joint = tmp_path / "out" / "runs" / "joint" / "seed_3"
    assert main([*arguments, "--jobs", "1", "--only", "joint"]) == 0
    times = {path: path.stat().st_mtime_ns for path in joint.rglob("*")}
    assert main([*arguments, "--jobs", "2"]) == 1
    said = capsys.readouterr()
    for words in (
        "1 of 3 runs are finished already",
        "broken.seed_3 failed: ",
        "needs two base classes",
    ):
        assert words in said.err
    assert "What is re-trained" in said.out
    assert times == {path: path.stat().st_mtime_ns for path in joint.rglob("*")}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["runs"]["joint.seed_3"], results["runs"]["again.seed_3"]) == 2 * ("finished",)
    metrics = json.loads((joint / "metrics.json").read_text())["heads"]
    figures = {row["label"]: row["by_seed"] for row in results["rows"]}
    for row, head in (("joint", "linear"), ("half", "half")):
        assert figures[row]["3"] == {key: metrics[head][key] for key in figures[row]["3"]}
    assert figures["broken"] == {}
    # Another recipe does not continue these runs.
    changes["representations"]["again"]["epochs"] = 3
    grid(**changes)
    assert main(arguments) == 2
    assert "another recipe (epochs 1 there, 3 now)" in capsys.readouterr().err
