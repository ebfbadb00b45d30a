"""Losses that change during training: deferred re-weighting and the cumulative learning of BBN."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from torch import Tensor, nn

from timm_lt.losses.base import BelowOne, ClassLoss, NonNegative, create_loss, register_loss
from timm_lt.losses.reweighted import (
    WeightedLoss,
    effective_number_weights,
    inverse_frequency_weights,
)
from timm_lt.utils.checks import UsageError, check_mapping, user_errors
from timm_lt.utils.longtail import ClassCounts, check_start, epoch_not_set, first_epoch


@dataclass(eq=False, repr=False, kw_only=True)
class _Wrapper(ClassLoss):
    """A loss around another one, ``self.wrapped``."""

    loss: str = "cross_entropy"
    loss_options: Mapping[str, Any] | None = None

    def __post_init__(self, class_counts: ClassCounts | None) -> None:
        super().__post_init__(class_counts)
        options = check_mapping("loss_options", self.loss_options)
        for reserved in {"class_counts", "reduction", "normalization"} & options.keys():
            raise UsageError(f"loss_options: {reserved} is set by {type(self).__name__}; remove it")
        self.wrapped = create_loss(self.loss, class_counts, reduction="none", **options)
        if self.wrapped.takes_pairs:
            raise UsageError(
                f"{type(self).__name__} cannot wrap {self.loss}; use loss {self.loss}, with this "
                "one as its option loss="
            )

    def set_epoch(self, epoch: int, epochs: int) -> None:
        self.wrapped.set_epoch(epoch, epochs)

    def initial_bias(self, num_classes: int) -> float | None:
        return self.wrapped.initial_bias(num_classes)

    def check_classifier(self, classifier: nn.Module) -> None:
        self.wrapped.check_classifier(classifier)


@register_loss("deferred_reweighting")
@dataclass(eq=False, repr=False, kw_only=True)
class DeferredReweightingLoss(_Wrapper, WeightedLoss):
    """Deferred re-weighting (DRW): a plain loss at first, ``w_y l(z, y)`` from an epoch on.

    The training loop calls :meth:`set_epoch`; in your own loop call it before each epoch, unless
    ``start`` is 0. Soft targets and features are supported if the wrapped loss supports them.

    Args:
        loss, loss_options: The wrapped loss; not ``bilateral``, which can wrap this one.
        start: First weighted epoch (0-based), or a fraction of the epochs in (0, 1), rounded down;
            160 of 200 in the paper.
        weights: Inverse ``"effective_number"`` as in the authors' code, or ``"inverse_frequency"``
            as in the paper's algorithm 1; both have a mean of 1.
        beta: Parameter of the effective number, in [0, 1); None is 0.9999, as in the authors' code.
        exponent: Exponent of the inverse frequency, at least 0; None is 1.
        normalization: ``"weights"`` as in the paper, or ``"batch"``; see :class:`WeightedLoss`.

    Raises:
        UsageError: For a wrong option; if ``start`` is not within the epochs, or they are not set.

    References:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS
        2019, https://arxiv.org/abs/1906.07413 (algorithm 1).
    """

    start: float = 0.8
    weights: Literal["effective_number", "inverse_frequency"] = "effective_number"
    beta: BelowOne | None = None
    exponent: NonNegative | None = None
    normalization: Literal["batch", "weights"] = "weights"

    def __post_init__(self, class_counts: ClassCounts | None) -> None:
        super().__post_init__(class_counts)
        check_start(self.start)
        self.takes_soft_targets = self.wrapped.takes_soft_targets
        self.needs_features = self.wrapped.needs_features
        self.active: bool | None = True if self.start == 0 else None

    def weigh_classes(self, counts: Tensor) -> Tensor:
        """Returns the weights of the second part of the training."""
        by_number = self.weights == "effective_number"
        unused = "exponent" if by_number else "beta"
        if getattr(self, unused) is not None:
            raise UsageError(f"{unused} does not apply with weights={self.weights!r}; remove it")
        if by_number:
            return effective_number_weights(counts, 0.9999 if self.beta is None else self.beta)
        return inverse_frequency_weights(counts, 1.0 if self.exponent is None else self.exponent)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Turns the weights on or off; see :meth:`ClassLoss.set_epoch`."""
        super().set_epoch(epoch, epochs)
        self.active = epoch >= first_epoch(self.start, epochs)

    def forward(self, logits: Tensor, targets: Tensor, *features: Tensor) -> Tensor:
        """Returns the reduced loss of a batch; features (N, D) if the wrapped loss needs them."""
        logits, targets = self._prepared(logits, targets)
        if self.active is None:
            raise epoch_not_set(self)
        if not self.active:
            return ClassLoss._reduced(self, self.wrapped(logits, targets, *features), targets)
        weights, labels = self._weigh(targets)
        return self._reduced(weights * self.wrapped(logits, labels, *features), targets)


