"""The plot of a data set: training images by class."""

from pathlib import Path

import torch

from timm_lt.report.plot_common import GROUP_COLORS, mark_groups, write_figure
from timm_lt.utils.longtail import ClassCounts, ShotRule, check_class_counts, describe_shots


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
