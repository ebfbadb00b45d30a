"""``timm-lt list``: what there is, or the heads of a checkpoint."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import timm
from rich.console import Console
from rich.table import Table

import timm_lt
from timm_lt.checkpoint import read_checkpoint
from timm_lt.cli.common import Commands
from timm_lt.data import list_augmentations
from timm_lt.recipe import shipped_recipes
from timm_lt.registry import UsageError
from timm_lt.repo import Repo
from timm_lt.report import head_table


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    listing = commands.add_parser(
        "list",
        help="name what there is; or the heads of a checkpoint",
        description=(
            "Names the registered models, heads, samplers, losses, data sets and recipes; or the "
            "heads of a checkpoint with options and metrics, without downloading weights. "
            "Examples: timm-lt list; timm-lt list me/birds; timm-lt list output/birds"
        ),
    )
    listing.add_argument(
        "checkpoint", nargs="?", help="folder, or Hub repo NAMESPACE/NAME[@REVISION]"
    )
    listing.set_defaults(command=list_parts)


def list_parts(arguments: argparse.Namespace) -> None:
    """Prints the registered names, one row per kind; or the heads of a checkpoint."""
    place = arguments.checkpoint
    if place is not None:
        is_folder = Path(place).is_dir()
        if not is_folder and "/" not in place:
            raise UsageError(f"{place!r} is no folder here, nor a repo NAMESPACE/NAME of the Hub")
        info = read_checkpoint(place) if is_folder else Repo.parse(place).read_info()
        Console().print(head_table(info))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows: dict[str, Iterable[str]] = {
        "models": [*timm.list_models("lt_*"), "and any other timm architecture"],
        "pretrained": timm.list_pretrained("lt_*"),
        "heads": timm_lt.list_heads(),
        "samplers": timm_lt.list_samplers(),
        "losses": timm_lt.list_losses(),
        "data sets": timm_lt.list_datasets(),
        "augmentations": list_augmentations(),
        "recipes": shipped_recipes(),
    }
    for kind, names in rows.items():
        table.add_row(f"[bold]{kind}", ", ".join(names))
    Console().print(table)
