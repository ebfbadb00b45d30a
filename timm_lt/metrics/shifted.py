"""Accuracy where the test set has another distribution of classes than the one at hand."""

from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_lt.metrics.shot_report import ShotReport
from timm_lt.utils.checks import UsageError, check_choice, check_number
from timm_lt.utils.longtail import ClassCounts, check_class_counts

ShiftDirection = Literal["forward", "uniform", "backward"]

# The imbalance factors of the papers' tables.
SHIFTS = (50, 25, 10, 5, 2)


def shifted_accuracy(
    accuracies: ShotReport | Tensor,
    class_counts: ClassCounts,
    direction: ShiftDirection,
    imbalance_factor: float = 1.0,
) -> float:
    """Computes the accuracy to expect on a test set with a long tail of its own.

    With the classes in the order of their training images, most frequent first (``i`` = 0, ...,
    C - 1; equally frequent ones by class), the share of class i is ``p_i ~ r^(-i / (C - 1))``,
    ``r`` the imbalance factor; backward, the order is reversed. The accuracy is
    ``sum_c p_c a_c / sum_c p_c`` over the classes whose accuracy ``a_c`` is known. This is the
    expectation over test sets that are drawn from the one at hand, whose class sizes the papers
    round to whole images.

    At imbalance factor 1 both directions are uniform: the mean of the per-class accuracies.

    >>> a = torch.tensor([0.9, 0.6, 0.3])
    >>> [round(shifted_accuracy(a, [500, 50, 5], d, 4), 3) for d in ("forward", "backward")]
    [0.729, 0.471]
    >>> round(shifted_accuracy(a, [500, 50, 5], "uniform"), 3)
    0.6

    Args:
        accuracies: A report, or the accuracy of each class, (C,); NaN where it is not known.
        class_counts: Training images per class, (C,).
        direction: ``"forward"`` falls as the training set does, ``"backward"`` rises where that
            falls.
        imbalance_factor: Largest over smallest class of the test set, at least 1; 1 for uniform.

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
        raise UsageError(
            f"a uniform test set has imbalance_factor 1, got {imbalance_factor}; take direction "
            "'forward' or 'backward' for another"
        )
    accuracy, order = _in_order(accuracies, class_counts)
    # arange / (C - 1) would be 0 / 0 for one class.
    ranks = np.arange(len(order)) / max(len(order) - 1, 1)
    share = imbalance_factor**-ranks
    if direction == "backward":
        share = share[::-1]
    accuracy = accuracy[order]
    known = ~np.isnan(accuracy)
    return float((share * accuracy)[known].sum() / share[known].sum())


def _in_order(
    accuracies: ShotReport | Tensor, class_counts: ClassCounts
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns the checked per-class accuracies and the classes, most frequent first."""
    values = accuracies.per_class if isinstance(accuracies, ShotReport) else accuracies
    accuracy = torch.as_tensor(values).detach().double().cpu().numpy()
    counts = check_class_counts(class_counts, accuracy.size).numpy()
    if accuracy.shape != counts.shape:
        raise UsageError(
            f"per-class accuracies {accuracy.shape} and class_counts {counts.shape} must have one "
            "shape, (C,)"
        )
    wrong = np.flatnonzero((accuracy < 0) | (accuracy > 1))
    if len(wrong):
        raise UsageError(f"accuracy of class {wrong[0]} = {accuracy[wrong[0]]} is not in [0, 1]")
    if np.isnan(accuracy).all():
        raise UsageError("no class has a known accuracy: all of them are NaN")
    return accuracy, np.argsort(-counts, kind="stable")


def shifted_accuracies(
    accuracies: ShotReport | Tensor, class_counts: ClassCounts
) -> dict[str, float]:
    """Returns :func:`shifted_accuracy` for the shifts that the papers' tables have.

    >>> list(shifted_accuracies(torch.tensor([0.9, 0.3]), [500, 5]))
    ['forward_50', 'forward_25', 'forward_10', 'forward_5', 'forward_2', 'uniform',
     'backward_2', 'backward_5', 'backward_10', 'backward_25', 'backward_50']

    Args:
        accuracies: A report, or the accuracy of each class, (C,); NaN where it is not known.
        class_counts: Training images per class, (C,).

    Returns:
        The accuracy by direction and imbalance factor, from training-like to reversed.

    Raises:
        UsageError: If the sizes differ, or no accuracy is known.
    """
    forward = {
        f"forward_{r}": shifted_accuracy(accuracies, class_counts, "forward", r) for r in SHIFTS
    }
    uniform = {"uniform": shifted_accuracy(accuracies, class_counts, "uniform")}
    backward = {
        f"backward_{r}": shifted_accuracy(accuracies, class_counts, "backward", r)
        for r in reversed(SHIFTS)
    }
    return forward | uniform | backward
