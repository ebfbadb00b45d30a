"""A whole run: its stages from data to the folder with results, and how the process ends."""

import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from timm_lt import hub, metrics
from timm_lt.checkpoint import METRICS, PLOTS, save_checkpoint
from timm_lt.data.decode import is_worker_death, log_exceptional
from timm_lt.data.images import Images
from timm_lt.data.loader import describe_worker_death
from timm_lt.data.sources import Split
from timm_lt.features import Features, extract_features
from timm_lt.fitting import AUTO, fit_head, head_curves, take_best
from timm_lt.fitting.base import predictions
from timm_lt.heads import Head, fold_head, get_head, head_statistics
from timm_lt.hub.card import write_card
from timm_lt.report import (
    ExampleImages,
    Predictions,
    Report,
    evaluated_rows,
    save_plots,
    write_report,
)
from timm_lt.report.tables import JOINT, recommend, shot_table
from timm_lt.run.folder import PER_CLASS, REPORT, STATE, check_run_folder
from timm_lt.run.parse import parse_command_line
from timm_lt.run.recipe import Recipe, RunOptions, head_kind, stage_heads
from timm_lt.run.setup import Evaluation, Run, create_run
from timm_lt.training import (
    EVAL_BATCH_SIZE,
    TrainingState,
    describe_history,
    representation_seconds,
)
from timm_lt.utils.accelerator import fresh_accelerate, is_lost_process, process_rank
from timm_lt.utils.checks import UsageError, user_errors
from timm_lt.utils.console import (
    advance,
    error_text,
    log,
    log_traceback,
    progress,
    result_console,
    start_logging,
)
from timm_lt.utils.files import read_json, write_json
from timm_lt.utils.longtail import describe_shots

LOST_PROCESS = "another process of this run has ended; go on with --resume and without --overwrite"
INTERRUPTED = "interrupted; run it again with --resume and without --overwrite to go on"


def main(argv: list[str] | None = None, prog: str = "timm-lt train") -> int:
    """Runs the command line and returns its exit status."""
    given = sys.argv[1:] if argv is None else argv
    return run_to_exit(lambda: run_recipe(*parse_command_line(prog, given)))


def run_recipe(name: str, recipe: Recipe, options: RunOptions) -> None:
    """Runs a recipe, writes its folder, and shows and pushes it."""
    with open_run(name, recipe, options) as run:
        if run is not None:
            run_stages(run)
    show(name, options)
    push(name, options)


@contextmanager
def open_run(name: str, recipe: Recipe, options: RunOptions) -> Iterator[Run | None]:
    """Yields the run of a recipe with all its parts; None if the run in the folder is finished.

    Raises:
        UsageError: For any mistake in the recipe, the data or the folder.
    """
    start_logging(quiet=options.quiet or process_rank() > 0, verbose=options.verbose)
    folder = options.folder(name)
    check_run_folder(folder, recipe, resume=options.resume, overwrite=options.overwrite)
    if options.push_to_hub is not None:
        hub.check_push(options.push_to_hub, private=options.private or None)
    elif options.private or options.license is not None:
        raise UsageError("--private and --license only apply with --push_to_hub NAMESPACE/NAME")
    if options.resume and (folder / METRICS).is_file():
        yield None
        return
    run = create_run(name, folder, recipe, options)
    with closing(run):
        yield run
        run.accelerator.wait_for_everyone()
        run.accelerator.end_training()


def run_stages(run: Run) -> None:
    """Runs all stages of a run."""
    for stage in (train, extract, fit, evaluate, save):
        stage(run)


def train(run: Run) -> None:
    """Trains the representation, or resumes it; with ``epochs: 0`` there is nothing to train."""
    run.seconds["representation"] = 0.0
    if run.trainer is None:
        return
    assert run.folder is not None
    training = run.trainer.run(TrainingState(run.folder / STATE, run.accelerator))
    # The memory format of a loaded model: another may round differently.
    run.model = training.model.to(memory_format=torch.contiguous_format)
    # A cosine head becomes the linear classifier with its normalised weights.
    fold_head(run.model)
    run.kept_epoch, run.history = training.kept, training.history
    run.seconds["representation"] = representation_seconds(training.history)
    log.info("%s", describe_history(training.history, training.kept))


