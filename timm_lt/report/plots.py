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
from timm_lt.report.changes import confused_groups
from timm_lt.report.record import Report
from timm_lt.report.tables import GROUPS, OBJECTIVE_WORDS, group_word, percent
from timm_lt.utils.files import write_atomic
from timm_lt.utils.longtail import ClassCounts, ShotRule, check_class_counts, describe_shots

# Every colour of the charts, for light pages and PNG files and for dark pages. The report has them
# as variables of its style sheet; no two light ones may be equal, and none black.
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
# Colours of heads beside the joint classifier; every other one is dashed, too.
COLORS = tuple(color for name, color in LIGHT.items() if re.fullmatch(r"c\d", name))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("", "6 2", "", "2 1.5", "", "5 2 1.5 2", "", "4 4", "")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": LIGHT["text"],
    # Names come from anywhere: a dollar sign is no formula.
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
    "legend.frameon": False,
    "path.simplify_threshold": 0.5,
    # Text stays text: it takes the font of the page, and can be searched.
    "svg.fonttype": "none",
}
# Width of a PNG file and least width of any figure in inches, and pixels per inch of a file.
WIDTH, LEAST_WIDTH, DPI = 7.5, 3.6, 120
# Share of the images that a bin of confidences needs for the line to go through it.
SURE_SHARE = 0.005
RANKS = "classes, from the most to the least frequent"


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
    """Writes a matplotlib figure as PNG, whole or not at all."""
    image = io.BytesIO()
    _lay_out(figure, DPI)
    figure.savefig(image, dpi=DPI)
    write_atomic(path, image.getvalue())


def figure_svg(figure: Any, salt: str) -> str:  # noqa: ANN401
    """Returns a matplotlib figure as SVG to be put into a page that defines the palette.

    A ``gid`` that begins with ``tip:`` becomes the text that a browser shows over the artist. The
    salt sets the figure's ids apart from those of others in the page.
    """
    file = io.StringIO()
    with chart_style(**{"svg.hashsalt": salt}):
        _lay_out(figure, 72)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
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
    """Replaces the palette's colours by the variables of the report's style sheet.

    >>> page_colors("stroke: #1b1d22")
    'stroke: var(--text)'
    """
    names = {light: f"var(--{name})" for name, light in LIGHT.items()}
    return re.sub(r"#[0-9a-f]{6}", lambda color: names.get(color[0], color[0]), text)


def _lay_out(figure: Any, dpi: int) -> None:  # noqa: ANN401
    """Computes the layout once; matplotlib would do so, and draw all, twice."""
    layout = figure.get_layout_engine()
    if layout is not None:
        figure.dpi = dpi
        layout.execute(figure)
        figure.set_layout_engine("none")


