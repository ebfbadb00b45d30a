"""The stages of a run: training, features of all images, fitted heads, and their test results."""

import hashlib
import time
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

from timm_lt.data.decode import log_exceptional
from timm_lt.data.images import Images
from timm_lt.data.sources import Split
from timm_lt.features import Features, extract_features
from timm_lt.fitting import AUTO, fit_head, take_best
from timm_lt.fitting.base import predictions
from timm_lt.heads import Head, fold_head, get_head, head_statistics
from timm_lt.metrics import ShotMetrics
from timm_lt.report import Predictions
from timm_lt.run.folder import STATE
from timm_lt.run.recipe import head_kind, stage_heads
from timm_lt.run.setup import Evaluation, Run
from timm_lt.training import (
    EVAL_BATCH_SIZE,
    TrainingState,
    describe_history,
    representation_seconds,
    train_head_on_images,
)
from timm_lt.utils.console import advance, log, progress


def train(run: Run) -> None:
    """Trains the representation, or resumes it; with ``epochs: 0`` there is nothing to train."""
    run.seconds["representation"] = 0.0
    if run.trainer is None:
        return
    assert run.folder is not None
    training = run.trainer.run(TrainingState(run.folder / STATE, run.accelerator))
    # The memory format of a loaded model: another may round differently.
    run.model = training.model.to(memory_format=torch.contiguous_format)
    # A cosine head, say, becomes the linear classifier with its normalised weights.
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
        run.unreadable_rows[split] = rows
        huge = sorted(set(gather_object(images.huge_rows())))
        if run.accelerator.is_main_process:
            log_exceptional(split, run.splits.datasets[split], run.unreadable[split], rows, huge)


def _extract(run: Run, images: Images, views: int | None = None) -> Features:
    loader: Iterable[Any]
    if views is None:
        loader = images.eval_loader(EVAL_BATCH_SIZE, run.accelerator)
    else:
        loader = images.views_loader(EVAL_BATCH_SIZE, run.accelerator)
    recipe = run.recipe.features
    return extract_features(
        run.model,
        loader,
        accelerator=run.accelerator,
        views=views or 1,
        cache_dir=recipe.cache_dir,
        dtype=recipe.dtype,
        compute_dtype=recipe.compute_dtype,
    )


def fit(run: Run) -> None:
    """Fits all heads: on images with all processes, on features with the main process alone."""
    run.seconds["heads"] = {}
    if not run.joint:
        _fit_joint(run)
    heads = _train_on_images(run)
    if not run.accelerator.is_main_process:
        return
    seconds, on_features = run.seconds["heads"], stage_heads(run.recipe, "features")
    classifier = get_head(run.model)
    with progress("fitting heads", len(on_features), unit="heads") as bar:
        for name, options in on_features.items():
            advance(bar, 0, f"fitting {name}")
            started = time.perf_counter()
            kind = head_kind(run.recipe, name)
            heads[name] = _fit_on_features(run, kind, classifier=classifier, **options)
            seconds[name] = time.perf_counter() - started
            advance(bar)
            if kind == "linear":
                heads[name].selection = dict(run.joint_selection)
    for head in heads.values():
        if head.selection:
            head.selection["split"] = run.val_name
    if AUTO in run.recipe.heads:
        started = time.perf_counter()
        heads[AUTO] = best_on_validation(run, heads)
        _log_comparison(heads[AUTO].selection)
        seconds[AUTO] = time.perf_counter() - started
    run.heads = {name: heads[name] for name in run.recipe.heads}


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
    log.info(
        "%s has no classifier for these %d classes: one is fitted first",
        *(run.recipe.model.name, run.splits.num_classes),
    )
    started = time.perf_counter()
    fitted: list[Any] = [None]
    if run.accelerator.is_main_process:
        head = _fit_on_features(run, "linear")
        fitted = [(head.state_dict(), head.selection)]
    state, run.joint_selection = broadcast_object_list(fitted)[0]
    classifier = get_head(run.model)
    with torch.no_grad():
        classifier.weight.copy_(state["weight"])
        if classifier.bias is not None:
            classifier.bias.copy_(state["bias"])
    run.seconds["representation"] = time.perf_counter() - started


def _train_on_images(run: Run) -> dict[str, Head]:
    """Trains the heads with stage images, and extracts features with batch norm as they have it."""
    heads: dict[str, Head] = {}
    splits: tuple[Split, ...] = ("val", "test")
    for name, options in stage_heads(run.recipe, "images").items():
        started = time.perf_counter()
        heads[name] = train_head_on_images(
            head_kind(run.recipe, name),
            run.model,
            run.images["train"],
            accelerator=run.accelerator,
            seed=run.recipe.seed,
            **options,
        )
        run.seconds["heads"][name] = time.perf_counter() - started
    started = time.perf_counter()
    for name, head in heads.items():
        if head.backbone_statistics:
            with head_statistics(run.model, head):
                run.own_features[name] = {s: _extract(run, run.images[s]) for s in splits}
    run.seconds["features"] += time.perf_counter() - started
    return heads


def best_on_validation(run: Run, heads: dict[str, Head]) -> Head:
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
    """Logs how far each head lies behind the best."""
    for name, value in record["compared"]:
        if name == record["head"]:
            log.info("%s on validation: %s %.1f %%", record["objective"], name, 100 * value)
            continue
        (low, high), (least, most) = record["intervals"][name], record["behind"][name]
        log.info(
            "%s on validation: %s %.1f %% (%.1f to %.1f), %.1f to %.1f behind %s",
            *(record["objective"], name, 100 * value, 100 * low, 100 * high),
            *(100 * least, 100 * most, record["head"]),
        )


def evaluate(run: Run) -> None:
    """Evaluates all heads on the test images."""
    run.evaluations = {name: _evaluate(run, name, head) for name, head in run.heads.items()}


def _evaluate(run: Run, name: str, head: Head) -> Evaluation:
    """Evaluates a head batch by batch, so that the logits of all images are never in memory."""
    test = run.features_of(name, "test")
    metrics = ShotMetrics(run.splits.class_counts, run.recipe.shot_rule)
    digest = hashlib.sha256()
    preds, confidences = [], []
    # In the batches of the loaded model: from float32 features come the same bits.
    batches = (part.split(EVAL_BATCH_SIZE) for part in (test.values, test.targets))
    for values, targets in zip(*batches, strict=True):
        with torch.inference_mode():
            logits = head(values.float())
        outcomes = metrics.update_logits(logits, targets)
        preds.append(outcomes.preds.int())
        confidences.append(outcomes.confidences.float())
        digest.update(logits.numpy().tobytes())
    predicted = Predictions(torch.cat(preds), torch.cat(confidences))
    return Evaluation(metrics.compute(), digest.hexdigest(), predicted)
