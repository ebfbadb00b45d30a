"""What can be wrong with the recipes of a comparison and is found without their data."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from timm_lt.checkpoint import read_config
from timm_lt.data import Splits
from timm_lt.data.sources import check_protocol, checked_source, dataset_from_arrays
from timm_lt.losses import create_loss
from timm_lt.models.create import LOCAL_DIR, split_options
from timm_lt.run.comparison.grid import AFTER, Grid
from timm_lt.run.images import create_images
from timm_lt.run.network import create_network
from timm_lt.run.parts import check_network, check_parts, sampler_options
from timm_lt.run.recipe import ModelRecipe, Recipe
from timm_lt.run.recipe_checks import (
    check_heads,
    check_options_of_parts,
    check_views,
    head_kind,
)
from timm_lt.samplers import create_sampler
from timm_lt.training import check_batch_size, check_optimization
from timm_lt.utils.accelerator import check_precision
from timm_lt.utils.checks import UsageError


def check_recipes(grid: Grid, recipes: Mapping[str, Recipe]) -> None:
    """Checks all that a run checks before it trains, but for what its images and labels show.

    Args:
        grid: The grid.
        recipes: By representation, each behind the one from which it goes on.

    Raises:
        UsageError: For a wrong recipe; the message names its representation.
    """
    splits, networks = _two_images(), dict[str, ModelRecipe]()
    for name, recipe in recipes.items():
        after = grid.representations[name].get(AFTER)
        try:
            _check_without_model(recipe)
            networks[name] = (
                _network(recipe.model)
                if after is None
                else _network_after(recipe.model, networks[after], recipes[after])
            )
            _check_with_model(recipe, networks[name], splits)
        except UsageError as error:
            raise UsageError(f"representation {name!r}: {error}") from error


def _check_without_model(recipe: Recipe) -> None:
    check_heads(recipe)
    check_options_of_parts(recipe)
    if recipe.epochs:
        arguments = recipe.optimizer.arguments(), recipe.scheduler.arguments()
        check_optimization(*arguments, recipe.epochs)
    check_protocol(recipe.data.name, recipe.protocol)
    checked_source(recipe.data.name, recipe.data.root, dict(recipe.data.options))
    check_views(recipe)
    check_precision(recipe.mixed_precision)
    check_batch_size(recipe.batch_size, recipe.batch_size, 1, recipe.accumulation_steps)


def _check_with_model(recipe: Recipe, network: ModelRecipe, splits: Splits) -> None:
    """Checks the parts that go together, made of two classes in place of those of the data."""
    if not recipe.epochs:
        return
    sampler = create_sampler(recipe.sampler.name, [0, 1], num_samples=2, **sampler_options(recipe))
    loss = create_loss(recipe.loss.name, class_counts=[2, 1], **recipe.loss.options)
    model = create_network(replace(recipe, model=network), _num_classes(network))
    batch = recipe.batch_size // recipe.accumulation_steps
    check_parts(recipe, sampler, loss, model, batch=batch)
    images = create_images(recipe, splits, model, workers=0)
    check_network(recipe, model, images["val"], batch=batch)


def _two_images() -> Splits:
    """Returns splits of an image in each of two classes."""
    images = np.zeros((2, 8, 8, 3), np.uint8)
    split = dataset_from_arrays(images, np.arange(2), ["first", "second"])
    return Splits.from_datasets(dict.fromkeys(("train", "val", "test"), split))


def _network(given: ModelRecipe) -> ModelRecipe:
    """Returns a network whose weights do not matter: only those of a folder are there for sure."""
    in_folder = given.name.startswith(LOCAL_DIR)
    return replace(given, pretrained=in_folder, fresh_classifier=False)


def _network_after(given: ModelRecipe, network: ModelRecipe, source: Recipe) -> ModelRecipe:
    """Returns a network that goes on from another, whose head is folded or one that was fitted."""
    head = network.options.get("head")
    _, kept = split_options(head, {k: v for k, v in network.options.items() if k != "head"})
    options = {**kept, **given.options}
    if options.get("head") in source.heads:
        options["head"] = head_kind(source, options["head"])
    return replace(network, options=options)


def _num_classes(network: ModelRecipe) -> int:
    if not network.name.startswith(LOCAL_DIR):
        return 2
    # A head that was fitted there has as many.
    return int(read_config(Path(network.name.removeprefix(LOCAL_DIR))).get("num_classes") or 2)
