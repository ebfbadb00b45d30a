"""The factory of fitted heads: one fit per head, registered under the head's name."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from timm_lt.features import Features
from timm_lt.fitting.curves import check_fits, check_joint
from timm_lt.heads import HEADS, Head, as_joint, head_option_names
from timm_lt.longtail import check_class_counts, check_no_empty_class, class_counts
from timm_lt.metrics import shot_accuracy
from timm_lt.registry import (
    Registry,
    UsageError,
    check_integer,
    check_literals,
    check_number,
    check_options,
)


@dataclass(frozen=True)
class FitData:
    """What a fit may use; every field has been checked against the others.

    Attributes:
        features: Training features, values (N, D) float32 on the CPU, with rows of every class.
        class_counts: Training images per class, (C,), all >= 1; those of the joint classifier,
            which need not be those of the features.
        classifier: A copy of the joint classifier (C, D) in float32 on the CPU, or None.
        val: Validation features, or None.
        seed: Seed of whatever is random.
    """

    features: Features
    class_counts: Tensor
    classifier: nn.Linear | None
    val: Features | None
    seed: int

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_counts)

    def need_classifier(self, name: str) -> nn.Linear:
        """Returns the joint classifier, or raises UsageError for a head that starts from it."""
        if self.classifier is None:
            raise UsageError(f"head {name!r} starts from the joint classifier: pass classifier=")
        return self.classifier

    def need_val(self, name: str, option: str) -> Features:
        """Returns the validation features, or raises UsageError for an option to be selected."""
        if self.val is None:
            raise UsageError(
                f"head {name!r} selects {option} on validation features: pass val=, or {option}="
            )
        return self.val

    def new_linear(self) -> nn.Linear:
        """Returns an ``nn.Linear`` (C, D) as a start: the joint classifier, or zeros."""
        if self.classifier is not None:
            return self.classifier
        linear = nn.Linear(self.features.num_features, self.num_classes)
        for parameter in linear.parameters():
            nn.init.zeros_(parameter)
        return linear


class Fit(Protocol):
    """A function that makes a fitted head; its keyword-only parameters are the fit's options."""

    def __call__(self, data: FitData, /, **options: Any) -> Head:
        """Returns the fitted head."""


F = TypeVar("F", bound=Callable[..., Head])
H = TypeVar("H", bound=Head)
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
FIT_MINIMA = {"steps": 1, "max_iterations": 1}


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
        if key in FIT_MINIMA:
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
    **options: Any,
) -> Head:
    """Fits a head on frozen features.

    What is not given as an option is chosen on the validation features by overall accuracy, and
    ``head.selection`` says how. Everything is computed in float32, whatever the type of the
    features, and what is passed in stays as it is.

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
    data = _checked(features, joint, class_counts, val, seed)
    return FITS[name](data, **options).eval()


def _checked(
    features: Features,
    classifier: nn.Linear | None,
    counts: Tensor | None,
    val: Features | None,
    seed: int,
) -> FitData:
    check_integer("seed", seed, minimum=0)
    if classifier is not None:
        classifier = _joint_copy(classifier)
        num_classes = classifier.out_features
    else:
        num_classes = int(features.targets.max()) + 1 if counts is None else len(counts)
    features = _checked_features(features, "features", num_classes, classifier)
    of_features = class_counts(features.targets, num_classes)
    check_no_empty_class(of_features)
    counts = of_features if counts is None else check_class_counts(counts)
    if len(counts) != num_classes:
        raise UsageError(f"class_counts has {len(counts)} classes, the classifier {num_classes}")
    check_no_empty_class(counts)
    if val is not None:
        val = _checked_features(val, "val", num_classes, classifier)
        if val.num_features != features.num_features:
            raise UsageError(
                f"val has {val.num_features} features per row, the training features "
                f"{features.num_features}"
            )
        _check_validation(class_counts(val.targets, num_classes))
    return FitData(features, counts, classifier, val, seed)


def _joint_copy(classifier: nn.Linear) -> nn.Linear:
    """Copies the joint classifier, so that the model from which it comes stays where it is."""
    check_joint(classifier)
    return copy.deepcopy(classifier).to("cpu", torch.float32)


def _checked_features(
    features: Features, noun: str, num_classes: int, classifier: nn.Linear | None
) -> Features:
    check_fits(features, noun, num_classes, classifier)
    values = features.values.detach().to("cpu", torch.float32)
    return Features(values, features.targets.cpu())


def _check_validation(counts: Tensor) -> None:
    missing = torch.nonzero(counts == 0).flatten().tolist()
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise UsageError(
            f"{len(missing)} of {len(counts)} classes have no validation image: {shown}; selecting "
            "on such a split would ignore them"
        )


def select(candidates: list[tuple[float, H]], data: FitData, val: Features, option: str) -> H:
    """Returns the head with the best overall validation accuracy and records the choice.

    Args:
        candidates: Values of the option with the heads that they give; the first best wins.
        data: The fit's data.
        val: Validation features.
        option: Name of what is selected.
    """
    scores = []
    for _, head in candidates:
        with torch.inference_mode():
            preds = head(val.values).argmax(1)
        scores.append(shot_accuracy(preds, val.targets, data.class_counts).all)
    best = max(range(len(scores)), key=scores.__getitem__)
    value, head = candidates[best]
    head.selection = selection_record(option, value, scores[best])
    values = [value for value, _ in candidates]
    head.selection["compared"] = [list(pair) for pair in zip(values, scores, strict=True)]
    return head


def selection_record(option: str, value: float, accuracy: float) -> dict[str, Any]:
    """Returns what a checkpoint records of a selected option."""
    return {option: value, "objective": "all", "split": "val", "val_accuracy": accuracy}
