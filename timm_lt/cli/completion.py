"""``timm-lt completion``: a script with which a shell completes commands and options."""

import argparse
from functools import partial

import shtab

from timm_lt.cli import compare
from timm_lt.cli.common import Commands, add_command, say
from timm_lt.fitting import AUTO
from timm_lt.heads import list_heads
from timm_lt.run.comparison import shipped_grids
from timm_lt.run.parse import create_parser, shipped_recipes

# What stands for a head, a file or a folder in the help.
HEADS = ("HEAD", "NAME")
FILES = ("FILE", "FILE.json", "IMAGE", "SCRIPT")
PLACES = (
    "cache_dir",
    "checkpoint",
    "class_counts",
    "data",
    "destination",
    "folder",
    "model",
    "output",
    "root",
    "source",
)


def add_parser(commands: Commands, program: argparse.ArgumentParser) -> None:
    """Adds the command to the parser of the program that is to be completed."""
    completion = add_command(
        commands,
        "completion",
        summary="print a script for tab completion",
        description=(
            "Prints a script with which a shell completes commands, options, their choices and "
            "files when you press Tab. It takes some seconds to make: write it once to where your "
            "shell looks for such scripts. Recipes and grids are completed by their shipped names, "
            "heads by their kinds."
        ),
        examples=[
            "timm-lt completion bash > ~/.local/share/bash-completion/completions/timm-lt",
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
            own = compare.create_parser()
            for action in own._actions:
                if action.dest == "recipe":
                    action.choices = list(shipped_recipes())
            _add_options(parser, own)
            _add_options(parser, create_parser("timm-lt train"))
        _complete_heads(parser)
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
        added = parser.add_argument(*names, action=kind)
        added.choices = action.choices


def _complete_heads(parser: argparse.ArgumentParser) -> None:
    """Offers the kinds of heads, after which those of a checkpoint are called unless renamed."""
    for action in parser._actions:
        if action.dest in ("head", "heads") and action.metavar in HEADS:
            action.choices = [*list_heads(), AUTO]


def _complete_files(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        place = action.dest.rpartition(".")[2]
        if action.choices is None and (action.metavar in FILES or place in PLACES):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
