"""What a grid says: representations, heads, and the rows and columns of its table.

What can be wrong with the recipes of a comparison and is found without their data.

From a grid to runs: the recipe of each representation and seed, checked before any runs.

Running the runs of a comparison: some side by side, each a process of its own.

The figures of a comparison: by seed, mean, standard deviation, and paired differences.

The tables of a comparison, in the paper's layout: on the terminal, and in Markdown.

The plot of a comparison: accuracy by shot group, as in figure 1 of Kang et al.

The folder of a comparison: whose it is, and the results in it.
"""

import copy
import dataclasses
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import yaml
from rich.markup import escape
from rich.table import Table

import timm_lt
from timm_lt.checkpoint import METRICS, PLOTS, RECIPE, read_config
from timm_lt.data import Splits
from timm_lt.data.sources import check_protocol, checked_source, dataset_from_arrays
from timm_lt.fitting import AUTO, FITS
from timm_lt.models.create import LOCAL_DIR, split_options
from timm_lt.models.published import hub_configs
from timm_lt.report.plots import COLORS, write_figure
from timm_lt.report.tables import GROUPS, group_word, new_table, shot_legend
from timm_lt.run.folder import (
    LOCK,
    OCCUPIED,
    check_places,
    differences,
    is_running,
    lock_folder,
    recipe_differences,
    release_run_folder,
)
from timm_lt.run.network import create_images, create_network
from timm_lt.run.parse import parse_recipe
from timm_lt.run.recipe import ModelRecipe, Recipe, head_kind
from timm_lt.run.setup import (
    check_heads,
    create_training_loss,
    create_training_sampler,
    training_options,
)
from timm_lt.training import RepresentationTrainer, check_model
from timm_lt.utils.accelerator import available_cores, create_accelerator, fresh_accelerate
from timm_lt.utils.checks import UsageError, check_choice, check_number, shown_names, unknown_name
from timm_lt.utils.console import log, one_line
from timm_lt.utils.files import read_json, read_yaml, write_atomic, write_json, yaml_text

# In a representation, beside keys of the recipe: which other it goes on from, and the factor of the
# recipe's learning rate.
AFTER, LR_FACTOR = "after", "lr_factor"
FIGURES = (*GROUPS, "all")
Metric = Literal["accuracy", "error"]


@dataclass(frozen=True)
class Line:
    """A row or a column of the table.

    Attributes:
        label: What it is called.
        representation: Which one its cells have; None leaves it to the other direction.
        head: Which head, likewise.
        quoted: The paper's own accuracies by shot group and "all", fractions; those that are known.
    """

    label: str
    representation: str | None = None
    head: str | None = None
    quoted: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A place of the table; without columns, a row is one.

    Attributes:
        row: Label of its row.
        column: Label of its column, None without columns.
        representation: What is trained.
        head: Name of the head whose figures it has.
        quoted: As of its row.
    """

    row: str
    column: str | None
    representation: str
    head: str
    quoted: Mapping[str, float]


@dataclass(frozen=True)
class Grid:
    """A grid, as its file states it; every name in it that can be checked without a recipe is.

    Attributes:
        name: The file's, without ``.yaml``.
        title: Line above the table.
        source: The paper's table or figure.
        recipe: File or name of the recipe that all runs share.
        representations: By name, what each changes in the recipe; and ``after``, the one whose
            model it starts from, and ``lr_factor``, by which the recipe's rate is multiplied.
        rows: The rows, from above.
        columns: The columns, from the left; without any, columns are shot groups.
        heads: Heads under names of their own, as in a recipe.
        metric: What a table with columns shows, accuracy or error over the test images.
        plot: Draw the figures by shot group; needs columns.
        rows_title: What rows are, where there are columns.
        columns_title: What columns are.
        quoted_from: Where the quoted figures are from, and of which data and network.
    """

    name: str
    title: str
    source: str
    recipe: str
    representations: Mapping[str, Mapping[str, Any]]
    rows: tuple[Line, ...]
    columns: tuple[Line, ...] = ()
    heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metric: Metric = "accuracy"
    plot: bool = False
    rows_title: str = "method"
    columns_title: str = ""
    quoted_from: str | None = None

    def cells(self, only: list[str] | None = None) -> list[Cell]:
        """Returns the cells, row by row.

        Args:
            only: Labels of rows; None are all.

        Raises:
            UsageError: If there is no such row, or a cell has no representation or no head, or two.
        """
        labels = [row.label for row in self.rows]
        for label in only or []:
            if label not in labels:
                raise unknown_name(f"row of {self.name}:", label, labels)
        rows = [row for row in self.rows if only is None or row.label in only]
        columns = self.columns or (None,)
        return [_cell(row, column) for row in rows for column in columns]

    def ancestors(self, representation: str) -> list[str]:
        """Returns the representations from which one goes on, the nearest first.

        Raises:
            UsageError: If they go round in a circle.
        """
        found: list[str] = []
        after = self.representations[representation].get(AFTER)
        while after is not None:
            if after in {*found, representation}:
                raise UsageError(f"representation {representation!r} comes after itself")
            found.append(after)
            after = self.representations[after].get(AFTER)
        return found


def shipped_grids() -> dict[str, Path]:
    """Returns the files of the shipped grids by name."""
    return {path.stem: path for path in hub_configs("tables")}


def find_grid(name: str) -> Path:
    """Returns the file of a grid: a path, or the name of a shipped one with or without ``.yaml``.

    Raises:
        UsageError: If there is none; lists the shipped ones.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_grids()
    if name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    raise unknown_name("grid (and no such file):", name, list(shipped))


