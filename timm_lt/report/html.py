"""Rendering a report: plain values to one HTML file that needs nothing beside it."""

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from timm_lt.report.charts import head_looks
from timm_lt.report.content import ReportContent
from timm_lt.report.draw import (
    calibration_charts,
    frequency_chart,
    tau_chart,
    tau_sentence,
    training_charts,
)
from timm_lt.report.tables import GROUPS, group_word, percent
from timm_lt.utils.files import write_atomic

FOLDER = Path(__file__).parent
# Rows of the table that are there before a script runs, and that a page of it has.
PAGE = 100
# Stands where there is no figure.
NONE = "\N{EN DASH}"


def render_report(content: ReportContent) -> str:
    """Renders a report as one HTML page with its styles, scripts, charts and pictures in it.

    Every text is escaped, and the page's own policy allows no request and no other script.

    Args:
        content: What it says.
    """
    heads = {head.name: head for head in content.heads}
    style, script = (
        (FOLDER / name).read_text(encoding="utf-8") for name in ("style.css", "script.js")
    )
    page: str = (
        _environment()
        .get_template("report.html")
        .render(
            content=content,
            groups=GROUPS,
            columns=_columns(content),
            tiles=_tiles(content),
            best=_best(content),
            joint=heads.get(content.joint or ""),
            recommended=heads.get(content.recommended or ""),
            shown=_shown(content),
            min_images=_min_images(content.min_images),
            looks=head_looks(list(heads), content.joint),
            frequency=frequency_chart(content),
            curves=[(c, tau_sentence(c), tau_chart(c)) for c in content.curves],
            calibration=calibration_charts(content),
            training=training_charts(content),
            table=_table(content),
            page=PAGE,
            style=style,
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    return page.lstrip()


def write_report(path: str | Path, content: ReportContent) -> None:
    """Writes a report, whole or not at all.

    Args:
        path: The file.
        content: What it says.
    """
    write_atomic(Path(path), render_report(content))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Smaller than its default, and in the order of the columns.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.filters |= {
        "percent": _percent,
        "points": _points,
        "group_word": group_word,
        "breakable": _breakable,
    }
    return environment


def _percent(fraction: float | None) -> str:
    return NONE if fraction is None else percent(fraction)


def _breakable(name: str) -> Markup:
    """Returns a name, escaped, that may go on in another line after an underscore."""
    return Markup("_<wbr>").join(name.split("_"))


def _points(difference: float | None) -> str:
    """Returns a difference of fractions in points of percent, with its sign.

    >>> _points(0.123), _points(-0.02), _points(0.0001)
    ('+12.3', '−2.0', '0.0')
    """
    if difference is None:
        return NONE
    text = f"{100 * abs(difference):.1f}"
    sign = "" if text == "0.0" else "+" if difference > 0 else "−"
    return f"{sign}{text}"


def _columns(content: ReportContent) -> Mapping[str, str]:
    """Returns the figures of the table of heads, with their headings."""
    columns = {group: group_word(group) for group in GROUPS} | {"all": "all"}
    figures = [head.figures for head in content.heads]
    if any(abs((f["all"].value or 0) - (f["class_mean"].value or 0)) > 1e-9 for f in figures):
        columns["class_mean"] = "class mean"
    return columns


def _tiles(content: ReportContent) -> Mapping[str, str]:
    """Returns the figures of the summary, with their labels."""
    tiles = {"all": "all images"}
    if "class_mean" in _columns(content):
        # What a head wins, where the test split has as long a tail as train.
        tiles["class_mean"] = "mean over classes"
    return tiles | {group: f"{group_word(group)}-shot classes" for group in GROUPS}


def _best(content: ReportContent) -> Mapping[str, str]:
    """Returns by figure the largest value as it is shown."""

    def values(key: str) -> list[float]:
        return [h.figures[key].value or 0.0 for h in content.heads]

    return {key: percent(max(values(key))) for key in content.heads[0].figures}


def _min_images(by_group: Mapping[str, int]) -> str:
    """Returns how many test images the classes have that are shown; empty if one is enough.

    >>> _min_images({"many_shot": 5, "few_shot": 3}), _min_images({"few_shot": 5})
    ('5 (many) or 3 (few)', '5')
    """
    numbers = set(by_group.values())
    if len(numbers) < 2:
        return "".join(str(number) for number in numbers if number > 1)
    *parts, last = [f"{number} ({group_word(group)})" for group, number in by_group.items()]
    return f"{', '.join(parts)} or {last}"


def _shown(content: ReportContent) -> str | None:
    """Returns the head that is compared with the joint classifier before another is chosen."""
    if content.recommended in content.comparisons:
        return content.recommended
    return next((name for name in content.confusions if name != content.joint), None)


def _table(content: ReportContent) -> dict[str, Any]:
    """Returns the table of classes as the script takes it."""
    table = content.classes
    rows = [list(row) for row in table.rows]
    columns = ["class", "training images", "shots", "test images", *table.heads]
    change = None
    if content.joint is not None and _shown(content) is not None:
        pair = [4 + list(table.heads).index(n) for n in (_shown(content) or "", content.joint)]
        change = _shown(content)
        for row in rows:
            after, before = (row[k] for k in pair)
            row.append(None if after is None else round(after - before, 4))
    return {"columns": columns, "change": change, "rows": rows, "heads": len(table.heads)}
