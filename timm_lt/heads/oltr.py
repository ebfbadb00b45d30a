"""The head of OLTR: a feature, enriched from a memory of centroids, and a cosine classifier."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_lt.heads.base import Head, register_head
from timm_lt.utils.checks import UsageError, check_choice, check_number

Squash = Literal["squared", "linear"]


@register_head("oltr")
class OLTRHead(Head):
    """Dynamic meta-embedding v of a feature x, and the cosines of v with the class weights.

    The memory M holds a centroid c_j of each class, (C, D), and::

        v_memory = softmax(H x + h) M            what the memory has to say
        e        = tanh(S x + s)                 how much of it is let in, by feature
        v        = reach / min_j ‖x − c_j‖ · (x + e ⊙ v_memory)
        z_c      = scale · w_c·v' / ‖w_c‖        v' is v squashed to a length below 1

    A feature far from all centroids gets a short v and so a flat softmax: that is what open-set
    rejection thresholds (:class:`timm_lt.metrics.OpenSetMetrics`). The centroids are constants
    here: nothing is learned through them, as in the authors' code.

    Args:
        *size: in_features D, out_features C, bias, device and dtype, as for ``nn.Linear``.
        scale: Factor of the cosines, > 0: the inverse temperature of the softmax.
        reach: Numerator of the reachability, > 0; 1 in the paper, 10 in the authors' code.
        squash: ``"squared"`` gives v the length ``‖v‖² / (1 + ‖v‖²)``, as in the paper;
            ``"linear"`` gives it ``‖v‖ / (1 + ‖v‖)``, as in the authors' code.

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019, section 3.1,
        https://arxiv.org/abs/1904.05160
    """

    fitted_state = (
        "centroids",
        "memory_weight",
        "memory_bias",
        "selector_weight",
        "selector_bias",
    )
    own_state = ("weight", *fitted_state)
    fixed_options = ("reach", "squash")
    centroids: Tensor
    memory_weight: Tensor
    memory_bias: Tensor
    selector_weight: Tensor
    selector_bias: Tensor

    def __init__(
        self,
        *size: Any,
        scale: float = 16.0,
        reach: float = 1.0,
        squash: Squash = "squared",
    ) -> None:
        super().__init__(*size)
        self.scale = check_number("scale", scale, "(0, inf)")
        self.reach = check_number("reach", reach, "(0, inf)")
        check_choice("squash of head 'oltr'", squash, get_args(Squash))
        self.squash: str = squash
        width, num_classes = self.in_features, self.out_features
        self._set_unfitted("centroids", num_classes, width)
        self._set_unfitted("memory_weight", num_classes, width, learned=True)
        self._set_unfitted("memory_bias", num_classes, learned=True)
        self._set_unfitted("selector_weight", width, width, learned=True)
        self._set_unfitted("selector_bias", width, learned=True)
        self._freeze(self.bias)

    @property
    def uses_bias(self) -> bool:
        """Whether the logits depend on ``bias``: never."""
        return False

    def options(self) -> dict[str, Any]:
        """Returns scale, reach and squash."""
        return {"scale": self.scale, "reach": self.reach, "squash": self.squash}

    def transform(self, features: Tensor) -> Tensor:
        """Maps features (..., D) to their squashed meta-embeddings (..., D)."""
        enriched = features + self.selector(features) * self.memory(features)
        # v is enriched · reach / distance. Without that quotient, which is infinite at a centroid,
        # v' = enriched · ‖enriched‖^(p − 1) / (far^p + ‖enriched‖^p), p = 1 or 2.
        far = self.distance(features) / self.reach
        norm = torch.linalg.vector_norm(enriched, dim=-1, keepdim=True)
        squashed: Tensor
        if self.squash == "linear":
            squashed = enriched / (far + norm).clamp_min(1e-12)
        else:
            # A product of numbers below 1: the squares could overflow in half precision.
            both = torch.hypot(far, norm).clamp_min(1e-12)
            squashed = (enriched / both) * (norm / both)
        return squashed

    def memory(self, features: Tensor) -> Tensor:
        """Returns v_memory (..., D), a convex combination of the centroids."""
        shares = F.linear(features, self.memory_weight, self.memory_bias).softmax(dim=-1)
        return shares @ self.centroids

    def selector(self, features: Tensor) -> Tensor:
        """Returns e (..., D), in (−1, 1)."""
        return F.linear(features, self.selector_weight, self.selector_bias).tanh()

    def distance(self, features: Tensor) -> Tensor:
        """Returns the distance of features (..., D) to the nearest centroid, (..., 1)."""
        wide = torch.promote_types(features.dtype, torch.float32)
        x, c = features.detach().to(wide), self.centroids.to(wide)
        # By products, without an (N, C, D) tensor; then the distance itself, without cancellation.
        nearest = (c.square().sum(dim=1) / 2 - x @ c.T).argmin(dim=-1)
        there = self.centroids[nearest]
        distance: Tensor = torch.linalg.vector_norm(features - there, dim=-1, keepdim=True)
        return distance

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Returns the class weights at length ``scale``, (C, D), and no bias."""
        return F.normalize(self.weight, dim=1) * self.scale, None

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        raise UsageError(
            "an oltr head is not linear in the features, to which it adds what its memory says of "
            "them, and cannot be folded; ship the model with timm_lt, or fold another head"
        )