def load_grid(path: Path) -> Grid:
    """Reads a grid and checks it, as far as that goes without its recipe.

    Raises:
        UsageError: If the file is no YAML mapping, a key is unknown, missing or of the wrong type,
            or a row names what is not there; the message names the file.
    """
    values = read_yaml(path, "grid")
    try:
        grid = _parse(path.stem, values)
        _check_names(grid)
    except UsageError as error:
        raise UsageError(f"grid {path}: {error}") from error
    return grid


def _parse(name: str, values: dict[str, Any]) -> Grid:
    known = [f.name for f in fields(Grid) if f.name != "name"]
    for key in values:
        if key not in known:
            raise unknown_name("key", key, known)
    for key in ("title", "source", "recipe", "representations", "rows"):
        if not values.get(key):
            raise UsageError(f"{key} is missing")
    for key in ("title", "source", "recipe", "rows_title", "columns_title", "quoted_from"):
        if not isinstance(values.get(key, ""), str):
            raise UsageError(f"{key} must be a text, got {values[key]!r}")
    check_choice("metric", values.get("metric", "accuracy"), get_args(Metric))
    if not isinstance(values.get("plot", False), bool):
        raise UsageError(f"plot must be true or false, got {values['plot']!r}")
    lines = {key: _lines(key, values.get(key, [])) for key in ("rows", "columns")}
    parts = {key: _mappings(key, values.get(key, {})) for key in ("representations", "heads")}
    return Grid(name=name, **values | lines | parts)


def _mappings(key: str, value: object) -> dict[str, dict[str, Any]]:
    """Checks a mapping of names to mappings; nothing behind a name is an empty one."""
    if not isinstance(value, dict) or not all(isinstance(v, dict | None) for v in value.values()):
        raise UsageError(f"{key} must map names to mappings, got {value!r}")
    for name in value:
        # They are names of folders.
        if not isinstance(name, str) or not name.isidentifier():
            raise UsageError(f"{key}: {name!r} must be letters, digits and underscores")
    return {name: inner or {} for name, inner in value.items()}


def _lines(key: str, value: object) -> tuple[Line, ...]:
    """Checks the rows or columns."""
    if not isinstance(value, list) or not all(isinstance(line, dict) for line in value):
        raise UsageError(f"{key} must be a list of mappings, got {value!r}")
    known = [f.name for f in fields(Line)]
    lines: list[Line] = []
    for number, given in enumerate(value, 1):
        for name in given:
            if name not in known:
                raise unknown_name(f"key of {key} {number}:", name, known)
        texts = {name: given[name] for name in ("label", "representation", "head") if name in given}
        if "label" not in given or not all(isinstance(text, str) for text in texts.values()):
            raise UsageError(f"{key} {number} needs a label, and texts: got {given!r}")
        if given["label"] in [line.label for line in lines]:
            raise UsageError(f"{key} has the label {given['label']!r} twice")
        lines.append(Line(**texts, quoted=_quoted(given["label"], given.get("quoted", {}))))
    return tuple(lines)


def _quoted(label: str, value: object) -> dict[str, float]:
    if not isinstance(value, dict):
        raise UsageError(f"quoted of {label!r} must map shot groups to fractions, got {value!r}")
    for key in value:
        check_choice(f"figure quoted of {label!r}:", key, FIGURES)
    return {key: check_number(f"{key} of {label!r}", v, "[0, 1]") for key, v in value.items()}


def _cell(row: Line, column: Line | None) -> Cell:
    both = (row,) if column is None else (row, column)
    name = " / ".join(repr(line.label) for line in both)
    found: dict[str, str] = {}
    for what in ("representation", "head"):
        given = [getattr(line, what) for line in both if getattr(line, what) is not None]
        if len(given) != 1:
            raise UsageError(f"{name} has {len(given) or 'no'} {what}s: give one")
        found[what] = given[0]
    quoted = row.quoted if column is None else {}
    return Cell(row.label, None if column is None else column.label, quoted=quoted, **found)


def _check_names(grid: Grid) -> None:
    """Checks the names of representations, and that all of them are used."""
    names = list(grid.representations)
    for name, changes in grid.representations.items():
        if changes.get(AFTER) is not None and changes[AFTER] not in names:
            raise unknown_name(f"representation after which {name!r} comes:", changes[AFTER], names)
    used: set[str] = set()
    for cell in grid.cells():
        if cell.representation not in names:
            raise unknown_name(f"representation of {cell.row!r}:", cell.representation, names)
        used |= {cell.representation, *grid.ancestors(cell.representation)}
    unused = [name for name in names if name not in used]
    if unused:
        raise UsageError(f"representation {unused[0]!r} is in no row: leave it out")
    if grid.plot and not grid.columns:
        raise UsageError("plot needs columns")
    if grid.metric == "error" and (grid.plot or not grid.columns):
        raise UsageError("metric error is for a table with columns and without a plot")
    if grid.columns and any(row.quoted for row in grid.rows):
        raise UsageError("quoted figures need a table without columns")


def check_recipes(grid: Grid, recipes: Mapping[str, Recipe]) -> None:
    """Checks all that a run checks before it trains, but for what its images and labels show.

    Args:
        grid: The grid.
        recipes: By representation, each behind the one from which it goes on.

    Raises:
        UsageError: For a wrong recipe; the message names its representation.
    """
    splits, networks = _two_images(), dict[str, ModelRecipe]()
    for name, recipe in recipes.items():
        after = grid.representations[name].get(AFTER)
        try:
            _check_without_model(recipe)
            networks[name] = (
                _network(recipe.model)
                if after is None
                else _network_after(recipe.model, networks[after], recipes[after])
            )
            _check_with_model(recipe, networks[name], splits)
        except UsageError as error:
            raise UsageError(f"representation {name!r}: {error}") from error


def _check_without_model(recipe: Recipe) -> None:
    check_heads(recipe)
    check_protocol(recipe.data.name, recipe.protocol)
    checked_source(recipe.data.name, recipe.data.root, dict(recipe.data.options))


