"""``timm-lt compare``: a grid of representations and heads over seeds, as a paper's table."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm_lt.cli.common import Commands, add_log_options, as_json, say
from timm_lt.run.comparison import (
    RESULTS,
    Grid,
    Outcome,
    Plan,
    Run,
    check_comparison_folder,
    check_runs,
    collect,
    default_jobs,
    find_grid,
    load_grid,
    make_plan,
    open_output,
    rich_table,
    run_all,
    shipped_grids,
    write_results,
)
from timm_lt.run.execution import run_to_exit
from timm_lt.run.parse import parse_command_line
from timm_lt.run.recipe import Recipe, RunOptions
from timm_lt.utils.accelerator import available_cores
from timm_lt.utils.checks import UsageError, check_integer
from timm_lt.utils.console import epilog, log, result_console, start_logging, wrapped

PROG = "timm-lt compare"
INTERRUPTED = "interrupted; the same command goes on from here"
# Exit status where some runs failed: there are results, of the others.
SOME_FAILED = 1


def add_parser(commands: Commands) -> None:
    """Adds the command to the list of commands; its arguments have a parser of their own."""
    commands.add_parser(
        "compare", help="train and compare what a paper's table has in it", add_help=False
    )


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit status: 1 if some run failed, 2 for a mistake."""
    outcomes: dict[Run, Outcome] = {}

    def command() -> None:
        outcomes.update(compare(argv))

    status = run_to_exit(command, INTERRUPTED)
    whole = all(outcome.is_whole for outcome in outcomes.values())
    return status or (0 if whole else SOME_FAILED)


def compare(argv: list[str]) -> Mapping[Run, Outcome]:
    """Runs a comparison, or goes on with it, and prints its table.

    Args:
        argv: ``[GRID] [--option value ...]``; without a grid, the shipped ones are listed.

    Returns:
        How each run ended.

    Raises:
        UsageError: For whatever is wrong with the grid, its recipe, the options or the folder,
            before anything runs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"{PROG} starts processes itself: run it without accelerate launch")
    if "--verbose" in argv:
        # Before anything can be wrong.
        start_logging(verbose=True)
    named = bool(argv) and not argv[0].startswith("-")
    arguments, rest = create_parser().parse_known_args(argv[1:] if named else argv)
    if not named:
        if rest:
            raise UsageError(f"GRID comes before the options; {_listing()}")
        titles = {name: load_grid(path).title for name, path in shipped_grids().items()}
        say(as_json(titles) if arguments.json else _listing())
        return {}
    grid = load_grid(find_grid(argv[0]))
    seeds = parse_seeds(arguments.seeds)
    threads = check_integer("--threads", arguments.threads, 1, available_cores())
    base = _base(grid, arguments.recipe, rest)
    folder = Path(arguments.output or Path("output") / grid.name)
    plan = make_plan(grid, base, folder, seeds=seeds, only=arguments.only, given=_keys(rest))
    jobs = _jobs(arguments.jobs, threads)
    check_comparison_folder(folder, plan)
    check_runs(plan.runs)
    start_logging(quiet=arguments.quiet, verbose=arguments.verbose)
    log.info("%s", _describe(plan, min(jobs, len(plan.runs)), threads, folder))
    with open_output(folder, plan):
        outcomes = run_all(plan.runs, folder / "logs", jobs=jobs, threads=threads)
        comparison = collect(plan, outcomes)
        command = ["timm-lt", "compare", *argv]
        write_results(folder, plan, comparison, outcomes, command=command, threads=threads)
    if arguments.json:
        say((folder / RESULTS).read_text(encoding="utf-8").rstrip())
    else:
        result_console().print(rich_table(plan, comparison))
    log.info("wrote %s", folder)
    failed = [run.name for run, outcome in outcomes.items() if not outcome.is_whole]
    if failed:
        say_failed = f"{len(failed)} of {len(outcomes)} runs have no figures: {', '.join(failed)}"
        log.error("%s; the same command tries them again", say_failed)
    return outcomes


def parse_seeds(text: str) -> list[int]:
    """Parses ``0,1,2``.

    >>> parse_seeds("0,1, 2")
    [0, 1, 2]

    Raises:
        UsageError: If it is not a list of different integers >= 0.
    """
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise UsageError(f"--seeds must be integers >= 0 with commas between, got {text!r}")
    seeds = [int(part) for part in parts]
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds has a seed twice: {text}")
    for seed in seeds:
        check_integer("--seeds", seed, minimum=0, maximum=2**63 - 1)
    return seeds


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of the options that are not the recipe's."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} [GRID] [--option value ...]",
        allow_abbrev=False,
        description=wrapped(
            "Trains what a paper's table compares, each representation with each seed, fits the "
            "heads of the table, and prints it. GRID is the name of a shipped grid or a "
            "YAML file; without it, the shipped ones are listed. The same command goes on after a "
            "kill. Any other option is one of the recipe that all runs share, e.g. --epochs 5; see "
            "timm-lt train --help."
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
    parser.add_argument("--output", help="folder; output/GRID unless given")
    parser.add_argument("--seeds", default="0,1,2", metavar="SEEDS", help="such as 0,1,2")
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", help="labels of the rows to run and show, in quotes"
    )
    parser.add_argument("--recipe", help="another recipe than the grid's, its name or its file")
    parser.add_argument(
        "--jobs",
        type=int,
        help="runs side by side; one on each GPU, or as many as there are cores for, unless given",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    parser.add_argument(
        "--json",
        action="store_true",
        help="for machines: print results.json instead of the table",
    )
    add_log_options(parser, quiet="the table and failures")
    return parser


def _listing() -> str:
    lines = [f"{name}: {load_grid(path).title}" for name, path in shipped_grids().items()]
    return "\n".join(["grids:", *lines])


def _base(grid: Grid, recipe: str | None, rest: list[str]) -> Recipe:
    """Returns the recipe that the runs share, with the options that are its."""
    parsed = parse_command_line(PROG, [recipe or grid.recipe, *rest])
    if parsed is None:
        raise UsageError("--print_config is for timm-lt train")
    _, base, options = parsed
    if options != RunOptions():
        raise UsageError(
            f"{PROG} takes options of the recipe and its own (--help), none of how to run one"
        )
    return base


def _keys(rest: Sequence[str]) -> list[str]:
    """Returns the keys of the recipe that arguments set."""
    return [text[2:].partition("=")[0] for text in rest if text.startswith("--")]


def _jobs(given: int | None, threads: int) -> int:
    if given is None:
        return default_jobs(threads)
    return check_integer("--jobs", given, minimum=1, maximum=4 * available_cores())


def _describe(plan: Plan, jobs: int, threads: int, folder: Path) -> str:
    names = {run.representation for run in plan.runs}
    return (
        f"{plan.grid.name}: {len(names)} representations, {len(plan.seeds)} seeds, "
        f"{len(plan.runs)} runs, {jobs} side by side, threads of each: {threads}, in {folder}"
    )
