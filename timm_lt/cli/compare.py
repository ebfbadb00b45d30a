"""``timm-lt compare``: a grid of representations and heads over seeds, as a paper's table."""

import argparse
import shlex
from pathlib import Path

import torch
from rich.markdown import Markdown

from timm_lt.cli.common import Commands, add_command, add_log_options, as_json, positive, say
from timm_lt.run import comparison
from timm_lt.run.parse import parse_command_line
from timm_lt.run.recipe import RunOptions
from timm_lt.utils.accelerator import available_cores, visible_devices
from timm_lt.utils.checks import UsageError, check_choice
from timm_lt.utils.console import log, result_console

PROG = "timm-lt compare"


def add_compare(commands: Commands) -> None:
    """Adds the command to the parser."""
    # A prefix may be an option of the recipe: --seed is not --seeds.
    options = {"usage": f"{PROG} [GRID] [--option value ...]", "allow_abbrev": False}
    add = (parser := add_command(commands, "compare", compare, **options)).add_argument
    add("grid", nargs="?", metavar="GRID", help="a shipped grid or a YAML file; none lists them")
    add("--output", help="folder; output/GRID by default")
    add("--seeds", default="0,1,2", type=seeds, help="such as 0,1,2, the default")
    add("--only", nargs="+", metavar="ROW", help="labels of the rows to run and show, in quotes")
    add("--recipe", help="another recipe than the grid's, its name or its file")
    add("--jobs", type=positive, help="runs side by side; by default as GPUs or cores allow")
    add("--threads", type=positive, default=1, help="CPU threads of each run")
    add("--json", action="store_true", help="for machines: print results.json, not the table")
    add_log_options(parser, quiet="the table and failures")


def seeds(text: str) -> list[int]:
    """Parses ``0,1,2``."""
    return sorted({int(seed) for seed in text.split(",")})


def compare(arguments: argparse.Namespace) -> int:
    """Trains the representations of a paper's table with each seed and fits the table's heads.

    Prints the table. The same command continues after a kill. Any other option is one of the recipe
    that all runs share, e.g. --epochs 5; see timm-lt train --help. If some runs failed, the exit
    status is 1, and the table has the others.

    Examples:
        timm-lt compare   # names the grids
        timm-lt compare kang_table2 --seeds 0,1,2
        timm-lt compare kang_table2 --only joint cRT "balanced softmax" --jobs 2
        timm-lt compare mine.yaml --data.root photos --json
    """
    if arguments.grid is None:
        titles = {name: comparison.load_grid(name).title for name in comparison.shipped_grids()}
        lines = [f"{name}: {title}" for name, title in titles.items()]
        say(as_json(titles) if arguments.json else "\n".join(["grids:", *lines]))
        return 0
    grid = comparison.load_grid(arguments.grid)
    labels = tuple(row.label for row in grid.rows)
    for label in arguments.only or ():
        check_choice(f"row of {grid.name}", label, labels)
    rows = [row for row in grid.rows if row.label in (arguments.only or labels)]
    recipe, rest = arguments.recipe or grid.recipe, arguments.recipe_options
    _, base, options = parse_command_line(PROG, [recipe, *rest])
    if options != RunOptions():
        raise UsageError(f"{PROG} takes options of the recipe and its own (--help), no others")
    given = [text[2:].partition("=")[0] for text in rest if text.startswith("--")]
    folder = Path(arguments.output or Path("output") / grid.name)
    runs = comparison.make_runs(grid, rows, base, folder, seeds=arguments.seeds, given=given)
    devices = len(visible_devices()) or int(torch.accelerator.is_available())
    jobs = arguments.jobs or devices or max(available_cores() // arguments.threads, 1)
    log.info("%s: %d runs in %s, %d side by side", grid.name, len(runs), folder, jobs)
    failures = comparison.run_all(runs, jobs=jobs, threads=arguments.threads)
    record = comparison.measure(grid, rows, runs, failures)
    record["command"] = shlex.join(["timm-lt", *arguments.argv])
    table = comparison.write_results(folder, grid, record)
    if arguments.json:
        say(as_json(record))
    else:
        result_console().print(Markdown(table))
    log.info("wrote %s", folder)
    for run, failure in failures.items():
        log.error("%s has no figures: %s", run, failure)
    return int(bool(failures))
