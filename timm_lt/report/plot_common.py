"""What the plots share: looks of heads and shot groups, and how a figure is written."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from timm_lt.metrics import ShotReport
from timm_lt.report.tables import group_word
from timm_lt.utils.files import write_atomic
from timm_lt.utils.longtail import ShotRule, describe_shots

# Pixels per inch.
DPI = 120
# Of the classes of many, medium and few images.
GROUP_COLORS = ("C2", "C1", "C3")
# Colours that are told apart on white, and from the grey of the training images.
COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")


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
