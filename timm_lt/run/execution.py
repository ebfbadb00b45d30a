"""A whole run: from a recipe to the folder with its results, and how the process ends."""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from timm_lt import hub
from timm_lt.checkpoint import METRICS, PLOTS, save_checkpoint
from timm_lt.data.decode import is_worker_death
from timm_lt.data.loader import describe_worker_death
from timm_lt.fitting import AUTO, AccuracyCurve, head_curves
from timm_lt.heads import get_head
from timm_lt.hub.card import write_card
from timm_lt.metrics import ShotReport, compare_per_class, confidence_intervals, write_per_class
from timm_lt.report import ExampleImages, Report, evaluated_rows, save_plots, write_report
from timm_lt.report.tables import JOINT, TEST_SELECTION, recommend, shot_table
from timm_lt.run.folder import PER_CLASS, REPORT, check_run_folder
from timm_lt.run.parse import parse_command_line
from timm_lt.run.recipe import Recipe, RunOptions
from timm_lt.run.setup import Run, create_run
from timm_lt.run.stages import best_on_validation, evaluate, extract, fit, train
from timm_lt.utils.accelerator import fresh_accelerate, is_lost_process, process_rank
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import error_text, log, log_traceback, result_console, start_logging
from timm_lt.utils.files import read_json, write_json
from timm_lt.utils.longtail import describe_shots

LOST_PROCESS = "another process of this run has ended; go on with --resume and without --overwrite"
INTERRUPTED = "interrupted; run it again with --resume and without --overwrite to go on"
# torch's message when SIGTERM ends a data worker.
WORKER_TERMINATED = "killed by signal: Terminated"


class Terminated(KeyboardInterrupt):
    """SIGTERM, with which a scheduler ends a job."""


def main(argv: list[str] | None = None, prog: str = "timm-lt train") -> int:
    """Runs the command line and returns its exit status."""

    def command() -> None:
        parsed = parse_command_line(prog, sys.argv[1:] if argv is None else argv)
        if parsed is not None:
            run_recipe(*parsed)

    return run_to_exit(command)


def run_recipe(name: str, recipe: Recipe, options: RunOptions) -> dict[str, ShotReport]:
    """Runs a recipe and writes its folder.

    Args:
        name: Name of the recipe.
        recipe: The recipe.
        options: How to run it.

    Returns:
        The test figures by head.

    Raises:
        UsageError: For any mistake in the recipe, the data or the folder, before training.
    """
    with open_run(name, recipe, options) as run:
        if run is not None:
            for stage in (train, extract, fit, evaluate, save):
                stage(run)
    reports = show(name, options)
    push(name, options)
    return reports


@contextmanager
def open_run(name: str, recipe: Recipe, options: RunOptions) -> Iterator[Run | None]:
    """Yields the run of a recipe with all its parts; None if the run in the folder is finished.

    Raises:
        UsageError: For any mistake in the recipe, the data or the folder.
    """
    folder = options.folder(name)
    check_run_folder(folder, recipe.to_yaml(), resume=options.resume, overwrite=options.overwrite)
    if options.push_to_hub is not None:
        hub.check_push(options.push_to_hub, private=options.private or None)
    elif options.private or options.license is not None:
        raise UsageError("--private and --license only apply with --push_to_hub NAMESPACE/NAME")
    if options.resume and (folder / METRICS).is_file():
        start_logging(quiet=options.quiet or process_rank() > 0, verbose=options.verbose)
        yield None
        return
    run = create_run(name, folder, recipe, options)
    with closing(run):
        yield run
        run.accelerator.wait_for_everyone()
        run.accelerator.end_training()


def save(run: Run) -> None:
    """Writes the checkpoint, tables, plots, the model card, the report and the metrics.

    Raises:
        UsageError: If they cannot be written.
    """
    if not run.accelerator.is_main_process or run.folder is None:
        return
    try:
        _write(run, run.folder)
        # Last: a folder with metrics is a finished run.
        write_json(run.folder / METRICS, _metrics(run))
    except OSError as error:
        raise UsageError(
            f"the results cannot be written ({error}); the training state is complete: make room "
            "and go on with --resume"
        ) from error


def _write(run: Run, folder: Path) -> None:
    recipe, splits, counts = run.recipe, run.splits, run.splits.class_counts
    reports = {name: found.report for name, found in run.evaluations.items()}
    save_checkpoint(
        folder,
        run.model,
        heads=run.heads,
        class_counts=counts,
        metrics={name: report.summary() for name, report in reports.items()},
        label_names=splits.label_names,
        dataset=recipe.data.title,
        shot_rule=recipe.shot_rule,
        protocol=recipe.protocol,
        seed=recipe.seed,
        background=splits.background,
    )
    write_per_class(folder / PER_CLASS, compare_per_class(reports, counts, splits.label_names))
    own = {name: head for name, head in run.heads.items() if name != AUTO}
    joint = get_head(run.model)
    curves = head_curves(joint, own, run.features["val"], counts, recipe.shot_rule)
    report = _report(run, curves)
    save_plots(folder / PLOTS, report)
    write_card(folder, name=run.name)
    write_report(folder / REPORT, report)


