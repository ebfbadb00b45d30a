"""Deferred re-weighting: any loss, with class weights late in training."""

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn

from timm_lt.losses.base import ClassLoss, Reduction
from timm_lt.losses.factory import create_loss, register_loss
from timm_lt.losses.weights import (
    Normalization,
    WeightedLoss,
    effective_number_weights,
    given_counts,
    inverse_frequency_weights,
)
from timm_lt.utils.checks import UsageError, check_choice, check_mapping
from timm_lt.utils.deferral import check_start, epoch_not_set, first_epoch
from timm_lt.utils.longtail import ClassCounts

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
            :class:`~timm_lt.losses.weights.WeightedLoss`.
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
