"""Example images as small pictures within the page."""

import base64
import io
from dataclasses import dataclass
from typing import Literal

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from timm_lt.data.reading import encoded_images, read_image
from timm_lt.utils.checks import UsageError

Source = Literal["train", "test"]
# Pixels of the longer side, and bytes of the file before it is written as text.
SIDE, MAX_BYTES = 88, 3000
QUALITIES = (80, 60, 40, 20)


@dataclass(frozen=True, eq=False)
class ExampleImages:
    """Where example images come from.

    Args:
        train: Training images, with a column ``image``.
        train_labels: Their labels, (N,) int64.
        test: Test images, with a column ``image``.
        test_rows: The row in ``test`` of each image that was evaluated, (M,) int64; None if it
            cannot be told, and then no test image is shown.
    """

    train: Dataset
    train_labels: Tensor
    test: Dataset
    test_rows: Tensor | None = None


class Thumbnails:
    """Makes data URIs of example images; each is decoded once.

    Args:
        images: Where they come from; None makes none.
    """

    def __init__(self, images: ExampleImages | None) -> None:
        self._images = images
        self._made: dict[tuple[Source, int], str | None] = {}
        if images is not None:
            self._encoded = {name: encoded_images(getattr(images, name)) for name in SOURCES}

    def test(self, image: int) -> str | None:
        """Returns an evaluated image, None if it is not to be had."""
        if self._images is None or self._images.test_rows is None:
            return None
        return self._uri("test", int(self._images.test_rows[image]))

    def of_class(self, label: int) -> str | None:
        """Returns the first training image of a class, None if it is not to be had."""
        if self._images is None:
            return None
        rows = (self._images.train_labels == label).nonzero()
        return self._uri("train", int(rows[0])) if len(rows) else None

    def _uri(self, source: Source, row: int) -> str | None:
        if (source, row) not in self._made:
            encoded = self._encoded[source][row]["image"]
            column = getattr(self._images, source).features["image"]
            try:
                self._made[source, row] = data_uri(read_image(encoded, row, column))
            except UsageError:
                # An image that cannot be read was reported where it was to be trained on.
                self._made[source, row] = None
        return self._made[source, row]


SOURCES: tuple[Source, ...] = ("train", "test")


def evaluated_rows(number: int, unreadable: list[int], evaluated: int) -> Tensor | None:
    """Returns which rows of a data set were evaluated, (evaluated,).

    >>> evaluated_rows(4, [1], 3)
    tensor([0, 2, 3])

    Args:
        number: Rows of the data set.
        unreadable: Those that could not be read, as far as they are known.
        evaluated: How many were evaluated.

    Returns:
        None if it cannot be told, because not all that were left out are known.
    """
    kept = torch.ones(number, dtype=torch.bool)
    kept[unreadable] = False
    rows = kept.nonzero().flatten()
    return rows if len(rows) == evaluated else None


def data_uri(image: Image.Image) -> str | None:
    """Returns an image as a JPEG of at most 88 pixels and 3,000 bytes, as a data URI.

    Args:
        image: In RGB.

    Returns:
        None if it is not to be had in so few bytes.
    """
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    for quality in QUALITIES:
        file = io.BytesIO()
        small.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= MAX_BYTES:
            return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return None
