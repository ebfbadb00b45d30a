"""The model and the data that commands take."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from timm_lt.checkpoint import CONFIG
from timm_lt.cli.common import parse_options, positive
from timm_lt.data.folder import IMAGE_SUFFIXES, suffix
from timm_lt.data.sources import DATASETS
from timm_lt.models.create import create_sized_model
from timm_lt.models.repo import REPO
from timm_lt.models.weights_file import create_from_file
from timm_lt.run.recipe import ClassOrder, DataRecipe, ModelRecipe, prefixed
from timm_lt.utils.checks import UsageError, unknown_name

MODEL_HELP = (
    "a pretrained model of timm, hf-hub:NAMESPACE/NAME, local-dir:FOLDER (or just the folder); "
    "with --checkpoint an architecture"
)
TABLES = ("parquet", "arrow")
BACKGROUND_HELP = "behind transparent pixels, e.g. white, black or '#808080'; by default"
CHECKPOINT_HELP = (
    "folder or local-dir:FOLDER, repo NAMESPACE/NAME[@REVISION] or hf-hub:NAMESPACE/NAME"
)
DATA_HELP = "folder of images, list of images, a data set's name, or NAMESPACE/NAME on the Hub"


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the argument ``data``: ``--root`` and ``--option``."""
    parser.add_argument("--root", help="folder with the files of a list or a data set")
    add_option(parser, "option of the data set, e.g. test_fraction=0.3")


def add_option(parser: argparse.ArgumentParser, text: str, name: str = "--option") -> None:
    """Adds an option ``KEY=VALUE``, for :func:`~timm_lt.cli.common.parse_options`."""
    text = f"{text}; may be repeated"
    parser.add_argument(name, action="append", default=[], metavar="KEY=VALUE", help=text)


def add_compute_options(parser: argparse.ArgumentParser, workers: int | None = None) -> None:
    """Adds ``--threads`` and ``--workers``, with a default of the latter."""
    default = "as the cores allow" if workers is None else workers
    parser.add_argument("--threads", type=int, help="CPU threads; all by default")
    decode = f"processes that decode images; by default {default}"
    parser.add_argument("--workers", type=int, default=workers, help=decode)


def add_weights_options(parser: argparse.ArgumentParser, checkpoint: str | None) -> None:
    """Adds the options of a model and its images; with a help for ``--checkpoint``, that too."""
    add = parser.add_argument
    if checkpoint is not None:
        add("--checkpoint", metavar="FILE", help=checkpoint)
        order = (
            "order of the classes in weights without class names: timm (1, 2, 10) or sorted "
            "(1, 10, 2); by default determined from training images, in predict that of --names"
        )
        add("--class-order", choices=get_args(ClassOrder), help=order)
        color = f"{BACKGROUND_HELP} that of the model's checkpoint, or white"
        add("--background", default="auto", metavar="COLOR", help=color)
    key = "key or prefix of the weights in that file, e.g. teacher, if it has several networks"
    add("--checkpoint-key", metavar="KEY", help=key)
    size = "by default that of the file or model"
    add("--image-size", type=positive, metavar="PIXELS", help=size)
    options = "global_pool=max, or mean, std, interpolation, crop_pct, crop_mode of its images"
    add_option(parser, f"argument of the model, e.g. {options}; {size}", "--model-option")


def model_recipe(arguments: argparse.Namespace, name: str) -> ModelRecipe:
    """Returns a model, by its name in :class:`ModelSource`, with :func:`add_weights_options`."""
    return ModelRecipe(
        name,
        pretrained=arguments.checkpoint is None,
        checkpoint=arguments.checkpoint,
        checkpoint_key=arguments.checkpoint_key,
        class_order=arguments.class_order,
        options=parse_options(arguments.model_option, "global_pool=max", "--model-option"),
    )


def data_recipe(arguments: argparse.Namespace) -> DataRecipe:
    """Returns the data of the argument ``data`` and its options, with the model's preprocessing."""
    options = parse_options(arguments.option, "test_fraction=0.3")
    return replace(
        find_data(arguments.data, arguments.root, options),
        augmentation="timm",
        background=arguments.background,
        image_size=arguments.image_size,
        unreadable="skip",
    )


def load_model(
    recipe: ModelRecipe, image_size: int | None, *, head: str | None = None, **options: Any
) -> nn.Module:
    """Loads a model, with a head or else its joint classifier, in evaluation mode."""
    options |= recipe.options
    with prefixed("model"):
        if recipe.checkpoint is None:
            return create_sized_model(recipe.name, True, image_size, head=head, **options).eval()
        if head is not None:
            raise UsageError("--head is for a model with its own heads, not for --checkpoint")
        options |= {"key": recipe.checkpoint_key, "image_size": image_size}
        return create_from_file(recipe.name, recipe.checkpoint, **options).eval()


def find_data(data: str, root: str | None, options: dict[str, Any]) -> DataRecipe:
    """Finds the data that a user means by a folder, a list, a data set's name or a repo id."""
    path = Path(data).expanduser()
    if path.is_dir():
        if (path / CONFIG).is_file():
            raise UsageError(f"{data} is a checkpoint, not a folder of images")
        if root is not None:
            raise UsageError("--root is for lists and data sets; a folder is its own root")
        return DataRecipe("folder", str(path), options)
    if data in DATASETS:
        return DataRecipe(data, root, options)
    faults = dict.fromkeys(IMAGE_SUFFIXES, "an image: give a folder of images, or a list of them")
    faults |= dict.fromkeys(TABLES, f"a table, not a list: give hub, with --root {path}")
    if fault := faults.get(suffix(path.name)):
        raise UsageError(f"{path} is {fault}")
    if path.is_file():
        start = str(path.parent) if root is None else root
        return DataRecipe("list", start, {"train": str(path.resolve()), **options})
    if REPO.fullmatch(data):
        return DataRecipe("hub", None, {"repo": data, **options})
    raise unknown_name("data set (and no such folder or list):", data, list(DATASETS))
