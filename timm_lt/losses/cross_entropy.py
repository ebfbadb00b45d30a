"""Cross-entropy: plain, smoothed by class size, or with logits shifted by the class prior."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_lt.losses.base import ClassLoss, Reduction, one_hot, register_loss, required_counts
from timm_lt.utils.checks import check_choice, check_number
from timm_lt.utils.longtail import ClassCounts


@register_loss("cross_entropy")
class CrossEntropyLoss(ClassLoss):
    """Cross-entropy: ``l = -sum_j t_j log softmax_j(z)``, ``t_j = (1 - s) [j = y] + s / C``.

    With label smoothing s = 0 this is ``-log softmax_y(z)``.

    Args:
        class_counts: As in :class:`ClassLoss`, like reduction; not used.
        smoothing: s, in [0, 1).

    References:
        Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016,
        https://arxiv.org/abs/1512.00567 (label smoothing).
    """

    takes_soft_targets = True

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        *,
        smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_counts, reduction=reduction)
        self.smoothing = check_number("smoothing", smoothing, "[0, 1)")

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the smoothed cross-entropies (N,)."""
        return F.cross_entropy(logits, targets, label_smoothing=self.smoothing, reduction="none")


Shape = Literal["concave", "linear", "convex"]
Spread = Literal["others", "all"]


@register_loss("label_aware_smoothing")
class LabelAwareSmoothingLoss(ClassLoss):
    """Label-aware smoothing: ``l = -sum_j q_j log softmax_j(z)``, smoothed by ``eps_y``.

    ``q_y = 1 - eps_y``, and each other class has ``eps_y / (C - 1)``. With ``r_j = (n_j - n_min) /
    (n_max - n_min)``, ``eps_j`` goes from ``tail`` for the smallest class to ``head`` for the
    largest, ``d = head - tail``:

    - ``"concave"``: ``tail + d sin(r_j pi / 2)``
    - ``"linear"``: ``tail + d r_j``
    - ``"convex"``: ``head + d sin(3 pi / 2 + r_j pi / 2)``

    With ``head = tail = 0`` this is cross-entropy. If all classes have the same size, all get
    ``head``.

    Args:
        class_counts: Training images ``n_j`` per class, at least 1 each.
        head: eps of the largest class, in [tail, 1).
        tail: eps of the smallest class, in [0, 1).
        shape: How eps grows with the size.
        spread: ``"others"`` as in the paper, or ``"all"`` as in the authors' code: eps is shared
            among all C classes, so ``q_y = 1 - eps_y + eps_y / C`` (ordinary label smoothing).
        reduction: As in :class:`ClassLoss`.

    References:
        Zhong et al., Improving Calibration for Long-Tailed Recognition (MiSLAS), CVPR 2021,
        https://arxiv.org/abs/2104.00466 (section 3.2)
    """

    takes_soft_targets = True
    smoothing: Tensor

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        *,
        head: float = 0.3,
        tail: float = 0.0,
        shape: Shape = "concave",
        spread: Spread = "others",
        reduction: Reduction = "mean",
    ) -> None:
        counts = required_counts(self, class_counts)
        super().__init__(counts, reduction=reduction)
        tail = check_number("tail", tail, "[0, 1)")
        head = check_number("head", head, f"[{tail:g}, 1)")
        check_choice("shape", shape, get_args(Shape))
        check_choice("spread", spread, get_args(Spread))
        self.spread = spread
        n = counts.double()
        span = n.max() - n.min()
        share = (n - n.min()) / span if span > 0 else torch.ones_like(n)
        smoothing = {
            "concave": tail + (head - tail) * torch.sin(share * math.pi / 2),
            "linear": tail + (head - tail) * share,
            "convex": head + (head - tail) * torch.sin(3 * math.pi / 2 + share * math.pi / 2),
        }[shape]
        self.register_buffer("smoothing", smoothing.float(), persistent=False)

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the smoothed cross-entropies (N,)."""
        targets = one_hot(targets, logits)
        classes = logits.shape[1]
        moved = targets * self.smoothing
        total = moved.sum(1, keepdim=True)
        to_others = (total - moved) / max(classes - 1, 1)
        spread = total / classes if self.spread == "all" else to_others
        return F.cross_entropy(logits, targets - moved + spread, reduction="none")


class _PriorLoss(ClassLoss):
    """Cross-entropy of logits to which a function of the class frequencies is added."""

    takes_soft_targets = True
    adjustment: Tensor

    def __init__(self, class_counts: ClassCounts | None, tau: float, reduction: Reduction) -> None:
        counts = required_counts(self, class_counts).double()
        super().__init__(class_counts, reduction=reduction)
        adjustment = tau * (counts / counts.sum()).log()
        self.register_buffer("adjustment", adjustment.float(), persistent=False)

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the cross-entropies (N,) of the adjusted logits."""
        return F.cross_entropy(logits + self.adjustment, targets, reduction="none")


@register_loss("balanced_softmax")
class BalancedSoftmaxLoss(_PriorLoss):
    """Balanced softmax: ``l = -log(n_y e^{z_y} / sum_j n_j e^{z_j})``.

    Training adds the log frequencies to the logits; without them, at test time, the logits are
    those of a balanced prior. Equal to logit adjustment at tau = 1.

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
