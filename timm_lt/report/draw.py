"""The charts of a report."""

from collections.abc import Mapping, Sequence

from timm_lt.report.charts import (
    Axis,
    Chart,
    Dot,
    Line,
    area,
    cut_axis,
    head_looks,
    log_axis,
    number_axis,
    percent_axis,
    polyline,
    staircase,
    whole_axis,
)
from timm_lt.report.content import Epoch, HeadRow, Points, ReportContent, TauCurve
from timm_lt.report.tables import GROUPS, OBJECTIVE_WORDS, group_word, percent

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
