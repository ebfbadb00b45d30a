"""Accuracy as an exact function of tau, for tau-normalisation and logit adjustment."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from timm_lt.features import Features
from timm_lt.heads import Head, LinearHead, LogitAdjustedHead, TauNormHead, as_joint, log_prior
from timm_lt.longtail import ShotRule, check_labels, shot_groups
from timm_lt.registry import UsageError, check_choice

Adjustment = Literal["norm", "prior"]
# Entries of a (rows, C) matrix per step, which holds about ten of them in float64.
CHUNK = 2**21
# Beyond it, powers of small norms leave float32; the taus of the papers lie below 2.
LARGEST_TAU = 10.0
# Stands for a logit of 0 where a logarithm is taken.
SMALLEST = 1e-300


@dataclass(frozen=True, eq=False)
class AccuracyCurve:
    """Accuracy as a step function of tau >= 0.

    An image is right for the taus of one interval ``[low, high]``; it is empty if low > high. Where
    an end is a tie that the image loses, the end is the next number inside.

    Args:
        low: First tau at which each image is right, (N,) float64.
        high: Last such tau, (N,) float64; may be infinite.

    >>> curve = AccuracyCurve(torch.tensor([0.0, 0.5]), torch.tensor([1.0, math.inf]))
    >>> curve(0.0), curve(0.7), curve(2.0), curve.best_tau
    (0.5, 1.0, 0.5, 0.75)
    """

    low: Tensor
    high: Tensor

    def __call__(self, tau: float) -> float:
        """Returns the accuracy at one tau."""
        return float(((self.low <= tau) & (tau <= self.high)).double().mean())

    def steps(self) -> tuple[Tensor, Tensor]:
        """Returns where the accuracy changes, (K,) ascending from 0, and its value after each."""
        real = self.low <= self.high
        low, high = self.low[real].clamp_min(0), self.high[real]
        low, high = low[high >= 0], high[high >= 0]
        edges = torch.cat([torch.zeros(1, dtype=low.dtype), low, high[high.isfinite()]]).unique()
        # An image counts from its low edge on, up to and including its high edge.
        started = torch.searchsorted(low.sort().values, edges, right=True)
        ended = torch.searchsorted(high.sort().values, edges, right=True)
        return edges, (started - ended).double() / len(self.low)

    @property
    def best_tau(self) -> float:
        """The middle of the widest stretch of taus up to 10 with the highest accuracy.

        In the middle, rounding cannot tip an image over the edge. A stretch of more than one unit,
        which may go on for ever, is cut there: the least of the taus that do the same will do.
        """
        edges, accuracy = self.steps()
        ends = torch.cat([edges[1:], edges[-1:] + 1]).minimum(edges + 1)
        near = edges < LARGEST_TAU
        edges, accuracy, ends = edges[near], accuracy[near], ends[near]
        width = torch.where(accuracy == accuracy.max(), ends - edges, -1.0)
        best = int(width.argmax())
        return float((edges[best] + ends[best]) / 2)


def tau_curve(
    classifier: nn.Module,
    features: Features,
    *,
    adjust: Adjustment = "norm",
    class_counts: Tensor | None = None,
    group: Literal["many_shot", "medium_shot", "few_shot"] | None = None,
    rule: ShotRule = "fb",
) -> AccuracyCurve:
    """Computes the accuracy of tau-normalisation or logit adjustment at every tau >= 0 at once.

    With ``adjust="norm"`` the logit of class c is ``w_c·x / ‖w_c‖^tau``, without bias. Where it is
    positive its logarithm ``log(w_c·x) − tau·log‖w_c‖`` is a line in tau; with ``adjust="prior"``
    the logit ``w_c·x + b_c − tau·log prior_c`` is one itself. The label wins on the interval of tau
    in which its line is the highest.

    Args:
        classifier: The joint classifier (C, D), as ``model.get_classifier()`` gives it.
        features: Features to be right on, values (N, D).
        adjust: ``"norm"`` or ``"prior"``.
        class_counts: Training images per class (C,); for ``"prior"`` and for ``group``.
        group: Take the images of this shot group only; each image counts the same.
        rule: Where the shot groups have their boundaries.

    Raises:
        UsageError: If shapes do not match, class counts are missing, the group has no images, or
            the classifier is a head other than ``linear``.

    References:
        Kang et al., ICLR 2020, equation 3; Menon et al., ICLR 2021, equation 9.
    """
    check_choice("adjust", adjust, get_args(Adjustment))
    classifier = as_joint(classifier)
    check_joint(classifier)
    check_fits(features, "features", classifier.out_features, classifier)
    if class_counts is None and (adjust == "prior" or group is not None):
        raise UsageError("tau_curve needs class_counts= for adjust='prior' and for group=")
    if class_counts is not None and len(class_counts) != classifier.out_features:
        raise UsageError(
            f"class_counts has {len(class_counts)} classes, the classifier "
            f"{classifier.out_features}"
        )
    if group is not None:
        assert class_counts is not None
        groups = shot_groups(class_counts, rule)
        check_choice("group", group, tuple(groups))
        rows = groups[group][features.targets.cpu()].to(features.values.device)
        if not rows.any():
            raise UsageError(f"no image belongs to the group {group!r}")
        features = Features(features.values[rows], features.targets[rows])
    weight = classifier.weight.detach().double().cpu()
    bias = None if classifier.bias is None else classifier.bias.detach().double().cpu()
    if adjust == "prior":
        assert class_counts is not None
        slopes = log_prior(class_counts, len(weight)).double()
    else:
        slopes = torch.linalg.vector_norm(weight, dim=1).clamp_min(1e-12).log()
    lows, highs = [], []
    rows_per_step = max(CHUNK // len(weight), 1)
    for start in range(0, len(features), rows_per_step):
        rows_now = slice(start, start + rows_per_step)
        logits = features.values[rows_now].detach().cpu().double() @ weight.T
        if adjust == "prior":
            scores = logits if bias is None else logits + bias
            lines = scores, slopes.expand_as(scores)
        else:
            lines = _log_lines(logits, slopes)
        low, high = _winning_interval(*lines, features.targets[rows_now].cpu())
        lows.append(low)
        highs.append(high)
    return AccuracyCurve(torch.cat(lows), torch.cat(highs))


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
        UsageError: If a target is out of range, or the widths differ.
    """
    check_labels(features.targets, num_classes, noun=f"targets of {noun}")
    if classifier is not None and classifier.in_features != features.num_features:
        raise UsageError(
            f"{noun} has {features.num_features} features per row, the classifier takes "
            f"{classifier.in_features}"
        )


