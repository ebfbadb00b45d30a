"""Charts of a run, drawn with matplotlib: PNG files for its folder, SVG for the HTML report."""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_lt.metrics import Objective
from timm_lt.report.record import Report, confused_groups
from timm_lt.report.tables import GROUPS, OBJECTIVE_WORDS, group_word, percent
from timm_lt.utils.files import write_atomic
from timm_lt.utils.longtail import ClassCounts, ShotRule, check_class_counts, describe_shots

# Colours for light pages and PNG files, and for dark pages. The report has them as variables of its
# style sheet, so no two light ones may be equal, and none black.
PALETTE: Mapping[str, tuple[str, str]] = {
    "text": ("#1b1d22", "#e8e9ed"),
    "muted": ("#5b606b", "#a6abb8"),
    "grid": ("#e6e8ec", "#2b303a"),
    "shade": ("#e3e4e8", "#2a2e37"),
    "accent": ("#1a5cc8", "#84b6ff"),
    "many": ("#14705c", "#6fdcc0"),
    "medium": ("#8a5200", "#f0bb66"),
    "few": ("#9c2458", "#ff9dc4"),
    "c0": ("#1d6fd1", "#6cb1ff"),
    "c1": ("#c4500a", "#ff9d57"),
    "c2": ("#17803d", "#5fd38d"),
    "c3": ("#9b2fae", "#dd8cf0"),
    "c4": ("#7a6a00", "#e3d24e"),
    "c5": ("#0e7c86", "#45cfd8"),
    "c6": ("#d6246e", "#ff86b4"),
    "c7": ("#5b5fc7", "#a5a8ff"),
    "c8": ("#8a4b2a", "#d8a58a"),
}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
# Styles of heads beside the joint classifier; every other one is dashed, too.
COLORS = tuple(color for name, color in LIGHT.items() if re.fullmatch(r"c\d", name))
DASHED, DOTTED, MIXED = (0, (6, 2)), (0, (2, 1.5)), (0, (5, 2, 1.5, 2))
DASHES: tuple[Any, ...] = ("-", DASHED, "-", DOTTED, "-", MIXED, "-", (0, (4, 4)), "-")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": LIGHT["text"],
    # Names may have any characters: a dollar sign does not start a formula.
    "text.parse_math": False,
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LIGHT["grid"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "figure.dpi": 120,
    "figure.labelsize": 9,
    "legend.frameon": False,
    "path.simplify_threshold": 0.5,
    # Text stays text: it takes the font of the page, and can be searched.
    "svg.fonttype": "none",
}
# Width of a PNG file and least width of any figure, in inches.
WIDTH, LEAST_WIDTH = 7.5, 3.6
RANKS = "classes, from the most to the least frequent"
DASHED_LINE = {"color": LIGHT["muted"], "linestyle": "--", "linewidth": 1}
DOTTED_LINE = DASHED_LINE | {"linestyle": ":"}


@contextmanager
def chart_style(**more: Any) -> Iterator[None]:
    """Uses the style of all charts, also as a decorator of a function that draws."""
    from matplotlib import rc_context

    with rc_context(STYLE | more), warnings.catch_warnings():
        # A browser has the glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        yield


@chart_style()
def write_figure(path: Path, figure: Any) -> None:  # noqa: ANN401
    """Writes a matplotlib figure atomically as PNG."""
    image = io.BytesIO()
    _save(figure, image)
    write_atomic(path, image.getvalue())


