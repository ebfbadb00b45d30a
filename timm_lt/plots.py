"""The plots of a run: accuracy by class frequency, accuracy against tau, calibration; of data."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_lt.files import write_atomic
from timm_lt.fitting import AccuracyCurve
from timm_lt.longtail import ShotRule, describe_shots
from timm_lt.metrics import ShotReport
from timm_lt.report import group_word, percent

# The plots of a run, in the order in which they are shown.
FREQUENCY_PLOT = "accuracy_by_frequency.png"
TAU_PLOT = "accuracy_by_tau.png"
CALIBRATION_PLOT = "calibration.png"
PLOT_FILES = (FREQUENCY_PLOT, TAU_PLOT, CALIBRATION_PLOT)
# Share of the images from which on a bin of confidences says something.
SURE_SHARE = 0.005
# Behind the classes of many, medium and few images.
SHADES = ("C2", "C1", "C3")
# Colours that are told apart on white, and from the grey of the training images.
COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")


def save_plots(
    folder: Path,
    reports: Mapping[str, ShotReport],
    class_counts: Tensor,
    curves: Mapping[str, tuple[AccuracyCurve, float]],
) -> list[Path]:
    """Draws accuracy by class frequency, accuracy against tau, and calibration, as PNG.

    Args:
        folder: Where to write; made if missing.
        reports: Test figures by head; those without logits have no calibration.
        class_counts: Training images per class, (C,).
        curves: Validation accuracy against tau with the head's tau, by head; may be empty.

    Returns:
        The files.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figures = {FREQUENCY_PLOT: Figure(figsize=(7.5, 4.2), layout="constrained")}
    _draw_frequency(figures[FREQUENCY_PLOT], reports, class_counts)
    if curves:
        figures[TAU_PLOT] = Figure(figsize=(7.5, 3.4), layout="constrained")
        _draw_curves(figures[TAU_PLOT], curves)
    if any(report.reliability for report in reports.values()):
        figures[CALIBRATION_PLOT] = Figure(figsize=(7.5, 4.8), layout="constrained")
        _draw_calibration(figures[CALIBRATION_PLOT], reports)
    for name, figure in figures.items():
        write_figure(folder / name, figure)
    return [folder / name for name in figures]


def save_count_plot(path: Path, class_counts: Tensor, rule: ShotRule = "fb") -> None:
    """Draws the training images of the classes, from the most to the least frequent, as PNG.

    Args:
        path: The file to write.
        class_counts: Training images per class, (C,).
        rule: Of the shot groups, which are shaded.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    counts = class_counts.sort(descending=True).values
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
    _mark_groups(axes, class_counts, rule)
    end = 0.5
    for shade, shot in zip(SHADES, describe_shots(class_counts, rule).values(), strict=True):
        start, end = end, end + int(shot["classes"])
        axes.axvspan(start, end, color=shade, alpha=0.12, linewidth=0, zorder=0)
    write_figure(path, figure)


def write_figure(path: Path, figure: Any) -> None:  # noqa: ANN401
    """Writes a figure of matplotlib as PNG, whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, dpi=120, bbox_inches="tight")
    write_atomic(path, image.getvalue())


def _styles(reports: Mapping[str, ShotReport]) -> dict[str, dict[str, Any]]:
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


def _draw_frequency(
    figure: Any,  # noqa: ANN401
    reports: Mapping[str, ShotReport],
    class_counts: Tensor,
) -> None:
    axes = figure.subplots()
    order = torch.argsort(class_counts, descending=True, stable=True)
    width = max(len(order) // 10, 1)
    styles = _styles(reports)
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
    _mark_groups(axes, class_counts, next(iter(reports.values())).rule)
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


def _mark_groups(axes: Any, class_counts: Tensor, rule: ShotRule) -> None:  # noqa: ANN401
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


def _draw_curves(figure: Any, curves: Mapping[str, tuple[AccuracyCurve, float]]) -> None:  # noqa: ANN401
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axes, (name, (curve, tau)) in zip(panels, curves.items(), strict=True):
        edges, accuracy = curve.steps()
        right = max(2.0, 1.5 * tau)
        # The accuracy after the last step holds from there on.
        shown = edges < right
        edges = torch.cat([edges[shown], torch.tensor([right])])
        accuracy = torch.cat([accuracy[shown], accuracy[shown][-1:]])
        axes.step(edges, 100 * accuracy, where="post")
        axes.axvline(tau, linestyle="--", color="black", linewidth=1)
        axes.plot([tau], [100 * curve(tau)], marker="o", color="black", markersize=5)
        axes.set_title(
            f"{name}: {percent(curve(tau))} % at tau = {tau:.2f}\n"
            f"({percent(curve(0.0))} % at tau = 0)",
            fontsize="medium",
        )
        axes.set_xlim(0, right)
        axes.set_xlabel("tau (dashed: selected)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation accuracy, %")


def _draw_calibration(figure: Any, reports: Mapping[str, ShotReport]) -> None:  # noqa: ANN401
    axes = figure.subplots()
    ideal = {"color": "grey", "linestyle": ":", "linewidth": 1.4}
    axes.plot([0, 100], [0, 100], label="perfectly calibrated", **ideal)
    styles = _styles(reports)
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
