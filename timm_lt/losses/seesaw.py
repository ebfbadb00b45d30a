"""The seesaw loss."""

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_lt.losses.base import ClassLoss, Reduction
from timm_lt.losses.factory import register_loss
from timm_lt.losses.weights import given_counts
from timm_lt.utils.checks import check_number
from timm_lt.utils.longtail import ClassCounts, check_class_counts, check_no_empty_class


@register_loss("seesaw")
class SeesawLoss(ClassLoss):
    """Seesaw: ``l = -log(e^{z_y} / (e^{z_y} + sum_{j != y} M_yj K_yj e^{z_j}))``.

    Images of a frequent class push a rarer one down less, the mitigation ``M_yj = min(1, n_j /
    n_y)^p``; unless they are mistaken for it, the compensation ``K_yj = max(1, p_j / p_y)^q``,
    where ``p_j`` is the softmax, through which no gradient goes. At ``mitigation`` = p = 0 and
    ``compensation`` = q = 0 this is cross-entropy.

    The paper counts images while it trains; here ``n_j`` are the class counts, from the first
    update on, so that a resumed run and one on several processes are the same. It takes labels
    only: the factors depend on the label.

    Args:
        class_counts: Training images ``n_j`` per class, at least 1 each.
        mitigation: p, at least 0.
        compensation: q, at least 0.
        min_probability: ``p_y`` is at least this in K, in [0, 1): 0 in the paper, 0.01 in the code.
        reduction: As in :class:`ClassLoss`.

    References:
        Wang et al., Seesaw Loss for Long-Tailed Instance Segmentation, CVPR 2021,
        https://arxiv.org/abs/2008.10032 (equations 4 to 7; its classifier is a cosine one).
    """

    needs_class_counts = True
    log_counts: Tensor

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        *,
        mitigation: float = 0.8,
        compensation: float = 2.0,
        min_probability: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        counts = given_counts(self, class_counts)
        super().__init__(counts, reduction=reduction)
        self.mitigation = check_number("mitigation", mitigation, "[0, inf)")
        self.compensation = check_number("compensation", compensation, "[0, inf)")
        self.min_probability = check_number("min_probability", min_probability, "[0, 1)")
        check_no_empty_class(counts)
        log_counts = check_class_counts(counts).double().log()
        self.register_buffer("log_counts", log_counts.float(), persistent=False)

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses (N,)."""
        labels = targets[:, None]
        mitigation = (self.log_counts - self.log_counts[labels]).clamp_max(0)
        log_p = F.log_softmax(logits.detach(), 1)
        label_p = log_p.gather(1, labels)
        if self.min_probability > 0:
            label_p = label_p.clamp_min(float(torch.tensor(self.min_probability).log()))
        # M and K as what they add to the logits; both are 0 for the label itself.
        compensation = (log_p - label_p).clamp_min(0)
        factors = self.mitigation * mitigation + self.compensation * compensation
        return F.cross_entropy(logits + factors, targets, reduction="none")
