"""Heads that compare directions or distances: nearest class mean, cosine classifiers and OLTR."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.heads.base import Head, register_head
from timm_lt.utils.checks import UsageError, check_choice, check_flag, check_number

Metric = Literal["cosine", "euclidean"]
FeatureSpace = Literal["raw", "l2", "centered_l2"]
Squash = Literal["squared", "linear"]


@register_head("ncm")
class NCMHead(Head):
    """Nearest class mean: ``weight`` holds the class means m_c of the training features.

    With ``metric="cosine"`` the logit is ``x·m_c / (‖x‖ ‖m_c‖)``. With ``metric="euclidean"`` it is
    ``2 x·m_c − ‖m_c‖²``, which differs from ``−‖x − m_c‖²`` by the same term for every class.

    Args:
        metric: ``"cosine"`` or ``"euclidean"``.
        features: Space of the features: ``"raw"``, ``"l2"`` (unit length) or ``"centered_l2"``
            (training mean subtracted, then unit length). The means are those of the transformed
            features, not normalised again.

    References:
        Kang et al., ICLR 2020, section 4.1, https://arxiv.org/abs/1910.09217; ``centered_l2`` with
        ``euclidean`` is the default of its code, after Wang et al., SimpleShot, 2019,
        https://arxiv.org/abs/1911.04623
    """

    fitted_state = ("feature_mean",)
    own_state = ("weight", "feature_mean")
    fixed_options = ("features",)
    uses_bias = False
    feature_mean: Tensor

    def __init__(
        self, *size: Any, metric: Metric = "cosine", features: FeatureSpace = "raw"
    ) -> None:
        super().__init__(*size)
        check_choice("metric of head 'ncm'", metric, get_args(Metric))
        check_choice("features of head 'ncm'", features, get_args(FeatureSpace))
        # Plain strings, for torch.jit.script.
        self.metric: str = metric
        self.features: str = features
        self._set_unfitted("feature_mean", self.in_features)
        self._freeze(self.weight)

    def transform(self, features: Tensor) -> Tensor:
        """Maps raw features (..., D) to those that are compared with the class means."""
        if self.features == "raw" and self.metric == "euclidean":
            return features
        if self.features == "centered_l2":
            features = features - self.feature_mean
        return F.normalize(features, dim=-1)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Returns (m_c / ‖m_c‖, None) for cosine and (2 m_c, −‖m_c‖²) for Euclidean."""
        if self.metric == "cosine":
            return F.normalize(self.weight, dim=1), None
        return 2 * self.weight, -self.weight.square().sum(dim=1)

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.effective()
        if self.metric == "euclidean" and self.features != "raw":
            raise UsageError(
                f"an ncm head with features={self.features!r} and metric='euclidean' is not linear "
                "in the features and cannot be folded; fit it with metric='cosine' or with "
                "features='raw'"
            )
        if self.features == "centered_l2":
            # argmax of m·(x − mean) / ‖x − mean‖ is argmax of m·x − m·mean.
            bias = -weight @ self.feature_mean
        return weight, bias


