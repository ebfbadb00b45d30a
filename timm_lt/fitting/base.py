"""The registry of fits, the data that they take, and selection on validation."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from timm_lt.features import Features, check_features
from timm_lt.fitting.curves import check_fits, check_joint
from timm_lt.fitting.sgd import row_blocks
from timm_lt.heads import HEADS, Head, head_option_names
from timm_lt.metrics import (
    Objective,
    confidence_intervals,
    objective_field,
    objective_value,
    paired_difference,
    shot_accuracy,
)
from timm_lt.utils.checks import (
    UsageError,
    check_integer,
    check_literals,
    check_number,
    check_options,
    shown_names,
)
from timm_lt.utils.longtail import (
    ClassCounts,
    ShotRule,
    check_class_counts,
    check_no_empty_class,
    class_counts,
)
from timm_lt.utils.registry import Registry


@dataclass(frozen=True)
class FitData:
    """Checked input of a fit.

    Attributes:
        features: Training features, values (N, D) of any floating type, maybe memory-mapped, with
            rows of every class; to be read in blocks.
        class_counts: Training images per class, (C,), all >= 1, of the joint classifier; they may
            differ from the counts of the features.
        classifier: A float32 copy of the joint classifier (C, D) on the CPU, or None.
        val: Validation features, or None.
        seed: Random seed.
        objective: What is maximised on validation.
        rule: Bounds of the shot groups.
    """

    features: Features
    class_counts: Tensor
    classifier: nn.Linear | None
    val: Features | None
    seed: int
    objective: Objective
    rule: ShotRule

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_counts)

    def need_classifier(self, name: str) -> nn.Linear:
        """Returns the joint classifier; UsageError if there is none."""
        if self.classifier is None:
            raise UsageError(f"head {name!r} starts from the joint classifier: pass classifier=")
        return self.classifier

    def need_val(self, name: str, option: str, otherwise: str | None = None) -> Features:
        """Returns the validation features on which ``option`` is selected; UsageError if none."""
        if self.val is None:
            raise UsageError(
                f"head {name!r} selects {option} on validation features: pass val=, or "
                f"{otherwise or option + '='}"
            )
        return self.val

    def new_linear(self) -> nn.Linear:
        """Returns the initial ``nn.Linear`` (C, D): the joint classifier, or zeros."""
        if self.classifier is not None:
            return self.classifier
        linear = nn.Linear(self.features.num_features, self.num_classes)
        for parameter in linear.parameters():
            nn.init.zeros_(parameter)
        return linear


def check_fit_data(
    features: Features,
    classifier: nn.Linear | None,
    counts: ClassCounts | None,
    val: Features | None,
    *,
    seed: int,
    objective: Objective,
    rule: ShotRule,
) -> FitData:
    """Checks the arguments of :func:`~timm_lt.fitting.fit_head`."""
    check_integer("seed", seed, minimum=0)
    check_features(features, "features")
    if classifier is not None:
        check_joint(classifier)
        # A copy, so that the model stays on its device.
        classifier = copy.deepcopy(classifier).to("cpu", torch.float32)
        num_classes = classifier.out_features
    else:
        counts = None if counts is None else check_class_counts(counts)
        num_classes = int(features.targets.max()) + 1 if counts is None else len(counts)
    check_fits(features, "features", num_classes, classifier)
    of_features = class_counts(features.targets, num_classes)
    check_no_empty_class(of_features)
    counts = (
        of_features // features.views if counts is None else check_class_counts(counts, num_classes)
    )
    check_no_empty_class(counts)
    if val is not None:
        check_fits(val, "val", num_classes, classifier)
        if val.num_features != features.num_features:
            raise UsageError(
                f"val has {val.num_features} features per row, the training features "
                f"{features.num_features}"
            )
        empty = (class_counts(val.targets, num_classes) == 0).nonzero().flatten().tolist()
        if empty:
            raise UsageError(
                f"{len(empty)} of {num_classes} classes have no validation image: "
                f"{shown_names(empty)}; selecting on such a split would ignore them"
            )
    return FitData(features, counts, classifier, val, seed, objective, rule)


class Fit(Protocol):
    """A function that fits a head; its keyword-only parameters are the options."""

    def __call__(self, data: FitData, /, **options: Any) -> Head:
        """Returns the fitted head."""


class ClassesCheck(Protocol):
    """A check of a fit's options that depends on the class counts."""

    def __call__(
        self, options: dict[str, Any], class_counts: Tensor, *, rule: ShotRule, views: int
    ) -> None:
        """Raises UsageError if classes of these sizes cannot be fitted."""


