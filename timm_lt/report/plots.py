"""The plots of a run, as PNG for its folder and model card.

What the plots share: looks of heads and shot groups, and how a figure is written.

Plots of what a head changes: classes that gain and lose, what is taken for what; of training.

Plots of heads: accuracy by class frequency, accuracy against tau, calibration.

The plot of a data set: training images by class.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_lt.fitting import AccuracyCurve
from timm_lt.metrics import Objective, ShotReport
from timm_lt.report.tables import GROUPS, OBJECTIVE_WORDS, group_word, percent
from timm_lt.training.history import EpochRecord
from timm_lt.utils.files import write_atomic
from timm_lt.utils.longtail import ClassCounts, ShotRule, check_class_counts, describe_shots

# Pixels per inch.
DPI = 120
# Of the classes of many, medium and few images.
GROUP_COLORS = ("C2", "C1", "C3")
# Colours that are told apart on white, and from the grey of the training images.
COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def write_figure(path: Path, figure: Any) -> None:  # noqa: ANN401
    """Writes a figure of matplotlib as PNG, whole or not at all."""
    image = io.BytesIO()
    layout = figure.get_layout_engine()
    if layout is not None:
        # Once; matplotlib would do so twice, and draw twice, which takes most of the time.
        figure.dpi = DPI
        layout.execute(figure)
        figure.set_layout_engine("none")
    figure.savefig(image, dpi=DPI)
    write_atomic(path, image.getvalue())


def head_styles(reports: Mapping[str, ShotReport]) -> dict[str, dict[str, Any]]:
    """Returns how each head's line is drawn in all plots; the joint classifier is black."""
    others = [name for name in reports if name != "linear"]
    styles: dict[str, dict[str, Any]] = {
        name: {
            "color": COLORS[i % len(COLORS)],
            "linestyle": "-" if i < len(COLORS) else "--",
            "linewidth": 1.6,
        }
        for i, name in enumerate(others)
    }
    return styles | {"linear": {"color": "black", "linestyle": "-", "linewidth": 2.2}}


def mark_groups(axes: Any, class_counts: Tensor, rule: ShotRule) -> None:  # noqa: ANN401
    """Draws where a shot group ends and the next begins."""
    end, room = 0.5, 0.15 * len(class_counts)
    for name, shot in describe_shots(class_counts, rule).items():
        start, end = end, end + int(shot["classes"])
        if start == end:
            continue
        if start > 1:
            axes.axvline(start, color="black", linestyle=":", linewidth=1)
        words = f"{group_word(name)}-shot ({shot['rule']})" if end - start > room else ""
        axes.text(
            (start + end) / 2,
            1.01,
            words,
            transform=axes.get_xaxis_transform(),
            horizontalalignment="center",
            verticalalignment="bottom",
            fontsize="small",
        )


RIGHT = "right"


