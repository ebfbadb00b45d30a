"""Rendering a report: plain values to one HTML file that needs nothing beside it.

What a report says, in plain values: texts, numbers, and pictures as data URIs.

Charts: where things lie, in percent of the plotting area, for the template to draw.

Lines are SVG that is stretched to the width of the page; texts are HTML at their place, so that
they have one size on a wide screen and on a phone.

The charts of a report.

Example images as small pictures within the page.

Which classes a head gets right that the joint classifier does not, and what is confused.

Curves of many points, as far as a drawing shows them.

From the figures of a run to what its report says.
"""

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from datasets import Dataset
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from timm_lt.data.decode import encoded_images, read_image
from timm_lt.fitting import AccuracyCurve
from timm_lt.metrics import Objective, ShotReport, confidence_intervals, paired_difference
from timm_lt.report.tables import GROUPS, OBJECTIVE_WORDS, describe_selection, group_word, percent
from timm_lt.training.history import EpochRecord
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import one_line
from timm_lt.utils.files import write_atomic
from timm_lt.utils.longtail import ShotRule, describe_shots, shot_groups

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


# Colours of heads beside the joint classifier's; then they come again, dashed.
COLORS = 9


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        low: Value at its start.
        high: Value at its end.
        title: What it shows.
        ticks: Values with a label.
        texts: Their labels.
        logarithmic: Whether equal ratios have equal lengths.
    """

    low: float
    high: float
    title: str = ""
    ticks: Sequence[float] = ()
    texts: Sequence[str] = ()
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Returns where a value lies, in percent of the axis, no further than its ends."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = (math.log(max(v, 1e-12)) for v in (low, high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(100 * min(max(share, 0.0), 1.0), 2)

    def labels(self) -> list[tuple[float, str]]:
        """Returns the labels with their places."""
        return [(self.place(t), text) for t, text in zip(self.ticks, self.texts, strict=True)]


@dataclass(frozen=True)
class Line:
    """A line.

    Attributes:
        path: What an SVG path draws, in percent from the lower left.
        look: Classes of the style sheet.
        name: What it shows, for the legend; none if empty.
    """

    path: str
    look: str
    name: str = ""


@dataclass(frozen=True)
class Dot:
    """A dot at a place in percent, with a diameter in pixels."""

    x: float
    y: float
    size: float
    look: str


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        text: What it shows in a sentence, for those who do not see it.
        x: Its horizontal axis.
        y: Its vertical axis.
        lines: Its lines; later ones lie above.
        dots: Its dots.
        marks: Vertical lines, in percent.
        spans: Labels above the chart: start and end in percent, text, and what a narrow screen
            leaves out of it.
        second: A vertical axis on the right.
        look: Classes of the style sheet.
    """

    text: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    dots: Sequence[Dot] = ()
    marks: Sequence[float] = ()
    spans: Sequence[tuple[float, float, str, str]] = ()
    second: Axis | None = None
    look: str = ""


def percent_axis(title: str = "") -> Axis:
    """Returns an axis of fractions, labelled in percent."""
    return Axis(0, 1, title, (0, 0.25, 0.5, 0.75, 1), ("0", "25", "50", "75", "100"))


def number_axis(low: float, high: float, title: str = "", *, most: int = 5) -> Axis:
    """Returns an axis with round labels.

    >>> number_axis(0, 30).texts
    ('0', '10', '20', '30')

    Args:
        low: Least value.
        high: Largest value; the axis goes on to the next label.
        title: What it shows.
        most: How many labels at most.
    """
    high = high if high > low else low + 1
    step = _round_step((high - low) / (most - 1))
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    ticks = [k * step for k in range(first, last + 1)]
    texts = tuple(f"{tick:.6g}" for tick in ticks)
    return Axis(ticks[0], ticks[-1], title, ticks, texts)


def cut_axis(low: float, high: float, title: str) -> Axis:
    """Returns an axis with round labels that ends exactly where it is told to.

    >>> cut_axis(0, 2.2, "tau").texts
    ('0', '1', '2')
    """
    whole = number_axis(low, high, title)
    inside = [(t, text) for t, text in zip(whole.ticks, whole.texts, strict=True) if t <= high]
    ticks, texts = zip(*inside, strict=True)
    return Axis(low, high, title, ticks, texts)


def whole_axis(low: int, high: int, title: str, *, most: int = 6) -> Axis:
    """Returns an axis of whole numbers that ends where they do.

    >>> whole_axis(1, 30, "epoch").texts
    ('1', '10', '20', '30')
    >>> whole_axis(1, 8, "epoch").texts
    ('1', '2', '4', '6', '8')
    """
    step = max(int(_round_step((high - low) / (most - 1) if high > low else 1)), 1)
    inside = range(low - low % step + step, high + 1, step)
    ticks = [low, *(t for t in inside if t - low >= step / 2)]
    return Axis(low, high, title, ticks, tuple(f"{tick:,}" for tick in ticks))