F = TypeVar("F", bound=Callable[..., Head])
FITS: Registry[Callable[..., Head]] = Registry("fit of head")
FIT_CHECKS: dict[str, tuple[Callable[[dict[str, Any]], None], ...]] = {}
CLASSES_CHECKS: dict[str, ClassesCheck] = {}
# By head, a function that adds default options that depend on the data.
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
        *checks: Check the options before anything is fitted.
        check_classes: Checks what depends on the class counts; see :func:`check_fit_classes`.
        complete: Returns the options together with the defaults that depend on the data.
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


# Ranges of the options of fits; heads check their own options.
FIT_RANGES = {"lr": "(0, inf)", "weight_decay": "[0, inf)"}
FIT_MINIMA = {"steps": 1, "epochs": 1, "max_iterations": 1}
# More draws would not fit into memory.
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
            raise UsageError(f"{key} of head {name!r} cannot be null; remove it for its default")
    of_head = {key: options[key] for key in head_option_names(name) if key in options}
    # None: to be selected on validation.
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
    """Adds default options that depend on the data, and checks all as :func:`check_fit_options`."""
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
    """Checks, before features exist, that a head can be fitted on classes of these sizes.

    Args:
        name: Name of the head.
        options: Options that :func:`check_fit_options` has checked.
        class_counts: Training images per class (C,), at least 1 each.
        rule: Bounds of the shot groups.
        views: Rows of features per image.

    Raises:
        UsageError: If a group that the head needs is empty, or a schedule is too long.
    """
    check = CLASSES_CHECKS.get(name)
    if check is not None:
        check(options, class_counts, rule=rule, views=views)


H = TypeVar("H", bound=Head)


def predictions(head: Head, features: Features) -> Tensor:
    """Returns the predicted classes (N,)."""
    with torch.inference_mode():
        blocks = row_blocks(features.values, head.out_features)
        return torch.cat([head(block).argmax(1) for block in blocks])


def validation_score(head: Head, data: FitData, val: Features) -> tuple[float, float]:
    """Returns the objective on validation and the class mean, which breaks ties.

    An objective such as the worst class is often 0 for all candidates.
    """
    report = shot_accuracy(predictions(head, val), val.targets, data.class_counts, data.rule)
    return objective_value(report, data.objective), report.class_mean


def select(candidates: list[tuple[Any, H]], data: FitData, val: Features, option: str) -> H:
    """Returns the first candidate (value of the option, head) with the highest objective on val."""
    scores = [validation_score(head, data, val) for _, head in candidates]
    best = max(range(len(scores)), key=scores.__getitem__)
    value, head = candidates[best]
    head.selection = selection_record(option, value, scores[best][0], data)
    head.selection["compared"] = [
        [value, score] for (value, _), (score, _) in zip(candidates, scores, strict=True)
    ]
    return head


def selection_record(option: str, value: float, accuracy: float, data: FitData) -> dict[str, Any]:
    """Returns a checkpoint's record of a selected option; ``val_accuracy`` is the objective."""
    return {
        option: value,
        "objective": data.objective,
        "split": "val",
        "val_accuracy": accuracy,
    }


def compare_heads(
    preds: Mapping[str, Tensor],
    targets: Tensor,
    counts: Tensor,
    *,
    objective: Objective = "all",
    rule: ShotRule = "fb",
) -> dict[str, Any]:
    """Compares heads on validation, with 95 % bootstrap intervals over the images.

    Args:
        preds: Predicted classes by head, (N,) each; at least one head.
        targets: True classes, (N,).
        counts: Training images per class, (C,).
        objective: What is compared.
        rule: Bounds of the shot groups.

    Returns:
        A selection record: the best ``head``; ``objective``, ``split`` and ``val_accuracy``, its
        value; ``compared``, the value of each head; their ``intervals``; and ``behind``, the
        intervals of the difference between the best head and each.

    Raises:
        UsageError: If there is no head, or the split has no image of the objective's shot group.
    """
    if not preds:
        raise UsageError("there are no heads to choose from")
    reports = {name: shot_accuracy(given, targets, counts, rule) for name, given in preds.items()}
    values = {name: objective_value(report, objective) for name, report in reports.items()}
    # The class mean breaks ties, e.g. where the worst class is 0 for all.
    best = max(values, key=lambda name: (values[name], reports[name].class_mean))
    field = objective_field(objective)
    intervals = {name: confidence_intervals(r, counts)[field] for name, r in reports.items()}
    behind = {
        name: paired_difference(
            preds[best], given, targets, counts, objective=objective, rule=rule
        )[1:]
        for name, given in preds.items()
    }
    return {
        "head": best,
        "objective": objective,
        "split": "val",
        "val_accuracy": values[best],
        "compared": [list(pair) for pair in values.items()],
        "intervals": {name: list(interval) for name, interval in intervals.items()},
        "behind": {name: list(interval) for name, interval in behind.items()},
    }
