"""The plot of a comparison: accuracy by shot group, as in figure 1 of Kang et al."""

from pathlib import Path

from timm_lt.report.plot_common import COLORS, write_figure
from timm_lt.run.comparison.plan import Plan
from timm_lt.run.comparison.results import CellFigures, Comparison
from timm_lt.run.comparison.tables import HEADINGS

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def save_comparison_plot(path: Path, plan: Plan, comparison: Comparison) -> None:
    """Draws a panel for each shot group: columns along the axis, a marker for each row, as PNG.

    Error bars are standard deviations over seeds.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.7 * len(comparison.keys), 3.6), layout="constrained")
    panels = figure.subplots(1, len(comparison.keys), squeeze=False)[0]
    columns = [column.label for column in plan.grid.columns]
    rows = list(dict.fromkeys(cell.row for cell in plan.cells))
    for axes, key in zip(panels, comparison.keys, strict=True):
        for number, row in enumerate(rows):
            shown = [c for c in comparison.cells if c.cell.row == row]
            # Beside each other, where the markers of one column would hide each other.
            shift = 0.5 * ((number + 0.5) / len(rows) - 0.5)
            _draw_row(axes, shown, key, number, shift, columns)
        axes.set_title(HEADINGS[key], fontsize="medium")
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize="small")
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.tick_params(axis="y", labelsize="small")
        axes.grid(axis="y", alpha=0.3)
        for place in range(1, len(columns)):
            axes.axvline(place - 0.5, color="black", alpha=0.1, linewidth=0.8)
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        title=plan.grid.rows_title,
        loc="outside upper center",
        ncols=len(rows),
        fontsize="small",
        title_fontsize="small",
    )
    write_figure(path, figure)


def _draw_row(
    axes: object, cells: list[CellFigures], key: str, number: int, shift: float, columns: list[str]
) -> None:
    spreads = [(columns.index(str(c.cell.column)), c.spreads[key]) for c in cells]
    known = [(place + shift, spread) for place, spread in spreads if spread.mean is not None]
    axes.errorbar(  # type: ignore[attr-defined]
        [place for place, _ in known],
        [100 * (spread.mean or 0.0) for _, spread in known],
        yerr=[100 * (spread.sd or 0.0) for _, spread in known],
        label=cells[0].cell.row,
        color=COLORS[number % len(COLORS)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=6,
        linestyle="none",
        linewidth=1.2,
        capsize=2,
    )
