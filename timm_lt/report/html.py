"""The HTML report: one page that needs no other file."""

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from timm_lt.metrics import confidence_intervals, paired_difference
from timm_lt.report.plots import (
    PALETTE,
    draw_calibration,
    draw_curves,
    draw_frequency,
    draw_training,
    figure_svg,
    head_styles,
    page_colors,
)
from timm_lt.report.record import Report, compare, confused_groups, frequent_mistakes, min_images
from timm_lt.report.tables import GROUPS, describe_selection, group_word, percent
from timm_lt.utils.console import one_line
from timm_lt.utils.files import write_atomic
from timm_lt.utils.longtail import describe_shots

FOLDER = Path(__file__).parent
# Classes in the table, the rarest ones; per_class.csv has all of them.
MAX_CLASSES = 10_000
# Rows on a page of the table of classes. Without a script there is only the first page.
PAGE = 100
CHARTS = {
    "frequency": draw_frequency,
    "tau": draw_curves,
    "calibration": draw_calibration,
    "training": draw_training,
}
# Each chart is drawn in two widths in inches, so that its text is legible on a phone, too.
WIDTHS = {"wide": 10.4, "narrow": 3.6}


def render_report(report: Report) -> str:
    """Renders a report as one HTML page with its styles, scripts, charts and pictures in it.

    All text is escaped, and the page's own policy allows neither requests nor other scripts. Its
    size is bounded: the table has the 10,000 rarest classes, and pictures have at most 3 kB each.
    """
    style, script = (
        (FOLDER / name).read_text(encoding="utf-8") for name in ("style.css", "script.js")
    )
    heads, counts, joint = report.reports, report.class_counts, report.base
    compared, truth = report.compared, (report.targets, counts)
    shown = report.recommended if report.recommended in compared else next(iter(compared), None)
    columns = {group: group_word(group) for group in GROUPS} | {"all": "all"}
    if any(abs(shot.all - shot.class_mean) > 1e-9 for shot in heads.values()):
        columns["class_mean"] = "class mean"
    page: str = (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            title=one_line(report.title, 200),
            shots=describe_shots(counts, report.rule),
            groups=GROUPS,
            group_of=[GROUPS[k] for k in report.group_of.tolist()],
            counts=counts.tolist(),
            columns=columns,
            # The largest value of each figure as it is displayed.
            best={
                key: percent(max(getattr(shot, key) or 0.0 for shot in heads.values()))
                for key in columns
            },
            intervals={n: confidence_intervals(shot, counts) for n, shot in heads.items()},
            gains={
                n: paired_difference(report.preds(n), report.preds(joint), *truth, rule=report.rule)
                for n in compared
                if joint
            },
            selected={n: describe_selection(report.selections.get(n, {})) for n in heads},
            swatches={name: _swatch(style) for name, style in head_styles(report).items()},
            shown=shown,
            min_images=min_images(report),
            comparisons={name: compare(report, name) for name in compared if joint},
            confusions={
                name: (confused_groups(report, name), frequent_mistakes(report, name))
                for name in dict.fromkeys([*filter(None, [joint]), *compared])
            },
            charts={name: _charts(report, name) for name in CHARTS},
            table=_table(report, shown if joint else None),
            page=PAGE,
            style=Markup(_palette() + style),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    return page.lstrip()


def write_report(path: str | Path, report: Report) -> None:
    """Writes a report atomically as one HTML file; see :func:`render_report`."""
    write_atomic(Path(path), render_report(report))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # More compact than the default, and in the order of the columns.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.filters |= {
        "percent": percent,
        "points": _points,
        "group_word": group_word,
        # A name may be broken after an underscore.
        "breakable": lambda name: Markup("_<wbr>").join(name.split("_")),
        "number": "{:,}".format,
    }
    return environment


def _points(difference: float | None) -> str:
    """Returns a difference of fractions in percentage points, with its sign.

    >>> _points(0.123), _points(-0.02), _points(0.0001)
    ('+12.3', '−2.0', '0.0')
    """
    text = "-" if difference is None else f"{100 * difference:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def _palette() -> str:
    """Returns the colours of the charts as variables of the style sheet."""
    light, dark = (
        ";".join(f"--{name}:{colors[k]}" for name, colors in PALETTE.items()) for k in (0, 1)
    )
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"


def _charts(report: Report, name: str) -> dict[str, Markup]:
    """Returns a chart as SVG by width, empty if the report has no figures for it."""
    figures = {size: CHARTS[name](report, width) for size, width in WIDTHS.items()}
    return {
        size: Markup(figure_svg(figure, f"{name} {size}"))
        for size, figure in figures.items()
        if figure is not None
    }


def _swatch(style: Mapping[str, Any]) -> str:
    """Returns the style of a head's line beside its name."""
    dashes = "" if style["linestyle"] == "-" else style["linestyle"][1]
    pattern = " ".join(f"{style['linewidth'] * length:g}" for length in dashes)
    line = f"stroke: {style['color']}; stroke-width: {style['linewidth']}"
    return page_colors(f"{line}; stroke-dasharray: {pattern or 'none'}")


def _table(report: Report, compared: str | None) -> dict[str, Any]:
    """Returns the table of classes for the template and the script.

    Its last column is the gain of the compared head over the joint classifier.
    """
    classes = report.by_frequency[-MAX_CLASSES:]
    columns = {
        "class": [report.names[c] for c in classes.tolist()],
        "training images": report.class_counts[classes].tolist(),
        "shots": [GROUPS[k] for k in report.group_of[classes].tolist()],
        "test images": report.images_per_class[classes].tolist(),
    }
    figures = [shot.per_class[classes] for shot in report.reports.values()]
    if compared is not None:
        gain = report.reports[compared].per_class - report.reports[report.joint].per_class
        figures.append(gain[classes])
    cells = [[None if a != a else round(a, 4) for a in column.tolist()] for column in figures]
    return {
        "columns": [*columns, *report.reports],
        "change": compared,
        "rows": list(map(list, zip(*columns.values(), *cells, strict=True))),
        "heads": len(report.reports),
    }
