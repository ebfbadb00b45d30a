"""The network of a recipe: the model with its joint classifier, as training starts.

The images of a recipe, as its model takes them.

What a recipe trains with: model, sampler, loss and images, and whether they go together.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator
from torch import nn

from timm_lt.checkpoint import background_of, find_info
from timm_lt.data import Splits, create_augmentation, list_augmentations
from timm_lt.data.decode import check_classes_left, verify_images
from timm_lt.data.images import Images
from timm_lt.data.sources import Split
from timm_lt.heads import HEADS, find_classifiers, set_head
from timm_lt.models.create import FIELDS, create_sized_model, image_config, split_options
from timm_lt.models.label_names import is_for
from timm_lt.models.repo import LOCAL_DIR
from timm_lt.models.weights_file import classes_of_file, create_from_file
from timm_lt.run.recipe import ModelRecipe, Recipe
from timm_lt.training import (
    start_classifier,
)
from timm_lt.utils.accelerator import available_cores
from timm_lt.utils.checks import Problems, UsageError, check_choice, check_integer


def create_network(recipe: Recipe, num_classes: int) -> nn.Module:
    """Creates the model of a recipe with its joint classifier, from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    given = recipe.model
    head, ours, theirs = _head_put_anew(given)
    try:
        if given.checkpoint is None:
            model = create_sized_model(
                given.name,
                given.pretrained,
                recipe.data.image_size,
                num_classes=num_classes,
                **theirs,
            )
        else:
            model = create_from_file(
                given.name,
                given.checkpoint,
                num_classes=num_classes,
                classifier=False if given.fresh_classifier else None,
                key=given.checkpoint_key,
                image_size=recipe.data.image_size,
                **theirs,
            )
    except TypeError as error:
        raise UsageError(f"model.options: {error}") from error
    if head is not None:
        set_head(model, head, **ours)
    if given.fresh_classifier:
        _draw_classifier(recipe, model)
    return model


def _file_has_classifier(given: ModelRecipe, model: nn.Module, num_classes: int) -> bool:
    """Returns whether a file of weights has a classifier of so many classes."""
    if given.checkpoint is None:
        return False
    return classes_of_file(given.checkpoint, model, given.checkpoint_key) == num_classes


def _head_put_anew(given: ModelRecipe) -> tuple[str | None, dict[str, Any], dict[str, Any]]:
    """Returns a head for the classifier of a finished run, its options, and those of the model.

    A head that the run has fitted is loaded with it, and none is put on then.
    """
    head = str(given.options.get("head"))
    if not given.name.startswith(LOCAL_DIR) or head not in HEADS or not HEADS[head].own_state:
        return None, {}, given.options
    folder = Path(given.name.removeprefix(LOCAL_DIR))
    info = find_info(folder)
    if info is not None and head in info.heads:
        return None, {}, given.options
    ours, theirs = split_options(head, given.options)
    return head, ours, {key: value for key, value in theirs.items() if key != "head"}


def has_classifier(recipe: Recipe, model: nn.Module, splits: Splits) -> bool:
    """Returns whether the classifier of a model with weights is one for the classes of the data.

    It has as many, and where both have names of the classes, they are the same in any order.
    """
    return _keeps_classifier(recipe.model, model, splits.num_classes, splits.label_names)


def _keeps_classifier(
    given: ModelRecipe, model: nn.Module, num_classes: int, names: Sequence[str] | None
) -> bool:
    config = getattr(model, "pretrained_cfg", None) or {}
    stored = _file_has_classifier(given, model, num_classes) or (
        given.pretrained and config.get("num_classes") == num_classes
    )
    return stored and not given.fresh_classifier and is_for(model, names) is not False


def start_network(
    recipe: Recipe,
    loss: nn.Module,
    model: nn.Module,
    num_classes: int,
    names: Sequence[str] | None = None,
) -> None:
    """Gives the classifier the start that the loss wants, unless it is a pretrained one.

    Args:
        recipe: The recipe.
        loss: What is minimised.
        model: The model; it is changed in place.
        num_classes: Number of classes C.
        names: Names of the classes, (C,); the pretrained classifier of others is drawn anew.
    """
    if _keeps_classifier(recipe.model, model, num_classes, names):
        return
    if recipe.model.pretrained:
        _draw_classifier(recipe, model)
    start_classifier(loss, model, num_classes)


def _draw_classifier(recipe: Recipe, model: nn.Module) -> None:
    # The same bits, whatever was drawn while the model was made.
    torch.manual_seed(recipe.seed)
    for classifier in find_classifiers(model).values():
        classifier.reset_parameters()


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
