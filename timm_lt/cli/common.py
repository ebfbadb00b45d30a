"""Shared by all commands: their names, help, log and output options, and results."""

import argparse
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from rich.console import RenderableType

from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import epilog, log, result_console, start_logging, wrapped
from timm_lt.utils.files import write_json

# argparse has no public name for the result of add_subparsers.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
# The commands in the order in which users meet them, with their line in `timm-lt --help`.
COMMANDS = {
    "train": "train a backbone, fit and compare heads",
    "compare": "train and compare the methods of a paper's table",
    "heads": "fit and compare heads on a model of yours, without training it",
    "evaluate": "accuracy of a model by shot group and class",
    "predict": "classes and probabilities of images",
    "list": "list models, heads, losses and so on; or the heads of a checkpoint",
    "inspect": "look at a data set before training",
    "fold": "write a head as a plain timm checkpoint, ONNX or torch.export, to ship",
    "push": "push a checkpoint to the Hugging Face Hub",
    "pack": "write a smaller copy of a run's checkpoint",
    "convert": "write weights of another project as a decoupled checkpoint",
    "run": "run one of timm's scripts, with the lt_* models and samplers",
    "completion": "print a script for tab completion",
}
STDOUT = "-"


def add_command(
    commands: Commands,
    name: str,
    command: Callable[[argparse.Namespace], int | None],
    **options: Any,
) -> argparse.ArgumentParser:
    """Adds one of :data:`COMMANDS`; the docstring of its function is its help."""
    text, _, examples = inspect.cleandoc(command.__doc__ or "").partition("\n\nExamples:\n")
    parser = commands.add_parser(
        name,
        help=COMMANDS[name],
        description=wrapped(" ".join(text.split())),
        epilog=epilog([line.strip() for line in examples.splitlines()]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    parser.set_defaults(command=command)
    return parser


def add_output_options(parser: argparse.ArgumentParser, *, quiet: str) -> None:
    """Adds ``--json``, ``--quiet`` and ``--verbose`` to a command that ends in `show_result`."""
    text = "for machines: print JSON and nothing else on standard output, or write it to a file"
    parser.add_argument("--json", nargs="?", const=STDOUT, metavar="FILE.json", help=text)
    add_log_options(parser, quiet=quiet)


def add_log_options(parser: argparse.ArgumentParser, *, quiet: str) -> None:
    """Adds ``--quiet``, with the output that it keeps, and ``--verbose``."""
    verbose = "log each step on standard error, and where in the code an error arose"
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quiet", action="store_true", help=f"print {quiet} only")
    level.add_argument("--verbose", action="store_true", help=verbose)


def positive(text: str) -> int:
    """Parses a positive integer."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def start(arguments: argparse.Namespace) -> None:
    """Starts the log, and checks that JSON can be written before there is any."""
    given = vars(arguments)
    start_logging(quiet=given.get("quiet", False), verbose=given.get("verbose", False))
    file = given.get("json")
    if isinstance(file, str) and file != STDOUT:
        if not file.endswith(".json") or Path(file).is_dir():
            # It may be the next argument of the command.
            raise UsageError(
                f"--json takes a file that ends in .json, got {file!r}; to print JSON, put --json "
                "after the other arguments"
            )
        check_folder("--json", Path(file).parent)


def check_folder(option: str, folder: Path) -> None:
    """Checks that neither a folder nor one above it is a file."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{option}: {path} is not a folder; choose another")


def show_result(
    arguments: argparse.Namespace, result: object, shown: str | RenderableType | None
) -> None:
    """Prints the result of a command as text (None if it has been printed) or as JSON."""
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
    """Returns JSON in ASCII, whatever texts come from a file or a repo."""
    return json.dumps(value, indent=2, allow_nan=False)


def say(line: str) -> None:
    """Prints a line on standard output."""
    print(line)  # noqa: T201


def parse_options(texts: list[str], example: str, option: str = "--option") -> dict[str, Any]:
    """Parses ``KEY=VALUE`` arguments, whose values are YAML."""
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        try:
            options[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            equals = ""
        if not (key.isidentifier() and equals):
            raise UsageError(f"{option} takes KEY=VALUE, e.g. {example}, got {text!r}")
    return options
