"""``timm-lt pack``: a smaller copy of a run."""

import argparse
import shutil
from pathlib import Path

import torch

import timm_lt
from timm_lt.checkpoint import (
    CARD,
    METRICS,
    PLOTS,
    RECIPE,
    CheckpointInfo,
    load_heads,
    read_checkpoint,
    save_checkpoint,
)
from timm_lt.cli.common import Commands, add_command, add_output_options, show_result
from timm_lt.run.folder import CHECKPOINT_ENTRIES, new_folder
from timm_lt.utils.files import read_json, write_json

DIGESTS = "logits_sha256"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    pack = add_command(
        commands,
        "pack",
        description=(
            "Copies the decoupled checkpoint of a run without its training state, in half "
            "precision."
        ),
        examples=[
            "timm-lt pack output/lt_test_resnet.glyph_lt birds",
        ],
    )
    pack.add_argument("source", type=Path, help="folder of a run, or a decoupled checkpoint")
    pack.add_argument("destination", type=Path, help="folder to write; must not exist")
    pack.add_argument("--dtype", choices=DTYPES, default="float16", help="type of the tensors")
    pack.add_argument("--overwrite", action="store_true", help="replace a checkpoint there")
    add_output_options(pack, quiet="what was written")
    pack.set_defaults(command=pack_checkpoint)


def pack_checkpoint(arguments: argparse.Namespace) -> None:
    """Writes a checkpoint again in another type, with its reports but no training state."""
    source, destination = arguments.source, arguments.destination
    info = read_checkpoint(source)
    with new_folder(
        destination, CHECKPOINT_ENTRIES, overwrite=arguments.overwrite, source=source
    ) as folder:
        _pack(source, folder, info, DTYPES[arguments.dtype])
    result = {"folder": str(destination), "dtype": arguments.dtype, "heads": list(info.heads)}
    show_result(arguments, result, f"wrote {destination}")


def _pack(source: Path, destination: Path, info: CheckpointInfo, dtype: torch.dtype) -> None:
    model = timm_lt.create_model(f"local-dir:{source}")
    save_checkpoint(
        destination,
        model,
        heads={name: load_heads(source, name, model) for name in info.heads},
        class_counts=info.class_counts,
        metrics={name: entry.metrics for name, entry in info.heads.items()},
        label_names=info.label_names,
        dataset=info.dataset,
        shot_rule=info.shot_rule,
        protocol=info.protocol,
        seed=info.seed,
        dtype=dtype,
    )
    if (source / METRICS).is_file():
        # The digests are those of the logits in full precision.
        metrics = read_json(source / METRICS)
        write_json(destination / METRICS, {k: v for k, v in metrics.items() if k != DIGESTS})
    for name in (RECIPE, CARD):
        if (source / name).is_file():
            shutil.copy2(source / name, destination / name)
    if (source / PLOTS).is_dir():
        shutil.copytree(source / PLOTS, destination / PLOTS)
