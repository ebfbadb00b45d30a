"""Cross-entropy, plain or with label smoothing."""

from torch import Tensor
from torch.nn import functional as F

from timm_lt.losses.base import ClassLoss, Reduction
from timm_lt.losses.factory import register_loss
from timm_lt.utils.checks import check_number
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
