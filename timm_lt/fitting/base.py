"""Fits of heads on features: their registry and data, selection on validation, and `fit_head`."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar, get_args

import torch
from torch import Tensor, nn

from timm_lt.features import Features
from timm_lt.fitting.curves import check_fits, joint_classifier
from timm_lt.fitting.solvers import row_blocks
from timm_lt.heads import HEADS, Head, head_option_names
from timm_lt.metrics import (
    Objective,
    confidence_intervals,
    objective_field,
    objective_value,
    paired_difference,
    shot_accuracy,
)
from timm_lt.utils.accelerator import torch_defaults
from timm_lt.utils.checks import (
    Registry,
    UsageError,
    check_choice,
    check_fields,
    check_integer,
    check_mapping,
    check_number,
    check_options,
    shown_names,
)
from timm_lt.utils.console import log
from timm_lt.utils.longtail import (
    ClassCounts,
    ShotRule,
    check_class_counts,
    check_no_empty_class,
    class_counts,
)

AUTO = "auto"
DEFAULT_HEADS = ("linear", "crt", "tau_norm", "lws", "ncm", "logit_adjusted")
HEADS_WITHOUT_CLASSIFIER = ("crt", "ncm")
# Ranges of the options of fits; heads check their own options.
RANGES = {
    "lr": "(0, inf)",
    "weight_decay": "[0, inf)",
    "max_norm": "(0, inf)",
    "loss_weight": "[0, inf)",
    "novel_share": "(0, 1)",
    "dropout": "[0, 1)",
    "gamma": "(0, inf)",
    "scale": "(0, inf)",
}
MINIMA = {"steps": 1, "epochs": 1, "max_iterations": 1}
MINIMA |= {"episodes": 1, "fake_novel": 1, "exemplars": 1, "queries": 2}
# More draws would not fit into memory.
MAXIMUM = 10_000_000


class FitData:
    """Checked input of a fit; the arguments are those of :func:`fit_head`.

    Attributes:
        features: Training features, (N, D) of any floating type, maybe memory-mapped, with rows of
            every class; to be read in blocks.
        class_counts: Training images per class, (C,), all >= 1, of the joint classifier; they may
            differ from the counts of the features.
        classifier: A float32 copy of the joint classifier (C, D) on the CPU.
    """

    def __init__(
        self,
        features: Features,
        classifier: nn.Module | None,
        counts: ClassCounts | None,
        val: Features | None,
        *,
        seed: int,
        objective: Objective,
        rule: ShotRule,
    ) -> None:
        self.seed = check_integer("seed", seed, minimum=0)
        check_choice("objective", objective, get_args(Objective))
        self.features, self.val, self.objective, self.rule = features, val, objective, rule
        self.classifier, num_classes, width = None, None, None
        if classifier is not None:
            # A copy, so that the model stays on its device.
            self.classifier = copy.deepcopy(joint_classifier(classifier)).to("cpu", torch.float32)
            num_classes, width = self.classifier.out_features, self.classifier.in_features
        if counts is not None:
            counts = check_class_counts(counts, num_classes)
            num_classes = len(counts)
        check_fits(features, "features", num_classes, width)
        number = num_classes or int(features.targets.max()) + 1
        of_features = class_counts(features.targets, number)
        self.class_counts = of_features // features.views if counts is None else counts
        for some in (of_features, self.class_counts):
            check_no_empty_class(some)
        if val is not None:
            check_fits(val, "val", number, features.num_features)
            empty = (class_counts(val.targets, number) == 0).nonzero().flatten().tolist()
            if empty:
                raise UsageError(
                    f"{len(empty)} of {number} classes have no validation image: "
                    f"{shown_names(empty)}; selecting on such a split would ignore them"
                )

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


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fit of a head: the fields are its options, and calling it fits the head.

    Options with the name of an option of the head are passed on to the head. For an option whose
    default is None, None is chosen from the data.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        owner, options = f"head {self.name!r}", vars(self)
        check_fields(self, owner)
        chosen = {field.name for field in fields(self) if field.default is None}
        given = {k: value for k, value in options.items() if value is not None or k not in chosen}
        for key in RANGES.keys() & given:
            check_number(f"{key} of {owner}", given[key], RANGES[key])
        for key in MINIMA.keys() & given:
            check_integer(f"{key} of {owner}", given[key], MINIMA[key], MAXIMUM)
        of_head = {key: given[key] for key in head_option_names(self.name) if key in given}
        HEADS[self.name](1, 1, **of_head)

    def check_classes(self, class_counts: Tensor, *, rule: ShotRule = "fb", views: int = 1) -> None:
        """Checks, before features exist, that classes (C,) of these sizes can be fitted."""

    def __call__(self, data: FitData) -> Head:
        """Returns the fitted head in evaluation mode, and logs the time."""
        started = time.perf_counter()
        head = self._fit(data).eval()
        log.debug("fitted %s in %.1f s: %s", self.name, time.perf_counter() - started, head)
        return head

    def _fit(self, data: FitData) -> Head:
        raise NotImplementedError


F = TypeVar("F", bound=type[Fit])
FITS: Registry[type[Fit]] = Registry("fit of head")


def register_fit(name: str) -> Callable[[F], F]:
    """Returns a class decorator that registers a fit under the name of its head."""
    HEADS[name]
    add = FITS.register(name)

    def decorate(cls: F) -> F:
        cls.name = name
        add(cls)
        return cls

    return decorate


def create_fit(name: str, **options: Any) -> Fit:
    """Creates the fit of a head; UsageError for an unknown head or a wrong option."""
    HEADS[name]
    check_options(f"head {name!r}", FITS[name], options)
    return FITS[name](**options)


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
    how. Everything is computed in float32. Features are read in blocks and may be larger than
    memory; several views of an image are several rows.

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
            class without images, or a missing classifier or validation features.

    >>> import torch
    >>> x = torch.eye(3).repeat(4, 1)
    >>> head = fit_head("ncm", Features(x, torch.arange(3).repeat(4)))
    >>> head(x[:3]).argmax(1)
    tensor([0, 1, 2])
    """
    if name == AUTO:
        check_options(f"head {AUTO!r}", _fit_best, options)
    fit = None if name == AUTO else create_fit(name, **options)
    data = FitData(
        features, classifier, class_counts, val, seed=seed, objective=objective, rule=rule
    )
    return _fit_best(data, **options) if fit is None else fit(data)


