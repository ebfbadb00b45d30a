"""Heads that are linear in the raw features: the joint classifier, cRT and logit adjustment."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from timm_lt.heads.base import Head
from timm_lt.heads.factory import register_head
from timm_lt.utils.checks import UsageError, check_number
from timm_lt.utils.longtail import ClassCounts, check_class_counts


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

    Of a model with several classifiers, each is adjusted where the model averages them, and only
    the main one where it adds an auxiliary one: the model's logits are adjusted once.

    Args:
        *size: in_features D, out_features C, bias, device and dtype, as for ``nn.Linear``.
        tau: Strength, >= 0; 0 is the joint classifier, 1 removes the training prior.
        class_counts: Training images per class (C,), all >= 1; the prior is their share. Without
            them the head cannot be used until a checkpoint that has them is loaded.

    References:
        Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021, equation 9,
        https://arxiv.org/abs/2007.07314
    """

    fitted_state = ("log_prior",)
    log_prior: Tensor

    def __init__(
        self,
        *size: Any,
        tau: float = 1.0,
        class_counts: ClassCounts | None = None,
    ) -> None:
        super().__init__(*size)
        self.tau = check_number("tau", tau, "[0, inf)")
        self._set_unfitted("log_prior", self.out_features)
        if class_counts is not None:
            self.log_prior.copy_(log_prior(class_counts, self.out_features))

    def options(self) -> dict[str, Any]:
        """Returns tau; the class counts live on as ``log_prior``."""
        return {"tau": self.tau}

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Returns the weight (C, D) and the adjusted bias (C,)."""
        if self.auxiliary:
            return self.weight, self.bias
        shift = -self.tau * self.log_prior
        return self.weight, shift if self.bias is None else self.bias + shift

    def _unfitted_message(self) -> str:
        return (
            "head 'logit_adjusted' does not know the class frequencies: pass class_counts=, e.g. "
            "timm_lt.set_head(model, 'logit_adjusted', class_counts=timm_lt.class_counts(labels))"
        )


def log_prior(class_counts: ClassCounts, num_classes: int) -> Tensor:
    """Returns the logarithm of each class's share of the training images, (C,) float32.

    Raises:
        UsageError: If the number of counts is not ``num_classes`` or a count is below 1.

    >>> log_prior([3, 1], 2).exp()
    tensor([0.7500, 0.2500])
    """
    counts = check_class_counts(class_counts, num_classes).double()
    if counts.shape != (num_classes,):
        raise UsageError(
            f"class_counts has shape {tuple(counts.shape)}, the classifier needs ({num_classes},)"
        )
    empty = torch.nonzero(counts < 1).flatten().tolist()
    if empty:
        raise UsageError(
            f"class_counts must be >= 1 for every class; class {empty[0]} has {counts[empty[0]]:g}"
        )
    return (counts / counts.sum()).log().float()


def seeded_linear(
    in_features: int, num_classes: int, *, bias: bool = True, seed: int = 0
) -> nn.Linear:
    """Returns a fresh classifier with the distribution of a new ``nn.Linear``, from a seed alone.

    Args:
        in_features: Width D of the features.
        num_classes: Number of classes C.
        bias: Whether it has a bias.
        seed: A non-negative integer; the global random state is neither read nor moved.

    Returns:
        Weight (C, D) and bias (C,), uniform in ±1/√D.

    >>> bool(seeded_linear(4, 9, seed=1).weight.abs().max() <= 0.5)
    True
    """
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, in_features, num_classes, bias)
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(in_features)
    for parameter in linear.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return linear


@torch.no_grad()
def limit_norms(classifier: nn.Linear, max_norm: float) -> None:
    """Shortens, in place, each class's weights that are longer than a limit (MaxNorm).

    ``w_c ← w_c · min(1, max_norm / ‖w_c‖)``: the projection onto the balls ``‖w_c‖ <= max_norm``.
    The bias stays.

    Args:
        classifier: Weight (C, D).
        max_norm: The limit, > 0.

    References:
        Alshammari, Wang, Ramanan, Kong. Long-tailed recognition via weight balancing. CVPR 2022,
        section 3.3. https://arxiv.org/abs/2203.14197

    >>> classifier = seeded_linear(2, 2)
    >>> _ = classifier.weight.data.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.5]]))
    >>> limit_norms(classifier, 1.0)
    >>> classifier.weight.tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.5]]
    """
    classifier.weight.renorm_(2, 0, max_norm)
