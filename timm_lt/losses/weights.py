"""Weights of the classes, and losses that multiply by them."""

from typing import Literal, get_args

import torch
from torch import Tensor, distributed

from timm_lt.losses.base import ClassLoss, Reduction
from timm_lt.utils.checks import UsageError, check_choice, check_number
from timm_lt.utils.longtail import ClassCounts, check_class_counts, check_no_empty_class

Normalization = Literal["batch", "weights"]


def inverse_frequency_weights(class_counts: ClassCounts, exponent: float = 1.0) -> Tensor:
    """Returns ``w_j = n_j^-exponent``, scaled to a mean of 1 over the classes.

    >>> inverse_frequency_weights([100, 50, 25])
    tensor([0.4286, 0.8571, 1.7143], dtype=torch.float64)

    Args:
        class_counts: Training images per class (C,), at least 1 each.
        exponent: At least 0: 0 gives every class 1, 0.5 the inverse square root.

    Raises:
        UsageError: If a class is empty, or the exponent is out of range.
    """
    exponent = check_number("exponent", exponent, "[0, inf)")
    check_no_empty_class(class_counts)
    # In logarithms, for no power is too large.
    counts = check_class_counts(class_counts)
    return torch.softmax(-exponent * counts.double().log(), 0) * len(counts)


def effective_number_weights(class_counts: ClassCounts, beta: float) -> Tensor:
    """Returns ``1 / E_j``, ``E_j = (1 - beta^n_j) / (1 - beta)``, scaled to a mean of 1.

    At beta = 0 every class has 1; towards 1 they become the inverse frequencies.

    >>> effective_number_weights([3, 1], 0.5)
    tensor([0.7273, 1.2727], dtype=torch.float64)

    Args:
        class_counts: Training images per class (C,), at least 1 each.
        beta: In [0, 1).

    Raises:
        UsageError: If a class is empty, or beta is out of range.

    References:
        Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019,
        https://arxiv.org/abs/1901.05555 (equations 2 and 6).
    """
    beta = check_number("beta", beta, "[0, 1)")
    check_no_empty_class(class_counts)
    counts = check_class_counts(class_counts).double()
    # 1 - beta^n without its rounding error for beta near 1; 1 - beta cancels.
    inverse = -1 / torch.expm1(counts * torch.tensor(beta, dtype=torch.float64).log())
    return inverse / inverse.mean()


class WeightedLoss(ClassLoss):
    """Multiplies the loss of an image by the weight of its class: ``w_y l(z, y)``.

    A target that is a distribution t gets ``sum_j t_j w_j l(z, j)``; for cross-entropy, ``-sum_j
    t_j w_j log p_j`` as in torch. The mean divides by the number of images with ``normalization``
    ``"batch"``, and by the sum of their weights, ``sum_j t_j w_j`` each, with ``"weights"``. For
    labels that is torch's mean; of distributions torch takes that over the batch.

    Where ``across_processes`` is True, as the training loop has it, the sum of the weights is over
    the images of all processes: each update is that of one process. With gradient accumulation it
    is over the images that are taken at once.

    Args:
        class_counts: As in :class:`ClassLoss`.
        weights: w (C,), above 0.
        normalization: What the mean divides by.
        reduction: As in :class:`ClassLoss`.
    """

    needs_class_counts = True
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
        # Only where all processes take the loss together: one alone would wait for ever.
        self.across_processes = False
        # Above 0 in float32, too: a batch of such images alone has a mean.
        weights = weights.float().clamp_min(torch.finfo(torch.float32).tiny)
        self.register_buffer("weights", weights, persistent=False)

    def unweighted(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses (N,), of which that of a distribution is the mean over its labels."""
        raise NotImplementedError

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the weighted losses (N,)."""
        weights, targets = self._weigh(targets)
        return weights * self.unweighted(logits, targets)

    def _weigh(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weights of the images (N,) and the targets whose losses they multiply."""
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

    def extra_repr(self) -> str:
        """Names normalization and reduction when the module is printed."""
        return f"normalization={self.normalization!r}, {super().extra_repr()}"


def given_counts(loss: object, class_counts: ClassCounts | None) -> Tensor:
    """Returns the class counts (C,) of a loss; UsageError if there are none."""
    if class_counts is None:
        raise UsageError(f"{type(loss).__name__} needs class_counts")
    return check_class_counts(class_counts)


def _mean_over_processes(total: Tensor) -> Tensor:
    # Gradients are averaged over the processes, so that each divides by its equal share.
    if not (distributed.is_available() and distributed.is_initialized()):
        return total
    total = total.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
