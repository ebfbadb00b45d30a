"""Any data set as timm's loader wants one: pairs, and a transform that can be set.

Images and labels of a data set's sample or of a loader's batch, in whatever layout they come.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from timm.data import AugMixDataset, ImageDataset
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import DatasetFolder
from torchvision.transforms.functional import to_pil_image

from timm_lt.data.decode import read_image
from timm_lt.data.fingerprint import dataset_fingerprint, described, digest, reads_as
from timm_lt.utils.accelerator import kept_random_state
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import check_labels

# Keys of images and of labels in a sample or batch that is a mapping, the first present is taken.
IMAGE_KEYS = ("pixel_values", "image", "images", "img", "imgs", "input", "inputs", "x", "data")
LABEL_KEYS = ("label", "labels", "target", "targets", "y")
EXPECTED = (
    "expected an image and its label, as a pair or as a mapping such as "
    "{'image': ..., 'label': ...}; a batch has images and labels"
)
NORMALIZED = "timm_lt.create_loader gives images as a model takes them"


def drawn_item(items: Any, row: int) -> tuple[Any, Any]:  # noqa: ANN401 - of any class
    """Returns image and label of a data set's item.

    Raises:
        UsageError: If it cannot be drawn, or image or label is missing.
    """
    noun = f"item {row} of a {_name(items)}"
    try:
        item = items[row]
    except Exception as error:
        raise UsageError(f"{noun} cannot be drawn ({_name(error)}: {error})") from error
    return image_and_label(item, noun)


def image_and_label(sample: object, noun: str) -> tuple[Any, Any]:
    """Returns image and label of a sample, or images and labels of a batch.

    >>> image_and_label({"image": "ant.png", "label": 3}, "item 0")
    ('ant.png', 3)

    Args:
        sample: A tuple or list that begins with image and label, whatever follows; or a mapping,
            a named tuple or a dataclass with one of ``IMAGE_KEYS`` and one of ``LABEL_KEYS``.
        noun: Name of the sample in messages.

    Raises:
        UsageError: If image or label is missing; says what was found.
    """
    fields = _fields(sample)
    if fields is not None:
        names = {str(name).lower(): name for name in reversed(list(fields))}
        image, label = (
            next((names[key] for key in keys if key in names), None)
            for keys in (IMAGE_KEYS, LABEL_KEYS)
        )
        if image is not None and label is not None:
            return fields[image], fields[label]
        if not isinstance(sample, tuple):
            missing = "image" if image is None else "label"
            keys = IMAGE_KEYS if image is None else LABEL_KEYS
            raise UsageError(
                f"{noun} has no {missing}, only {', '.join(map(str, fields)) or 'no key at all'}; "
                f"name it one of {', '.join(keys)}"
            )
    if isinstance(sample, Tensor | np.ndarray):
        raise UsageError(
            f"{noun} is a {_name(sample)} of shape {tuple(sample.shape)} without labels; {EXPECTED}"
        )
    if isinstance(sample, str) or not isinstance(sample, Sequence):
        raise UsageError(f"{noun} is a {_name(sample)}; {EXPECTED}")
    if len(sample) < 2:
        raise UsageError(f"{noun} is a {_name(sample)} of length {len(sample)}; {EXPECTED}")
    return sample[0], sample[1]


def _fields(sample: object) -> Mapping[Any, Any] | None:
    if isinstance(sample, Mapping):
        return sample
    if isinstance(sample, tuple) and hasattr(sample, "_asdict"):
        return dict(sample._asdict())
    if dataclasses.is_dataclass(sample) and not isinstance(sample, type):
        return vars(sample)
    return None


def images_and_labels(batch: object, noun: str) -> tuple[Tensor, Tensor]:
    """Returns images and labels of a batch as tensors.

    Args:
        batch: See :func:`image_and_label`. Images and labels are tensors, NumPy arrays, or lists of
            the one or the other.
        noun: Name of the batch in messages.

    Shape:
        images (B, C, H, W), floating point; labels (B,), integers.

    Raises:
        UsageError: If they have another shape or type, or there are more of one than of the other.
    """
    given, targets = image_and_label(batch, noun)
    images = _image_tensor(given, noun)
    labels = _label_tensor(targets, noun)
    if len(labels) != len(images):
        raise UsageError(f"{noun} has {len(images)} images and {len(labels)} labels")
    return images, labels


def _image_tensor(given: object, noun: str) -> Tensor:
    images = _as_tensor(given)
    if images is None:
        raise UsageError(f"the images of {noun} are not one array of numbers: {_shown(given)}")
    if images.ndim != 4:
        hint = "; add a dimension for the batch" if images.ndim == 3 else ""
        raise UsageError(
            f"the images of {noun} have shape {tuple(images.shape)}; expected (batch, channels, "
            f"height, width){hint}"
        )
    if not images.is_floating_point():
        raise UsageError(
            f"the images of {noun} are {images.dtype}; expected floating-point numbers, "
            "normalized as the model was trained: divide by 255, subtract the mean and divide by "
            f"the standard deviation. {NORMALIZED}"
        )
    return images


def _label_tensor(given: object, noun: str) -> Tensor:
    labels = _as_tensor(given)
    if labels is None:
        raise UsageError(
            f"the labels of {noun} are not integers: {_shown(given)}; expected the number of the "
            "class of each image"
        )
    if labels.ndim != 1:
        cure = "labels.squeeze(1)" if labels.shape[1:] == (1,) else "labels.argmax(1)"
        hint = f": {cure}" if labels.ndim == 2 else ""
        raise UsageError(
            f"the labels of {noun} have shape {tuple(labels.shape)}; expected one integer for each "
            f"image, (batch,){hint}"
        )
    real = labels.is_floating_point() or labels.is_complex()
    if len(labels) and (real or labels.dtype == torch.bool):
        # Names the first label that is not an integer.
        check_labels(labels, noun=f"{noun}: labels")
    return labels.long()


def _as_tensor(values: object) -> Tensor | None:
    """Returns numbers as a tensor; None if they are none, or not of one shape."""
    if isinstance(values, Tensor):
        return values
    try:
        if isinstance(values, list | tuple) and any(isinstance(one, Tensor) for one in values):
            return torch.stack([torch.as_tensor(one) for one in values])
        # A copy: torch takes no array with negative strides, and warns of one that is read-only.
        return torch.from_numpy(np.array(values))
    except (TypeError, ValueError, RuntimeError):
        return None


def _shown(given: object) -> str:
    """Returns in a few words what was given in place of an array."""
    if not isinstance(given, list | tuple) or not given:
        return f"a {_name(given)}"
    shapes = {tuple(one.shape) for one in given if isinstance(one, Tensor | np.ndarray)}
    if len(shapes) > 1:
        return "they have shapes " + ", ".join(map(str, sorted(shapes)[:3]))
    first = repr(given[0]) if isinstance(given[0], str) else f"a {_name(given[0])}"
    return f"a {_name(given)} that begins with {first}"


def _name(value: object) -> str:
    return type(value).__name__


class TransformedItems(Dataset[tuple[Any, Any]]):
    """Items of a data set as pairs of a transformed image and its label.

    Args:
        items: A data set whose items have an image (of PIL, the path of a file, or uint8 as a
            tensor or array) and a label; see :func:`~timm_lt.data.items.image_and_label`.
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
