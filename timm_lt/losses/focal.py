"""The focal loss."""

from typing import Literal, get_args

from torch import Tensor

from timm_lt.losses.base import ClassLoss, Reduction
from timm_lt.losses.factory import register_loss
from timm_lt.losses.terms import sigmoid_focal, softmax_focal
from timm_lt.losses.weighted import sigmoid_bias
from timm_lt.utils.checks import check_choice, check_number
from timm_lt.utils.longtail import ClassCounts

FocalForm = Literal["softmax", "sigmoid"]


@register_loss("focal")
class FocalLoss(ClassLoss):
    """Focal loss: ``l = -(1 - p_t)^gamma log p_t``; at gamma = 0 the plain loss.

    With ``form="softmax"`` ``p_t`` is the softmax of the label. With ``form="sigmoid"``, the
    paper's detector, every class is a binary problem: l is summed over the classes, where ``p_t``
    is sigmoid(z_j) for the label and 1 - sigmoid(z_j) for the others. For its bias see
    ``class_balanced``.

    Args:
        class_counts: As in :class:`ClassLoss`, like reduction; not used.
        gamma: How little the images count that are right already, at least 0.
        form: ``"softmax"``, which long-tail papers compare with, or ``"sigmoid"``.

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
        self.form = form

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the focal losses (N,)."""
        focal = sigmoid_focal if self.form == "sigmoid" else softmax_focal
        return focal(logits, targets, self.gamma)

    def initial_bias(self, num_classes: int) -> float | None:
        """Returns ``-log(C - 1)`` for a sigmoid, so that every class starts at 1 / C."""
        return sigmoid_bias(num_classes) if self.form == "sigmoid" else None