def _log_lines(logits: Tensor, log_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Returns lines (N, C) in tau whose order is that of ``logits / norm^tau`` at every tau."""
    positive = logits > 0
    magnitude = logits.abs().clamp_min(SMALLEST).log()
    # Where a row has a positive logit, only those can win. Where it has none, the least negative
    # wins: the order of -exp(m - tau * l) is that of -(m - tau * l).
    any_positive = positive.any(1, keepdim=True)
    scores = torch.where(any_positive, magnitude, -magnitude)
    # A logit of 0 stays 0 at every tau.
    slopes = torch.where(any_positive, log_norm, -log_norm).where(logits != 0, 0.0)
    return scores.masked_fill(any_positive & ~positive, -math.inf), slopes


def _winning_interval(scores: Tensor, slopes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns [low, high] of tau (N,) where ``score − tau·slope`` is highest at the target.

    On ties the class of lower index wins, as with argmax.
    """
    column = targets[:, None]
    classes = torch.arange(scores.shape[1])
    own_score, own_slope = scores.gather(1, column), slopes.gather(1, column)
    # The target beats class c where tau * rise >= lead.
    lead, rise = scores - own_score, slopes - own_slope
    others = classes != column
    wins_tie = classes > column
    bound = lead / rise
    # Where the target loses the tie, the bound itself is outside.
    bound = bound.where(wins_tie | bound.isinf(), torch.nextafter(bound, rise.sign() * math.inf))
    low = bound.where(others & (rise > 0), -math.inf).amax(1).clamp_min(0)
    high = bound.where(others & (rise < 0), math.inf).amin(1)
    parallel = others & (rise == 0) & ((lead > 0) | ((lead == 0) & ~wins_tie))
    hopeless = parallel.any(1) | (own_score.squeeze(1) == -math.inf)
    return low.where(~hopeless, math.inf), high.where(~hopeless, -math.inf)


def head_curves(
    classifier: nn.Linear, heads: Mapping[str, Head], val: Features, counts: Tensor
) -> dict[str, tuple[AccuracyCurve, float]]:
    """Returns accuracy against tau, with the chosen tau, for each head that has one.

    Args:
        classifier: The joint classifier, (C, D).
        heads: Fitted heads by name.
        val: Features to be right on, values (N, D).
        counts: Training images per class, (C,).
    """
    curves = {}
    for name, head in heads.items():
        if isinstance(head, TauNormHead) and not head.keep_bias:
            curves[name] = tau_curve(classifier, val), head.tau
        elif isinstance(head, LogitAdjustedHead):
            curve = tau_curve(classifier, val, adjust="prior", class_counts=counts)
            curves[name] = curve, head.tau
    return curves
