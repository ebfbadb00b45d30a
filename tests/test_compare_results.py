"""The figures of comparisons: means and differences worked out by hand; tables and plot."""

import json
import re

import pytest
from rich.console import Console

from timm_lt.run.comparison import (
    Outcome,
    Spread,
    collect,
    load_grid,
    make_plan,
    markdown_table,
    rich_table,
    write_results,
)
from timm_lt.run.parse import find_recipe, load_recipe

BASE = load_recipe(find_recipe("lt_test_resnet.digits_lt"))
SHOTS = {
    "many_shot": {"classes": 1, "rule": "> 100"},
    "medium_shot": {"classes": 5, "rule": "20 to 100"},
    "few_shot": {"classes": 4, "rule": "< 20"},
}
TABLE = """
title: Three methods
source: a paper, table 7
recipe: lt_test_resnet.digits_lt
quoted_from: another data set
representations: {joint: , smooth: {loss: {name: balanced_softmax}}}
rows:
  - {label: joint, representation: joint, head: linear, quoted: {many_shot: .659, all: .444}}
  - {label: NCM, representation: joint, head: ncm}
  - {label: B|S, representation: smooth, head: linear, quoted: {all: .514}}
"""
MATRIX = """
title: A grid
source: a paper, figure 2
recipe: lt_test_resnet.digits_lt
metric: error
rows_title: classifier
columns_title: representation
representations: {joint: , smooth: {loss: {name: balanced_softmax}}}
rows: [{label: CE, head: linear}, {label: NC, head: ncm}]
columns: [{label: J, representation: joint}, {label: S, representation: smooth}]
"""
# Overall accuracies by representation, head and seed: hundredths, by hand below.
ALL = {
    ("joint", "linear"): {0: 0.50, 1: 0.54, 2: 0.52},
    ("joint", "ncm"): {0: 0.60, 1: 0.58, 2: 0.62},
    ("smooth", "linear"): {0: 0.55, 1: 0.65, 2: 0.60},
    ("smooth", "ncm"): {0: 0.40, 1: 0.40, 2: 0.40},
}


def figures(value, *, few=None, class_mean=None):
    return {
        "many_shot": value + 0.2,
        "medium_shot": value,
        "few_shot": few,
        "all": value,
        "class_mean": value if class_mean is None else class_mean,
    }


@pytest.fixture
def compared(tmp_path):
    """Returns a function: grid text, seeds, failed runs -> plan, comparison, outcomes."""

    def make(text, seeds=(0, 1, 2), failed=(), **options):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        plan = make_plan(load_grid(path), BASE, tmp_path / "out", seeds=seeds)
        outcomes = {}
        for run in plan.runs:
            if run.name in failed:
                outcomes[run] = Outcome("failed", 1.0, "no data")
                continue
            heads = {
                head: figures(ALL[run.representation, head][run.seed], **options)
                for head in ("linear", "ncm")
            }
            run.folder.mkdir(parents=True)
            metrics = {"heads": heads, "shots": SHOTS, "note": None, "threads": 4}
            metrics["seconds"] = {"data": 1.5, "representation": 30.0, "heads": {"ncm": 0.75}}
            (run.folder / "metrics.json").write_text(json.dumps(metrics))
            outcomes[run] = Outcome("finished", 2.5)
        return plan, collect(plan, outcomes), outcomes

    return make


def shown(plan, comparison):
    console = Console(width=130, record=True, file=None)
    with console.capture() as capture:
        console.print(rich_table(plan, comparison))
    return capture.get()


def test_means_deviations_and_paired_differences_by_hand(compared):
    _, comparison, _ = compared(TABLE)
    joint, ncm, smooth = comparison.cells
    # 50, 54, 52: mean 52, squared deviations 4 + 4 + 0, over n - 1 = 2, sd 2.
    assert joint.spreads["all"].mean == pytest.approx(0.52)
    assert joint.spreads["all"].sd == pytest.approx(0.02)
    assert joint.spreads["many_shot"].mean == pytest.approx(0.72)
    assert joint.differences == {}
    # 10, 4, 10: mean 8, squared deviations 4 + 16 + 4, sd sqrt(12).
    assert ncm.differences["all"] == pytest.approx({0: 0.10, 1: 0.04, 2: 0.10})
    assert ncm.difference_spreads["all"].mean == pytest.approx(0.08)
    assert ncm.difference_spreads["all"].sd == pytest.approx(0.12**0.5 / 10)
    # 5, 11, 8: mean 8 too, but sd 3: pairs matter.
    assert smooth.difference_spreads["all"].mean == pytest.approx(0.08)
    assert smooth.difference_spreads["all"].sd == pytest.approx(0.03)
    # No class is few-shot here.
    assert joint.spreads["few_shot"] == ncm.difference_spreads["few_shot"] == Spread(None, None)


def test_one_seed_has_no_deviation(compared):
    plan, comparison, _ = compared(TABLE, seeds=[1])
    assert comparison.cells[0].spreads["all"] == Spread(0.54, None)
    table = markdown_table(plan, comparison)
    assert "| NCM | 78.0 | 58.0 | - | 58.0 | +4.0 |" in table
    assert "seed 1; shots: many > 100 (1 classes)" in table