def _check_with_model(recipe: Recipe, network: ModelRecipe, splits: Splits) -> None:
    """Checks the parts that go together, made of two classes in place of those of the data."""
    if not recipe.epochs:
        return
    model = create_network(replace(recipe, model=network), _num_classes(network))
    images = create_images(recipe, splits, model, workers=0)
    check_model(model, images["val"])
    # An epoch of one batch, since the real data are not loaded here.
    options = {"num_samples": recipe.batch_size} | recipe.sampler.options
    drawn = replace(recipe, sampler=replace(recipe.sampler, options=options))
    sampler = create_training_sampler(drawn, torch.tensor([0, 1]), 2)
    loss = create_training_loss(recipe, torch.tensor([2, 1]))
    with fresh_accelerate():
        accelerator = create_accelerator(
            mixed_precision=recipe.mixed_precision, accumulation_steps=recipe.accumulation_steps
        )
        RepresentationTrainer(
            model,
            images["train"],
            sampler,
            loss,
            training_options(recipe),
            accelerator=accelerator,
            val=images["val"],
        )


def _two_images() -> Splits:
    """Returns splits of an image in each of two classes."""
    images = np.zeros((2, 8, 8, 3), np.uint8)
    split = dataset_from_arrays(images, np.arange(2), ["first", "second"])
    return Splits.from_datasets(dict.fromkeys(("train", "val", "test"), split))


def _network(given: ModelRecipe) -> ModelRecipe:
    """Returns a network whose weights do not matter: only those of a folder are there for sure."""
    in_folder = given.name.startswith(LOCAL_DIR)
    return replace(given, pretrained=in_folder, fresh_classifier=False)


def _network_after(given: ModelRecipe, network: ModelRecipe, source: Recipe) -> ModelRecipe:
    """Returns a network that goes on from another, whose head is folded or one that was fitted."""
    head = network.options.get("head")
    _, kept = split_options(head, {k: v for k, v in network.options.items() if k != "head"})
    options = {**kept, **given.options}
    if options.get("head") in source.heads:
        options["head"] = head_kind(source, options["head"])
    return replace(network, options=options)


def _num_classes(network: ModelRecipe) -> int:
    if not network.name.startswith(LOCAL_DIR):
        return 2
    # A head that was fitted there has as many.
    return int(read_config(Path(network.name.removeprefix(LOCAL_DIR))).get("num_classes") or 2)


JOINT = "linear"
# What a command line may change although a representation sets it: to try a grid out.
ALWAYS = {"epochs"}
# What a command line may not set: the grid does.
OF_THE_GRID = {
    "seed": "give --seeds",
    "heads": "the rows of the grid say which heads are fitted",
}
# Rows that differ in these are not comparable.
OF_ALL = ("protocol", "shot_rule", "objective")
# Of the data, what may differ: how the same images are shown.
SHOWN = ("augmentation", "augmentation_options", "image_size", "verify")


@dataclass(frozen=True, eq=False)
class Run:
    """A representation with a seed: one run of the main job.

    Attributes:
        representation: Its name.
        seed: The seed.
        recipe: The whole recipe.
        file: Where the recipe is written for the run to read.
        folder: Folder of the run.
        after: The run that has to be finished before, or None.
    """

    representation: str
    seed: int
    recipe: Recipe
    file: Path
    folder: Path
    after: "Run | None" = None

    @property
    def name(self) -> str:
        """What the run is called in messages and file names."""
        return f"{self.representation}.seed_{self.seed}"

    def command(self, threads: int) -> list[str]:
        """Returns the command that starts the run or goes on with it."""
        train = [sys.executable, "-m", "timm_lt", "train", str(self.file)]
        return [*train, "--output", str(self.folder), "--resume", "--threads", str(threads)]


@dataclass(frozen=True)
class Plan:
    """All runs of a comparison.

    Attributes:
        grid: The grid.
        base: The recipe that the runs share.
        cells: What is shown, row by row.
        seeds: The seeds.
        runs: The runs in the order in which they start, seed by seed.
    """

    grid: Grid
    base: Recipe
    cells: list[Cell]
    seeds: list[int]
    runs: list[Run]


def make_plan(
    grid: Grid,
    base: Recipe,
    folder: Path,
    *,
    seeds: Sequence[int],
    only: list[str] | None = None,
    given: Sequence[str] = (),
) -> Plan:
    """Makes the recipes of all runs and checks them, without data.

    Args:
        grid: The grid.
        base: Its recipe, with what the command line changes.
        folder: Folder of the comparison.
        seeds: The seeds; each representation is trained with each.
        only: Labels of the rows to be run and shown; None are all.
        given: Keys of the recipe that the command line has set, e.g. ``"optimizer.lr"``.

    Raises:
        UsageError: If the command line sets what the grid does, or a head, or a recipe, is wrong.
    """
    for key in given:
        reason = OF_THE_GRID.get(key.split(".")[0])
        if reason is not None:
            raise UsageError(f"--{key} is no option of a comparison: {reason}")
    cells = grid.cells(only)
    heads = _heads_by_representation(grid, base)
    recipes: dict[str, Recipe] = {}
    for name in _in_order(grid, {cell.representation for cell in cells}):
        recipes[name] = _recipe(grid, name, base, heads[name], given)
    check_recipes(grid, recipes)
    check_places(base, folder)
    # Absolute, since what goes on from a run is the same from wherever the command is called.
    folder = folder.resolve()
    made: dict[tuple[str, int], Run] = {}
    for seed in seeds:
        for name, recipe in recipes.items():
            source = made.get((grid.representations[name].get(AFTER, ""), seed))
            made[name, seed] = _run(name, seed, recipe, folder, source)
    return Plan(grid, base, cells, list(seeds), list(made.values()))


