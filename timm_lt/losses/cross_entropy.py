"""Cross-entropy: plain, with smoothed targets, or with logits shifted by class size."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_lt.losses.base import (
    BelowOne,
    ClassLoss,
    NonNegative,
    log_complement,
    mean_over_labels,
    one_hot,
    register_loss,
    required_counts,
)
from timm_lt.utils.checks import UsageError, check_number
from timm_lt.utils.longtail import ClassCounts


@register_loss("cross_entropy")
@dataclass(eq=False, repr=False, kw_only=True)
class CrossEntropyLoss(ClassLoss):
    """Cross-entropy: ``l = -sum_j t_j log softmax_j(z)``, ``t_j = (1 - s) [j = y] + s / C``.

    With label smoothing s = 0 this is ``-log softmax_y(z)``.

    Args:
        smoothing: s, in [0, 1).

    References:
        Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016,
        https://arxiv.org/abs/1512.00567 (label smoothing).
    """

    takes_soft_targets = True

    smoothing: BelowOne = 0.0

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the smoothed cross-entropies (N,)."""
        return F.cross_entropy(logits, targets, label_smoothing=self.smoothing, reduction="none")


@register_loss("label_aware_smoothing")
@dataclass(eq=False, repr=False, kw_only=True)
class LabelAwareSmoothingLoss(ClassLoss):
    """Label-aware smoothing: ``l = -sum_j q_j log softmax_j(z)``, smoothed by ``eps_y``.

    ``q_y = 1 - eps_y``, and each other class has ``eps_y / (C - 1)``. With ``r_j = (n_j - n_min) /
    (n_max - n_min)``, ``eps_j`` goes from ``tail`` for the smallest class to ``head`` for the
    largest, ``d = head - tail``:

    - ``"concave"``: ``tail + d sin(r_j pi / 2)``
    - ``"linear"``: ``tail + d r_j``
    - ``"convex"``: ``head + d sin(3 pi / 2 + r_j pi / 2)``

    With ``head = tail = 0`` this is cross-entropy. If all classes have the same size, all get
    ``head``.

    Args:
        head: eps of the largest class, in [tail, 1).
        tail: eps of the smallest class, in [0, 1).
        shape: Growth of eps with the size.
        spread: ``"others"`` as in the paper, or ``"all"`` as in the authors' code: eps is shared
            among all C classes, so ``q_y = 1 - eps_y + eps_y / C`` (ordinary label smoothing).

    References:
        Zhong et al., Improving Calibration for Long-Tailed Recognition (MiSLAS), CVPR 2021,
        https://arxiv.org/abs/2104.00466 (section 3.2)
    """

    takes_soft_targets = True

    head: float = 0.3
    tail: BelowOne = 0.0
    shape: Literal["concave", "linear", "convex"] = "concave"
    spread: Literal["others", "all"] = "others"

    def __post_init__(self, class_counts: ClassCounts | None) -> None:
        super().__post_init__(class_counts)
        n = required_counts(self, class_counts)
        tail, head = self.tail, check_number("head", self.head, f"[{self.tail:g}, 1)")
        span = n.max() - n.min()
        share = (n - n.min()) / span if span > 0 else torch.ones_like(n)
        smoothing = {
            "concave": tail + (head - tail) * torch.sin(share * math.pi / 2),
            "linear": tail + (head - tail) * share,
            "convex": head + (head - tail) * torch.sin(3 * math.pi / 2 + share * math.pi / 2),
        }[self.shape]
        self.smoothing = nn.Buffer(smoothing.float(), persistent=False)

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the smoothed cross-entropies (N,)."""
        targets = one_hot(targets, logits)
        classes = logits.shape[1]
        moved = targets * self.smoothing
        total = moved.sum(1, keepdim=True)
        to_others = (total - moved) / max(classes - 1, 1)
        spread = total / classes if self.spread == "all" else to_others
        return F.cross_entropy(logits, targets - moved + spread, reduction="none")


@register_loss("balanced_softmax")
@dataclass(eq=False, repr=False, kw_only=True)
class BalancedSoftmaxLoss(ClassLoss):
    """Balanced softmax: ``l = -log(n_y e^{z_y} / sum_j n_j e^{z_j})``.

    Training adds the log frequencies to the logits; without them, at test time, the logits are
    those of a balanced prior.

    References:
        Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020,
        https://arxiv.org/abs/2007.10740
    """

    takes_soft_targets = True
    tau = 1.0

    def __post_init__(self, class_counts: ClassCounts | None) -> None:
        super().__post_init__(class_counts)
        n = required_counts(self, class_counts)
        self.adjustment = nn.Buffer((self.tau * (n / n.sum()).log()).float(), persistent=False)

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the cross-entropies (N,) of the adjusted logits."""
        return F.cross_entropy(logits + self.adjustment, targets, reduction="none")


@register_loss("logit_adjustment")
@dataclass(eq=False, repr=False, kw_only=True)
class LogitAdjustmentLoss(BalancedSoftmaxLoss):
    """Logit adjustment: the cross-entropy of ``z_j + tau log pi_j``, where ``pi_j = n_j / N``.

    At tau = 0 this is plain cross-entropy, at tau = 1 balanced softmax.

    Args:
        tau: Strength of the adjustment, at least 0.

    References:
        Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021,
        https://arxiv.org/abs/2007.07314
    """

    tau: NonNegative = 1.0


