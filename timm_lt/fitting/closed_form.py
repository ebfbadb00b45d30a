"""Fits without an optimiser: class means, and one selected tau."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.fitting.base import Fit, FitData, register_fit, select, selection_record
from timm_lt.fitting.curves import Adjustment, tau_curve
from timm_lt.fitting.solvers import take_rows
from timm_lt.heads import Head, LogitAdjustedHead, NCMHead, TauNormHead
from timm_lt.heads.metric import FeatureSpace, Metric
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import class_counts

# Rows per block; in three feature spaces they should fit into the processor's cache.
ROWS = 512
# Rows among which those of a class are sorted together. With few rows of each class, adding up the
# sums would cost as much as the rows; with many, reading is no longer sequential.
STRETCH, STRETCH_PER_CLASS = 2**14, 16
# The range that Kang et al. sweep, in steps half as wide.
TAU_GRID = tuple(step / 20 for step in range(41))


def class_means(
    values: Tensor,
    targets: Tensor,
    num_classes: int,
    spaces: Sequence[FeatureSpace] = ("raw",),
    feature_mean: Tensor | None = None,
) -> dict[FeatureSpace, Tensor]:
    """Returns the means (C, D) of each class's rows in each space, from one pass over the rows.

    The mean of a class without rows is NaN. ``feature_mean`` (D,) is that of the training features,
    for ``"centered_l2"``.

    >>> values, targets = torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1])
    >>> class_means(values, targets, 2)["raw"].tolist()
    [[2.0], [5.0]]
    """
    sums = torch.zeros(len(spaces), num_classes, values.shape[1])
    for rows, labels in _by_class(targets, num_classes):
        block = take_rows(values, rows)
        present, sizes = labels.unique_consecutive(return_counts=True)
        offsets = sizes.cumsum(0) - sizes
        order = torch.arange(len(rows))
        for total, space in zip(sums, spaces, strict=True):
            moved, weights = _in_space(block, space, feature_mean)
            part = F.embedding_bag(order, moved, offsets, mode="sum", per_sample_weights=weights)
            total.index_add_(0, present, part)
    counts = class_counts(targets, num_classes)[:, None]
    return {space: total.div_(counts) for space, total in zip(spaces, sums, strict=True)}


def _by_class(targets: Tensor, num_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields blocks of row indices, sorted by class within a stretch, with their classes."""
    stretch = max(STRETCH, STRETCH_PER_CLASS * num_classes)
    for start in range(0, len(targets), stretch):
        labels, order = targets[start : start + stretch].sort(stable=True)
        yield from zip((order + start).split(ROWS), labels.split(ROWS), strict=True)


def _in_space(
    block: Tensor, space: FeatureSpace, mean: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns rows (B, D) and weights (B,), whose products are the rows in a feature space."""
    if space == "raw":
        return block, None
    if space == "centered_l2":
        assert mean is not None
        block = block - mean.float()
    norms: Tensor = torch.linalg.vector_norm(block, dim=1)
    if not norms.isfinite().all():
        raise UsageError("features are too large: the norm of a row is beyond float32")
    return block, norms.clamp_min_(1e-12).reciprocal_()


@register_fit("ncm")
@dataclass(frozen=True, kw_only=True)
class NCMFit(Fit):
    """Takes the class means of the training features.

    ``feature_mean`` is the mean over training images, not over classes, as in the code of Kang et
    al.
    """

    metric: Metric = "cosine"
    features: FeatureSpace = "raw"

    def _fit(self, data: FitData) -> NCMHead:
        head = NCMHead.from_classifier(
            data.new_linear(), metric=self.metric, features=self.features
        )
        rows, mean = data.features, data.features.feature_mean
        means = class_means(rows.values, rows.targets, data.num_classes, (self.features,), mean)
        with torch.no_grad():
            head.feature_mean.copy_(mean)
            head.weight.copy_(means[self.features])
        return head


@dataclass(frozen=True, kw_only=True)
class _TauFit(Fit):
    """Takes the joint classifier, with the tau that is the exact maximiser on validation.

    Args:
        tau: Strength, >= 0; None selects it.
    """

    adjust: ClassVar[Adjustment]
    tau: float | None = None

    def _fit(self, data: FitData) -> Head:
        classifier = data.need_classifier(self.name)
        if self.tau is not None:
            return self._head(classifier, self.tau, data)
        val, counts = data.need_val(self.name, "tau"), data.class_counts
        curve = tau_curve(classifier, val, adjust=self.adjust, class_counts=counts, rule=data.rule)
        tau, accuracy = curve.maximise(data.objective)
        head = self._head(classifier, tau, data)
        head.selection = selection_record("tau", tau, accuracy, data)
        return head

    def _head(self, classifier: nn.Linear, tau: float, data: FitData) -> Head:
        raise NotImplementedError


@register_fit("tau_norm")
@dataclass(frozen=True, kw_only=True)
class TauNormFit(_TauFit):
    """Normalises the joint classifier.

    With a bias that is kept, accuracy has no closed form in tau: the best of a grid is taken then.
    """

    adjust = "norm"
    keep_bias: bool = False

    def _fit(self, data: FitData) -> Head:
        classifier = data.need_classifier(self.name)
        if self.tau is not None or not self.keep_bias or classifier.bias is None:
            return super()._fit(data)
        candidates = [(tau, self._head(classifier, tau, data)) for tau in TAU_GRID]
        return select(candidates, data, data.need_val(self.name, "tau"), "tau")

    def _head(self, classifier: nn.Linear, tau: float, data: FitData) -> Head:
        return TauNormHead.from_classifier(classifier, tau=tau, keep_bias=self.keep_bias)


@register_fit("logit_adjusted")
@dataclass(frozen=True, kw_only=True)
class LogitAdjustedFit(_TauFit):
    """Subtracts tau times the log prior."""

    adjust = "prior"

    def _head(self, classifier: nn.Linear, tau: float, data: FitData) -> Head:
        counts = data.class_counts
        return LogitAdjustedHead.from_classifier(classifier, tau=tau, class_counts=counts)
