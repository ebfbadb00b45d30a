"""Heads that compare directions or distances: nearest class mean and cosine classifiers."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.heads.base import Head, check_flag, register_head
from timm_lt.utils.checks import UsageError, check_choice, check_number

Metric = Literal["cosine", "euclidean"]
FeatureSpace = Literal["raw", "l2", "centered_l2"]


@register_head("ncm")
class NCMHead(Head):
    """Nearest class mean: ``weight`` holds the class means m_c of the training features.

    With ``metric="cosine"`` the logit is ``x·m_c / (‖x‖ ‖m_c‖)``. With ``metric="euclidean"`` it is
    ``2 x·m_c − ‖m_c‖²``, which differs from ``−‖x − m_c‖²`` by a term that is the same for every
    class.

    Args:
        *size: in_features D, out_features C, bias, device and dtype, as for ``nn.Linear``.
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
    feature_mean: Tensor

    def __init__(
        self,
        *size: Any,
        metric: Metric = "cosine",
        features: FeatureSpace = "raw",
    ) -> None:
        super().__init__(*size)
        check_choice("metric of head 'ncm'", metric, get_args(Metric))
        check_choice("features of head 'ncm'", features, get_args(FeatureSpace))
        self.metric: str = metric
        self.features: str = features
        self._set_unfitted("feature_mean", self.in_features)
        self._freeze(self.weight, self.bias)

    @property
    def uses_bias(self) -> bool:
        """Whether the logits depend on ``bias``: never, the class means are all there is."""
        return False

    def options(self) -> dict[str, Any]:
        """Returns metric and features."""
        return {"metric": self.metric, "features": self.features}

    def feature_space(self, features: Tensor) -> Tensor:
        """Maps raw features (..., D) to the space (..., D) in which the class means are taken."""
        if self.features == "raw":
            return features
        if self.features == "l2":
            return F.normalize(features, dim=-1)
        centered = features - self.feature_mean
        norm = torch.linalg.vector_norm(centered, dim=-1, keepdim=True).clamp_min(1e-12)
        # In place where no gradient needs the operand: a third of the time.
        return centered / norm if torch.is_grad_enabled() else centered.div_(norm)

    def transform(self, features: Tensor) -> Tensor:
        """Maps raw features (..., D) to those that are compared with the class means."""
        if self.metric == "cosine" and self.features == "raw":
            return F.normalize(features, dim=-1)
        # In the other spaces features have unit length, whichever the metric is.
        return self.feature_space(features)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Returns (m_c / ‖m_c‖, none) for cosine and (2 m_c, −‖m_c‖²) for Euclidean."""
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


@register_head("cosine")
class CosineHead(Head):
    """Cosine classifier: ``scale · w_c·x / (‖w_c‖ ‖x‖)``.

    Args:
        *size: in_features D, out_features C, bias, device and dtype, as for ``nn.Linear``.
        scale: Factor of the cosines, > 0: the inverse temperature of the softmax.
        learn_scale: Train the factor with the weights.

    References:
        Gidaris and Komodakis, Dynamic Few-Shot Visual Learning without Forgetting, CVPR 2018,
        https://arxiv.org/abs/1804.09458
    """

    own_state = ("weight",)

    def __init__(
        self,
        *size: Any,
        scale: float = 16.0,
        learn_scale: bool = False,
    ) -> None:
        super().__init__(*size)
        value = check_number("scale", scale, "(0, inf)")
        self.learn_scale = check_flag("learn_scale", learn_scale)
        self._first_scale = value
        start = self.weight.new_full((), value)
        self.scale = nn.Parameter(start, requires_grad=self.learn_scale)
        self._freeze(self.bias)

    @property
    def uses_bias(self) -> bool:
        """Whether the logits depend on ``bias``: never."""
        return False

    def options(self) -> dict[str, Any]:
        """Returns the present scale and learn_scale."""
        scale = self._first_scale if self.scale.is_meta else float(self.scale.detach())
        return {"scale": scale, "learn_scale": self.learn_scale}

    def transform(self, features: Tensor) -> Tensor:
        """Scales features (..., D) to unit length."""
        return F.normalize(features, dim=-1)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Returns the class weights at length ``scale``, (C, D), and no bias."""
        return F.normalize(self.weight, dim=1) * self.scale, None


@register_head("fslwf")
class FSLwFHead(Head):
    """Few-shot learning without forgetting: ``scale · w_c·x / (‖w_c‖ ‖x‖)``, w_c partly generated.

    The weights of the base classes are trained, those of the novel ones are made of their training
    features and the base classes' weights. What the scalar bias of the paper adds is the same for
    every class, so it is left out.

    Args:
        *size: in_features D, out_features C, bias, device and dtype, as for ``nn.Linear``.

    References:
        Gidaris and Komodakis, Dynamic Few-Shot Visual Learning without Forgetting, CVPR 2018,
        https://arxiv.org/abs/1804.09458
    """

    fitted_state = ("scale",)
    own_state = ("weight", "scale")
    scale: Tensor

    def __init__(self, *size: Any) -> None:
        super().__init__(*size)
        self._set_unfitted("scale", 1)
        self._freeze(self.weight, self.bias)

    @property
    def uses_bias(self) -> bool:
        """Whether the logits depend on ``bias``: never."""
        return False

    def transform(self, features: Tensor) -> Tensor:
        """Scales features (..., D) to unit length."""
        return F.normalize(features, dim=-1)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Returns the class weights at length ``scale``, (C, D), and no bias."""
        return F.normalize(self.weight, dim=1) * self.scale, None
