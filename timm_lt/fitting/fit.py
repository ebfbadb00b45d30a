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

    What is not given as an option is chosen on the validation features, and ``head.selection`` says
    how. Everything is computed in float32, whatever the type of the features, and what is passed in
    stays as it is. Features are read some rows at a time: they may lie in a mapped file that is
    larger than memory. Those of several views of each image are so many more rows.

    Args:
        name: One of :func:`timm_lt.list_heads`; or ``"auto"``, which fits several of them and
            takes the one with the highest objective on validation. Its option ``heads`` gives
            their names, or maps each to its options; without it they are those of
            :data:`DEFAULT_HEADS` that can be fitted from what is passed.
        features: Training features, values (N, D).
        classifier: The joint classifier (C, D), as ``model.get_classifier()`` gives it (an
            ``nn.Linear``, alone or inside of a module, or a 1×1 convolution), or a ``linear`` head;
            needed by the heads that start from it.
        class_counts: Training images per class (C,), on which the joint classifier was trained;
            None counts the images by their targets. They are the prior of ``logit_adjusted``; what
            balances classes counts the features that it is given, which may be a part of the
            training set.
        val: Validation features, values (M, D), with an image of every class.
        seed: A non-negative integer, for the fits that draw batches.
        objective: What is maximised on validation: ``"all"``, accuracy over the images;
            ``"class_mean"``, the mean over the classes, which is the same on a balanced split;
            ``"few_shot"``; ``"harmonic_mean"`` of the shot groups; or ``"worst_class"``.
        rule: Where the shot groups have their boundaries.
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
        # A misspelt head, before the data are looked at.
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
    """Fits several heads and returns the one with the highest objective on validation."""
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
    """Returns the heads that are compared, each with its options."""
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
    """Returns a copy of the head with the highest objective, with a record of what was compared.

    The record is its ``selection``: that of :func:`~timm_lt.fitting.base.compare_heads`, and
    ``options`` with what had been selected for the head itself.

    Args:
        heads: Fitted heads by name.
        preds: What they predict on validation, (M,) each.
        targets: The labels, (M,).
        class_counts: Training images per class, (C,).
        objective: What is maximised.
        rule: Where the shot groups have their boundaries.
    """
    record = compare_heads(preds, targets, class_counts, objective=objective, rule=rule)
    best = copy.deepcopy(heads[record["head"]])
    best.selection = record | ({"options": best.selection} if best.selection else {})
    return best