@register_loss("ldam")
@dataclass(eq=False, repr=False, kw_only=True)
class LDAMLoss(ClassLoss):
    """LDAM: cross-entropy of ``s (z_j - Delta_y [j = y])``, ``Delta_j = m (n_j / n_min)^(-1/4)``.

    The logits z are cosines (margins need normalised weights and features), so the model needs a
    cosine classifier; training refuses any other. The smallest class has margin m.

    Args:
        max_margin: m, at least 0; 0.5 in the paper.
        scale: s, above 0; 30 in the authors' code.
        logits: ``"cosine"`` if the classifier returns z, as ``head="cosine", scale=1.0`` does;
            ``"scaled"`` if it returns ``s z``, as with ``scale=30.0``. The loss is the same; scaled
            logits have the softmax of the loss without margins.

    References:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS
        2019, https://arxiv.org/abs/1906.07413 (equations 12 and 13).
    """

    takes_soft_targets = True

    max_margin: NonNegative = 0.5
    scale: Annotated[float, "(0, inf)"] = 30.0
    logits: Literal["cosine", "scaled"] = "cosine"

    def __post_init__(self, class_counts: ClassCounts | None) -> None:
        super().__post_init__(class_counts)
        n = required_counts(self, class_counts)
        margins = self.max_margin * (n / n.min()) ** -0.25
        self.margins = nn.Buffer(margins.float(), persistent=False)

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the cross-entropies (N,) with the margin subtracted from the label's logit."""
        logits = logits * self.scale if self.logits == "cosine" else logits
        margins = self.scale * self.margins.to(logits.dtype)
        if targets.ndim == 1:
            labels = targets[:, None]
            reduced = logits.scatter_add(1, labels, -margins[labels])
            return F.cross_entropy(reduced, targets, reduction="none")
        # If class j is the label, the denominator has e^(z_j - m_j) in place of e^(z_j).
        log_p = F.log_softmax(logits, 1)
        label_p = log_p - margins
        per_class = torch.logaddexp(log_complement(log_p), label_p) - label_p
        return mean_over_labels(per_class, targets)

    def check_classifier(self, classifier: nn.Module) -> None:
        """Raises UsageError for a linear classifier, or a cosine classifier of another scale."""
        scale = 1.0 if self.logits == "cosine" else self.scale
        kind = getattr(classifier, "kind", "linear")
        if kind == "cosine":
            options = classifier.options()  # type: ignore[operator]
            # The head stores the scale in float32.
            if math.isclose(options["scale"], scale, rel_tol=1e-6) and not options["learn_scale"]:
                return
            kind = f"cosine ({', '.join(f'{k}: {v}' for k, v in options.items())})"
        raise UsageError(
            f"loss ldam with logits={self.logits!r} needs a cosine classifier, and the model has "
            f"{kind}: give it the options {{head: cosine, scale: {scale}}}"
        )


@register_loss("seesaw")
@dataclass(eq=False, repr=False, kw_only=True)
class SeesawLoss(ClassLoss):
    """Seesaw: ``l = -log(e^{z_y} / (e^{z_y} + sum_{j != y} M_yj K_yj e^{z_j}))``.

    The mitigation ``M_yj = min(1, n_j / n_y)^p`` reduces the push of frequent classes on rarer
    ones. The compensation ``K_yj = max(1, p_j / p_y)^q`` restores it for an image that is mistaken
    for class j. ``p_j`` is the detached softmax. With p = q = 0 this is cross-entropy.

    The paper accumulates ``n_j`` during training; here they are the class counts, so that resumed
    and multi-process runs are the same. Soft targets are not supported.

    Args:
        mitigation: p, at least 0.
        compensation: q, at least 0.
        min_probability: Lower bound of ``p_y`` in K, in [0, 1): 0 in the paper, 0.01 in the code.

    References:
        Wang et al., Seesaw Loss for Long-Tailed Instance Segmentation, CVPR 2021,
        https://arxiv.org/abs/2008.10032 (equations 4 to 7; its classifier is a cosine one).
    """

    mitigation: NonNegative = 0.8
    compensation: NonNegative = 2.0
    min_probability: BelowOne = 0.0

    def __post_init__(self, class_counts: ClassCounts | None) -> None:
        super().__post_init__(class_counts)
        log_counts = required_counts(self, class_counts).log()
        self.log_counts = nn.Buffer(log_counts.float(), persistent=False)

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses (N,)."""
        labels = targets[:, None]
        mitigation = (self.log_counts - self.log_counts[labels]).clamp_max(0)
        log_p = F.log_softmax(logits.detach(), 1)
        label_p = log_p.gather(1, labels)
        if self.min_probability > 0:
            label_p = label_p.clamp_min(float(torch.tensor(self.min_probability).log()))
        # log M and log K, added to the logits; both are 0 for the label.
        compensation = (log_p - label_p).clamp_min(0)
        factors = self.mitigation * mitigation + self.compensation * compensation
        return F.cross_entropy(logits + factors, targets, reduction="none")
