"""Bootstrap confidence intervals, and the accuracy under another class distribution."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_lt.metrics.shot_report import Objective, ShotReport, objective_field, objective_value
from timm_lt.metrics.streaming import accuracy_figures, shot_accuracy
from timm_lt.utils.checks import UsageError, check_choice, check_integer, check_number
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

# Random numbers per block.
BLOCK = 2**20


class PairedDifference(NamedTuple):
    """Difference a - b of two classifiers on the same images, with its interval [low, high]."""

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
    """Computes bootstrap intervals of the figures that are functions of the per-class accuracies.

    These are ``all``, ``class_mean``, ``many_shot``, ``medium_shot``, ``few_shot``,
    ``worst_class``, ``harmonic_mean``, ``geometric_mean`` and ``group_harmonic_mean``.

    Images are resampled within each class (stratified): the number of right images of class c is
    binomial with ``n_c`` draws and the observed accuracy. Intervals are between percentiles, and do
    not cover the variation between training runs. Those of figures that one class with few images
    decides (worst class, harmonic and geometric mean) are rough and too low.

    >>> report = shot_accuracy([0, 0, 0, 1], [0, 0, 0, 0], class_counts=[500, 5])
    >>> confidence_intervals(report, [500, 5])["many_shot"]
    (0.25, 1.0)

    Args:
        report: Report on a split.
        class_counts: Training images per class, as for the report, (C,).
        level: Share of the draws inside the interval, in (0, 1).
        samples: Number of draws, at least 1; each costs one binomial number per class.
        seed: Seed of the draws.

    Returns:
        (low, high) by figure; without shot groups that have no images.

    Raises:
        UsageError: If the sizes differ, or a value is out of range.
    """
    counts = report.right_and_images()
    present = counts[1] > 0
    groups = _groups(class_counts, report.rule, len(report.per_class))[:, present]
    right, images = (count[present].numpy() for count in counts)

    def draw(generator: np.random.Generator, size: int) -> Figures:
        drawn = generator.binomial(images, right / images, (size, len(images)))
        return _figures(drawn, images, groups)

    drawn = _bootstrap(draw, len(images), samples, seed).items()
    known = [(name, draws) for name, draws in drawn if getattr(report, name) is not None]
    return {name: _percentiles(draws, level) for name, draws in known}


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
    """Computes how much better classifier a is than b on the same images, with an interval.

    Per class, the images that both, only a, only b and neither get right are resampled together
    (multinomial), so that what makes an image hard for both cancels out. If the interval contains
    0, the two are not distinguishable.

    >>> paired_difference([0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1], [500, 5])
    PairedDifference(difference=0.25, low=0.0, high=0.5)

    Args:
        preds_a: Classes that a predicts, (N,), integers in [0, C).
        preds_b: Classes that b predicts, (N,).
        targets: True classes, (N,).
        class_counts: Training images per class, (C,).
        objective: Figure to compare; see :func:`~timm_lt.metrics.objective_value`.
        rule: Bounds of the shot groups.
        level: As for :func:`confidence_intervals`, like the next two.
        samples: Number of draws.
        seed: Seed of the draws.

    Raises:
        UsageError: If the shapes differ, a value is out of range, or the objective has none.
    """
    field = objective_field(objective)
    a, b = (
        objective_value(shot_accuracy(preds, targets, class_counts, rule), objective)
        for preds in (preds_a, preds_b)
    )
    targets = check_labels(targets)
    right_a, right_b = (check_labels(preds) == targets for preds in (preds_a, preds_b))
    groups = _groups(class_counts, rule)
    # Columns: neither right, only b, only a, both.
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


def _groups(class_counts: ClassCounts, rule: ShotRule, num_classes: int | None = None) -> Tensor:
    """Returns the masks of the shot groups as float64, (3, C)."""
    counts = check_class_counts(class_counts, num_classes)
    return torch.stack(list(shot_groups(counts, rule).values())).double()


def _figures(right: NDArray[np.int64], images: NDArray[np.int64], groups: Tensor) -> Figures:
    counts = torch.from_numpy(images).double()
    return accuracy_figures(torch.from_numpy(right).double(), counts, groups)


def _bootstrap(draw: Draw, width: int, samples: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """Returns the figures of all draws, (samples,), each of ``width`` random numbers."""
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


ShiftDirection = Literal["forward", "uniform", "backward"]

# Imbalance factors of the papers' tables.
SHIFTS = (50, 25, 10, 5, 2)


def shifted_accuracy(
    accuracies: ShotReport | Tensor,
    class_counts: ClassCounts,
    direction: ShiftDirection,
    imbalance_factor: float = 1.0,
) -> float:
    """Computes the expected accuracy on a test set with a long tail of its own.

    With the classes sorted by training images, most frequent first (``i`` = 0, ..., C - 1; ties by
    class), the share of class i is ``p_i ~ r^(-i / (C - 1))``, r being the imbalance factor;
    ``"backward"`` reverses the order. The accuracy is ``sum_c p_c a_c / sum_c p_c`` over the
    classes with a known accuracy ``a_c``: the mean over test sets drawn from this one.

    >>> a = torch.tensor([0.9, 0.6, 0.3])
    >>> [round(shifted_accuracy(a, [500, 50, 5], d, 4), 3) for d in ("forward", "backward")]
    [0.729, 0.471]

    Args:
        accuracies: A report, or the accuracy of each class, (C,); NaN where unknown.
        class_counts: Training images per class, (C,).
        direction: ``"forward"`` has the order of the training set, ``"backward"`` the reverse.
        imbalance_factor: Largest over smallest class of the test set, r >= 1; 1 for uniform.

    Raises:
        UsageError: If a value is out of range, the sizes differ, or no accuracy is known.

    References:
        Hong et al., Disentangling Label Distribution for Long-tailed Visual Recognition, CVPR 2021,
        https://arxiv.org/abs/2012.00321
        Zhang et al., Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed
        Recognition, NeurIPS 2022, https://arxiv.org/abs/2107.09249
    """
    check_choice("direction", direction, get_args(ShiftDirection))
    check_number("imbalance_factor", imbalance_factor, "[1, inf)")
    if direction == "uniform" and imbalance_factor != 1:
        raise UsageError(f"direction 'uniform' needs imbalance_factor 1, got {imbalance_factor}")
    values = accuracies.per_class if isinstance(accuracies, ShotReport) else accuracies
    accuracy = torch.as_tensor(values).detach().double().cpu().numpy()
    counts = check_class_counts(class_counts, accuracy.size).numpy()
    known = ~np.isnan(accuracy)
    wrong = np.flatnonzero((accuracy < 0) | (accuracy > 1))
    if len(wrong) or not known.any():
        found = f"class {wrong[0]} has {accuracy[wrong[0]]}" if len(wrong) else "all are NaN"
        raise UsageError(f"accuracies must be in [0, 1], or NaN for some classes; {found}")
    order = np.argsort(-counts, kind="stable")
    # arange / (C - 1) would be 0 / 0 for one class.
    ranks = np.arange(len(order)) / max(len(order) - 1, 1)
    share = imbalance_factor**-ranks
    if direction == "backward":
        share = share[::-1]
    accuracy, known = accuracy[order], known[order]
    return float((share * accuracy)[known].sum() / share[known].sum())


def shifted_accuracies(
    accuracies: ShotReport | Tensor, class_counts: ClassCounts
) -> dict[str, float]:
    """Returns :func:`shifted_accuracy`, with the same arguments, for the papers' shifts.

    >>> list(shifted_accuracies(torch.tensor([0.9, 0.3]), [500, 5]))
    ['forward_50', 'forward_25', 'forward_10', 'forward_5', 'forward_2', 'uniform',
     'backward_2', 'backward_5', 'backward_10', 'backward_25', 'backward_50']
    """
    shifts: list[tuple[ShiftDirection, int]] = [
        *(("forward", r) for r in SHIFTS),
        ("uniform", 1),
        *(("backward", r) for r in reversed(SHIFTS)),
    ]
    return {
        d if d == "uniform" else f"{d}_{r}": shifted_accuracy(accuracies, class_counts, d, r)
        for d, r in shifts
    }
