"""From a recipe to objects: everything is checked and made before anything is written."""

import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import timm.data
import torch
from accelerate import Accelerator
from filelock import FileLock
from torch import nn

from timm_lt.accelerator import (
    available_cores,
    create_accelerator,
    keep_freed_memory,
    set_cpu_threads,
)
from timm_lt.console import log, progress, start_logging
from timm_lt.data import Splits, create_augmentation, create_splits, list_augmentations
from timm_lt.data.identity import split_digests
from timm_lt.data.images import Images
from timm_lt.data.readable import check_classes_left, verify_images
from timm_lt.data.sources import Split
from timm_lt.heads import find_classifiers
from timm_lt.losses import create_loss
from timm_lt.metrics import Objective
from timm_lt.model import create_model
from timm_lt.recipe.checks import (
    check_features,
    check_heads,
    check_objective,
    check_options_of_parts,
    check_output,
    head_kind,
    stage_heads,
)
from timm_lt.recipe.schema import Recipe, RunOptions
from timm_lt.registry import Problems, UsageError, check_choice, check_integer
from timm_lt.report import TEST_SELECTION
from timm_lt.run_folder import LOGS, check_images, prepare_run_folder, release_run_folder
from timm_lt.samplers import SAMPLERS, ClassSampler, create_sampler
from timm_lt.training import (
    HeadPlan,
    check_batch_size,
    check_classifier,
    check_model,
    check_optimization,
    check_pairs,
    check_schedule,
    check_trained,
    check_update,
    plan_head_on_images,
    start_classifier,
)

# The augmentation that is timm's: images are decoded when they are drawn.
TIMM = "timm"


@dataclass
class Run:
    """A recipe turned into objects, and what is noted while it runs.

    Attributes:
        seconds: Wall time of what was done.
        plans: How the heads of stage images are trained, by name.
        kept_epoch: The epoch whose weights the model has, 1-based; 0 before training.
        unreadable: How many images of each split could not be read.
        lock: Held on the folder by the main process.
    """

    name: str
    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    splits: Splits
    images: Mapping[Split, Images]
    sampler: ClassSampler
    loss: nn.Module
    model: nn.Module
    seconds: dict[str, Any]
    plans: Mapping[str, HeadPlan] = field(default_factory=dict)
    kept_epoch: int = 0
    unreadable: dict[str, int] = field(default_factory=dict)
    lock: FileLock | None = None

    @property
    def objective(self) -> Objective:
        """What is maximised on validation."""
        # Of a split as long-tailed as train, the accuracy over the images is that of large classes.
        usual = "class_mean" if self.splits.val_source == "train" else "all"
        return cast(Objective, self.recipe.objective or usual)

    @property
    def val_name(self) -> str:
        """Where validation comes from, as records of what was selected have it."""
        source = self.splits.val_source
        return "train, held out" if source == "train" else source

    def close(self) -> None:
        """Lets another process run in the folder."""
        if self.lock is not None:
            release_run_folder(self.lock)


def create_run(name: str, folder: Path, recipe: Recipe, options: RunOptions) -> Run:
    """Checks a recipe, makes its parts, and claims its folder when all of them are right.

    Args:
        name: Name of the recipe.
        folder: Folder of the run.
        recipe: What to run.
        options: How to run it.

    Raises:
        UsageError: For whatever is wrong with the recipe, the data or the folder.
    """
    check_heads(recipe)
    check_options_of_parts(recipe)
    check_output(recipe, folder)
    check_optimization(recipe.optimizer.arguments(), recipe.scheduler.arguments(), recipe.epochs)
    accelerator = _start(recipe, folder, options)
    check_features(recipe, folder)
    started = time.perf_counter()
    with progress(f"making {recipe.data.name}", None):
        data = recipe.data
        splits = create_splits(
            data.name,
            root=data.root,
            val_fraction=data.val_fraction,
            protocol=recipe.protocol,
            **data.options,
        )
        digests = split_digests(splits.datasets, splits.labels, data.root)
        if options.resume:
            check_images(folder, digests)
        sampler, loss, model, images = _create_parts(recipe, splits, accelerator, options)
        plans = {
            head: plan_head_on_images(
                head_kind(recipe, head), model, images["train"], accelerator, **given
            )
            for head, given in stage_heads(recipe, "images").items()
        }
    seconds = {"data": time.perf_counter() - started}
    log.info("%s", describe(recipe, splits, model))
    if splits.val_source == "train":
        log.info(
            "no validation split: %d of the training images are held out", len(splits.labels["val"])
        )
    if splits.val_source == "test" and accelerator.is_main_process:
        log.warning("%s", TEST_SELECTION)
    lock = None
    if accelerator.is_main_process:
        lock = prepare_run_folder(
            folder, recipe.to_yaml(), overwrite=options.overwrite, images=digests
        )
    accelerator.wait_for_everyone()
    if options.tracker != "none":
        accelerator.init_trackers(name)
    return Run(
        name,
        recipe,
        folder,
        accelerator,
        splits,
        images,
        sampler,
        loss,
        model,
        seconds,
        plans=plans,
        lock=lock,
    )