def test_what_failed_is_left_out_of_pairs_and_said(compared):
    plan, comparison, _ = compared(TABLE, failed=["smooth.seed_1"])
    smooth = comparison.cells[2]
    assert list(smooth.per_seed) == [0, 2]
    assert smooth.spreads["all"].mean == pytest.approx(0.575)
    assert smooth.differences["all"] == pytest.approx({0: 0.05, 2: 0.08})
    assert "B|S (2 of 3 seeds)" in shown(plan, comparison)
    plan, comparison, _ = compared(TABLE, seeds=[0], failed=["smooth.seed_0", "joint.seed_0"])
    assert "| NCM (0 of 1 seeds) | - | - | - | - | - |" in markdown_table(plan, comparison)


def test_the_table_of_shot_groups(compared):
    plan, comparison, _ = compared(TABLE, few=0.125)
    lines = markdown_table(plan, comparison).splitlines()
    assert lines[0] == "Three methods, test accuracy in percent."
    assert lines[2] == "| method | many | medium | few | all | all, to the first row | quoted |"
    assert lines[4] == (
        "| joint | 72.0 ± 2.0 | 52.0 ± 2.0 | 12.5 ± 0.0 | 52.0 ± 2.0 |  | 65.9 / 44.4 |"
    )
    assert lines[6] == (
        "| B\\|S | 80.0 ± 5.0 | 60.0 ± 5.0 | 12.5 ± 0.0 | 60.0 ± 5.0 | +8.0 ± 3.0 | 51.4 |"
    )
    assert "quoted, not measured here: another data set" in lines[8]
    terminal = shown(plan, comparison)
    for text in (*lines[4].split(" | ")[1:5], "seeds 0, 1, 2", "paired by seed", "few < 20 (4)"):
        assert text.strip() in terminal


def test_an_unbalanced_split_has_the_mean_over_classes_beside(compared):
    plan, comparison, _ = compared(TABLE, class_mean=0.3)
    heading, _, joint = markdown_table(plan, comparison).splitlines()[2:5]
    assert heading.split(" | ")[4:6] == ["all", "class mean"]
    assert joint.split(" | ")[5] == "30.0 ± 0.0"


def test_a_matrix_shows_errors(compared):
    plan, comparison, _ = compared(MATRIX)
    lines = markdown_table(plan, comparison).splitlines()
    assert lines[0] == "A grid, test error in percent."
    assert lines[2] == "| classifier \\\\ representation | J | S |"
    assert lines[4] == "| CE | 48.0 ± 2.0 | 40.0 ± 5.0 |"
    assert lines[5] == "| NC | 40.0 ± 2.0 | 60.0 ± 0.0 |"
    assert "paired" not in lines[7]
    assert re.search(r"CE +48\.0 ± 2\.0 +40\.0 ± 5\.0", shown(plan, comparison))


def test_results_are_written_with_all_figures_and_a_plot(compared, tmp_path):
    plan, comparison, outcomes = compared(
        MATRIX.replace("metric: error\n", "") + "plot: true\n",
        seeds=[0, 1],
        failed=["smooth.seed_1"],
        few=0.125,
    )
    folder = tmp_path / "out"
    write_results(folder, plan, comparison, outcomes, command=["timm-lt", "x y"], threads=2)
    results = json.loads((folder / "results.json").read_text())
    assert results["command"] == "timm-lt 'x y'"
    assert (results["seeds"], results["shots"], results["shot_rule"]) == ([0, 1], SHOTS, "fb")
    cell = results["cells"][2]
    assert (cell["row"], cell["column"], cell["head"]) == ("NC", "J", "ncm")
    assert cell["per_seed"]["1"]["all"] == 0.58
    assert cell["mean"]["all"] == pytest.approx(0.59)
    assert cell["difference_to_first"]["all"]["per_seed"] == pytest.approx({"0": 0.10, "1": 0.04})
    runs = {(run["representation"], run["seed"]): run for run in results["runs"]}
    assert runs["smooth", 1]["status"] == "failed"
    assert runs["smooth", 1]["message"] == "no data"
    assert runs["joint", 0]["folder"] == "runs/joint/seed_0"
    # Those of the run itself, which may be of another day.
    assert (runs["joint", 0]["seconds"], runs["joint", 0]["threads"]) == (32.2, 4)
    assert "--threads 4" in runs["joint", 0]["command"]
    assert (runs["smooth", 1]["seconds"], runs["smooth", 1]["threads"]) == (1.0, 2)
    assert (folder / "plots" / "mine.png").read_bytes()[1:4] == b"PNG"
    # By shot group, as the plot is, a row for each cell.
    table = (folder / "results.md").read_text()
    assert "| classifier | representation | many |" in table
    assert "| NC | S (1 of 2 seeds) | 60.0 | 40.0 | 12.5 | 40.0 | -10.0 |" in table
