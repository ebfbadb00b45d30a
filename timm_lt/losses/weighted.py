"""Losses that weigh the classes by how many images they have."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_lt.losses.base import Reduction
from timm_lt.losses.factory import register_loss
from timm_lt.losses.terms import mean_over_labels, sigmoid_focal, softmax_focal
from timm_lt.losses.weights import (
    Normalization,
    WeightedLoss,
    effective_number_weights,
    given_counts,
    inverse_frequency_weights,
)
from timm_lt.utils.checks import UsageError, check_choice, check_number
from timm_lt.utils.longtail import ClassCounts

Form = Literal["softmax", "sigmoid", "focal"]
FocalForm = Literal["sigmoid", "softmax"]
Probability = Literal["unweighted", "weighted"]


@register_loss("inverse_frequency")
class InverseFrequencyLoss(WeightedLoss):
    """Cross-entropy, weighted by inverse class frequency: ``l = -w_y log softmax_y(z)``.

    ``w_j`` is as ``n_j^-exponent``, with a mean of 1 over the classes. From a random start it
    trains slowly; see docs/losses.md for why and what helps.

    Args:
        class_counts: Training images ``n_j`` per class, at least 1 each.
        exponent: At least 0: 0 is cross-entropy, 0.5 weighs by the inverse square root.
        normalization: As in :class:`~timm_lt.losses.weights.WeightedLoss`, like reduction.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    References:
        Huang et al., Learning Deep Representation for Imbalanced Classification, CVPR 2016,
        https://doi.org/10.1109/CVPR.2016.580 (as a baseline).
    """

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        *,
        exponent: float = 1.0,
        normalization: Normalization = "batch",
        reduction: Reduction = "mean",
    ) -> None:
        counts = given_counts(self, class_counts)
        weights = inverse_frequency_weights(counts, exponent)
        super().__init__(counts, weights, normalization=normalization, reduction=reduction)

    def unweighted(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the cross-entropies (N,)."""
        return F.cross_entropy(logits, targets, reduction="none")


class _EffectiveNumberLoss(WeightedLoss):
    """Softmax or sigmoid losses, weighted by the inverse effective number."""

    sigmoid = False

    def __init__(
        self,
        class_counts: ClassCounts | None,
        beta: float,
        normalization: Normalization,
        reduction: Reduction,
    ) -> None:
        counts = given_counts(self, class_counts)
        weights = effective_number_weights(counts, beta)
        super().__init__(counts, weights, normalization=normalization, reduction=reduction)

    def initial_bias(self, num_classes: int) -> float | None:
        """Returns ``-log(C - 1)`` for a sigmoid, so that every class starts at 1 / C."""
        return sigmoid_bias(num_classes) if self.sigmoid else None


@register_loss("class_balanced")
class ClassBalancedLoss(_EffectiveNumberLoss):
    """Class-balanced loss: ``w_y l(z, y)``, with ``w_j`` as ``(1 - beta) / (1 - beta^n_j)``.

    The weights are the inverse effective numbers of images, with a mean of 1 over the classes: at
    beta = 0 all are 1, towards 1 they become the inverse frequencies. l is, by ``form``,

    - ``"softmax"``: cross-entropy, ``-log softmax_y(z)``;
    - ``"sigmoid"``: ``-log sigmoid(z_y) - sum_{j != y} log(1 - sigmoid(z_j))``;
    - ``"focal"``: the same sum, each term times (1 - its probability)^gamma.

    A sigmoid should start with its bias at ``-log(C - 1)``, which a recipe sets, and without decay
    of that bias, as timm's optimisers have it unless ``filter_bias_and_bn`` is false. Otherwise
    the C - 1 negatives of an image are all there is to learn at first.

    Args:
        class_counts: Training images ``n_j`` per class, at least 1 each.
        beta: In [0, 1); the paper tries 0.9, 0.99, 0.999 and 0.9999.
        form: Which loss is weighted.
        gamma: At least 0, only for ``form="focal"``; None takes 1, as the authors' code does.
        normalization: ``"batch"``, the authors' code in TensorFlow, or ``"weights"``, torch's
            weighted mean, that of most later code; see
            :class:`~timm_lt.losses.weights.WeightedLoss`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    References:
        Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019,
        https://arxiv.org/abs/1901.05555
    """

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        *,
        beta: float = 0.9999,
        form: Form = "softmax",
        gamma: float | None = None,
        normalization: Normalization = "batch",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_counts, beta, normalization, reduction)
        check_choice("form", form, get_args(Form))
        if gamma is not None and form != "focal":
            raise UsageError(f"gamma is for form 'focal': leave it out with form {form!r}")
        self.form, self.sigmoid = form, form != "softmax"
        given = 1.0 if gamma is None else check_number("gamma", gamma, "[0, inf)")
        self.gamma = given if form == "focal" else 0.0

    def unweighted(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses (N,) of the form."""
        if self.sigmoid:
            return sigmoid_focal(logits, targets, self.gamma)
        return F.cross_entropy(logits, targets, reduction="none")


@register_loss("class_balanced_focal")
class ClassBalancedFocalLoss(_EffectiveNumberLoss):
    """Class-balanced focal loss: ``w_y f(z, y)``, with ``w_j`` as ``(1 - beta) / (1 - beta^n_j)``.

    The paper's f is a sigmoid for each class, ``class_balanced`` with ``form="focal"``; see there
    for the bias. Later code has the softmax, ``f = -(1 - p_y)^gamma log p_y``, and that of LDAM
    takes ``p_y = exp(-w_y CE)``, which is no probability: then ``w_y (1 - p_y)^gamma CE``.

    Args:
        class_counts: Training images ``n_j`` per class, at least 1 each.
        beta: In [0, 1).
        gamma: At least 0; the paper tries 0.5, 1 and 2.
        form: ``"sigmoid"``, the paper's, or ``"softmax"``.
        probability: With ``form="softmax"``, whether p is the softmax (``"unweighted"``) or, as
            in the code of LDAM, has the weight inside (``"weighted"``).
        normalization: As in :class:`~timm_lt.losses.weights.WeightedLoss`, like reduction.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    References:
        Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019,
        https://arxiv.org/abs/1901.05555
    """

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        *,
        beta: float = 0.9999,
        gamma: float = 1.0,
        form: FocalForm = "sigmoid",
        probability: Probability = "unweighted",
        normalization: Normalization = "batch",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_counts, beta, normalization, reduction)
        check_choice("form", form, get_args(FocalForm))
        check_choice("probability", probability, get_args(Probability))
        if probability == "weighted" and form != "softmax":
            raise UsageError("probability 'weighted' is for form 'softmax': leave it out")
        self.gamma = check_number("gamma", gamma, "[0, inf)")
        self.sigmoid, self.probability = form == "sigmoid", probability

    def unweighted(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the focal losses (N,)."""
        if self.sigmoid:
            return sigmoid_focal(logits, targets, self.gamma)
        if self.probability == "unweighted":
            return softmax_focal(logits, targets, self.gamma)
        log_p = F.log_softmax(logits, 1)
        # A power of 0, where p rounds to 1, has no slope for gamma < 1.
        tiny = torch.finfo(log_p.dtype).tiny
        modulator = (-torch.expm1(self.weights * log_p)).clamp_min(tiny) ** self.gamma
        return mean_over_labels(-log_p * modulator, targets)


def sigmoid_bias(num_classes: int) -> float:
    """Returns ``-log(C - 1)``, where a sigmoid is 1 / C; 0 for one class."""
    return -math.log(max(num_classes - 1, 1))
