"""Markdown that text of unknown origin cannot get out of."""

import re
from collections.abc import Mapping, Sequence

from timm_lt.utils.console import one_line

# An underscore at the edge of a word could be emphasis.
SIMPLE = re.compile(r"(?:(?!\b_|_\b)[\w .,+=%/-])*")
# A generated part of a card, with the comments around it; parts do not nest.
PART = re.compile(
    r"^<!-- timm_lt:(\w+) -->[ \t]*\n(?:(?!<!-- /?timm_lt:).*\n)*?<!-- /timm_lt:\1 -->[ \t]*$",
    re.MULTILINE,
)


def plain(value: str) -> str:
    """Returns text that is nothing but text, also in a cell of a table and in HTML.

    >>> plain("tau 1.05"), plain("a|b")
    ('tau 1.05', 'a&#124;b')
    """
    line = one_line(value)
    if SIMPLE.fullmatch(line):
        return line
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in line)


def code(value: str) -> str:
    """Returns text as code within a line.

    >>> code("tau_norm"), code("a`b")
    ('`tau_norm`', '<code>a&#96;b</code>')
    """
    line = one_line(value)
    return f"`{line}`" if line and SIMPLE.fullmatch(line) else f"<code>{plain(line)}</code>"


def fenced(text: str, language: str) -> str:
    """Returns a block of code that its text cannot end, and in which no part of a card ends."""
    text = re.sub(r"\r\n?", "\n", text).strip("\n")
    text = re.sub(r"^(<!-- /?)timm_lt:", r"\1timm_lt :", text, flags=re.MULTILINE)
    fence = "`" * max([2, *map(len, re.findall("`+", text))]) + "`"
    return f"{fence}{language}\n{text}\n{fence}"


def table(columns: Mapping[str, list[str]], right: Sequence[str]) -> str:
    """Returns a table.

    Args:
        columns: Cells by heading, in Markdown without line breaks and bars.
        right: Headings of the columns that are aligned on the right.
    """
    rules = ["---:" if heading in right else "---" for heading in columns]
    rows = [list(columns), rules, *map(list, zip(*columns.values(), strict=True))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def part(name: str, content: str) -> str:
    """Returns a generated part of a card."""
    return f"<!-- timm_lt:{name} -->\n{content}\n<!-- /timm_lt:{name} -->"
