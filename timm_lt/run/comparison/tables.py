"""The tables of a comparison, in the paper's layout: on the terminal, and in Markdown."""

from collections.abc import Mapping
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from timm_lt.report.tables import GROUPS, group_word, new_table, shot_legend
from timm_lt.run.comparison.grid import Cell, Metric
from timm_lt.run.comparison.plan import Plan
from timm_lt.run.comparison.results import CLASS_MEAN, CellFigures, Comparison, Spread

HEADINGS = {
    **{group: group_word(group) for group in GROUPS},
    "all": "all",
    CLASS_MEAN: "class mean",
}


class Content(NamedTuple):
    """A table as texts.

    Attributes:
        title: Line above it.
        headings: Of the columns; the first is of the labels.
        rows: The texts, as wide as the headings.
        legend: Lines below it.
    """

    title: str
    headings: list[str]
    rows: list[list[str]]
    legend: list[str]


def spread_text(spread: Spread, *, signed: bool = False, metric: Metric = "accuracy") -> str:
    """Returns a mean and its standard deviation, fractions, in percent.

    >>> spread_text(Spread(0.5, 0.0123)), spread_text(Spread(0.5, None), metric="error")
    ('50.0 ± 1.2', '50.0')
    >>> spread_text(Spread(-0.02, 0.01), signed=True), spread_text(Spread(None, None))
    ('-2.0 ± 1.0', '-')
    """
    if spread.mean is None:
        return "-"
    mean = 1 - spread.mean if metric == "error" else spread.mean
    text = f"{100 * mean:+.1f}" if signed else f"{100 * mean:.1f}"
    return text if spread.sd is None else f"{text} ± {100 * spread.sd:.1f}"


def content(plan: Plan, comparison: Comparison) -> Content:
    """Returns the table: by shot group, or for a grid with columns that alone in its cells.

    With a plot, columns are shown by shot group, a row for each of their cells.
    """
    grid = plan.grid
    title = f"{grid.title}, test {grid.metric if _is_matrix(plan) else 'accuracy'} in percent"
    if _is_matrix(plan):
        headings = [f"{grid.rows_title} \\ {grid.columns_title}".rstrip(" \\")]
        headings += [column.label for column in grid.columns]
        by_row: dict[str, list[str]] = {}
        for figures in comparison.cells:
            text = spread_text(figures.spreads["all"], metric=grid.metric)
            by_row.setdefault(figures.cell.row, []).append(text)
        rows = [[row, *texts] for row, texts in by_row.items()]
        return Content(title, headings, rows, legend(plan, comparison))
    quoted = any(figures.cell.quoted for figures in comparison.cells)
    headings = [grid.rows_title, *([grid.columns_title or "head"] if grid.columns else [])]
    headings += [HEADINGS[key] for key in comparison.keys]
    headings += ["all, to the first row"] if len(comparison.cells) > 1 else []
    headings += ["quoted"] if quoted else []
    rows = [
        [
            *_labels(figures, plan.seeds),
            *(spread_text(figures.spreads[key]) for key in comparison.keys),
            *([_difference(figures)] if len(comparison.cells) > 1 else []),
            *([quoted_text(figures.cell.quoted)] if quoted else []),
        ]
        for figures in comparison.cells
    ]
    return Content(title, headings, rows, legend(plan, comparison))


def _is_matrix(plan: Plan) -> bool:
    return bool(plan.grid.columns) and not plan.grid.plot


def _labels(figures: CellFigures, seeds: list[int]) -> list[str]:
    cell: Cell = figures.cell
    labels = [cell.row] if cell.column is None else [cell.row, cell.column]
    if len(figures.per_seed) < len(seeds):
        labels[-1] += f" ({len(figures.per_seed)} of {len(seeds)} seeds)"
    return labels


def _difference(figures: CellFigures) -> str:
    spread = figures.difference_spreads.get("all")
    return "" if spread is None else spread_text(spread, signed=True)


def quoted_text(quoted: Mapping[str, float]) -> str:
    """Returns quoted accuracies, many / medium / few / all or all alone.

    >>> quoted_text({"all": 0.444}), quoted_text({})
    ('44.4', '')
    """
    return " / ".join(f"{100 * quoted[key]:.1f}" for key in (*GROUPS, "all") if key in quoted)


def legend(plan: Plan, comparison: Comparison) -> list[str]:
    """Returns the lines below the table: what its figures are."""
    several = len(plan.seeds) > 1
    seeds = f"seed{'s' if several else ''} {', '.join(map(str, plan.seeds))}"
    lines = [f"{seeds}{': mean ± standard deviation over them' if several else ''}"]
    if several and not _is_matrix(plan) and len(comparison.cells) > 1:
        lines[0] += "; differences are paired by seed"
    if comparison.shots and not _is_matrix(plan):
        lines.append(shot_legend(comparison.shots))
    if any(figures.cell.quoted for figures in comparison.cells):
        lines.append(f"quoted, not measured here: {plan.grid.quoted_from or plan.grid.source}")
    return [*lines, *([comparison.note] if comparison.note else [])]


def rich_table(plan: Plan, comparison: Comparison) -> Table:
    """Returns the table for the terminal."""
    shown = content(plan, comparison)
    table = new_table(shown.title, escape("\n".join(shown.legend)))
    labels = 2 if plan.grid.columns and plan.grid.plot else 1
    for number, heading in enumerate(shown.headings):
        justify = "left" if number < labels or heading == "quoted" else "right"
        style = "bold" if heading == "all" else ""
        table.add_column(escape(heading), justify=justify, style=style, no_wrap=number >= labels)  # type: ignore[arg-type]
    for row in shown.rows:
        table.add_row(*map(escape, row))
    return table


def markdown_table(plan: Plan, comparison: Comparison) -> str:
    """Returns the table in Markdown, to be pasted into a document."""
    shown = content(plan, comparison)
    left = 2 if plan.grid.columns and plan.grid.plot else 1
    rules = ["---" if n < left else "---:" for n in range(len(shown.headings))]
    lines = [_markdown_row(row) for row in (shown.headings, rules, *shown.rows)]
    return "\n".join([f"{shown.title}.", "", *lines, "", f"{'; '.join(shown.legend)}.", ""])


def _markdown_row(texts: list[str]) -> str:
    cells = [text.replace("\\", "\\\\").replace("|", "\\|") for text in texts]
    return f"| {' | '.join(cells)} |"
