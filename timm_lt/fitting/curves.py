"""Accuracy as an exact function of tau, for tau-normalisation and logit adjustment.

Each image is right for one interval of tau, which is found from one pass over its logits. At any
tau the label t of a row beats class c where ``tau·rise_c >= lead_c``:

- Logit adjustment, ``z_c − tau·log prior_c``: lead is ``z_c − z_t``, rise is ``log prior_c −
  log prior_t``.
- Tau-normalisation, ``z_c / ‖w_c‖^tau``, with ``z_t > 0``: the logarithm of a positive logit is the
  line ``log z_c − tau·log‖w_c‖``, so lead is ``log(z_c / z_t)`` and rise is ``log‖w_c‖ −
  log‖w_t‖``. A logit that is not positive never wins: its lead is −∞.
- Tau-normalisation with ``z_t < 0``: a class with ``z_c >= 0`` wins at every tau, its lead is ∞.
  Of negative logits the one of least magnitude wins: lead and rise change their signs.
- Tau-normalisation with ``z_t = 0``, which no tau changes: a positive logit always wins, a negative
  one never; lead is the sign of ``z_c``, rise is 0.

So each class gives one bound: a heavier one (``rise > 0``) restricts tau to ``>= lead / rise``, a
lighter one (``rise < 0``) to ``<= lead / rise``, one of equal weight allows every tau or none. The
label wins on the interval from the highest lower to the lowest upper bound. A lighter class of
greater lead leaves no ``tau >= 0``: such rows are dropped before a logarithm is taken.

An objective that is a weighted mean over images changes at 2 N taus at most, the ends of these
intervals, and sorting them gives the objective everywhere.
"""

import functools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.features import Features, check_features
from timm_lt.heads import (
    Head,
    LinearHead,
    LogitAdjustedHead,
    TauNormHead,
    as_joint,
    log_prior,
    nonzero_norm,
)
from timm_lt.metrics import Objective
from timm_lt.utils.checks import UsageError, check_choice
from timm_lt.utils.longtail import (
    ClassCounts,
    ShotRule,
    check_class_counts,
    check_labels,
    class_counts,
    shot_groups,
)

# Entries of the logits that one product gives; with few rows a product is slow.
BLOCK, BLOCK_ROWS = 2**21, 128
# Entries of the logits that are judged at a time, in a few matrices of this size.
PART = 2**18
# Ratios of logits below this count as not positive, and as this, since the logarithm of zero and
# less is slow. It is the smallest difference between lines, too.
SMALLEST, LOG_SMALLEST = 1e-35, -80.0


