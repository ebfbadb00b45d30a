"""Several heads on the same validation images: which is best, and how sure that is."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timm_lt.fitting.objective import Objective, objective_value
from timm_lt.longtail import ShotRule, class_counts, shot_groups
from timm_lt.registry import UsageError

LEVEL, RESAMPLES = 0.95, 1000


def compare_heads(
    preds: Mapping[str, Tensor],
    targets: Tensor,
    counts: Tensor,
    *,
    objective: Objective = "all",
    rule: ShotRule = "fb",
    seed: int = 0,
) -> dict[str, Any]:
    """Returns which head is best on validation, with 95 % confidence intervals.

    The intervals are percentiles over 1,000 bootstrap samples, in which the images of each class
    are drawn with replacement. Every head sees the same samples, so differences are paired. They
    say how far the images that happen to be in the split decide; the heads stay as they are.

    Args:
        preds: Predicted classes by head, (N,) each; at least one head.
        targets: True classes, (N,).
        counts: Training images per class, (C,).
        objective: What is compared.
        rule: Where the shot groups have their boundaries.
        seed: Of the bootstrap samples.

    Returns:
        A record as of a selected option: ``head``, the first with the highest value; ``objective``,
        ``split`` and ``val_accuracy``, that value; ``compared``, each head with its value;
        ``intervals`` of the values and ``behind``, intervals of how far each head lies behind the
        best.

    Raises:
        UsageError: If there is no head, or the split has no image of the objective's shot group.

    References:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3
    """
    if not preds:
        raise UsageError("there are no heads to choose from")
    names = list(preds)
    right = torch.stack([preds[name].cpu() == targets for name in names])
    images = class_counts(targets, len(counts))
    shots = shot_groups(counts, rule)

    def values(right_per_class: Tensor) -> Tensor:
        return objective_value(right_per_class.double() / images, images, shots, objective)

    observed = values(_per_class(right, targets, len(counts)))
    best = int(observed.argmax())
    samples = torch.stack(
        [values(part) for part in _resampled(right, targets, images, torch.Generator(), seed)]
    )
    return {
        "head": names[best],
        "objective": objective,
        "split": "val",
        "val_accuracy": float(observed[best]),
        "compared": [list(pair) for pair in zip(names, observed.tolist(), strict=True)],
        "intervals": dict(zip(names, _intervals(samples), strict=True)),
        "behind": dict(zip(names, _intervals(samples[:, [best]] - samples), strict=True)),
    }


def _per_class(right: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Returns how many images of each class each head has right, (H, C)."""
    return torch.zeros(len(right), num_classes).index_add_(1, targets, right.float())


def _resampled(
    right: Tensor, targets: Tensor, images: Tensor, generator: torch.Generator, seed: int
) -> "list[Tensor]":
    """Returns the right images per class, (H, C), of every bootstrap sample."""
    generator.manual_seed(seed)
    classes, order = targets.sort(stable=True)
    right = right[:, order].float()
    first, number = (images.cumsum(0) - images)[classes], images[classes]
    samples = []
    for _ in range(RESAMPLES):
        drawn = torch.rand(len(classes), generator=generator, dtype=torch.float64)
        rows = first + (drawn * number).long()
        samples.append(_per_class(right[:, rows], classes, len(images)))
    return samples


def _intervals(samples: Tensor) -> list[list[float]]:
    """Returns the two percentiles of every column, (R, H)."""
    tail = (1 - LEVEL) / 2
    bounds = torch.quantile(samples, torch.tensor([tail, 1 - tail], dtype=samples.dtype), dim=0)
    intervals: list[list[float]] = bounds.T.tolist()
    return intervals
