"""Comparisons: a grid of representations and heads over seeds, its runs, and its table."""

import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from timm_lt.checkpoint import METRICS, PLOTS
from timm_lt.data import Splits
from timm_lt.data.sources import Split, check_protocol, checked_source, dataset_from_arrays
from timm_lt.models.pretrained import hub_configs
from timm_lt.models.repo import LOCAL_DIR
from timm_lt.report.plots import save_spread_plot
from timm_lt.report.tables import GROUPS, JOINT, group_word, percent, shot_legend
from timm_lt.run.folder import check_run_folder
from timm_lt.run.network import create_images, create_network
from timm_lt.run.parse import parse_values
from timm_lt.run.recipe import Recipe, prefixed
from timm_lt.run.setup import Run as TrainingRun
from timm_lt.run.setup import check_heads, create_trainer
from timm_lt.utils.accelerator import (
    VISIBLE_DEVICES,
    create_accelerator,
    fresh_accelerate,
    visible_devices,
)
from timm_lt.utils.checks import UsageError, check_choice, check_mapping, check_number
from timm_lt.utils.console import log, one_line
from timm_lt.utils.files import read_json, read_yaml, write_atomic, write_json

# Keys of a representation beside those of a recipe.
AFTER, LR_FACTOR = "after", "lr_factor"
# Rows are compared on the same images by the same figures: representations leave these keys alone,
# but for their own ones of the data.
SHARED = ("seed", "heads", "protocol", "shot_rule", "objective", "data")
OWN_DATA = ("data.augmentation", "data.augmentation_options", "data.image_size", "data.verify")
CLASS_MEAN = "class_mean"
# Seconds between two looks at the processes.
POLL_SECONDS = 0.2
RESULTS, MARKDOWN = "results.json", "results.md"
# Mean and sample standard deviation of a figure over the seeds, where they exist.
Spread = tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table, or one cell of a row if it has columns; ``quoted`` is a fraction."""

    label: str
    column: str | None = None
    representation: str
    head: str
    quoted: float | None = None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table to measure, as a YAML file describes it; docs/comparison.md explains the keys."""

    name: str
    title: str
    source: str
    recipe: str
    representations: dict[str, dict[str, Any]]
    rows: list[Row]
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)
    metric: Literal["accuracy", "error"] = "accuracy"
    plot: bool = False
    rows_title: str = "method"
    columns_title: str = "head"
    quoted_from: str | None = None

    def __post_init__(self) -> None:
        names = tuple(self.representations)
        for number, (name, changes) in enumerate(self.representations.items()):
            if changes.get(AFTER) is not None:
                check_choice(f"representation before {name!r}:", changes[AFTER], names[:number])
        for row in self.rows:
            check_choice(f"representation of {row.label!r}:", row.representation, names)
            check_number(f"quoted of {row.label!r}", row.quoted or 0.0, "[0, 1]")
        cells, matrix = {(row.label, row.column) for row in self.rows}, self.metric == "error"
        for is_wrong, fault in (
            # Names of representations become names of folders.
            (not all(map(str.isidentifier, names)), "names must be letters, digits, underscores"),
            (len(cells) < len(self.rows), "rows must differ in label or column"),
            ((self.plot or matrix) and not self.columns, "plot and metric error need columns"),
        ):
            if is_wrong:
                raise UsageError(fault)

    @property
    def columns(self) -> list[str]:
        """Labels of the columns from left to right."""
        return list(dict.fromkeys(row.column for row in self.rows if row.column is not None))


def shipped_grids() -> dict[str, Path]:
    """Returns the files of the shipped grids by name."""
    return {path.stem: path for path in hub_configs("tables")}


def load_grid(name: str) -> Grid:
    """Reads a grid: a file, or a shipped grid by its name with or without ``.yaml``."""
    shipped, path = shipped_grids(), Path(name)
    if not path.is_file():
        check_choice("grid (and no such file):", path.stem, tuple(shipped))
        path = shipped[path.stem]
    values = {"name": path.stem, **read_yaml(path, "grid")}
    with prefixed(f"grid {path}"):
        return parse_values(Grid, values)


