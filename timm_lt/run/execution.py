"""The main job: train a backbone on long-tailed data, fit every head on it, and compare them."""

import shlex
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import torch

from timm_lt import hub
from timm_lt.checkpoint import METRICS, PLOTS, save_checkpoint
from timm_lt.fitting import AUTO, head_curves
from timm_lt.heads import Head, fold_head, get_head
from timm_lt.hub.card import write_card
from timm_lt.metrics import (
    ShotReport,
    compare_per_class,
    confidence_intervals,
    write_per_class,
)
from timm_lt.report import save_plots, write_report
from timm_lt.report.tables import TEST_SELECTION, recommend, shot_table
from timm_lt.run.exits import run_to_exit
from timm_lt.run.folder import PER_CLASS, REPORT, STATE, check_run_folder
from timm_lt.run.parse import parse_command_line
from timm_lt.run.recipe import Recipe, RunOptions
from timm_lt.run.setup import Run, create_run
from timm_lt.run.stages import (
    Evaluation,
    RunFeatures,
    evaluate,
    extract,
    extract_for_heads,
    fit,
    fit_joint,
    report_of_run,
    train_heads,
)
from timm_lt.training import (
    TrainingState,
    describe_history,
    representation_seconds,
    train_representation,
)
from timm_lt.utils.accelerator import fresh_accelerate, process_rank
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import log, result_console, start_logging
from timm_lt.utils.files import read_json, write_json
from timm_lt.utils.longtail import describe_shots


def main(argv: list[str] | None = None, prog: str = "train_lt.py") -> int:
    """Runs the command line and returns its exit status."""

    def command() -> None:
        if "--verbose" in (sys.argv[1:] if argv is None else argv):
            # Before anything can be wrong.
            start_logging(verbose=True)
        parsed = parse_command_line(prog, sys.argv[1:] if argv is None else argv)
        if parsed is not None:
            run_recipe(*parsed)

    with fresh_accelerate():
        return run_to_exit(command)


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
        start_logging(quiet=options.quiet or process_rank() > 0, verbose=options.verbose)
        shown = show(name, folder, as_json=options.json)
        push(folder, options)
        return shown
    with closing(create_run(name, folder, recipe, options)) as run:
        reports = work(run)
    if reports:
        show(name, folder, as_json=options.json)
    push(folder, options)
    return reports


def work(run: Run) -> dict[str, ShotReport]:
    """Does what a run does, and returns its figures; on the main process alone."""
    train(run)
    features = extract(run)
    if not run.joint:
        fit_joint(run, features)
    trained = train_heads(run)
    extract_for_heads(run, trained, features)
    reports: dict[str, ShotReport] = {}
    if run.accelerator.is_main_process:
        heads = fit(run, features, trained)
        evaluated = {name: evaluate(run, name, head, features) for name, head in heads.items()}
        reports = {name: found.report for name, found in evaluated.items()}
        try:
            save(run, heads, evaluated, features)
            # Last: a folder with metrics is a finished run.
            digests = {name: found.logits_sha256 for name, found in evaluated.items()}
            write_metrics(run, heads, reports, digests)
        except OSError as error:
            raise UsageError(
                f"the results cannot be written ({error}); the training state is whole: make room "
                "and go on with --resume"
            ) from error
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return reports


def check_push(options: RunOptions) -> None:
    """Checks before training that the run can be pushed after it."""
    if options.push_to_hub is not None:
        hub.check_push(options.push_to_hub, private=options.private or None)
    elif options.private or options.license is not None:
        raise UsageError("--private and --license are for --push_to_hub NAMESPACE/NAME")


def push(folder: Path, options: RunOptions) -> None:
    """Pushes a finished run to the Hub, if it is to be; one process does."""
    if options.push_to_hub is None or process_rank() > 0:
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


