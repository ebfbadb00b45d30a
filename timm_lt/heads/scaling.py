"""Heads that rescale the joint classifier class by class: tau-normalised, learned scales."""

from typing import Any

import torch
from torch import Tensor, nn

from timm_lt.heads.base import Head
from timm_lt.heads.factory import check_flag, register_head
from timm_lt.utils.checks import check_number


@register_head("tau_norm")
class TauNormHead(Head):
    """Tau-normalised classifier: ``w_c / ‖w_c‖^tau · x``.

    ``tau=0`` is the joint classifier without its bias, ``tau=1`` gives every class the same norm. A
    class whose weight is all zeros keeps zero logits.

    Args:
        *size: in_features D, out_features C, bias, device and dtype, as for ``nn.Linear``.
        tau: Strength of the normalisation, >= 0.
        keep_bias: Add the bias of the joint classifier unchanged (as BagofTricks-LT does); the
            paper's code drops it.

    References:
        Kang et al., ICLR 2020, section 4.2, equation 3, https://arxiv.org/abs/1910.09217
    """

    def __init__(
        self,
        *size: Any,
        tau: float = 1.0,
        keep_bias: bool = False,
    ) -> None:
        super().__init__(*size)
        self.tau = check_number("tau", tau, "[0, inf)")
        self.keep_bias = check_flag("keep_bias", keep_bias)
        if not self.keep_bias:
            self._freeze(self.bias)

    @property
    def uses_bias(self) -> bool:
        """Whether the logits depend on ``bias``: only if it is kept."""
        return self.keep_bias

    def options(self) -> dict[str, Any]:
        """Returns tau and keep_bias."""
        return {"tau": self.tau, "keep_bias": self.keep_bias}

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Returns the normalised weight (C, D) and the bias, if kept."""
        weight = self.weight / nonzero_norm(self.weight).pow(self.tau)
        return weight, self.bias if self.keep_bias else None


def nonzero_norm(weight: Tensor) -> Tensor:
    """Returns the norm of each row of a weight (C, D) as (C, 1), and 1 for a row of zeros.

    A class that never got a gradient may have such a row, which stays zero at every tau.

    >>> nonzero_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[5.0], [1.0]]
    """
    norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    return torch.where(norm > 0, norm, 1.0)


@register_head("lws")
class LWSHead(Head):
    """Learnable weight scaling: ``scale_c · (w_c·x + b_c)`` with weight and bias frozen.

    Args:
        *size: in_features D, out_features C, bias, device and dtype, as for ``nn.Linear``.
        scale_bias: Scale the bias too, as the paper's code does; otherwise ``scale_c · w_c·x +
            b_c``.

    References:
        Kang et al., ICLR 2020, section 4.2, equation 4, https://arxiv.org/abs/1910.09217
    """

    fitted_state = ("scale",)
    own_state = ("scale",)
    fixed_options = ("scale_bias",)
    scale: nn.Parameter

    def __init__(
        self,
        *size: Any,
        scale_bias: bool = True,
    ) -> None:
        super().__init__(*size)
        self.scale_bias = check_flag("scale_bias", scale_bias)
        self._set_unfitted("scale", self.out_features, learned=True)
        self._freeze(self.weight, self.bias)

    def options(self) -> dict[str, Any]:
        """Returns scale_bias."""
        return {"scale_bias": self.scale_bias}

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Returns the scaled weight (C, D) and bias (C,)."""
        weight = self.weight * self.scale.unsqueeze(1)
        if self.bias is None or not self.scale_bias:
            return weight, self.bias
        return weight, self.bias * self.scale
