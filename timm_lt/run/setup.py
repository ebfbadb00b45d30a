"""From a recipe to objects: all parts are created before anything is trained or written."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from accelerate import Accelerator
from filelock import FileLock
from torch import nn

from timm_lt.checkpoint import check_head_name
from timm_lt.data import Splits, create_splits
from timm_lt.data.decode import check_classes_left, verify_images
from timm_lt.data.images import Images
from timm_lt.data.sources import Split
from timm_lt.data.splits import split_digests
from timm_lt.features import Features
from timm_lt.fitting import AUTO, create_fit
from timm_lt.heads import Head
from timm_lt.losses import LOSSES, create_loss
from timm_lt.metrics import Objective, ShotReport
from timm_lt.report import Predictions
from timm_lt.report.tables import TEST_SELECTION
from timm_lt.run.folder import LOGS, check_images, prepare_run_folder
from timm_lt.run.network import (
    TIMM,
    create_images,
    create_network,
    has_classifier,
    match_data,
    start_network,
)
from timm_lt.run.recipe import Recipe, RunOptions, Stage, head_kind, prefixed, stage_heads
from timm_lt.samplers import SAMPLERS, create_sampler
from timm_lt.training import (
    EpochRecord,
    HeadTrainer,
    RepresentationTrainer,
    TrainingOptions,
    check_model,
)
from timm_lt.utils.accelerator import create_accelerator, set_cpu_threads
from timm_lt.utils.checks import UsageError, check_choice
from timm_lt.utils.console import log, progress
from timm_lt.utils.longtail import shot_groups


class Evaluation(NamedTuple):
    """Results of a head on the test images."""

    report: ShotReport
    predictions: Predictions
    logits_sha256: str


@dataclass
class Run:
    """A recipe turned into objects, and all that a run has produced so far.

    Attributes:
        folder: Folder of the run; None writes nothing.
        joint: Whether the model's classifier has weights for these classes, before training.
        head_trainers: Trainers of the heads with stage images, by name.
        kept_epoch: Epoch whose weights the model has, 1-based; 0 before training.
        own_features: By head and split, for heads with batch-norm statistics of their own.
        unreadable_rows: Images that could not be read; unknown for features from the cache.
        heads: All fitted heads, on the main process alone.
    """

    name: str
    recipe: Recipe
    folder: Path | None
    accelerator: Accelerator
    splits: Splits
    model: nn.Module
    joint: bool
    images: Mapping[Split, Images] = field(default_factory=dict)
    trainer: RepresentationTrainer | None = None
    head_trainers: Mapping[str, HeadTrainer] = field(default_factory=dict)
    lock: FileLock | None = None
    seconds: dict[str, Any] = field(default_factory=dict)
    history: Sequence[EpochRecord] = ()
    kept_epoch: int = 0
    features: dict[Split, Features] = field(default_factory=dict)
    own_features: dict[str, dict[Split, Features]] = field(default_factory=dict)
    unreadable: dict[str, int] = field(default_factory=dict)
    unreadable_rows: dict[str, list[int]] = field(default_factory=dict)
    joint_selection: Mapping[str, Any] = field(default_factory=dict)
    heads: dict[str, Head] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)

    @property
    def objective(self) -> Objective:
        """Objective that is maximised on validation."""
        # On a long-tailed split, the accuracy over the images is that of the large classes.
        usual = "class_mean" if self.splits.val_source == "train" else "all"
        return cast(Objective, self.recipe.objective or usual)

    @property
    def val_name(self) -> str:
        """Source of the validation images, as in records of what was selected."""
        source = self.splits.val_source
        return "train, held out" if source == "train" else source

    @property
    def note(self) -> str | None:
        """Note on all results that were selected on the test images, as in some papers."""
        return TEST_SELECTION if self.recipe.protocol == "paper" else None

    @property
    def reports(self) -> dict[str, ShotReport]:
        """Figures by head."""
        return {name: evaluation.report for name, evaluation in self.evaluations.items()}

    def features_of(self, head: str, split: Split) -> Features:
        """Returns the features that a head takes."""
        return self.own_features.get(head, self.features)[split]

    def close(self) -> None:
        """Lets another process run in the folder."""
        if self.lock is not None:
            # Delete the file while it is locked: nobody waits for it.
            Path(self.lock.lock_file).unlink(missing_ok=True)
            self.lock.release()


def create_run(name: str, folder: Path, recipe: Recipe, options: RunOptions) -> Run:
    """Creates all parts of a recipe, and claims its folder when all of them are right."""
    accelerator = create_accelerator(
        mixed_precision=recipe.mixed_precision,
        accumulation_steps=recipe.accumulation_steps,
        compiled=options.compile,
        tracker=options.tracker,
        folder=folder / LOGS,
    )
    set_cpu_threads(options.threads)
    started = time.perf_counter()
    with progress(f"loading {recipe.data.name}", None):
        splits = load_splits(recipe)
        digests = split_digests(splits.datasets, splits.labels, recipe.data.root)
        if options.resume:
            check_images(folder, digests)
        model = create_network(recipe, splits.num_classes).to(accelerator.device)
        kept = has_classifier(recipe.model, model, splits.num_classes)
        splits, joint = match_data(recipe, splits, model, kept=kept)
        run = Run(name, recipe, folder, accelerator, splits, model, joint)
        complete_run(run, options, digests)
    run.seconds["data"] = time.perf_counter() - started
    if options.tracker != "none":
        accelerator.init_trackers(name)
    return run


def load_splits(recipe: Recipe) -> Splits:
    """Creates the splits of a recipe's data."""
    data = recipe.data
    own: dict[str, Any] = {"root": data.root, "protocol": recipe.protocol}
    with prefixed("data"):
        return create_splits(data.name, val_fraction=data.val_fraction, **own, **data.options)