def panels(
    count: int, width: float, size: tuple[float, float, float], **options: Any
) -> tuple[Any, list[Any]]:
    """Creates a figure with panels, as many in a row as fit; returns it and its axes.

    ``width`` is the largest one of the figure in inches; ``size`` has the least and the largest
    width of a panel, and its height.
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
    """Adds a legend above the panels, where it hides no curve; its columns depend on the width."""
    # Inches of a handle and its gaps, and of a character.
    entry = 0.6 + 0.07 * max(map(len, lines))
    columns = max(int(figure.get_figwidth() / entry), 1)
    # A head may have a name that matplotlib leaves out of automatic legends.
    handles, labels = list(lines.values()), list(lines)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, **options)


def line_style(color: str, dashes: str = "", width: float = 1.5) -> dict[str, Any]:
    """Returns options of matplotlib for a line, with dashes in widths of the line."""
    pattern = (0, tuple(map(float, dashes.split()))) if dashes else "-"
    return {"color": color, "linestyle": pattern, "linewidth": width}


def head_styles(report: Report) -> dict[str, dict[str, Any]]:
    """Returns how each head's line looks in all charts; the joint classifier's has the text colour.

    The joint classifier is last, so that it lies above the others.
    """
    styles = {}
    for number, name in enumerate(name for name in report.reports if name != report.base):
        turn, k = divmod(number, len(COLORS))
        width = 2.2 if name == report.recommended else 1.5
        styles[name] = line_style(COLORS[k], "9 3" if turn else DASHES[k], width)
    return (
        styles
        if report.base is None
        else styles | {report.base: line_style(LIGHT["text"], width=2.2)}
    )


def group_styles() -> dict[str, dict[str, Any]]:
    """Returns how the lines of the shot groups and of all images look."""
    colors = (LIGHT[group_word(group)] for group in GROUPS)
    styles = map(line_style, colors, ("6 2", "3 2", ""))
    return {**dict(zip(GROUPS, styles, strict=True)), "all": line_style(LIGHT["text"], width=2.0)}


def mark_groups(axes: Any, class_counts: Tensor, rule: ShotRule) -> None:  # noqa: ANN401
    """Draws where a shot group ends and the next begins, with their names above."""
    end, inches = 0.5, axes.figure.get_figwidth() / len(class_counts)
    for name, shot in describe_shots(class_counts, rule).items():
        start, end = end, end + int(shot["classes"])
        if start == end:
            continue
        if start > 1:
            axes.axvline(start, color=LIGHT["muted"], linestyle=":", linewidth=1)
        room, short = (end - start) * inches, group_word(name)
        text = f"{short} {shot['rule']}" if room > 1.6 else short if room > 0.8 else ""
        transform, options = axes.get_xaxis_transform(), {"ha": "center", "va": "bottom"}
        axes.text((start + end) / 2, 1.01, text, transform=transform, **options)


def _rank_axes(axes: Any, class_counts: Tensor, rule: ShotRule) -> None:  # noqa: ANN401
    axes.set_xlabel(RANKS)
    axes.set_xlim(0.5, len(class_counts) + 0.5)
    mark_groups(axes, class_counts, rule)


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
    order, counts, lines = report.by_frequency, axes.twinx(), {}
    for name, style in head_styles(report).items():
        ranks, means, size = _running_mean(report.reports[name].per_class[order])
        (lines[name],) = axes.plot(ranks, means, gid=f"tip:{name}", **style)
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(0, 100)
    _rank_axes(axes, report.class_counts, report.rule)
    if size > 1:
        axes.set_xlabel(f"{RANKS}\n(each point is the mean of {size} neighbouring classes)")
    ranks = torch.arange(len(order)) + 1
    counts.fill_between(ranks, report.class_counts[order], step="mid", color=LIGHT["shade"])
    # The floor shows a class of one image; 0 has no logarithm.
    counts.set_yscale("log")
    counts.set_ylim(bottom=0.7)
    counts.set_ylabel("training images (grey)")
    counts.yaxis.set_major_formatter("{x:,.0f}")
    counts.minorticks_off()
    counts.grid(visible=False)
    add_legend(figure, lines)
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
        _draw_curve(panel, report, name, lines)
    axes[0].set_ylabel("validation accuracy, %")
    add_legend(figure, lines)
    return figure


def _draw_curve(axes: Any, report: Report, head: str, lines: dict[str, Any]) -> None:  # noqa: ANN401
    curve, tau = report.curves[head]
    objective: Objective = report.objective(head) or "all"
    right = max(2.0, 1.5 * tau)
    styles = group_styles()
    parts = {
        # A shot group's figure is the mean over its classes, as everywhere.
        name: part.steps("all" if part.targets is None else "class_mean")
        for name, part in curve.groups.items()
        if part is not None
    }
    parts["all"] = curve.steps()
    if objective not in parts:
        parts[objective] = curve.steps(objective)
        styles[objective] = line_style(LIGHT["accent"], width=2.0)
    for name, steps in parts.items():
        word = group_word(name) if name in (*GROUPS, "all") else OBJECTIVE_WORDS[objective]
        line = _draw_steps(axes, steps, right, gid=f"tip:{word}", **styles[name])
        lines.setdefault(word, line)
    value, at_zero = (percent(curve(at, objective=objective)) for at in (tau, 0.0))
    how = "selected" if report.objective(head) else "given"
    axes.axvline(tau, linestyle="--", color=LIGHT["muted"], linewidth=1)
    color, tip = styles[objective]["color"], f"tip:tau {tau:.3g}: {value} %"
    axes.plot([tau], [100 * curve(tau, objective=objective)], "o", color=color, gid=tip)
    axes.set_title(
        f"{head}\n{value} % at the {how} tau {tau:.3g}, {at_zero} % at tau 0\n"
        f"({OBJECTIVE_WORDS[objective]})"
    )
    axes.set_xlim(0, right)
    axes.set_xlabel(f"tau (dashed: {how})")


def _draw_steps(axes: Any, steps: tuple[Tensor, Tensor], right: float, **style: Any) -> Any:  # noqa: ANN401
    """Draws a step function up to ``right``; its last value holds up to there."""
    edges, values = steps
    shown = edges < right
    edges = torch.cat([edges[shown], torch.tensor([right])])
    values = torch.cat([values[shown], values[shown][-1:]])
    return axes.step(edges, 100 * values, where="post", **style)[0]


@chart_style()
def draw_calibration(report: Report, width: float) -> Any:  # noqa: ANN401
    """Draws how often predictions of each confidence are right, a panel for each head."""
    heads = {name: found for name, found in report.reports.items() if found.reliability}
    if not heads:
        return None
    figure, axes = panels(len(heads), width, (1.65, 2.2, 2.3), sharex=True, sharey=True)
    styles = head_styles(report)
    for panel, (name, found) in zip(axes, heads.items(), strict=True):
        bins = [part for part in found.reliability or () if part["images"]]
        total = sum(part["images"] for part in bins)
        panel.plot([0, 100], [0, 100], color=LIGHT["muted"], linestyle=":", linewidth=1)
        # Bins of few images are noise, and would draw the line away from the others.
        sure = [part for part in bins if part["images"] >= SURE_SHARE * total]
        points = [[100 * part[key] for part in sure] for key in ("confidence", "accuracy")]
        panel.plot(*points, **{**styles[name], "linewidth": 1.2})
        for part in bins:
            size = 3 + 8 * (part["images"] / total) ** 0.5
            x, y = 100 * part["confidence"], 100 * part["accuracy"]
            tip = f"tip:{part['images']:,} images of confidence {x:.0f} %: {y:.1f} % right"
            panel.plot([x], [y], "o", markersize=size, color=styles[name]["color"], gid=tip)
        panel.set_title(f"{name}\nECE {percent(found.ece)} %")
        panel.set_box_aspect(1)
    # Room for the points at the ends.
    axes[0].set(xlim=(-4, 104), ylim=(-4, 104), xticks=(0, 50, 100), yticks=(0, 50, 100))
    figure.supxlabel("confidence of the prediction, %", fontsize=9, color=LIGHT["muted"])
    figure.supylabel("test accuracy, %", fontsize=9, color=LIGHT["muted"])
    return figure


@chart_style()
def draw_training(report: Report, width: float) -> Any:  # noqa: ANN401
    """Draws training loss, accuracy on validation and learning rate by epoch."""
    if not report.history:
        return None
    validated = [record for record in report.history if record.val]
    epochs = [record.epoch for record in report.history]
    figure, axes = panels(2 + bool(validated), width, (2.3, 4.0, 2.6))
    figures = {
        "training loss": [record.loss for record in report.history],
        "learning rate": [record.lr for record in report.history],
    }
    for panel, (title, values) in zip((axes[0], axes[-1]), figures.items(), strict=True):
        panel.plot(epochs, values, color=LIGHT["text"], gid=f"tip:{title}")
        panel.set_title(title)
        panel.set_ylim(bottom=0)
    if validated:
        lines = {}
        for group, style in group_styles().items():
            points = [(r.epoch, 100 * v) for r in validated if (v := r.val.get(group)) is not None]
            if points:
                word = group_word(group)
                (lines[word],) = axes[1].plot(
                    *zip(*points, strict=True), gid=f"tip:{word}", **style
                )
        axes[1].set_title("validation accuracy, %")
        axes[1].set_ylim(0, 100)
        add_legend(figure, lines)
    kept = report.kept_epoch
    for panel in axes:
        panel.set_xlabel("epoch" if kept is None else f"epoch (dashed: {kept}, kept)")
        panel.xaxis.get_major_locator().set_params(integer=True)
        if kept is not None:
            panel.axvline(kept, linestyle="--", color=LIGHT["muted"], linewidth=1)
    return figure


@chart_style()
def draw_gains(report: Report, width: float) -> Any:  # noqa: ANN401
    """Draws what each class gains or loses with the recommended head."""
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
    axes.set_ylabel(f"accuracy of {head} minus {joint}, points")
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    axes.set_xlabel(f"{RANKS}\n(better: {better}, worse: {worse})")
    return figure


@chart_style()
def draw_confusions(report: Report, width: float) -> Any:  # noqa: ANN401
    """Draws what the joint classifier and the recommended head take each shot group for."""
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


# The files of a run, in the order in which the card shows them.
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
    """Draws a run's charts as PNG files; files for which the report has no figures are deleted.

    Args:
        folder: Folder for the files; created if missing.
        report: The figures.

    Returns:
        The files.
    """
    paths = []
    for name, draw in PLOTS.items():
        figure = draw(report, WIDTH)
        if figure is None:
            # Left by an earlier run with other heads.
            (folder / name).unlink(missing_ok=True)
            continue
        write_figure(folder / name, figure)
        paths.append(folder / name)
    return paths


@chart_style()
def save_count_plot(path: Path, class_counts: ClassCounts, rule: ShotRule = "fb") -> None:
    """Draws the training images of the classes, from the most to the least frequent, as PNG.

    Args:
        path: File to write.
        class_counts: Training images per class, (C,).
        rule: Rule of the shot groups, which are shaded.
    """
    figure, (axes,) = panels(1, WIDTH, (WIDTH, WIDTH, 4.2))
    counts = check_class_counts(class_counts).sort(descending=True).values
    axes.stairs(counts, torch.arange(len(counts) + 1) + 0.5, fill=True, color=LIGHT["c0"])
    # The floor shows a class of one image; 0 has no logarithm.
    axes.set_yscale("log")
    axes.set_ylim(0.7, 1.5 * int(counts[0]))
    axes.set_ylabel("training images")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _rank_axes(axes, counts, rule)
    end = 0.5
    for name, shot in describe_shots(counts, rule).items():
        start, end = end, end + int(shot["classes"])
        shade = LIGHT[group_word(name)]
        axes.axvspan(start, end, color=shade, alpha=0.12, linewidth=0, zorder=0)
    write_figure(path, figure)


@chart_style()
def save_spread_plot(
    path: Path,
    spreads: Mapping[str, Mapping[tuple[str, str], tuple[float | None, float | None]]],
    *,
    title: str,
) -> None:
    """Draws a panel for each shot group: columns along the axis, a marker for each row.

    Args:
        path: PNG file to write.
        spreads: By shot group, then by row and column, the mean accuracy and its standard
            deviation, fractions; None if unknown.
        title: Heading of the rows.
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