def _run(name: str, seed: int, recipe: Recipe, folder: Path, source: Run | None) -> Run:
    recipe = replace(recipe, seed=seed)
    if source is not None:
        model = replace(recipe.model, name=f"{LOCAL_DIR}{source.folder}", pretrained=True)
        recipe = replace(recipe, model=model)
    place = folder / "runs" / name / f"seed_{seed}"
    file = folder / "recipes" / f"{name}.seed_{seed}.yaml"
    return Run(name, seed, recipe, file, place, source)


def _in_order(grid: Grid, wanted: set[str]) -> list[str]:
    """Returns the representations that are needed, each behind that from which it goes on."""
    order: dict[str, None] = {}
    for name in grid.representations:
        if name in wanted:
            order |= dict.fromkeys([*reversed(grid.ancestors(name)), name])
    return list(order)


def _heads_by_representation(grid: Grid, base: Recipe) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the heads that the rows want of each representation, the joint classifier first."""
    known: dict[str, Mapping[str, Any]] = {name: {} for name in FITS}
    known |= {name: options for name, options in base.heads.items() if name != AUTO}
    known |= grid.heads
    heads: dict[str, dict[str, dict[str, Any]]] = {
        name: {JOINT: {}} for name in grid.representations
    }
    # Of all rows: what is run for some of them goes on for the others.
    for cell in grid.cells():
        if cell.head not in known:
            raise unknown_name(f"head of {cell.row!r}:", cell.head, list(known))
        heads[cell.representation][cell.head] = dict(known[cell.head])
    return heads


def _recipe(
    grid: Grid,
    name: str,
    base: Recipe,
    heads: dict[str, dict[str, Any]],
    given: Sequence[str],
) -> Recipe:
    changes = dict(grid.representations[name])
    after, factor = changes.pop(AFTER, None), changes.pop(LR_FACTOR, 1.0)
    check_number(f"{LR_FACTOR} of representation {name!r}", factor, "(0, inf)")
    _check_changes(name, changes)
    for key in given:
        if key in ALWAYS:
            changes.pop(key, None)
        elif _sets(changes, key):
            raise UsageError(f"--{key} is what representation {name!r} sets: leave it out")
    if after is not None:
        model = changes.get("model", {})
        if not isinstance(model, dict) or {"name", "pretrained"} & set(model):
            raise UsageError(f"representation {name!r} goes on from another: leave out model.name")
        changes["model"] = {**model, "pretrained": True}
    values = merge(dataclasses.asdict(base), changes) | {"heads": heads}
    recipe = parse_recipe(values, f"representation {name!r}")
    optimizer = replace(recipe.optimizer, lr=recipe.optimizer.lr * factor)
    return replace(recipe, optimizer=optimizer)


def _check_changes(name: str, changes: Mapping[str, Any]) -> None:
    """Refuses what a representation may not change."""
    for key in changes:
        if key in OF_THE_GRID:
            raise UsageError(f"representation {name!r} sets {key}: {OF_THE_GRID[key]}")
        if key in OF_ALL:
            raise UsageError(
                f"representation {name!r} sets {key}, which has to be the same for all rows: set "
                f"it in the recipe, or as --{key}"
            )
    data = changes.get("data")
    for key in data if isinstance(data, dict) else ():
        if key not in SHOWN:
            raise UsageError(
                f"representation {name!r} sets data.{key}, but differences are paired over the "
                f"same images: set it in the recipe, or as --data.{key}"
            )


def _sets(changes: Mapping[str, Any], key: str) -> bool:
    """Returns whether changes to a recipe say something of a key such as ``optimizer.lr``."""
    here: Any = changes
    for part in key.split("."):
        if not isinstance(here, Mapping):
            return True
        if part not in here:
            return False
        here = here[part]
    return True


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a recipe's mapping with changes; another part has none of the former one's options.

    >>> loss = {"loss": {"name": "focal", "options": {"gamma": 2}}}
    >>> merge(loss, {"loss": {"name": "ldam"}})
    {'loss': {'name': 'ldam', 'options': {}}}
    """
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        there = merged.get(key)
        if isinstance(there, dict) and isinstance(value, Mapping):
            if value.get("name", there.get("name")) != there.get("name"):
                there = {**there, "options": {}}
            merged[key] = merge(there, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


# Seconds between two looks at the processes.
PERIOD = 0.1
# Seconds that a process is given to end after it was told to.
PATIENCE = 20
# Environment variable by which a process sees some of the GPUs.
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
# Environment variables by which libraries take their number of threads when they are loaded.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: ``"finished"``; ``"kept"``, if it was finished before; ``"failed"``; or
            ``"left out"``, if the run from which it goes on failed.
        seconds: Wall time of the process.
        message: What went wrong.
    """

    status: Literal["finished", "kept", "failed", "left out"]
    seconds: float = 0.0
    message: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether the run has figures."""
        return self.status in ("finished", "kept")


def check_runs(runs: Sequence[Run]) -> None:
    """Checks that what is in the folders of runs are runs of the same recipes.

    Raises:
        UsageError: If one is not; says what differs.
    """
    for run in runs:
        if not (run.folder / RECIPE).is_file():
            continue
        if run.after is not None and not (run.after.folder / METRICS).is_file():
            raise UsageError(
                f"{run.folder} goes on from {run.after.folder}, which is not finished and may "
                "become another: delete the former, too, or choose another --output"
            )
        differences = recipe_differences(run.folder, run.recipe.to_yaml())
        if differences:
            raise UsageError(
                f"{run.folder} holds a run of another recipe ({'; '.join(differences)}); take that "
                "grid and those options, delete the folder, or choose another --output"
            )


def run_all(runs: Sequence[Run], logs: Path, *, jobs: int, threads: int) -> dict[Run, Outcome]:
    """Runs what is not finished yet, and says on the log how it goes.

    A run that fails is reported and the others go on, but for those that go on from it. Ctrl-C and
    SIGTERM end the processes, which leave what can be resumed.

    Args:
        runs: Each behind the one from which it goes on.
        logs: Folder for what each process prints.
        jobs: Processes side by side, >= 1.
        threads: CPU threads of each, >= 1.

    Returns:
        How each run ended.
    """
    outcomes = {run: Outcome("kept") for run in runs if (run.folder / METRICS).is_file()}
    if outcomes:
        log.info("%d of %d runs are finished already", len(outcomes), len(runs))
    waiting = [run for run in runs if run not in outcomes]
    crew = _Crew(logs, threads, len(runs))
    try:
        while waiting or crew.jobs:
            outcomes |= crew.collect(len(outcomes))
            waiting += crew.take_turned_away()
            _leave_out(waiting, outcomes)
            ready = [run for run in waiting if run.after is None or run.after in outcomes]
            for run in ready[: jobs - len(crew.jobs)]:
                if crew.start(run):
                    waiting.remove(run)
            time.sleep(PERIOD)
    finally:
        crew.end()
    return outcomes


def _leave_out(waiting: list[Run], outcomes: dict[Run, Outcome]) -> None:
    """Takes out the runs that would go on from one that has no model."""
    for run in list(waiting):
        source = outcomes.get(run.after) if run.after is not None else None
        if source is not None and not source.is_whole:
            assert run.after is not None
            outcomes[run] = Outcome("left out", message=f"{run.after.name} {source.status}")
            log.warning("%s is left out, since %s", run.name, outcomes[run].message)
            waiting.remove(run)


@dataclass(frozen=True)
class _Job:
    """A process that runs."""

    process: subprocess.Popen[bytes]
    output: Path
    file: IO[bytes]
    started: float
    device: str | None


class _Crew:
    """The processes that run side by side."""

    def __init__(self, logs: Path, threads: int, total: int) -> None:
        self.logs, self.threads, self.total = logs, threads, total
        self.jobs: dict[Run, _Job] = {}
        self.environment = child_environment(os.environ, threads)
        self.devices = visible_devices(os.environ)
        self._announced: set[Run] = set()
        self._turned_away: list[Run] = []

    def start(self, run: Run) -> bool:
        """Starts a run, unless a process of a comparison that was killed is still at it."""
        if is_running(run.folder):
            self._announce(run)
            return False
        write_atomic(run.file, run.recipe.to_yaml())
        self.logs.mkdir(parents=True, exist_ok=True)
        output = new_log(self.logs, run.name)
        file = output.open("wb")
        device = self._device()
        process = subprocess.Popen(
            run.command(self.threads),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=self.environment
            if device is None
            else self.environment | {VISIBLE_DEVICES: device},
        )
        self.jobs[run] = _Job(process, output, file, time.perf_counter(), device)
        log.info("%s started", run.name)
        return True

    def _device(self) -> str | None:
        """Returns the GPU on which the fewest run, None without any."""
        taken = [job.device for job in self.jobs.values()]
        return min(self.devices, key=taken.count, default=None)

    def collect(self, done: int) -> dict[Run, Outcome]:
        """Returns how the runs ended that have ended since the last look."""
        ended: dict[Run, Outcome] = {}
        for run, job in list(self.jobs.items()):
            status = job.process.poll()
            if status is None:
                continue
            del self.jobs[run]
            job.file.close()
            outcome = _outcome(run, job, status)
            if outcome.message.startswith(OCCUPIED):
                # One of a comparison that was killed, which had not got so far at the start.
                self._announce(run)
                self._turned_away.append(run)
                continue
            ended[run] = outcome
            place = f"[{done + len(ended)}/{self.total}] {run.name}"
            if outcome.is_whole:
                log.info("%s finished in %.0f s", place, outcome.seconds)
            else:
                log.error("%s failed: %s (%s)", place, outcome.message, job.output)
        return ended

    def take_turned_away(self) -> list[Run]:
        """Returns the runs whose folder another process had, since the last call."""
        turned_away, self._turned_away = self._turned_away, []
        return turned_away

    def _announce(self, run: Run) -> None:
        if run not in self._announced:
            log.info("%s: %s %s, waiting for it", run.name, OCCUPIED, run.folder)
        self._announced.add(run)

    def end(self) -> None:
        """Ends the processes that are still there, as Ctrl-C would."""
        for job in self.jobs.values():
            job.process.terminate()
        for job in self.jobs.values():
            try:
                job.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
            job.file.close()


def visible_devices(environment: Mapping[str, str]) -> list[str]:
    """Returns the GPUs of CUDA, each as the variable gives it to a process alone."""
    if not torch.cuda.is_available():
        return []
    numbers = [str(number) for number in range(torch.cuda.device_count())]
    given = environment.get(VISIBLE_DEVICES)
    return given.split(",")[: len(numbers)] if given else numbers


def default_jobs(threads: int) -> int:
    """Returns how many runs go side by side: one on each accelerator, else as the cores allow."""
    if torch.accelerator.is_available():
        return max(len(visible_devices(os.environ)), 1)
    return max(available_cores() // threads, 1)


def new_log(folder: Path, name: str) -> Path:
    """Returns the path of a run's log; what is there of earlier tries is numbered, 1 the first."""
    path = folder / f"{name}.log"
    if path.exists():
        number = 1
        while (numbered := folder / f"{name}.{number}.log").exists():
            number += 1
        path.rename(numbered)
    return path


def child_environment(environment: Mapping[str, str], threads: int) -> dict[str, str]:
    """Returns the environment of a run: this very package, and so many threads."""
    root = str(Path(timm_lt.__file__).parent.parent)
    path = [root, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    counts = dict.fromkeys(THREAD_VARIABLES, str(threads))
    return {**environment, **counts, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}


def _outcome(run: Run, job: _Job, status: int) -> Outcome:
    seconds = time.perf_counter() - job.started
    if status == 0 and (run.folder / METRICS).is_file():
        return Outcome("finished", seconds)
    if status < 0:
        return Outcome("failed", seconds, f"killed by signal {-status}")
    return Outcome("failed", seconds, last_words(job.output) or f"exit status {status}")


def last_words(path: Path) -> str:
    """Returns what a process said of its end: the line of an error, or its last."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    filled = [line for line in lines if line.strip()]
    for line in reversed(filled):
        if line.startswith("error: "):
            return one_line(line.removeprefix("error: "), 500)
    return one_line(filled[-1], 500) if filled else ""


CLASS_MEAN = "class_mean"


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Attributes:
        mean: The mean; None without a value.
        sd: Sample standard deviation, with n − 1; None of fewer than two values.
    """

    mean: float | None
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread":
        """Returns the spread of the values; of a shot group that is empty, there is none."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return cls(None, None)
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True)
class CellFigures:
    """What a cell of the table shows; accuracies are fractions.

    Attributes:
        cell: The cell.
        per_seed: Test accuracies by seed and figure; seeds whose run failed are not there.
        spreads: By figure, over these seeds.
        differences: By figure and seed, to the first cell; empty for that itself.
        difference_spreads: By figure, over the seeds that both cells have.
    """

    cell: Cell
    per_seed: Mapping[int, Mapping[str, float | None]]
    spreads: Mapping[str, Spread]
    differences: Mapping[str, Mapping[int, float | None]]
    difference_spreads: Mapping[str, Spread]

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it in types that JSON has."""
        return {
            **vars(self.cell),
            "quoted": dict(self.cell.quoted) or None,
            "seeds": list(self.per_seed),
            "per_seed": self.per_seed,
            "mean": {key: spread.mean for key, spread in self.spreads.items()},
            "sd": {key: spread.sd for key, spread in self.spreads.items()},
            "difference_to_first": {
                key: {**vars(self.difference_spreads[key]), "per_seed": by_seed}
                for key, by_seed in self.differences.items()
            },
        }


@dataclass(frozen=True)
class Comparison:
    """All figures.

    Attributes:
        cells: Row by row.
        keys: The figures that there are: shot groups, all, and the mean over the classes if the
            test split is not balanced.
        shots: The shot groups, as in ``metrics.json``; empty before any run has finished.
        note: What a run says below its table, if anything.
    """

    cells: list[CellFigures]
    keys: tuple[str, ...]
    shots: Mapping[str, Mapping[str, Any]]
    note: str | None


def collect(plan: Plan, outcomes: Mapping[Run, Outcome]) -> Comparison:
    """Reads the figures of the finished runs and compares them."""
    metrics = {
        (run.representation, run.seed): read_json(run.folder / METRICS)
        for run in plan.runs
        if outcomes[run].is_whole
    }
    first = next(iter(metrics.values()), {})
    heads = [head for found in metrics.values() for head in found["heads"].values()]
    balanced = all(abs(head["all"] - head[CLASS_MEAN]) < 1e-9 for head in heads)
    keys = (*GROUPS, "all", *([] if balanced else [CLASS_MEAN]))
    by_cell = [_by_seed(cell, plan.seeds, metrics, keys) for cell in plan.cells]
    cells = [
        compare(cell, figures, by_cell[0] if number else None, keys)
        for number, (cell, figures) in enumerate(zip(plan.cells, by_cell, strict=True))
    ]
    return Comparison(cells, keys, first.get("shots", {}), first.get("note"))


def _by_seed(
    cell: Cell,
    seeds: Sequence[int],
    metrics: Mapping[tuple[str, int], Mapping[str, Any]],
    keys: Sequence[str],
) -> dict[int, dict[str, float | None]]:
    found = {seed: metrics.get((cell.representation, seed)) for seed in seeds}
    return {
        seed: {key: run["heads"][cell.head][key] for key in keys}
        for seed, run in found.items()
        if run is not None
    }


def compare(
    cell: Cell,
    figures: Mapping[int, Mapping[str, float | None]],
    first: Mapping[int, Mapping[str, float | None]] | None,
    keys: Sequence[str],
) -> CellFigures:
    """Returns what a cell shows.

    Args:
        cell: The cell.
        figures: Accuracies by seed and figure.
        first: Those of the first cell, or None for that itself.
        keys: The figures.
    """
    differences: dict[str, dict[int, float | None]] = {}
    for key in keys if first is not None else ():
        assert first is not None
        shared = {seed: (figures[seed][key], first[seed][key]) for seed in figures if seed in first}
        differences[key] = {
            seed: None if here is None or there is None else here - there
            for seed, (here, there) in shared.items()
        }
    return CellFigures(
        cell,
        figures,
        {key: Spread.of([by_key[key] for by_key in figures.values()]) for key in keys},
        differences,
        {key: Spread.of(list(by_seed.values())) for key, by_seed in differences.items()},
    )


HEADINGS = {
    **{group: group_word(group) for group in GROUPS},
    "all": "all",
    CLASS_MEAN: "class mean",
}


class Content(NamedTuple):
    """A table as texts.

    Attributes:
        title: Line above it.
        headings: Of the columns; the first is of the labels.
        rows: The texts, as wide as the headings.
        legend: Lines below it.
    """

    title: str
    headings: list[str]
    rows: list[list[str]]
    legend: list[str]


def spread_text(spread: Spread, *, signed: bool = False, metric: Metric = "accuracy") -> str:
    """Returns a mean and its standard deviation, fractions, in percent.

    >>> spread_text(Spread(0.5, 0.0123)), spread_text(Spread(0.5, None), metric="error")
    ('50.0 ± 1.2', '50.0')
    >>> spread_text(Spread(-0.02, 0.01), signed=True), spread_text(Spread(None, None))
    ('-2.0 ± 1.0', '-')
    """
    if spread.mean is None:
        return "-"
    mean = 1 - spread.mean if metric == "error" else spread.mean
    text = f"{100 * mean:+.1f}" if signed else f"{100 * mean:.1f}"
    return text if spread.sd is None else f"{text} ± {100 * spread.sd:.1f}"


def content(plan: Plan, comparison: Comparison) -> Content:
    """Returns the table: by shot group, or for a grid with columns that alone in its cells.

    With a plot, columns are shown by shot group, a row for each of their cells.
    """
    grid = plan.grid
    title = f"{grid.title}, test {grid.metric if _is_matrix(plan) else 'accuracy'} in percent"
    if _is_matrix(plan):
        headings = [f"{grid.rows_title} \\ {grid.columns_title}".rstrip(" \\")]
        headings += [column.label for column in grid.columns]
        by_row: dict[str, list[str]] = {}
        for figures in comparison.cells:
            text = spread_text(figures.spreads["all"], metric=grid.metric)
            by_row.setdefault(figures.cell.row, []).append(text)
        rows = [[row, *texts] for row, texts in by_row.items()]
        return Content(title, headings, rows, legend(plan, comparison))
    quoted = any(figures.cell.quoted for figures in comparison.cells)
    headings = [grid.rows_title, *([grid.columns_title or "head"] if grid.columns else [])]
    headings += [HEADINGS[key] for key in comparison.keys]
    headings += ["all, to the first row"] if len(comparison.cells) > 1 else []
    headings += ["quoted"] if quoted else []
    rows = [
        [
            *_labels(figures, plan.seeds),
            *(spread_text(figures.spreads[key]) for key in comparison.keys),
            *([_difference(figures)] if len(comparison.cells) > 1 else []),
            *([quoted_text(figures.cell.quoted)] if quoted else []),
        ]
        for figures in comparison.cells
    ]
    return Content(title, headings, rows, legend(plan, comparison))


def _is_matrix(plan: Plan) -> bool:
    return bool(plan.grid.columns) and not plan.grid.plot


def _labels(figures: CellFigures, seeds: list[int]) -> list[str]:
    cell: Cell = figures.cell
    labels = [cell.row] if cell.column is None else [cell.row, cell.column]
    if len(figures.per_seed) < len(seeds):
        labels[-1] += f" ({len(figures.per_seed)} of {len(seeds)} seeds)"
    return labels


def _difference(figures: CellFigures) -> str:
    spread = figures.difference_spreads.get("all")
    return "" if spread is None else spread_text(spread, signed=True)


def quoted_text(quoted: Mapping[str, float]) -> str:
    """Returns quoted accuracies, many / medium / few / all or all alone.

    >>> quoted_text({"all": 0.444}), quoted_text({})
    ('44.4', '')
    """
    return " / ".join(f"{100 * quoted[key]:.1f}" for key in (*GROUPS, "all") if key in quoted)


def legend(plan: Plan, comparison: Comparison) -> list[str]:
    """Returns the lines below the table: what its figures are."""
    several = len(plan.seeds) > 1
    seeds = f"seed{'s' if several else ''} {', '.join(map(str, plan.seeds))}"
    lines = [f"{seeds}{': mean ± standard deviation over them' if several else ''}"]
    if several and not _is_matrix(plan) and len(comparison.cells) > 1:
        lines[0] += "; differences are paired by seed"
    if comparison.shots and not _is_matrix(plan):
        lines.append(shot_legend(comparison.shots))
    if any(figures.cell.quoted for figures in comparison.cells):
        lines.append(f"quoted, not measured here: {plan.grid.quoted_from or plan.grid.source}")
    return [*lines, *([comparison.note] if comparison.note else [])]


def rich_table(plan: Plan, comparison: Comparison) -> Table:
    """Returns the table for the terminal."""
    shown = content(plan, comparison)
    table = new_table(shown.title, escape("\n".join(shown.legend)))
    labels = 2 if plan.grid.columns and plan.grid.plot else 1
    for number, heading in enumerate(shown.headings):
        justify = "left" if number < labels or heading == "quoted" else "right"
        style = "bold" if heading == "all" else ""
        table.add_column(escape(heading), justify=justify, style=style, no_wrap=number >= labels)  # type: ignore[arg-type]
    for row in shown.rows:
        table.add_row(*map(escape, row))
    return table


def markdown_table(plan: Plan, comparison: Comparison) -> str:
    """Returns the table in Markdown, to be pasted into a document."""
    shown = content(plan, comparison)
    left = 2 if plan.grid.columns and plan.grid.plot else 1
    rules = ["---" if n < left else "---:" for n in range(len(shown.headings))]
    lines = [_markdown_row(row) for row in (shown.headings, rules, *shown.rows)]
    return "\n".join([f"{shown.title}.", "", *lines, "", f"{'; '.join(shown.legend)}.", ""])


def _markdown_row(texts: list[str]) -> str:
    cells = [text.replace("\\", "\\\\").replace("|", "\\|") for text in texts]
    return f"| {' | '.join(cells)} |"


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def save_comparison_plot(path: Path, plan: Plan, comparison: Comparison) -> None:
    """Draws a panel for each shot group: columns along the axis, a marker for each row, as PNG.

    Error bars are standard deviations over seeds.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.7 * len(comparison.keys), 3.6), layout="constrained")
    panels = figure.subplots(1, len(comparison.keys), squeeze=False)[0]
    columns = [column.label for column in plan.grid.columns]
    rows = list(dict.fromkeys(cell.row for cell in plan.cells))
    for axes, key in zip(panels, comparison.keys, strict=True):
        for number, row in enumerate(rows):
            shown = [c for c in comparison.cells if c.cell.row == row]
            # Beside each other, where the markers of one column would hide each other.
            shift = 0.5 * ((number + 0.5) / len(rows) - 0.5)
            _draw_row(axes, shown, key, number, shift, columns)
        axes.set_title(HEADINGS[key], fontsize="medium")
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize="small")
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.tick_params(axis="y", labelsize="small")
        axes.grid(axis="y", alpha=0.3)
        for place in range(1, len(columns)):
            axes.axvline(place - 0.5, color="black", alpha=0.1, linewidth=0.8)
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        title=plan.grid.rows_title,
        loc="outside upper center",
        ncols=len(rows),
        fontsize="small",
        title_fontsize="small",
    )
    write_figure(path, figure)


def _draw_row(
    axes: object, cells: list[CellFigures], key: str, number: int, shift: float, columns: list[str]
) -> None:
    spreads = [(columns.index(str(c.cell.column)), c.spreads[key]) for c in cells]
    known = [(place + shift, spread) for place, spread in spreads if spread.mean is not None]
    axes.errorbar(  # type: ignore[attr-defined]
        [place for place, _ in known],
        [100 * (spread.mean or 0.0) for _, spread in known],
        yerr=[100 * (spread.sd or 0.0) for _, spread in known],
        label=cells[0].cell.row,
        color=COLORS[number % len(COLORS)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=6,
        linestyle="none",
        linewidth=1.2,
        capsize=2,
    )


GRID, RESULTS, MARKDOWN = "comparison.yaml", "results.json", "results.md"
LOGS, RUNS, RECIPES = "logs", "runs", "recipes"
OUTPUTS = (GRID, RESULTS, MARKDOWN, LOGS, RUNS, RECIPES, PLOTS)


def check_comparison_folder(folder: Path, plan: Plan) -> None:
    """Checks that a comparison may use a folder, without touching it.

    Raises:
        UsageError: If the folder holds another comparison, or anything else.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose another --output")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    names = {name for name in names if not name.startswith(".")} - {LOCK}
    foreign = sorted(names - set(OUTPUTS)) or ([] if GRID in names else sorted(names))
    if foreign:
        raise UsageError(
            f"{folder} holds files that are not a comparison ({shown_names(foreign, 3)}); choose "
            "another --output"
        )
    # Runs that failed before they began, for a wrong option, are none to go on with.
    if not any(folder.glob(f"{RUNS}/*/*/{RECIPE}")):
        return
    other = differences(read_yaml(folder / GRID), yaml.safe_load(_identity(plan)))
    if other:
        raise UsageError(
            f"{folder} holds another comparison ({'; '.join(other)}); choose another --output"
        )


def _identity(plan: Plan) -> str:
    """Returns, as YAML, which comparison it is: the grid's name and the recipe of its runs."""
    recipe = yaml.safe_load(plan.base.to_yaml())
    # The heads are those of the rows, and the seeds may become more.
    shared = {key: value for key, value in recipe.items() if key not in ("heads", "seed")}
    return yaml_text({"grid": plan.grid.name, "recipe": shared})


@contextmanager
def open_output(folder: Path, plan: Plan) -> Iterator[None]:
    """Holds the folder that :func:`check_comparison_folder` allowed while the block runs.

    Raises:
        UsageError: If it cannot be written, or another comparison runs in it.
    """
    try:
        lock = lock_folder(folder.resolve())
        write_atomic(folder / GRID, _identity(plan))
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error}") from error
    try:
        yield
    finally:
        release_run_folder(lock)


def write_results(
    folder: Path,
    plan: Plan,
    comparison: Comparison,
    outcomes: Mapping[Run, Outcome],
    *,
    command: Sequence[str],
    threads: int,
) -> None:
    """Writes the table, all figures, and the plot if the grid has one.

    Args:
        folder: The folder.
        plan: What was run.
        comparison: Its figures.
        outcomes: How each run ended.
        command: The command line, for the record.
        threads: Threads of each run that is started; those that are kept had their own.

    Raises:
        UsageError: If the folder cannot be written.
    """
    runs = [_record(run, outcomes[run], folder.resolve(), threads) for run in plan.runs]
    grid = plan.grid
    record: dict[str, Any] = {
        "grid": grid.name,
        "title": grid.title,
        "source": grid.source,
        "command": shlex.join(command),
        "seeds": plan.seeds,
        "shot_rule": plan.base.shot_rule,
        "shots": comparison.shots,
        "quoted_from": grid.quoted_from,
        "note": comparison.note,
        "cells": [cell.to_dict() for cell in comparison.cells],
        "runs": runs,
    }
    try:
        write_json(folder / RESULTS, record)
        write_atomic(folder / MARKDOWN, markdown_table(plan, comparison))
        if grid.plot:
            save_comparison_plot(folder / PLOTS / f"{grid.name}.png", plan, comparison)
    except OSError as error:
        raise UsageError(f"the results cannot be written: {error}") from error


def _record(run: Run, outcome: Outcome, folder: Path, threads: int) -> dict[str, Any]:
    seconds = outcome.seconds
    if outcome.is_whole:
        # Its own, also where it was finished before, or went on after a kill.
        metrics = read_json(run.folder / METRICS)
        parts = metrics["seconds"]
        seconds = sum(parts["heads"].values(), sum(v for k, v in parts.items() if k != "heads"))
        threads = metrics["threads"]
    return {
        "representation": run.representation,
        "seed": run.seed,
        "status": outcome.status,
        "seconds": round(seconds, 1) or None,
        "threads": threads,
        "message": outcome.message or None,
        "folder": run.folder.relative_to(folder).as_posix(),
        "recipe": run.file.relative_to(folder).as_posix(),
        "command": shlex.join(run.command(threads)),
    }
