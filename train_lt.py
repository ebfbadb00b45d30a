"""The main job: train a backbone on long-tailed data, fit every head on it, and compare them.

Run it with ``accelerate launch train_lt.py [RECIPE] [--option value ...]``, or with plain
``python``; ``--help`` explains every option.
"""

import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import timm.data
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

import timm_lt
from timm_lt import hub
from timm_lt.accelerator import create_accelerator, set_cpu_threads
from timm_lt.checkpoint import METRICS, PLOTS, save_checkpoint
from timm_lt.console import advance, log, progress, start_logging
from timm_lt.data import Splits, create_augmentation, create_splits
from timm_lt.data.images import ImageTensors, batches
from timm_lt.data.sources import Split
from timm_lt.features import Features, extract_features
from timm_lt.files import read_json, sha256, write_json
from timm_lt.fitting import check_fit_options, fit_head, head_curves
from timm_lt.heads import Head, get_head
from timm_lt.longtail import describe_shots
from timm_lt.metrics import ShotReport, evaluate_logits
from timm_lt.model_card import write_card
from timm_lt.plots import save_plots
from timm_lt.recipe import Recipe, RunOptions, parse_command_line
from timm_lt.registry import UsageError, check_integer
from timm_lt.report import shot_table
from timm_lt.run_folder import LOGS, STATE, check_run_folder, prepare_run_folder
from timm_lt.samplers import ClassSampler
from timm_lt.training import (
    EVAL_BATCH_SIZE,
    TrainingState,
    check_batch_size,
    check_model,
    check_optimization,
    representation_seconds,
    train_representation,
)


@dataclass
class Run:
    """A recipe turned into objects."""

    name: str
    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    splits: Splits
    images: Mapping[str, ImageTensors]
    sampler: ClassSampler
    loss: nn.Module
    model: nn.Module
    seconds: dict[str, Any]


