"""The classifier stage of a run: features are taken once, then every head is made of them.

What the report of a run says.
"""

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

from timm_lt.data.decode import log_exceptional
from timm_lt.data.images import Images
from timm_lt.data.sources import Split
from timm_lt.features import Features, extract_features
from timm_lt.fitting import AUTO, AccuracyCurve, fit_head, take_best
from timm_lt.fitting.base import predictions
from timm_lt.heads import Head, get_head, head_statistics
from timm_lt.metrics import ShotMetrics, ShotReport, objective_value, shot_accuracy
from timm_lt.report import ExampleImages, Predictions, Report, evaluated_rows
from timm_lt.report.tables import TEST_SELECTION
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


def report_of_run(
    run: Run,
    heads: Mapping[str, Head],
    evaluated: Mapping[str, Evaluation],
    features: RunFeatures,
    curves: Mapping[str, tuple[AccuracyCurve, float]],
) -> Report:
    """Returns the report of a run, without head ``auto``, which is one of the others.

    Args:
        run: The run.
        heads: Its heads by name.
        evaluated: What they do on the test images.
        features: Features of the splits.
        curves: Accuracy on validation against tau, by head.
    """
    recipe, splits = run.recipe, run.splits
    own = {name: head for name, head in heads.items() if name != AUTO}
    return Report(
        title=run.name,
        reports={name: evaluated[name].report for name in own},
        class_counts=splits.class_counts,
        targets=features.shared["test"].targets,
        predictions={name: evaluated[name].predictions for name in own},
        label_names=splits.label_names,
        curves=curves,
        selections={name: head.selection for name, head in own.items()},
        seconds=run.seconds["heads"] | {"linear": run.seconds["representation"]},
        recommended=best_on_validation(run, heads, features),
        images=_example_images(run, features),
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


def best_on_validation(run: Run, heads: Mapping[str, Head], features: RunFeatures) -> str:
    """Returns the name of the head with the highest objective on validation."""
    if AUTO in heads:
        return str(heads[AUTO].selection["head"])
    values = {}
    for name, head in heads.items():
        val = features.of(name, "val")
        preds, rule = predictions(head, val), run.recipe.shot_rule
        report = shot_accuracy(preds, val.targets, run.splits.class_counts, rule)
        # Of equals, the mean over the classes decides.
        values[name] = objective_value(report, run.objective), report.class_mean
    return max(values, key=values.__getitem__)


def _example_images(run: Run, features: RunFeatures) -> ExampleImages:
    splits, evaluated = run.splits, features.shared["test"].num_images
    unreadable = run.unreadable_rows.get("test", [])
    return ExampleImages(
        train=splits.datasets["train"],
        train_labels=splits.labels["train"],
        test=splits.datasets["test"],
        test_rows=evaluated_rows(len(splits.labels["test"]), unreadable, evaluated),
    )
