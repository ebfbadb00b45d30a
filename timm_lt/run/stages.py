"""The classifier stage of a run: features are taken once, then every head is made of them."""

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

from timm_lt.data.images import Images
from timm_lt.data.readable import log_exceptional
from timm_lt.data.sources import Split
from timm_lt.features import Features, extract_features
from timm_lt.fitting import AUTO, fit_head, take_best
from timm_lt.fitting.selection import predictions
from timm_lt.heads import Head, get_head, head_statistics
from timm_lt.metrics import ShotMetrics, ShotReport
from timm_lt.report.differences import Predictions
from timm_lt.run.recipe_checks import head_kind, stage_heads
from timm_lt.run.setup import Run
from timm_lt.training import EVAL_BATCH_SIZE, train_head_on_images
from timm_lt.utils.console import advance, log, progress


@dataclass(frozen=True)
class RunFeatures:
    """Features of the splits.

    Attributes:
        shared: By split, of the backbone as it was trained.
        own: By head and split, of heads that have batch-norm statistics of their own.
    """

    shared: Mapping[Split, Features]
    own: dict[str, dict[Split, Features]] = field(default_factory=dict)

    def of(self, head: str, split: Split) -> Features:
        """Returns the features that a head takes."""
        return self.own.get(head, self.shared)[split]


def extract(run: Run) -> RunFeatures:
    """Takes the features of every split once, in the order of its images."""
    started = time.perf_counter()
    features: dict[Split, Features] = {}
    with progress("extracting features", len(run.images), unit="splits") as bar:
        for split, images in run.images.items():
            views = run.recipe.features.views if split == "train" else None
            features[split] = extract_split(run, images, views)
            advance(bar)
    run.seconds["features"] = time.perf_counter() - started
    count_unreadable(run, features)
    return RunFeatures(features)


def extract_split(run: Run, images: Images, views: int | None = None) -> Features:
    """Takes the features of the images as they are, or of augmented views, in their order."""
    loader: Iterable[Any]
    if views is None:
        loader = images.eval_loader(EVAL_BATCH_SIZE, run.accelerator)
    else:
        loader = images.views_loader(EVAL_BATCH_SIZE, run.accelerator)
    return extract_features(
        run.model,
        loader,
        accelerator=run.accelerator,
        views=views or 1,
        **run.recipe.features.arguments(),
    )


def count_unreadable(run: Run, features: Mapping[Split, Features]) -> None:
    """Counts the images that no process could read, and says which."""
    for split, images in run.images.items():
        left_out = len(images) - features[split].num_images
        run.unreadable[split] = left_out
        # Of a split whose features were in the cache, no image was read.
        rows = sorted(set(gather_object(images.unreadable_rows())))
        run.unreadable_rows[split] = rows
        huge = sorted(set(gather_object(images.huge_rows())))
        if run.accelerator.is_main_process:
            log_exceptional(split, run.splits.datasets[split], left_out, rows, huge)


def fit_joint(run: Run, features: RunFeatures) -> None:
    """Gives a model whose classifier is for other classes one for these: a linear probe."""
    log.info(
        "%s has no classifier for these %d classes: one is fitted first",
        *(run.recipe.model.name, run.splits.num_classes),
    )
    started = time.perf_counter()
    fitted: list[Any] = [None]
    if run.accelerator.is_main_process:
        head = fit_head(
            "linear",
            features.shared["train"],
            class_counts=run.splits.class_counts,
            val=features.shared["val"],
            seed=run.recipe.seed,
            objective=run.objective,
            rule=run.recipe.shot_rule,
        )
        fitted = [(head.state_dict(), head.selection)]
    state, run.joint_selection = broadcast_object_list(fitted)[0]
    classifier = get_head(run.model)
    with torch.no_grad():
        classifier.weight.copy_(state["weight"])
        if classifier.bias is not None:
            classifier.bias.copy_(state["bias"])
    run.seconds["representation"] = time.perf_counter() - started


