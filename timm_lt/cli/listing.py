"""``timm-lt list``: registered names, or the heads of a checkpoint."""

import argparse

import timm
from rich.table import Table

import timm_lt
from timm_lt.checkpoint import read_checkpoint
from timm_lt.cli.common import Commands, add_command, add_output_options, show_result
from timm_lt.data import list_augmentations
from timm_lt.models.repo import ModelSource
from timm_lt.report.tables import head_table
from timm_lt.run.comparison import shipped_grids
from timm_lt.run.parse import shipped_recipes
from timm_lt.utils.checks import UsageError


def add_list(commands: Commands) -> None:
    """Adds the command to the parser."""
    listing = add_command(commands, "list", list_parts)
    listing.add_argument(
        "checkpoint",
        nargs="?",
        help="folder or local-dir:FOLDER, repo NAMESPACE/NAME[@REVISION] or hf-hub:NAMESPACE/NAME",
    )
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
        "recipes": list(shipped_recipes()),
        "grids": list(shipped_grids()),
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for kind, names in rows.items():
        more = ["and any other timm architecture"] if kind == "models" else []
        table.add_row(f"[bold]{kind.replace('_', ' ')}", ", ".join([*names, *more]))
    show_result(arguments, rows, table)