# Alpha as a function of s = t / T_div; ``beta`` draws it at random instead.
ADAPTORS: dict[str, Callable[[float], float]] = {
    "parabolic_decay": lambda s: 1 - s**2,
    "linear_decay": lambda s: 1 - s,
    "cosine_decay": lambda s: math.cos(s * math.pi / 2),
    "parabolic_increment": lambda s: s**2,
    "equal": lambda s: 0.5,
}
BETA = 0.2
# Numbers of epochs for which the authors' code divides by another number.
DIVISORS = {90: 100, 180: 200}


@register_loss("bilateral")
@dataclass(eq=False, repr=False, kw_only=True)
class BilateralLoss(_Wrapper):
    """Cumulative learning of a bilateral network: ``L = α l(z, y_c) + (1 - α) l(z, y_r)``.

    ``z = α z_c + (1 - α) z_r`` mixes the logits of a pair: ``z_c`` (even rows) of the conventional
    branch and the uniform stream, ``z_r`` (odd rows) of the re-balancing ones. In epoch t (0-based)
    of T, ``α = 1 - (t / T_div)^2`` falls from 1 towards 0.

    Args:
        loss, loss_options: l, one of :func:`timm_lt.list_losses` that takes logits only.
        adaptor: α as a function of ``s = t / T_div``: ``1 - s^2``, ``1 - s``, ``cos(π s / 2)``,
            ``s^2``, one half, or drawn from Beta(0.2, 0.2) for each batch (table 4 of the paper).
        divisor: ``T_div``: the number of ``"epochs"``, or as in the authors' ``"code"`` 100 for 90
            epochs and 200 for 180, so that α ends at .208 and .199 instead of .022 and .011.
        seed: Seed of ``"beta"``, at least 0; α is a function of seed, epoch and batch number.
        reduction: Over the pairs; ``"none"`` gives one loss per pair.

    Shape:
        logits (2 B, C); targets (2 B,) integers in [0, C); returns a scalar, or (B,).

    Raises:
        UsageError: If ``loss`` needs features or cosines, or is ``bilateral``; if a batch has an
            odd number of rows; if used before :meth:`set_epoch` with an α that depends on it.

    References:
        Zhou et al., BBN: Bilateral-Branch Network with Cumulative Learning for Long-Tailed Visual
        Recognition, CVPR 2020, https://arxiv.org/abs/1912.02413 (equations 1, 3 and 5).

    >>> import torch
    >>> loss = BilateralLoss()
    >>> loss.set_epoch(5, 10)
    >>> loss.alpha
    0.75
    >>> loss(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 1]))  # z = (3, 1)
    tensor(0.6269)
    """

    takes_pairs = True

    adaptor: Literal[
        "parabolic_decay", "linear_decay", "cosine_decay", "parabolic_increment", "equal", "beta"
    ] = "parabolic_decay"
    divisor: Literal["epochs", "code"] = "epochs"
    seed: Annotated[int, 0] = 0

    def __post_init__(self, class_counts: ClassCounts | None) -> None:
        super().__post_init__(class_counts)
        if self.wrapped.needs_features:
            raise UsageError(f"loss bilateral mixes logits, but {self.loss} needs features")
        with user_errors("loss bilateral has a linear classifier", UsageError):
            self.check_classifier(nn.Linear(1, 2, device="meta"))
        self._share: float | None = None
        self._epoch, self._batches = 0, 0

    @property
    def alpha(self) -> float:
        """Weight of the conventional branch, in [0, 1]; with ``"beta"``, of the latest batch."""
        if self.adaptor == "beta":
            key = [self.seed, self._epoch, max(self._batches, 1)]
            return float(np.random.default_rng(key).beta(BETA, BETA))
        return ADAPTORS[self.adaptor](self._share or 0.0)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Sets α for an epoch (0-based)."""
        super().set_epoch(epoch, epochs)
        divisor = DIVISORS.get(epochs, epochs) if self.divisor == "code" else epochs
        self._share = epoch / divisor
        self._epoch, self._batches = epoch, 0

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses (B,) of the pairs of logits (2 B, C) and targets (2 B,)."""
        if len(logits) % 2:
            rows = f"{len(logits)} rows"
            raise UsageError(f"BilateralLoss needs pairs, as sampler bilateral draws; got {rows}")
        if self._share is None and self.adaptor not in {"equal", "beta"}:
            raise epoch_not_set(self)
        self._batches += 1
        alpha = self.alpha
        mixed = alpha * logits[0::2] + (1 - alpha) * logits[1::2]
        conventional = self.wrapped(mixed, targets[0::2])
        rebalancing = self.wrapped(mixed, targets[1::2])
        losses: Tensor = alpha * conventional + (1 - alpha) * rebalancing
        return losses
