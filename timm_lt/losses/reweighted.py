"""Losses weighted by class size, and the focal loss."""

from typing import Literal, get_args

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from timm_lt.losses.base import (
    ClassLoss,
    Reduction,
    mean_over_labels,
    register_loss,
    required_counts,
    sigmoid_focal,
    softmax_focal,
)
from timm_lt.utils.checks import UsageError, check_choice, check_number
from timm_lt.utils.longtail import ClassCounts

Normalization = Literal["batch", "weights"]


def inverse_frequency_weights(counts: Tensor, exponent: float) -> Tensor:
    """Returns ``w_j = n_j^-exponent`` (C,), scaled to a mean of 1 over the classes.

    >>> inverse_frequency_weights(torch.tensor([100, 50, 25]), 1.0)
    tensor([0.4286, 0.8571, 1.7143], dtype=torch.float64)
    """
    exponent = check_number("exponent", exponent, "[0, inf)")
    # In logarithms: a large power would overflow.
    return torch.softmax(-exponent * counts.double().log(), 0) * len(counts)


def effective_number_weights(counts: Tensor, beta: float) -> Tensor:
    """Returns ``1 / E_j`` (C,), ``E_j = (1 - beta^n_j) / (1 - beta)``, scaled to a mean of 1.

    >>> effective_number_weights(torch.tensor([3, 1]), 0.5)
    tensor([0.7273, 1.2727], dtype=torch.float64)
    """
    beta = check_number("beta", beta, "[0, 1)")
    # expm1 keeps the digits of 1 - beta^n for beta near 1; the factor 1 - beta cancels.
    log_beta = torch.tensor(beta, dtype=torch.float64).log()
    inverse = -1 / torch.expm1(counts.double() * log_beta)
    return inverse / inverse.mean()


class WeightedLoss(ClassLoss):
    """Multiplies the loss of an image by the weight of its class: ``w_y l(z, y)``.

    A soft target t gives ``sum_j t_j w_j l(z, j)``, as cross-entropy does in torch. The mean
    divides by the number of images (``normalization="batch"``) or by the sum of their weights,
    ``sum_j t_j w_j`` each (``"weights"``). For labels that is torch's weighted mean; for soft
    targets torch divides by the batch size.

    With ``across_processes`` (set by the training loop) the weights are summed over all processes,
    so that an update equals that of one process. With gradient accumulation the sum is over each
    micro-batch.

    Args:
        weights: w (C,), above 0.
        normalization: Divisor of the mean.
    """

    takes_soft_targets = True
    weights: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        weights: Tensor,
        *,
        normalization: Normalization,
        reduction: Reduction,
    ) -> None:
        super().__init__(class_counts, reduction=reduction)
        check_choice("normalization", normalization, get_args(Normalization))
        self.normalization = normalization
        # Only where all processes compute the loss together, since it is a collective.
        self.across_processes = False
        # Above 0 in float32, so that the weights of a batch never sum to 0.
        weights = weights.float().clamp_min(torch.finfo(torch.float32).tiny)
        self.register_buffer("weights", weights, persistent=False)

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
            return self.weights[targets], targets
        shares = targets * self.weights
        weights = shares.sum(1)
        return weights, shares / weights.clamp_min(torch.finfo(weights.dtype).tiny)[:, None]

    def _reduced(self, losses: Tensor, targets: Tensor) -> Tensor:
        if self.reduction != "mean" or self.normalization == "batch":
            return super()._reduced(losses, targets)
        weights, _ = self._weigh(targets)
        total = weights.sum()
        return losses.sum() / (_mean_over_processes(total) if self.across_processes else total)


def _mean_over_processes(total: Tensor) -> Tensor:
    # DDP averages gradients, so each process divides by its equal share of the total.
    if not (distributed.is_available() and distributed.is_initialized()):
        return total
    total = total.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


Form = Literal["softmax", "sigmoid", "focal"]
FocalForm = Literal["softmax", "sigmoid"]
Probability = Literal["unweighted", "weighted"]


@register_loss("inverse_frequency")
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

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        *,
        exponent: float = 1.0,
        normalization: Normalization = "batch",
        reduction: Reduction = "mean",
    ) -> None:
        counts = required_counts(self, class_counts)
        weights = inverse_frequency_weights(counts, exponent)
        super().__init__(counts, weights, normalization=normalization, reduction=reduction)


@register_loss("class_balanced")
class ClassBalancedLoss(WeightedLoss):
    """Class-balanced loss: ``w_y l(z, y)``, ``w_j`` prop. to ``(1 - beta) / (1 - beta^n_j)``.

    The weights are inverse effective numbers of images with a mean of 1 over the classes: all 1 at
    beta = 0, inverse frequencies as beta tends to 1. ``form`` chooses l:

    - ``"softmax"``: cross-entropy, ``-log softmax_y(z)``;
    - ``"sigmoid"``: ``-log sigmoid(z_y) - sum_{j != y} log(1 - sigmoid(z_j))``;
    - ``"focal"``: the same sum, each term times (1 - its probability)^gamma.

    A sigmoid should start with a bias of ``-log(C - 1)`` (recipes set it) without weight decay on
    the bias (timm's default); otherwise the C - 1 negatives of each image dominate at first.

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
        counts = required_counts(self, class_counts)
        weights = effective_number_weights(counts, beta)
        super().__init__(counts, weights, normalization=normalization, reduction=reduction)
        check_choice("form", form, get_args(Form))
        if gamma is not None and form != "focal":
            raise UsageError(f"gamma only applies with form='focal', got form={form!r}")
        gamma = check_number("gamma", 1.0 if gamma is None else gamma, "[0, inf)")
        self.sigmoid, self.gamma = form != "softmax", gamma if form == "focal" else 0.0

    def unweighted(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses (N,) of the form."""
        if self.sigmoid:
            return sigmoid_focal(logits, targets, self.gamma)
        return super().unweighted(logits, targets)


@register_loss("class_balanced_focal")
class ClassBalancedFocalLoss(ClassBalancedLoss):
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
        super().__init__(
            class_counts,
            beta=beta,
            form="focal",
            gamma=gamma,
            normalization=normalization,
            reduction=reduction,
        )
        check_choice("form", form, get_args(FocalForm))
        check_choice("probability", probability, get_args(Probability))
        if probability == "weighted" and form != "softmax":
            raise UsageError("probability='weighted' only applies with form='softmax'")
        self.sigmoid, self.probability = form == "sigmoid", probability

    def unweighted(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the focal losses (N,)."""
        if self.sigmoid:
            return super().unweighted(logits, targets)
        if self.probability == "unweighted":
            return softmax_focal(logits, targets, self.gamma)
        log_p = F.log_softmax(logits, 1)
        # Clamped, since 0^gamma has an infinite slope for gamma < 1.
        tiny = torch.finfo(log_p.dtype).tiny
        modulator = (-torch.expm1(self.weights * log_p)).clamp_min(tiny) ** self.gamma
        return mean_over_labels(-log_p * modulator, targets)


@register_loss("focal")
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

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        *,
        gamma: float = 2.0,
        form: FocalForm = "softmax",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_counts, reduction=reduction)
        self.gamma = check_number("gamma", gamma, "[0, inf)")
        check_choice("form", form, get_args(FocalForm))
        self.sigmoid = form == "sigmoid"

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the focal losses (N,)."""
        focal = sigmoid_focal if self.sigmoid else softmax_focal
        return focal(logits, targets, self.gamma)
