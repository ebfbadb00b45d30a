"""Losses that add a function of the class frequencies to the logits."""

from torch import Tensor
from torch.nn import functional as F

from timm_lt.losses.base import ClassLoss, Reduction
from timm_lt.losses.factory import register_loss
from timm_lt.utils.checks import UsageError, check_number
from timm_lt.utils.longtail import ClassCounts, check_class_counts, check_no_empty_class


class _PriorLoss(ClassLoss):
    """Cross-entropy of logits to which a function of the class frequencies is added."""

    needs_class_counts = True
    takes_soft_targets = True
    adjustment: Tensor

    def __init__(self, class_counts: ClassCounts | None, tau: float, reduction: Reduction) -> None:
        super().__init__(class_counts, reduction=reduction)
        if class_counts is None:
            raise UsageError(f"{type(self).__name__} needs class_counts")
        check_no_empty_class(class_counts)
        counts = check_class_counts(class_counts).double()
        adjustment = tau * (counts / counts.sum()).log()
        self.register_buffer("adjustment", adjustment.float(), persistent=False)

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the cross-entropies (N,) of the adjusted logits."""
        return F.cross_entropy(logits + self.adjustment, targets, reduction="none")


@register_loss("balanced_softmax")
class BalancedSoftmaxLoss(_PriorLoss):
    """Balanced softmax: ``l = -log(n_y e^{z_y} / sum_j n_j e^{z_j})``.

    The loss of a classifier that knows the training class frequencies; without them, at test time,
    the logits are those of a balanced prior. Equal to logit adjustment at tau = 1.

    Args:
        class_counts: Training images ``n_j`` per class, at least 1 each.
        reduction: As in :class:`ClassLoss`.

    References:
        Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020,
        https://arxiv.org/abs/2007.10740
    """

    def __init__(
        self, class_counts: ClassCounts | None = None, *, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(class_counts, tau=1.0, reduction=reduction)


@register_loss("logit_adjustment")
class LogitAdjustmentLoss(_PriorLoss):
    """Logit adjustment: the cross-entropy of ``z_j + tau log pi_j``, where ``pi_j = n_j / N``.

    At tau = 0 this is plain cross-entropy, at tau = 1 balanced softmax.

    Args:
        class_counts: Training images ``n_j`` per class, at least 1 each.
        tau: Strength of the adjustment, at least 0.
        reduction: As in :class:`ClassLoss`.

    References:
        Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021,
        https://arxiv.org/abs/2007.07314
    """

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        *,
        tau: float = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            class_counts, tau=check_number("tau", tau, "[0, inf)"), reduction=reduction
        )