def _start(recipe: Recipe, folder: Path, options: RunOptions) -> Accelerator:
    """Creates the accelerator, and sets up threads and log of this process."""
    accelerator = create_accelerator(
        mixed_precision=recipe.mixed_precision,
        accumulation_steps=recipe.accumulation_steps,
        compiled=options.compile,
        tracker=options.tracker,
        folder=folder / LOGS,
    )
    set_cpu_threads(options.threads)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    start_logging(quiet=options.quiet or not accelerator.is_main_process)
    return accelerator


def _create_parts(
    recipe: Recipe, splits: Splits, accelerator: Accelerator, options: RunOptions
) -> tuple[ClassSampler, nn.Module, nn.Module, dict[Split, Images]]:
    """Creates sampler, loss, model and images; what is wrong with the data is reported together."""
    problems = Problems()
    with problems.collected():
        check_objective(recipe, splits)
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
    loss = create_loss(recipe.loss.name, class_counts=splits.class_counts, **recipe.loss.options)
    check_schedule(loss, recipe.epochs)
    check_update(
        loss,
        batch=recipe.batch_size // (processes * steps),
        mixup=recipe.mixup.arguments(),
        ema=recipe.ema.arguments(),
        clip_grad=recipe.clip_grad,
        clip_mode=recipe.clip_mode,
        max_norm=recipe.max_norm,
    )
    model = create_network(recipe, splits.num_classes)
    check_pairs(model, sampler, loss, batch=recipe.batch_size // (processes * steps))
    check_classifier(loss, model)
    start_network(recipe, loss, model, splits.num_classes)
    check_trained(model, recipe.model.trained, recipe.model.bn)
    images: dict[Split, Images] = {}
    with problems.collected():
        images = create_images(recipe, splits, model, workers=options.workers)
    with problems.collected():
        check_content(recipe, splits, images, accelerator)
    problems.check()
    check_model(model, images["val"])
    return sampler, loss, model, images


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


def create_network(recipe: Recipe, num_classes: int) -> nn.Module:
    """Creates the model of a recipe with its joint classifier, from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    given = recipe.model
    try:
        model = create_model(given.name, given.pretrained, num_classes=num_classes, **given.options)
    except TypeError as error:
        raise UsageError(f"model.options: {error}") from error
    if given.fresh_classifier:
        # The same bits, whatever was drawn while the model was made.
        torch.manual_seed(recipe.seed)
        for classifier in find_classifiers(model).values():
            classifier.reset_parameters()
    return model


def start_network(recipe: Recipe, loss: nn.Module, model: nn.Module, num_classes: int) -> None:
    """Gives the classifier the start that the loss wants, unless it is a pretrained one."""
    config = getattr(model, "pretrained_cfg", None) or {}
    pretrained = recipe.model.pretrained and config.get("num_classes") == num_classes
    if recipe.model.fresh_classifier or not pretrained:
        start_classifier(loss, model, num_classes)


def create_images(
    recipe: Recipe, splits: Splits, model: nn.Module, *, workers: int | None
) -> dict[Split, Images]:
    """Returns the images of every split as the model takes them; only train is augmented."""
    data = recipe.data
    config = timm.data.resolve_data_config(model=model)
    size = (data.image_size, data.image_size) if data.image_size else config["input_size"][1:]
    images: dict[Split, Images] = {}
    if data.augmentation == TIMM:
        # As many for each process that trains as there are cores for it.
        number = torch.get_num_threads() if workers is None else workers
        check_integer("workers", number, minimum=0, maximum=64 * available_cores())
        preprocessing = {key: config[key] for key in ("mean", "std", "interpolation", "crop_pct")}
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


def describe(recipe: Recipe, splits: Splits, model: nn.Module) -> str:
    """Returns a line about data and model for the log."""
    counts, parameters = splits.class_counts, sum(p.numel() for p in model.parameters())
    return (
        f"{recipe.data.name}: {int(counts.sum()):,} training images of {len(counts)} classes, "
        f"{int(counts.max())} to {int(counts.min())} per class; {recipe.model.name} with "
        f"{parameters:,} parameters"
    )
