"""The command line ``timm-lt COMMAND``, also ``python -m timm_lt COMMAND``."""

import argparse
import errno
import os
import sys
from collections.abc import Callable

import timm_lt
from timm_lt.cli import (
    compare,
    completion,
    convert,
    evaluate,
    fold,
    heads,
    inspect,
    listing,
    pack,
    predict,
    push,
    run,
)
from timm_lt.cli.common import Commands, complain, start
from timm_lt.run.execution import main as run_main
from timm_lt.utils.accelerator import fresh_accelerate
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import epilog, error_text, log_traceback, wrapped

# In the order in which one needs them.
COMMANDS = (
    heads, evaluate, predict, listing, inspect, fold, push, pack, convert, run
)  # fmt: skip
# What a shell gives to a program whose reader has gone.
BROKEN_PIPE = 141


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # As `timm-lt list | head -1` does; the interpreter must not flush once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        log_traceback(error)
        place = error.filename or "standard output"
        complain(f"error: {error_text(f'{place}: {error.strerror}')}")
        return 2
    return status


def _run(argv: list[str]) -> int:
    if argv[:1] == ["train"]:
        # Its arguments are those of a recipe, which has its own parser.
        return run_main(argv[1:], prog="timm-lt train")
    if argv[:1] == ["compare"]:
        # So are some of these.
        return compare.main(argv[1:])
    arguments = create_parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.command
    try:
        start(arguments)
        with fresh_accelerate():
            command(arguments)
    except UsageError as error:
        log_traceback(error)
        complain(f"error: {error_text(str(error))}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of all commands; ``train`` and ``compare`` have their own besides."""
    parser = argparse.ArgumentParser(
        prog="timm-lt",
        description=wrapped(
            "Long-tailed image recognition on timm: one backbone, many classifier heads. Each "
            "command has a --help with examples."
        ),
        epilog=epilog(
            [
                "timm-lt heads photos --model resnet50.a1_in1k   # better rare classes, in minutes",
                "timm-lt train                                   # embedded data, no network",
                "timm-lt evaluate output/birds photos",
                "timm-lt completion --help                       # tab completion",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"timm_lt {timm_lt.__version__}")
    commands: Commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.add_parser("train", help="train a backbone, fit and compare heads", add_help=False)
    compare.add_parser(commands)
    for module in COMMANDS:
        module.add_parser(commands)
    completion.add_parser(commands, parser)
    return parser
