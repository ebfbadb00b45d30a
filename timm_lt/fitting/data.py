"""What a fit may use, checked once for all fits."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_lt.features import Features, check_features
from timm_lt.fitting.curves import check_fits, check_joint
from timm_lt.metrics import Objective
from timm_lt.utils.checks import UsageError, check_integer
from timm_lt.utils.longtail import (
    ClassCounts,
    ShotRule,
    check_class_counts,
    check_no_empty_class,
    class_counts,
)


@dataclass(frozen=True)
class FitData:
    """What a fit may use; every field has been checked against the others.

    Attributes:
        features: Training features, values (N, D) as they came, maybe in a mapped file, with rows
            of every class. They are to be read in blocks, as float32.
        class_counts: Training images per class, (C,), all >= 1; those of the joint classifier,
            which need not be those of the features.
        classifier: A copy of the joint classifier (C, D) in float32 on the CPU, or None.
        val: Validation features, or None.
        seed: Seed of whatever is random.
        objective: What is maximised on validation.
        rule: Where the shot groups have their boundaries.
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
        """Returns the joint classifier, or raises UsageError for a head that starts from it."""
        if self.classifier is None:
            raise UsageError(f"head {name!r} starts from the joint classifier: pass classifier=")
        return self.classifier

    def need_val(self, name: str, option: str, otherwise: str | None = None) -> Features:
        """Returns the validation features, or raises UsageError for an option to be selected."""
        if self.val is None:
            raise UsageError(
                f"head {name!r} selects {option} on validation features: pass val=, or "
                f"{otherwise or option + '='}"
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
    """Checks what is passed to a fit; see :func:`~timm_lt.fitting.fit_head` for the arguments."""
    check_integer("seed", seed, minimum=0)
    check_features(features, "features")
    if classifier is not None:
        classifier = _joint_copy(classifier)
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
    if len(counts) != num_classes:
        raise UsageError(f"class_counts has {len(counts)} classes, the classifier {num_classes}")
    check_no_empty_class(counts)
    if val is not None:
        check_fits(val, "val", num_classes, classifier)
        if val.num_features != features.num_features:
            raise UsageError(
                f"val has {val.num_features} features per row, the training features "
                f"{features.num_features}"
            )
        _check_validation(class_counts(val.targets, num_classes))
    return FitData(features, counts, classifier, val, seed, objective, rule)


def _joint_copy(classifier: nn.Linear) -> nn.Linear:
    """Copies the joint classifier, so that the model from which it comes stays where it is."""
    check_joint(classifier)
    return copy.deepcopy(classifier).to("cpu", torch.float32)


def _check_validation(counts: Tensor) -> None:
    missing = torch.nonzero(counts == 0).flatten().tolist()
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise UsageError(
            f"{len(missing)} of {len(counts)} classes have no validation image: {shown}; selecting "
            "on such a split would ignore them"
        )
