"""Plots of what a head changes: classes that gain and lose, what is taken for what; of training."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from timm_lt.metrics import ShotReport
from timm_lt.report.plot_common import GROUP_COLORS, mark_groups
from timm_lt.report.tables import GROUPS, group_word
from timm_lt.training.history import EpochRecord

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
