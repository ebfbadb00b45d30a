"""What a report says, in plain values: texts, numbers, and pictures as data URIs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from timm_lt.metrics import Objective

# Points of a curve, (x, y).
Points: TypeAlias = list[tuple[float, float]]


class Interval(NamedTuple):
    """A figure with its confidence interval; fractions. None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class HeadRow:
    """What the table of heads says of one.

    Attributes:
        name: Its name.
        figures: Test figures by name, such as ``many_shot`` and ``all``.
        gain: By how much ``all`` exceeds the joint classifier's, on the same images; None for the
            joint classifier itself.
        ece: Expected calibration error: ``all`` and by shot group.
        bins: Bins of confidence, as of :func:`timm_lt.metrics.reliability`.
        selected: What was chosen on validation, in words.
        seconds: Time that it took, if known.
    """

    name: str
    figures: Mapping[str, Interval]
    gain: Interval | None = None
    ece: Mapping[str, float | None] = field(default_factory=dict)
    bins: Sequence[Mapping[str, Any]] = ()
    selected: str = ""
    seconds: float | None = None


class Picture(NamedTuple):
    """A small picture.

    Attributes:
        uri: A data URI.
        text: What it shows, for those who do not see it.
        note: A few words to stand below it.
    """

    uri: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class ClassNote:
    """A class as it is named in a list.

    Attributes:
        name: Its name.
        group: Its shot group.
        training_images: How many it has.
    """

    name: str
    group: str
    training_images: int


@dataclass(frozen=True)
class Change:
    """A class whose accuracy differs from the joint classifier's.

    Attributes:
        of: The class.
        right_before: Test images that the joint classifier has right.
        right_after: Test images that the head has right.
        images: Test images of the class, at least 1.
        pictures: Test images on which the two differ.
    """

    of: ClassNote
    right_before: int
    right_after: int
    images: int
    pictures: Sequence[Picture] = ()

    @property
    def before(self) -> float:
        """Accuracy of the joint classifier."""
        return self.right_before / self.images

    @property
    def after(self) -> float:
        """Accuracy of the head."""
        return self.right_after / self.images


@dataclass(frozen=True)
class Mistake:
    """A confusion of two classes.

    Attributes:
        of: The true class.
        taken_for: The class that was predicted.
        images: How many test images.
        share: Their share of the true class's test images.
        pictures: One of the images, and a training image of the predicted class.
    """

    of: ClassNote
    taken_for: ClassNote
    images: int
    share: float
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Confusions:
    """What a head takes for what.

    Attributes:
        groups: By shot group of the true class, shares of its images that are ``right`` and, of the
            wrong ones, by shot group of the predicted class.
        mistakes: The most frequent confusions.
    """

    groups: Mapping[str, Mapping[str, float]]
    mistakes: Sequence[Mistake]


@dataclass(frozen=True)
class Comparison:
    """A head against the joint classifier.

    Attributes:
        gained: Classes that gained most, the first most of all.
        lost: Classes that lost most.
        better: How many classes gained anything.
        worse: How many lost anything.
    """

    gained: Sequence[Change]
    lost: Sequence[Change]
    better: int
    worse: int


@dataclass(frozen=True)
class TauCurve:
    """Accuracy on validation as a function of tau.

    Attributes:
        head: Name of the head.
        tau: The tau that it has.
        objective: What the tau maximises; None if it was given, not selected.
        value: The objective at the tau, of a given one the accuracy over all images.
        at_zero: The same at tau 0.
        right: Where the drawing ends.
        steps: By ``all``, shot group and objective, points of the step function; of many steps
            within the width of a pixel, the first, the last and the extremes.
    """

    head: str
    tau: float
    objective: Objective | None
    value: float
    at_zero: float
    right: float
    steps: Mapping[str, Points]

    @property
    def shown(self) -> Objective:
        """What ``value`` is a value of."""
        return self.objective or "all"


@dataclass(frozen=True)
class Frequency:
    """Accuracy by class frequency.

    Attributes:
        window: How many neighbouring classes a point is the mean of.
        accuracy: By head, points of (rank of the class from 1, fraction).
        counts: Points of (rank, training images).
        boundaries: By shot group, ranks of its first and last class; None if it has none.
    """

    window: int
    accuracy: Mapping[str, Points]
    counts: Points
    boundaries: Mapping[str, tuple[int, int] | None]


@dataclass(frozen=True)
class ClassTable:
    """The classes, from the most to the least frequent.

    Attributes:
        heads: Names of the heads.
        rows: A row each: name, training images, shot group, test images, then the accuracy of each
            head, None for a class that the split lacks.
        left_out: How many more classes there are, all of them more frequent.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    left_out: int = 0


@dataclass(frozen=True)
class Epoch:
    """An epoch of training: its number from 1, loss, learning rate, accuracies on validation."""

    number: int
    loss: float
    lr: float
    val: Mapping[str, float | None]


@dataclass(frozen=True)
class ReportContent:
    """All that a report says.

    Attributes:
        title: Name of the run.
        facts: What there is to know beforehand, in words, by a word or two.
        shots: The shot groups, as of :func:`timm_lt.utils.longtail.describe_shots`.
        heads: The heads, in order.
        joint: Name of the joint classifier, if it is among them.
        recommended: Name of the head that is best on validation, if known.
        frequency: Accuracy by class frequency.
        curves: Accuracy against tau, of heads that have one.
        comparisons: Heads against the joint classifier, by name.
        confusions: By head.
        classes: The table of classes.
        epochs: Training, epoch by epoch; empty if nothing was trained.
        kept_epoch: The epoch whose weights went on.
        recipe: The recipe as it was run, YAML.
        warning: What has to be known before any figure is read.
        min_images: By shot group, test images that a class has at least to be among those that
            gained or lost.
    """

    title: str
    facts: Mapping[str, str]
    shots: Mapping[str, Mapping[str, Any]]
    heads: Sequence[HeadRow]
    joint: str | None
    recommended: str | None
    frequency: Frequency
    classes: ClassTable
    curves: Sequence[TauCurve] = ()
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    confusions: Mapping[str, Confusions] = field(default_factory=dict)
    epochs: Sequence[Epoch] = ()
    kept_epoch: int | None = None
    recipe: str | None = None
    warning: str | None = None
    min_images: Mapping[str, int] = field(default_factory=dict)
