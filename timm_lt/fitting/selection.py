"""Choosing on validation: what is maximised, the best of some candidates, and a record of it."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from timm_lt.features import Features
from timm_lt.fitting.data import FitData
from timm_lt.fitting.rows import row_blocks
from timm_lt.heads import Head
from timm_lt.metrics import objective_value, shot_accuracy

H = TypeVar("H", bound=Head)


def predictions(head: Head, features: Features) -> Tensor:
    """Returns the classes (N,) that a head predicts, block by block."""
    with torch.inference_mode():
        blocks = row_blocks(features.values, head.out_features)
        return torch.cat([head(block).argmax(1) for block in blocks])


def validation_score(head: Head, data: FitData, val: Features) -> tuple[float, float]:
    """Returns the value of the fit's objective on validation, and what decides between equals.

    That is the mean over the classes: an objective such as the worst class is often 0 for all.
    """
    report = shot_accuracy(predictions(head, val), val.targets, data.class_counts, data.rule)
    return objective_value(report, data.objective), report.class_mean


def select(candidates: list[tuple[Any, H]], data: FitData, val: Features, option: str) -> H:
    """Returns the head with the highest objective on validation and records the choice.

    Args:
        candidates: Values of the option with the heads that they give; the first best wins.
        data: The fit's data.
        val: Validation features.
        option: Name of what is selected.
    """
    scores = [validation_score(head, data, val) for _, head in candidates]
    best = max(range(len(scores)), key=scores.__getitem__)
    value, head = candidates[best]
    head.selection = selection_record(option, value, scores[best][0], data)
    head.selection["compared"] = [
        [value, score] for (value, _), (score, _) in zip(candidates, scores, strict=True)
    ]
    return head


def selection_record(option: str, value: float, accuracy: float, data: FitData) -> dict[str, Any]:
    """Returns what a checkpoint records of a selected option.

    Its ``val_accuracy`` is the value of the objective.
    """
    return {
        option: value,
        "objective": data.objective,
        "split": "val",
        "val_accuracy": accuracy,
    }