def figure_svg(figure: Any, salt: str) -> str:  # noqa: ANN401
    """Returns a matplotlib figure as SVG for a page that defines the palette.

    A ``gid`` that begins with ``tip:`` becomes a tooltip. The salt keeps ids unique in a page.
    """
    file = io.StringIO()
    with chart_style(**{"svg.hashsalt": salt}):
        _save(figure, file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    head = re.compile(r'^.*?<svg .*?width="(.*?)".*?(viewBox="[^"]*").*?>', re.DOTALL)
    text = head.sub(r'<svg \2 style="--width: \1" focusable="false">', text)
    text = re.sub(r'<g id="tip:([^"]*)"', r"<g><title>\1</title", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(<text style="[^"]*?)font-family: [^;"]*;? ?', r"\1", text)
    text = re.sub(r"\n\s*", "\n", text)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    return page_colors(text).strip()


def page_colors(text: str) -> str:
    """Replaces the palette's colours by the variables of the report's style sheet."""
    names = {light: f"var(--{name})" for name, light in LIGHT.items()}
    return re.sub(r"#[0-9a-f]{6}", lambda color: names.get(color[0], color[0]), text)


def _save(figure: Any, file: Any, **options: Any) -> None:  # noqa: ANN401
    """Saves a figure; its layout is computed once, where savefig would do so twice."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    figure.savefig(file, **options)


def panels(
    count: int, width: float, size: tuple[float, float, float], **options: Any
) -> tuple[Any, list[Any]]:
    """Creates a figure with panels, as many in a row as fit; returns it and its axes.

    All sizes are in inches: the largest width, and a panel's least and largest width and height.
    """
    from matplotlib.figure import Figure

    least, most, height = size
    columns = min(max(int(width / least), 1), count)
    rows = math.ceil(count / columns)
    width = min(width, max(columns * most, LEAST_WIDTH))
    figure = Figure(figsize=(width, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def add_legend(figure: Any, lines: Mapping[str, Any], **options: Any) -> None:  # noqa: ANN401
    """Adds a legend above the panels, where it hides no curve, in as many columns as fit."""
    # Inches of a handle and its gaps, and of a character.
    entry = 0.6 + 0.07 * max(map(len, lines))
    columns = max(int(figure.get_figwidth() / entry), 1)
    # Explicit labels, for matplotlib would skip names that begin with an underscore.
    handles, labels = list(lines.values()), list(lines)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, **options)


def line_style(color: str, dashes: Any = "-", width: float = 1.5) -> dict[str, Any]:  # noqa: ANN401
    """Returns matplotlib's options for a line."""
    return {"color": color, "linestyle": dashes, "linewidth": width}


def head_styles(report: Report) -> dict[str, dict[str, Any]]:
    """Returns the style of each head's line; that of the joint classifier is last, so on top."""
    styles = {}
    for number, name in enumerate(name for name in report.reports if name != report.base):
        turn, k = divmod(number, len(COLORS))
        width = 2.2 if name == report.recommended else 1.5
        styles[name] = line_style(COLORS[k], (0, (9, 3)) if turn else DASHES[k], width)
    if report.base is not None:
        styles[report.base] = line_style(LIGHT["text"], width=2.2)
    return styles


def group_styles() -> dict[str, dict[str, Any]]:
    """Returns the styles of the lines of the shot groups and of all images."""
    colors = [LIGHT[group_word(group)] for group in GROUPS]
    styles = map(line_style, colors, (DASHED, (0, (3, 2)), "-"))
    return {**dict(zip(GROUPS, styles, strict=True)), "all": line_style(LIGHT["text"], width=2.0)}


def _rank_axes(axes: Any, class_counts: Tensor, rule: ShotRule) -> None:  # noqa: ANN401
    """Labels an axis of class ranks, and marks where a shot group ends and the next begins."""
    axes.set(xlabel=RANKS, xlim=(0.5, len(class_counts) + 0.5))
    end, inches = 0.5, axes.figure.get_figwidth() / len(class_counts)
    for name, shot in describe_shots(class_counts, rule).items():
        start, end = end, end + int(shot["classes"])
        if start == end:
            continue
        if start > 1:
            axes.axvline(start, **DOTTED_LINE)
        room, short = (end - start) * inches, group_word(name)
        text = f"{short} {shot['rule']}" if room > 1.6 else short if room > 0.8 else ""
        transform, options = axes.get_xaxis_transform(), {"ha": "center", "va": "bottom"}
        axes.text((start + end) / 2, 1.01, text, transform=transform, **options)


def _count_axis(axes: Any, label: str) -> None:  # noqa: ANN401
    """Makes the axis of training images logarithmic; a class of one image is visible above 0.7."""
    axes.set(yscale="log", ylabel=label)
    axes.set_ylim(bottom=0.7)
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _running_mean(values: Tensor) -> tuple[Tensor, Tensor, int]:
    """Returns ranks, means over a tenth of the classes, and their number; one class is noisy."""
    width = max(len(values) // 10, 1)
    means = values.unfold(0, width, 1).nanmean(1)
    ranks, known = torch.arange(len(means)) + (width + 1) / 2, ~means.isnan()
    return ranks[known], 100 * means[known], width


@chart_style()
def draw_frequency(report: Report, width: float) -> Any:  # noqa: ANN401
    """Draws the test accuracy of each head from frequent to rare classes."""
    figure, (axes,) = panels(1, width, (width, width, 2.6 + 0.16 * width))
    order, lines = report.by_frequency, {}
    for name, style in head_styles(report).items():
        ranks, means, size = _running_mean(report.reports[name].per_class[order])
        (lines[name],) = axes.plot(ranks, means, gid=f"tip:{name}", **style)
    axes.set(ylabel="test accuracy, %", ylim=(0, 100))
    _rank_axes(axes, report.class_counts, report.rule)
    if size > 1:
        axes.set_xlabel(f"{RANKS}\n(each point is the mean of {size} neighbouring classes)")
    counts, ranks = axes.twinx(), torch.arange(len(order)) + 1
    counts.fill_between(ranks, report.class_counts[order], step="mid", color=LIGHT["shade"])
    _count_axis(counts, "training images (grey)")
    counts.minorticks_off()
    counts.grid(visible=False)
    add_legend(figure, lines)
    # The lines lie above the counts.
    axes.set_zorder(counts.get_zorder() + 1)
    axes.patch.set_visible(False)
    return figure


@chart_style()
def draw_curves(report: Report, width: float) -> Any:  # noqa: ANN401
    """Draws validation accuracy against tau, a panel for each head that has such a curve."""
    if not report.curves:
        return None
    figure, axes = panels(len(report.curves), width, (3.2, 5.2, 3.3), sharey=True)
    lines: dict[str, Any] = {}
    for panel, name in zip(axes, report.curves, strict=True):
        lines = _draw_curve(panel, report, name) | lines
    axes[0].set_ylabel("validation accuracy, %")
    add_legend(figure, lines)
    return figure


def _draw_curve(axes: Any, report: Report, head: str) -> dict[str, Any]:  # noqa: ANN401
    """Draws the curves of a head for the shot groups, all images and its objective."""
    curve, tau = report.curves[head]
    objective: Objective = report.objective(head) or "all"
    styles = group_styles()
    steps = {
        # A shot group's figure is the mean over its classes, as everywhere.
        name: part.steps("all" if part.targets is None else "class_mean")
        for name, part in curve.groups.items()
        if part is not None
    }
    steps["all"] = curve.steps()
    if objective not in steps:
        steps[objective] = curve.steps(objective)
        styles[objective] = line_style(LIGHT["accent"], width=2.0)
    right, lines = max(2.0, 1.5 * tau), {}
    for name, (edges, values) in steps.items():
        word = group_word(name) if name in (*GROUPS, "all") else OBJECTIVE_WORDS[objective]
        # The last value holds up to the right end.
        inside = edges < right
        x = torch.cat([edges[inside], torch.tensor([right])])
        y = 100 * torch.cat([values[inside], values[inside][-1:]])
        (lines[word],) = axes.step(x, y, where="post", gid=f"tip:{word}", **styles[name])
    value, at_zero = (percent(curve(at, objective=objective)) for at in (tau, 0.0))
    how = "selected" if report.objective(head) else "given"
    axes.axvline(tau, **DASHED_LINE)
    color, tip = styles[objective]["color"], f"tip:tau {tau:.3g}: {value} %"
    axes.plot([tau], [100 * curve(tau, objective=objective)], "o", color=color, gid=tip)
    axes.set_title(
        f"{head}\n{value} % at the {how} tau {tau:.3g}, {at_zero} % at tau 0\n"
        f"({OBJECTIVE_WORDS[objective]})"
    )
    axes.set(xlim=(0, right), xlabel=f"tau (dashed: {how})")
    return lines


@chart_style()
def draw_calibration(report: Report, width: float) -> Any:  # noqa: ANN401
    """Draws the accuracy of the predictions of each confidence, a panel for each head."""
    heads = {name: shot for name, shot in report.reports.items() if shot.reliability}
    if not heads:
        return None
    figure, axes = panels(len(heads), width, (1.65, 2.2, 2.3), sharex=True, sharey=True)
    styles = head_styles(report)
    for panel, (name, shot) in zip(axes, heads.items(), strict=True):
        bins = [part for part in shot.reliability or () if part["images"]]
        total = sum(part["images"] for part in bins)
        panel.plot([0, 100], [0, 100], **DOTTED_LINE)
        points = [[100 * part[key] for part in bins] for key in ("confidence", "accuracy")]
        panel.plot(*points, **{**styles[name], "linewidth": 1.2})
        for part in bins:
            size = 3 + 8 * (part["images"] / total) ** 0.5
            x, y = 100 * part["confidence"], 100 * part["accuracy"]
            tip = f"tip:{part['images']:,} images of confidence {x:.0f} %: {y:.1f} % right"
            panel.plot([x], [y], "o", markersize=size, color=styles[name]["color"], gid=tip)
        panel.set_title(f"{name}\nECE {percent(shot.ece)} %")
        panel.set_box_aspect(1)
    # Room for the points at the ends.
    axes[0].set(xlim=(-4, 104), ylim=(-4, 104), xticks=(0, 50, 100), yticks=(0, 50, 100))
    figure.supxlabel("confidence of the prediction, %", color=LIGHT["muted"])
    figure.supylabel("test accuracy, %", color=LIGHT["muted"])
    return figure


@chart_style()
def draw_training(report: Report, width: float) -> Any:  # noqa: ANN401
    """Draws training loss, validation accuracy and learning rate by epoch."""
    if not report.history:
        return None
    validated = [record for record in report.history if record.val]
    epochs, kept = [record.epoch for record in report.history], report.kept_epoch
    figure, axes = panels(2 + bool(validated), width, (2.3, 4.0, 2.6))
    losses, rates = zip(*((record.loss, record.lr) for record in report.history), strict=True)
    for panel, title, values in (
        (axes[0], "training loss", losses),
        (axes[-1], "learning rate", rates),
    ):
        panel.plot(epochs, values, color=LIGHT["text"], gid=f"tip:{title}")
        panel.set_title(title)
        panel.set_ylim(bottom=0)
    lines = {}
    for group, style in group_styles().items():
        points = [(r.epoch, 100 * v) for r in validated if (v := r.val.get(group)) is not None]
        if points:
            (lines[group_word(group)],) = axes[1].plot(
                *zip(*points, strict=True), gid=f"tip:{group_word(group)}", **style
            )
    if lines:
        axes[1].set(title="validation accuracy, %", ylim=(0, 100))
        add_legend(figure, lines)
    for panel in axes:
        panel.set_xlabel("epoch" if kept is None else f"epoch (dashed: {kept}, kept)")
        panel.xaxis.get_major_locator().set_params(integer=True)
        if kept is not None:
            panel.axvline(kept, **DASHED_LINE)
    return figure


@chart_style()
def draw_gains(report: Report, width: float) -> Any:  # noqa: ANN401
    """Draws the gain or loss of each class with the recommended head."""
    head, joint = report.recommended, report.base
    if head is None or joint in (None, head):
        return None
    figure, (axes,) = panels(1, width, (width, width, 3.8))
    order = report.by_frequency
    gains = (report.reports[head].per_class - report.reports[joint].per_class)[order]
    for sign, color in ((1, LIGHT["c0"]), (-1, LIGHT["c1"])):
        part = 100 * (sign * gains).clamp_min(0).nan_to_num(0) * sign
        # A step for each class: its edge is visible however many classes there are.
        axes.stairs(part, torch.arange(len(order) + 1) + 0.5, fill=True, color=color, alpha=0.8)
    ranks, means, size = _running_mean(gains)
    if size > 1:
        (line,) = axes.plot(ranks, means, color=LIGHT["text"])
        add_legend(figure, {f"mean of {size} neighbouring classes": line})
    axes.axhline(0, color=LIGHT["text"], linewidth=0.8)
    _rank_axes(axes, report.class_counts, report.rule)
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    axes.set_xlabel(f"{RANKS}\n(better: {better}, worse: {worse})")
    axes.set_ylabel(f"accuracy of {head} minus {joint}, points")
    return figure


@chart_style()
def draw_confusions(report: Report, width: float) -> Any:  # noqa: ANN401
    """Draws the confusions between shot groups of the joint classifier and the recommended head."""
    heads = [name for name in (report.base, report.recommended) if name is not None]
    if not heads:
        return None
    confusions = {name: confused_groups(report, name) for name in heads}
    figure, axes = panels(len(confusions), width, (2.5, 5.0, 2.6), sharey=True)
    colors = {"right": LIGHT["grid"], **{group: LIGHT[group_word(group)] for group in GROUPS}}
    bars: dict[str, Any] = {}
    for panel, (head, groups) in zip(axes, confusions.items(), strict=True):
        left = torch.zeros(len(groups))
        for part, color in colors.items():
            shares = torch.tensor([100 * outcomes[part] for outcomes in groups.values()])
            drawn = panel.barh(range(len(groups)), shares, left=left, color=color)
            bars["right" if part == "right" else f"a {group_word(part)}-shot class"] = drawn
            texts = [f"{share:.0f}" if share >= 6 else "" for share in shares.tolist()]
            ink = LIGHT["text"] if part == "right" else "white"
            panel.bar_label(drawn, texts, label_type="center", color=ink)
            left += shares
        panel.set_yticks(range(len(groups)), [f"{group_word(group)}-shot" for group in groups])
        panel.set(xlim=(0, 100), title=head, xlabel="test images, %")
        panel.grid(visible=False)
    axes[0].invert_yaxis()
    axes[0].set_ylabel("true class")
    add_legend(figure, bars, title="predicted", alignment="left")
    return figure


# Files of a run, in the order of the card.
PLOTS: Mapping[str, Callable[[Report, float], Any]] = {
    "accuracy_by_frequency.png": draw_frequency,
    "gains.png": draw_gains,
    "confusions.png": draw_confusions,
    "accuracy_by_tau.png": draw_curves,
    "calibration.png": draw_calibration,
    "training.png": draw_training,
}
PLOT_FILES: Sequence[str] = tuple(PLOTS)


def save_plots(folder: Path, report: Report) -> list[Path]:
    """Draws a run's charts as PNG files, and returns their paths; deletes those without figures."""
    figures = {folder / name: draw(report, WIDTH) for name, draw in PLOTS.items()}
    for path, figure in figures.items():
        if figure is None:
            # Left by an earlier run with other heads.
            path.unlink(missing_ok=True)
        else:
            write_figure(path, figure)
    return [path for path, figure in figures.items() if figure is not None]


@chart_style()
def save_count_plot(path: Path, class_counts: ClassCounts, rule: ShotRule = "fb") -> None:
    """Draws the training images of the classes, from the most to the least frequent, as PNG."""
    figure, (axes,) = panels(1, WIDTH, (WIDTH, WIDTH, 4.2))
    counts = check_class_counts(class_counts).sort(descending=True).values
    axes.stairs(counts, torch.arange(len(counts) + 1) + 0.5, fill=True, color=LIGHT["c0"])
    _count_axis(axes, "training images")
    _rank_axes(axes, counts, rule)
    write_figure(path, figure)


@chart_style()
def save_spread_plot(
    path: Path,
    spreads: Mapping[str, Mapping[tuple[str, str], tuple[float | None, float | None]]],
    *,
    title: str,
) -> None:
    """Draws a panel for each shot group: columns along the axis, a marker for each row.

    ``spreads[group][row, column]`` has the mean accuracy and its standard deviation, or None.
    """
    cells = next(iter(spreads.values()))
    labels, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    figure, axes = panels(len(spreads), 2.7 * len(spreads), (2.7, 2.7, 3.6))
    lines: dict[str, Any] = {}
    for panel, (group, by_cell) in zip(axes, spreads.items(), strict=True):
        for number, label in enumerate(labels):
            points = {column: by_cell[row, column] for row, column in by_cell if row == label}
            lines[label] = panel.errorbar(
                # Beside each other: markers of one column would hide each other.
                [columns.index(column) + number / len(labels) / 2 for column in points],
                [math.nan if mean is None else 100 * mean for mean, _ in points.values()],
                yerr=[100 * (sd or 0.0) for _, sd in points.values()],
                color=COLORS[number % len(COLORS)],
                marker=MARKERS[number % len(MARKERS)],
                linestyle="none",
                capsize=2,
            )
        panel.set_title(group)
        panel.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes[0].set_ylabel("test accuracy, %")
    add_legend(figure, lines, title=title, alignment="left")
    write_figure(path, figure)
