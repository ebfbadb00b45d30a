"""``timm-lt completion``: a script with which a shell completes commands and options."""

import argparse
from functools import partial

import shtab

from timm_lt.cli import compare
from timm_lt.cli.common import Commands, add_command, say
from timm_lt.comparison import shipped_grids
from timm_lt.recipe import create_parser, shipped_recipes

# What stands for a file or a folder in the help.
FILES = ("FILE", "FILE.json", "FILE_OR_URL", "IMAGE", "SCRIPT")
PLACES = ("data", "model", "source", "destination", "folder", "output", "root", "cache_dir")


def add_parser(commands: Commands, program: argparse.ArgumentParser) -> None:
    """Adds the command to the parser of the program that is to be completed."""
    completion = add_command(
        commands,
        "completion",
        summary="print a script for tab completion",
        description=(
            "Prints a script with which a shell completes commands, options and their choices when "
            "you press Tab. Evaluate it in the shell, or in the file that the shell starts with."
        ),
        examples=[
            'eval "$(timm-lt completion bash)"',
            "timm-lt completion zsh > ~/.zfunc/_timm-lt",
            "timm-lt completion fish > ~/.config/fish/completions/timm-lt.fish",
        ],
    )
    completion.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    completion.set_defaults(command=partial(print_script, program))


def print_script(program: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Prints the script for a shell."""
    for name, parser in subparsers(program).items():
        if name == "train":
            parser.add_argument("recipe", nargs="?", choices=list(shipped_recipes()))
            _add_options(parser, create_parser("timm-lt train"))
        elif name == "compare":
            parser.add_argument("grid", nargs="?", choices=list(shipped_grids()))
            _add_options(parser, compare.create_parser())
            _add_options(parser, create_parser("timm-lt train"))
        _complete_files(parser)
    say(shtab.complete(program, arguments.shell))


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Returns the parsers of a program's commands by name."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(commands.choices)


def _add_options(parser: argparse.ArgumentParser, other: argparse.ArgumentParser) -> None:
    """Gives a parser the options of another one, for their names and choices alone."""
    known = {option for action in parser._actions for option in action.option_strings}
    for action in other._actions:
        names = [name for name in action.option_strings if name.startswith("--")]
        if not names or known.intersection(names):
            continue
        kind = "store_true" if action.nargs == 0 else "store"
        parser.add_argument(*names, action=kind).choices = action.choices


def _complete_files(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if action.choices is None and (action.metavar in FILES or action.dest in PLACES):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
