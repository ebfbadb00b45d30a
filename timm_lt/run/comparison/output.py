"""The folder of a comparison: whose it is, and the results in it."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from timm_lt.checkpoint import METRICS, PLOTS, RECIPE
from timm_lt.run.comparison.plan import Plan, Run
from timm_lt.run.comparison.plot import save_comparison_plot
from timm_lt.run.comparison.results import Comparison
from timm_lt.run.comparison.runs import Outcome
from timm_lt.run.comparison.tables import markdown_table
from timm_lt.run.folder import LOCK, differences, lock_folder, release_run_folder
from timm_lt.utils.checks import UsageError, shown_names
from timm_lt.utils.files import read_json, read_yaml, write_atomic, write_json, yaml_text

GRID, RESULTS, MARKDOWN = "comparison.yaml", "results.json", "results.md"
LOGS, RUNS, RECIPES = "logs", "runs", "recipes"
OUTPUTS = (GRID, RESULTS, MARKDOWN, LOGS, RUNS, RECIPES, PLOTS)


def check_output(folder: Path, plan: Plan) -> None:
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
    """Holds the folder that :func:`check_output` allowed while the block runs.

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