def main(argv: list[str] | None = None, prog: str = "train_lt.py") -> int:
    """Runs the command line and returns its exit status."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        parsed = parse_command_line(prog, sys.argv[1:] if argv is None else argv)
        if parsed is not None:
            run_recipe(*parsed)
    except UsageError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        if first:
            message = "interrupted; run it again with --resume and without --overwrite to go on"
            print(message, file=sys.stderr)  # noqa: T201
        return 130
    finally:
        # Left open, gloo may abort when the interpreter ends.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def run_recipe(name: str, recipe: Recipe, options: RunOptions) -> dict[str, ShotReport]:
    """Runs a recipe and writes its folder.

    Args:
        name: Name of the recipe.
        recipe: What to run.
        options: How to run it.

    Returns:
        The test figures by head; empty on all processes but the first.

    Raises:
        UsageError: For whatever is wrong with the recipe, the data or the folder, before training.
    """
    folder = Path(options.output or Path("output") / name)
    check_run_folder(folder, recipe.to_yaml(), resume=options.resume, overwrite=options.overwrite)
    check_push(options)
    if options.resume and (folder / METRICS).is_file():
        shown = show(name, folder)
        push(folder, options)
        return shown
    run = build(name, folder, recipe, options)
    train(run)
    features = extract(run)
    reports: dict[str, ShotReport] = {}
    if run.accelerator.is_main_process:
        heads = fit(run, features)
        logits = test_logits(heads, features["test"])
        reports = {
            head: evaluate_logits(
                values, features["test"].targets, run.splits.class_counts, recipe.shot_rule
            )
            for head, values in logits.items()
        }
        save(run, heads, reports, features["val"])
        # Last: a folder with metrics is a finished run.
        write_metrics(run, heads, reports, logits)
        show(name, folder)
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    push(folder, options)
    return reports


def check_push(options: RunOptions) -> None:
    """Checks before training that the run can be pushed after it."""
    if options.push_to_hub is not None:
        hub.check_push(options.push_to_hub, private=options.private or None)
    elif options.private or options.license is not None:
        raise UsageError("--private and --license are for --push_to_hub NAMESPACE/NAME")


def push(folder: Path, options: RunOptions) -> None:
    """Pushes a finished run to the Hub, if it is to be; one process does."""
    if options.push_to_hub is None or os.environ.get("RANK", "0") != "0":
        return
    try:
        pushed = hub.push_to_hub(
            folder,
            options.push_to_hub,
            private=options.private or None,
            license=options.license,
        )
    except UsageError as error:
        again = ["timm-lt", "push", str(folder), options.push_to_hub]
        again += ["--private"] if options.private else []
        again += ["--license", options.license] if options.license else []
        raise UsageError(
            f"{error}; the run itself is whole in {folder}: push it with {shlex.join(again)}"
        ) from error
    log.info("pushed to %s", pushed.url)


def show(name: str, folder: Path) -> dict[str, ShotReport]:
    """Prints the table of a finished run and returns its figures by head."""
    metrics = read_json(folder / METRICS)
    reports = {head: ShotReport.from_dict(fields) for head, fields in metrics["heads"].items()}
    seconds = metrics["seconds"]
    table = shot_table(
        reports,
        torch.tensor(metrics["class_counts"]),
        seconds=seconds["heads"] | {"linear": seconds["representation"]},
        selections=metrics["selection"],
        title=f"{name}, test accuracy in percent, seed {metrics['seed']}",
    )
    if os.environ.get("RANK", "0") == "0":
        Console().print(table)
    log.info("wrote %s", folder)
    return reports


def build(name: str, folder: Path, recipe: Recipe, options: RunOptions) -> Run:
    """Checks a recipe, makes its parts, and claims its folder when all of them are right."""
    check_heads(recipe)
    check_optimization(recipe.optimizer.arguments(), recipe.scheduler.arguments(), recipe.epochs)
    check_integer("seed", recipe.seed, minimum=0)
    data = recipe.data
    augmentation = create_augmentation(data.augmentation, **data.augmentation_options)
    accelerator = create_accelerator(
        mixed_precision=recipe.mixed_precision, tracker=options.tracker, folder=folder / LOGS
    )
    set_cpu_threads(options.threads)
    start_logging(quiet=options.quiet or not accelerator.is_main_process)
    started = time.perf_counter()
    with progress(f"making {data.name}", None):
        splits = create_splits(data.name, root=data.root, **data.options)
        sampler = timm_lt.create_sampler(
            recipe.sampler.name,
            splits.labels["train"],
            seed=recipe.seed,
            num_classes=splits.num_classes,
            **recipe.sampler.options,
        )
        check_batch_size(recipe.batch_size, len(sampler), accelerator.num_processes)
        loss = timm_lt.create_loss(
            recipe.loss.name, class_counts=splits.class_counts, **recipe.loss.options
        )
        model = create_network(recipe, splits.num_classes)
        config = timm.data.resolve_data_config(model=model)
        size = (data.image_size, data.image_size) if data.image_size else config["input_size"][1:]
        settings = {"size": size, "mean": config["mean"], "std": config["std"]}
        images = {split: splits.images(split, **settings) for split in get_args(Split)}
        check_model(model, images["val"])
    images["train"].augmentation, images["train"].seed = augmentation, recipe.seed
    seconds = {"data": time.perf_counter() - started}
    log.info("%s", describe(recipe, splits, model))
    if accelerator.is_main_process:
        prepare_run_folder(folder, recipe.to_yaml(), overwrite=options.overwrite)
    accelerator.wait_for_everyone()
    if options.tracker != "none":
        accelerator.init_trackers(name)
    return Run(name, recipe, folder, accelerator, splits, images, sampler, loss, model, seconds)


def check_heads(recipe: Recipe) -> None:
    """Checks the heads of a recipe and their options."""
    if not recipe.heads:
        raise UsageError("the recipe has no heads to fit; give at least one under heads:")
    for name, options in recipe.heads.items():
        check_fit_options(name, options)


def create_network(recipe: Recipe, num_classes: int) -> nn.Module:
    """Creates the model of a recipe with its joint classifier, from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    model = recipe.model
    try:
        return timm_lt.create_model(
            model.name, model.pretrained, num_classes=num_classes, **model.options
        )
    except TypeError as error:
        raise UsageError(f"model.options: {error}") from error


def describe(recipe: Recipe, splits: Splits, model: nn.Module) -> str:
    """Returns a line about data and model for the log."""
    counts, parameters = splits.class_counts, sum(p.numel() for p in model.parameters())
    return (
        f"{recipe.data.name}: {int(counts.sum()):,} training images of {len(counts)} classes, "
        f"{int(counts.max())} to {int(counts.min())} per class; {recipe.model.name} with "
        f"{parameters:,} parameters"
    )