def draw_gains(
    figure: Any,  # noqa: ANN401
    reports: Mapping[str, ShotReport],
    class_counts: Tensor,
    *,
    joint: str,
    head: str,
) -> None:
    """Draws by how much each class gains or loses with a head, against the joint classifier.

    Args:
        figure: Of matplotlib.
        reports: Test figures by head.
        class_counts: Training images per class, (C,).
        joint: Name of the joint classifier.
        head: Name of the head.
    """
    axes = figure.subplots()
    order = torch.argsort(class_counts, descending=True, stable=True)
    gains = 100 * (reports[head].per_class - reports[joint].per_class)[order]
    for sign, color in ((1, "C0"), (-1, "C3")):
        part = (sign * gains).clamp_min(0).nan_to_num(0) * sign
        # A step for each class, whose edge is seen however many there are.
        edges = torch.arange(len(order) + 1) + 0.5
        axes.stairs(part, edges, fill=True, color=color, alpha=0.8)
    width = max(len(order) // 10, 1)
    if width > 1:
        windows = gains.unfold(0, width, 1).nanmean(1)
        middle = torch.arange(len(windows)) + 1 + (width - 1) / 2
        label = f"mean of {width} neighbouring classes"
        axes.plot(middle, windows, color="black", linewidth=1.6, label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    axes.set_xlabel("classes, from the most to the least frequent")
    axes.set_ylabel(f"accuracy of {head} minus that\nof {joint}, percentage points")
    axes.set_xlim(0.5, len(order) + 0.5)
    mark_groups(axes, class_counts, reports[joint].rule)
    gain = "class gains" if better == 1 else "classes gain"
    figure.suptitle(f"{better} {gain}, {worse} lose{'s' if worse == 1 else ''}", fontsize="medium")
    if width > 1:
        figure.legend(fontsize="small", loc="outside lower center")


def draw_confusions(
    figure: Any,  # noqa: ANN401
    confusions: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> None:
    """Draws what the images of each shot group are taken for, a panel for each head.

    Args:
        figure: Of matplotlib.
        confusions: By head and shot group, the shares of its test images that are ``right`` and, of
            the wrong ones, by shot group of the predicted class.
    """
    panels = figure.subplots(1, len(confusions), squeeze=False, sharey=True)[0]
    looks = {RIGHT: "0.75", **dict(zip(GROUPS, GROUP_COLORS, strict=True))}
    names = [group for group in GROUPS if any(group in found for found in confusions.values())]
    for axes, (head, groups) in zip(panels, confusions.items(), strict=True):
        left = torch.zeros(len(names))
        for part, color in looks.items():
            shares = torch.tensor([100 * groups.get(name, {}).get(part, 0.0) for name in names])
            label = RIGHT if part == RIGHT else f"a {group_word(part)}-shot class"
            axes.barh(range(len(names)), shares, left=left, color=color, label=label)
            for row, (start, share) in enumerate(zip(left.tolist(), shares.tolist(), strict=True)):
                if share >= 6:
                    text = {"ha": "center", "va": "center", "fontsize": "small"}
                    axes.text(start + share / 2, row, f"{share:.0f}", **text)
            left += shares
        axes.set_yticks(range(len(names)), [f"{group_word(name)}-shot" for name in names])
        axes.set_xlim(0, 100)
        axes.set_title(head, fontsize="medium")
        axes.set_xlabel("test images, %")
    panels[0].invert_yaxis()
    panels[0].set_ylabel("true class")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, fontsize="small", loc="outside upper center", ncols=4, title="predicted"
    )


def draw_training(figure: Any, history: Sequence[EpochRecord], kept: int | None) -> None:  # noqa: ANN401
    """Draws loss and accuracy on validation, epoch by epoch.

    Args:
        figure: Of matplotlib.
        history: The epochs.
        kept: The epoch whose weights went on, if known.
    """
    validated = [record for record in history if record.val]
    panels = figure.subplots(1, 2 if validated else 1, squeeze=False)[0]
    if validated:
        _draw_accuracy(panels[0], validated)
        figure.legend(fontsize="small", loc="outside upper center", ncols=4)
    losses = panels[-1]
    losses.plot([r.epoch for r in history], [r.loss for r in history], color="black", marker=".")
    losses.set_ylabel("training loss")
    for panel in panels:
        panel.set_xlabel("epoch" if kept is None else f"epoch (dashed: {kept}, which was kept)")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        if kept is not None:
            panel.axvline(kept, linestyle="--", color="black", linewidth=1)


def _draw_accuracy(axes: Any, validated: Sequence[EpochRecord]) -> None:  # noqa: ANN401
    looks = {"all": "black", **dict(zip(GROUPS, GROUP_COLORS, strict=True))}
    for part, color in looks.items():
        points = [
            (record.epoch, 100 * value)
            for record in validated
            if (value := record.val.get(part)) is not None
        ]
        if points:
            line = {"color": color, "linewidth": 2.0 if part == "all" else 1.4}
            axes.plot(*zip(*points, strict=True), label=group_word(part), marker=".", **line)
    axes.set_ylabel("accuracy on validation, %")
    axes.set_ylim(0, 100)


# Share of the images from which on a bin of confidences says something.
SURE_SHARE = 0.005


def draw_frequency(
    figure: Any,  # noqa: ANN401
    reports: Mapping[str, ShotReport],
    class_counts: Tensor,
) -> None:
    """Draws the test accuracy of each head (``reports``) from frequent to rare classes."""
    axes = figure.subplots()
    order = torch.argsort(class_counts, descending=True, stable=True)
    width = max(len(order) // 10, 1)
    styles = head_styles(reports)
    for name, report in reports.items():
        accuracy = report.per_class[order]
        # A running mean over neighbouring classes: single classes are too noisy to read.
        windows = accuracy.unfold(0, width, 1).nanmean(1)
        places = torch.arange(len(windows)) + (width - 1) / 2 + 1
        axes.plot(places, 100 * windows, label=name, **styles[name])
    axes.set_xlabel("classes, from the most to the least frequent")
    smoothing = f"\n(mean of {width} neighbouring classes)" if width > 1 else ""
    axes.set_ylabel(f"test accuracy, %{smoothing}")
    axes.set_ylim(0, 100)
    axes.set_xlim(0.5, len(order) + 0.5)
    mark_groups(axes, class_counts, next(iter(reports.values())).rule)
    counts = axes.twinx()
    places = torch.arange(len(order)) + 1
    counts.fill_between(places, class_counts[order], step="mid", alpha=0.12, color="black")
    counts.set_yscale("log")
    counts.set_ylabel("training images (grey)")
    # Outside, where it hides no curve.
    figure.legend(
        *axes.get_legend_handles_labels(), fontsize="small", loc="outside upper center", ncols=6
    )
    axes.set_zorder(counts.get_zorder() + 1)
    axes.patch.set_visible(False)


def draw_curves(
    figure: Any,  # noqa: ANN401
    curves: Mapping[str, tuple[AccuracyCurve, float]],
    objectives: Mapping[str, Objective | None],
) -> None:
    """Draws accuracy on validation against tau with the head's tau, a panel for each head.

    Args:
        figure: Of matplotlib.
        curves: The curve and the head's tau, by head.
        objectives: What the tau maximises, by head; drawn too, where it is not the accuracy over
            all images. None, or no entry, if the tau was given.
    """
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    labels: dict[str, Any] = {}
    for axes, (name, (curve, tau)) in zip(panels, curves.items(), strict=True):
        objective: Objective = objectives.get(name) or "all"
        right = max(2.0, 1.5 * tau)
        parts: dict[Objective, str] = {objective: "C1", "all": "C0"}
        for part, color in reversed(parts.items()):
            line = _draw_steps(axes, curve.steps(part), right, color=color)
            labels[OBJECTIVE_WORDS[part]] = line
        value, at_zero = (curve(at, objective=objective) for at in (tau, 0.0))
        axes.axvline(tau, linestyle="--", color="black", linewidth=1)
        axes.plot([tau], [100 * value], marker="o", color="black", markersize=5)
        axes.set_title(
            f"{name}: {percent(value)} % at tau = {tau:.2f}\n({percent(at_zero)} % at tau = 0)",
            fontsize="medium",
        )
        axes.set_xlim(0, right)
        axes.set_xlabel(f"tau (dashed: {'selected' if objectives.get(name) else 'given'})")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation accuracy, %")
    if len(labels) > 1:
        lines = {"handles": labels.values(), "labels": labels.keys()}
        figure.legend(**lines, fontsize="small", loc="outside upper center", ncols=len(labels))


def _draw_steps(axes: Any, steps: tuple[Tensor, Tensor], right: float, **look: Any) -> Any:  # noqa: ANN401
    """Draws a step function up to ``right``; its value after the last step holds from there on."""
    edges, values = steps
    shown = edges < right
    edges = torch.cat([edges[shown], torch.tensor([right])])
    values = torch.cat([values[shown], values[shown][-1:]])
    (line,) = axes.step(edges, 100 * values, where="post", **look)
    return line


def draw_calibration(figure: Any, reports: Mapping[str, ShotReport]) -> None:  # noqa: ANN401
    """Draws how often the predictions of each confidence are right, for heads with logits."""
    axes = figure.subplots()
    ideal = {"color": "grey", "linestyle": ":", "linewidth": 1.4}
    axes.plot([0, 100], [0, 100], label="perfectly calibrated", **ideal)
    styles = head_styles(reports)
    for name, report in reports.items():
        if not report.reliability:
            continue
        filled = [part for part in report.reliability if part["images"]]
        confidence, accuracy = (
            torch.tensor([100 * part[key] for part in filled]) for key in ("confidence", "accuracy")
        )
        images = torch.tensor([part["images"] for part in filled])
        share = images / images.sum()
        style = styles[name]
        sizes = 6 + 250 * share
        axes.scatter(confidence, accuracy, s=sizes, color=style["color"], alpha=0.75, zorder=3)
        # Bins of few images are noise: a line through them would hide the others.
        sure = share >= SURE_SHARE
        axes.plot(confidence[sure], accuracy[sure], **{**style, "linewidth": 1.0}, zorder=2)
        # What the legend shows: a point of one size for every head.
        label = f"{name} (ECE {percent(report.ece)} %)"
        axes.plot([], [], marker="o", markersize=5, label=label, **style)
    # Room for the points at the ends.
    axes.set_xlim(-3, 103)
    axes.set_ylim(-3, 103)
    axes.set_box_aspect(1)
    axes.set_xlabel("confidence of the prediction, %")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    figure.legend(
        fontsize="small",
        loc="outside right upper",
        title="above the diagonal: too cautious\nlarger points: more images",
        title_fontsize="small",
        alignment="left",
        frameon=False,
    )


FREQUENCY_PLOT = "accuracy_by_frequency.png"
GAINS_PLOT = "gains.png"
CONFUSION_PLOT = "confusions.png"
TAU_PLOT = "accuracy_by_tau.png"
CALIBRATION_PLOT = "calibration.png"
TRAINING_PLOT = "training.png"
# In the order in which they are shown.
PLOT_FILES = (
    FREQUENCY_PLOT,
    GAINS_PLOT,
    CONFUSION_PLOT,
    TAU_PLOT,
    CALIBRATION_PLOT,
    TRAINING_PLOT,
)


def save_plots(
    folder: Path,
    reports: Mapping[str, ShotReport],
    class_counts: Tensor,
    curves: Mapping[str, tuple[AccuracyCurve, float]],
    *,
    objectives: Mapping[str, Objective | None] | None = None,
    joint: str = "linear",
    compared: str | None = None,
    confusions: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    history: Sequence[EpochRecord] = (),
    kept_epoch: int | None = None,
) -> list[Path]:
    """Draws what a run measured, as PNG; what it did not is left out.

    Args:
        folder: Where to write; made if missing.
        reports: Test figures by head; those without logits have no calibration.
        class_counts: Training images per class, (C,).
        curves: Validation accuracy against tau with the head's tau, by head; may be empty.
        objectives: What that tau maximises, by head; of the others it was given, not selected.
        joint: Name of the joint classifier.
        compared: Name of the head that is compared with it, class by class; None compares none.
        confusions: By head, what the images of each shot group are taken for, as of
            :class:`timm_lt.report.html.Confusions`; of them, the joint classifier's and the
            compared head's are drawn.
        history: The epochs of training; empty if nothing was trained.
        kept_epoch: The epoch whose weights went on.

    Returns:
        The files.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []

    def save(name: str, height: float, draw: Any, *args: Any, **options: Any) -> None:  # noqa: ANN401
        figure = Figure(figsize=(7.5, height), layout="constrained")
        draw(figure, *args, **options)
        write_figure(folder / name, figure)
        paths.append(folder / name)

    pair = [name for name in (joint, compared) if name is not None and name in reports]
    save(FREQUENCY_PLOT, 4.2, draw_frequency, reports, class_counts)
    if compared is not None and len(set(pair)) == 2:
        save(GAINS_PLOT, 3.8, draw_gains, reports, class_counts, joint=joint, head=compared)
    known = confusions or {}
    shown = {name: known[name] for name in pair if name in known}
    if shown:
        save(CONFUSION_PLOT, 2.6, draw_confusions, shown)
    if curves:
        save(TAU_PLOT, 3.4, draw_curves, curves, objectives or {})
    if any(report.reliability for report in reports.values()):
        save(CALIBRATION_PLOT, 4.8, draw_calibration, reports)
    if history:
        save(TRAINING_PLOT, 3.4, draw_training, history, kept_epoch)
    for name in PLOT_FILES:
        if folder / name not in paths:
            # Of an earlier try, with other heads.
            (folder / name).unlink(missing_ok=True)
    return paths


def save_count_plot(path: Path, class_counts: ClassCounts, rule: ShotRule = "fb") -> None:
    """Draws the training images of the classes, from the most to the least frequent, as PNG.

    Args:
        path: The file to write.
        class_counts: Training images per class, (C,).
        rule: Of the shot groups, which are shaded.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    counts = check_class_counts(class_counts).sort(descending=True).values
    edges = torch.arange(len(counts) + 1) + 0.5
    axes.stairs(counts, edges, fill=True, color="C0", alpha=0.8)
    # The floor shows a class of one image; there is no logarithm of none.
    axes.set_yscale("log")
    axes.set_ylim(0.7, 1.5 * int(counts[0]))
    axes.set_xlim(0.5, len(counts) + 0.5)
    axes.set_xlabel("classes, from the most to the least frequent")
    axes.set_ylabel("training images")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    mark_groups(axes, counts, rule)
    end = 0.5
    for shade, shot in zip(GROUP_COLORS, describe_shots(counts, rule).values(), strict=True):
        start, end = end, end + int(shot["classes"])
        axes.axvspan(start, end, color=shade, alpha=0.12, linewidth=0, zorder=0)
    write_figure(path, figure)


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
    from matplotlib.figure import Figure

    cells = next(iter(spreads.values()))
    labels, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    figure = Figure(figsize=(2.7 * len(spreads), 3.6), layout="constrained")
    panels = figure.subplots(1, len(spreads), squeeze=False)[0]
    for axes, (group, by_cell) in zip(panels, spreads.items(), strict=True):
        for number, label in enumerate(labels):
            points = {column: by_cell[row, column] for row, column in by_cell if row == label}
            axes.errorbar(
                # Beside each other: markers of one column would hide each other.
                [columns.index(column) + number / len(labels) / 2 for column in points],
                [math.nan if mean is None else 100 * mean for mean, _ in points.values()],
                yerr=[100 * (sd or 0.0) for _, sd in points.values()],
                label=label,
                color=COLORS[number % len(COLORS)],
                marker=MARKERS[number % len(MARKERS)],
                linestyle="none",
                capsize=2,
            )
        axes.set_title(group)
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, title=title, loc="outside upper center", ncols=len(labels))
    write_figure(path, figure)
