"""What a recipe trains with: model, sampler, loss and images, and whether they go together."""

import inspect
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import nn

from timm_lt.data import Splits
from timm_lt.data.images import Images
from timm_lt.data.sources import Split
from timm_lt.losses import LOSSES, create_loss
from timm_lt.run.class_order import order_classes
from timm_lt.run.images import checked_images, on_background
from timm_lt.run.network import create_network, start_network
from timm_lt.run.recipe import Recipe, RunOptions
from timm_lt.run.recipe_checks import check_heads_of_data, check_objective
from timm_lt.samplers import SAMPLERS, ClassSampler, create_sampler
from timm_lt.training import (
    check_batch_size,
    check_classifier,
    check_model,
    check_pairs,
    check_schedule,
    check_statistics,
    check_trained,
    check_update,
)
from timm_lt.utils.checks import Problems, UsageError


@dataclass
class Trainer:
    """What the representation stage has beside the model and the images."""

    sampler: ClassSampler
    loss: nn.Module


def create_parts(
    recipe: Recipe, splits: Splits, accelerator: Accelerator, options: RunOptions
) -> tuple[Trainer | None, nn.Module, Splits, dict[Split, Images]]:
    """Creates what trains, model and images; what is wrong with the data is reported together.

    The splits are returned with the background of the run, and the classes in the order of the
    classifier that the model keeps.
    """
    problems = Problems()
    with problems.collected():
        check_objective(recipe, splits)
    with problems.collected():
        check_heads_of_data(recipe, splits)
    model = create_network(recipe, splits.num_classes)
    splits = on_background(recipe, splits, model)
    splits = order_classes(recipe, splits, model.to(accelerator.device))
    trainer = _create_trainer(recipe, splits, accelerator, problems) if recipe.epochs else None
    batch = recipe.batch_size // (
        accelerator.num_processes * accelerator.gradient_accumulation_steps
    )
    if trainer is not None:
        check_parts(recipe, trainer.sampler, trainer.loss, model, batch=batch)
        start_network(recipe, trainer.loss, model, splits.num_classes, splits.label_names)
    images = checked_images(recipe, splits, model, accelerator, problems, workers=options.workers)
    if trainer is None:
        check_model(model, images["val"])
    else:
        check_network(recipe, model, images["val"], batch=batch)
    return trainer, model, splits, images


def _create_trainer(
    recipe: Recipe, splits: Splits, accelerator: Accelerator, problems: Problems
) -> Trainer:
    """Creates what trains the representation."""
    sampler = create_sampler(
        recipe.sampler.name,
        splits.labels["train"],
        seed=recipe.seed,
        num_classes=splits.num_classes,
        **sampler_options(recipe),
    )
    processes, steps = accelerator.num_processes, accelerator.gradient_accumulation_steps
    with problems.collected():
        check_batch_size(recipe.batch_size, len(sampler), processes, steps)
    options = dict(recipe.loss.options)
    if "seed" in inspect.signature(LOSSES[recipe.loss.name]).parameters:
        options.setdefault("seed", recipe.seed)
    loss = create_loss(recipe.loss.name, class_counts=splits.class_counts, **options)
    return Trainer(sampler, loss)


def check_network(recipe: Recipe, model: nn.Module, images: Images, *, batch: int) -> None:
    """Checks that a model takes images of this size, and so many of them at once in training."""
    check_model(model, images)
    trained, bn = recipe.model.trained, recipe.model.bn
    check_statistics(model, images.size, batch=batch, trained=trained, bn=bn)


def check_parts(
    recipe: Recipe, sampler: ClassSampler, loss: nn.Module, model: nn.Module, *, batch: int
) -> None:
    """Checks that the parts of a recipe go together, for batches of so many images of a process."""
    check_schedule(loss, recipe.epochs)
    check_update(
        loss,
        batch=batch,
        mixup=recipe.mixup.arguments(),
        ema=recipe.ema.arguments(),
        clip_grad=recipe.clip_grad,
        clip_mode=recipe.clip_mode,
        max_norm=recipe.max_norm,
    )
    check_pairs(model, sampler, loss, batch=batch)
    check_classifier(loss, model)
    check_trained(model, recipe.model.trained, recipe.model.bn)


def sampler_options(recipe: Recipe) -> dict[str, Any]:
    """Returns the options of the sampler; a schedule is as long as the training."""
    options = dict(recipe.sampler.options)
    scheduled = "epochs" in inspect.signature(SAMPLERS[recipe.sampler.name]).parameters
    if scheduled and options.setdefault("epochs", recipe.epochs) != recipe.epochs:
        raise UsageError(
            f"sampler.options.epochs is {options['epochs']}, but training has {recipe.epochs} "
            "epochs: leave it out"
        )
    return options
