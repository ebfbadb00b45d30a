"""Any data set as timm's loader wants one: pairs, and a transform that can be set."""

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from timm.data import AugMixDataset, ImageDataset
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import DatasetFolder
from torchvision.transforms.functional import to_pil_image

from timm_lt.data.described import described
from timm_lt.data.fingerprint import dataset_fingerprint, digest, reads_as
from timm_lt.data.pairs import drawn_item
from timm_lt.data.reading import read_image
from timm_lt.utils.accelerator import kept_random_state
from timm_lt.utils.checks import UsageError


class TransformedItems(Dataset[tuple[Any, Any]]):
    """Items of a data set as pairs of a transformed image and its label.

    Args:
        items: A data set whose items have an image (of PIL, the path of a file, or uint8 as a
            tensor or array) and a label; see :func:`~timm_lt.data.pairs.image_and_label`.
        takes_tensors: Whether floating-point tensors are given as they are, without the transform.

    Attributes:
        transform: Applied to each image, RGB; None leaves it a PIL image.
    """

    def __init__(self, items: Any, *, takes_tensors: bool = False) -> None:  # noqa: ANN401
        self.items, self.takes_tensors = items, takes_tensors
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        given, label = drawn_item(self.items, row)
        if not _is_label(label):
            raise UsageError(
                f"item {row} of a {type(self.items).__name__} has the label {label!r}, which is "
                "not an integer"
            )
        if self.takes_tensors and isinstance(given, Tensor) and given.is_floating_point():
            return given, label
        image = self._image(given, row)
        return (self.transform(image) if self.transform else image), label

    def _image(self, given: object, row: int) -> Image.Image:
        if isinstance(given, str | Path):
            given = {"path": str(given), "bytes": None}
        given = as_image(given)
        if isinstance(given, dict | Image.Image):
            return read_image(given, row, datasets.Image())
        if isinstance(given, Tensor | np.ndarray):
            kind = f"{type(given).__name__} of shape {tuple(given.shape)}, {given.dtype}"
        else:
            kind = type(given).__name__
        raise UsageError(
            f"image {row} of a {type(self.items).__name__} is a {kind}; the transform of a loader "
            "takes images of PIL, paths or uint8: remove the data set's own transform, or pass "
            "use_prefetcher=False, which gives floating-point tensors as they are"
        )

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the data set, if it has epochs."""
        if hasattr(self.items, "set_epoch"):
            self.items.set_epoch(epoch)

    def fingerprint(self) -> str:
        """Returns a digest of the items in their order and of the transform."""
        return digest(dataset_fingerprint(self.items), described(self.transform))


def as_image(given: Any) -> Any:  # noqa: ANN401 - of any class
    """Returns uint8 pixels as an image of PIL; whatever else as it is.

    Args:
        given: A tensor (C, H, W), an array (H, W, C), either without channels, or anything.
    """
    is_pixels = isinstance(given, Tensor | np.ndarray) and str(given.dtype).endswith("uint8")
    # Not of another number of channels or dimensions.
    with suppress(ValueError, TypeError):
        return to_pil_image(given) if is_pixels else given
    return given


def with_transform(data: Any, *, takes_tensors: bool) -> Any:  # noqa: ANN401 - of any class
    """Returns a data set whose transform timm can set: itself, or its items with one.

    Args:
        data: The data set.
        takes_tensors: See :class:`TransformedItems`.

    Raises:
        UsageError: If it is not a data set.
    """
    if isinstance(data, IterableDataset) or reads_as(data, ImageDataset, AugMixDataset):
        return data
    if reads_as(data, DatasetFolder) or _uses_transform(data):
        return data
    is_items = isinstance(data, Sequence) and not isinstance(data, str)
    if not (is_items or isinstance(data, Dataset | datasets.Dataset)):
        raise UsageError(
            f"a {type(data).__name__} is not a data set; create_loader takes one of torch, timm or "
            "datasets, or a list of pairs of an image and its label"
        )
    return TransformedItems(data, takes_tensors=takes_tensors)


def _uses_transform(data: Any) -> bool:  # noqa: ANN401 - of any class
    """Tells whether items of a data set are pairs whose image its attribute ``transform`` made."""
    if not hasattr(data, "transform"):
        return False
    made = object()
    try:
        with kept_random_state():
            probe = copy.copy(data)
            probe.transform = lambda _: made
            item = probe[0]
    except Exception:  # noqa: BLE001 - whatever it is, it is raised again where items are drawn
        return False
    is_pair = isinstance(item, tuple) and len(item) == 2
    return is_pair and item[0] is made and _is_label(item[1])


def _is_label(label: object) -> bool:
    """Tells whether a label is an integer, or dense; the loader would truncate a fraction."""
    if isinstance(label, Tensor | np.ndarray):
        return label.ndim > 0 or isinstance(label.item(), int)
    return isinstance(label, int | np.integer)
