"""Which columns of somebody's table hold the images and the labels."""

from typing import TYPE_CHECKING

from timm_lt.utils.checks import UsageError, unknown_name

if TYPE_CHECKING:
    from datasets import Features

# Of labels that are no ClassLabel, compared without case.
LABEL_NAMES = (
    *("label", "labels", "target", "targets", "class", "classes", "class_name", "class_label"),
    *("category", "fine_label", "label_name", "species", "y"),
)


def find_image_column(features: "Features", column: str | None = None) -> str:
    """Finds the column of images: the one that is of ``Image``, else of encoded bytes.

    Encoded bytes are a ``struct`` of ``bytes`` and ``path``, or plain binary.

    Args:
        features: The columns with their types.
        column: The column, if the user named it.

    Raises:
        UsageError: If there is none, or several could be meant; lists the columns.
    """
    from datasets import Image

    tests = (lambda kind: isinstance(kind, Image), _is_encoded, _is_binary)
    if column is not None:
        _check_exists("image", column, features)
        if not any(test(features[column]) for test in tests):
            raise UsageError(
                f"column {column!r} holds {described(features[column])}, no images: an image is "
                f"an Image, a struct of bytes and path, or binary; the columns are "
                f"{listed(features)}"
            )
        return column
    for test in tests:
        if found := [name for name, kind in features.items() if test(kind)]:
            return _only("image", found)
    raise UsageError(
        f"no column of images (Image, a struct of bytes and path, or binary), only "
        f"{listed(features)}"
    )


def find_label_column(features: "Features", column: str | None = None) -> str:
    """Finds the column of labels: the ``ClassLabel``, else one of a usual name.

    Of several, the one that is called ``label`` is meant.

    Args:
        features: The columns with their types.
        column: The column, if the user named it.

    Raises:
        UsageError: If there is none, or several could be meant, or it holds no labels; lists the
            columns.
    """
    from datasets import ClassLabel

    if column is None:
        found = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
        found = found or [
            name
            for name, kind in features.items()
            if name.casefold() in LABEL_NAMES and label_kind(kind)
        ]
        if not found:
            raise UsageError(
                f"no column of labels (a ClassLabel, or integers or texts under a usual name like "
                f"label, target or class), only {listed(features)}: say which with label="
            )
        return "label" if "label" in found else _only("label", found)
    _check_exists("label", column, features)
    if label_kind(features[column]) is None:
        raise UsageError(
            f"column {column!r} holds {described(features[column])}, no labels: a label is one "
            f"ClassLabel, integer or text per image; the columns are {listed(features)}"
        )
    return column


def label_kind(feature: object) -> str | None:
    """Returns what kind of labels a column has: names, integers or texts; None for no labels."""
    from datasets import ClassLabel

    if isinstance(feature, ClassLabel):
        return "names"
    kind = _dtype(feature) or ""
    if "int" in kind:
        return "integers"
    return "texts" if kind in ("string", "large_string", "string_view") else None


def listed(features: "Features") -> str:
    """Returns the columns with their types, for messages."""
    return ", ".join(f"{name} ({described(kind)})" for name, kind in features.items())


def described(feature: object) -> str:
    """Returns the type of a column in a word, for messages."""
    return _dtype(feature) or type(feature).__name__


def _dtype(feature: object) -> str | None:
    from datasets import Value

    return str(feature.dtype) if isinstance(feature, Value) else None


def _is_encoded(feature: object) -> bool:
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def _is_binary(feature: object) -> bool:
    return _dtype(feature) in ("binary", "large_binary")


def _check_exists(option: str, column: str, features: "Features") -> None:
    if column not in features:
        raise unknown_name(f"column for {option}=:", column, list(features))


def _only(option: str, found: list[str]) -> str:
    if len(found) > 1:
        raise UsageError(
            f"several columns could be the {option}: {', '.join(found)}; say which with {option}="
        )
    return found[0]