def _fit_best(
    data: FitData, *, heads: Mapping[str, dict[str, Any] | None] | Sequence[str] | None = None
) -> Head:
    """Fits several heads and returns the best on validation."""
    val = data.need_val(AUTO, "a head", "the name of one")
    if heads is None:
        heads = DEFAULT_HEADS if data.classifier is not None else HEADS_WITHOUT_CLASSIFIER
    given = heads if isinstance(heads, Mapping) else dict.fromkeys(heads)
    options = {name: check_mapping(f"options of head {name!r}", given[name]) for name in given}
    fits = [create_fit(name, **options[name]) for name in options]
    fitted = {fit.name: fit(data) for fit in fits}
    preds = {name: predictions(head, val) for name, head in fitted.items()}
    return take_best(fitted, preds, val.targets, data.class_counts, data.objective, data.rule)


H = TypeVar("H", bound=Head)


def predictions(head: Head, features: Features) -> Tensor:
    """Returns the predicted classes (N,)."""
    with torch.inference_mode():
        blocks = row_blocks(features.values, head.out_features)
        return torch.cat([head(block).argmax(1) for block in blocks])


def validation_score(head: Head, data: FitData, val: Features) -> tuple[float, float]:
    """Returns the objective on validation and the class mean, which breaks ties, such as at 0."""
    report = shot_accuracy(predictions(head, val), val.targets, data.class_counts, data.rule)
    return objective_value(report, data.objective), report.class_mean


def select(candidates: list[tuple[Any, H]], data: FitData, val: Features, option: str) -> H:
    """Returns the first candidate (value of the option, head) with the highest objective on val."""
    scores = [validation_score(head, data, val) for _, head in candidates]
    best = max(range(len(scores)), key=scores.__getitem__)
    value, head = candidates[best]
    compared = [[value, score[0]] for (value, _), score in zip(candidates, scores, strict=True)]
    head.selection = selection_record(option, value, scores[best][0], data, compared=compared)
    return head


def selection_record(
    option: str, value: float, accuracy: float, data: FitData, **more: Any
) -> dict[str, Any]:
    """Returns a checkpoint's record of a selected option; ``val_accuracy`` is the objective."""
    record = {option: value, "objective": data.objective, "split": "val", "val_accuracy": accuracy}
    return record | more


def take_best(
    heads: Mapping[str, Head],
    preds: Mapping[str, Tensor],
    targets: Tensor,
    class_counts: Tensor,
    objective: Objective = "all",
    rule: ShotRule = "fb",
) -> Head:
    """Returns a copy of the head whose predictions (N,) on validation are best.

    Its selection record has the best ``head``; ``objective``, ``split`` and ``val_accuracy``, its
    value; ``compared``, the value of each head; their 95 % bootstrap ``intervals`` over the images;
    ``behind``, the intervals of the difference between the best head and each; and ``options``, the
    head's own selection.
    """
    if not preds:
        raise UsageError("auto needs at least one head to choose from; heads is empty")
    reports = {k: shot_accuracy(p, targets, class_counts, rule) for k, p in preds.items()}
    values = {name: objective_value(report, objective) for name, report in reports.items()}
    # The class mean breaks ties, e.g. where the worst class is 0 for all.
    best = max(values, key=lambda name: (values[name], reports[name].class_mean))
    field, intervals, behind = objective_field(objective), {}, {}
    for name, other in preds.items():
        intervals[name] = list(confidence_intervals(reports[name], class_counts)[field])
        difference = paired_difference(
            preds[best], other, targets, class_counts, objective=objective, rule=rule
        )
        behind[name] = list(difference[1:])
    head = copy.deepcopy(heads[best])
    record = {"head": best, "objective": objective, "split": "val", "val_accuracy": values[best]}
    record |= {"compared": [list(pair) for pair in values.items()]}
    record |= {"intervals": intervals, "behind": behind}
    head.selection = record | ({"options": head.selection} if head.selection else {})
    return head