def extract(run: Run) -> None:
    """Extracts the features of every split once, in the order of its images."""
    started = time.perf_counter()
    with progress("extracting features", len(run.images), unit="splits") as bar:
        for split, images in run.images.items():
            views = run.recipe.features.views if split == "train" else None
            run.features[split] = _extract(run, images, views)
            advance(bar)
    run.seconds["features"] = time.perf_counter() - started
    for split, images in run.images.items():
        run.unreadable[split] = len(images) - run.features[split].num_images
        # If the features of a split came from the cache, its images were not read.
        rows = sorted(set(gather_object(images.unreadable_rows())))
        huge = sorted(set(gather_object(images.huge_rows())))
        run.unreadable_rows[split] = rows
        if run.accelerator.is_main_process:
            log_exceptional(split, run.splits.datasets[split], run.unreadable[split], rows, huge)


def _extract(run: Run, images: Images, views: int | None = None) -> Features:
    create_loader = images.eval_loader if views is None else images.views_loader
    loader: Iterable[Any] = create_loader(EVAL_BATCH_SIZE, run.accelerator)
    own = {**vars(run.recipe.features), "views": views or 1}
    return extract_features(run.model, loader, accelerator=run.accelerator, **own)


def fit(run: Run) -> None:
    """Fits all heads: on images with all processes, on features with the main process alone."""
    run.seconds["heads"] = {}
    if not run.joint and run.trainer is None:
        _fit_joint(run)
    heads = _train_on_images(run)
    if not run.accelerator.is_main_process:
        return
    on_features, classifier = stage_heads(run.recipe, "features"), get_head(run.model)
    with progress("fitting heads", len(on_features), unit="heads") as bar:
        for name, options in on_features.items():
            advance(bar, 0, f"fitting {name}")
            kind = head_kind(run.recipe, name)
            with _timed(run, name):
                heads[name] = _fit_on_features(run, kind, classifier=classifier, **options)
            advance(bar)
            if kind == "linear":
                heads[name].selection = dict(run.joint_selection)
    for head in heads.values():
        if head.selection:
            head.selection["split"] = run.val_name
    if AUTO in run.recipe.heads:
        with _timed(run, AUTO):
            heads[AUTO] = _best_on_validation(run, heads)
        _log_comparison(heads[AUTO].selection)
    run.heads = {name: heads[name] for name in run.recipe.heads}


