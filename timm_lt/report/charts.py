"""Charts: where things lie, in percent of the plotting area, for the template to draw.

Lines are SVG that is stretched to the width of the page; texts are HTML at their place, so that
they have one size on a wide screen and on a phone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from timm_lt.report.content import Points

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
