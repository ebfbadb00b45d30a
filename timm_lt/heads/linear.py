"""Heads that are linear in the raw features, and the lengths of their training."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timm_lt.heads.base import Head, register_head
from timm_lt.utils.checks import UsageError, check_flag, check_number
from timm_lt.utils.longtail import ClassCounts, check_class_counts, check_no_empty_class


@register_head("linear")
class LinearHead(Head):
    """The joint classifier of the representation stage: ``w_c·x + b_c``."""


@register_head("crt")
class CRTHead(Head):
    """A classifier re-trained on class-balanced data over the frozen backbone: ``w_c·x + b_c``.

    References:
        Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR
        2020, section 4.1, https://arxiv.org/abs/1910.09217
    """

    own_state = ("weight", "bias")


@register_head("logit_adjusted")
class LogitAdjustedHead(Head):
    """Post-hoc logit adjustment: ``w_c·x + b_c − tau · log prior_c``.

    In a model that averages several classifiers, each is adjusted; in a model that adds an
    auxiliary one, only the main one is. The logits of the model are adjusted once.

    Args:
        tau: Strength, >= 0; 0 is the joint classifier, 1 removes the training prior.
        class_counts: Training images per class (C,), all >= 1; the prior is their share. None:
            the prior must be loaded from a checkpoint.

    References:
        Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021, equation 9,
        https://arxiv.org/abs/2007.07314
    """

    fitted_state = ("log_prior",)
    log_prior: Tensor

    def __init__(
        self, *size: Any, tau: float = 1.0, class_counts: ClassCounts | None = None
    ) -> None:
        super().__init__(*size)
        self.tau = check_number("tau", tau, "[0, inf)")
        self._set_unfitted("log_prior", self.out_features)
        if class_counts is not None:
            self.log_prior.copy_(log_prior(class_counts, self.out_features))

    def options(self) -> dict[str, Any]:
        """Returns tau; the class counts are in ``log_prior``."""
        return {"tau": self.tau}

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Returns the weight (C, D) and the adjusted bias (C,)."""
        if self.auxiliary:
            return self.weight, self.bias
        shift = -self.tau * self.log_prior
        return self.weight, shift if self.bias is None else self.bias + shift

    def _unfitted_message(self) -> str:
        return (
            "head 'logit_adjusted' needs the class frequencies: pass class_counts=, e.g. "
            "timm_lt.set_head(model, 'logit_adjusted', class_counts=timm_lt.class_counts(labels))"
        )


def log_prior(class_counts: ClassCounts, num_classes: int) -> Tensor:
    """Returns the logarithm of each class's share of the training images, (C,) float32."""
    check_no_empty_class(class_counts)
    counts = check_class_counts(class_counts, num_classes).double()
    return (counts / counts.sum()).log().float()


def seeded_linear(
    in_features: int, num_classes: int, *, bias: bool = True, seed: int = 0
) -> nn.Linear:
    """Returns a new classifier, uniform in ±1/√D as ``nn.Linear``, from a generator of its own."""
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, in_features, num_classes, bias)
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(in_features)
    for parameter in linear.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return linear


@torch.no_grad()
def limit_norms(classifier: nn.Linear, max_norm: float) -> None:
    """Limits the norm of each class's weights in place: ``w_c ← w_c · min(1, max_norm / ‖w_c‖)``.

    References:
        Alshammari et al., Long-Tailed Recognition via Weight Balancing, CVPR 2022, section 3.3,
        https://arxiv.org/abs/2203.14197
    """
    classifier.weight.renorm_(2, 0, max_norm)


@register_head("tau_norm")
class TauNormHead(Head):
    """Tau-normalised classifier: ``w_c / ‖w_c‖^tau · x``.

    ``tau=0`` is the joint classifier without its bias, ``tau=1`` gives every class the same norm.
    The logits of a class with a weight of zeros stay 0.

    Args:
        tau: Strength of the normalisation, >= 0.
        keep_bias: Add the bias of the joint classifier, as BagofTricks-LT does; the paper's code
            drops it.

    References:
        Kang et al., ICLR 2020, section 4.2, equation 3, https://arxiv.org/abs/1910.09217
    """

    def __init__(self, *size: Any, tau: float = 1.0, keep_bias: bool = False) -> None:
        super().__init__(*size)
        self.tau = check_number("tau", tau, "[0, inf)")
        self.keep_bias = self.uses_bias = check_flag("keep_bias", keep_bias)
        if not self.keep_bias:
            self._freeze(self.bias)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Returns the normalised weight (C, D) and the bias, if kept."""
        weight = self.weight / nonzero_norm(self.weight).pow(self.tau)
        return weight, self.bias if self.keep_bias else None


def nonzero_norm(weight: Tensor) -> Tensor:
    """Returns the norm of each row of a weight (C, D) as (C, 1), and 1 for a row of zeros."""
    norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    return torch.where(norm > 0, norm, 1.0)


@register_head("lws")
class LWSHead(Head):
    """Learnable weight scaling: ``scale_c · (w_c·x + b_c)`` with weight and bias frozen.

    Args:
        scale_bias: Scale the bias too, as the paper's code does.

    References:
        Kang et al., ICLR 2020, section 4.2, equation 4, https://arxiv.org/abs/1910.09217
    """

    fitted_state = ("scale",)
    own_state = ("scale",)
    fixed_options = ("scale_bias",)
    scale: nn.Parameter

    def __init__(self, *size: Any, scale_bias: bool = True) -> None:
        super().__init__(*size)
        self.scale_bias = check_flag("scale_bias", scale_bias)
        self._set_unfitted("scale", self.out_features, learned=True)
        self._freeze(self.weight, self.bias)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Returns the scaled weight (C, D) and bias (C,)."""
        weight = self.weight * self.scale.unsqueeze(1)
        if self.bias is None or not self.scale_bias:
            return weight, self.bias
        return weight, self.bias * self.scale


# Rows or images per update.
BATCH_SIZE = 512


@dataclass(frozen=True)
class TrainingLength:
    """Default length of the training of a head by SGD: epochs of the reference code, if enough."""

    epochs: int
    min_updates: int

    def updates(
        self, images: int, batch_size: int, epochs: int | None = None, steps: int | None = None
    ) -> int:
        """Returns the number of updates; ``epochs`` and ``steps`` override the default length.

        >>> CRT_LENGTH.updates(115_846, 512), CRT_LENGTH.updates(10_847, 512)
        (2260, 1000)
        >>> CRT_LENGTH.updates(10_847, batch_size=128, epochs=2)
        168
        """
        if steps is not None and epochs is not None:
            raise UsageError("steps and epochs exclude each other; give one of them")
        if steps is not None:
            return steps
        per_epoch = max(images // batch_size, 1)
        if epochs is not None:
            return epochs * per_epoch
        return max(self.epochs * per_epoch, self.min_updates)


CRT_LENGTH, LWS_LENGTH = TrainingLength(10, 1000), TrainingLength(5, 500)
# Fewer than the 60 epochs of the paper, which train the backbone too: on frozen features more
# epochs help many-shot classes at the cost of the others (docs/choose-a-head.md has figures).
OLTR_LENGTH, OLTR_BATCH_SIZE = TrainingLength(2, 150), 128
