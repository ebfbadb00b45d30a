"""Losses weighted by class size, and the focal loss."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from timm_lt.losses.base import (
    BelowOne,
    ClassLoss,
    NonNegative,
    mean_over_labels,
    register_loss,
    required_counts,
    sigmoid_focal,
    softmax_focal,
)
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import ClassCounts


def inverse_frequency_weights(counts: Tensor, exponent: float) -> Tensor:
    """Returns ``w_j = n_j^-exponent`` (C,), scaled to a mean of 1 over the classes.

    >>> inverse_frequency_weights(torch.tensor([100.0, 50, 25]), 1.0)
    tensor([0.4286, 0.8571, 1.7143])
    """
    # In logarithms: a large power would overflow.
    return torch.softmax(-exponent * counts.log(), 0) * len(counts)


def effective_number_weights(counts: Tensor, beta: float) -> Tensor:
    """Returns ``1 / E_j`` (C,), ``E_j = (1 - beta^n_j) / (1 - beta)``, scaled to a mean of 1.

    >>> effective_number_weights(torch.tensor([3.0, 1]), 0.5)
    tensor([0.7273, 1.2727])
    """
    # expm1 keeps the digits of 1 - beta^n for beta near 1; the factor 1 - beta cancels.
    log_beta = torch.tensor(beta, dtype=torch.float64).log()
    inverse = -1 / torch.expm1(counts * log_beta)
    return inverse / inverse.mean()


@dataclass(eq=False, repr=False, kw_only=True)
class WeightedLoss(ClassLoss):
    """Multiplies the loss of an image by the weight of its class: ``w_y l(z, y)``.

    A subclass defines :meth:`weigh_classes`. A soft target t gives ``sum_j t_j w_j l(z, j)``, as
    cross-entropy does in torch. With ``across_processes`` (set by the training loop) the weights
    are summed over all processes, so that an update equals that of one process. With gradient
    accumulation the sum is over each micro-batch.

    Args:
        normalization: Divisor of the mean: the number of images (``"batch"``), or the sum of their
            weights, ``sum_j t_j w_j`` each (``"weights"``). For labels that is torch's weighted
            mean; for soft targets torch divides by the batch size.
    """

    takes_soft_targets = True

    normalization: Literal["batch", "weights"] = "batch"

    def __post_init__(self, class_counts: ClassCounts | None) -> None:
        super().__post_init__(class_counts)
        # Only where all processes compute the loss together, since it is a collective.
        self.across_processes = False
        weights = self.weigh_classes(required_counts(self, class_counts)).float()
        # Above 0 in float32, so that the weights of a batch never sum to 0.
        weights.clamp_min_(torch.finfo(weights.dtype).tiny)
        self.class_weights = nn.Buffer(weights, persistent=False)

    def weigh_classes(self, counts: Tensor) -> Tensor:
        """Returns the weights (C,) of classes with these counts (C,), float64."""
        raise NotImplementedError

    def unweighted(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the unweighted losses (N,); the default is cross-entropy."""
        return F.cross_entropy(logits, targets, reduction="none")

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the weighted losses (N,)."""
        weights, targets = self._weigh(targets)
        return weights * self.unweighted(logits, targets)

    def _weigh(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weight of each image (N,), and the targets of its unweighted loss."""
        if targets.ndim == 1:
            return self.class_weights[targets], targets
        shares = targets * self.class_weights
        weights = shares.sum(1)
        return weights, shares / weights.clamp_min(torch.finfo(weights.dtype).tiny)[:, None]

    def _reduced(self, losses: Tensor, targets: Tensor) -> Tensor:
        if self.reduction != "mean" or self.normalization == "batch":
            return super()._reduced(losses, targets)
        total = self._weigh(targets)[0].sum()
        if self.across_processes and distributed.is_available() and distributed.is_initialized():
            # DDP averages gradients, so each process divides by its equal share of the total.
            distributed.all_reduce(total)
            total = total / distributed.get_world_size()
        return losses.sum() / total


@register_loss("inverse_frequency")
@dataclass(eq=False, repr=False, kw_only=True)
class InverseFrequencyLoss(WeightedLoss):
    """Cross-entropy, weighted by inverse class frequency: ``l = -w_y log softmax_y(z)``.

    ``w_j`` is proportional to ``n_j^-exponent``, with a mean of 1 over the classes. Training from
    scratch is slow; docs/losses.md explains why and what helps.

    Args:
        exponent: At least 0: 0 is cross-entropy, 0.5 the inverse square root.

    References:
        Huang et al., Learning Deep Representation for Imbalanced Classification, CVPR 2016,
        https://doi.org/10.1109/CVPR.2016.580 (as a baseline).
    """

    exponent: NonNegative = 1.0

    def weigh_classes(self, counts: Tensor) -> Tensor:
        """Returns weights proportional to ``n_j^-exponent``."""
        return inverse_frequency_weights(counts, self.exponent)


