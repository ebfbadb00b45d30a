"""From a grid to runs: the recipe of each representation and seed, checked before any runs."""

import copy
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timm_lt.fitting import AUTO, FITS
from timm_lt.models.create import LOCAL_DIR
from timm_lt.run.comparison.checks import check_recipes
from timm_lt.run.comparison.grid import AFTER, LR_FACTOR, Cell, Grid
from timm_lt.run.parse import parse_recipe
from timm_lt.run.recipe import Recipe
from timm_lt.run.recipe_checks import check_output
from timm_lt.utils.checks import UsageError, check_number, unknown_name

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
    check_output(base, folder)
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
