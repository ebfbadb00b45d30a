"""Fits without an optimiser: class means, the joint classifier as it is, and one selected tau."""

import torch
from torch import Tensor

from timm_lt.fitting.base import FitData, register_fit, select, selection_record
from timm_lt.fitting.curves import tau_curve
from timm_lt.heads import LinearHead, LogitAdjustedHead, NCMHead, TauNormHead
from timm_lt.heads.metric import FeatureSpace, Metric

# The range that Kang et al. sweep, in steps half as wide.
TAU_GRID = tuple(step / 20 for step in range(41))


@register_fit("linear")
def fit_linear(data: FitData) -> LinearHead:
    """Returns the joint classifier as a head."""
    return LinearHead.from_classifier(data.need_classifier("linear"))


@register_fit("ncm")
def fit_ncm(data: FitData, *, metric: Metric = "cosine", features: FeatureSpace = "raw") -> NCMHead:
    """Takes the class means of the training features, in float64.

    ``feature_mean`` is the mean over training images, not over classes, as in the code of Kang et
    al.
    """
    linear = data.new_linear()
    head = NCMHead.from_classifier(linear, metric=metric, features=features)
    values, targets = data.features.values, data.features.targets
    with torch.no_grad():
        head.feature_mean.copy_(values.double().mean(0))
        means = class_means(head.feature_space(values), targets, data.num_classes)
        head.weight.copy_(means)
    return head


def class_means(values: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Returns the mean of the rows of each class.

    Shape:
        values (N, D), targets (N,); the means are (C, D) float64, NaN for a class without rows.

    >>> class_means(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1]), 2).tolist()
    [[2.0], [5.0]]
    """
    sums = torch.zeros(num_classes, values.shape[1], dtype=torch.float64)
    sums.index_add_(0, targets, values.double())
    return sums / torch.bincount(targets, minlength=num_classes)[:, None]


@register_fit("tau_norm")
def fit_tau_norm(
    data: FitData, *, tau: float | None = None, keep_bias: bool = False
) -> TauNormHead:
    """Normalises the joint classifier; tau is the exact maximiser of validation accuracy.

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
    curve = tau_curve(classifier, val)
    head = TauNormHead.from_classifier(classifier, tau=curve.best_tau, keep_bias=keep_bias)
    head.selection = selection_record("tau", head.tau, curve(head.tau))
    return head


@register_fit("logit_adjusted")
def fit_logit_adjusted(data: FitData, *, tau: float | None = None) -> LogitAdjustedHead:
    """Subtracts tau times the log prior; tau is the exact maximiser of validation accuracy."""
    classifier = data.need_classifier("logit_adjusted")
    counts = data.class_counts
    if tau is not None:
        return LogitAdjustedHead.from_classifier(classifier, tau=tau, class_counts=counts)
    val = data.need_val("logit_adjusted", "tau")
    curve = tau_curve(classifier, val, adjust="prior", class_counts=counts)
    head = LogitAdjustedHead.from_classifier(classifier, tau=curve.best_tau, class_counts=counts)
    head.selection = selection_record("tau", head.tau, curve(head.tau))
    return head
