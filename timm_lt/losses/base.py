"""The base class of losses: shapes, precision and reduction.

The registry of losses and their factory.

What the losses are made of, each stable at any logits.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_lt.utils.checks import UsageError, check_choice
from timm_lt.utils.longtail import ClassCounts, check_class_counts
from timm_lt.utils.registry import Registry

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
            the shapes do not fit together; on a CPU, if a target is out of range. On a GPU that
            fails as an assertion of the device.
    """

    needs_class_counts = False
    # Then forward takes the classifier's input, features (N, D), behind the targets.
    needs_features = False
    takes_soft_targets = False
    # Then rows 2 i and 2 i + 1 of a batch are a pair, from sampler and model bilateral.
    takes_pairs = False

    def __init__(
        self, class_counts: ClassCounts | None = None, *, reduction: Reduction = "mean"
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
        logits, targets = self._prepared(logits, targets)
        return self._reduced(self.per_example(logits, targets), targets)

    def _prepared(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits and targets after checking them, in the types of :meth:`per_example`."""
        self._check_shapes(logits, targets)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, targets.to(logits.dtype) if targets.ndim == 2 else targets.long()

    def _reduced(self, losses: Tensor, targets: Tensor) -> Tensor:
        """Reduces the losses (N,) of some targets."""
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Tells the loss where training is, before each epoch; most losses do not mind.

        Args:
            epoch: The epoch that begins, 0-based.
            epochs: How many there are.

        Raises:
            UsageError: If the loss's schedule does not fit into so many epochs.
        """

    def initial_bias(self, num_classes: int) -> float | None:
        """Returns what a fresh classifier's bias should start at; None leaves it as it is.

        A recipe sets it. In your own loop, fill the bias of the classifier with it.
        """
        return None

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
        # On another device a look at them would wait for it.
        if not soft and targets.device.type == "cpu" and len(targets):
            low, high, last = *map(int, targets.aminmax()), logits.shape[1] - 1
            if low < 0 or high > last:
                raise UsageError(f"targets must be from 0 to {last}, got {low} to {high}, {shapes}")

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


def create_loss(name: str, class_counts: ClassCounts | None = None, **options: Any) -> nn.Module:
    """Creates a loss by name: a module that takes logits (N, C) and targets (N,).

    >>> import torch
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


def mean_over_labels(per_class: Tensor, targets: Tensor) -> Tensor:
    """Returns the values (N,) of labels, or their mean under distributions, out of (N, C)."""
    if targets.ndim == 1:
        return per_class.gather(1, targets[:, None]).squeeze(1)
    return (targets * per_class).sum(1)


def one_hot(targets: Tensor, like: Tensor) -> Tensor:
    """Returns targets as distributions (N, C), in the type of logits (N, C)."""
    if targets.ndim == 2:
        return targets
    return torch.zeros_like(like).scatter(1, targets[:, None], 1.0)


def log_complement(log_p: Tensor) -> Tensor:
    """Returns ``log(1 - p_j)`` (N, C) of the logarithms of probabilities (N, C)."""
    top = log_p.argmax(1, keepdim=True)
    # 1 - p loses its digits where p is near 1, so there the others are summed.
    lowest = torch.finfo(log_p.dtype).min / 2
    others = log_p.scatter(1, top, lowest).logsumexp(1, keepdim=True)
    return torch.log1p(-log_p.exp().scatter(1, top, 0.0)).scatter(1, top, others)


def softmax_focal(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Returns ``-(1 - p_y)^gamma log p_y`` (N,), p the softmax."""
    log_p = F.log_softmax(logits, 1)
    # A power of 1 - p would have an infinite slope at 0 for gamma < 1.
    return mean_over_labels(-log_p * torch.exp(gamma * log_complement(log_p)), targets)


def sigmoid_focal(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Returns the sum over the classes (N,) of ``-(1 - p_t)^gamma log p_t``.

    ``p_t`` is sigmoid(z_j) for the label and 1 - sigmoid(z_j) for the other classes.
    """
    # -log(1 - sigmoid), so that its negative is the logarithm of a base of a power.
    positive, negative = F.softplus(-logits), F.softplus(logits)
    if gamma > 0:
        positive, negative = (
            positive * torch.exp(-gamma * negative),
            negative * torch.exp(-gamma * positive),
        )
    targets = one_hot(targets, logits)
    return (targets * positive + (1 - targets) * negative).sum(1)