def _round_step(step: float) -> float:
    """Returns the next larger of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= step * (1 - 1e-9))


def log_axis(low: float, high: float, title: str = "") -> Axis:
    """Returns a logarithmic axis of counts, labelled at powers of ten.

    >>> log_axis(5, 500).texts
    ('10', '100')
    """
    ticks = [10**k for k in range(12) if low <= 10**k <= high]
    return Axis(
        low, max(high, low * 1.01), title, ticks, tuple(f"{t:,}" for t in ticks), logarithmic=True
    )


def polyline(points: Points, x: Axis, y: Axis) -> str:
    """Returns the path through some points; SVG counts downwards."""
    placed = [(x.place(a), y.place(b)) for a, b in points]
    return "M" + "L".join(f"{a:g} {100 - b:g}" for a, b in placed) if placed else ""


def staircase(points: Points, x: Axis, y: Axis) -> str:
    """Returns the path of a step function: each value holds up to the next point."""
    placed = [(x.place(a), 100 - y.place(b)) for a, b in points]
    moves = "".join(f"H{a:g}V{b:g}" for a, b in placed[1:])
    return f"M{placed[0][0]:g} {placed[0][1]:g}{moves}" if placed else ""


def area(points: Points, x: Axis, y: Axis) -> str:
    """Returns the path around what lies below some points."""
    line = polyline(points, x, y)
    if not line:
        return ""
    first, last = x.place(points[0][0]), x.place(points[-1][0])
    return f"{line}L{last:g} 100L{first:g} 100Z"


def head_looks(names: Sequence[str], joint: str | None) -> dict[str, str]:
    """Returns how each head is drawn in all charts; the joint classifier has the text's colour.

    >>> head_looks(["linear", "crt"], "linear")
    {'linear': 'joint', 'crt': 'c0'}
    """
    others = [name for name in names if name != joint]
    looks = {
        name: f"c{i % COLORS}" + (" dashed" if i >= COLORS else "") for i, name in enumerate(others)
    }
    return {name: looks.get(name, "joint") for name in names}


# Share of the images from which on a bin of confidences says something.
SURE_SHARE = 0.005
# A label needs so much of the width.
ROOM = 18


def frequency_chart(content: ReportContent) -> Chart:
    """Draws accuracy by class frequency, above the training images of the classes."""
    found = content.frequency
    last = found.counts[-1][0]
    ticks = whole_axis(1, int(last), "")
    x = Axis(
        0.5,
        last + 0.5,
        "classes, from the most to the least frequent",
        ticks.ticks,
        ticks.texts,
    )
    y = percent_axis("test accuracy, %")
    # The floor shows a class of one image; there is no logarithm of none.
    counts = log_axis(0.7, max(1.0, found.counts[0][1]), "training images (grey)")
    looks = head_looks([head.name for head in content.heads], content.joint)
    lines = [Line(area(found.counts, x, counts), "area")]
    # The joint classifier last, above the others.
    for name in sorted(found.accuracy, key=lambda name: name == content.joint):
        look = looks[name] + (" strong" if name == content.recommended else "")
        lines.append(Line(polyline(found.accuracy[name], x, y), look, name))
    marks, spans = [], []
    for group, ends in found.boundaries.items():
        if ends is not None:
            start, end = x.place(ends[0] - 0.5), x.place(ends[1] + 0.5)
            marks += [start] if start else []
            rule = content.shots[group]["rule"]
            if end - start > ROOM:
                spans.append((start, end, group_word(group), str(rule)))
    text = "Test accuracy against the rank of the class by frequency, a line for each head."
    return Chart(text, x, y, lines, marks=marks, spans=spans, second=counts)


def tau_chart(curve: TauCurve) -> Chart:
    """Draws accuracy on validation against tau: all images, shot groups, what was maximised."""
    steps = {name: _percents(points) for name, points in curve.steps.items()}
    values = [value for points in steps.values() for _, value in points]
    x = cut_axis(0, curve.right, f"tau (dashed: {_how(curve)})")
    y = number_axis(min(values), max(values), "validation accuracy, %")
    lines = [
        Line(staircase(steps[name], x, y), f"g-{name}", name.removesuffix("_shot"))
        for name in (*GROUPS, "all")
        if name in steps
    ]
    look = f"g-{curve.shown}"
    if curve.shown not in (*GROUPS, "all"):
        look = "g-objective"
        path = staircase(steps[curve.shown], x, y)
        lines.append(Line(path, look, f"{curve.shown.replace('_', ' ')} (objective)"))
    tau = x.place(curve.tau)
    text = f"Accuracy on validation against tau for {curve.head}. {tau_sentence(curve)}"
    dot = Dot(tau, y.place(100 * curve.value), 9, look)
    return Chart(text, x, y, lines, dots=[dot], marks=[tau])


def tau_sentence(curve: TauCurve) -> str:
    """Returns what was maximised, and what it is at the head's tau and at tau 0."""
    words = OBJECTIVE_WORDS[curve.shown]
    what = words.capitalize() if curve.objective is None else f"Objective ({words})"
    return (
        f"{what}: {percent(curve.value)} % at the {_how(curve)} tau {curve.tau:.3g}, "
        f"{percent(curve.at_zero)} % at tau 0."
    )


