"""Several heads on the same validation images: which is best, and how sure that is."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from timm_lt.metrics import (
    Objective,
    confidence_intervals,
    objective_field,
    objective_value,
    paired_difference,
    shot_accuracy,
)
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import ShotRule


def compare_heads(
    preds: Mapping[str, Tensor],
    targets: Tensor,
    counts: Tensor,
    *,
    objective: Objective = "all",
    rule: ShotRule = "fb",
) -> dict[str, Any]:
    """Returns which head is best on validation, with 95 % confidence intervals.

    The intervals are those of :func:`~timm_lt.metrics.confidence_intervals`, and of
    :func:`~timm_lt.metrics.paired_difference` for how far a head lies behind the best. They say how
    much hangs on which images happen to be in the split; the heads stay as they are.

    Args:
        preds: Predicted classes by head, (N,) each; at least one head.
        targets: True classes, (N,).
        counts: Training images per class, (C,).
        objective: What is compared.
        rule: Where the shot groups have their boundaries.

    Returns:
        A record as of a selected option: ``head``, the one with the highest value; ``objective``,
        ``split`` and ``val_accuracy``, that value; ``compared``, each head with its value;
        ``intervals`` of the values and ``behind``, intervals of how far each head lies behind the
        best.

    Raises:
        UsageError: If there is no head, or the split has no image of the objective's shot group.
    """
    if not preds:
        raise UsageError("there are no heads to choose from")
    reports = {name: shot_accuracy(given, targets, counts, rule) for name, given in preds.items()}
    values = {name: objective_value(report, objective) for name, report in reports.items()}
    # Of equals, as where all have a class with no image right, the mean over the classes decides.
    best = max(values, key=lambda name: (values[name], reports[name].class_mean))
    field = objective_field(objective)
    intervals = {name: confidence_intervals(r, counts)[field] for name, r in reports.items()}
    behind = {
        name: paired_difference(
            preds[best], given, targets, counts, objective=objective, rule=rule
        )[1:]
        for name, given in preds.items()
    }
    return {
        "head": best,
        "objective": objective,
        "split": "val",
        "val_accuracy": values[best],
        "compared": [list(pair) for pair in values.items()],
        "intervals": {name: list(interval) for name, interval in intervals.items()},
        "behind": {name: list(interval) for name, interval in behind.items()},
    }
