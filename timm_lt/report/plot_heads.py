"""Plots of heads: accuracy by class frequency, accuracy against tau, calibration."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timm_lt.fitting import AccuracyCurve
from timm_lt.metrics import Objective, ShotReport
from timm_lt.report.plot_common import head_styles, mark_groups
from timm_lt.report.tables import OBJECTIVE_WORDS, percent

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
