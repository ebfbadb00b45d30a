"""Base class of losses, their registry, and terms that are stable at any logits."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Annotated, Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_lt.utils.checks import Registry, UsageError, check_fields
from timm_lt.utils.longtail import ClassCounts, check_class_counts, check_no_empty_class

Reduction = Literal["mean", "sum", "none"]
NonNegative = Annotated[float, "[0, inf)"]
BelowOne = Annotated[float, "[0, 1)"]


@dataclass(eq=False, repr=False)
class ClassLoss(nn.Module):
    """Base class of losses: one loss per image from its logits, then a reduction.

    A subclass defines :meth:`per_example`; its options are keyword-only fields of a dataclass.
    Targets are labels or, if ``takes_soft_targets`` is set, distributions over the classes, as
    mixup makes them. The loss is computed in float32 or wider, also under autocast. Buffers made
    from the class counts are not in the state dict.

    Args:
        class_counts: Training images ``n_j`` per class, as many as there are logits. None, or a
            count of 0, is an error for a loss that uses them.
        reduction: ``"mean"`` over the batch, ``"sum"``, or ``"none"`` for one loss per image.

    Shape:
        class_counts (C,); logits (N, C); targets (N,) integers in [0, C), or (N, C) floating point;
        returns a scalar, or (N,) for ``reduction="none"``.

    Raises:
        UsageError: If an option, a shape or a target is wrong (on a GPU, targets are not checked).
    """

    # forward takes a third argument, features (N, D): the input of the classifier.
    needs_features = False
    takes_soft_targets = False
    # Rows 2i and 2i + 1 of a batch form a pair (bilateral sampler and model).
    takes_pairs = False
    # With any other form, the loss is a sum over the classes of binary losses.
    form = "softmax"

    class_counts: InitVar[ClassCounts | None] = None
    _: KW_ONLY
    reduction: Reduction = "mean"

    def __post_init__(self, class_counts: ClassCounts | None) -> None:
        super().__init__()
        check_fields(self)
        self.num_classes = None if class_counts is None else len(check_class_counts(class_counts))

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses (N,) of logits (N, C) and targets (N,), or (N, C) if soft."""
        raise NotImplementedError

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the reduced loss of a batch."""
        logits, targets = self._prepared(logits, targets)
        return self._reduced(self.per_example(logits, targets), targets)

    def _prepared(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Checks logits and targets and converts them to the types of :meth:`per_example`."""
        self._check_shapes(logits, targets)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, targets.to(logits.dtype) if targets.ndim == 2 else targets.long()

    def _reduced(self, losses: Tensor, targets: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Sets the epoch (0-based) of a schedule; call it before each epoch.

        Raises:
            UsageError: If the schedule of the loss does not fit into the epochs.
        """

    def initial_bias(self, num_classes: int) -> float | None:
        """Returns the initial bias of a new classifier; None keeps the default.

        A sigmoid starts at ``-log(C - 1)``, where every class has probability 1 / C. Recipes set
        the bias; in your own loop, fill the bias of the classifier with it.
        """
        return None if self.form == "softmax" else -math.log(max(num_classes - 1, 1))

    def check_classifier(self, classifier: nn.Module) -> None:
        """Raises UsageError if the loss does not suit the logits of a classifier."""

    def _check_shapes(self, logits: Tensor, targets: Tensor) -> None:
        shapes = f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)}"
        soft = self.takes_soft_targets and targets.ndim == 2
        if logits.ndim != 2 or targets.shape != (logits.shape if soft else logits.shape[:1]):
            also = " or (N, C)" if self.takes_soft_targets else ""
            raise UsageError(f"{type(self).__name__} needs (N, C) and (N,){also}, got {shapes}")
        if soft != targets.is_floating_point() or targets.dtype == torch.bool:
            kind = "floating point if they are distributions" if soft else "integers"
            raise UsageError(f"targets must be {kind}, got {targets.dtype}, {shapes}")
        if self.num_classes not in {None, logits.shape[1]}:
            raise UsageError(f"class_counts has {self.num_classes} classes, but got {shapes}")
        # Reading values on another device would synchronise.
        if not soft and targets.device.type == "cpu" and len(targets):
            low, high, last = *map(int, targets.aminmax()), logits.shape[1] - 1
            if low < 0 or high > last:
                raise UsageError(f"targets must be from 0 to {last}, got {low} to {high}, {shapes}")


LOSSES: Registry[Callable[..., ClassLoss]] = Registry("loss")
L = TypeVar("L", bound=type[ClassLoss])


def register_loss(name: str) -> Callable[[L], L]:
    """Returns a class decorator that registers a :class:`ClassLoss` under a name.

    Its constructor takes ``class_counts``, which may be None, and, keyword-only, its own options.
    """
    return cast("Callable[[L], L]", LOSSES.register(name))


def list_losses() -> list[str]:
    """Returns the names of the losses."""
    return list(LOSSES)


def create_loss(name: str, class_counts: ClassCounts | None = None, **options: Any) -> ClassLoss:
    """Creates a loss by name: a module that takes logits (N, C) and targets (N,).

    >>> import torch
    >>> loss = create_loss("balanced_softmax", class_counts=[90, 10])
    >>> loss(torch.zeros(2, 2), torch.tensor([0, 1]))  # -(log .9 + log .1) / 2
    tensor(1.2040)

    Args:
        name: One of :func:`list_losses`.
        class_counts: Training images per class (C,); every loss takes them, some need them.
        **options: Options of the loss.

    Raises:
        UsageError: If the name, an option or class_counts is wrong.
    """
    return LOSSES.create(name, class_counts, **options)


def required_counts(loss: object, class_counts: ClassCounts | None) -> Tensor:
    """Returns the class counts (C,), float64, each at least 1, of a loss that needs them."""
    if class_counts is None:
        raise UsageError(f"{type(loss).__name__} needs class_counts, the training images per class")
    check_no_empty_class(class_counts)
    return check_class_counts(class_counts).double()


def mean_over_labels(per_class: Tensor, targets: Tensor) -> Tensor:
    """Returns the values (N,) of the labels out of (N, C), or their mean over soft targets."""
    if targets.ndim == 1:
        return per_class.gather(1, targets[:, None]).squeeze(1)
    return (targets * per_class).sum(1)


def one_hot(targets: Tensor, like: Tensor) -> Tensor:
    """Returns targets as distributions (N, C) in the dtype of ``like`` (N, C)."""
    if targets.ndim == 2:
        return targets
    return torch.zeros_like(like).scatter(1, targets[:, None], 1.0)


def log_complement(log_p: Tensor) -> Tensor:
    """Returns ``log(1 - p_j)`` (N, C) from log-probabilities (N, C)."""
    top = log_p.argmax(1, keepdim=True)
    # 1 - p cancels if p is near 1: sum the other probabilities instead.
    lowest = torch.finfo(log_p.dtype).min / 2
    others = log_p.scatter(1, top, lowest).logsumexp(1, keepdim=True)
    return torch.log1p(-log_p.exp().scatter(1, top, 0.0)).scatter(1, top, others)


def softmax_focal(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Returns ``-(1 - p_y)^gamma log p_y`` (N,), p the softmax."""
    log_p = F.log_softmax(logits, 1)
    # (1 - p)^gamma has an infinite slope at 0 for gamma < 1; its logarithm does not.
    return mean_over_labels(-log_p * torch.exp(gamma * log_complement(log_p)), targets)


def sigmoid_focal(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Returns ``-sum_j (1 - p_t)^gamma log p_t`` (N,), p_t the sigmoid of z_y, and of -z_j."""
    # -log p and -log(1 - p) of the sigmoid.
    positive, negative = F.softplus(-logits), F.softplus(logits)
    label, other = positive, negative
    if gamma > 0:
        label, other = label * torch.exp(-gamma * negative), other * torch.exp(-gamma * positive)
    targets = one_hot(targets, logits)
    return (targets * label + (1 - targets) * other).sum(1)