@dataclass(frozen=True, eq=False)
class Run:
    """A representation trained with a seed, starting from the model of run ``after``."""

    representation: str
    seed: int
    recipe: Recipe
    output: Path
    after: "Run | None"

    def __str__(self) -> str:
        return f"{self.representation}.seed_{self.seed}"

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.output / "runs" / self.representation / f"seed_{self.seed}"

    @property
    def log(self) -> Path:
        """Output of the run."""
        return self.output / "logs" / f"{self}.log"

    @property
    def is_finished(self) -> bool:
        """Whether the run has figures."""
        return (self.folder / METRICS).is_file()


def make_runs(
    grid: Grid,
    rows: Sequence[Row],
    base: Recipe,
    folder: Path,
    *,
    seeds: Sequence[int],
    given: Sequence[str] = (),
) -> list[Run]:
    """Creates and checks the runs of some rows; ``given`` are keys set on the command line."""
    check_protocol(base.data.name, base.protocol)
    checked_source(base.data.name, base.data.root, dict(base.data.options))
    results = folder / RESULTS
    if results.is_file() and read_json(results).get("name") != grid.name:
        raise UsageError(f"{results} is of another grid; choose another --output")
    after = {name: str(own.get(AFTER)) for name, own in grid.representations.items()}
    needed = {row.representation for row in rows}
    for name in reversed(after):
        needed |= {after[name]} if name in needed else set()
    runs: dict[tuple[str, int], Run] = {}
    for name in (name for name in after if name in needed):
        with prefixed(f"representation {name!r}"):
            recipe = _recipe(grid, name, base, given)
            _try_out(recipe)
        for seed in seeds:
            source, model = runs.get((after[name], seed)), recipe.model
            if source is not None:
                model = replace(model, name=f"{LOCAL_DIR}{source.folder}", pretrained=True)
            own = replace(recipe, seed=seed, model=model)
            run = runs[name, seed] = Run(name, seed, own, folder.resolve(), source)
            check_run_folder(run.folder, own, resume=True)
    # Sources first: a run that waits for one keeps a job idle.
    return sorted(runs.values(), key=lambda run: run.after is not None)


def _recipe(grid: Grid, name: str, base: Recipe, given: Sequence[str]) -> Recipe:
    """Returns the recipe of a representation, with the heads of all of its rows."""
    changes = dict(grid.representations[name])
    shared: tuple[str, ...] = SHARED
    if changes.pop(AFTER, None) is not None:
        changes["model.pretrained"], shared = True, (*SHARED, "model.name")
    factor = check_number(LR_FACTOR, changes.pop(LR_FACTOR, 1.0), "(0, inf)")
    if "epochs" in given:
        # To try a grid out.
        changes.pop("epochs", None)
    values = dataclasses.asdict(base)
    for key, value in changes.items():
        if key.startswith(shared) and key not in OWN_DATA:
            raise UsageError(f"{key} must be the same for all rows; set it in the recipe")
        part, _, inner = key.partition(".")
        values[part] = check_mapping(part, values.get(part)) | {inner: value} if inner else value
    for key in given:
        if key.startswith(("seed", "heads", *changes)):
            raise UsageError(f"--{key} is set by the grid (seeds by --seeds); remove it")
    recipe = parse_values(Recipe, values)
    optimizer = replace(recipe.optimizer, lr=recipe.optimizer.lr * factor)
    names = [JOINT, *(row.head for row in grid.rows if row.representation == name)]
    heads = {head: {**base.heads, **grid.heads}.get(head, {}) for head in names}
    return replace(recipe, heads=heads, optimizer=optimizer)


