"""``timm-lt compare``: a grid of representations and heads over seeds, as a paper's table."""

import argparse
import shlex
from pathlib import Path

import torch
from rich.markdown import Markdown

from timm_lt.cli.common import add_log_options, as_json, positive, say
from timm_lt.run import comparison
from timm_lt.run.execution import run_to_exit
from timm_lt.run.parse import parse_command_line
from timm_lt.run.recipe import RunOptions
from timm_lt.utils.accelerator import available_cores, visible_devices
from timm_lt.utils.checks import UsageError, check_choice
from timm_lt.utils.console import epilog, log, result_console, start_logging, wrapped

PROG = "timm-lt compare"
INTERRUPTED = "interrupted; the same command continues from here"


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit status: 1 if some runs failed, 2 for a mistake."""
    failed: list[str] = []
    status = run_to_exit(lambda: failed.extend(compare(argv)), INTERRUPTED)
    return status or int(bool(failed))


def compare(argv: list[str]) -> list[str]:
    """Runs a comparison or continues it, prints its table, and returns the runs that failed.

    Raises:
        UsageError: For a mistake in the grid, its recipe, the options or the folder, before
            anything runs.
    """
    arguments, rest = create_parser().parse_known_args(argv)
    start_logging(quiet=arguments.quiet, verbose=arguments.verbose)
    if arguments.grid is None:
        titles = {name: comparison.load_grid(name).title for name in comparison.shipped_grids()}
        lines = [f"{name}: {title}" for name, title in titles.items()]
        say(as_json(titles) if arguments.json else "\n".join(["grids:", *lines]))
        return []
    grid = comparison.load_grid(arguments.grid)
    labels = tuple(row.label for row in grid.rows)
    for label in arguments.only or ():
        check_choice(f"row of {grid.name}", label, labels)
    rows = [row for row in grid.rows if row.label in (arguments.only or labels)]
    _, base, options = parse_command_line(PROG, [arguments.recipe or grid.recipe, *rest])
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
    record["command"] = shlex.join(["timm-lt", "compare", *argv])
    table = comparison.write_results(folder, grid, record)
    if arguments.json:
        say(as_json(record))
    else:
        result_console().print(Markdown(table))
    log.info("wrote %s", folder)
    for run, failure in failures.items():
        log.error("%s has no figures: %s", run, failure)
    return [str(run) for run in failures]


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of the options that are not the recipe's."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} [GRID] [--option value ...]",
        allow_abbrev=False,
        description=wrapped(
            "Trains the representations of a paper's table with each seed, fits the heads of the "
            "table, and prints it. The same command goes on after a kill. Any other option is one "
            "of the recipe that all runs share, e.g. --epochs 5; see timm-lt train --help."
        ),
        epilog=epilog(
            [
                f"{PROG}   # names the grids",
                f"{PROG} kang_table2 --seeds 0,1,2",
                f'{PROG} kang_table2 --only joint cRT "balanced softmax" --jobs 2',
                f"{PROG} mine.yaml --data.root photos --json",
            ],
            "Exit status: 0 if all went well, 1 if some runs failed (the others are in the table), "
            "2 for a mistake, which is one line, 130 after Ctrl-C.",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("grid", nargs="?", metavar="GRID", help="a shipped grid or a YAML file; none lists them")
    add("--output", help="folder; output/GRID by default")
    add("--seeds", default="0,1,2", type=seeds, help="such as 0,1,2, the default")
    add("--only", nargs="+", metavar="ROW", help="labels of the rows to run and show, in quotes")
    add("--recipe", help="another recipe than the grid's, its name or its file")
    add("--jobs", type=positive, help="runs side by side; by default as GPUs or cores allow")
    add("--threads", type=positive, default=1, help="CPU threads of each run")
    add("--json", action="store_true", help="for machines: print results.json, not the table")
    add_log_options(parser, quiet="the table and failures")
    return parser


def seeds(text: str) -> list[int]:
    """Parses ``0,1,2``."""
    return sorted({int(seed) for seed in text.split(",")})
