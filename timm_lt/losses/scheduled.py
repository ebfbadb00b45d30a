"""Losses that change during training: deferred re-weighting and the cumulative learning of BBN."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor, nn

from timm_lt.losses.base import (
    ClassLoss,
    Reduction,
    create_loss,
    register_loss,
    required_counts,
)
from timm_lt.losses.reweighted import (
    Normalization,
    WeightedLoss,
    effective_number_weights,
    inverse_frequency_weights,
)
from timm_lt.utils.checks import UsageError, check_choice, check_integer, check_mapping
from timm_lt.utils.longtail import ClassCounts, check_start, epoch_not_set, first_epoch

Weights = Literal["effective_number", "inverse_frequency"]


# Options of a wrapped loss that the wrapper sets.
RESERVED = ("class_counts", "reduction", "normalization")


class _Wrapper(ClassLoss):
    """Passes on to the wrapped loss what it defines of :class:`ClassLoss`."""

    loss: Any

    def _wrap(
        self, name: str, options: Mapping[str, Any] | None, class_counts: ClassCounts | None
    ) -> None:
        options = check_mapping("loss_options", options)
        for reserved in RESERVED:
            if reserved in options:
                raise UsageError(
                    f"loss_options: {reserved} is set by {type(self).__name__}; remove it"
                )
        self.loss = create_loss(name, class_counts, reduction="none", **options)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Sets the epoch of the wrapped loss; see :meth:`ClassLoss.set_epoch`."""
        getattr(self.loss, "set_epoch", lambda *_: None)(epoch, epochs)

    def initial_bias(self, num_classes: int) -> float | None:
        """Returns the initial bias of the wrapped loss."""
        bias: float | None = getattr(self.loss, "initial_bias", lambda _: None)(num_classes)
        return bias

    def check_classifier(self, classifier: nn.Module) -> None:
        """Checks the classifier as the wrapped loss does."""
        getattr(self.loss, "check_classifier", lambda _: None)(classifier)


@register_loss("deferred_reweighting")
class DeferredReweightingLoss(_Wrapper, WeightedLoss):
    """Deferred re-weighting (DRW): a plain loss at first, ``w_y l(z, y)`` from an epoch on.

    The training loop calls :meth:`set_epoch`; in your own loop call it before each epoch, unless
    ``start`` is 0. Soft targets and feature inputs are supported if the wrapped loss supports them.

    Args:
        class_counts: Training images ``n_j`` per class, at least 1 each.
        loss: Name of the wrapped loss; not ``bilateral``, which can wrap this one.
        loss_options: Options of the wrapped loss.
        start: First weighted epoch (0-based), or a fraction of the epochs in (0, 1), rounded down;
            160 of 200 in the paper.
        weights: Inverse ``"effective_number"`` as in the authors' code, or ``"inverse_frequency"``
            as in the paper's algorithm 1; both have a mean of 1.
        beta: Of the effective number, in [0, 1); None is 0.9999, as in the authors' code.
        exponent: Of the inverse frequency, at least 0; None is 1.
        normalization: ``"weights"`` as in the paper, or ``"batch"``; see :class:`WeightedLoss`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        UsageError: For a wrong option, also of the wrapped loss; if ``start`` is not within the
            epochs; if used before the epoch is set.

    References:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS
        2019, https://arxiv.org/abs/1906.07413 (algorithm 1).
    """

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        *,
        loss: str = "cross_entropy",
        loss_options: Mapping[str, Any] | None = None,
        start: float = 0.8,
        weights: Weights = "effective_number",
        beta: float | None = None,
        exponent: float | None = None,
        normalization: Normalization = "weights",
        reduction: Reduction = "mean",
    ) -> None:
        counts = required_counts(self, class_counts)
        values = _class_weights(counts, weights, beta, exponent)
        super().__init__(counts, values, normalization=normalization, reduction=reduction)
        check_start(start)
        self.start = start
        self._wrap(loss, loss_options, counts)
        if getattr(self.loss, "takes_pairs", False):
            raise UsageError(
                f"deferred_reweighting cannot wrap {loss}: use loss {loss} with the option "
                "loss='deferred_reweighting'"
            )
        self.takes_soft_targets = getattr(self.loss, "takes_soft_targets", False)
        self.needs_features = getattr(self.loss, "needs_features", False)
        self.active: bool | None = True if start == 0 else None

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
            return ClassLoss._reduced(self, self.loss(logits, targets, *features), targets)
        weights, labels = self._weigh(targets)
        return self._reduced(weights * self.loss(logits, labels, *features), targets)

    def extra_repr(self) -> str:
        """Adds the start to the printed module."""
        return f"start={self.start}, {super().extra_repr()}"


