"""The command line ``timm-lt COMMAND``, also ``python -m timm_lt COMMAND``."""

import argparse
import sys
from collections.abc import Callable

import timm_lt
import train_lt
from timm_lt.cli import (
    compare,
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
from timm_lt.console import error_text
from timm_lt.registry import UsageError


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        # Its arguments are those of a recipe, which has its own parser.
        return train_lt.main(argv[1:], prog="timm-lt train")
    if argv[:1] == ["compare"]:
        # So are some of these.
        return compare.main(argv[1:])
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.command
    try:
        command(arguments)
    except UsageError as error:
        print(f"error: {error_text(str(error))}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="timm-lt", description="Long-tailed image recognition on timm."
    )
    parser.add_argument("--version", action="version", version=f"timm_lt {timm_lt.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.add_parser("train", help="train a backbone, fit and compare heads", add_help=False)
    compare.add_parser(commands)
    for module in (heads, evaluate, predict, listing, inspect, pack, push, fold, convert, run):
        module.add_parser(commands)
    return parser
