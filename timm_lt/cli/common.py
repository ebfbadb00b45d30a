"""What the commands share: how each is described, what it prints, and how much of it."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from rich.console import RenderableType

from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import epilog, log, result_console, start_logging, wrapped
from timm_lt.utils.files import write_json

# argparse has no public name for what add_subparsers returns.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
STDOUT = "-"
JSON_SUFFIX = ".json"


def add_command(
    commands: Commands, name: str, *, summary: str, description: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """Adds a command, whose help is documentation: what it does, its arguments, examples.

    Args:
        commands: Of the whole program.
        name: Its name.
        summary: Its line in the list of commands.
        description: What it does, in sentences.
        examples: Whole command lines.
    """
    return commands.add_parser(
        name,
        help=summary,
        description=wrapped(description),
        epilog=epilog(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_output_options(parser: argparse.ArgumentParser, *, quiet: str) -> None:
    """Adds ``--json``, ``--quiet`` and ``--verbose``.

    Args:
        parser: Of a command that ends in :func:`show_result`.
        quiet: What is still printed with ``--quiet``.
    """
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE.json",
        help="for machines: print JSON and nothing else on standard output, or write it there",
    )
    add_log_options(parser, quiet=quiet)


def add_log_options(parser: argparse.ArgumentParser, *, quiet: str) -> None:
    """Adds ``--quiet`` and ``--verbose``."""
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quiet", action="store_true", help=f"print {quiet} only")
    level.add_argument(
        "--verbose",
        action="store_true",
        help="say each step on standard error, and where in the code an error arose",
    )


def start(arguments: argparse.Namespace) -> None:
    """Starts the log as the options say, and checks where JSON goes before there is any.

    Raises:
        UsageError: If it cannot go there.
    """
    start_logging(
        quiet=getattr(arguments, "quiet", False), verbose=getattr(arguments, "verbose", False)
    )
    file = getattr(arguments, "json", None)
    if not isinstance(file, str) or file == STDOUT:
        return
    if not file.endswith(JSON_SUFFIX):
        # It may have swallowed the argument behind it.
        raise UsageError(
            f"--json takes a file that ends in {JSON_SUFFIX}, got {file!r}; to print JSON, put "
            "--json behind the other arguments"
        )
    check_folder("--json", Path(file).parent)
    for name in ("data", "destination"):
        place = getattr(arguments, name, None)
        if place is not None and Path(file).resolve().is_relative_to(Path(place).resolve()):
            raise UsageError(f"--json: {file} would lie in {place}: choose a place elsewhere")
    if Path(file).is_dir():
        raise UsageError(f"--json: {file} is a folder, not a file to write")


def check_folder(option: str, folder: Path) -> None:
    """Checks that a folder could be made.

    Raises:
        UsageError: If something else has its name, or that of a folder above it.
    """
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise UsageError(f"{option}: {place} is no folder; choose another")


def show_result(
    arguments: argparse.Namespace, result: object, shown: str | RenderableType | None
) -> None:
    """Prints what a command has found: for people, or as JSON.

    Args:
        arguments: Of the command.
        result: What goes into JSON.
        shown: A line or table for people; None if there is nothing more to print.
    """
    if arguments.json == STDOUT:
        say(as_json(result))
        return
    if isinstance(shown, str):
        say(shown)
    elif shown is not None:
        result_console().print(shown)
    if arguments.json is not None:
        write_json(Path(arguments.json), result)
        log.info("wrote %s", arguments.json)


def as_json(value: object) -> str:
    """Returns JSON for a terminal or a pipe: ASCII, whatever a file or a repo has in its texts."""
    return json.dumps(value, indent=2, allow_nan=False)


def say(line: str) -> None:
    """Prints a line on standard output."""
    print(line)  # noqa: T201


def complain(line: str) -> None:
    """Prints a line on standard error."""
    print(line, file=sys.stderr)  # noqa: T201


def parse_options(texts: list[str], example: str, option: str = "--option") -> dict[str, Any]:
    """Parses ``KEY=VALUE`` arguments; values are written as in YAML.

    Raises:
        UsageError: If one is none; the message has the example.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key.isidentifier() and equals):
            raise UsageError(f"{option} takes KEY=VALUE, e.g. {example}, got {text!r}")
        try:
            options[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise UsageError(f"{option} {text!r}: the value cannot be read") from error
    return options
