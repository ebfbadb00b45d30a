"""The command line ``timm-lt COMMAND``, also ``python -m timm_lt COMMAND``."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table

import timm_lt
import train_lt
from timm_lt.checkpoint import METRICS, CheckpointInfo, load_head, read_checkpoint, save_checkpoint
from timm_lt.data import list_augmentations
from timm_lt.files import read_json, write_json
from timm_lt.heads import get_head
from timm_lt.recipe import shipped_recipes
from timm_lt.registry import UsageError
from timm_lt.run_folder import ENTRIES, LOGS, RECIPE, STATE

DIGESTS = "logits_sha256"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        # Its arguments are those of a recipe, which has its own parser.
        return train_lt.main(argv[1:], prog="timm-lt train")
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.command
    try:
        command(arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
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
    listing = commands.add_parser(
        "list",
        help="name what there is: models, heads, samplers, losses, data sets, recipes",
        description="Names the registered parts. Example: timm-lt list",
    )
    listing.set_defaults(command=list_parts)
    pack = commands.add_parser(
        "pack",
        help="write a smaller copy of a run's checkpoint",
        description=(
            "Copies the decoupled checkpoint of a run without its training state, in half "
            "precision. Example: timm-lt pack output/lt_test_resnet.glyph_lt birds"
        ),
    )
    pack.add_argument("source", type=Path, help="folder of a run, or a decoupled checkpoint")
    pack.add_argument("destination", type=Path, help="folder to write; must not exist")
    pack.add_argument("--dtype", choices=DTYPES, default="float16", help="type of the tensors")
    pack.add_argument("--overwrite", action="store_true", help="replace a checkpoint there")
    pack.set_defaults(command=pack_checkpoint)
    return parser


def list_parts(_: argparse.Namespace) -> None:
    """Prints the registered names, one row per kind."""
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


def pack_checkpoint(arguments: argparse.Namespace) -> None:
    """Writes a checkpoint again in another type, with its reports but no training state."""
    source, destination = arguments.source, arguments.destination
    info = read_checkpoint(source)
    if destination.exists():
        if not arguments.overwrite:
            raise UsageError(f"{destination} exists; replace it with --overwrite")
        if destination.resolve() == source.resolve():
            raise UsageError("source and destination are the same folder")
        read_checkpoint(destination)  # Refuses to delete anything else than a checkpoint.
        foreign = {path.name for path in destination.iterdir()} - (ENTRIES - {STATE, LOGS})
        if foreign:
            raise UsageError(f"{destination} holds more than a checkpoint: {sorted(foreign)}")
    with tempfile.TemporaryDirectory(dir=_existing_parent(destination)) as scratch:
        packed = Path(scratch) / "packed"
        _pack(source, packed, info, DTYPES[arguments.dtype])
        if destination.exists():
            shutil.rmtree(destination)
        destination.parent.mkdir(parents=True, exist_ok=True)
        packed.rename(destination)
    print(f"wrote {destination}")  # noqa: T201


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.resolve().parents if parent.is_dir())


def _pack(source: Path, destination: Path, info: CheckpointInfo, dtype: torch.dtype) -> None:
    model = timm_lt.create_model(f"local-dir:{source}")
    classifier = get_head(model)
    save_checkpoint(
        destination,
        model,
        heads={name: load_head(source, name, classifier) for name in info.heads},
        class_counts=info.class_counts,
        metrics={name: entry.metrics for name, entry in info.heads.items()},
        label_names=info.label_names,
        dtype=dtype,
    )
    if (source / METRICS).is_file():
        # The digests are those of the logits in full precision.
        metrics = read_json(source / METRICS)
        write_json(destination / METRICS, {k: v for k, v in metrics.items() if k != DIGESTS})
    for name in (RECIPE, "README.md"):
        if (source / name).is_file():
            shutil.copy2(source / name, destination / name)
    if (source / "plots").is_dir():
        shutil.copytree(source / "plots", destination / "plots")
