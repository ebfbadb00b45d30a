"""The network of a recipe: the model with its joint classifier, as training starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from timm_lt.checkpoint import BLOCK, read_checkpoint, read_config
from timm_lt.data import Splits
from timm_lt.heads import HEADS, find_classifiers, set_head
from timm_lt.models.create import LOCAL_DIR, split_options
from timm_lt.models.label_names import is_for
from timm_lt.models.preprocessing import create_sized_model
from timm_lt.models.weights_file import classes_of_file, create_from_file
from timm_lt.run.recipe import ModelRecipe, Recipe
from timm_lt.training import start_classifier
from timm_lt.utils.checks import UsageError


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
    if BLOCK in read_config(folder) and head in read_checkpoint(folder).heads:
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
