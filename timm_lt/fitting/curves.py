"""Accuracy as an exact function of tau, for tau-normalisation and logit adjustment."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from timm_lt.features import Features
from timm_lt.heads import log_prior
from timm_lt.longtail import shot_groups
from timm_lt.registry import UsageError, check_choice

Adjustment = Literal["norm", "prior"]
# Rows per step: a step holds a few (rows, C) matrices.
CHUNK = 4096


@dataclass(frozen=True)
class AccuracyCurve:
    """Accuracy as a step function of tau >= 0.

    An image is right for the taus of one interval ``[low, high]``; it is empty if low > high.

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
        """The middle of the widest stretch of taus with the highest accuracy.

        In the middle, rounding cannot tip an image over the edge. A stretch without end counts as
        one unit wide.
        """
        edges, accuracy = self.steps()
        ends = torch.cat([edges[1:], edges[-1:] + 1])
        width = torch.where(accuracy == accuracy.max(), ends - edges, -1.0)
        best = int(width.argmax())
        return float((edges[best] + ends[best]) / 2)


def tau_curve(
    classifier: nn.Linear,
    features: Features,
    *,
    adjust: Adjustment = "norm",
    class_counts: Tensor | None = None,
    group: Literal["many_shot", "medium_shot", "few_shot"] | None = None,
) -> AccuracyCurve:
    """Computes the accuracy of tau-normalisation or logit adjustment at every tau >= 0 at once.

    With ``adjust="norm"`` the logit of class c is ``w_c·x / ‖w_c‖^tau``, without bias. Where it is
    positive its logarithm ``log(w_c·x) − tau·log‖w_c‖`` is a line in tau; with ``adjust="prior"``
    the logit ``w_c·x + b_c − tau·log prior_c`` is one itself. The label wins on the interval of tau
    in which its line is the highest.

    Args:
        classifier: The joint classifier, (C, D).
        features: Features to be right on, values (N, D).
        adjust: ``"norm"`` or ``"prior"``.
        class_counts: Training images per class (C,); for ``"prior"`` and for ``group``.
        group: Take the images of this shot group only.

    Raises:
        UsageError: If class counts are missing or the group has no images.

    References:
        Kang et al., ICLR 2020, equation 3; Menon et al., ICLR 2021, equation 9.
    """
    check_choice("adjust", adjust, get_args(Adjustment))
    if class_counts is None and (adjust == "prior" or group is not None):
        raise UsageError("tau_curve needs class_counts= for adjust='prior' and for group=")
    if group is not None:
        assert class_counts is not None
        groups = shot_groups(class_counts)
        check_choice("group", group, tuple(groups))
        rows = groups[group][features.targets]
        if not rows.any():
            raise UsageError(f"no image belongs to the group {group!r}")
        features = Features(features.values[rows], features.targets[rows])
    weight = classifier.weight.detach().double().cpu()
    bias = None if classifier.bias is None else classifier.bias.detach().double().cpu()
    lows, highs = [], []
    for start in range(0, len(features), CHUNK):
        values = features.values[start : start + CHUNK].double()
        targets = features.targets[start : start + CHUNK]
        logits = values @ weight.T
        if adjust == "prior":
            assert class_counts is not None
            slopes = log_prior(class_counts, len(weight)).double()
            scores = logits if bias is None else logits + bias
            low, high = _winning_interval(scores, slopes.expand_as(scores), targets)
        else:
            norm = torch.linalg.vector_norm(weight, dim=1).clamp_min(1e-12)
            low, high = _winning_interval(*_log_lines(logits, norm.log()), targets)
        lows.append(low)
        highs.append(high)
    return AccuracyCurve(torch.cat(lows), torch.cat(highs))


def _log_lines(logits: Tensor, log_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Returns lines (N, C) in tau whose order is that of ``logits / norm^tau`` at every tau."""
    positive = logits > 0
    magnitude = logits.abs().clamp_min(1e-300).log()
    # Where a row has a positive logit, only those can win. Where it has none, the least negative
    # wins: the order of -exp(m - tau * l) is that of -(m - tau * l).
    any_positive = positive.any(1, keepdim=True)
    scores = torch.where(any_positive, magnitude, -magnitude)
    slopes = torch.where(any_positive, log_norm, -log_norm)
    return scores.masked_fill(any_positive & ~positive, -math.inf), slopes


def _winning_interval(scores: Tensor, slopes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns [low, high] of tau (N,) where ``score − tau·slope`` is highest at the target.

    On ties the class of lower index wins, as with argmax.
    """
    column = targets[:, None]
    own_score, own_slope = scores.gather(1, column), slopes.gather(1, column)
    # The target beats class c where tau * rise >= lead.
    lead, rise = scores - own_score, slopes - own_slope
    others = torch.arange(scores.shape[1]) != column
    bound = lead / rise
    low = bound.where(others & (rise > 0), -math.inf).amax(1).clamp_min(0)
    high = bound.where(others & (rise < 0), math.inf).amin(1)
    wins_tie = torch.arange(scores.shape[1]) > column
    parallel = others & (rise == 0) & ((lead > 0) | ((lead == 0) & ~wins_tie))
    hopeless = parallel.any(1) | (own_score.squeeze(1) == -math.inf)
    return low.where(~hopeless, math.inf), high.where(~hopeless, -math.inf)
