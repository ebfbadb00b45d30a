"""A ``datasets.Dataset`` of images as timm's loader wants one: pairs, and a transform to be set."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
from PIL import Image
from torch.utils.data import Dataset

from timm_lt.data.described import described
from timm_lt.data.fingerprint import digest, images_fingerprint
from timm_lt.data.pixels import WHITE, check_background
from timm_lt.data.reading import decode_column, read_image
from timm_lt.utils.checks import UsageError


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
        background: See :func:`~timm_lt.data.pixels.check_background`; None keeps the column's own,
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


class ImageRows(Dataset[tuple[Any, int]]):
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
