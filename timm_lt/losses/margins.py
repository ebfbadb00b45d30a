"""Losses that shift logits by label: LDAM and seesaw."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_lt.losses.base import (
    ClassLoss,
    Reduction,
    log_complement,
    register_loss,
    required_counts,
)
from timm_lt.utils.checks import UsageError, check_choice, check_number
from timm_lt.utils.longtail import ClassCounts

Logits = Literal["cosine", "scaled"]


@register_loss("ldam")
class LDAMLoss(ClassLoss):
    """LDAM: cross-entropy of ``s (z_j - Delta_y [j = y])``, ``Delta_j = m (n_j / n_min)^(-1/4)``.

    The logits z are cosines (margins need normalised weights and features), so the model needs a
    cosine classifier. The smallest class has margin m.

    - ``logits="cosine"``: the classifier returns z, as ``head="cosine", scale=1.0`` does;
    - ``logits="scaled"``: the classifier returns ``s z``, as ``head="cosine", scale=30.0`` does.
      The loss is the same, and the softmax of the model's output is that of the loss without
      margins.

    :func:`~timm_lt.training.train_representation` refuses a model whose classifier is another.

    Args:
        class_counts: Training images ``n_j`` per class, at least 1 each.
        max_margin: m, at least 0; 0.5 in the paper.
        scale: s, above 0; 30 in the authors' code.
        logits: What the classifier gives.
        reduction: As in :class:`ClassLoss`.

    References:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS
        2019, https://arxiv.org/abs/1906.07413 (equations 12 and 13).
    """

    takes_soft_targets = True
    margins: Tensor

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        *,
        max_margin: float = 0.5,
        scale: float = 30.0,
        logits: Logits = "cosine",
        reduction: Reduction = "mean",
    ) -> None:
        counts = required_counts(self, class_counts)
        super().__init__(counts, reduction=reduction)
        max_margin = check_number("max_margin", max_margin, "[0, inf)")
        self.scale = check_number("scale", scale, "(0, inf)")
        check_choice("logits", logits, get_args(Logits))
        self.logits = logits
        n = counts.double()
        margins = max_margin * (n / n.min()) ** -0.25
        self.register_buffer("margins", margins.float(), persistent=False)

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the cross-entropies (N,) with the margin taken off the label's logit."""
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
        return (targets * per_class).sum(1)

    def check_classifier(self, classifier: nn.Module) -> None:
        """Checks that a classifier gives the logits that the loss takes.

        Raises:
            UsageError: If it is linear, or a cosine classifier of another scale.
        """
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
class SeesawLoss(ClassLoss):
    """Seesaw: ``l = -log(e^{z_y} / (e^{z_y} + sum_{j != y} M_yj K_yj e^{z_j}))``.

    The mitigation ``M_yj = min(1, n_j / n_y)^p`` makes images of a frequent class push a rarer one
    down less; the compensation ``K_yj = max(1, p_j / p_y)^q`` restores the push where the image is
    mistaken for it. ``p_j`` is the detached softmax. With ``mitigation`` = p = 0 and
    ``compensation`` = q = 0 this is cross-entropy.

    The paper accumulates ``n_j`` during training; here they are the class counts, so that resumed
    and multi-process runs are the same. Soft targets are not supported.

    Args:
        class_counts: Training images ``n_j`` per class, at least 1 each.
        mitigation: p, at least 0.
        compensation: q, at least 0.
        min_probability: ``p_y`` is at least this in K, in [0, 1): 0 in the paper, 0.01 in the code.
        reduction: As in :class:`ClassLoss`.

    References:
        Wang et al., Seesaw Loss for Long-Tailed Instance Segmentation, CVPR 2021,
        https://arxiv.org/abs/2008.10032 (equations 4 to 7; its classifier is a cosine one).
    """

    log_counts: Tensor

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        *,
        mitigation: float = 0.8,
        compensation: float = 2.0,
        min_probability: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        counts = required_counts(self, class_counts)
        super().__init__(counts, reduction=reduction)
        self.mitigation = check_number("mitigation", mitigation, "[0, inf)")
        self.compensation = check_number("compensation", compensation, "[0, inf)")
        self.min_probability = check_number("min_probability", min_probability, "[0, 1)")
        log_counts = counts.double().log()
        self.register_buffer("log_counts", log_counts.float(), persistent=False)

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
