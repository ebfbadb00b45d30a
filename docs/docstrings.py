"""Docstrings for mkdocstrings: roles become links, doctests code, and closed sets their values."""

import contextlib
import re
from typing import Any

import griffe

Annotation = str | griffe.Expr | None

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(~?)([\w.]+)`")
# reStructuredText's mark of a following code block.
LITERAL = re.compile(r"::\n\n(?= {4})")
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites docstrings and annotations."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites one object."""
        if obj.docstring is not None:
            text = ROLE.sub(lambda found: link(obj, *found.groups()), obj.docstring.value)
            text = LITERAL.sub(":\n\n", text)
            obj.docstring.value = DOCTEST.sub("```pycon\n\\g<0>\n```", text)
        if isinstance(obj, griffe.Function):
            for parameter in obj.parameters:
                parameter.annotation = spelled_out(obj, parameter.annotation)


def link(obj: griffe.Object, short: str, name: str) -> str:
    """Returns a link to an object of the site, and its name."""
    try:
        path = obj.resolve(name)
    except griffe.NameResolutionError:
        path = name
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'


def spelled_out(obj: griffe.Object, annotation: Annotation) -> Annotation:
    """Returns an annotation with the values of a named ``Literal`` in place of its name."""
    if isinstance(annotation, griffe.ExprBinOp):
        annotation.left = spelled_out(obj, annotation.left)
        annotation.right = spelled_out(obj, annotation.right)
    elif isinstance(annotation, griffe.ExprName):
        # Names of builtins and of other packages are unknown.
        with contextlib.suppress(KeyError, griffe.GriffeError):
            found = obj.modules_collection.get_member(annotation.canonical_path.split("."))
            value = getattr(found, "value", None)
            if str(value).startswith("Literal["):
                return value
    return annotation
