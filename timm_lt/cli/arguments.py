"""The model and the data that commands take."""

import argparse
from pathlib import Path
from typing import Any, get_args

from torch import nn

from timm_lt.checkpoint import CONFIG, RECIPE, find_info
from timm_lt.cli.common import parse_options
from timm_lt.data.folder import IMAGE_SUFFIXES, suffix
from timm_lt.data.sources import DATASETS
from timm_lt.models.create import create_sized_model
from timm_lt.models.label_names import label_names
from timm_lt.models.repo import REPO, ModelSource
from timm_lt.models.weights_file import create_from_file
from timm_lt.run.parse import load_recipe
from timm_lt.run.recipe import ClassOrder, DataRecipe
from timm_lt.utils.checks import UsageError, check_integer, unknown_name
from timm_lt.utils.console import log, one_line

FOLDER, LIST, HUB = "folder", "list", "hub"
TABLES = ("parquet", "arrow")
RESERVED = ("name", "pretrained", "checkpoint", "head", "key", "image_size", "num_classes", "token")
MODEL_HELP = (
    "a pretrained model of timm, hf-hub:NAMESPACE/NAME, local-dir:FOLDER (or just the folder); "
    "with --checkpoint an architecture"
)
DATA_HELP = "folder of images, list of images, a data set's name, or NAMESPACE/NAME on the Hub"


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says where the images of the argument ``data`` are."""
    parser.add_argument("--root", help="folder with the files of a list or a data set")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the data set, e.g. test_fraction=0.3; may be repeated",
    )
    add_background_option(parser)


def add_background_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--background``."""
    parser.add_argument(
        "--background",
        default="auto",
        metavar="COLOR",
        help="behind transparent pixels, e.g. white, black or '#808080'; that of the model's "
        "checkpoint, or white, unless given",
    )


def add_class_order(parser: argparse.ArgumentParser) -> None:
    """Adds ``--class-order``."""
    parser.add_argument(
        "--class-order",
        choices=get_args(ClassOrder),
        help="how weights without class names number the classes: timm (1, 2, 10) or sorted (1, "
        "10, 2); found out on training images unless given",
    )


def add_weights_options(parser: argparse.ArgumentParser, checkpoint: str | None) -> None:
    """Adds what says how a model is built, and from which file.

    Args:
        parser: Of the command.
        checkpoint: Help of ``--checkpoint``; None adds no such option.
    """
    if checkpoint is not None:
        parser.add_argument("--checkpoint", metavar="FILE", help=checkpoint)
    parser.add_argument(
        "--checkpoint-key",
        metavar="KEY",
        help="key or prefix of the weights in that file, e.g. teacher, if it has several networks",
    )
    parser.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="the file's or the model's unless given"
    )
    parser.add_argument(
        "--model-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the model, e.g. global_pool=max, or mean, std, interpolation, crop_pct, "
        "crop_mode of its images; those of the file or model unless given; may be repeated",
    )


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of ``--model-option``, after a check of ``--image-size``."""
    if arguments.image_size is not None:
        check_integer("--image-size", arguments.image_size, minimum=1)
    options = parse_options(arguments.model_option, "global_pool=max", "--model-option")
    for key in options:
        if key in RESERVED:
            raise UsageError(f"--model-option {key} is set by other options of the command")
    return options


def data_of_run(given: str) -> DataRecipe | None:
    """Returns the data of the run in whose folder a model lies; None if it lies in none."""
    folder = ModelSource.parse(given).folder
    file = None if folder is None else folder / RECIPE
    return load_recipe(file).data if file is not None and file.is_file() else None


def load_model(
    given: str,
    *,
    head: str | None = None,
    checkpoint: str | None = None,
    key: str | None = None,
    image_size: int | None = None,
    **options: Any,
) -> nn.Module:
    """Loads the model that a user named, in evaluation mode.

    Args:
        given: See :data:`MODEL_HELP`.
        head: A head, or None.
        checkpoint: File with weights for the architecture, or None.
        key: Key or prefix of the weights in that file, or None.
        image_size: Side of the images in pixels, or None.
        **options: Of :func:`timm_lt.models.create.create_sized_model`.

    Raises:
        UsageError: If there is no such model, head or file, or they do not fit together.
    """
    name = ModelSource.parse(given).name
    if checkpoint is None:
        if key is not None:
            raise UsageError("--checkpoint-key is for a file of weights: give --checkpoint, too")
        model = create_sized_model(name, True, image_size, head=head, **options)
    elif head is not None:
        raise UsageError("--head is for a model with its own heads, not for a --checkpoint file")
    else:
        model = create_from_file(name, checkpoint, key=key, image_size=image_size, **options)
    log.debug(
        "%s: %s, head %s, weights of %s, %d classes, %d parameters",
        *(name, type(model).__name__, head or "linear", checkpoint or name),
        *(model.num_classes, sum(tensor.numel() for tensor in model.parameters())),
    )
    return model.eval()


def stored_heads(given: str) -> list[str]:
    """Returns the names of the heads that a model's checkpoint has beside the joint classifier."""
    source = ModelSource.parse(given)
    if source.repo is not None:
        return [*source.repo.read_info().heads]
    info = None if source.folder is None else find_info(source.folder)
    return [] if info is None else [*info.heads]


def class_names(model: nn.Module) -> list[str] | None:
    """Returns the names of a model's classes for a terminal; None if they are unknown."""
    names = label_names(model)
    return None if names is None else [one_line(name, 200) for name in names]


def check_is_list(path: Path) -> None:
    """Refuses files that are known by their endings to be no list of images."""
    kind = suffix(path.name)
    if kind in TABLES:
        raise UsageError(f"{path} is a table, no list: give hub, with --root {path}")
    if kind in IMAGE_SUFFIXES:
        raise UsageError(
            f"{path} is an image: give the folder that has a directory for each class, or a list"
        )


def find_data(data: str, root: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Finds what a user means by a folder, a list or a name.

    Args:
        data: What is meant.
        root: Folder with the files of a list or a data set, or None.
        options: Options of the data set.

    Returns:
        ``name``, ``root`` and ``options`` of the recipe's data.

    Raises:
        UsageError: If there is no such thing.
    """
    path = Path(data).expanduser()
    if data in DATASETS and not path.is_dir():
        return {"name": data, "root": root, "options": options}
    if path.is_dir():
        if (path / CONFIG).is_file():
            raise UsageError(f"{data} is a checkpoint, not a folder of images")
        if root is not None:
            raise UsageError("--root is for lists and data sets: a folder is its own root")
        return {"name": FOLDER, "root": str(path), "options": options}
    if path.is_file():
        check_is_list(path)
        start = str(path.parent) if root is None else root
        return {"name": LIST, "root": start, "options": {"train": str(path.resolve()), **options}}
    if REPO.fullmatch(data):
        return {"name": HUB, "root": None, "options": {"repo": data, **options}}
    raise unknown_name("data set (and no such folder or list):", data, list(DATASETS))
