"""Fitting one head, or the best of several."""

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import Tensor, nn

from timm_lt.features import Features
from timm_lt.fitting.base import (
    FITS,
    FitData,
    check_fit_data,
    compare_heads,
    complete_fit_options,
    predictions,
)
from timm_lt.heads import HEADS, Head, as_joint
from timm_lt.metrics import Objective
from timm_lt.utils.accelerator import torch_defaults
from timm_lt.utils.checks import UsageError, check_choice, check_options
from timm_lt.utils.console import log
from timm_lt.utils.longtail import ClassCounts, ShotRule

AUTO = "auto"
DEFAULT_HEADS = ("linear", "crt", "tau_norm", "lws", "ncm", "logit_adjusted")
HEADS_WITHOUT_CLASSIFIER = ("crt", "ncm")


@torch_defaults()
def fit_head(
    name: str,
    features: Features,
    /,
    *,
    classifier: nn.Module | None = None,
    class_counts: ClassCounts | None = None,
    val: Features | None = None,
    seed: int = 0,
    objective: Objective = "all",
    rule: ShotRule = "fb",
    **options: Any,
) -> Head:
    """Fits a head on frozen features.

    Options that are not given are selected on the validation features; ``head.selection`` records
    how. Everything is computed in float32. Features are read in blocks and may be memory-mapped and
    larger than memory; several views of an image are several rows.

    Args:
        name: One of :func:`timm_lt.list_heads`; or ``"auto"``, which fits several heads and
            returns the one with the highest objective on validation. Its option ``heads`` has their
            names, or maps each to its options; by default those of :data:`DEFAULT_HEADS` that can
            be fitted from the arguments.
        features: Training features, values (N, D).
        classifier: The joint classifier (C, D) as returned by ``model.get_classifier()``
            (``nn.Linear``, alone or in a module, or a 1×1 convolution), or a ``linear`` head; for
            heads that start from it.
        class_counts: Training images per class (C,) of the joint classifier, the prior of
            ``logit_adjusted``; None counts the targets. Class-balanced fits always count the
            features, which may be a part of the training set.
        val: Validation features, values (M, D), with an image of every class.
        seed: Random seed, at least 0, of the fits that draw batches.
        objective: What is maximised on validation: ``"all"`` (accuracy over images),
            ``"class_mean"``, ``"few_shot"``, ``"harmonic_mean"`` of the shot groups, or
            ``"worst_class"``.
        rule: Bounds of the shot groups.
        **options: Options of the head and its fit.

    Returns:
        The head, in evaluation mode, on the CPU.

    Raises:
        UsageError: For an unknown head or option, a value out of range, shapes that do not match, a
            class without training or validation images, or a missing classifier or validation
            features.

    >>> import torch
    >>> x = torch.eye(3).repeat(4, 1)
    >>> head = fit_head("ncm", Features(x, torch.arange(3).repeat(4)))
    >>> head(x[:3]).argmax(1)
    tensor([0, 1, 2])
    """
    if name == AUTO:
        check_options(f"head {name!r}", _fit_best, options)
    else:
        # Unknown names fail before the data are checked.
        HEADS[name]
    joint = None if classifier is None else as_joint(classifier)
    check_choice("objective", objective, get_args(Objective))
    data = check_fit_data(
        features, joint, class_counts, val, seed=seed, objective=objective, rule=rule
    )
    if name == AUTO:
        return _fit_best(data, **options)
    return _fit(name, data, complete_fit_options(name, data, options))


def _fit(name: str, data: FitData, options: Mapping[str, Any]) -> Head:
    started = time.perf_counter()
    head = FITS[name](data, **options).eval()
    log.debug("fitted %s in %.1f s: %s", name, time.perf_counter() - started, head)
    return head


def _fit_best(
    data: FitData, *, heads: Mapping[str, dict[str, Any] | None] | Sequence[str] | None = None
) -> Head:
    """Fits several heads and returns the best on validation."""
    val = data.need_val(AUTO, "a head", "the name of one")
    if heads is None:
        heads = DEFAULT_HEADS if data.classifier is not None else HEADS_WITHOUT_CLASSIFIER
    candidates = _candidates(heads)
    completed = {
        name: complete_fit_options(name, data, options) for name, options in candidates.items()
    }
    fitted = {name: _fit(name, data, options) for name, options in completed.items()}
    preds = {name: predictions(head, val) for name, head in fitted.items()}
    return take_best(fitted, preds, val.targets, data.class_counts, data.objective, data.rule)


def _candidates(
    heads: Mapping[str, dict[str, Any] | None] | Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Returns the options of each head to compare."""
    if isinstance(heads, Mapping):
        options = {name: {} if given is None else given for name, given in heads.items()}
    else:
        options = {} if isinstance(heads, str) else {name: {} for name in heads}
    if isinstance(heads, str) or not all(isinstance(given, dict) for given in options.values()):
        raise UsageError(
            f"heads of head {AUTO!r} must be names of heads, or map each to its options; got "
            f"{heads!r}"
        )
    return options


def take_best(
    heads: Mapping[str, Head],
    preds: Mapping[str, Tensor],
    targets: Tensor,
    class_counts: Tensor,
    objective: Objective = "all",
    rule: ShotRule = "fb",
) -> Head:
    """Returns a copy of the best head by its predictions on validation, ``preds`` (M,) each.

    Its ``selection`` is the record of :func:`~timm_lt.fitting.base.compare_heads`, with the head's
    own selection as ``options``.
    """
    record = compare_heads(preds, targets, class_counts, objective=objective, rule=rule)
    best = copy.deepcopy(heads[record["head"]])
    best.selection = record | ({"options": best.selection} if best.selection else {})
    return best