@contextmanager
def _timed(run: Run, head: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    run.seconds["heads"][head] = time.perf_counter() - started


def _fit_on_features(run: Run, kind: str, **options: Any) -> Head:
    return fit_head(
        kind,
        run.features["train"],
        class_counts=run.splits.class_counts,
        val=run.features["val"],
        seed=run.recipe.seed,
        objective=run.objective,
        rule=run.recipe.shot_rule,
        **options,
    )


def _fit_joint(run: Run) -> None:
    """Gives a model whose classifier is for other classes one for these: a linear probe."""
    log.info("%s has no classifier for these classes: one is fitted first", run.recipe.model.name)
    started = time.perf_counter()
    fitted = _fit_on_features(run, "linear") if run.accelerator.is_main_process else None
    head: Head = broadcast_object_list([fitted])[0]
    run.joint_selection, classifier = head.selection, get_head(run.model)
    # A classifier without a bias takes the weight alone.
    own, state = classifier.state_dict(), head.state_dict()
    classifier.load_state_dict(own | {key: state[key] for key in ("weight", "bias") if key in own})
    run.seconds["representation"] = time.perf_counter() - started


def _train_on_images(run: Run) -> dict[str, Head]:
    """Trains the heads with stage images, and extracts features with batch norm as they have it."""
    heads: dict[str, Head] = {}
    for name, trainer in run.head_trainers.items():
        with _timed(run, name):
            heads[name] = trainer.run(run.model, run.recipe.seed)
    started = time.perf_counter()
    extract_own(run, heads, ["val", "test"])
    run.seconds["features"] += time.perf_counter() - started
    return heads


def extract_own(run: Run, heads: Mapping[str, nn.Module], splits: Sequence[Split]) -> None:
    """Extracts the features of heads that have batch-norm statistics of their own."""
    for name, head in heads.items():
        if isinstance(head, Head) and head.backbone_statistics:
            with head_statistics(run.model, head):
                run.own_features[name] = {s: _extract(run, run.images[s]) for s in splits}


def _best_on_validation(run: Run, heads: dict[str, Head]) -> Head:
    """Returns the head that is best on validation."""
    heads = {name: heads[name] for name in run.recipe.heads if name != AUTO}
    preds = {name: predictions(head, run.features_of(name, "val")) for name, head in heads.items()}
    targets, counts = run.features["val"].targets, run.splits.class_counts
    best = take_best(heads, preds, targets, counts, run.objective, run.recipe.shot_rule)
    record = best.selection = best.selection | {"split": run.val_name}
    if record["head"] in run.own_features:
        run.own_features[AUTO] = run.own_features[record["head"]]
    return best


def _log_comparison(record: dict[str, Any]) -> None:
    """Logs how far each head lies behind the best on validation."""
    for name, value in record["compared"]:
        text = f"{record['objective']} on validation: {name} {100 * value:.1f} %"
        if name != record["head"]:
            (low, high), (least, most) = record["intervals"][name], record["behind"][name]
            text += f" ({100 * low:.1f} to {100 * high:.1f}), "
            text += f"{100 * least:.1f} to {100 * most:.1f} behind {record['head']}"
        log.info("%s", text)


def evaluate(run: Run, split: Split = "test") -> None:
    """Evaluates all heads, on the test images in a run."""
    for name, head in run.heads.items():
        run.evaluations[name] = _evaluate(run, head, run.features_of(name, split))


def _evaluate(run: Run, head: Head, features: Features) -> Evaluation:
    """Evaluates a head batch by batch, so that the logits of all images are never in memory."""
    counted = metrics.ShotMetrics(run.splits.class_counts, run.recipe.shot_rule)
    digest = hashlib.sha256()
    preds, confidences = [], []
    # In the batches of the loaded model: from float32 features come the same bits.
    batches = (part.split(EVAL_BATCH_SIZE) for part in (features.values, features.targets))
    for values, targets in zip(*batches, strict=True):
        with torch.inference_mode():
            logits = head(values.float())
        outcomes = counted.update_logits(logits, targets)
        preds.append(outcomes.preds.int())
        confidences.append(outcomes.confidences.float())
        digest.update(logits.numpy().tobytes())
    predicted = Predictions(torch.cat(preds), torch.cat(confidences))
    return Evaluation(counted.compute(), predicted, digest.hexdigest())


def save(run: Run) -> None:
    """Writes the checkpoint, tables, plots, the model card, the report and the metrics."""
    folder, recipe, splits, reports = run.folder, run.recipe, run.splits, run.reports
    if not run.accelerator.is_main_process or folder is None:
        return
    cure = "the training state is complete: make room and go on with --resume"
    with user_errors("the results cannot be written", cure=cure):
        save_checkpoint(
            folder,
            run.model,
            heads=run.heads,
            class_counts=splits.class_counts,
            metrics={name: report.summary() for name, report in reports.items()},
            label_names=splits.label_names,
            dataset=recipe.data.title,
            shot_rule=recipe.shot_rule,
            protocol=recipe.protocol,
            seed=recipe.seed,
            background=splits.background,
        )
        rows = metrics.compare_per_class(reports, splits.class_counts, splits.label_names)
        metrics.write_per_class(folder / PER_CLASS, rows)
        report = _report(run)
        save_plots(folder / PLOTS, report)
        write_card(folder, name=run.name)
        write_report(folder / REPORT, report)
        # Last: a folder with metrics is a finished run.
        write_json(folder / METRICS, _metrics(run))


def _report(run: Run) -> Report:
    """Returns the report, without head ``auto``, which is one of the others."""
    recipe, splits, counts = run.recipe, run.splits, run.splits.class_counts
    heads = {name: head for name, head in run.heads.items() if name != AUTO}
    auto = run.heads.get(AUTO) or _best_on_validation(run, heads)
    test, rows = run.features["test"], run.unreadable_rows.get("test", [])
    joint, val = get_head(run.model), run.features["val"]
    return Report(
        title=run.name,
        reports={name: run.evaluations[name].report for name in heads},
        class_counts=counts,
        targets=test.targets,
        predictions={name: run.evaluations[name].predictions for name in heads},
        label_names=splits.label_names,
        curves=head_curves(joint, heads, val, counts, recipe.shot_rule),
        selections={name: head.selection for name, head in heads.items()},
        seconds=run.seconds["heads"] | {JOINT: run.seconds["representation"]},
        recommended=str(auto.selection["head"]),
        images=ExampleImages(
            train=splits.datasets["train"],
            train_labels=splits.labels["train"],
            test=splits.datasets["test"],
            test_rows=evaluated_rows(len(splits.labels["test"]), rows, test.num_images),
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
        warning=run.note,
    )


def _metrics(run: Run) -> dict[str, Any]:
    """Returns the content of ``metrics.json``."""
    counts, recipe, heads, reports = run.splits.class_counts, run.recipe, run.heads, run.reports
    chosen = heads[AUTO].selection if AUTO in heads else None
    return {
        "heads": {name: report.to_dict() for name, report in reports.items()},
        "intervals": {name: metrics.confidence_intervals(r, counts) for name, r in reports.items()},
        "recommendation": None if chosen is None else recommend(reports, chosen),
        "label_names": run.splits.label_names,
        "class_counts": counts.tolist(),
        "shots": describe_shots(counts, recipe.shot_rule),
        "selection": {name: head.selection for name, head in heads.items() if head.selection},
        "stages": {name: trainer.summary() for name, trainer in run.head_trainers.items()},
        "seed": recipe.seed,
        "seconds": run.seconds,
        "protocol": recipe.protocol,
        "validation": run.val_name,
        "note": run.note,
        "kept_epoch": run.kept_epoch,
        "unreadable_images": run.unreadable,
        "num_processes": run.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": run.accelerator.mixed_precision,
        # They show whether a run was reproduced.
        "logits_sha256": {name: found.logits_sha256 for name, found in run.evaluations.items()},
    }


def show(name: str, options: RunOptions) -> None:
    """Prints the table of a finished run, or its metrics."""
    if process_rank() > 0:
        return
    folder = options.folder(name)
    if options.json:
        sys.stdout.write((folder / METRICS).read_text(encoding="utf-8"))
    else:
        written = read_json(folder / METRICS)
        heads, seconds = written["heads"], written["seconds"]
        reports = {head: metrics.ShotReport.from_dict(found) for head, found in heads.items()}
        table = shot_table(
            reports,
            torch.tensor(written["class_counts"]),
            seconds=seconds["heads"] | {JOINT: seconds["representation"]},
            selections=written["selection"],
            title=f"{name}, test accuracy in percent, seed {written['seed']}",
            note=written.get("note"),
            # Without training, the comparison of heads is the result.
            intervals=written["kept_epoch"] == 0,
        )
        result_console().print(table)
        if AUTO in written["selection"]:
            result_console().print(recommend(reports, written["selection"][AUTO]), highlight=False)
    log.info("wrote %s", folder)


def push(name: str, options: RunOptions) -> None:
    """Pushes a finished run to the Hub if the options say so; one process does."""
    repo, folder = options.push_to_hub, options.folder(name)
    if repo is None or process_rank() > 0:
        return
    private = options.private or None
    cure = f"the run itself is complete: push it with timm-lt push {folder} {repo}"
    with user_errors("the push failed", UsageError, cure=cure):
        pushed = hub.push_to_hub(folder, repo, private=private, license=options.license)
    log.info("pushed to %s", pushed.url)


def run_to_exit(command: Callable[[], object], interrupted: str = INTERRUPTED) -> int:
    """Runs a command and returns its exit status; says in one line on stderr why it failed.

    The status is 2 for a :class:`UsageError`, a dead data worker or another process that ended; 130
    after Ctrl-C and SIGTERM, with the message ``interrupted``.
    """
    try:
        with fresh_accelerate(), _terminable():
            command()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)  # noqa: T201
        return 130
    except (UsageError, RuntimeError) as error:
        log_traceback(error)
        if isinstance(error, UsageError):
            message = error_text(str(error))
        elif is_worker_death(error):
            message = describe_worker_death(error)
        elif is_lost_process(error):
            message = LOST_PROCESS
        else:
            raise
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


@contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM, with which a scheduler ends a job, end a run as Ctrl-C does."""
    # A launcher ends several processes by itself.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if not alone or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
