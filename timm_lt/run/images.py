"""The images of a recipe, as its model takes them."""

from collections.abc import Mapping
from typing import get_args

import torch
from accelerate import Accelerator
from torch import nn

from timm_lt.checkpoint import background_of
from timm_lt.data import Splits, create_augmentation, list_augmentations
from timm_lt.data.images import Images
from timm_lt.data.readable import check_classes_left, verify_images
from timm_lt.data.sources import Split
from timm_lt.models.preprocessing import FIELDS, image_config
from timm_lt.run.recipe import Recipe
from timm_lt.utils.accelerator import available_cores
from timm_lt.utils.checks import Problems, UsageError, check_choice, check_integer

AUTO = "auto"
# The augmentation that is timm's: images are decoded when they are drawn.
TIMM = "timm"


def on_background(recipe: Recipe, splits: Splits, model: nn.Module) -> Splits:
    """Returns the splits with the background of the recipe, or of the model's checkpoint."""
    given = recipe.data.background
    return splits.on_background(background_of(model) if given == AUTO else given)


def create_images(
    recipe: Recipe, splits: Splits, model: nn.Module, *, workers: int | None
) -> dict[Split, Images]:
    """Returns the images of every split as the model takes them; only train is augmented."""
    data = recipe.data
    config = image_config(model)
    size = (data.image_size, data.image_size) if data.image_size else config["input_size"][1:]
    images: dict[Split, Images] = {}
    if data.augmentation == TIMM:
        # As many for each process that trains as there are cores for it.
        number = torch.get_num_threads() if workers is None else workers
        check_integer("workers", number, minimum=0, maximum=64 * available_cores())
        preprocessing = {key: config[key] for key in FIELDS}
        for split in get_args(Split):
            images[split] = splits.stored_images(
                split,
                size=size,
                preprocessing=preprocessing,
                augmentation=data.augmentation_options if split == "train" else None,
                seed=recipe.seed,
                workers=number,
                unreadable=data.unreadable,
            )
        return images
    if workers:
        raise UsageError("--workers decode images for data.augmentation timm; leave it out")
    check_choice("augmentation", data.augmentation, (*list_augmentations(), TIMM))
    augmentation = create_augmentation(data.augmentation, **data.augmentation_options)
    problems = Problems()
    for split in get_args(Split):
        with problems.collected():
            images[split] = splits.images(
                split,
                size=size,
                mean=config["mean"],
                std=config["std"],
                augmentation=augmentation if split == "train" else None,
                seed=recipe.seed,
                unreadable=data.unreadable,
            )
    problems.check()
    return images


def checked_images(
    recipe: Recipe,
    splits: Splits,
    model: nn.Module,
    accelerator: Accelerator,
    problems: Problems,
    *,
    workers: int | None,
) -> dict[Split, Images]:
    """Returns the images of every split, which can be read.

    Args:
        recipe: What to run.
        splits: The data.
        model: The model that takes them.
        accelerator: Of the run.
        problems: What was found before; what is wrong with the images is reported with it.
        workers: Processes that decode images; None is by the cores.

    Raises:
        UsageError: For all problems together.
    """
    images: dict[Split, Images] = {}
    with problems.collected():
        images = create_images(recipe, splits, model, workers=workers)
    with problems.collected():
        check_content(recipe, splits, images, accelerator)
    problems.check()
    return images


def check_content(
    recipe: Recipe, splits: Splits, images: Mapping[Split, Images], accelerator: Accelerator
) -> None:
    """Checks that images can be read; or, if some are left out, that others of each class can."""
    data = recipe.data
    if data.augmentation != TIMM:
        unreadable = {str(split): found.unreadable_rows() for split, found in images.items()}
    elif data.verify:
        unreadable = verify_images(splits.datasets, accelerator, unreadable=data.unreadable)
    else:
        return
    check_classes_left(splits.labels, unreadable, splits.label_names)