def train_heads(run: Run) -> dict[str, Head]:
    """Trains the heads of stage images, on all processes."""
    heads: dict[str, Head] = {}
    run.seconds["heads"] = {}
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
    return heads


def extract_for_heads(run: Run, heads: Mapping[str, Head], features: RunFeatures) -> None:
    """Takes features again for the heads that have batch-norm statistics of their own."""
    started = time.perf_counter()
    splits: tuple[Split, ...] = ("val", "test")
    for name, head in heads.items():
        if head.backbone_statistics:
            with head_statistics(run.model, head):
                features.own[name] = {s: extract_split(run, run.images[s]) for s in splits}
    run.seconds["features"] += time.perf_counter() - started


def fit(run: Run, features: RunFeatures, trained: Mapping[str, Head]) -> dict[str, Head]:
    """Fits the recipe's other heads on the training features, tuned on those of validation."""
    classifier = get_head(run.model)
    heads, seconds = dict(trained), run.seconds["heads"]
    fitted = stage_heads(run.recipe, "features")
    with progress("fitting heads", len(fitted), unit="heads") as bar:
        for name, options in fitted.items():
            advance(bar, 0, f"fitting {name}")
            started = time.perf_counter()
            heads[name] = fit_head(
                head_kind(run.recipe, name),
                features.shared["train"],
                classifier=classifier,
                class_counts=run.splits.class_counts,
                val=features.shared["val"],
                seed=run.recipe.seed,
                objective=run.objective,
                rule=run.recipe.shot_rule,
                **options,
            )
            seconds[name] = time.perf_counter() - started
            advance(bar)
    heads = {name: heads[name] for name in run.recipe.heads if name != AUTO}
    for name, head in heads.items():
        if head_kind(run.recipe, name) == "linear":
            head.selection = dict(run.joint_selection)
    for head in heads.values():
        if head.selection:
            head.selection["split"] = run.val_name
    if AUTO in run.recipe.heads:
        started = time.perf_counter()
        heads[AUTO] = choose(run, heads, features)
        seconds[AUTO] = time.perf_counter() - started
    return {name: heads[name] for name in run.recipe.heads}


def choose(run: Run, heads: Mapping[str, Head], features: RunFeatures) -> Head:
    """Returns the head that is best on validation."""
    val = features.shared["val"]
    preds = {name: predictions(head, features.of(name, "val")) for name, head in heads.items()}
    best = take_best(
        heads, preds, val.targets, run.splits.class_counts, run.objective, run.recipe.shot_rule
    )
    record = best.selection | {"split": run.val_name}
    best.selection = record
    if record["head"] in features.own:
        features.own[AUTO] = features.own[record["head"]]
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
    return best


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a head does on the test images.

    Attributes:
        report: Its figures.
        logits_sha256: Digest of its logits.
        predictions: Its predicted class of each image, int32, and the probability of that, float32.
    """

    report: ShotReport
    logits_sha256: str
    predictions: Predictions


def evaluate(run: Run, name: str, head: Head, features: RunFeatures) -> Evaluation:
    """Evaluates a head on the test images; batch by batch, so no logits of all images are held."""
    test = features.of(name, "test")
    metrics = ShotMetrics(run.splits.class_counts, run.recipe.shot_rule)
    digest = hashlib.sha256()
    # In the batches that the model would see: from float32 features come the same bits.
    batches = (part.split(EVAL_BATCH_SIZE) for part in (test.values, test.targets))
    preds, confidences = [], []
    for values, targets in zip(*batches, strict=True):
        with torch.inference_mode():
            logits = head(values.float())
        outcomes = metrics.update_logits(logits, targets)
        preds.append(outcomes.preds.int())
        confidences.append(outcomes.confidences.float())
        digest.update(logits.numpy().tobytes())
    predictions = Predictions(torch.cat(preds), torch.cat(confidences))
    return Evaluation(metrics.compute(), digest.hexdigest(), predictions)
