"""``timm-lt list`` and ``completion``: names for people, and for a shell's completion."""

import argparse

import shtab
import timm
from rich.table import Table

import timm_lt
from timm_lt.checkpoint import read_checkpoint
from timm_lt.cli import create_parser, inputs
from timm_lt.cli.common import Commands, add_command, add_output_options, say, show_result
from timm_lt.data import list_augmentations
from timm_lt.fitting import AUTO
from timm_lt.models.repo import ModelSource
from timm_lt.report.tables import head_table
from timm_lt.run import parse
from timm_lt.run.comparison import shipped_grids
from timm_lt.utils.checks import UsageError

# Placeholders of heads and files in the help, and names of arguments that are files or folders.
HEADS = ("HEAD", "NAME")
FILES = ("FILE", "FILE.json", "IMAGE", "SCRIPT")
INPUTS = ("checkpoint", "class_counts", "data", "folder", "model", "root", "source")
OUTPUTS = ("cache_dir", "destination", "output")


def add_list(commands: Commands) -> None:
    """Adds the command to the parser."""
    listing = add_command(commands, "list", list_parts)
    listing.add_argument("checkpoint", nargs="?", help=inputs.CHECKPOINT_HELP)
    add_output_options(listing, quiet="the names")


def list_parts(arguments: argparse.Namespace) -> None:
    """Lists the registered models, heads, samplers, losses, data sets and recipes.

    Or the heads of a checkpoint with options and metrics, without downloading weights.

    Examples:
        timm-lt list
        timm-lt list me/birds
        timm-lt list output/birds
    """
    given = arguments.checkpoint
    if given is not None:
        folder = ModelSource.find(given).folder
        if folder is None:
            raise UsageError(f"{given} is not a folder, nor a repo id or a packaged checkpoint")
        info = read_checkpoint(folder)
        figures = {key: getattr(info, key) for key in ("dataset", "num_classes", "class_counts")}
        figures["heads"] = {
            name: {key: getattr(head, key) for key in ("kind", "options", "metrics", "selection")}
            for name, head in info.heads.items()
        }
        show_result(arguments, figures, head_table(info))
        return
    rows: dict[str, list[str]] = {
        "models": timm.list_models("lt_*"),
        "pretrained": timm.list_pretrained("lt_*"),
        "heads": timm_lt.list_heads(),
        "samplers": timm_lt.list_samplers(),
        "losses": timm_lt.list_losses(),
        "data_sets": timm_lt.list_datasets(),
        "augmentations": list_augmentations(),
        "recipes": list(parse.shipped_recipes()),
        "grids": list(shipped_grids()),
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for kind, names in rows.items():
        more = ["and any other timm architecture"] if kind == "models" else []
        table.add_row(f"[bold]{kind.replace('_', ' ')}", ", ".join([*names, *more]))
    show_result(arguments, rows, table)


def add_completion(commands: Commands) -> None:
    """Adds the command to the parser."""
    completion = add_command(commands, "completion", print_script)
    completion.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)


def print_script(arguments: argparse.Namespace) -> None:
    """Prints a script with which a shell completes commands, options, choices and files at Tab.

    It takes some seconds to make: write it once to where your shell looks for such scripts. Recipes
    and grids are completed by their shipped names, heads by their kinds.

    Examples:
        timm-lt completion bash > ~/.local/share/bash-completion/completions/timm-lt
        timm-lt completion zsh > ~/.zfunc/_timm-lt
        timm-lt completion fish > ~/.config/fish/completions/timm-lt.fish
    """
    program = create_parser()
    parsers = subparsers(program)
    options = parse.create_parser("timm-lt train")
    parsers["train"].add_argument("recipe", nargs="?", choices=list(parse.shipped_recipes()))
    _add_options(parsers["train"], options)
    _add_options(parsers["compare"], options)
    for parser in parsers.values():
        for action in parser._actions:
            _complete(action)
    say(shtab.complete(program, arguments.shell))


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Returns the parsers of a program's commands by name."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(commands.choices)


def _add_options(parser: argparse.ArgumentParser, other: argparse.ArgumentParser) -> None:
    """Gives a parser the options of another one, with their choices."""
    known = {option for action in parser._actions for option in action.option_strings}
    for action in other._actions:
        names = [name for name in action.option_strings if name.startswith("--")]
        if names and not known.intersection(names):
            kind = "store_true" if action.nargs == 0 else "store"
            parser.add_argument(*names, action=kind).choices = action.choices


def _complete(action: argparse.Action) -> None:
    """Offers recipes, kinds of heads (by which most heads of checkpoints are called), or files."""
    if action.option_strings == ["--recipe"]:
        action.choices = list(parse.shipped_recipes())
    elif action.dest == "grid":
        action.choices = list(shipped_grids())
    elif action.dest in ("head", "heads") and action.metavar in HEADS:
        action.choices = [*timm_lt.list_heads(), AUTO]
    elif action.choices is None and (
        action.metavar in FILES or action.dest.rpartition(".")[2] in (*INPUTS, *OUTPUTS)
    ):
        action.complete = shtab.FILE  # type: ignore[attr-defined]