def train(run: Run) -> None:
    """Trains the representation, or goes on with it."""
    history = train_representation(
        run.model,
        run.images["train"],
        run.sampler,
        run.loss,
        accelerator=run.accelerator,
        epochs=run.recipe.epochs,
        batch_size=run.recipe.batch_size,
        optimizer=run.recipe.optimizer.arguments(),
        scheduler=run.recipe.scheduler.arguments(),
        val=run.images["val"],
        class_counts=run.splits.class_counts,
        state=TrainingState(run.folder / STATE, run.accelerator),
        seed=run.recipe.seed,
    )
    run.seconds["representation"] = representation_seconds(history)


def extract(run: Run) -> dict[str, Features]:
    """Takes the features of every split once, in the order of its images."""
    started = time.perf_counter()
    # As a loaded model has it: another memory format may round differently.
    model = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
    run.model = model.to(memory_format=torch.contiguous_format)
    features = {}
    with progress("extracting features", len(run.images), unit="splits") as bar:
        for split, images in run.images.items():
            loader = batches(images.without_augmentation(), EVAL_BATCH_SIZE)
            features[split] = extract_features(
                run.model,
                run.accelerator.prepare_data_loader(loader),
                accelerator=run.accelerator,
            )
            advance(bar)
    run.seconds["features"] = time.perf_counter() - started
    return features


def fit(run: Run, features: Mapping[str, Features]) -> dict[str, Head]:
    """Fits the recipe's heads on the training features, tuned on those of validation."""
    classifier = get_head(run.model)
    heads, seconds = {}, {}
    with progress("fitting heads", len(run.recipe.heads), unit="heads") as bar:
        for name, options in run.recipe.heads.items():
            advance(bar, 0, f"fitting {name}")
            started = time.perf_counter()
            heads[name] = fit_head(
                name,
                features["train"],
                classifier=classifier,
                class_counts=run.splits.class_counts,
                val=features["val"],
                seed=run.recipe.seed,
                **options,
            )
            seconds[name] = time.perf_counter() - started
            advance(bar)
    run.seconds["heads"] = seconds
    return heads


def test_logits(heads: Mapping[str, Head], test: Features) -> dict[str, Tensor]:
    """Returns the logits (N, C) of each head on the test split."""
    logits = {}
    for name, head in heads.items():
        with torch.inference_mode():
            # In the batches that the model would see, so that its logits are the same bits.
            logits[name] = torch.cat([head(part) for part in test.values.split(EVAL_BATCH_SIZE)])
    return logits


def write_metrics(
    run: Run,
    heads: Mapping[str, Head],
    reports: Mapping[str, ShotReport],
    logits: Mapping[str, Tensor],
) -> None:
    """Writes ``metrics.json``; the digests of the test logits show whether a run is reproduced."""
    counts, recipe = run.splits.class_counts, run.recipe
    write_json(
        run.folder / METRICS,
        {
            "heads": {name: report.to_dict() for name, report in reports.items()},
            "class_counts": counts.tolist(),
            "shots": describe_shots(counts, recipe.shot_rule),
            "selection": {name: head.selection for name, head in heads.items() if head.selection},
            "seed": recipe.seed,
            "seconds": run.seconds,
            "num_processes": run.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "mixed_precision": run.accelerator.mixed_precision,
            "logits_sha256": {
                name: sha256(values.numpy().tobytes()) for name, values in logits.items()
            },
        },
    )


def save(
    run: Run, heads: Mapping[str, Head], reports: Mapping[str, ShotReport], val: Features
) -> None:
    """Writes the checkpoint, the plots and the model card."""
    counts = run.splits.class_counts
    save_checkpoint(
        run.folder,
        run.model,
        heads=heads,
        class_counts=counts,
        metrics={name: report.summary() for name, report in reports.items()},
        label_names=run.splits.label_names,
        dataset=run.recipe.data.name,
        shot_rule=run.recipe.shot_rule,
        seed=run.recipe.seed,
    )
    curves = head_curves(get_head(run.model), heads, val, counts)
    save_plots(run.folder / PLOTS, reports, counts, curves)
    write_card(run.folder, name=run.name)


if __name__ == "__main__":
    sys.exit(main())
