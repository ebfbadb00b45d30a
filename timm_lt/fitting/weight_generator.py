"""The generator of few-shot learning without forgetting: class weights out of features."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightGenerator(nn.Module):
    """Generates the weight of a class from some of its features and the base classes' weights.

    With unit features ``z_i`` of the class, unit weights ``w_b`` of the base classes and keys
    ``k_b``, all learned but the features:

        ``w' = phi_avg ⊙ mean_i z_i
        + phi_att ⊙ mean_i sum_b softmax_b(gamma cos(phi_q z_i, k_b)) w_b``.

    It starts with ``phi_avg = phi_att = 1``, ``phi_q = I`` with noise of 0.001, and keys of
    variance 2 / D, as the authors' code does.

    Args:
        num_features: D.
        num_base: Base classes, K.
        gamma: Sharpness of the attention at the start.
        random: Draws the keys and the noise.

    References:
        Gidaris and Komodakis, CVPR 2018, section 3.2, https://arxiv.org/abs/1804.09458
    """

    def __init__(
        self, num_features: int, num_base: int, *, gamma: float, random: torch.Generator
    ) -> None:
        super().__init__()
        noise = 1e-3 * torch.randn(num_features, num_features, generator=random)
        keys = torch.randn(num_base, num_features, generator=random) * math.sqrt(2 / num_features)
        self.phi_avg = nn.Parameter(torch.ones(num_features))
        self.phi_att = nn.Parameter(torch.ones(num_features))
        self.phi_q = nn.Parameter(torch.eye(num_features) + noise)
        self.keys = nn.Parameter(keys)
        self.gamma = nn.Parameter(torch.tensor(float(gamma)))

    def attend(self, features: Tensor, base: Tensor) -> Tensor:
        """Returns the attention (..., B) of unit features (..., D) to B of the base classes.

        Args:
            features: Unit features.
            base: Which base classes, (B,) integers below K.
        """
        queries = F.normalize(features @ self.phi_q.T, dim=-1)
        similarity = queries @ F.normalize(self.keys[base], dim=1).T
        return (self.gamma * similarity).softmax(dim=-1)

    def combine(self, mean: Tensor, attention: Tensor, weight: Tensor) -> Tensor:
        """Returns generated weights (M, D).

        Args:
            mean: Mean unit feature of each class, (M, D).
            attention: Mean attention of its features, (M, B).
            weight: Weights of the base classes, of any length, (B, D).
        """
        return self.phi_avg * mean + self.phi_att * (attention @ F.normalize(weight, dim=1))

    def forward(self, features: Tensor, weight: Tensor, base: Tensor) -> Tensor:
        """Returns the weights (M, D) of M classes with E unit features each, (M, E, D)."""
        attention = self.attend(features, base).mean(dim=1)
        return self.combine(features.mean(dim=1), attention, weight)
