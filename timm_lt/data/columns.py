"""A ``datasets.Dataset`` of images as timm's loader wants one: pairs, and a transform to be set.

Which columns of somebody's table hold the images and the labels.

Labels of somebody's tables, of any kind, as integers with one list of names for all splits.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch.utils.data
from numpy.typing import NDArray
from PIL import Image

from timm_lt.data.decode import decode_column, read_image
from timm_lt.data.fingerprint import described, digest, images_fingerprint
from timm_lt.utils.checks import (
    WHITE,
    Problems,
    UsageError,
    check_background,
    shown_names,
    unknown_name,
)

if TYPE_CHECKING:
    from datasets import Dataset, Features


@dataclass
class RGBImage(datasets.Image):  # type: ignore[misc]
    """A column of images that timm_lt decodes to RGB.

    Attributes:
        background: Colour behind transparent pixels, ``#rrggbb``.
    """

    background: str = WHITE

    def decode_example(
        self,
        value: dict[str, Any],
        token_per_repo_id: dict[str, str | bool | None] | None = None,
    ) -> Image.Image:
        """Decodes an image as a run does."""
        return decode_column(value, self)


def as_rgb(
    dataset: datasets.Dataset, *, column: str = "image", background: object = None
) -> datasets.Dataset:
    """Returns a data set whose images timm_lt decodes, wherever they are decoded.

    One with a transform of its own stays as it is, unless a background is given.

    Args:
        dataset: The data set.
        column: Its column of images.
        background: See :func:`~timm_lt.utils.checks.check_background`; None keeps the column's own,
            or takes white.

    Raises:
        UsageError: If the background is not a colour.
    """
    found = dataset.features.get(column)
    keeps = background is None
    if not isinstance(found, datasets.Image) or (keeps and dataset.format["type"] == "custom"):
        return dataset
    color = getattr(found, "background", WHITE) if keeps else check_background(background)
    wanted = RGBImage(mode=found.mode, background=color)
    return dataset if found == wanted else dataset.cast_column(column, wanted)


class ImageRows(torch.utils.data.Dataset[tuple[Any, int]]):
    """The rows of a ``datasets.Dataset`` as pairs of a transformed image and its label.

    Args:
        rows: With a column of images and one of labels.
        background: Colour behind transparent pixels; None is that of the column, or white.

    Attributes:
        transform: Applied to each image, RGB; None leaves it a PIL image.

    Raises:
        UsageError: If there is no such column; lists those that there are.
    """

    def __init__(self, rows: datasets.Dataset, *, background: object = None) -> None:
        self.transform: Callable[[Image.Image], Any] | None = None
        self._image, self._label = image_column(rows), label_column(rows)
        self.rows = as_rgb(rows, column=self._image, background=background)
        self._column = self.rows.features[self._image]
        self._stored = self.rows
        if self.rows.format["type"] != "custom":
            stored = self.rows.with_format(None).select_columns([self._image, self._label])
            self._stored = stored.cast_column(self._image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self._stored[index]
        image = read_image(row[self._image], index, self._column)
        return (self.transform(image) if self.transform else image), row[self._label]

    def fingerprint(self) -> str:
        """Returns a digest of the images in their order, the labels and the transform."""
        images = self.rows.select_columns(self._image)
        if self._image != "image":
            images = images.rename_column(self._image, "image")
        labels = [int(label) for label in self.rows.with_format("numpy")[self._label][:]]
        return digest(images_fingerprint(images), labels, described(self.transform))


def check_random_access(dataset: object) -> None:
    """Checks that a data set is no stream, nor a set of several splits.

    Raises:
        UsageError: If it is one; says why, and what to pass.
    """
    if isinstance(dataset, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise UsageError(
            f"{type(dataset).__name__} is a stream: it has no length, no class counts and no "
            "random access, which samplers and heads need; load the data set without streaming=True"
        )
    if isinstance(dataset, datasets.DatasetDict):
        raise UsageError(
            f"a DatasetDict is several data sets: pass one of its splits, {', '.join(dataset)}"
        )


def image_column(rows: datasets.Dataset) -> str:
    """Returns the name of the first column of images.

    Raises:
        UsageError: If there is none; lists the columns that there are.
    """
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            return str(name)
    raise UsageError(f"the data set has no column of images, only {', '.join(rows.column_names)}")


def label_column(rows: datasets.Dataset, column: str | None = None) -> str:
    """Returns the name of the column of labels: ``"label"``, else ``"labels"``, or the one given.

    Raises:
        UsageError: If there is no such column; lists those that there are.
    """
    if not isinstance(rows, datasets.Dataset):
        raise UsageError(f"a {type(rows).__name__} is no datasets.Dataset, which has columns")
    names = ["label", "labels"] if column is None else [column]
    for name in names:
        if name in rows.column_names:
            return name
    raise UsageError(
        f"the data set has no column {' or '.join(map(repr, names))}, only "
        f"{', '.join(rows.column_names)}" + ("; name one with column=" if column is None else "")
    )


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
                f"column {column!r} holds {column_type(features[column])}, no images: an image is "
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
            f"column {column!r} holds {column_type(features[column])}, no labels: a label is one "
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
    return ", ".join(f"{name} ({column_type(kind)})" for name, kind in features.items())


def column_type(feature: object) -> str:
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


UNLABELLED = -1


def read_labels(
    tables: "Mapping[str, Dataset]", column: str
) -> tuple[dict[str, NDArray[np.int64]], list[str] | None]:
    """Reads the labels of all splits.

    A ``ClassLabel`` has its names; of a split that lists them in another order the labels are
    renumbered. Integers have none. Texts are the names, sorted over all splits.

    Args:
        tables: The splits by the names that messages have for them, that for training first.
        column: The column of labels.

    Returns:
        The labels by split, (N,) int64, -1 where an image has none; and the class names, (C,).

    Raises:
        UsageError: If a class has no image in any split though a later one has, two names differ in
            case only, or the splits have different kinds of labels or other classes than the first.
    """
    kinds = {split: label_kind(table.features[column]) for split, table in tables.items()}
    first, kind = next(iter(kinds.items()))
    for split, other in kinds.items():
        if other != kind:
            shown = [column_type(tables[name].features[column]) for name in (split, first)]
            raise UsageError(
                f"column {column!r} is {shown[0]} in split {split!r} but {shown[1]} in {first!r}"
            )
    if kind == "names":
        return _named(tables, column)
    values = {split: _column(table, column) for split, table in tables.items()}
    if kind == "texts":
        return _texts(values, column)
    labels = {split: _integers(array, column) for split, array in values.items()}
    _check_gaps(labels, column)
    return labels, None


def _column(table: "Dataset", column: str) -> pa.ChunkedArray:
    rows = cast(pa.Table, table.select_columns(column).with_format("arrow")[:])
    return rows.column(0)


def _integers(values: pa.ChunkedArray, column: str) -> NDArray[np.int64]:
    try:
        filled = values.cast(pa.int64()).fill_null(UNLABELLED)
    except pa.ArrowInvalid as error:
        raise UsageError(
            f"labels of column {column!r} must be 0 to C - 1, got {pc.max(values).as_py()}"
        ) from error
    numbers: NDArray[np.int64] = filled.to_numpy()
    return numbers


def _named(
    tables: "Mapping[str, Dataset]", column: str
) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    names: list[str] = list(next(iter(tables.values())).features[column].names)
    problems = Problems()
    labels = {}
    for split, table in tables.items():
        numbers = _integers(_column(table, column), column)
        own = list(table.features[column].names)
        if unknown := sorted(set(own) - set(names)):
            problems.add(
                f"{len(unknown)} classes of split {split!r} are not among those of "
                f"{next(iter(tables))!r}: {shown_names(unknown)}"
            )
            continue
        wrong = np.unique(numbers[(numbers < UNLABELLED) | (numbers >= len(own))])
        if len(wrong):
            problems.add(
                f"labels of split {split!r} must be 0 to {len(own) - 1}, as column {column!r} has "
                f"{len(own)} classes: got {shown_names(wrong.tolist())}"
            )
        elif own != names:
            # The last place is that of -1.
            place = np.array([*map(names.index, own), UNLABELLED])
            numbers = place[numbers]
        labels[split] = numbers
    problems.check()
    return labels, names


def _texts(
    values: dict[str, pa.ChunkedArray], column: str
) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    values = {split: _without_empty(array) for split, array in values.items()}
    distinct: set[str] = set()
    for array in values.values():
        distinct.update(pc.unique(array).drop_null().to_pylist())
    names = sorted(distinct)
    same = defaultdict(list)
    for name in names:
        same[name.strip().casefold()].append(repr(name))
    alike = [" and ".join(group) for group in same.values() if len(group) > 1]
    if alike:
        raise UsageError(
            f"{len(alike)} classes of column {column!r} are written in several ways: "
            f"{shown_names(alike)}; write each in one way, or make the column a ClassLabel if they "
            "are different classes"
        )
    known = pa.array(names, pa.string())
    encoded: dict[str, Any] = {
        split: pc.index_in(array, value_set=known) for split, array in values.items()
    }
    return {split: _integers(array, column) for split, array in encoded.items()}, names


def _without_empty(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns texts with nulls in place of those that are empty, or blank."""
    texts = texts.cast(pa.string())
    blank = pc.equal(pc.utf8_trim_whitespace(texts), "")
    return cast(pa.ChunkedArray, pc.if_else(blank, pa.scalar(None, pa.string()), texts))


def _check_gaps(labels: dict[str, NDArray[np.int64]], column: str) -> None:
    used = np.unique(np.concatenate(list(labels.values())))
    if len(used) and used[0] < UNLABELLED:
        raise UsageError(f"column {column!r} has negative labels: {int(used[0])}")
    used = used[used >= 0]
    if len(used) == 0 or int(used[-1]) + 1 == len(used):
        return
    top = int(used[-1])
    # Of up to top labels, the first that are missing lie within the first len(used) + 5.
    missing = np.setdiff1d(np.arange(min(top, len(used) + 5)), used)
    shown = shown_names([*missing.tolist()[:5], *(["..."] if top + 1 - len(used) > 5 else [])], 6)
    raise UsageError(
        f"labels of column {column!r} must be 0 to C - 1 without a gap: the largest is {top}, and "
        f"{top + 1 - len(used)} below it occur in no split: {shown}; renumber them, or make them "
        "texts or a ClassLabel"
    )
