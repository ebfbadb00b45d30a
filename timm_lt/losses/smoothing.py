"""Label smoothing that is stronger for frequent classes."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_lt.losses.base import ClassLoss, Reduction
from timm_lt.losses.factory import register_loss
from timm_lt.losses.terms import one_hot
from timm_lt.losses.weights import given_counts
from timm_lt.utils.checks import UsageError, check_choice, check_number
from timm_lt.utils.longtail import ClassCounts, check_class_counts

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

    Head and tail at 0 are cross-entropy. Classes of equal size count as the largest.

    Args:
        class_counts: Training images ``n_j`` per class.
        head: eps of the largest class, in [tail, 1).
        tail: eps of the smallest class, in [0, 1).
        shape: How eps grows with the size.
        spread: ``"others"``, as the paper has it, or ``"all"``: eps is shared among all C classes
            and the label's part comes on top, ``q_y = 1 - eps_y + eps_y / C``, ordinary label
            smoothing, as in the authors' code.
        reduction: As in :class:`ClassLoss`.

    References:
        Zhong et al., Improving Calibration for Long-Tailed Recognition (MiSLAS), CVPR 2021,
        https://arxiv.org/abs/2104.00466 (section 3.2)
    """

    needs_class_counts = True
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
        counts = given_counts(self, class_counts)
        super().__init__(counts, reduction=reduction)
        head, tail = (
            check_number(key, value, "[0, 1)") for key, value in (("head", head), ("tail", tail))
        )
        if head < tail:
            raise UsageError(
                f"head {head} is below tail {tail}: frequent classes are smoothed more"
            )
        check_choice("shape", shape, get_args(Shape))
        check_choice("spread", spread, get_args(Spread))
        self.spread = spread
        n = check_class_counts(counts).double()
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
