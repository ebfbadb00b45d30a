"""Columns of a ``datasets.Dataset``: finding images and labels, decoding, numbering labels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch.utils.data
from numpy.typing import NDArray
from PIL import Image

from timm_lt.data.decode import decode_column, read_image
from timm_lt.data.fingerprint import described, digest, images_fingerprint
from timm_lt.utils.checks import WHITE, UsageError, check_background, shown_names


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
    """Returns a data set whose images are always decoded by timm_lt, on a background.

    None keeps the background of the column, or takes white; then a data set with a transform of its
    own is returned unchanged. See :func:`~timm_lt.utils.checks.check_background`.
    """
    found = dataset.features.get(column)
    keeps = background is None
    if not isinstance(found, datasets.Image) or (keeps and dataset.format["type"] == "custom"):
        return dataset
    color = getattr(found, "background", WHITE) if keeps else check_background(background)
    wanted = RGBImage(mode=found.mode, background=color)
    return dataset if found == wanted else dataset.cast_column(column, wanted)


class ImageRows(torch.utils.data.Dataset[tuple[Any, int]]):
    """Rows of a ``datasets.Dataset`` as pairs of a transformed image and its label.

    Args:
        rows: A data set with a column of images and one of labels.
        background: See :func:`as_rgb`.

    Attributes:
        transform: Applied to each RGB image; None leaves it a PIL image.
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


# Names of columns of labels, compared without case.
LABEL_NAMES = (
    *("label", "labels", "target", "targets", "class", "classes", "class_name", "class_label"),
    *("category", "fine_label", "label_name", "species", "y"),
)


def image_column(rows: datasets.Dataset, column: str | None = None) -> str:
    """Finds the column of images: of type ``Image``, else a struct of bytes and path, else binary.

    Of several columns of a type, the one called ``image`` is taken.

    Args:
        rows: The data set.
        column: Name of the column, if the user gives it.

    Raises:
        UsageError: If there is no such column, or several; lists the columns.
    """
    kinds = rows.features.items()
    images = [name for name, kind in kinds if isinstance(kind, datasets.Image)]
    encoded = [n for n, kind in kinds if isinstance(kind, dict) and set(kind) == {"bytes", "path"}]
    binary = [name for name, kind in kinds if _type_name(kind) in ("binary", "large_binary")]
    return _choose("image", rows, column, images + encoded + binary, images, encoded, binary)


def label_column(rows: datasets.Dataset, column: str | None = None) -> str:
    """Finds the column of labels: ``label`` or ``labels`` with integers, else a ``ClassLabel``.

    Otherwise it is a column of integers or texts with a usual name such as ``target`` or ``class``.
    Of several columns, the one called ``label`` is taken. See :func:`image_column`.
    """
    if not isinstance(rows, datasets.Dataset):
        raise UsageError(f"a {type(rows).__name__} is not a datasets.Dataset, so has no columns")
    kinds = {name: label_kind(kind) for name, kind in rows.features.items()}
    accepted = [name for name, kind in kinds.items() if kind]
    integers = [name for name in ("label", "labels") if kinds.get(name) in ("names", "integers")]
    classes = [name for name in accepted if kinds[name] == "names"]
    named = [name for name in accepted if name.casefold() in LABEL_NAMES]
    return _choose("label", rows, column, accepted, integers[:1], classes, named)


def _choose(
    noun: str, rows: datasets.Dataset, column: str | None, accepted: list[str], *found: list[str]
) -> str:
    """Returns the named column if it is accepted, or the only one of the first non-empty list."""
    if column in accepted:
        return column
    names = next(filter(None, found), [])
    if column is None and (noun in names or len(names) == 1):
        return noun if noun in names else names[0]
    problem = f"no column {column!r} of {noun}s" if column else f"no column of {noun}s"
    if column is None and names:
        problem = f"several columns could be the {noun}: {', '.join(names)}; name one"
    columns = [f"{name} ({_type_name(kind)})" for name, kind in rows.features.items()]
    raise UsageError(f"{problem}; the columns are {', '.join(columns) or 'none'}")


def label_kind(feature: object) -> Literal["names", "integers", "texts"] | None:
    """Returns the kind of labels in a column of this type; None for a type without labels."""
    if isinstance(feature, datasets.ClassLabel):
        return "names"
    kind = _type_name(feature)
    if isinstance(feature, datasets.Value) and "int" in kind:
        return "integers"
    return "texts" if kind in ("string", "large_string", "string_view") else None


def _type_name(feature: object) -> str:
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__


UNLABELLED = -1


def read_labels(
    tables: Mapping[str, datasets.Dataset], column: str
) -> tuple[dict[str, NDArray[np.int64]], list[str] | None]:
    """Reads the labels of all splits as integers with one list of class names.

    The names of a ``ClassLabel`` are those of the first split, which is the training split; splits
    with another order are renumbered. Texts are names, sorted over all splits. Integers have no
    names.

    Returns:
        The labels by split, (N,) int64, -1 where there is none; and the class names, (C,).

    Raises:
        UsageError: If a split has another type of labels or other classes than the first.
    """
    first, expected = next((split, table.features[column]) for split, table in tables.items())
    names: list[str] | None = getattr(expected, "names", None)
    values = {}
    for split, table in tables.items():
        feature, array = table.features[column], arrow_column(table, column)
        own: list[str] | None = getattr(feature, "names", None)
        other = sorted({*(own or ())} - {*(names or ())})
        if other or label_kind(feature) != label_kind(expected):
            raise UsageError(
                f"the labels of split {split!r}, {shown_names(other) or _type_name(feature)}, are "
                f"not among those of split {first!r} ({_type_name(expected)})"
            )
        if own is not None:
            numbers = pc.if_else(pc.less(array, 0), None, array)
            array = pa.chunked_array([pa.array(own, pa.string())]).take(numbers)
        values[split] = array
    if label_kind(expected) == "integers":
        whole = {split: array.cast(pa.int64()) for split, array in values.items()}
    else:
        texts = {text for array in values.values() for text in pc.unique(array).to_pylist()}
        names = names or sorted(text for text in texts if text and text.strip())
        known = pa.array(names, pa.string())
        whole = {
            split: pc.index_in(array.cast(pa.string()), value_set=known).cast(pa.int64())
            for split, array in values.items()
        }
    return {split: array.fill_null(UNLABELLED).to_numpy() for split, array in whole.items()}, names


def arrow_column(table: datasets.Dataset, column: str) -> pa.ChunkedArray:
    """Returns a column as it is stored."""
    return cast(pa.Table, table.select_columns(column).with_format("arrow")[:]).column(0)
