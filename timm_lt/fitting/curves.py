"""Accuracy as an exact function of tau, for tau-normalisation and logit adjustment."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from timm_lt.features import Features, check_features
from timm_lt.fitting.intervals import IntervalFinder, logit_blocks, winning_intervals
from timm_lt.fitting.steps import objective_steps, on_common_edges
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
    shot_groups,
)

Adjustment = Literal["norm", "prior"]
# Beyond it, powers of small norms leave float32; the taus of the papers lie below 2.
LARGEST_TAU = 10.0


@dataclass(frozen=True, eq=False)
class AccuracyCurve:
    """Accuracy as a step function of tau >= 0.

    An image is right for the taus of one interval ``[low, high]``; it is empty if low > high. Where
    an end is a tie that the image loses, the end lies a rounding further inside.

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
        """Returns the accuracy at one tau, or what another objective is there.

        Args:
            tau: The tau, >= 0.
            objective: As of :meth:`maximise`.

        Raises:
            UsageError: As :meth:`maximise`.
        """
        right = (self.low <= tau) & (tau <= self.high)
        # The images that are right there, as if they were right at every tau.
        low, high = torch.where(right, 0.0, torch.inf), torch.where(right, torch.inf, -torch.inf)
        _, values = objective_steps(low, high, objective, targets=self.targets, shots=self.shots)
        return float(values[0])

    def steps(self, objective: Objective = "all") -> tuple[Tensor, Tensor]:
        """Returns where an objective changes, (K,) ascending from 0, and its value after each.

        Args:
            objective: As of :meth:`maximise`.

        Raises:
            UsageError: As :meth:`maximise`.
        """
        return objective_steps(
            self.low, self.high, objective, targets=self.targets, shots=self.shots
        )

    @property
    def best_tau(self) -> float:
        """The middle of the widest stretch of taus up to 10 with the highest accuracy.

        In the middle, rounding cannot tip an image over the edge. A stretch of more than one unit,
        which may go on for ever, is cut there: the least of the taus that do the same will do.
        """
        return self.maximise("all")[0]

    def maximise(self, objective: Objective = "all") -> tuple[float, float]:
        """Returns the best tau for an objective, and the objective's value there.

        Where it is highest on several stretches of tau, as an objective that is often 0 may be, the
        mean over the classes decides; then the width of the stretch.

        Args:
            objective: As of :func:`timm_lt.fit_head`.

        Raises:
            UsageError: If the curve was made without the class counts that the objective needs, or
                the split has no image of the shot group.
        """
        edges, values = self.steps(objective)
        order = [values]
        if objective != "all":
            edges, order = on_common_edges([(edges, values), self.steps("class_mean")])
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
    ``adjust="prior"`` it is ``w_c·x + b_c − tau·log prior_c``. Either way the label of an image
    wins on one interval of tau, which :mod:`timm_lt.fitting.intervals` finds from one product of
    features and weight. The ends are exact up to the rounding of the logits, which have the
    type that a head's have, float32 at least. Features may lie in a mapped file: they are
    read block by block.

    Args:
        classifier: The joint classifier (C, D), as ``model.get_classifier()`` gives it.
        features: Features to be right on, values (N, D).
        adjust: ``"norm"`` or ``"prior"``.
        class_counts: Training images per class (C,); for ``"prior"`` and for the shot groups.
        group: Take the images of this shot group only; each image counts the same. Without it the
            curve of every group is in ``groups``, if there are class counts.
        rule: Where the shot groups have their boundaries.

    Raises:
        UsageError: If shapes do not match, class counts are missing, the group has no images, or
            the classifier is a head other than ``linear`` or not finite.

    References:
        Kang et al., ICLR 2020, equation 3; Menon et al., ICLR 2021, equation 9.
    """
    check_choice("adjust", adjust, get_args(Adjustment))
    classifier = as_joint(classifier)
    check_joint(classifier)
    num_classes = classifier.out_features
    check_fits(features, "features", num_classes, classifier)
    if class_counts is None and (adjust == "prior" or group is not None):
        raise UsageError("tau_curve needs class_counts= for adjust='prior' and for group=")
    counts = None if class_counts is None else check_class_counts(class_counts, num_classes)
    if counts is not None and len(counts) != num_classes:
        raise UsageError(f"class_counts has {len(counts)} classes, the classifier {num_classes}")
    targets = features.targets.cpu()
    shots = {} if counts is None else shot_groups(counts, rule)
    members = {name: mask[targets].nonzero().flatten() for name, mask in shots.items()}
    rows = None
    if group is not None:
        check_choice("group", group, tuple(members))
        rows, members = members[group], {}
        if not len(rows):
            raise UsageError(f"no image belongs to the group {group!r}")
        targets = targets[rows]
    weight, bias = _weights(classifier, features)
    if adjust == "norm":
        bias, slopes = None, nonzero_norm(weight).flatten().double().log()
    else:
        assert counts is not None
        slopes = log_prior(counts, num_classes).double()
    blocks = logit_blocks(features.values, weight, bias, rows)
    find = IntervalFinder(slopes, logarithmic=adjust == "norm", dtype=weight.dtype)
    low, high = winning_intervals(blocks, targets, find)
    groups = {
        name: AccuracyCurve(low[rows], high[rows], targets=targets[rows]) if len(rows) else None
        for name, rows in members.items()
    }
    return AccuracyCurve(low, high, groups, targets, shots)


def _weights(classifier: nn.Linear, features: Features) -> tuple[Tensor, Tensor | None]:
    """Returns weight and bias on the CPU in the type of the wider of classifier and features."""
    dtype = torch.promote_types(features.values.dtype, classifier.weight.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    weight = classifier.weight.detach().to("cpu", dtype)
    bias = None if classifier.bias is None else classifier.bias.detach().to("cpu", dtype)
    bad = (~weight.sum(1).isfinite()).nonzero().flatten().tolist()
    if bad:
        raise UsageError(f"the classifier's weight of class {bad[0]} is not finite")
    return weight, bias


def check_joint(classifier: nn.Linear) -> None:
    """Checks that a classifier is a joint one: no head whose weight is not what it computes with.

    Raises:
        UsageError: If it is a head other than ``linear``.
    """
    if isinstance(classifier, Head) and not isinstance(classifier, LinearHead):
        raise UsageError(
            f"classifier= takes the joint classifier, got a {classifier.kind!r} head; pass an "
            "nn.Linear, e.g. what the head's fold() returns"
        )


def check_fits(
    features: Features, noun: str, num_classes: int, classifier: nn.Linear | None
) -> None:
    """Checks features against the number of classes and the classifier that will take them.

    Raises:
        UsageError: If they are not ``Features``, a target is out of range, or the widths differ.
    """
    check_features(features, noun)
    check_labels(features.targets, num_classes, noun=f"targets of {noun}")
    if classifier is not None and classifier.in_features != features.num_features:
        raise UsageError(
            f"{noun} has {features.num_features} features per row, the classifier takes "
            f"{classifier.in_features}"
        )


def head_curves(
    classifier: nn.Linear,
    heads: Mapping[str, Head],
    val: Features,
    counts: Tensor,
    rule: ShotRule = "fb",
) -> dict[str, tuple[AccuracyCurve, float]]:
    """Returns accuracy against tau, with the chosen tau, for each head that has one.

    Each curve has those of the shot groups.

    Args:
        classifier: The joint classifier, (C, D).
        heads: Fitted heads by name.
        val: Features to be right on, values (N, D).
        counts: Training images per class, (C,).
        rule: Where the shot groups have their boundaries.
    """
    curves = {}
    for name, head in heads.items():
        if isinstance(head, TauNormHead) and not head.keep_bias:
            curve = tau_curve(classifier, val, class_counts=counts, rule=rule)
            curves[name] = curve, head.tau
        elif isinstance(head, LogitAdjustedHead):
            curve = tau_curve(classifier, val, adjust="prior", class_counts=counts, rule=rule)
            curves[name] = curve, head.tau
    return curves