def _how(curve: TauCurve) -> str:
    """Returns where a head has its tau from."""
    return "given" if curve.objective is None else "selected"


def calibration_charts(content: ReportContent) -> Mapping[str, Chart]:
    """Draws a reliability diagram for each head that has confidences."""
    looks = head_looks([head.name for head in content.heads], content.joint)
    return {
        head.name: _reliability_chart(head, looks[head.name]) for head in content.heads if head.bins
    }


def _reliability_chart(head: HeadRow, look: str) -> Chart:
    ends = ((0, 0.5, 1), ("0", "50", "100"))
    x, y = Axis(0, 1, "confidence, %", *ends), Axis(0, 1, "accuracy, %", *ends)
    filled = [part for part in head.bins if part["images"]]
    total = sum(part["images"] for part in filled)
    sure = [
        (part["confidence"], part["accuracy"])
        for part in filled
        if part["images"] >= SURE_SHARE * total
    ]
    # Bins of few images are noise: a line through them would hide the others.
    lines = [Line("M0 100L100 0", "ideal"), Line(polyline(sure, x, y), look)]
    dots = [
        Dot(
            x.place(part["confidence"]),
            y.place(part["accuracy"]),
            round(4 + 14 * (part["images"] / total) ** 0.5, 1),
            look,
        )
        for part in filled
    ]
    gap = sum(part["images"] * (part["confidence"] - part["accuracy"]) for part in filled)
    words = "more" if gap > 0 else "less"
    text = (
        f"Reliability of {head.name}: on average its confidence is {abs(100 * gap / total):.1f} "
        f"points {words} than its accuracy."
    )
    return Chart(text, x, y, lines, dots=dots, look="square")


def training_charts(content: ReportContent) -> list[Chart]:
    """Draws loss, accuracies on validation and learning rate by epoch; none if there are none."""
    epochs = content.epochs
    if not epochs:
        return []
    x = whole_axis(epochs[0].number, epochs[-1].number, "epoch")
    losses = [(float(e.number), e.loss) for e in epochs]
    rates = [(float(e.number), e.lr) for e in epochs]
    top_loss = number_axis(0, max(loss for _, loss in losses), "training loss")
    top_rate = number_axis(0, max(rate for _, rate in rates), "learning rate")
    charts = [
        Chart(
            "Training loss by epoch.", x, top_loss, [Line(polyline(losses, x, top_loss), "g-all")]
        )
    ]
    validated = _validation_chart(epochs, content.kept_epoch, x)
    charts += [] if validated is None else [validated]
    return [
        *charts,
        Chart(
            "Learning rate by epoch.", x, top_rate, [Line(polyline(rates, x, top_rate), "g-all")]
        ),
    ]


def _validation_chart(epochs: Sequence[Epoch], kept: int | None, x: Axis) -> Chart | None:
    y = percent_axis("validation accuracy, %")
    lines = []
    for name in (*GROUPS, "all"):
        points = [
            (float(e.number), value) for e in epochs if (value := e.val.get(name)) is not None
        ]
        if points:
            lines.append(Line(polyline(points, x, y), f"g-{name}", name.removesuffix("_shot")))
    if not lines:
        return None
    text = "Accuracy on validation by epoch, over all images and by shot group."
    marks = [] if kept is None else [x.place(kept)]
    return Chart(text, x, y, lines, marks=marks)


def _percents(points: Points) -> Points:
    return [(tau, 100 * value) for tau, value in points]


FOLDER = Path(__file__).parent
# Rows of the table that are there before a script runs, and that a page of it has.
PAGE = 100
# Stands where there is no figure.
NONE = "\N{EN DASH}"


