"""Curves of many points, as far as a drawing shows them."""

import torch
from torch import Tensor

from timm_lt.report.content import Points

# Points of a drawn curve, and columns within which a step function keeps its extremes.
POINTS, COLUMNS = 240, 400


def thinned(x: Tensor, y: Tensor) -> Points:
    """Returns at most a few hundred of the points of a curve, with both ends."""
    rows = torch.linspace(0, len(x) - 1, min(len(x), POINTS)).round().long()
    return list(zip(x[rows].tolist(), y[rows].tolist(), strict=True))


def drawn_steps(edges: Tensor, values: Tensor, right: float) -> Points:
    """Returns the corners of a step function that a drawing of it needs.

    Of the steps within one of 400 columns it has the first, the lowest, the highest and the last:
    drawn at that width, nothing is lost.

    Args:
        edges: Where the value changes, (K,) ascending from 0.
        values: The value from each edge on, (K,).
        right: Where the drawing ends.

    Returns:
        Points (tau, value), each value held up to the next point, the last at ``right``.
    """
    shown = edges < right
    edges, values = edges[shown], values[shown]
    column = (edges / right * COLUMNS).long()
    points: Points = []
    for start, end in _runs(column):
        part = values[start:end]
        kept = {0, int(part.argmin()), int(part.argmax()), end - start - 1}
        points += [(float(edges[start + k]), float(part[k])) for k in sorted(kept)]
    return [*points, (right, float(values[-1]))]


def _runs(column: Tensor) -> list[tuple[int, int]]:
    """Returns start and end of each stretch of equal values."""
    sizes = column.unique_consecutive(return_counts=True)[1]
    ends = sizes.cumsum(0)
    return list(zip((ends - sizes).tolist(), ends.tolist(), strict=True))