class _ScaledCosineHead(Head):
    """``scale · w_c·x / (‖w_c‖ ‖x‖)``."""

    uses_bias = False
    scale: Any

    def transform(self, features: Tensor) -> Tensor:
        """Scales features (..., D) to unit length."""
        return F.normalize(features, dim=-1)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Returns the class weights with length ``scale``, (C, D), and no bias."""
        return F.normalize(self.weight, dim=1) * self.scale, None


@register_head("cosine")
class CosineHead(_ScaledCosineHead):
    """Cosine classifier: ``scale · w_c·x / (‖w_c‖ ‖x‖)``.

    Args:
        scale: Factor of the cosines, > 0: the inverse temperature of the softmax.
        learn_scale: Train the factor with the weights.

    References:
        Gidaris and Komodakis, Dynamic Few-Shot Visual Learning without Forgetting, CVPR 2018,
        https://arxiv.org/abs/1804.09458
    """

    own_state = ("weight",)

    def __init__(self, *size: Any, scale: float = 16.0, learn_scale: bool = False) -> None:
        super().__init__(*size)
        self._first_scale = check_number("scale", scale, "(0, inf)")
        self.learn_scale = check_flag("learn_scale", learn_scale)
        start = self.weight.new_full((), self._first_scale)
        self.scale = nn.Parameter(start, requires_grad=self.learn_scale)

    def options(self) -> dict[str, Any]:
        """Returns the present scale and learn_scale."""
        scale = self._first_scale if self.scale.is_meta else float(self.scale.detach())
        return {"scale": scale, "learn_scale": self.learn_scale}


@register_head("fslwf")
class FSLwFHead(_ScaledCosineHead):
    """Few-shot learning without forgetting: ``scale · w_c·x / (‖w_c‖ ‖x‖)``, w_c partly generated.

    The weights of the base classes are trained. Those of the novel classes are generated from their
    training features and the base weights. The scalar bias of the paper, which is the same for
    every class, is omitted.

    References:
        Gidaris and Komodakis, Dynamic Few-Shot Visual Learning without Forgetting, CVPR 2018,
        https://arxiv.org/abs/1804.09458
    """

    fitted_state = ("scale",)
    own_state = ("weight", "scale")

    def __init__(self, *size: Any) -> None:
        super().__init__(*size)
        self._set_unfitted("scale", 1)
        self._freeze(self.weight)


@register_head("oltr")
class OLTRHead(_ScaledCosineHead):
    """Dynamic meta-embedding v of a feature x, and the cosines of v with the class weights.

    The memory M holds a centroid c_j of each class, (C, D), and::

        v_memory = softmax(H x + h) M            mean of the centroids for this feature
        e        = tanh(S x + s)                 selector: weight of the memory, by dimension
        v        = reach / min_j ‖x − c_j‖ · (x + e ⊙ v_memory)
        z_c      = scale · w_c·v' / ‖w_c‖        v' is v squashed to a length below 1

    A feature far from all centroids gets a short v and so a flat softmax: that is what open-set
    rejection thresholds (:class:`timm_lt.metrics.OpenSetMetrics`). As in the authors' code, no
    gradient flows through the centroids.

    Args:
        scale: Factor of the cosines, > 0: the inverse temperature of the softmax.
        reach: Numerator of the reachability, > 0; 1 in the paper, 10 in the authors' code.
        squash: ``"squared"`` gives v the length ``‖v‖² / (1 + ‖v‖²)``, as in the paper;
            ``"linear"`` gives it ``‖v‖ / (1 + ‖v‖)``, as in the authors' code.

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019, section 3.1,
        https://arxiv.org/abs/1904.05160
    """

    fitted_state = ("centroids", "memory_weight", "memory_bias", "selector_weight", "selector_bias")
    own_state = ("weight", *fitted_state)
    fixed_options = ("reach", "squash")
    centroids: Tensor
    memory_weight: Tensor
    memory_bias: Tensor
    selector_weight: Tensor
    selector_bias: Tensor

    def __init__(
        self, *size: Any, scale: float = 16.0, reach: float = 1.0, squash: Squash = "squared"
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

    def transform(self, features: Tensor) -> Tensor:
        """Maps features (..., D) to their squashed meta-embeddings (..., D)."""
        shares = F.linear(features, self.memory_weight, self.memory_bias).softmax(dim=-1)
        selector = F.linear(features, self.selector_weight, self.selector_bias).tanh()
        enriched = features + selector * (shares @ self.centroids)
        # v = enriched · reach / distance is infinite at a centroid. Without the quotient,
        # v' = enriched · ‖enriched‖^(p − 1) / (far^p + ‖enriched‖^p), p = 1 or 2.
        far = self.distance(features) / self.reach
        norm: Tensor = torch.linalg.vector_norm(enriched, dim=-1, keepdim=True)
        if self.squash == "linear":
            return enriched / (far + norm).clamp_min(1e-12)
        # A product of numbers below 1: the squares could overflow in half precision.
        both = torch.hypot(far, norm).clamp_min(1e-12)
        return (enriched / both) * (norm / both)

    def distance(self, features: Tensor) -> Tensor:
        """Returns the distance of features (..., D) to the nearest centroid, (..., 1)."""
        wide = torch.promote_types(features.dtype, torch.float32)
        x, c = features.detach().to(wide), self.centroids.to(wide)
        # The nearest one by products, without an (N, C, D) tensor; its distance directly, since the
        # products cancel.
        nearest = (c.square().sum(dim=1) / 2 - x @ c.T).argmin(dim=-1)
        offset = features - self.centroids[nearest]
        distance: Tensor = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
        return distance

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        raise UsageError(
            "an oltr head is not linear in the features, since it adds its memory to them, and "
            "cannot be folded; ship the model with timm_lt, or fold another head"
        )
