"""From a recipe to objects: everything is checked and made before anything is written."""

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from filelock import FileLock
from torch import nn

from timm_lt.data import Splits, create_splits
from timm_lt.data.images import Images
from timm_lt.data.sources import Split
from timm_lt.data.splits import split_digests
from timm_lt.losses import LOSSES, create_loss
from timm_lt.metrics import Objective
from timm_lt.report.tables import TEST_SELECTION
from timm_lt.run.class_order import order_classes
from timm_lt.run.folder import (
    LOGS,
    check_images,
    check_run_folder,
    prepare_run_folder,
    release_run_folder,
)
from timm_lt.run.network import (
    checked_images,
    create_network,
    has_classifier,
    on_background,
    start_network,
)
from timm_lt.run.recipe import Recipe, RunOptions
from timm_lt.run.recipe_checks import (
    check_features,
    check_heads,
    check_heads_of_data,
    check_objective,
    check_options_of_parts,
    check_output,
    head_kind,
    stage_heads,
)
from timm_lt.samplers import SAMPLERS, create_sampler
from timm_lt.training import (
    EpochRecord,
    HeadPlan,
    RepresentationTrainer,
    TrainingOptions,
    check_model,
    plan_head_on_images,
)
from timm_lt.utils.accelerator import create_accelerator, set_cpu_threads
from timm_lt.utils.checks import Problems, UsageError
from timm_lt.utils.console import log, progress, start_logging


@dataclass
class Run:
    """A recipe turned into objects, and what is noted while it runs.

    Attributes:
        trainer: None if nothing but heads is trained.
        seconds: Wall time of what was done.
        plans: How the heads of stage images are trained, by name.
        joint: Whether the model's classifier is for these classes, or will be after training.
        joint_selection: How the options of that classifier were selected, if it was fitted.
        kept_epoch: The epoch whose weights the model has, 1-based; 0 before training.
        unreadable: How many images of each split could not be read.
        unreadable_rows: Which, as far as it is known: of features in the cache it is not.
        history: What the training of the representation did, epoch by epoch.
        lock: Held on the folder by the main process.
    """

    name: str
    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    splits: Splits
    images: Mapping[Split, Images]
    trainer: RepresentationTrainer | None
    model: nn.Module
    seconds: dict[str, Any]
    plans: Mapping[str, HeadPlan] = field(default_factory=dict)
    joint: bool = True
    joint_selection: Mapping[str, Any] = field(default_factory=dict)
    kept_epoch: int = 0
    unreadable: dict[str, int] = field(default_factory=dict)
    unreadable_rows: dict[str, list[int]] = field(default_factory=dict)
    history: Sequence[EpochRecord] = ()
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
        trainer, model, splits, images = create_parts(recipe, splits, accelerator, options)
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
        trainer,
        model,
        seconds,
        plans=plans,
        joint=bool(recipe.epochs) or has_classifier(recipe, model, splits),
        lock=lock,
    )


