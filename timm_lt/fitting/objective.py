"""What is maximised on validation, as a function of the accuracy on each class."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from timm_lt.longtail import ShotRule, class_counts, shot_groups
from timm_lt.registry import UsageError

Objective = Literal["all", "class_mean", "few_shot", "harmonic_mean", "worst_class"]


def objective_value(
    recalls: Tensor, images: Tensor, shots: Mapping[str, Tensor], objective: Objective
) -> Tensor:
    """Returns the value of an objective for one classifier or many.

    >>> recalls, images = torch.tensor([[1.0, 0.5], [0.6, 0.6]]), torch.tensor([30, 10])
    >>> objective_value(recalls, images, {}, "all")
    tensor([0.8750, 0.6000])
    >>> objective_value(recalls, images, {}, "worst_class")
    tensor([0.5000, 0.6000])

    Args:
        recalls: Accuracy on each class; of a class without images it is not looked at.
        images: Images of each class in the split.
        shots: Whether each class belongs to a shot group, (C,) bool by group.
        objective: ``"all"``: accuracy over the images; ``"class_mean"``: the mean over the classes;
            ``"few_shot"``: the same over the few-shot classes; ``"harmonic_mean"``: of the means of
            the shot groups, 0 where one of them is 0; ``"worst_class"``: the least. All of them
            over the classes that have images.

    Shape:
        recalls (..., C), images (C,); the values are (...).

    Raises:
        UsageError: If the split has no image of a few-shot class, which the objective is about.
    """
    present = images > 0
    if objective == "all":
        return (recalls[..., present] * images[present]).sum(-1) / images.sum()
    if objective == "class_mean":
        return recalls[..., present].mean(-1)
    if objective == "worst_class":
        return recalls[..., present].amin(-1)
    groups = {
        name: recalls[..., members & present].mean(-1)
        for name, members in shots.items()
        if (members & present).any()
    }
    if objective == "harmonic_mean":
        inverse: Tensor = torch.stack(list(groups.values())).reciprocal().mean(0)
        return inverse.reciprocal()
    return groups[check_group(objective, groups)]


def check_group(group: str, groups: Mapping[str, object]) -> str:
    """Checks that there are images of the shot group that is an objective.

    Raises:
        UsageError: If there are none.
    """
    if group not in groups:
        raise UsageError(
            f"the split has no image of a {group} class: take another objective than {group!r}, "
            "such as 'class_mean'"
        )
    return group


def validation_value(
    preds: Tensor, targets: Tensor, counts: Tensor, rule: ShotRule, objective: Objective
) -> float:
    """Returns the objective of some predictions.

    Shape:
        preds (N,), targets (N,), counts (C,): training images per class.
    """
    images = class_counts(targets, len(counts))
    right = torch.bincount(targets[preds == targets], minlength=len(counts))
    recalls = right.double() / images
    return float(objective_value(recalls, images, shot_groups(counts, rule), objective))