def render_report(content: ReportContent) -> str:
    """Renders a report as one HTML page with its styles, scripts, charts and pictures in it.

    Every text is escaped, and the page's own policy allows no request and no other script.

    Args:
        content: What it says.
    """
    heads = {head.name: head for head in content.heads}
    style, script = (
        (FOLDER / name).read_text(encoding="utf-8") for name in ("style.css", "script.js")
    )
    page: str = (
        _environment()
        .get_template("report.html")
        .render(
            content=content,
            groups=GROUPS,
            columns=_columns(content),
            tiles=_tiles(content),
            best=_best(content),
            joint=heads.get(content.joint or ""),
            recommended=heads.get(content.recommended or ""),
            shown=_shown(content),
            min_images=_min_images(content.min_images),
            looks=head_looks(list(heads), content.joint),
            frequency=frequency_chart(content),
            curves=[(c, tau_sentence(c), tau_chart(c)) for c in content.curves],
            calibration=calibration_charts(content),
            training=training_charts(content),
            table=_table(content),
            page=PAGE,
            style=style,
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    return page.lstrip()


def write_report(path: str | Path, content: ReportContent) -> None:
    """Writes a report, whole or not at all.

    Args:
        path: The file.
        content: What it says.
    """
    write_atomic(Path(path), render_report(content))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Smaller than its default, and in the order of the columns.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.filters |= {
        "percent": _percent,
        "points": _points,
        "group_word": group_word,
        "breakable": _breakable,
    }
    return environment


def _percent(fraction: float | None) -> str:
    return NONE if fraction is None else percent(fraction)


def _breakable(name: str) -> Markup:
    """Returns a name, escaped, that may go on in another line after an underscore."""
    return Markup("_<wbr>").join(name.split("_"))


def _points(difference: float | None) -> str:
    """Returns a difference of fractions in points of percent, with its sign.

    >>> _points(0.123), _points(-0.02), _points(0.0001)
    ('+12.3', '−2.0', '0.0')
    """
    if difference is None:
        return NONE
    text = f"{100 * abs(difference):.1f}"
    sign = "" if text == "0.0" else "+" if difference > 0 else "−"
    return f"{sign}{text}"


def _columns(content: ReportContent) -> Mapping[str, str]:
    """Returns the figures of the table of heads, with their headings."""
    columns = {group: group_word(group) for group in GROUPS} | {"all": "all"}
    figures = [head.figures for head in content.heads]
    if any(abs((f["all"].value or 0) - (f["class_mean"].value or 0)) > 1e-9 for f in figures):
        columns["class_mean"] = "class mean"
    return columns


def _tiles(content: ReportContent) -> Mapping[str, str]:
    """Returns the figures of the summary, with their labels."""
    tiles = {"all": "all images"}
    if "class_mean" in _columns(content):
        # What a head wins, where the test split has as long a tail as train.
        tiles["class_mean"] = "mean over classes"
    return tiles | {group: f"{group_word(group)}-shot classes" for group in GROUPS}


def _best(content: ReportContent) -> Mapping[str, str]:
    """Returns by figure the largest value as it is shown."""

    def values(key: str) -> list[float]:
        return [h.figures[key].value or 0.0 for h in content.heads]

    return {key: percent(max(values(key))) for key in content.heads[0].figures}


def _min_images(by_group: Mapping[str, int]) -> str:
    """Returns how many test images the classes have that are shown; empty if one is enough.

    >>> _min_images({"many_shot": 5, "few_shot": 3}), _min_images({"few_shot": 5})
    ('5 (many) or 3 (few)', '5')
    """
    numbers = set(by_group.values())
    if len(numbers) < 2:
        return "".join(str(number) for number in numbers if number > 1)
    *parts, last = [f"{number} ({group_word(group)})" for group, number in by_group.items()]
    return f"{', '.join(parts)} or {last}"


def _shown(content: ReportContent) -> str | None:
    """Returns the head that is compared with the joint classifier before another is chosen."""
    if content.recommended in content.comparisons:
        return content.recommended
    return next((name for name in content.confusions if name != content.joint), None)


def _table(content: ReportContent) -> dict[str, Any]:
    """Returns the table of classes as the script takes it."""
    table = content.classes
    rows = [list(row) for row in table.rows]
    columns = ["class", "training images", "shots", "test images", *table.heads]
    change = None
    if content.joint is not None and _shown(content) is not None:
        pair = [4 + list(table.heads).index(n) for n in (_shown(content) or "", content.joint)]
        change = _shown(content)
        for row in rows:
            after, before = (row[k] for k in pair)
            row.append(None if after is None else round(after - before, 4))
    return {"columns": columns, "change": change, "rows": rows, "heads": len(table.heads)}


Source = Literal["train", "test"]
# Pixels of the longer side, and bytes of the file before it is written as text.
SIDE, MAX_BYTES = 88, 3000
QUALITIES = (80, 60, 40, 20)


@dataclass(frozen=True, eq=False)
class ExampleImages:
    """Where example images come from.

    Args:
        train: Training images, with a column ``image``.
        train_labels: Their labels, (N,) int64.
        test: Test images, with a column ``image``.
        test_rows: The row in ``test`` of each image that was evaluated, (M,) int64; None if it
            cannot be told, and then no test image is shown.
    """

    train: Dataset
    train_labels: Tensor
    test: Dataset
    test_rows: Tensor | None = None


class Thumbnails:
    """Makes data URIs of example images; each is decoded once.

    Args:
        images: Where they come from; None makes none.
    """

    def __init__(self, images: ExampleImages | None) -> None:
        self._images = images
        self._made: dict[tuple[Source, int], str | None] = {}
        if images is not None:
            self._encoded = {name: encoded_images(getattr(images, name)) for name in SOURCES}

    def test(self, image: int) -> str | None:
        """Returns an evaluated image, None if it is not to be had."""
        if self._images is None or self._images.test_rows is None:
            return None
        return self._uri("test", int(self._images.test_rows[image]))

    def of_class(self, label: int) -> str | None:
        """Returns the first training image of a class, None if it is not to be had."""
        if self._images is None:
            return None
        rows = (self._images.train_labels == label).nonzero()
        return self._uri("train", int(rows[0])) if len(rows) else None

    def _uri(self, source: Source, row: int) -> str | None:
        if (source, row) not in self._made:
            encoded = self._encoded[source][row]["image"]
            column = getattr(self._images, source).features["image"]
            try:
                self._made[source, row] = data_uri(read_image(encoded, row, column))
            except UsageError:
                # An image that cannot be read was reported where it was to be trained on.
                self._made[source, row] = None
        return self._made[source, row]


SOURCES: tuple[Source, ...] = ("train", "test")


def evaluated_rows(number: int, unreadable: list[int], evaluated: int) -> Tensor | None:
    """Returns which rows of a data set were evaluated, (evaluated,).

    >>> evaluated_rows(4, [1], 3)
    tensor([0, 2, 3])

    Args:
        number: Rows of the data set.
        unreadable: Those that could not be read, as far as they are known.
        evaluated: How many were evaluated.

    Returns:
        None if it cannot be told, because not all that were left out are known.
    """
    kept = torch.ones(number, dtype=torch.bool)
    kept[unreadable] = False
    rows = kept.nonzero().flatten()
    return rows if len(rows) == evaluated else None


def data_uri(image: Image.Image) -> str | None:
    """Returns an image as a JPEG of at most 88 pixels and 3,000 bytes, as a data URI.

    Args:
        image: In RGB.

    Returns:
        None if it is not to be had in so few bytes.
    """
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    for quality in QUALITIES:
        file = io.BytesIO()
        small.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= MAX_BYTES:
            return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return None


# Classes that gained and that lost, images of each, and confusions of a head.
CHANGES, PICTURES, MISTAKES = 5, 4, 6
# With fewer test images a class gains or loses by chance. Where no class of a shot group has so
# many, those with the most do, or the rare classes would never be shown.
FEW_IMAGES = 5


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a head says of the test images.

    Args:
        preds: Predicted classes, (N,), of any integer type.
        confidences: Probabilities of these, (N,); None if not known.
    """

    preds: Tensor
    confidences: Tensor | None = None


@dataclass(frozen=True, eq=False)
class EvaluatedImages:
    """The test images as their figures know them.

    Attributes:
        targets: True classes, (N,) int64.
        notes: The classes, C of them.
        group_of: Index of each class's shot group, (C,) int64.
        groups: Names of the groups.
        thumbnails: Makes pictures of the images.
    """

    targets: Tensor
    notes: Sequence[ClassNote]
    group_of: Tensor
    groups: Sequence[str]
    thumbnails: Thumbnails

    def images_per_class(self) -> Tensor:
        """Returns the test images of each class, (C,)."""
        return torch.bincount(self.targets, minlength=len(self.notes))

    def min_images(self) -> dict[str, int]:
        """Returns how many test images a class must have for its change to be shown, by shot group.

        Five, or as many as a class of the group has at most; groups without images are left out.
        """
        images = self.images_per_class()
        of_groups = {g: images[self.group_of == index] for index, g in enumerate(self.groups)}
        return {g: min(FEW_IMAGES, int(n.max())) for g, n in of_groups.items() if n.any()}


def compare_with_joint(head: Predictions, joint: Predictions, test: EvaluatedImages) -> Comparison:
    """Returns which classes gained and lost most against the joint classifier.

    Args:
        head: What the head says.
        joint: What the joint classifier says of the same images.
        test: The images.
    """
    images, needed = test.images_per_class(), test.min_images()
    right = [test.targets[p.preds.long() == test.targets] for p in (joint, head)]
    before, after = (torch.bincount(r, minlength=len(images)) for r in right)
    change = ((after - before) / images.double()).nan_to_num(0)

    def most(sign: int, wrong: Predictions, who: str) -> list[Change]:
        """The classes with the largest change; of equals, those with more test images."""
        by = (sign * change).tolist()
        moved = [c for c, change in enumerate(by) if change > 0]
        classes = [c for c in moved if images[c] >= needed[test.notes[c].group]]
        classes.sort(key=lambda c: (-by[c], -int(images[c])))
        return [
            Change(
                test.notes[c],
                int(before[c]),
                int(after[c]),
                int(images[c]),
                _changed_pictures(c, joint if wrong is head else head, wrong, who, test),
            )
            for c in classes[:CHANGES]
        ]

    return Comparison(
        gained=most(1, joint, "the joint classifier"),
        lost=most(-1, head, "this head"),
        better=int((change > 0).sum()),
        worse=int((change < 0).sum()),
    )


def _changed_pictures(
    label: int, right: Predictions, wrong: Predictions, who: str, test: EvaluatedImages
) -> list[Picture]:
    """Returns images of a class that one classifier has right and the other, ``who``, wrong."""
    target = test.targets
    rows = (target == label) & (right.preds.long() == label) & (wrong.preds.long() != label)
    name = test.notes[label].name
    pictures = []
    for row in rows.nonzero().flatten()[:PICTURES].tolist():
        uri = test.thumbnails.test(row)
        if uri is not None:
            other = test.notes[int(wrong.preds[row])].name
            text = f"{name}, which {who} takes for {other}{_sure(wrong, row)}"
            pictures.append(Picture(uri, text, other))
    return pictures


def _sure(predictions: Predictions, row: int) -> str:
    if predictions.confidences is None:
        return ""
    return f" ({percent(float(predictions.confidences[row]))} % sure)"


def count_confusions(head: Predictions, test: EvaluatedImages) -> Confusions:
    """Returns what a head takes for what, by shot group and the most frequent single confusions.

    Counts are kept of the pairs that occur only, so memory does not grow with C².

    Args:
        head: What the head says.
        test: The images.
    """
    preds, targets = head.preds.long(), test.targets
    num_classes, num_groups = len(test.notes), len(test.groups)
    wrong = preds != targets
    # One more column for what is right.
    column = torch.where(wrong, test.group_of[preds], num_groups)
    cells = test.group_of[targets] * (num_groups + 1) + column
    counted = torch.bincount(cells, minlength=num_groups * (num_groups + 1)).view(num_groups, -1)
    pairs, times = (targets[wrong] * num_classes + preds[wrong]).unique(return_counts=True)
    most = times.argsort(descending=True, stable=True)[:MISTAKES]
    images = test.images_per_class()
    mistakes = []
    for pair, number in zip(pairs[most].tolist(), times[most].tolist(), strict=True):
        label, other = divmod(pair, num_classes)
        mistakes.append(
            Mistake(
                test.notes[label],
                test.notes[other],
                number,
                number / int(images[label]),
                _mistaken_pictures(label, other, head, test),
            )
        )
    return Confusions(_shares(counted, test.groups), mistakes)


def _shares(counted: Tensor, groups: Sequence[str]) -> Mapping[str, Mapping[str, float]]:
    """Returns the counts of a confusion of groups as shares of the groups that have images."""
    columns = [*groups, "right"]
    return {
        group: dict(zip(columns, (row / row.sum()).tolist(), strict=True))
        for group, row in zip(groups, counted.double(), strict=True)
        if row.sum() > 0
    }


def _mistaken_pictures(
    label: int, other: int, head: Predictions, test: EvaluatedImages
) -> Sequence[Picture]:
    rows = ((test.targets == label) & (head.preds == other)).nonzero().flatten()
    first, second = test.thumbnails.test(int(rows[0])), test.thumbnails.of_class(other)
    if first is None or second is None:
        return ()
    name, taken = test.notes[label].name, test.notes[other].name
    return (
        Picture(first, f"{name}, taken for {taken}{_sure(head, int(rows[0]))}", "test"),
        Picture(second, f"a training image of {taken}", "train"),
    )


# Points of a drawn curve, and columns within which a step function keeps its extremes.
POINTS, COLUMNS = 240, 400


def thinned(x: Tensor, y: Tensor) -> Points:
    """Returns at most a few hundred of the points of a curve, with both ends."""
    rows = torch.linspace(0, len(x) - 1, min(len(x), POINTS)).round().long()
    return list(zip(x[rows].tolist(), y[rows].tolist(), strict=True))


def drawn_steps(edges: Tensor, values: Tensor, right: float) -> Points:
    """Returns the corners of a step function that a drawing of it needs.

    Of the steps within one of 400 columns it has the first, the lowest, the highest and the last:
    drawn at that width, nothing is lost.

    Args:
        edges: Where the value changes, (K,) ascending from 0.
        values: The value from each edge on, (K,).
        right: Where the drawing ends.

    Returns:
        Points (tau, value), each value held up to the next point, the last at ``right``.
    """
    shown = edges < right
    edges, values = edges[shown], values[shown]
    column = (edges / right * COLUMNS).long()
    points: Points = []
    for start, end in _runs(column):
        part = values[start:end]
        kept = {0, int(part.argmin()), int(part.argmax()), end - start - 1}
        points += [(float(edges[start + k]), float(part[k])) for k in sorted(kept)]
    return [*points, (right, float(values[-1]))]


def _runs(column: Tensor) -> list[tuple[int, int]]:
    """Returns start and end of each stretch of equal values."""
    sizes = column.unique_consecutive(return_counts=True)[1]
    ends = sizes.cumsum(0)
    return list(zip((ends - sizes).tolist(), ends.tolist(), strict=True))


# Classes in the table; per_class.csv has all of them.
MAX_CLASSES = 10_000
# Heads that are compared with the joint classifier; more would make the file large.
MAX_COMPARED = 8
NAME_LENGTH = 40


def gather_report(
    *,
    title: str,
    reports: Mapping[str, ShotReport],
    class_counts: Tensor,
    targets: Tensor,
    predictions: Mapping[str, Predictions],
    label_names: Sequence[str] | None = None,
    curves: Mapping[str, tuple[AccuracyCurve, float]] | None = None,
    selections: Mapping[str, Mapping[str, Any]] | None = None,
    seconds: Mapping[str, float] | None = None,
    joint: str = "linear",
    recommended: str | None = None,
    images: ExampleImages | None = None,
    history: Sequence[EpochRecord] = (),
    kept_epoch: int | None = None,
    recipe: str | None = None,
    facts: Mapping[str, str] | None = None,
    warning: str | None = None,
) -> ReportContent:
    """Gathers what a report says of some heads on the same test images.

    What is not given is left out of the report. Its size is bounded: of more than 10,000 classes
    the table has the rarest 10,000, curves have a few hundred points, and no more than a few
    hundred pictures of 3 kB each are made. Beside the predictions, memory grows with the classes
    and the pairs of classes that are confused.

    Args:
        title: Name of the run.
        reports: Test figures by head.
        class_counts: Training images per class, (C,).
        targets: True classes of the test images, (N,).
        predictions: What each head says of them, by head.
        label_names: Names of the classes, (C,), if known.
        curves: Accuracy on validation against tau with the head's tau, by head.
        selections: How each head's options were chosen.
        seconds: Time that each head took, if known.
        joint: Name of the joint classifier; if it is not among the heads, none is compared.
        recommended: Name of the head that is best on validation, if known.
        images: Where example images come from; None shows none.
        history: The epochs of the representation's training; empty if there was none.
        kept_epoch: The epoch whose weights went on.
        recipe: The recipe as it was run, YAML.
        facts: More that there is to know beforehand, in words, by a word or two.
        warning: What has to be known before any figure is read.

    Raises:
        UsageError: If a head has figures but no predictions, the predictions and the targets differ
            in number, or the joint classifier or the recommended head is not among the heads.
    """
    _check(reports, predictions, targets, recommended)
    rule = next(iter(reports.values())).rule
    names = class_names(label_names, len(class_counts))
    evaluated = _evaluated(names, class_counts, targets, rule, images)
    base = joint if joint in reports else None
    others = [name for name in reports if name != base]
    compared = _compared(others, recommended)
    return ReportContent(
        title=one_line(title, 200),
        facts={**(facts or {}), **_data_facts(class_counts, targets)},
        shots=describe_shots(class_counts, rule),
        heads=[
            _head_row(name, report, class_counts, evaluated, predictions, base, selections, seconds)
            for name, report in reports.items()
        ],
        joint=base,
        recommended=recommended,
        frequency=_frequency(reports, class_counts, rule),
        classes=_class_table(reports, class_counts, names, evaluated),
        curves=[
            _tau_curve(name, *curve, (selections or {}).get(name, {}))
            for name, curve in (curves or {}).items()
        ],
        comparisons={
            name: compare_with_joint(predictions[name], predictions[base], evaluated)
            for name in compared
            if base is not None
        },
        confusions={
            name: count_confusions(predictions[name], evaluated)
            for name in ([] if base is None else [base]) + compared
        },
        epochs=[Epoch(r.epoch, r.loss, r.lr, dict(r.val)) for r in history],
        kept_epoch=kept_epoch,
        recipe=recipe,
        warning=warning,
        min_images=evaluated.min_images(),
    )


def class_names(label_names: Sequence[str] | None, num_classes: int) -> list[str]:
    """Returns how classes are called in a report: by their names, in one line each.

    >>> class_names(["cat", " a  b ", ""], 3), class_names(None, 1)
    (['cat', 'a b', 'class 2'], ['class 0'])
    """
    given = label_names or [""] * num_classes
    return [one_line(name, NAME_LENGTH) or f"class {c}" for c, name in enumerate(given)]


def _check(
    reports: Mapping[str, ShotReport],
    predictions: Mapping[str, Predictions],
    targets: Tensor,
    recommended: str | None,
) -> None:
    if not reports:
        raise UsageError("a report needs the figures of at least one head")
    for name in reports:
        if name not in predictions:
            raise UsageError(f"head {name!r} has figures but no predictions")
        if predictions[name].preds.shape != targets.shape:
            raise UsageError(
                f"head {name!r} has predictions {tuple(predictions[name].preds.shape)}, the "
                f"targets are {tuple(targets.shape)}"
            )
    if recommended is not None and recommended not in reports:
        raise UsageError(
            f"the recommended head {recommended!r} is not one of: {', '.join(reports)}"
        )


def _compared(others: list[str], recommended: str | None) -> list[str]:
    """Returns the heads that are compared, in order; the recommended one is among them."""
    if recommended in others[MAX_COMPARED:]:
        return [*others[: MAX_COMPARED - 1], recommended]
    return others[:MAX_COMPARED]


def _evaluated(
    names: Sequence[str],
    counts: Tensor,
    targets: Tensor,
    rule: ShotRule,
    images: ExampleImages | None,
) -> EvaluatedImages:
    groups = shot_groups(counts, rule)
    group_of = torch.stack(list(groups.values())).int().argmax(0)
    notes = [
        ClassNote(name, GROUPS[group], count)
        for name, group, count in zip(names, group_of.tolist(), counts.tolist(), strict=True)
    ]
    return EvaluatedImages(targets.long(), notes, group_of, GROUPS, Thumbnails(images))


def _data_facts(counts: Tensor, targets: Tensor) -> dict[str, str]:
    return {
        "Training images": (
            f"{int(counts.sum()):,} of {len(counts):,} classes, {int(counts.max()):,} to "
            f"{int(counts.min()):,} of each"
        ),
        "Test images": f"{len(targets):,}",
    }


def _head_row(
    name: str,
    report: ShotReport,
    counts: Tensor,
    evaluated: EvaluatedImages,
    predictions: Mapping[str, Predictions],
    joint: str | None,
    selections: Mapping[str, Mapping[str, Any]] | None,
    seconds: Mapping[str, float] | None,
) -> HeadRow:
    intervals = confidence_intervals(report, counts)
    keys = (*GROUPS, "all", "class_mean")
    gain = None
    if joint is not None and name != joint:
        own, base = (predictions[key].preds.long() for key in (name, joint))
        gain = Interval(*paired_difference(own, base, evaluated.targets, counts, rule=report.rule))
    return HeadRow(
        name=name,
        figures={key: Interval(getattr(report, key), *intervals.get(key, ())) for key in keys},
        gain=gain,
        ece={} if report.ece is None else {"all": report.ece, **(report.ece_per_group or {})},
        bins=report.reliability or (),
        selected=describe_selection((selections or {}).get(name, {})),
        seconds=(seconds or {}).get(name),
    )


def _frequency(reports: Mapping[str, ShotReport], counts: Tensor, rule: ShotRule) -> Frequency:
    order = torch.argsort(counts, descending=True, stable=True)
    window = max(len(order) // 10, 1)
    accuracy = {}
    for name, report in reports.items():
        # A running mean over neighbouring classes: single classes are too noisy to read.
        means = report.per_class[order].unfold(0, window, 1).nanmean(1)
        ranks = torch.arange(len(means)) + (window - 1) / 2 + 1
        known = ~means.isnan()
        accuracy[name] = thinned(ranks[known], means[known])
    boundaries: dict[str, tuple[int, int] | None] = {}
    end = 0
    for group, shot in describe_shots(counts, rule).items():
        start, end = end, end + int(shot["classes"])
        boundaries[group] = (start + 1, end) if end > start else None
    ranks = torch.arange(len(order)) + 1.0
    return Frequency(window, accuracy, thinned(ranks, counts[order].double()), boundaries)


def _tau_curve(
    head: str, curve: AccuracyCurve, tau: float, selection: Mapping[str, Any]
) -> TauCurve:
    right = max(2.0, 1.5 * tau)
    objective: Objective | None = selection.get("objective") if "tau" in selection else None
    shown: Objective = objective or "all"
    steps = {"all": curve.steps()}
    for name, part in curve.groups.items():
        if part is not None:
            # As everywhere in the report, a shot group's figure is the mean over its classes.
            steps[name] = part.steps("all" if part.targets is None else "class_mean")
    if shown not in steps:
        steps[shown] = curve.steps(shown)
    return TauCurve(
        head=head,
        tau=tau,
        objective=objective,
        value=curve(tau, objective=shown),
        at_zero=curve(0.0, objective=shown),
        right=right,
        steps={name: drawn_steps(*found, right) for name, found in steps.items()},
    )


def _class_table(
    reports: Mapping[str, ShotReport],
    counts: Tensor,
    names: Sequence[str],
    evaluated: EvaluatedImages,
) -> ClassTable:
    order = torch.argsort(counts, descending=True, stable=True)
    left_out = max(len(order) - MAX_CLASSES, 0)
    shown = order[left_out:].tolist()
    images = evaluated.images_per_class().tolist()
    columns = [report.per_class.tolist() for report in reports.values()]
    rows = [
        [
            names[c],
            evaluated.notes[c].training_images,
            evaluated.notes[c].group,
            images[c],
            *(None if column[c] != column[c] else round(column[c], 4) for column in columns),
        ]
        for c in shown
    ]
    return ClassTable(list(reports), rows, left_out)
