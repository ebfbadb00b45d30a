"""Fits without an optimiser: class means, and one selected tau."""

import torch

from timm_lt.fitting.base import register_fit
from timm_lt.fitting.class_means import class_means
from timm_lt.fitting.curves import tau_curve
from timm_lt.fitting.data import FitData
from timm_lt.fitting.selection import select, selection_record
from timm_lt.heads import LogitAdjustedHead, NCMHead, TauNormHead
from timm_lt.heads.metric import FeatureSpace, Metric

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