@register_loss("class_balanced")
@dataclass(eq=False, repr=False, kw_only=True)
class ClassBalancedLoss(WeightedLoss):
    """Class-balanced loss: ``w_y l(z, y)``, ``w_j`` prop. to ``(1 - beta) / (1 - beta^n_j)``.

    The weights are inverse effective numbers of images with a mean of 1 over the classes: all 1 at
    beta = 0, inverse frequencies as beta tends to 1. ``form`` chooses l:

    - ``"softmax"``: cross-entropy, ``-log softmax_y(z)``;
    - ``"sigmoid"``: ``-log sigmoid(z_y) - sum_{j != y} log(1 - sigmoid(z_j))``;
    - ``"focal"``: the same sum, each term times (1 - its probability)^gamma.

    A sigmoid should start with the bias of :meth:`initial_bias` (recipes set it), without weight
    decay (timm's default); otherwise the C - 1 negatives of each image dominate at first.

    Args:
        beta: In [0, 1); the paper tries 0.9, 0.99, 0.999 and 0.9999.
        form: The weighted loss.
        gamma: At least 0, only for ``form="focal"``; None is 1, as in the authors' code.
        normalization: ``"batch"`` as in the authors' TensorFlow code, or ``"weights"``, torch's
            weighted mean, as in most later code.

    References:
        Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019,
        https://arxiv.org/abs/1901.05555
    """

    beta: BelowOne = 0.9999
    form: Literal["softmax", "sigmoid", "focal"] = "softmax"
    gamma: NonNegative | None = None

    def __post_init__(self, class_counts: ClassCounts | None) -> None:
        super().__post_init__(class_counts)
        if self.gamma is not None and self.form != "focal":
            raise UsageError(f"gamma only applies with form='focal', got form={self.form!r}")

    def weigh_classes(self, counts: Tensor) -> Tensor:
        """Returns the inverse effective numbers of images."""
        return effective_number_weights(counts, self.beta)

    def unweighted(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses (N,) of the form."""
        if self.form == "softmax":
            return super().unweighted(logits, targets)
        gamma = 1.0 if self.gamma is None else self.gamma
        return sigmoid_focal(logits, targets, gamma if self.form == "focal" else 0.0)


@register_loss("class_balanced_focal")
@dataclass(eq=False, repr=False, kw_only=True)
class ClassBalancedFocalLoss(WeightedLoss):
    """Class-balanced focal loss: ``w_y f(z, y)``, ``w_j`` as in ``class_balanced``.

    The paper's f has a sigmoid per class and equals ``class_balanced`` with ``form="focal"``, whose
    note on the bias applies. Later code takes the softmax, ``f = -(1 - p_y)^gamma log p_y``.

    Args:
        beta: In [0, 1).
        gamma: At least 0; the paper tries 0.5, 1 and 2.
        form: ``"sigmoid"``, the paper's, or ``"softmax"``.
        probability: With ``form="softmax"``: p is the softmax (``"unweighted"``), or
            ``exp(-w_y CE)`` as in LDAM's code, which is not a probability (``"weighted"``).

    References:
        Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019,
        https://arxiv.org/abs/1901.05555
    """

    beta: BelowOne = 0.9999
    gamma: NonNegative = 1.0
    form: Literal["softmax", "sigmoid"] = "sigmoid"
    probability: Literal["unweighted", "weighted"] = "unweighted"

    def __post_init__(self, class_counts: ClassCounts | None) -> None:
        super().__post_init__(class_counts)
        if self.probability == "weighted" and self.form == "sigmoid":
            raise UsageError("probability='weighted' only applies with form='softmax'")

    def weigh_classes(self, counts: Tensor) -> Tensor:
        """Returns the inverse effective numbers of images."""
        return effective_number_weights(counts, self.beta)

    def unweighted(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the focal losses (N,)."""
        if self.form == "sigmoid":
            return sigmoid_focal(logits, targets, self.gamma)
        if self.probability == "unweighted":
            return softmax_focal(logits, targets, self.gamma)
        log_p = F.log_softmax(logits, 1)
        # Clamped, since 0^gamma has an infinite slope for gamma < 1.
        tiny = torch.finfo(log_p.dtype).tiny
        modulator = (-torch.expm1(self.class_weights * log_p)).clamp_min(tiny) ** self.gamma
        return mean_over_labels(-log_p * modulator, targets)


@register_loss("focal")
@dataclass(eq=False, repr=False, kw_only=True)
class FocalLoss(ClassLoss):
    """Focal loss: ``l = -(1 - p_t)^gamma log p_t``; at gamma = 0 the plain loss.

    With ``form="softmax"``, ``p_t`` is the softmax of the label. With ``form="sigmoid"`` (the
    paper's detector) l is summed over the classes, with ``p_t = sigmoid(z_j)`` for the label and
    ``1 - sigmoid(z_j)`` for the others; the note on the bias of ``class_balanced`` applies.

    Args:
        gamma: At least 0; larger values down-weight images that are already classified well.
        form: ``"softmax"``, the baseline of long-tail papers, or ``"sigmoid"``.

    References:
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017,
        https://arxiv.org/abs/1708.02002
    """

    takes_soft_targets = True

    gamma: NonNegative = 2.0
    form: Literal["softmax", "sigmoid"] = "softmax"

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the focal losses (N,)."""
        focal = sigmoid_focal if self.form == "sigmoid" else softmax_focal
        return focal(logits, targets, self.gamma)
