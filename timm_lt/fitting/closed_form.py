"""Fits without an optimiser: class means, and one selected tau.

Class means in every feature space, from one pass over the features.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_lt.fitting.base import FitData, register_fit, select, selection_record
from timm_lt.fitting.curves import tau_curve
from timm_lt.fitting.sgd import take_rows
from timm_lt.heads import LogitAdjustedHead, NCMHead, TauNormHead
from timm_lt.heads.metric import FeatureSpace, Metric
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import class_counts

# Rows that are summed at a time: in three spaces, they are to come from the processor's cache.
ROWS = 512
# Rows among which those of a class are brought together. With few of each class, adding up the sums
# would cost as much as they do; with many, reading is no longer sequential.
STRETCH, STRETCH_PER_CLASS = 2**14, 16


def class_means(
    values: Tensor,
    targets: Tensor,
    num_classes: int,
    spaces: Sequence[FeatureSpace] = ("raw",),
    feature_mean: Tensor | None = None,
) -> dict[FeatureSpace, Tensor]:
    """Returns the mean of the rows of each class in each space, from one pass over the rows.

    Each row is fetched once, for all spaces; those of a class that lie near each other are fetched
    and added up together, weighted with their inverse norms. Memory is that of the sums and of a
    few hundred rows.

    Args:
        values: Features, which may lie in a mapped file.
        targets: Their classes, in [0, C).
        num_classes: C.
        spaces: Feature spaces, as of the ``ncm`` head.
        feature_mean: Mean of the training features, for ``"centered_l2"``.

    Shape:
        values (N, D), targets (N,), feature_mean (D,); the means are (C, D) float32, NaN for a
        class without rows.

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
            values_there, weights = _in_space(block, space, feature_mean)
            part = F.embedding_bag(
                order, values_there, offsets, mode="sum", per_sample_weights=weights
            )
            total.index_add_(0, present, part)
    counts = class_counts(targets, num_classes)[:, None]
    return {space: total.div_(counts) for space, total in zip(spaces, sums, strict=True)}


def _by_class(targets: Tensor, num_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields all rows, some at a time, ordered by class within a stretch; with their classes."""
    stretch = max(STRETCH, STRETCH_PER_CLASS * num_classes)
    for start in range(0, len(targets), stretch):
        labels, order = targets[start : start + stretch].sort(stable=True)
        yield from zip((order + start).split(ROWS), labels.split(ROWS), strict=True)


def _in_space(
    block: Tensor, space: FeatureSpace, mean: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns rows (B, D) and their weights (B,), which make them what they are in a space."""
    if space == "raw":
        return block, None
    if space == "centered_l2":
        assert mean is not None
        block = block - mean.float()
    norms: Tensor = torch.linalg.vector_norm(block, dim=1)
    if not norms.isfinite().all():
        raise UsageError("features are too large: the norm of a row is beyond float32")
    return block, norms.clamp_min_(1e-12).reciprocal_()


# The range that Kang et al. sweep, in steps half as wide.
TAU_GRID = tuple(step / 20 for step in range(41))


@register_fit("ncm")
def fit_ncm(data: FitData, *, metric: Metric = "cosine", features: FeatureSpace = "raw") -> NCMHead:
    """Takes the class means of the training features, in one pass over them.

    ``feature_mean`` is the mean over training images, not over classes, as in the code of Kang et
    al.
    """
    head = NCMHead.from_classifier(data.new_linear(), metric=metric, features=features)
    values, targets = data.features.values, data.features.targets
    mean = data.features.feature_mean
    means = class_means(values, targets, data.num_classes, (features,), mean)
    with torch.no_grad():
        head.feature_mean.copy_(mean)
        head.weight.copy_(means[features])
    return head


@register_fit("tau_norm")
def fit_tau_norm(
    data: FitData, *, tau: float | None = None, keep_bias: bool = False
) -> TauNormHead:
    """Normalises the joint classifier; tau is the exact maximiser on validation.

    With a bias that is kept, accuracy has no closed form in tau: the best of a grid is taken then.
    """
    classifier = data.need_classifier("tau_norm")
    if tau is not None:
        return TauNormHead.from_classifier(classifier, tau=tau, keep_bias=keep_bias)
    val = data.need_val("tau_norm", "tau")
    if keep_bias and classifier.bias is not None:
        candidates = [
            (grid_tau, TauNormHead.from_classifier(classifier, tau=grid_tau, keep_bias=True))
            for grid_tau in TAU_GRID
        ]
        return select(candidates, data, val, "tau")
    curve = tau_curve(classifier, val, class_counts=data.class_counts, rule=data.rule)
    tau, accuracy = curve.maximise(data.objective)
    head = TauNormHead.from_classifier(classifier, tau=tau, keep_bias=keep_bias)
    head.selection = selection_record("tau", tau, accuracy, data)
    return head


@register_fit("logit_adjusted")
def fit_logit_adjusted(data: FitData, *, tau: float | None = None) -> LogitAdjustedHead:
    """Subtracts tau times the log prior; tau is the exact maximiser on validation."""
    classifier = data.need_classifier("logit_adjusted")
    counts = data.class_counts
    if tau is not None:
        return LogitAdjustedHead.from_classifier(classifier, tau=tau, class_counts=counts)
    val = data.need_val("logit_adjusted", "tau")
    curve = tau_curve(classifier, val, adjust="prior", class_counts=counts, rule=data.rule)
    tau, accuracy = curve.maximise(data.objective)
    head = LogitAdjustedHead.from_classifier(classifier, tau=tau, class_counts=counts)
    head.selection = selection_record("tau", tau, accuracy, data)
    return head