def show(name: str, folder: Path, *, as_json: bool) -> dict[str, ShotReport]:
    """Prints the table of a finished run, or its metrics, and returns its figures by head."""
    metrics = read_json(folder / METRICS)
    reports = {head: ShotReport.from_dict(fields) for head, fields in metrics["heads"].items()}
    seconds = metrics["seconds"]
    table = shot_table(
        reports,
        torch.tensor(metrics["class_counts"]),
        seconds=seconds["heads"] | {"linear": seconds["representation"]},
        selections=metrics["selection"],
        title=f"{name}, test accuracy in percent, seed {metrics['seed']}",
        note=metrics.get("note"),
        # Where nothing but heads was trained, the comparison of heads is the result.
        intervals=metrics["kept_epoch"] == 0,
    )
    if process_rank() == 0 and as_json:
        sys.stdout.write((folder / METRICS).read_text(encoding="utf-8"))
    elif process_rank() == 0:
        result_console().print(table)
        if AUTO in metrics["selection"]:
            result_console().print(recommend(reports, metrics["selection"][AUTO]), highlight=False)
    log.info("wrote %s", folder)
    return reports


def train(run: Run) -> None:
    """Trains the representation, or goes on with it."""
    recipe = run.recipe
    if run.trainer is None:
        run.seconds["representation"] = 0.0
        run.model.to(run.accelerator.device)
        return
    training = train_representation(
        run.model,
        run.images["train"],
        run.trainer.sampler,
        run.trainer.loss,
        accelerator=run.accelerator,
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
        val=run.images["val"],
        validate_every=recipe.validate_every,
        keep=recipe.keep,
        class_counts=run.splits.class_counts,
        trained=recipe.model.trained,
        bn=recipe.model.bn,
        state=TrainingState(run.folder / STATE, run.accelerator),
        seed=recipe.seed,
    )
    # As a loaded model has it: another memory format may round differently.
    run.model = training.model.to(memory_format=torch.contiguous_format)
    # Trained with the normalised weights of a cosine head, say, the joint classifier is linear.
    fold_head(run.model)
    run.kept_epoch, run.history = training.kept, training.history
    run.seconds["representation"] = representation_seconds(training.history)
    log.info("%s", describe_history(training.history, training.kept))


def write_metrics(
    run: Run,
    heads: Mapping[str, Head],
    reports: Mapping[str, ShotReport],
    digests: Mapping[str, str],
) -> None:
    """Writes ``metrics.json``; the digests of the test logits show whether a run is reproduced."""
    counts, recipe = run.splits.class_counts, run.recipe
    chosen = heads[AUTO].selection if AUTO in heads else None
    write_json(
        run.folder / METRICS,
        {
            "heads": {name: report.to_dict() for name, report in reports.items()},
            "intervals": {n: confidence_intervals(r, counts) for n, r in reports.items()},
            "recommendation": None if chosen is None else recommend(reports, chosen),
            "label_names": run.splits.label_names,
            "class_counts": counts.tolist(),
            "shots": describe_shots(counts, recipe.shot_rule),
            "selection": {name: head.selection for name, head in heads.items() if head.selection},
            "stages": {name: {"stage": "images", **vars(plan)} for name, plan in run.plans.items()},
            "seed": recipe.seed,
            "seconds": run.seconds,
            "protocol": recipe.protocol,
            "validation": run.val_name,
            "note": TEST_SELECTION if recipe.protocol == "paper" else None,
            "kept_epoch": run.kept_epoch,
            "unreadable_images": run.unreadable,
            "num_processes": run.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "mixed_precision": run.accelerator.mixed_precision,
            "logits_sha256": digests,
        },
    )


def save(
    run: Run,
    heads: Mapping[str, Head],
    evaluated: Mapping[str, Evaluation],
    features: RunFeatures,
) -> None:
    """Writes the checkpoint, the table of classes, the plots, the model card and the report."""
    counts, rule = run.splits.class_counts, run.recipe.shot_rule
    reports = {name: found.report for name, found in evaluated.items()}
    save_checkpoint(
        run.folder,
        run.model,
        heads=heads,
        class_counts=counts,
        metrics={name: report.summary() for name, report in reports.items()},
        label_names=run.splits.label_names,
        dataset=run.recipe.data.title,
        shot_rule=rule,
        protocol=run.recipe.protocol,
        seed=run.recipe.seed,
        background=run.splits.background,
    )
    rows = compare_per_class(reports, counts, run.splits.label_names)
    write_per_class(run.folder / PER_CLASS, rows)
    own = {name: head for name, head in heads.items() if name != AUTO}
    curves = head_curves(get_head(run.model), own, features.shared["val"], counts, rule)
    report = report_of_run(run, heads, evaluated, features, curves)
    save_plots(run.folder / PLOTS, report)
    write_card(run.folder, name=run.name)
    write_report(run.folder / REPORT, report)
