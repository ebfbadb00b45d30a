"""Confidence intervals: what a figure would be on other test images of the same classes."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_lt.metrics.counting import accuracy_figures
from timm_lt.metrics.shot_report import Objective, ShotReport, objective_field, objective_value
from timm_lt.metrics.streaming import shot_accuracy
from timm_lt.utils.checks import UsageError, check_integer, check_number
from timm_lt.utils.longtail import (
    ClassCounts,
    Labels,
    ShotRule,
    check_class_counts,
    check_labels,
    shot_groups,
)

Figures: TypeAlias = dict[str, Tensor]
Draw: TypeAlias = Callable[[np.random.Generator, int], Figures]

# Numbers that are drawn at a time.
BLOCK = 2**20


class PairedDifference(NamedTuple):
    """By how much a figure of classifier a exceeds that of classifier b on the same images.

    Attributes:
        difference: On the images as they are.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    difference: float
    low: float
    high: float


def confidence_intervals(
    report: ShotReport,
    class_counts: ClassCounts,
    *,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Computes bootstrap intervals of the figures that follow from the per-class accuracies.

    These are ``all``, ``class_mean``, ``many_shot``, ``medium_shot``, ``few_shot``,
    ``worst_class``, ``harmonic_mean``, ``geometric_mean`` and ``group_harmonic_mean``. Precision,
    F1, top-5 and calibration depend on more than the counts per class and have none here.

    Images are drawn anew within each class (stratified), as fits a test set whose number of images
    per class was chosen and not drawn, such as a balanced one: the number ``k_c`` of right images
    out of ``n_c`` is binomial with the probability that was found. The interval is between the
    percentiles. It says nothing of another training run. With few images per class, that of a
    figure which a single class decides (the worst class, the harmonic and the geometric mean) is
    rough and lies low, since the minimum of noisy accuracies is below that of the true ones.

    >>> report = shot_accuracy([0, 0, 0, 1], [0, 0, 0, 0], class_counts=[500, 5])
    >>> confidence_intervals(report, [500, 5])["many_shot"]
    (0.25, 1.0)

    Args:
        report: Figures of a split.
        class_counts: Training images per class, as for the report, (C,).
        level: Share of the draws inside the interval, in (0, 1).
        samples: Number of draws, at least 1. The cost is one binomial number per draw and class.
        seed: Seed of the draws.

    Returns:
        Low and high by name of the figure; a shot group without images has none.

    Raises:
        UsageError: If the sizes differ, a value is out of range, or the report is of an older
            version that had no images per class.
    """
    counts = report.right_and_images()
    groups = _groups(class_counts, report.rule, len(report.per_class))
    present = counts[1] > 0
    right, images = (count[present].numpy() for count in counts)
    groups = groups[:, present]

    def draw(generator: np.random.Generator, size: int) -> Figures:
        drawn = generator.binomial(images, right / images, (size, len(images)))
        return _figures(drawn, images, groups)

    drawn = _bootstrap(draw, len(images), samples, seed)
    return {
        name: _percentiles(values, level)
        for name, values in drawn.items()
        if getattr(report, name) is not None
    }


def paired_difference(
    preds_a: Labels,
    preds_b: Labels,
    targets: Labels,
    class_counts: ClassCounts,
    *,
    objective: Objective = "all",
    rule: ShotRule = "fb",
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> PairedDifference:
    """Computes by how much classifier a is better than b, with a bootstrap interval.

    The two are compared on the same images, so what makes an image hard for both cancels out: of
    each class it counts how many images both have right, only a, only b and neither, and draws
    those four anew (multinomial within each class, as :func:`confidence_intervals`). An interval
    that contains 0 does not tell the two apart.

    >>> paired_difference([0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1], [500, 5])
    PairedDifference(difference=0.25, low=0.0, high=0.5)

    Args:
        preds_a: Classes that a predicts, integers in [0, C).
        preds_b: Classes that b predicts, integers in [0, C).
        targets: True classes, integers in [0, C).
        class_counts: Training images per class.
        objective: The figure to compare, as :func:`~timm_lt.metrics.objective_value` has them.
        rule: Where the shot groups have their boundaries.
        level: Share of the draws inside the interval, in (0, 1).
        samples: Number of draws, at least 1.
        seed: Seed of the draws.

    Shape:
        preds_a (N,), preds_b (N,), targets (N,), class_counts (C,).

    Raises:
        UsageError: If the shapes differ, a label or a value is out of range, or the objective is
            that of a shot group without images.
    """
    field = objective_field(objective)
    a, b = (
        objective_value(shot_accuracy(preds, targets, class_counts, rule), objective)
        for preds in (preds_a, preds_b)
    )
    targets = check_labels(targets)
    right_a, right_b = (check_labels(preds) == targets for preds in (preds_a, preds_b))
    groups = _groups(class_counts, rule, len(check_class_counts(class_counts)))
    # By class: neither, only b, only a, both.
    cells = torch.bincount(4 * targets + 2 * right_a + right_b, minlength=4 * groups.shape[1])
    cells = cells.view(-1, 4)
    present = cells.sum(1) > 0
    counts, groups = cells[present].numpy(), groups[:, present]
    images = counts.sum(1)

    def draw(generator: np.random.Generator, size: int) -> Figures:
        shares = counts / images[:, None]
        drawn = generator.multinomial(images, shares, (size, len(images)))
        _, only_b, only_a, both = np.moveaxis(drawn, 2, 0)
        of_a, of_b = (_figures(only + both, images, groups) for only in (only_a, only_b))
        return {field: of_a[field] - of_b[field]}

    drawn = _bootstrap(draw, 4 * len(images), samples, seed)
    return PairedDifference(a - b, *_percentiles(drawn[field], level))


def _groups(class_counts: ClassCounts, rule: ShotRule, num_classes: int) -> Tensor:
    """Returns the masks of the shot groups as float64, (3, C)."""
    counts = check_class_counts(class_counts, num_classes)
    masks = torch.stack(list(shot_groups(counts, rule).values())).double()
    if masks.shape[1] != num_classes:
        raise UsageError(f"class_counts has {masks.shape[1]} classes, the report has {num_classes}")
    return masks


def _figures(right: NDArray[np.int64], images: NDArray[np.int64], groups: Tensor) -> Figures:
    return accuracy_figures(
        torch.from_numpy(right).double(), torch.from_numpy(images).double(), groups
    )


def _bootstrap(draw: Draw, width: int, samples: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """Returns the figures of all draws, (samples,), from a few draws of ``width`` at a time."""
    check_integer("samples", samples, minimum=1)
    check_integer("seed", seed, minimum=0)
    generator = np.random.default_rng(seed)
    size = max(BLOCK // width, 1)
    parts = [draw(generator, min(size, samples - first)) for first in range(0, samples, size)]
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def _percentiles(values: NDArray[np.float64], level: float) -> tuple[float, float]:
    check_number("level", level, "(0, 1)")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