class IntervalFinder:
    """Finds the taus at which labels win; slopes (C,) float64 are ``log‖w_c‖`` or ``log prior_c``.

    All is computed in the type of the logits: a bound is right up to a few of their roundings, and
    exactly right at ``tau = 0``.
    """

    def __init__(self, slopes: Tensor, *, logarithmic: bool, dtype: torch.dtype) -> None:
        self.slopes, self.logarithmic = slopes, logarithmic
        self.classes = torch.arange(len(slopes)).to(dtype)
        # They differ where slopes do; float32 counts exactly up to 16 million.
        self.ranks = slopes.unique(return_inverse=True)[1].to(dtype)
        # By this share of its lead a class that wins ties lies higher: it exceeds the rounding of
        # the bounds, and no order at tau = 0 depends on it.
        self.tie = 4 * torch.finfo(dtype).eps
        self.largest = torch.finfo(dtype).max
        self.max_rows = max(PART // len(slopes), 1)
        # Fresh memory for each step would take longer than the step.
        self.work = torch.empty(4, self.max_rows, len(slopes), dtype=dtype)

    def __call__(self, blocks: Iterator[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the first and last tau >= 0 at which each label (N,) wins, else inf and -inf."""
        low, high = torch.full((2, len(targets)), math.inf, dtype=torch.float64)
        high.neg_()
        start = 0
        for block in blocks:
            for logits in block.split(self.max_rows):
                labels = targets[start : start + len(logits)]
                alive = (~self._hopeless(logits, labels)).nonzero().flatten()
                rows = start + alive
                found = self._bounds(logits, labels[alive], alive)
                low[rows], high[rows] = (bound.double() for bound in found)
                start += len(logits)
        return low, high

    def _hopeless(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns which labels (B,) surely win at no tau >= 0, from comparisons alone."""
        column = targets[:, None]
        own = logits.gather(1, column)
        above, lighter = self.work[:2, : len(logits)]
        torch.sub(logits, own, out=above)
        torch.sub(self.ranks[column], self.ranks, out=lighter)
        # The smaller of the two is positive where both are: a lighter class lies higher.
        beaten = torch.minimum(above, lighter, out=lighter).amax(1) > 0
        if not self.logarithmic:
            return beaten
        return torch.where(own[:, 0] > 0, beaten, logits.amax(1) > 0)

    def _bounds(self, logits: Tensor, targets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the interval of the labels (B,) of some rows of the logits."""
        lead, rise, heavier, lighter = self.work[:, : len(rows)]
        torch.index_select(logits, 0, rows, out=lead)
        column = targets[:, None]
        own = lead.gather(1, column)
        # The difference in float64, or norms that are almost equal would count as equal.
        torch.sub(self.slopes, self.slopes[column], out=rise)
        if self.logarithmic:
            _log_ratios(lead, rise, own)
        else:
            lead -= own
        # Classes before the label win ties, those after it lose them.
        before = torch.sub(column.to(lead.dtype), self.classes, out=heavier).clamp_(-1, 1)
        size = torch.abs(lead, out=lighter).clamp_(max=self.largest)
        lead += size.mul_(self.tie).add_(SMALLEST).mul_(before)
        # The label itself sets no bound.
        lead.scatter_(1, column, -1.0)
        torch.clamp(rise, min=0, out=heavier)
        torch.sub(heavier, rise, out=lighter)
        # Divided by the 0 of a class that is not heavier, a lead below 0 gives -inf, no bound, and
        # one above 0 inf, no tau at all.
        low = torch.div(lead, heavier, out=heavier).amax(1).clamp_min_(0)
        # A class that is not lighter gives -inf, no bound.
        high = -torch.div(lead.clamp_max_(-SMALLEST), lighter, out=lighter).amax(1)
        return low, high.masked_fill_(low == math.inf, -math.inf)


def _log_ratios(logits: Tensor, rise: Tensor, own: Tensor) -> None:
    """Turns logits (B, C) into their leads over the label's, in place, and rises with them."""
    sign = own.sign()
    zero = (own[:, 0] == 0).nonzero().flatten()
    signs = logits[zero].sign()
    # Not by 0: the logarithms of what comes out are slow.
    logits.div_(own.masked_fill(own == 0, 1)).clamp_min_(SMALLEST).log_()
    F.threshold(logits, LOG_SMALLEST, -math.inf, inplace=True)
    if (sign != 1).any():
        logits.mul_(sign)
        # Adding 0 turns -0 into 0, which division tells apart.
        rise.mul_(sign).add_(0.0)
    logits[zero] = signs


def logit_blocks(values: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
    """Yields the logits of features (N, D), some rows at a time, in the type of the weight."""
    step = max(BLOCK // max(weight.shape), BLOCK_ROWS)
    for block in values.split(step):
        yield F.linear(block.detach().to("cpu", weight.dtype), weight, bias)


# A step function of tau: where it changes, (K,) ascending from 0, and its value after each.
Steps = tuple[Tensor, Tensor]


def weighted_steps(low: Tensor, high: Tensor, weights: Tensor) -> Steps:
    """Returns the weighted mean of the images, each of which is right from low to high, (N,)."""
    total = weights.double().sum()
    # Drop images that are right at no tau >= 0.
    kept = (low <= high) & (high >= 0)
    low, high, weights = low[kept].clamp_min(0), high[kept], weights.double()[kept]
    edges = torch.cat([low.new_zeros(1), low, high[high.isfinite()]]).unique()

    def up_to(points: Tensor) -> Tensor:
        """Returns the weight of the points up to each edge."""
        points, order = points.sort()
        sums = torch.cat([weights.new_zeros(1), weights[order].cumsum(0)])
        return sums[torch.searchsorted(points, edges, right=True)]

    # An image counts from its low edge on, up to and including its high edge.
    return edges, (up_to(low) - up_to(high)) / total


def on_common_edges(functions: Collection[Steps]) -> tuple[Tensor, Iterator[Tensor]]:
    """Returns the edges of several step functions, and yields the values of each after them."""
    edges = torch.cat([own for own, _ in functions]).unique()
    return edges, (
        values[torch.searchsorted(own, edges, right=True) - 1] for own, values in functions
    )


Adjustment = Literal["norm", "prior"]
# Beyond it, powers of small norms leave float32; the taus of the papers lie below 2.
LARGEST_TAU = 10.0


@dataclass(frozen=True, eq=False)
class AccuracyCurve:
    """Accuracy as a step function of tau >= 0.

    An image is right for the taus of one interval ``[low, high]``, which is empty if low > high.
    Where an end is a tie that the image loses, the end lies a rounding further inside.

    Args:
        low: First tau at which each image is right, (N,) float64.
        high: Last such tau, (N,) float64; may be infinite.
        groups: The curve of each shot group, if known; None for a group without images.
        targets: Class of each image, (N,), if known.
        shots: Whether each class belongs to a shot group, (C,) bool by group, if known.

    >>> curve = AccuracyCurve(torch.tensor([0.0, 0.5]), torch.tensor([1.0, torch.inf]))
    >>> curve(0.0), curve(0.7), curve(2.0), curve.best_tau
    (0.5, 1.0, 0.5, 0.75)
    """

    low: Tensor
    high: Tensor
    groups: Mapping[str, "AccuracyCurve | None"] = field(default_factory=dict)
    targets: Tensor | None = None
    shots: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, tau: float, *, objective: Objective = "all") -> float:
        """Returns an objective at a tau >= 0."""
        right = (self.low <= tau) & (tau <= self.high)
        # The images that are right there, as if they were right at every tau.
        low, high = torch.where(right, 0.0, torch.inf), torch.where(right, torch.inf, -torch.inf)
        return float(replace(self, low=low, high=high).steps(objective)[1][0])

    def steps(self, objective: Objective = "all") -> Steps:
        """Returns where an objective changes, (K,) ascending from 0, and its value after each."""
        if objective == "all":
            return self._mean(slice(None), torch.ones(len(self.low)))
        if self.targets is None or not (self.shots or objective in ("class_mean", "worst_class")):
            missing = "targets" if self.targets is None else "class_counts= for the shot groups"
            raise UsageError(f"objective {objective!r} needs a curve with {missing}")
        counts = class_counts(self.targets)
        weights = counts.double().reciprocal()[self.targets]
        if objective == "class_mean":
            return self._mean(slice(None), weights)
        if objective == "worst_class":
            by_class = self.targets.argsort(stable=True).split(counts.tolist())
            ones = torch.ones_like(weights)
            recalls = [self._mean(rows, ones) for rows in by_class if len(rows)]
            edges, values = on_common_edges(recalls)
            return edges, functools.reduce(torch.minimum, values)
        members = {name: mask[self.targets] for name, mask in self.shots.items()}
        groups = {name: self._mean(rows, weights) for name, rows in members.items() if rows.any()}
        if objective == "harmonic_mean":
            edges, means = on_common_edges(groups.values())
            # 0 where one of them is 0.
            inverse = torch.stack([*means]).clamp_min(0).reciprocal().mean(0)
            return edges, inverse.reciprocal()
        if objective not in groups:
            raise UsageError(
                f"the split has no image for the objective {objective!r}; choose another"
            )
        return groups[objective]

    def _mean(self, rows: Tensor | slice, weights: Tensor) -> Steps:
        """Returns the weighted mean over some images as a step function."""
        return weighted_steps(self.low[rows], self.high[rows], weights[rows])

    @property
    def best_tau(self) -> float:
        """The middle of the widest stretch of taus up to 10 with the highest accuracy."""
        return self.maximise("all")[0]

    def maximise(self, objective: Objective = "all") -> tuple[float, float]:
        """Returns the best tau for an objective, and the objective's value there.

        Where it is highest on several stretches of tau, as an objective that is often 0 may be, the
        mean over the classes decides; then the width of the stretch.

        Args:
            objective: An objective of :func:`timm_lt.fit_head`.

        Raises:
            UsageError: If the curve lacks the class counts, or the split an image, of a shot group.
        """
        edges, values = self.steps(objective)
        order = [values]
        if objective != "all":
            edges, both = on_common_edges([(edges, values), self.steps("class_mean")])
            order = [*both]
        # In the middle of a stretch, cut after one unit, rounding tips no image over the edge.
        ends = torch.cat([edges[1:], edges[-1:] + 1]).minimum(edges + 1)
        near = edges < LARGEST_TAU
        edges, ends, order = edges[near], ends[near], [values[near] for values in order]
        best_so_far = torch.ones(len(edges), dtype=torch.bool)
        for values in order:
            # Sums in another order may differ by a rounding.
            best_so_far &= values >= values[best_so_far].max() - 1e-12
        width = torch.where(best_so_far, ends - edges, -1.0)
        best = int(width.argmax())
        return float((edges[best] + ends[best]) / 2), float(order[0][best])


def tau_curve(
    classifier: nn.Module,
    features: Features,
    *,
    adjust: Adjustment = "norm",
    class_counts: ClassCounts | None = None,
    group: Literal["many_shot", "medium_shot", "few_shot"] | None = None,
    rule: ShotRule = "fb",
) -> AccuracyCurve:
    """Computes the accuracy of tau-normalisation or logit adjustment at every tau >= 0 at once.

    With ``adjust="norm"`` the logit of class c is ``w_c·x / ‖w_c‖^tau``, without bias; with
    ``adjust="prior"`` it is ``w_c·x + b_c − tau·log prior_c``. It takes one product of features,
    read in blocks, and weight. The curve is exact up to the rounding of the logits, which are at
    least float32.

    Args:
        classifier: The joint classifier (C, D), from ``model.get_classifier()``.
        features: Validation features, values (N, D).
        adjust: ``"norm"`` or ``"prior"``.
        class_counts: Training images per class (C,); for ``"prior"`` and for the shot groups.
        group: Returns the curve of one shot group, in which each image counts the same. None
            returns that of all images, with those of the groups if there are class counts.
        rule: Bounds of the shot groups.

    Raises:
        UsageError: If shapes do not match, class counts are missing, the group has no images, or
            the classifier is a head other than ``linear`` or not finite.

    References:
        Kang et al., ICLR 2020, equation 3; Menon et al., ICLR 2021, equation 9.
    """
    check_choice("adjust", adjust, get_args(Adjustment))
    classifier = joint_classifier(classifier)
    num_classes = classifier.out_features
    check_fits(features, "features", num_classes, classifier.in_features)
    if class_counts is None and (adjust == "prior" or group is not None):
        raise UsageError("tau_curve needs class_counts= for adjust='prior' and for group=")
    counts = None if class_counts is None else check_class_counts(class_counts, num_classes)
    # The type of the wider of classifier and features.
    dtype = torch.promote_types(features.values.dtype, classifier.weight.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    weight = classifier.weight.detach().to("cpu", dtype)
    bias: Tensor | None = None
    bad = (~weight.sum(1).isfinite()).nonzero().flatten().tolist()
    if bad:
        raise UsageError(f"the classifier's weight of class {bad[0]} is not finite")
    if adjust == "norm":
        slopes = nonzero_norm(weight).flatten().double().log()
    else:
        assert counts is not None
        bias = None if classifier.bias is None else classifier.bias.detach().to("cpu", dtype)
        slopes = log_prior(counts, num_classes).double()
    find = IntervalFinder(slopes, logarithmic=adjust == "norm", dtype=dtype)
    targets = features.targets.cpu()
    low, high = find(logit_blocks(features.values, weight, bias), targets)
    shots = {} if counts is None else shot_groups(counts, rule)
    groups: dict[str, AccuracyCurve | None] = {}
    for name, members in shots.items():
        rows = members[targets]
        part = AccuracyCurve(low[rows], high[rows], targets=targets[rows])
        groups[name] = part if rows.any() else None
    if group is None:
        return AccuracyCurve(low, high, groups, targets, shots)
    present = {name: curve for name, curve in groups.items() if curve is not None}
    check_choice("group with images:", group, tuple(present))
    return replace(present[group], shots=shots)


def joint_classifier(classifier: nn.Module) -> nn.Linear:
    """Returns a joint classifier as ``nn.Linear``; another head computes with another weight."""
    linear = as_joint(classifier)
    if isinstance(linear, Head) and not isinstance(linear, LinearHead):
        raise UsageError(
            f"classifier= takes the joint classifier, got a {linear.kind!r} head; pass an "
            "nn.Linear, e.g. what the head's fold() returns"
        )
    return linear


def check_fits(features: Features, noun: str, num_classes: int | None, width: int | None) -> None:
    """Checks features against the number of classes and the width of the classifier."""
    check_features(features, noun)
    check_labels(features.targets, num_classes, noun=f"targets of {noun}")
    if width is not None and features.num_features != width:
        raise UsageError(f"{noun} has {features.num_features} features per row; expected {width}")


def head_curves(
    classifier: nn.Linear,
    heads: Mapping[str, Head],
    val: Features,
    counts: Tensor,
    rule: ShotRule = "fb",
) -> dict[str, tuple[AccuracyCurve, float]]:
    """Returns the curve on validation, and the chosen tau, of each head with a tau."""
    curves = {}
    for name, head in heads.items():
        adjust: Adjustment = "prior" if isinstance(head, LogitAdjustedHead) else "norm"
        if adjust == "prior" or (isinstance(head, TauNormHead) and not head.keep_bias):
            curve = tau_curve(classifier, val, adjust=adjust, class_counts=counts, rule=rule)
            curves[name] = curve, float(head.tau)  # type: ignore[arg-type]
    return curves