def _report(run: Run, curves: Mapping[str, tuple[AccuracyCurve, float]]) -> Report:
    """Returns the report, without head ``auto``, which is one of the others."""
    recipe, splits = run.recipe, run.splits
    own = {name: found for name, found in run.evaluations.items() if name != AUTO}
    auto = run.heads[AUTO] if AUTO in run.heads else best_on_validation(run, run.heads)
    evaluated, rows = run.features["test"].num_images, run.unreadable_rows.get("test", [])
    return Report(
        title=run.name,
        reports={name: found.report for name, found in own.items()},
        class_counts=splits.class_counts,
        targets=run.features["test"].targets,
        predictions={name: found.predictions for name, found in own.items()},
        label_names=splits.label_names,
        curves=curves,
        selections={name: run.heads[name].selection for name in own},
        seconds=run.seconds["heads"] | {JOINT: run.seconds["representation"]},
        recommended=str(auto.selection["head"]),
        images=ExampleImages(
            train=splits.datasets["train"],
            train_labels=splits.labels["train"],
            test=splits.datasets["test"],
            test_rows=evaluated_rows(len(splits.labels["test"]), rows, evaluated),
        ),
        history=run.history,
        kept_epoch=run.kept_epoch or None,
        recipe=recipe.to_yaml(),
        facts={
            "Data": recipe.data.title,
            "Model": recipe.model.name,
            "Validation": f"{run.val_name}, objective {run.objective}",
            "Seed": str(recipe.seed),
        },
        warning=TEST_SELECTION if recipe.protocol == "paper" else None,
    )


def _metrics(run: Run) -> dict[str, Any]:
    """Returns the content of ``metrics.json``."""
    counts, recipe, heads = run.splits.class_counts, run.recipe, run.heads
    reports = {name: found.report for name, found in run.evaluations.items()}
    chosen = heads[AUTO].selection if AUTO in heads else None
    return {
        "heads": {name: report.to_dict() for name, report in reports.items()},
        "intervals": {name: confidence_intervals(r, counts) for name, r in reports.items()},
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
        # They show whether a run was reproduced.
        "logits_sha256": {name: found.logits_sha256 for name, found in run.evaluations.items()},
    }


def show(name: str, options: RunOptions) -> dict[str, ShotReport]:
    """Prints the table of a finished run, or its metrics, and returns its figures by head."""
    folder = options.folder(name)
    metrics = read_json(folder / METRICS)
    reports = {head: ShotReport.from_dict(fields) for head, fields in metrics["heads"].items()}
    if process_rank() > 0:
        return reports
    if options.json:
        sys.stdout.write((folder / METRICS).read_text(encoding="utf-8"))
    else:
        seconds = metrics["seconds"]
        table = shot_table(
            reports,
            torch.tensor(metrics["class_counts"]),
            seconds=seconds["heads"] | {JOINT: seconds["representation"]},
            selections=metrics["selection"],
            title=f"{name}, test accuracy in percent, seed {metrics['seed']}",
            note=metrics.get("note"),
            # Without training, the comparison of heads is the result.
            intervals=metrics["kept_epoch"] == 0,
        )
        result_console().print(table)
        if AUTO in metrics["selection"]:
            result_console().print(recommend(reports, metrics["selection"][AUTO]), highlight=False)
    log.info("wrote %s", folder)
    return reports


def push(name: str, options: RunOptions) -> None:
    """Pushes a finished run to the Hub if the options say so; one process does."""
    repo, folder = options.push_to_hub, options.folder(name)
    if repo is None or process_rank() > 0:
        return
    private, license_ = options.private, options.license
    try:
        pushed = hub.push_to_hub(folder, repo, private=private or None, license=license_)
    except UsageError as error:
        again = ["timm-lt", "push", str(folder), repo, *(["--private"] if private else [])]
        again += [] if license_ is None else ["--license", license_]
        raise UsageError(
            f"{error}; the run itself is complete in {folder}: push it with {shlex.join(again)}"
        ) from error
    log.info("pushed to %s", pushed.url)


def run_to_exit(command: Callable[[], object], interrupted: str = INTERRUPTED) -> int:
    """Runs a command and returns its exit status; says in one line on stderr why it failed.

    Args:
        command: The command.
        interrupted: Message after Ctrl-C and SIGTERM: how to go on.

    Returns:
        0; 2 for a :class:`UsageError`, a dead data worker or another process that ended; 130 after
        Ctrl-C, 143 after SIGTERM.
    """
    try:
        with fresh_accelerate(), _terminable():
            command()
    except KeyboardInterrupt as error:
        print(interrupted, file=sys.stderr)  # noqa: T201
        return 143 if isinstance(error, Terminated) else 130
    except (UsageError, RuntimeError) as error:
        log_traceback(error)
        message = _in_one_line(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _in_one_line(error: UsageError | RuntimeError) -> str | None:
    """Returns what went wrong; None for a bug."""
    if isinstance(error, UsageError):
        return error_text(str(error))
    if is_worker_death(error):
        return describe_worker_death(error)
    return LOST_PROCESS if is_lost_process(error) else None


@contextmanager
def _terminable() -> Iterator[None]:
    """Turns SIGTERM into :class:`Terminated`, unless a launcher ends several processes.

    A scheduler ends the data workers as well, and torch may report that first.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if not alone or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        # Ignore further SIGTERM, and the end of data workers, while shutting down.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (UsageError, RuntimeError) as error:
        if WORKER_TERMINATED in str(error):
            raise Terminated from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
