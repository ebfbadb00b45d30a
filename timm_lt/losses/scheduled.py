"""The loss of a bilateral-branch network, with its cumulative learning.

Deferred re-weighting: any loss, with class weights late in training.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

import numpy as np
from torch import Tensor, nn

from timm_lt.losses.base import ClassLoss, Reduction, create_loss, register_loss
from timm_lt.losses.reweighted import (
    Normalization,
    WeightedLoss,
    effective_number_weights,
    given_counts,
    inverse_frequency_weights,
)
from timm_lt.utils.checks import UsageError, check_choice, check_integer, check_mapping
from timm_lt.utils.longtail import ClassCounts, check_start, epoch_not_set, first_epoch

Weights = Literal["effective_number", "inverse_frequency"]


@register_loss("deferred_reweighting")
class DeferredReweightingLoss(WeightedLoss):
    """Deferred re-weighting (DRW): a loss as it is, then, from an epoch on, ``w_y l(z, y)``.

    :meth:`set_epoch` says which epoch it is; the training loop calls it. A loss whose ``start`` is
    not 0 cannot be used before. Mixup and features are as the wrapped loss has them, which also
    hears of epochs.

    Args:
        class_counts: Training images ``n_j`` per class, at least 1 each.
        loss: Name of the wrapped loss, any but ``bilateral``, whose own ``loss`` this one may be.
        loss_options: Its options.
        start: The 0-based epoch from which there are weights, or a fraction of the epochs in
            (0, 1), rounded down: 160 in the paper, 0.8 of its 200.
        weights: By the inverse of the ``"effective_number"``, as in the authors' code, or by
            ``"inverse_frequency"``, as in the paper's algorithm 1; both with a mean of 1.
        beta: Of the effective number, in [0, 1); None takes 0.9999, the authors'.
        exponent: Of the inverse frequency, at least 0; None takes 1.
        normalization: ``"weights"``, the paper's, or ``"batch"``; see
            :class:`~timm_lt.losses.reweighted.WeightedLoss`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        UsageError: For options that are wrong here or for the wrapped loss; from
            :meth:`set_epoch`, if the start is not within training; when used before the epoch is
            set.

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
        counts = given_counts(self, class_counts)
        values = _class_weights(counts, weights, beta, exponent)
        super().__init__(counts, values, normalization=normalization, reduction=reduction)
        check_start(start)
        self.start = start
        options = check_mapping("loss_options", loss_options)
        for name in ("class_counts", "reduction"):
            if name in options:
                raise UsageError(f"loss_options: {name} is set elsewhere; leave it out")
        if "normalization" in options:
            raise UsageError(
                "loss_options: normalization has no effect there; it is an option of "
                "deferred_reweighting itself"
            )
        self.loss = create_loss(loss, class_counts=counts, reduction="none", **options)
        if getattr(self.loss, "takes_pairs", False):
            raise UsageError(
                f"loss {loss} weighs pairs: put deferred_reweighting into its options, as its loss"
            )
        self.takes_soft_targets = getattr(self.loss, "takes_soft_targets", False)
        self.needs_features = getattr(self.loss, "needs_features", False)
        self.active: bool | None = True if start == 0 else None

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Turns the weights on or off; see :meth:`ClassLoss.set_epoch`."""
        self.active = epoch >= first_epoch(self.start, epochs)
        wrapped = getattr(self.loss, "set_epoch", None)
        if wrapped is not None:
            wrapped(epoch, epochs)

    def forward(self, logits: Tensor, targets: Tensor, *features: Tensor) -> Tensor:
        """Returns the reduced loss of a batch; features (N, D) if the wrapped loss needs them."""
        logits, targets = self._prepared(logits, targets)
        if self.active is None:
            raise epoch_not_set(self)
        if not self.active:
            return ClassLoss._reduced(self, self.loss(logits, targets, *features), targets)
        weights, labels = self._weigh(targets)
        return self._reduced(weights * self.loss(logits, labels, *features), targets)

    def initial_bias(self, num_classes: int) -> float | None:
        """Returns what the wrapped loss does."""
        wrapped = getattr(self.loss, "initial_bias", None)
        return None if wrapped is None else cast("float | None", wrapped(num_classes))

    def check_classifier(self, classifier: nn.Module) -> None:
        """Checks what the wrapped loss does, if it does."""
        wrapped = getattr(self.loss, "check_classifier", None)
        if wrapped is not None:
            wrapped(classifier)

    def extra_repr(self) -> str:
        """Names the start when the module is printed."""
        return f"start={self.start}, {super().extra_repr()}"


def _class_weights(
    counts: Tensor, weights: str, beta: float | None, exponent: float | None
) -> Tensor:
    check_choice("weights", weights, get_args(Weights))
    if weights == "effective_number":
        if exponent is not None:
            raise UsageError("exponent is for weights 'inverse_frequency': leave it out")
        return effective_number_weights(counts, 0.9999 if beta is None else beta)
    if beta is not None:
        raise UsageError("beta is for weights 'effective_number': leave it out")
    return inverse_frequency_weights(counts, 1.0 if exponent is None else exponent)


Adaptor = Literal[
    "parabolic_decay", "linear_decay", "cosine_decay", "parabolic_increment", "equal", "beta"
]
Divisor = Literal["epochs", "code"]
# By the share of the epochs that have passed; ``beta`` is random instead.
ADAPTORS: dict[str, Callable[[float], float]] = {
    "parabolic_decay": lambda share: 1 - share**2,
    "linear_decay": lambda share: 1 - share,
    "cosine_decay": lambda share: math.cos(share * math.pi / 2),
    "parabolic_increment": lambda share: share**2,
    "equal": lambda share: 0.5,
}
BETA = 0.2
# Where the authors' code divides by another number than that of the epochs.
DIVISORS = {90: 100, 180: 200}


@register_loss("bilateral")
class BilateralLoss(ClassLoss):
    """Cumulative learning of a bilateral network: ``L = α l(z, y_c) + (1 - α) l(z, y_r)``.

    ``z = α z_c + (1 - α) z_r`` are the mixed logits of a pair: ``z_c`` of an image of the uniform
    stream, through the conventional branch, in an even row, and ``z_r`` of one of the re-balancing
    stream, through its branch, in the odd row below. At ``α = 1`` only the first counts, and the
    gradient of the other is 0; at ``α = 0`` only the second.

    In epoch t, 0-based, of T, ``α = 1 - (t / T_div)^2`` falls from 1. It never gets to 0: at its
    last it is .010 for 200 epochs. The paper has ``T_div = T``; the authors' code has 100 for 90
    epochs and 200 for 180, so that α ends at .208 and .199 in place of .022 and .011.

    Args:
        class_counts: Training images per class, for a loss that needs them.
        loss: l, one of :func:`timm_lt.list_losses` that takes logits only.
        loss_options: Its options.
        adaptor: How α moves with the share ``s = t / T_div``: ``1 - s^2``, ``1 - s``,
            ``cos(π s / 2)``, ``s^2``, one half, or drawn from Beta(0.2, 0.2) for each batch. The
            paper's table 4 compares them.
        divisor: ``T_div``: the number of ``"epochs"``, or as in the authors' ``"code"``.
        seed: Seed of ``"beta"``, a non-negative integer: α is a function of it, the epoch and the
            number of the batch in the epoch.
        reduction: Over the pairs; ``"none"`` gives one loss per pair.

    Shape:
        logits (2 B, C); targets (2 B,) integers in [0, C); returns a scalar, or (B,).

    Raises:
        UsageError: If ``loss`` needs features or cosines, or is itself ``bilateral``; if a batch
            has an odd number of rows; if α follows the epochs, and :meth:`set_epoch` was not
            called before the first batch.

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
            raise UsageError("loss bilateral mixes two branches by another loss, not by itself")
        options = check_mapping("loss_options", loss_options)
        for name in ("class_counts", "reduction"):
            if name in options:
                raise UsageError(f"loss_options: {name} is set elsewhere; leave it out")
        if "normalization" in options:
            raise UsageError(
                "loss_options: normalization has no effect in loss bilateral, whose mean is over "
                "the pairs; leave it out"
            )
        self.loss: Any = create_loss(loss, class_counts, reduction="none", **options)
        if getattr(self.loss, "needs_features", False):
            raise UsageError(f"loss bilateral mixes logits, and {loss} needs features")
        self._check_linear(loss)
        self.adaptor, self.divisor = adaptor, divisor
        self.seed = check_integer("seed", seed, minimum=0)
        self._share: float | None = None
        self._epoch, self._batches = 0, 0

    def _check_linear(self, name: str) -> None:
        try:
            self.check_classifier(nn.Linear(1, 2, device="meta"))
        except UsageError as error:
            raise UsageError(
                f"loss bilateral mixes the logits of linear classifiers, and {name} takes others: "
                "choose another loss for it"
            ) from error

    @property
    def alpha(self) -> float:
        """Weight of the conventional branch, in [0, 1]; with ``"beta"``, in the latest batch."""
        if self.adaptor == "beta":
            key = [self.seed, self._epoch, max(self._batches, 1)]
            return float(np.random.default_rng(key).beta(BETA, BETA))
        return ADAPTORS[self.adaptor](self._share or 0.0)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Moves α to where it is in an epoch, 0-based."""
        divisor = DIVISORS.get(epochs, epochs) if self.divisor == "code" else epochs
        self._share = epoch / divisor
        self._epoch, self._batches = epoch, 0
        if hasattr(self.loss, "set_epoch"):
            self.loss.set_epoch(epoch, epochs)

    def initial_bias(self, num_classes: int) -> float | None:
        """Returns what the mixed loss does."""
        mixed = getattr(self.loss, "initial_bias", None)
        return None if mixed is None else cast("float | None", mixed(num_classes))

    def check_classifier(self, classifier: nn.Module) -> None:
        """Checks what the mixed loss does, if it does."""
        mixed = getattr(self.loss, "check_classifier", None)
        if mixed is not None:
            mixed(classifier)

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
                f"BilateralLoss takes pairs of rows, got {len(logits)} rows: take an even number "
                "of images in every batch, from sampler bilateral"
            )

    def extra_repr(self) -> str:
        """Names the options when the module is printed."""
        return f"adaptor={self.adaptor!r}, divisor={self.divisor!r}, {super().extra_repr()}"
