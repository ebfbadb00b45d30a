"""``timm-lt convert``: weights of another project as a decoupled checkpoint."""

import argparse
import json
import re
from pathlib import Path

from timm_lt.cli.arguments import add_weights_options, model_options
from timm_lt.cli.common import Commands, add_command, add_output_options, show_result
from timm_lt.models.convert import convert_checkpoint
from timm_lt.run.folder import CHECKPOINT_ENTRIES, new_folder
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import ClassCounts

# A label, not a class name such as 007.
NUMBER = re.compile("0|[1-9][0-9]{0,17}")


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    convert = add_command(
        commands,
        "convert",
        description=(
            "Reads a checkpoint of Kang et al., of timm's train.py, or a plain state dict, and "
            "writes a decoupled checkpoint."
        ),
        examples=[
            "timm-lt convert lt_resnext50.imagenet_lt x50",
            "timm-lt convert net.pth birds --model convnext_tiny --head crt=crt.pth",
        ],
    )
    convert.add_argument("source", help="a published name, a URL, or a file")
    convert.add_argument("destination", type=Path, help="folder to write; must not exist")
    convert.add_argument("--model", help="the architecture; found by itself where it can be")
    convert.add_argument(
        "--head",
        action="append",
        default=[],
        metavar="NAME=URL_OR_FILE",
        help="a head from a file with the same backbone; may be repeated",
    )
    convert.add_argument(
        "--class-counts",
        type=Path,
        metavar="FILE",
        help="JSON with the training images of each class: a list in label order, or an object by "
        "label",
    )
    add_weights_options(convert, None)
    convert.add_argument("--overwrite", action="store_true", help="replace a checkpoint there")
    add_output_options(convert, quiet="what was written")
    convert.set_defaults(command=convert_weights)


def convert_weights(arguments: argparse.Namespace) -> None:
    """Writes the weights of another project as a decoupled checkpoint."""
    heads = {}
    for text in arguments.head:
        name, _, location = text.partition("=")
        if not (name and location) or name in heads:
            raise UsageError(f"--head takes NAME=URL_OR_FILE, each NAME once; got {text!r}")
        heads[name] = location
    counts = None
    if arguments.class_counts is not None:
        counts = _class_counts(arguments.class_counts)
    destination = arguments.destination
    with new_folder(destination, CHECKPOINT_ENTRIES, overwrite=arguments.overwrite) as folder:
        done = convert_checkpoint(
            arguments.source,
            folder,
            model=arguments.model,
            heads=heads,
            class_counts=counts,
            key=arguments.checkpoint_key,
            image_size=arguments.image_size,
            options=model_options(arguments),
        )
    result = {
        "folder": str(destination),
        "model": done.name,
        "found": done.found,
        "num_classes": done.num_classes,
        "heads": done.heads,
    }
    show_result(
        arguments,
        result,
        f"{destination}: {done.name} ({done.found}), {done.num_classes} classes, heads "
        f"{', '.join(done.heads)}",
    )


def _class_counts(path: Path) -> ClassCounts:
    try:
        counts: ClassCounts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--class-counts {path} cannot be read: {error}") from error
    # Keys are strings in JSON.
    if isinstance(counts, dict) and all(NUMBER.fullmatch(key) for key in counts):
        return {int(key): count for key, count in counts.items()}
    return counts
