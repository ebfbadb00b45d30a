"""The labels of a data set of any kind, equal to those of its items."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any
from warnings import catch_warnings

import datasets
import numpy as np
from numpy.typing import NDArray
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from timm.data.readers.reader_hfds import ReaderHfds
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import DatasetFolder

from timm_lt.data.columns import label_column
from timm_lt.data.fingerprint import reads_as
from timm_lt.data.items import check_dataset, drawn_item, flattened, is_plain
from timm_lt.utils.accelerator import kept_random_state
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import log
from timm_lt.utils.longtail import Labels, check_labels

# Items that are drawn to verify labels that a data set keeps as an attribute.
VERIFIED = 1000
# Columns of a two-dimensional attribute that may be labels.
COLUMNS = 8


def dataset_labels(dataset: Dataset[Any] | datasets.Dataset, column: str | None = None) -> Tensor:
    """Returns the label of every image of a data set, equal to that of its item.

    >>> dataset_labels([("a.png", 2), ("b.png", 0), ("c.png", 1)])
    tensor([2, 0, 1])

    No image is decoded for a ``datasets.Dataset`` without a transform, torchvision's
    ``DatasetFolder`` and the classes derived from it such as ``ImageFolder`` and ``ImageNet``,
    timm's ``ImageDataset`` and ``AugMixDataset``, torch's ``TensorDataset`` (its second tensor),
    and a ``Subset`` or ``ConcatDataset`` of these. A ``target_transform`` is applied.

    Any other data set (others of torchvision, and classes with a ``__getitem__`` of their own) has
    its items drawn: a label is the second part of an item, or has a key such as ``"label"``. Up to
    1,000 items all of them are drawn. Of more, 1,000 and the first of each class are; if they
    agree with labels that the data set keeps as an attribute (such as ``targets``, ``_samples``, or
    a column of a table), these are used. Otherwise every item is drawn, which is logged.

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
            stored, rows = _stored(part, column), row_of[here]
            values = _drawn(part, rows, column) if stored is None else check_labels(stored)[rows]
            labels[here] = check_labels(values).numpy()
    return check_labels(labels)


def _stored(dataset: Any, column: str | None = None) -> Labels | None:  # noqa: ANN401
    """Returns the labels of a data set whose class says where they are; None for others."""
    match dataset:
        case datasets.Dataset() if is_plain(dataset):
            return _column(dataset, label_column(dataset, column))
        case TensorDataset() if reads_as(dataset, TensorDataset) and len(dataset.tensors) > 1:
            return dataset.tensors[1]
        case ImageDataset() if reads_as(dataset, ImageDataset):
            labels = _reader_labels(dataset.reader)
            return None if labels is None else _transformed(labels, dataset.target_transform)
        case DatasetFolder() if reads_as(dataset, DatasetFolder):
            return _transformed([label for _, label in dataset.samples], dataset.target_transform)
    return None


def _column(dataset: datasets.Dataset, column: str) -> Labels:
    values: Labels = dataset.with_format("numpy")[column][:]
    return values


def _reader_labels(reader: Reader) -> Labels | None:
    """Returns the labels of a reader of timm, if it keeps them."""
    if not type(reader).__module__.startswith("timm.data.readers."):
        return None
    if isinstance(reader, ReaderHfds):
        return list(reader.iter_targets())
    labels: Labels | None = getattr(reader, "targets", None)
    if labels is None and hasattr(reader, "samples"):
        return [label for _, label in reader.samples]
    return labels


def _transformed(labels: Labels, transform: Any) -> Labels:  # noqa: ANN401
    if transform is None:
        return labels
    return [transform(label) for label in check_labels(labels).tolist()]


def _drawn(dataset: Any, rows: NDArray[np.int64], column: str | None) -> Labels:  # noqa: ANN401
    """Returns the labels of some items; of many, those of an attribute that agrees with them."""
    kind = type(dataset).__name__
    drawn: dict[int, Any] = {}

    def label_of(row: int) -> Any:  # noqa: ANN401 - whatever the data set yields
        if row not in drawn:
            try:
                by_column = column is not None and isinstance(dataset, datasets.Dataset)
                drawn[row] = dataset[row][column] if by_column else drawn_item(dataset, row)[1]
            except UsageError as error:
                raise UsageError(
                    f"the labels of a {kind} are not known: {error}; or pass a tensor of them, one "
                    "integer per image, in its place"
                ) from error
        return drawn[row]

    # Some data sets of torchvision open files that they leave to the garbage collector.
    with kept_random_state(), catch_warnings(action="ignore", category=ResourceWarning):
        if len(rows) > VERIFIED:
            some = np.random.default_rng(0).permutation(len(rows))[:VERIFIED]
            for candidate in _candidates(dataset):
                labels = candidate.numpy()[rows]
                firsts = np.unique(labels, return_index=True)[1]
                sample = np.concatenate([some, firsts])
                if all(_is_equal(label_of(int(rows[n])), int(labels[n])) for n in sample):
                    return labels
            log.info("drawing all %d items of a %s for their labels", len(rows), kind)
        return [label_of(row) for row in rows.tolist()]


def _is_equal(drawn: object, label: int) -> bool:
    is_number = isinstance(drawn, int | np.integer | Tensor | np.ndarray) and np.ndim(drawn) == 0
    return is_number and bool(drawn == label)


def _candidates(dataset: Any) -> Iterator[Tensor]:  # noqa: ANN401 - of any class
    """Yields non-negative integers that a data set keeps, one for each item: maybe its labels."""
    transform = getattr(dataset, "target_transform", None)
    for values in _attributes(dataset):
        for column in _columns(values):
            # Values that are not labels may be anything, and a transform fail on them.
            with suppress(UsageError, TypeError, ValueError, LookupError):
                labels = check_labels(_transformed(column, transform))
                if len(labels) == len(dataset):
                    yield labels


def _attributes(dataset: Any) -> Iterator[Any]:  # noqa: ANN401 - of any class
    if isinstance(dataset, datasets.Dataset):
        with suppress(UsageError):
            yield _column(dataset, label_column(dataset))
        return
    # Properties, such as the labels of MNIST, are not among the instance's attributes.
    for name in dict.fromkeys(("targets", "labels", *getattr(dataset, "__dict__", ()))):
        yield getattr(dataset, name, None)


def _columns(values: Any) -> Iterator[Any]:  # noqa: ANN401 - of any class
    """Yields an attribute, or the columns of a table."""
    if hasattr(values, "iloc"):
        values = [values[name].to_numpy() for name in values] if values.ndim == 2 else [values]
        yield from values
    elif isinstance(values, Dataset | datasets.Dataset):
        stored = _stored(values)
        yield () if stored is None else stored
    elif isinstance(values, Tensor | np.ndarray) and values.ndim == 2:
        yield from values.T[:COLUMNS]
    elif isinstance(values, Sequence) and values and isinstance(values[0], tuple | list):
        yield from zip(*values, strict=False)
    else:
        yield values
