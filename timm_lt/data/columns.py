"""A ``datasets.Dataset`` of images as timm's loader wants one: pairs, and a transform to be set."""

from collections.abc import Callable
from typing import Any

import datasets
from PIL import Image
from torch.utils.data import Dataset

from timm_lt.data.described import described
from timm_lt.data.fingerprint import digest, images_fingerprint
from timm_lt.registry import UsageError


class ImageRows(Dataset[tuple[Any, int]]):
    """The rows of a ``datasets.Dataset`` as pairs of a transformed image and its label.

    Args:
        rows: With a column of images and one of labels.

    Attributes:
        transform: Applied to each image, RGB; None leaves it a PIL image.

    Raises:
        UsageError: If there is no such column; lists those that there are.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows
        self.transform: Callable[[Image.Image], Any] | None = None
        self._image, self._label = image_column(rows), label_column(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.rows[index]
        image = row[self._image].convert("RGB")
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
