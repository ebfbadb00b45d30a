"""From the figures of a run to what its report says."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from timm_lt.fitting import AccuracyCurve
from timm_lt.metrics import Objective, ShotReport, confidence_intervals, paired_difference
from timm_lt.report.content import (
    ClassNote,
    ClassTable,
    Epoch,
    Frequency,
    HeadRow,
    Interval,
    ReportContent,
    TauCurve,
)
from timm_lt.report.differences import (
    EvaluatedImages,
    Predictions,
    compare_with_joint,
    count_confusions,
)
from timm_lt.report.tables import GROUPS, describe_selection
from timm_lt.report.thinning import drawn_steps, thinned
from timm_lt.report.thumbnails import ExampleImages, Thumbnails
from timm_lt.training.history import EpochRecord
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import one_line
from timm_lt.utils.longtail import ShotRule, describe_shots, shot_groups

# Classes in the table; per_class.csv has all of them.
MAX_CLASSES = 10_000
# Heads that are compared with the joint classifier; more would make the file large.
MAX_COMPARED = 8
NAME_LENGTH = 40


def gather_report(
    *,
    title: str,
    reports: Mapping[str, ShotReport],
    class_counts: Tensor,
    targets: Tensor,
    predictions: Mapping[str, Predictions],
    label_names: Sequence[str] | None = None,
    curves: Mapping[str, tuple[AccuracyCurve, float]] | None = None,
    selections: Mapping[str, Mapping[str, Any]] | None = None,
    seconds: Mapping[str, float] | None = None,
    joint: str = "linear",
    recommended: str | None = None,
    images: ExampleImages | None = None,
    history: Sequence[EpochRecord] = (),
    kept_epoch: int | None = None,
    recipe: str | None = None,
    facts: Mapping[str, str] | None = None,
    warning: str | None = None,
) -> ReportContent:
    """Gathers what a report says of some heads on the same test images.

    What is not given is left out of the report. Its size is bounded: of more than 10,000 classes
    the table has the rarest 10,000, curves have a few hundred points, and no more than a few
    hundred pictures of 3 kB each are made. Beside the predictions, memory grows with the classes
    and the pairs of classes that are confused.

    Args:
        title: Name of the run.
        reports: Test figures by head.
        class_counts: Training images per class, (C,).
        targets: True classes of the test images, (N,).
        predictions: What each head says of them, by head.
        label_names: Names of the classes, (C,), if known.
        curves: Accuracy on validation against tau with the head's tau, by head.
        selections: How each head's options were chosen.
        seconds: Time that each head took, if known.
        joint: Name of the joint classifier; if it is not among the heads, none is compared.
        recommended: Name of the head that is best on validation, if known.
        images: Where example images come from; None shows none.
        history: The epochs of the representation's training; empty if there was none.
        kept_epoch: The epoch whose weights went on.
        recipe: The recipe as it was run, YAML.
        facts: More that there is to know beforehand, in words, by a word or two.
        warning: What has to be known before any figure is read.

    Raises:
        UsageError: If a head has figures but no predictions, the predictions and the targets differ
            in number, or the joint classifier or the recommended head is not among the heads.
    """
    _check(reports, predictions, targets, recommended)
    rule = next(iter(reports.values())).rule
    names = class_names(label_names, len(class_counts))
    evaluated = _evaluated(names, class_counts, targets, rule, images)
    base = joint if joint in reports else None
    others = [name for name in reports if name != base]
    compared = _compared(others, recommended)
    return ReportContent(
        title=one_line(title, 200),
        facts={**(facts or {}), **_data_facts(class_counts, targets)},
        shots=describe_shots(class_counts, rule),
        heads=[
            _head_row(name, report, class_counts, evaluated, predictions, base, selections, seconds)
            for name, report in reports.items()
        ],
        joint=base,
        recommended=recommended,
        frequency=_frequency(reports, class_counts, rule),
        classes=_class_table(reports, class_counts, names, evaluated),
        curves=[
            _tau_curve(name, *curve, (selections or {}).get(name, {}))
            for name, curve in (curves or {}).items()
        ],
        comparisons={
            name: compare_with_joint(predictions[name], predictions[base], evaluated)
            for name in compared
            if base is not None
        },
        confusions={
            name: count_confusions(predictions[name], evaluated)
            for name in ([] if base is None else [base]) + compared
        },
        epochs=[Epoch(r.epoch, r.loss, r.lr, dict(r.val)) for r in history],
        kept_epoch=kept_epoch,
        recipe=recipe,
        warning=warning,
        min_images=evaluated.min_images(),
    )


def class_names(label_names: Sequence[str] | None, num_classes: int) -> list[str]:
    """Returns how classes are called in a report: by their names, in one line each.

    >>> class_names(["cat", " a  b ", ""], 3), class_names(None, 1)
    (['cat', 'a b', 'class 2'], ['class 0'])
    """
    given = label_names or [""] * num_classes
    return [one_line(name, NAME_LENGTH) or f"class {c}" for c, name in enumerate(given)]


def _check(
    reports: Mapping[str, ShotReport],
    predictions: Mapping[str, Predictions],
    targets: Tensor,
    recommended: str | None,
) -> None:
    if not reports:
        raise UsageError("a report needs the figures of at least one head")
    for name in reports:
        if name not in predictions:
            raise UsageError(f"head {name!r} has figures but no predictions")
        if predictions[name].preds.shape != targets.shape:
            raise UsageError(
                f"head {name!r} has predictions {tuple(predictions[name].preds.shape)}, the "
                f"targets are {tuple(targets.shape)}"
            )
    if recommended is not None and recommended not in reports:
        raise UsageError(
            f"the recommended head {recommended!r} is not one of: {', '.join(reports)}"
        )


def _compared(others: list[str], recommended: str | None) -> list[str]:
    """Returns the heads that are compared, in order; the recommended one is among them."""
    if recommended in others[MAX_COMPARED:]:
        return [*others[: MAX_COMPARED - 1], recommended]
    return others[:MAX_COMPARED]


def _evaluated(
    names: Sequence[str],
    counts: Tensor,
    targets: Tensor,
    rule: ShotRule,
    images: ExampleImages | None,
) -> EvaluatedImages:
    groups = shot_groups(counts, rule)
    group_of = torch.stack(list(groups.values())).int().argmax(0)
    notes = [
        ClassNote(name, GROUPS[group], count)
        for name, group, count in zip(names, group_of.tolist(), counts.tolist(), strict=True)
    ]
    return EvaluatedImages(targets.long(), notes, group_of, GROUPS, Thumbnails(images))


def _data_facts(counts: Tensor, targets: Tensor) -> dict[str, str]:
    return {
        "Training images": (
            f"{int(counts.sum()):,} of {len(counts):,} classes, {int(counts.max()):,} to "
            f"{int(counts.min()):,} of each"
        ),
        "Test images": f"{len(targets):,}",
    }


def _head_row(
    name: str,
    report: ShotReport,
    counts: Tensor,
    evaluated: EvaluatedImages,
    predictions: Mapping[str, Predictions],
    joint: str | None,
    selections: Mapping[str, Mapping[str, Any]] | None,
    seconds: Mapping[str, float] | None,
) -> HeadRow:
    intervals = confidence_intervals(report, counts)
    keys = (*GROUPS, "all", "class_mean")
    gain = None
    if joint is not None and name != joint:
        own, base = (predictions[key].preds.long() for key in (name, joint))
        gain = Interval(*paired_difference(own, base, evaluated.targets, counts, rule=report.rule))
    return HeadRow(
        name=name,
        figures={key: Interval(getattr(report, key), *intervals.get(key, ())) for key in keys},
        gain=gain,
        ece={} if report.ece is None else {"all": report.ece, **(report.ece_per_group or {})},
        bins=report.reliability or (),
        selected=describe_selection((selections or {}).get(name, {})),
        seconds=(seconds or {}).get(name),
    )


def _frequency(reports: Mapping[str, ShotReport], counts: Tensor, rule: ShotRule) -> Frequency:
    order = torch.argsort(counts, descending=True, stable=True)
    window = max(len(order) // 10, 1)
    accuracy = {}
    for name, report in reports.items():
        # A running mean over neighbouring classes: single classes are too noisy to read.
        means = report.per_class[order].unfold(0, window, 1).nanmean(1)
        ranks = torch.arange(len(means)) + (window - 1) / 2 + 1
        known = ~means.isnan()
        accuracy[name] = thinned(ranks[known], means[known])
    boundaries: dict[str, tuple[int, int] | None] = {}
    end = 0
    for group, shot in describe_shots(counts, rule).items():
        start, end = end, end + int(shot["classes"])
        boundaries[group] = (start + 1, end) if end > start else None
    ranks = torch.arange(len(order)) + 1.0
    return Frequency(window, accuracy, thinned(ranks, counts[order].double()), boundaries)


def _tau_curve(
    head: str, curve: AccuracyCurve, tau: float, selection: Mapping[str, Any]
) -> TauCurve:
    right = max(2.0, 1.5 * tau)
    objective: Objective | None = selection.get("objective") if "tau" in selection else None
    shown: Objective = objective or "all"
    steps = {"all": curve.steps()}
    for name, part in curve.groups.items():
        if part is not None:
            # As everywhere in the report, a shot group's figure is the mean over its classes.
            steps[name] = part.steps("all" if part.targets is None else "class_mean")
    if shown not in steps:
        steps[shown] = curve.steps(shown)
    return TauCurve(
        head=head,
        tau=tau,
        objective=objective,
        value=curve(tau, objective=shown),
        at_zero=curve(0.0, objective=shown),
        right=right,
        steps={name: drawn_steps(*found, right) for name, found in steps.items()},
    )


def _class_table(
    reports: Mapping[str, ShotReport],
    counts: Tensor,
    names: Sequence[str],
    evaluated: EvaluatedImages,
) -> ClassTable:
    order = torch.argsort(counts, descending=True, stable=True)
    left_out = max(len(order) - MAX_CLASSES, 0)
    shown = order[left_out:].tolist()
    images = evaluated.images_per_class().tolist()
    columns = [report.per_class.tolist() for report in reports.values()]
    rows = [
        [
            names[c],
            evaluated.notes[c].training_images,
            evaluated.notes[c].group,
            images[c],
            *(None if column[c] != column[c] else round(column[c], 4) for column in columns),
        ]
        for c in shown
    ]
    return ClassTable(list(reports), rows, left_out)
