"""The factory of fitted heads: one fit per head, registered under the head's name."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, get_args

from torch import Tensor, nn

from timm_lt.features import Features
from timm_lt.fitting.data import FitData, check_fit_data
from timm_lt.fitting.objective import Objective
from timm_lt.heads import HEADS, Head, as_joint, head_option_names
from timm_lt.longtail import ShotRule
from timm_lt.registry import (
    Registry,
    UsageError,
    check_choice,
    check_integer,
    check_literals,
    check_number,
    check_options,
)


class Fit(Protocol):
    """A function that makes a fitted head; its keyword-only parameters are the fit's options."""

    def __call__(self, data: FitData, /, **options: Any) -> Head:
        """Returns the fitted head."""


F = TypeVar("F", bound=Callable[..., Head])
FITS: Registry[Callable[..., Head]] = Registry("fit of head")
FIT_CHECKS: dict[str, tuple[Callable[[dict[str, Any]], None], ...]] = {}


def register_fit(name: str, *checks: Callable[[dict[str, Any]], None]) -> Callable[[F], F]:
    """Returns a decorator that registers a fit under the name of its head.

    Args:
        name: Name of the head.
        *checks: Called with the options before anything is fitted; raise UsageError.
    """
    HEADS[name]
    add = FITS.register(name)

    def decorate(fit: F) -> F:
        add(fit)
        FIT_CHECKS[name] = checks
        return fit

    return decorate


# Ranges of the numbers that fits take, as intervals; the heads check those of their own options.
FIT_RANGES = {"lr": "(0, inf)", "weight_decay": "[0, inf)"}
FIT_MINIMA = {"steps": 1, "epochs": 1, "max_iterations": 1}


def check_fit_options(name: str, options: dict[str, Any]) -> None:
    """Checks the options of a head and its fit, names and values, without fitting.

    Raises:
        UsageError: For an unknown head, an option that it does not take, or a value out of range.
    """
    cls = HEADS[name]
    check_options(f"head {name!r}", FITS[name], options)
    defaults = inspect.signature(FITS[name]).parameters
    for key, value in options.items():
        if value is None and defaults[key].default is not None:
            raise UsageError(f"{key} of head {name!r} cannot be null; leave it out for its default")
    of_head = {key: options[key] for key in head_option_names(name) if key in options}
    # None stands for an option that is to be selected.
    cls(1, 1, **{key: value for key, value in of_head.items() if value is not None})
    for key, value in options.items():
        if key in FIT_RANGES and value is not None:
            check_number(f"{key} of head {name!r}", value, FIT_RANGES[key])
        if key in FIT_MINIMA and value is not None:
            check_integer(f"{key} of head {name!r}", value, minimum=FIT_MINIMA[key])
    check_literals(f"head {name!r}", FITS[name], options)
    for check in FIT_CHECKS.get(name, ()):
        check(options)


def fit_head(
    name: str,
    features: Features,
    /,
    *,
    classifier: nn.Module | None = None,
    class_counts: Tensor | None = None,
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
        name: One of :func:`timm_lt.list_heads`.
        features: Training features, values (N, D).
        classifier: The joint classifier (C, D), as ``model.get_classifier()`` gives it (an
            ``nn.Linear``, alone or inside of a module, or a 1×1 convolution), or a ``linear`` head;
            needed by the heads that start from it.
        class_counts: Training images per class (C,), on which the joint classifier was trained;
            None counts the targets. They are the prior of ``logit_adjusted``; what balances classes
            counts the features that it is given, which may be a part of the training set.
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

    >>> x = torch.eye(3).repeat(4, 1)
    >>> head = fit_head("ncm", Features(x, torch.arange(3).repeat(4)))
    >>> head(x[:3]).argmax(1)
    tensor([0, 1, 2])
    """
    check_fit_options(name, options)
    joint = None if classifier is None else as_joint(classifier)
    check_choice("objective", objective, get_args(Objective))
    data = check_fit_data(
        features, joint, class_counts, val, seed=seed, objective=objective, rule=rule
    )
    return FITS[name](data, **options).eval()