def _try_out(recipe: Recipe) -> None:
    """Builds the parts of a run on black images, so that a mistake is found before any run."""
    check_heads(recipe)
    if not recipe.epochs or recipe.model.name.startswith(LOCAL_DIR):
        return
    labels = np.arange(2 * recipe.batch_size) % 2
    images = np.zeros((len(labels), 8, 8, 3), np.uint8)
    split = dataset_from_arrays(images, labels, ["first", "second"])
    splits = Splits.from_datasets(dict.fromkeys(get_args(Split), split))
    model = replace(recipe.model, pretrained=False, fresh_classifier=False)
    trial = replace(recipe, model=model, heads={JOINT: {}}, objective=None)
    with fresh_accelerate():
        accelerator = create_accelerator(accumulation_steps=recipe.accumulation_steps)
        network = create_network(trial, 2)
        run = TrainingRun("trial", trial, None, accelerator, splits, network, False)
        run.images = create_images(trial, splits, network, workers=0)
        create_trainer(run)


def run_all(runs: Sequence[Run], *, jobs: int, threads: int) -> dict[Run, str]:
    """Runs what is not finished yet in ``jobs`` processes, and returns why some runs failed.

    GPUs share the processes evenly. Ctrl-C and SIGTERM end them; their runs can be resumed.
    """
    waiting = [run for run in runs if not run.is_finished]
    log.info("%d of %d runs are finished already", len(runs) - len(waiting), len(runs))
    active: dict[Run, tuple[subprocess.Popen[bytes], str | None]] = {}
    failures: dict[Run, str] = {}
    try:
        while waiting or active:
            for run, (process, _) in [*active.items()]:
                if process.poll() is not None:
                    del active[run]
                    if failure := _failure(run, process.returncode):
                        failures[run] = failure
            for run in [*waiting]:
                if run.after in failures:
                    failures[run] = f"left out, since {run.after} failed"
                    waiting.remove(run)
                elif len(active) < jobs and (run.after is None or run.after.is_finished):
                    used = [device for _, device in active.values()]
                    device = min(visible_devices(), key=used.count, default=None)
                    active[run] = _start(run, threads, device), device
                    waiting.remove(run)
            time.sleep(POLL_SECONDS)
    finally:
        for process, _ in active.values():
            process.terminate()
        for process, _ in active.values():
            process.wait()
    return failures


def _start(run: Run, threads: int, device: str | None) -> subprocess.Popen[bytes]:
    """Starts the process of a run, whose output goes to its log."""
    recipe = run.output / "recipes" / f"{run}.yaml"
    write_atomic(recipe, run.recipe.to_yaml())
    run.log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "timm_lt", "train", str(recipe), "--resume"]
    command += ["--output", str(run.folder), "--threads", str(threads)]
    own = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}
    own |= {} if device is None else {VISIBLE_DEVICES: device}
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    log.info("%s started", run)
    with run.log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, env=os.environ | own, **streams)


def _failure(run: Run, status: int) -> str | None:
    """Returns why the process of a run failed; None if the run is finished."""
    if run.is_finished:
        log.info("%s finished", run)
        return None
    lines = run.log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next(filter(str.strip, reversed(lines)), "").removeprefix("error: ")
    failure = one_line(last, 500) if status > 0 else f"killed by signal {-status}"
    log.error("%s failed: %s (%s)", run, failure, run.log)
    return failure


def measure(
    grid: Grid, rows: Sequence[Row], runs: Sequence[Run], failures: Mapping[Run, str]
) -> dict[str, Any]:
    """Returns the record of a comparison: accuracies by row and seed, without failed runs."""
    measured = [(run, read_json(run.folder / METRICS)) for run in runs if run not in failures]
    heads = [head for _, found in measured for head in found["heads"].values()]
    balanced = all(abs(head["all"] - head[CLASS_MEAN]) < 1e-9 for head in heads)
    figures = [*GROUPS, "all", *([] if balanced else [CLASS_MEAN])]
    records = []
    for row in rows:
        by_seed = {
            run.seed: {key: found["heads"][row.head][key] for key in figures}
            for run, found in measured
            if run.representation == row.representation
        }
        records.append({**vars(row), "by_seed": by_seed})
    one = measured[0][1] if measured else {}
    quoted = any(row.quoted is not None for row in rows)
    return {
        "title": f"{grid.title}, test {grid.metric} in percent",
        "name": grid.name,
        "source": grid.source,
        "quoted_from": (grid.quoted_from or grid.source) if quoted else None,
        "shots": one.get("shots"),
        "note": one.get("note"),
        "seeds": sorted({run.seed for run in runs}),
        "figures": figures,
        "rows": records,
        "runs": {str(run): failures.get(run, "finished") for run in runs},
    }


