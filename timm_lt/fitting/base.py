"""The factory of fitted heads: one fit per head, registered under the head's name."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor

from timm_lt.fitting.data import FitData
from timm_lt.heads import HEADS, Head, head_option_names
from timm_lt.utils.checks import (
    Registry,
    UsageError,
    check_integer,
    check_literals,
    check_number,
    check_options,
)
from timm_lt.utils.longtail import ShotRule


class Fit(Protocol):
    """A function that makes a fitted head; its keyword-only parameters are the fit's options."""

    def __call__(self, data: FitData, /, **options: Any) -> Head:
        """Returns the fitted head."""


class ClassesCheck(Protocol):
    """A check of a fit's options that knows how many images the classes have."""

    def __call__(
        self, options: dict[str, Any], class_counts: Tensor, *, rule: ShotRule, views: int
    ) -> None:
        """Raises UsageError if there is no such fit of classes of these sizes."""


F = TypeVar("F", bound=Callable[..., Head])
FITS: Registry[Callable[..., Head]] = Registry("fit of head")
FIT_CHECKS: dict[str, tuple[Callable[[dict[str, Any]], None], ...]] = {}
CLASSES_CHECKS: dict[str, ClassesCheck] = {}
# By head, what returns the options that the data decide where they are not given.
FIT_COMPLETIONS: dict[str, Callable[[FitData, dict[str, Any]], dict[str, Any]]] = {}


def register_fit(
    name: str,
    *checks: Callable[[dict[str, Any]], None],
    check_classes: ClassesCheck | None = None,
    complete: Callable[[FitData, dict[str, Any]], dict[str, Any]] | None = None,
) -> Callable[[F], F]:
    """Returns a decorator that registers a fit under the name of its head.

    Args:
        name: Name of the head.
        *checks: Called with the options before anything is fitted; raise UsageError.
        check_classes: Called by :func:`check_fit_classes`, for what depends on the class counts.
        complete: Called with the data and the options before these are checked; returns the options
            with those that depend on the data.
    """
    HEADS[name]
    add = FITS.register(name)

    def decorate(fit: F) -> F:
        add(fit)
        FIT_CHECKS[name] = checks
        if check_classes is not None:
            CLASSES_CHECKS[name] = check_classes
        if complete is not None:
            FIT_COMPLETIONS[name] = complete
        return fit

    return decorate


# Ranges of the numbers that fits take, as intervals; the heads check those of their own options.
FIT_RANGES = {"lr": "(0, inf)", "weight_decay": "[0, inf)"}
FIT_MINIMA = {"steps": 1, "epochs": 1, "max_iterations": 1}
# Beyond it, the draws of a training would not fit into memory.
FIT_MAXIMUM = 10_000_000


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
            lowest = FIT_MINIMA[key]
            check_integer(f"{key} of head {name!r}", value, lowest, FIT_MAXIMUM)
    check_literals(f"head {name!r}", FITS[name], options)
    for check in FIT_CHECKS.get(name, ()):
        check(options)


def complete_fit_options(name: str, data: FitData, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a fit with those that the data decide, after checking all of them.

    Raises:
        UsageError: As :func:`check_fit_options`.
    """
    complete = FIT_COMPLETIONS.get(name)
    completed = dict(options) if complete is None else complete(data, dict(options))
    check_fit_options(name, completed)
    return completed


def check_fit_classes(
    name: str,
    options: dict[str, Any],
    class_counts: Tensor,
    *,
    rule: ShotRule = "fb",
    views: int = 1,
) -> None:
    """Checks that a head can be fitted on classes of so many images, without features.

    Args:
        name: Name of the head.
        options: Options that :func:`check_fit_options` has checked.
        class_counts: Training images per class (C,), at least 1 each.
        rule: Where the shot groups have their boundaries.
        views: Rows of features that each image has.

    Raises:
        UsageError: If not: a group that the head needs is empty, or a schedule is too long for it.
    """
    check = CLASSES_CHECKS.get(name)
    if check is not None:
        check(options, class_counts, rule=rule, views=views)
