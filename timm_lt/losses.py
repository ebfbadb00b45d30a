"""Losses: what a wrong answer costs, depending on how rare the class is."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_lt.longtail import Labels, check_class_counts, check_no_empty_class
from timm_lt.registry import Registry, UsageError, check_choice, check_number

Reduction = Literal["mean", "sum", "none"]


class ClassLoss(nn.Module):
    """Computes one loss per image from its logits, and reduces them: the base of all losses.

    A loss is defined by :meth:`per_example`. Targets are labels or, for a loss that says so in
    ``takes_soft_targets``, a distribution over the classes, as mixup makes them. It is computed in
    float32 at least, whatever autocast gives: in float16 the log-softmax of confident logits loses
    its tail. Whatever a loss derives from the class counts moves with ``.to(device)`` and stays out
    of the state dict.

    Args:
        class_counts: Training images per class; None if unknown. A loss that needs no counts
            still checks that they are as many as the logits.
        reduction: ``"mean"`` over the batch, ``"sum"``, or ``"none"`` for one loss per image.

    Shape:
        class_counts (C,); logits (N, C); targets (N,) integers in [0, C), or (N, C) floating point;
        returns a scalar, or (N,) for ``reduction="none"``.

    Raises:
        UsageError: If the counts are missing where they are needed, or a class is empty there; if
            the shapes do not fit together.
    """

    needs_class_counts = False
    takes_soft_targets = False

    def __init__(
        self, class_counts: Labels | None = None, *, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, get_args(Reduction))
        self.reduction = reduction
        self.num_classes = None if class_counts is None else len(check_class_counts(class_counts))

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses (N,) of logits (N, C), float32 or float64, and targets.

        Targets are (N,) int64 or, if the loss takes them, (N, C) floating point.
        """
        raise NotImplementedError

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the reduced loss of a batch."""
        self._check_shapes(logits, targets)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = targets.to(logits.dtype) if targets.ndim == 2 else targets.long()
        losses = self.per_example(logits, targets)
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def _check_shapes(self, logits: Tensor, targets: Tensor) -> None:
        shapes = f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)}"
        soft = self.takes_soft_targets and targets.ndim == 2
        if logits.ndim != 2 or targets.shape != (logits.shape if soft else logits.shape[:1]):
            also = " or (N, C)" if self.takes_soft_targets else ""
            raise UsageError(f"{type(self).__name__} needs (N, C) and (N,){also}, got {shapes}")
        if soft != targets.is_floating_point() or targets.dtype == torch.bool:
            kind = "floating point where they are distributions" if soft else "integers"
            raise UsageError(f"targets must be {kind}, got {targets.dtype}, {shapes}")
        if self.num_classes not in {None, logits.shape[1]}:
            raise UsageError(f"class_counts has {self.num_classes} classes, but got {shapes}")

    def extra_repr(self) -> str:
        """Names the reduction when the module is printed."""
        return f"reduction={self.reduction!r}"


LOSSES: Registry[Callable[..., nn.Module]] = Registry("loss")

L = TypeVar("L", bound=Callable[..., nn.Module])


def register_loss(name: str) -> Callable[[L], L]:
    """Returns a class decorator that registers a loss under a name.

    Its constructor takes ``class_counts``, which may be None, and, keyword-only, its own options.
    """

    def add(cls: L) -> L:
        LOSSES.register(name)(cls)
        return cls

    return add


def list_losses() -> list[str]:
    """Returns the names that :func:`create_loss` knows."""
    return list(LOSSES)


def create_loss(name: str, class_counts: Labels | None = None, **options: Any) -> nn.Module:
    """Creates a loss by name: a module that takes logits (N, C) and targets (N,).

    >>> loss = create_loss("balanced_softmax", class_counts=[90, 10])
    >>> loss(torch.zeros(2, 2), torch.tensor([0, 1]))  # -(log .9 + log .1) / 2
    tensor(1.2040)

    Args:
        name: One of :func:`list_losses`.
        class_counts: Training images per class (C,). May be given to every loss; some need it.
        **options: The loss's own options.

    Raises:
        UsageError: If the name or an option is unknown, a value is out of range, or the loss needs
            class_counts and has none.
    """
    loss = LOSSES[name]
    if class_counts is None and getattr(loss, "needs_class_counts", False):
        raise UsageError(f"loss {name!r} needs class_counts, the training images per class")
    return LOSSES.create(name, class_counts, **options)


@register_loss("cross_entropy")
class CrossEntropyLoss(ClassLoss):
    """Cross-entropy: ``l = -sum_j t_j log softmax_j(z)``, ``t_j = (1 - s) [j = y] + s / C``.

    With label smoothing s = 0 this is ``-log softmax_y(z)``.

    Args:
        class_counts: As in :class:`ClassLoss`, like reduction; not used.
        smoothing: s, in [0, 1).

    References:
        Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016,
        https://arxiv.org/abs/1512.00567 (label smoothing).
    """

    takes_soft_targets = True

    def __init__(
        self,
        class_counts: Labels | None = None,
        *,
        smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_counts, reduction=reduction)
        self.smoothing = check_number("smoothing", smoothing, "[0, 1)")

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the smoothed cross-entropies (N,)."""
        return F.cross_entropy(logits, targets, label_smoothing=self.smoothing, reduction="none")


class _PriorLoss(ClassLoss):
    """Cross-entropy of logits to which a function of the class frequencies is added."""

    needs_class_counts = True
    takes_soft_targets = True
    adjustment: Tensor

    def __init__(self, class_counts: Labels | None, tau: float, reduction: Reduction) -> None:
        super().__init__(class_counts, reduction=reduction)
        if class_counts is None:
            raise UsageError(f"{type(self).__name__} needs class_counts")
        check_no_empty_class(class_counts)
        counts = check_class_counts(class_counts).double()
        adjustment = tau * (counts / counts.sum()).log()
        self.register_buffer("adjustment", adjustment.float(), persistent=False)

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the cross-entropies (N,) of the adjusted logits."""
        return F.cross_entropy(logits + self.adjustment, targets, reduction="none")


@register_loss("balanced_softmax")
class BalancedSoftmaxLoss(_PriorLoss):
    """Balanced softmax: ``l = -log(n_y e^{z_y} / sum_j n_j e^{z_j})``.

    The loss of a classifier that knows the training class frequencies; without them, at test time,
    the logits are those of a balanced prior. Equal to logit adjustment at tau = 1.

    Args:
        class_counts: Training images ``n_j`` per class, at least 1 each.
        reduction: As in :class:`ClassLoss`.

    References:
        Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020,
        https://arxiv.org/abs/2007.10740
    """

    def __init__(
        self, class_counts: Labels | None = None, *, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(class_counts, tau=1.0, reduction=reduction)


@register_loss("logit_adjustment")
class LogitAdjustmentLoss(_PriorLoss):
    """Logit adjustment: the cross-entropy of ``z_j + tau log pi_j``, where ``pi_j = n_j / N``.

    At tau = 0 this is plain cross-entropy, at tau = 1 balanced softmax.

    Args:
        class_counts: Training images ``n_j`` per class, at least 1 each.
        tau: Strength of the adjustment, at least 0.
        reduction: As in :class:`ClassLoss`.

    References:
        Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021,
        https://arxiv.org/abs/2007.07314
    """

    def __init__(
        self,
        class_counts: Labels | None = None,
        *,
        tau: float = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            class_counts, tau=check_number("tau", tau, "[0, inf)"), reduction=reduction
        )
