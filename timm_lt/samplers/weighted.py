"""Samplers that draw rare classes more often than frequent ones, or by effective numbers."""

import torch
from torch import Tensor

from timm_lt.samplers.balanced import power_probabilities
from timm_lt.samplers.base import ClassSampler
from timm_lt.samplers.factory import register_sampler
from timm_lt.utils.checks import check_number
from timm_lt.utils.longtail import Labels


@register_sampler("reversed")
class ReversedSampler(ClassSampler):
    """Draws rare classes most often: ``p_j = w_j / sum_k w_k`` with ``w_j = n_max / n_j``.

    The sampler of the re-balancing branch of BBN. Unlike there, the images of a class are drawn in
    cycles and not independently.

    References:
        Zhou et al., BBN: Bilateral-Branch Network with Cumulative Learning for Long-Tailed Visual
        Recognition, CVPR 2020, https://arxiv.org/abs/1912.02413 (section 4.2).
    """

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns ``(1 / n_j) / sum_k (1 / n_k)``; n_max cancels."""
        return power_probabilities(self.class_counts, -1.0)


@register_sampler("effective_number")
class EffectiveNumberSampler(ClassSampler):
    """Draws every image by the inverse effective number of its class: ``p_j`` is as ``n_j / E_j``.

    ``E_j = (1 - beta^n_j) / (1 - beta)``, so ``p_j = (n_j / E_j) / sum_k (n_k / E_k)``: the paper
    weighs the loss of each image by ``1 / E_j``, this draws it that often. ``beta`` = 0 is
    instance-balanced (E_j = 1), ``beta`` towards 1 class-balanced (E_j towards n_j).

    Args:
        labels, num_samples, seed, num_classes: As in :class:`ClassSampler`.
        beta: In [0, 1); the paper tries 0.9, 0.99, 0.999 and 0.9999.

    References:
        Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019,
        https://arxiv.org/abs/1901.05555 (equations 2 and 6).
    """

    def __init__(
        self,
        labels: Labels,
        num_samples: int | None = None,
        seed: int = 0,
        num_classes: int | None = None,
        *,
        beta: float,
    ) -> None:
        super().__init__(labels, num_samples, seed, num_classes)
        self.beta = check_number("beta", beta, "[0, 1)")

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns ``n_j / E_j``, normalised."""
        n = self.class_counts.double()
        beta = torch.tensor(self.beta, dtype=torch.float64)
        # 1 - beta^n without its rounding error for beta near 1; 1 - beta cancels.
        inverse = -1 / torch.expm1(n.clamp(min=1) * torch.log(beta))
        weights = n * inverse
        return weights / weights.sum()
