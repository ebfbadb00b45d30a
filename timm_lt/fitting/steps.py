"""Step functions of tau: what an objective is between any two taus at which an image changes.

An image that is right on ``[low, high]`` adds its weight there, so an objective that is a weighted
mean over images changes at 2 N taus at most, and sorting gives it everywhere.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from timm_lt.metrics import Objective
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import class_counts

# Entries of the (edges, C) matrices from which the worst class is taken at a time.
ENTRIES = 2**22


def weighted_steps(low: Tensor, high: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where a weighted mean changes, (K,) ascending from 0, and its value after each.

    Args:
        low: First tau at which each image is right, (N,) float64.
        high: Last such tau, (N,).
        weights: Weight of each image in the mean, (N,) >= 0.
    """
    total = weights.double().sum()
    low, high, weights = _real(low, high, weights.double())
    edges = _edges(low, high)
    # An image counts from its low edge on, up to and including its high edge.
    started = _sum_up_to(low, weights, edges)
    ended = _sum_up_to(high, weights, edges)
    return edges, (started - ended) / total


def _real(low: Tensor, high: Tensor, extra: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves out images that are right at no tau >= 0."""
    kept = (low <= high) & (high >= 0)
    return low[kept].clamp_min(0), high[kept], extra[kept]


def _edges(low: Tensor, high: Tensor) -> Tensor:
    taus = torch.cat([torch.zeros(1, dtype=low.dtype), low, high[high.isfinite()]])
    edges: Tensor = taus.unique()
    return edges


def _sum_up_to(points: Tensor, weights: Tensor, edges: Tensor) -> Tensor:
    """Returns the weight of the points up to each edge."""
    points, order = points.sort()
    sums = torch.cat([weights.new_zeros(1), weights[order].cumsum(0)])
    up_to: Tensor = sums[torch.searchsorted(points, edges, right=True)]
    return up_to


def objective_steps(
    low: Tensor,
    high: Tensor,
    objective: Objective,
    *,
    targets: Tensor | None,
    shots: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Returns where an objective may change, (K,) ascending from 0, and its value after each.

    Args:
        low: First tau at which each image is right, (N,) float64.
        high: Last such tau, (N,).
        objective: As of :func:`timm_lt.fit_head`.
        targets: Class of each image, (N,), if known.
        shots: Whether each class belongs to a shot group, (C,) by group, if known.

    Raises:
        UsageError: If the classes or shot groups that the objective needs are not known, or the
            split has no image of the group.
    """
    if objective == "all":
        return weighted_steps(low, high, torch.ones(len(low)))
    if targets is None:
        raise UsageError(f"objective {objective!r} needs a curve that knows its targets")
    if objective == "worst_class":
        return _worst_class(low, high, targets)
    weights = class_counts(targets).double().reciprocal()[targets]
    if objective == "class_mean":
        return weighted_steps(low, high, weights)
    if not shots:
        raise UsageError(f"objective {objective!r} needs class_counts= for the shot groups")
    groups = {}
    for name, members in shots.items():
        rows = members[targets]
        if rows.any():
            groups[name] = weighted_steps(low[rows], high[rows], weights[rows])
    if objective == "harmonic_mean":
        return _harmonic_mean(list(groups.values()))
    if objective not in groups:
        raise UsageError(
            f"the split has no image of a few-shot class: take another objective than {objective!r}"
        )
    return groups[objective]


def on_common_edges(steps: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Returns the edges of all of some step functions, and the values of each after them."""
    edges = torch.cat([edges for edges, _ in steps]).unique()
    values = [
        values[torch.searchsorted(own_edges, edges, right=True) - 1] for own_edges, values in steps
    ]
    return edges, values


def _harmonic_mean(steps: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Returns the harmonic mean of step functions, 0 where one of them is 0."""
    edges, values = on_common_edges(steps)
    inverse = torch.stack(values).clamp_min(0).reciprocal().mean(0)
    return edges, inverse.reciprocal()


def _worst_class(low: Tensor, high: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the least accuracy of a class that has images."""
    counts = class_counts(targets)
    present = counts.nonzero().flatten()
    column = torch.zeros_like(counts)
    column[present] = torch.arange(len(present))
    low, high, columns = _real(low, high, column[targets])
    edges = _edges(low, high)
    values = [
        (right / counts[present]).amin(1)
        for right in _right_per_class(low, high, columns, edges, len(present))
    ]
    return edges, torch.cat(values)


def _right_per_class(
    low: Tensor, high: Tensor, columns: Tensor, edges: Tensor, num_classes: int
) -> Iterator[Tensor]:
    """Yields how many images of each class are right after each edge, some edges at a time."""
    finite = high.isfinite()
    taus = torch.cat([low, high[finite]])
    classes = torch.cat([columns, columns[finite]])
    changes = torch.cat([torch.ones(len(low)), -torch.ones(int(finite.sum()))]).double()
    place = torch.searchsorted(edges, taus)
    place, order = place.sort()
    right = torch.zeros(num_classes, dtype=torch.float64)
    step = max(ENTRIES // num_classes, 1)
    for start in range(0, len(edges), step):
        rows = min(step, len(edges) - start)
        first, last = torch.searchsorted(place, torch.tensor([start, start + rows])).tolist()
        chosen = order[first:last]
        part = torch.zeros(rows, num_classes, dtype=torch.float64)
        part.index_put_((place[first:last] - start, classes[chosen]), changes[chosen], True)
        part[0] += right
        part = part.cumsum(0)
        right = part[-1]
        yield part