def given_run(
    recipe: Recipe,
    splits: Splits,
    model: nn.Module,
    accelerator: Accelerator,
    *,
    folder: Path | None,
    options: RunOptions,
    joint: bool,
) -> Run:
    """Makes a run that trains heads alone, of a model and data that are there.

    Args:
        recipe: What to run, with 0 epochs.
        splits: The data.
        model: A timm model with a classifier for them.
        accelerator: Its processes share the images.
        folder: Folder of the run; None writes nothing.
        options: How to run it.
        joint: Whether that classifier has been trained.

    Raises:
        UsageError: For whatever is wrong with them, or the folder.
    """
    check_heads(recipe)
    check_heads_of_data(recipe, splits)
    check_objective(recipe, splits)
    if folder is not None:
        check_run_folder(folder, recipe.to_yaml(), resume=False, overwrite=options.overwrite)
    check_features(recipe, folder or Path())
    images = checked_images(recipe, splits, model, accelerator, Problems(), workers=options.workers)
    check_model(model, images["val"])
    lock = None
    if folder is not None and accelerator.is_main_process:
        lock = prepare_run_folder(folder, recipe.to_yaml(), overwrite=options.overwrite)
    return Run(
        "rebalanced" if folder is None else folder.name,
        recipe,
        folder or Path(),
        accelerator,
        splits,
        images,
        None,
        model.to(accelerator.device),
        {"data": 0.0, "representation": 0.0},
        joint=joint,
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
    quiet = options.quiet or not accelerator.is_main_process
    start_logging(quiet=quiet, verbose=options.verbose)
    return accelerator


def describe(recipe: Recipe, splits: Splits, model: nn.Module) -> str:
    """Returns a line about data and model for the log."""
    counts, parameters = splits.class_counts, sum(p.numel() for p in model.parameters())
    return (
        f"{recipe.data.name}: {int(counts.sum()):,} training images of {len(counts)} classes, "
        f"{int(counts.max())} to {int(counts.min())} per class; {recipe.model.name} with "
        f"{parameters:,} parameters"
    )


def create_parts(
    recipe: Recipe, splits: Splits, accelerator: Accelerator, options: RunOptions
) -> tuple[RepresentationTrainer | None, nn.Module, Splits, dict[Split, Images]]:
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
    images = checked_images(recipe, splits, model, accelerator, problems, workers=options.workers)
    check_model(model, images["val"])
    trainer = create_trainer(recipe, splits, model, images, accelerator) if recipe.epochs else None
    return trainer, model, splits, images


def create_trainer(
    recipe: Recipe,
    splits: Splits,
    model: nn.Module,
    images: Mapping[Split, Images],
    accelerator: Accelerator,
) -> RepresentationTrainer:
    """Creates the representation stage; its parts refuse what is wrong with the recipe.

    Args:
        recipe: What to run.
        splits: The data.
        model: The model; its classifier gets the start that the loss wants.
        images: Images of the splits.
        accelerator: Of the run.
    """
    sampler = create_sampler(
        recipe.sampler.name,
        splits.labels["train"],
        seed=recipe.seed,
        num_classes=splits.num_classes,
        **sampler_options(recipe),
    )
    options = dict(recipe.loss.options)
    if "seed" in inspect.signature(LOSSES[recipe.loss.name]).parameters:
        options.setdefault("seed", recipe.seed)
    loss = create_loss(recipe.loss.name, class_counts=splits.class_counts, **options)
    start_network(recipe, loss, model, splits.num_classes, splits.label_names)
    return RepresentationTrainer(
        model,
        images["train"],
        sampler,
        loss,
        training_options(recipe),
        accelerator=accelerator,
        val=images["val"],
        class_counts=splits.class_counts,
    )


def training_options(recipe: Recipe) -> TrainingOptions:
    """Returns the hyper-parameters of the representation stage."""
    return TrainingOptions(
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        optimizer=recipe.optimizer.arguments(),
        scheduler=recipe.scheduler.arguments(),
        clip_grad=recipe.clip_grad,
        clip_mode=recipe.clip_mode,
        max_norm=recipe.max_norm,
        mixup=recipe.mixup.arguments(),
        mixup_off_epoch=recipe.mixup.off_epoch,
        ema=recipe.ema.arguments(),
        validate_every=recipe.validate_every,
        keep=recipe.keep,
        trained=recipe.model.trained,
        bn=recipe.model.bn,
        seed=recipe.seed,
    )


def sampler_options(recipe: Recipe) -> dict[str, Any]:
    """Returns the options of the sampler; a schedule is as long as the training."""
    options = dict(recipe.sampler.options)
    scheduled = "epochs" in inspect.signature(SAMPLERS[recipe.sampler.name]).parameters
    if scheduled and options.setdefault("epochs", recipe.epochs) != recipe.epochs:
        raise UsageError(
            f"sampler.options.epochs is {options['epochs']}, but training has {recipe.epochs} "
            "epochs: remove it"
        )
    return options