def _class_weights(
    counts: Tensor, weights: str, beta: float | None, exponent: float | None
) -> Tensor:
    check_choice("weights", weights, get_args(Weights))
    if weights == "effective_number":
        if exponent is not None:
            raise UsageError("exponent only applies with weights='inverse_frequency'")
        return effective_number_weights(counts, 0.9999 if beta is None else beta)
    if beta is not None:
        raise UsageError("beta only applies with weights='effective_number'")
    return inverse_frequency_weights(counts, 1.0 if exponent is None else exponent)


Adaptor = Literal[
    "parabolic_decay", "linear_decay", "cosine_decay", "parabolic_increment", "equal", "beta"
]
Divisor = Literal["epochs", "code"]
# Alpha by the share of the epochs that have passed; ``beta`` draws it at random instead.
ADAPTORS: dict[str, Callable[[float], float]] = {
    "parabolic_decay": lambda share: 1 - share**2,
    "linear_decay": lambda share: 1 - share,
    "cosine_decay": lambda share: math.cos(share * math.pi / 2),
    "parabolic_increment": lambda share: share**2,
    "equal": lambda share: 0.5,
}
BETA = 0.2
# Numbers of epochs for which the authors' code divides by another number.
DIVISORS = {90: 100, 180: 200}


@register_loss("bilateral")
class BilateralLoss(_Wrapper):
    """Cumulative learning of a bilateral network: ``L = α l(z, y_c) + (1 - α) l(z, y_r)``.

    ``z = α z_c + (1 - α) z_r`` are the mixed logits of a pair: ``z_c`` (even rows) of an image of
    the uniform stream through the conventional branch, ``z_r`` (odd rows) of an image of the
    re-balancing stream through the re-balancing branch.

    In epoch t (0-based) of T, ``α = 1 - (t / T_div)^2`` falls from 1 towards 0; it ends at .010 for
    200 epochs. In the paper ``T_div = T``; the authors' code divides by 100 for 90 epochs and by
    200 for 180, so that α ends at .208 and .199 in place of .022 and .011.

    Args:
        class_counts: Training images per class, for a loss that needs them.
        loss: l, one of :func:`timm_lt.list_losses` that takes logits only.
        loss_options: Options of l.
        adaptor: α as a function of ``s = t / T_div``: ``1 - s^2``, ``1 - s``, ``cos(π s / 2)``,
            ``s^2``, one half, or drawn from Beta(0.2, 0.2) for each batch (table 4 of the paper).
        divisor: ``T_div``: the number of ``"epochs"``, or as in the authors' ``"code"``.
        seed: Seed of ``"beta"``, at least 0; α is a function of seed, epoch and batch number.
        reduction: Over the pairs; ``"none"`` gives one loss per pair.

    Shape:
        logits (2 B, C); targets (2 B,) integers in [0, C); returns a scalar, or (B,).

    Raises:
        UsageError: If ``loss`` needs features or cosines, or is ``bilateral``; if a batch has an
            odd number of rows; if used before :meth:`set_epoch` with an α that follows the epochs.

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

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        *,
        loss: str = "cross_entropy",
        loss_options: Mapping[str, Any] | None = None,
        adaptor: Adaptor = "parabolic_decay",
        divisor: Divisor = "epochs",
        seed: int = 0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_counts, reduction=reduction)
        check_choice("adaptor", adaptor, get_args(Adaptor))
        check_choice("divisor", divisor, get_args(Divisor))
        if loss == "bilateral":
            raise UsageError("loss bilateral cannot wrap itself")
        self._wrap(loss, loss_options, class_counts)
        if getattr(self.loss, "needs_features", False):
            raise UsageError(f"loss bilateral mixes logits, and {loss} needs features")
        try:
            self.check_classifier(nn.Linear(1, 2, device="meta"))
        except UsageError as error:
            raise UsageError(
                f"loss bilateral needs a linear classifier, and {loss} another: {error}"
            ) from error
        self.adaptor, self.divisor = adaptor, divisor
        self.seed = check_integer("seed", seed, minimum=0)
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
        if self._share is None and self.adaptor not in {"equal", "beta"}:
            raise epoch_not_set(self)
        self._batches += 1
        alpha = self.alpha
        mixed = alpha * logits[0::2] + (1 - alpha) * logits[1::2]
        conventional, rebalancing = self.loss(mixed, targets[0::2]), self.loss(mixed, targets[1::2])
        losses: Tensor = alpha * conventional + (1 - alpha) * rebalancing
        return losses

    def _check_shapes(self, logits: Tensor, targets: Tensor) -> None:
        super()._check_shapes(logits, targets)
        if len(logits) % 2:
            raise UsageError(
                f"BilateralLoss needs an even number of rows (pairs from sampler bilateral), got "
                f"{len(logits)}"
            )

    def extra_repr(self) -> str:
        """Adds the options to the printed module."""
        return f"adaptor={self.adaptor!r}, divisor={self.divisor!r}, {super().extra_repr()}"