def write_results(folder: Path, grid: Grid, record: Mapping[str, Any]) -> str:
    """Writes the record of a comparison, its table and its plot, and returns the Markdown."""
    write_json(folder / RESULTS, record)
    headings, *rows = table_texts(grid, record)
    lines = [headings, ["---", *("---:" for _ in headings[1:])], *rows]
    texts = [" | ".join(text.replace("|", "\\|") for text in line) for line in lines]
    table = "\n".join(f"| {text} |" for text in texts)
    quoted = record["quoted_from"]
    below = [
        f"seeds {', '.join(map(str, record['seeds']))}: mean ± standard deviation",
        record["shots"] and shot_legend(record["shots"]),
        quoted and f"quoted, not measured here: {quoted}",
        record["note"],
    ]
    markdown = f"{record['title']}.\n\n{table}\n\n{'; '.join(filter(None, below))}.\n"
    write_atomic(folder / MARKDOWN, markdown)
    if grid.plot:
        cells = {(row["label"], row["column"]): row for row in record["rows"]}
        spreads = {
            group_word(key): {cell: spread(row, key) for cell, row in cells.items()}
            for key in record["figures"]
        }
        save_spread_plot(folder / PLOTS / f"{grid.name}.png", spreads, title=grid.rows_title)
    return markdown


def table_texts(grid: Grid, record: Mapping[str, Any]) -> list[list[str]]:
    """Returns the texts of the table, headings first: a matrix, or shot groups by row."""
    rows, seeds = record["rows"], len(record["seeds"])
    finished = [len(row["by_seed"]) for row in rows]
    missing = [f" ({number} of {seeds} seeds)" if number < seeds else "" for number in finished]
    if grid.columns and not grid.plot:
        lines = {row["label"]: [row["label"], *([""] * len(grid.columns))] for row in rows}
        for row, note in zip(rows, missing, strict=True):
            mean, sd = spread(row, "all")
            mean = 1 - mean if grid.metric == "error" and mean is not None else mean
            texts = lines[row["label"]]
            texts[1 + grid.columns.index(row["column"])] = spread_text((mean, sd)) + note
        return [[f"{grid.rows_title} / {grid.columns_title}", *grid.columns], *lines.values()]
    labels = [row["label"] + note for row, note in zip(rows, missing, strict=True)]
    table = {grid.rows_title: labels}
    if grid.columns:
        table[grid.columns_title] = [row["column"] for row in rows]
    for key in record["figures"]:
        heading = group_word(key).replace("_", " ")
        table[heading] = [spread_text(spread(row, key)) for row in rows]
    others = [spread_text(spread(row, "all", rows[0]), "+.1f") for row in rows[1:]]
    table["all, to the first row"] = ["", *others]
    if record["quoted_from"]:
        quoted = [row["quoted"] for row in rows]
        table["quoted"] = ["" if value is None else percent(value) for value in quoted]
    return [[*table], *map(list, zip(*table.values(), strict=True))]


def spread(row: Mapping[str, Any], key: str, minus: Mapping[str, Any] | None = None) -> Spread:
    """Returns mean and deviation of a figure, or of its difference to another row by seed."""
    values = []
    for seed, figures in row["by_seed"].items():
        other = {key: 0.0} if minus is None else minus["by_seed"].get(seed, {key: None})
        if figures[key] is not None and other[key] is not None:
            values.append(figures[key] - other[key])
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def spread_text(spread: Spread, form: str = ".1f") -> str:
    """Returns a mean and its standard deviation, fractions, in percent.

    >>> spread_text((0.5, 0.0123)), spread_text((-0.02, None), "+.1f"), spread_text((None, None))
    ('50.0 ± 1.2', '-2.0', '-')
    """
    mean, sd = spread
    text = "-" if mean is None else format(100 * mean, form)
    return text if sd is None else f"{text} ± {100 * sd:.1f}"
