"""Docstrings as mkdocstrings shows them: roles become links, doctests become code."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(~?)([\w.]+)`")
# reStructuredText's sign that an indented block of code follows.
LITERAL = re.compile(r"::\n\n(?= {4})")
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites the docstring of every object."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites one."""
        if obj.docstring is not None:
            text = ROLE.sub(lambda found: link(obj, *found.groups()), obj.docstring.value)
            text = LITERAL.sub(":\n\n", text)
            obj.docstring.value = DOCTEST.sub("```pycon\n\\g<0>\n```", text)


def link(obj: griffe.Object, short: str, name: str) -> str:
    """Returns a link to an object, if it has a place in the site, and its name."""
    try:
        path = obj.resolve(name)
    except griffe.NameResolutionError:
        path = name
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