def complete_run(
    run: Run, options: RunOptions, digests: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Creates the other parts of a run from its data and model, and claims its folder."""
    recipe, splits, accelerator = run.recipe, run.splits, run.accelerator
    check_heads(recipe, splits)
    run.images = create_images(recipe, splits, run.model, workers=options.workers)
    check_model(run.model, run.images["val"])
    if recipe.epochs:
        run.trainer = create_trainer(run)
    train = run.images["train"]
    run.head_trainers = {
        head: HeadTrainer(head_kind(recipe, head), run.model, train, accelerator, **given)
        for head, given in stage_heads(recipe, "images").items()
    }
    unreadable = {str(split): images.unreadable_rows() for split, images in run.images.items()}
    if recipe.data.augmentation == TIMM and recipe.data.verify:
        # Last, since it may take minutes.
        unreadable = verify_images(splits.datasets, accelerator, unreadable=recipe.data.unreadable)
    check_classes_left(splits.labels, unreadable, splits.label_names)
    _log_data(run)
    if accelerator.is_main_process and run.folder is not None:
        run.lock = prepare_run_folder(
            run.folder, recipe, overwrite=options.overwrite, images=digests
        )
    accelerator.wait_for_everyone()


def check_heads(recipe: Recipe, splits: Splits | None = None) -> None:
    """Checks the heads of a recipe and their options, and whether they fit the data if given."""
    if not set(recipe.heads) - {AUTO} or recipe.heads.get(AUTO):
        raise UsageError(
            "heads: give at least one; head 'auto' is the best of the others and takes no options"
        )
    if splits is not None and splits.num_classes < 2:
        raise UsageError("training needs at least 2 classes; found 1")
    for name, options in recipe.heads.items():
        check_choice(f"stage of head {name!r}:", options.get("stage", "features"), get_args(Stage))
        check_head_name(f"head name {name!r}", name, head_kind(recipe, name))
    rule, views = recipe.shot_rule, recipe.features.views or 1
    for name, options in stage_heads(recipe, "features").items():
        fit = create_fit(head_kind(recipe, name), **options)
        if splits is not None:
            fit.check_classes(splits.class_counts, rule=rule, views=views)
    if splits is not None and recipe.objective == "few_shot":
        few = shot_groups(splits.class_counts, rule)["few_shot"]
        if not few[splits.labels["val"]].any():
            raise UsageError("objective few_shot: the data have no few-shot class; take class_mean")


def create_trainer(run: Run) -> RepresentationTrainer:
    """Creates the representation stage; its parts refuse what is wrong with the recipe."""
    recipe, splits = run.recipe, run.splits
    seed: dict[str, Any] = {"seed": recipe.seed}
    counts, options = splits.class_counts, recipe.sampler.arguments()
    with prefixed("sampler"):
        own = seed | {"num_classes": splits.num_classes, "rank": 0, "num_replicas": 1}
        # A schedule is as long as the training.
        if "epochs" in signature(SAMPLERS[recipe.sampler.name]).parameters:
            own["epochs"] = recipe.epochs
        sampler = create_sampler(labels=splits.labels["train"], **own, **options)
    options = recipe.loss.arguments()
    with prefixed("loss"):
        own = seed if "seed" in signature(LOSSES[recipe.loss.name]).parameters else {}
        loss = create_loss(class_counts=counts, reduction="mean", **own | options)
    if not run.joint:
        start_network(recipe, loss, run.model, splits.num_classes)
    train, val, training = run.images["train"], run.images["val"], training_options(recipe)
    return RepresentationTrainer(
        run.model, train, sampler, loss, training, run.accelerator, val, counts
    )


def training_options(recipe: Recipe) -> TrainingOptions:
    """Returns the hyper-parameters of the representation stage."""
    mixup = recipe.mixup.arguments()
    own = {
        "optimizer": recipe.optimizer.arguments("opt"),
        "scheduler": recipe.scheduler.arguments("sched"),
        "mixup_off_epoch": mixup.pop("off_epoch", None),
        "mixup": mixup,
        "ema": recipe.ema.arguments(),
        "trained": recipe.model.trained,
        "bn": recipe.model.bn,
    }
    # The others are keys of the recipe.
    names = {field.name for field in fields(TrainingOptions)}
    same = {key: value for key, value in vars(recipe).items() if key in names}
    return TrainingOptions(**same | own)


def _log_data(run: Run) -> None:
    splits, counts = run.splits, run.splits.class_counts
    log.info(
        "%s: %s training images of %d classes, %d to %d per class; %s with %s parameters",
        *(run.recipe.data.name, f"{int(counts.sum()):,}", len(counts)),
        *(int(counts.max()), int(counts.min()), run.recipe.model.name),
        f"{sum(p.numel() for p in run.model.parameters()):,}",
    )
    if splits.val_source == "train":
        number = len(splits.labels["val"])
        log.info("no validation split: %d of the training images are held out", number)
    if splits.val_source == "test" and run.accelerator.is_main_process:
        log.warning("%s", TEST_SELECTION)
