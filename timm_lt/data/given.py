"""Data sets passed as objects, of Hugging Face, torchvision, timm or one's own: labels, images."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader_hfds import ReaderHfds
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import default_loader, pil_loader

from timm_lt.data.decode import read_image, upright, with_alpha
from timm_lt.data.images import MAX_BYTES
from timm_lt.data.items import (
    ACCEPTED,
    as_image,
    check_dataset,
    drawn_item,
    flattened,
    folder_samples,
    image_column,
    is_plain,
    label_column,
    reads_as,
)
from timm_lt.data.list_files import note_unused
from timm_lt.data.sources import SPLIT_WORDS, dataset_from_files, dataset_from_images
from timm_lt.utils.accelerator import kept_random_state
from timm_lt.utils.checks import Problems, UsageError, unknown_name, user_errors
from timm_lt.utils.console import log
from timm_lt.utils.longtail import Labels, check_labels

# Items that are drawn to verify labels that a data set keeps as an attribute.
VERIFIED = 1000
CURE = "or pass one integer per image"
# Loaders of torchvision's folders, and modes of timm's, that read a whole file in RGB.
LOADERS = (default_loader, pil_loader)
MODES = ("RGB", "", None)


def dataset_labels(dataset: Dataset[Any] | datasets.Dataset, column: str | None = None) -> Tensor:
    """Returns the label of every image of a data set, equal to that of its item.

    >>> dataset_labels([("a.png", 2), ("b.png", 0), ("c.png", 1)])
    tensor([2, 0, 1])

    No image is decoded for a ``datasets.Dataset`` without a transform, torchvision's folders such
    as ``ImageFolder`` and ``ImageNet``, timm's ``ImageDataset`` and ``AugMixDataset``, torch's
    ``TensorDataset`` (its second tensor), and a ``Subset`` or ``ConcatDataset`` of these.

    Any other data set has its items drawn: a label is the second part of an item, or has a key such
    as ``"label"``. Of more than 1,000 items, 1,000 and the first of each class are drawn; if they
    agree with labels that the data set keeps as an attribute (such as ``targets`` or a column of a
    table), these are used. Otherwise every item is drawn, which is logged.

    Args:
        dataset: The data set, or a list of pairs of an image and its label.
        column: Column of a ``datasets.Dataset``; None takes ``"label"``, else ``"labels"``.

    Shape:
        (N,) int64.

    Raises:
        UsageError: If an item cannot be drawn or has no label, or a label is not a non-negative
            integer; names its row. Also if the data set is a stream or empty.
    """
    check_dataset(dataset)
    parts, part_of, row_of = flattened(dataset)
    labels = np.zeros(len(part_of), np.int64)
    for number, part in enumerate(parts):
        here = np.flatnonzero(part_of == number)
        if len(here):
            stored, rows = _labels_of_items(part, column), row_of[here]
            values = _drawn(part, rows, column) if stored is None else check_labels(stored)[rows]
            labels[here] = check_labels(values).numpy()
    return check_labels(labels)


def _labels_of_items(data: Any, column: str | None) -> Any:  # noqa: ANN401 - of any class
    """Returns the labels of the items of a known class; None for others."""
    if isinstance(data, datasets.Dataset):
        return _stored_labels(data, column) if is_plain(data) else None
    if not reads_as(data, TensorDataset, ImageDataset, DatasetFolder):
        return None
    return _transformed(_stored_labels(data), getattr(data, "target_transform", None))


def _stored_labels(data: Any, column: str | None = None) -> Any:  # noqa: ANN401 - of any class
    """Returns the labels that a data set stores where its class does, before a transform."""
    match data:
        case datasets.Dataset():
            return data.with_format("numpy")[label_column(data, column)][:]
        case TensorDataset() if len(data.tensors) > 1:
            return data.tensors[1]
        case DatasetFolder():
            return [label for _, label in data.samples]
        case ImageDataset(reader=ReaderHfds()):
            return list(data.reader.iter_targets())
        case ImageDataset() if type(data.reader).__module__.startswith("timm.data.readers."):
            if hasattr(data.reader, "targets") or not hasattr(data.reader, "samples"):
                return getattr(data.reader, "targets", None)
            return [label for _, label in data.reader.samples]
    return None


def _transformed(labels: Any, transform: Any) -> Any:  # noqa: ANN401 - of any class
    if transform is None or labels is None:
        return labels
    return list(map(transform, check_labels(labels).tolist()))


@contextmanager
def _drawing() -> Iterator[None]:
    """Keeps the random state, and ignores files that data sets leave to the garbage collector."""
    with kept_random_state(), catch_warnings(action="ignore", category=ResourceWarning):
        yield


def _drawn(dataset: Any, rows: NDArray[np.int64], column: str | None) -> Labels:  # noqa: ANN401
    """Returns the labels of some items; of many, those of an attribute that agrees with them."""
    kind = type(dataset).__name__
    by_column = column is not None and isinstance(dataset, datasets.Dataset)

    @cache
    def label_of(row: int) -> Any:  # noqa: ANN401 - whatever the data set yields
        with user_errors(f"the labels of a {kind} are not known", UsageError, cure=CURE):
            return dataset[row][column] if by_column else drawn_item(dataset, row)[1]

    with _drawing():
        if len(rows) > VERIFIED:
            some = np.random.default_rng(0).permutation(len(rows))[:VERIFIED]
            for candidate in _kept_labels(dataset):
                labels = candidate.numpy()[rows]
                firsts = np.unique(labels, return_index=True)[1]
                sample = np.concatenate([some, firsts])
                if all(np.array_equal(label_of(int(rows[n])), labels[n]) for n in sample):
                    return labels
            log.info("drawing all %d items of a %s for their labels", len(rows), kind)
        return [label_of(row) for row in rows.tolist()]


def _kept_labels(dataset: Any) -> Iterator[Tensor]:  # noqa: ANN401 - of any class
    """Yields non-negative integers that a data set keeps, one for each item: maybe its labels."""
    transform = getattr(dataset, "target_transform", None)
    # Properties, such as the labels of MNIST, are not among the instance's attributes.
    names = dict.fromkeys(("targets", "labels", *getattr(dataset, "__dict__", ())))
    kept: list[Any] = [getattr(dataset, name, None) for name in names]
    if isinstance(dataset, datasets.Dataset):
        kept = [_stored_labels(dataset)]
    for values in kept:
        rows = values.to_numpy().tolist() if hasattr(values, "iloc") else values
        is_table = isinstance(rows, Sequence) and rows and isinstance(rows[0], tuple | list)
        columns = list(zip(*rows, strict=False)) if is_table else [rows]
        for column in columns:
            # Values that are not labels may be anything, and a transform fail on them.
            with suppress(UsageError, TypeError, ValueError, LookupError):
                labels = check_labels(_transformed(column, transform))
                if len(labels) == len(dataset):
                    yield labels


def given_splits(data: object) -> dict[str, datasets.Dataset]:
    """Returns a data set, or a mapping of them by split, with the columns ``image`` and ``label``.

    Folders stay files, without a transform; other items are drawn and kept in memory as PNG.
    """
    splits: dict[str, datasets.Dataset] = {}
    problems = Problems()
    for name, part in data.items() if isinstance(data, Mapping) else [("train", data)]:
        split = SPLIT_WORDS.get(str(name).lower())
        if split is None or split in splits:
            raise unknown_name("split (each at most once):", name, ["train", "val", "test"])
        with problems.collected(f"{name} split: "):
            splits[split] = _as_dataset(part)
    problems.check()
    columns = dict.fromkeys(name for rows in splits.values() for name in rows.column_names)
    note_unused("the data set", [name for name in columns if name not in ("image", "label")])
    return splits


def _as_dataset(data: Any) -> datasets.Dataset:  # noqa: ANN401 - of any class
    check_dataset(data)
    if isinstance(data, datasets.Dataset) and is_plain(data):
        columns = {image_column(data): "image", label_column(data): "label"}
        return data.with_format(None).rename_columns(columns)
    parts, part_of, row_of = flattened(data)
    files = [_files(part) for part in parts]
    images: list[dict[str, Any]] = []
    if None in files:
        with _drawing():
            images, drawn = _drawn_samples(data)
        labels = check_labels(drawn)
    else:
        labels = dataset_labels(data)
    found = {
        tuple(_class_names(part, row_of[part_of == number], labels[part_of == number]) or ())
        for number, part in enumerate(parts)
    }
    names = list(found.pop()) if len(found) == 1 else []
    check_labels(labels, len(names) or None)
    if images:
        return dataset_from_images(images, labels.numpy(), names or None)
    paths = [(files[part] or [])[row] for part, row in zip(part_of, row_of, strict=True)]
    return dataset_from_files(paths, labels.numpy(), names or None)


def _files(data: Any) -> list[str] | None:  # noqa: ANN401 - of any class
    """Returns the files of a data set, if its images are nothing else."""
    samples = folder_samples(data)
    loader, mode = getattr(data, "loader", default_loader), getattr(data, "input_img_mode", None)
    if samples is None or loader not in LOADERS or mode not in MODES:
        return None
    return [str(path) for path, _ in samples]


def _class_names(data: Any, rows: NDArray[np.int64], labels: Tensor) -> list[str] | None:  # noqa: ANN401
    """Returns the class names of a data set, unless it stores other labels of the rows."""
    names: Any = getattr(data, "classes", None)
    if isinstance(data, datasets.Dataset):
        names = getattr(data.features[label_column(data)], "names", None)
    elif isinstance(data, ImageDataset):
        numbers = getattr(data.reader, "class_to_idx", None) or {}
        names = sorted(numbers, key=numbers.__getitem__)
    stored = _stored_labels(data)
    if stored is not None and not np.array_equal(np.asarray(stored)[rows], labels):
        return None
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        return None
    return list(names) if 0 < len(names) == len(set(names)) else None


def _drawn_samples(items: Any) -> tuple[list[dict[str, Any]], list[Any]]:  # noqa: ANN401
    """Draws all items, whose images are encoded without loss; returns images and labels."""
    images, labels, size, kind = [], [], 0, type(items).__name__
    for row in range(len(items)):
        image, label = drawn_item(items, row)
        images.append(_encoded(image, row, kind))
        labels.append(label)
        size += len(images[-1]["bytes"] or b"")
        if size > MAX_BYTES:
            raise UsageError(
                f"the images of a {kind} need more than {MAX_BYTES / 2**30:.0f} GiB of memory; "
                "pass the paths of their files instead of images"
            )
    return images, labels


def _encoded(given: object, row: int, kind: str) -> dict[str, Any]:
    """Returns an image without loss: its file if that is known, else PNG."""
    image = as_image(given)
    if isinstance(image, dict):
        return image
    if not isinstance(image, Image.Image):
        raise UsageError(
            f"image {row} of a {kind} is a {type(image).__name__}; remove a transform that makes "
            f"tensors, because the model's own preprocessing does so. Expected {ACCEPTED}"
        )
    column = datasets.Image()
    # Of a file that is opened but not read, the path is stored.
    if not (getattr(image, "filename", "") and getattr(image, "tile", None)):
        image.load()
        has_alpha = image.has_transparency_data
        pixels = with_alpha(image) if has_alpha else read_image(image, row, column)
        # A copy has no format, which could be one that loses something.
        image = upright(pixels, image).copy()
    encoded: dict[str, Any] = column.encode_example(image)
    return encoded


def folder_of(data: object) -> str | None:
    """Returns the folder of the training images, if a data set of torchvision or timm has one."""
    if isinstance(data, Mapping):
        words = {SPLIT_WORDS.get(str(name).lower()): part for name, part in data.items()}
        data = words.get("train")
    while isinstance(data, Subset):
        data = data.dataset
    root = getattr(getattr(data, "reader", data), "root", None)
    return str(root) if isinstance(root, str | Path) else None
