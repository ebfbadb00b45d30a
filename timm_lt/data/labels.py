"""The labels of a data set of any kind, as its items have them."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from typing import Any, TypeAlias, cast
from warnings import catch_warnings

import datasets
import numpy as np
import torch
from timm.data import AugMixDataset, ImageDataset
from timm.data.readers.reader import Reader
from timm.data.readers.reader_hfds import ReaderHfds
from timm.data.scheduled_sampler import ScheduledTransformDataset
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import DatasetFolder

from timm_lt.data.columns import ImageRows, check_random_access, label_column
from timm_lt.data.fingerprint import reads_as
from timm_lt.data.items import LABEL_KEYS, TransformedItems, drawn_item
from timm_lt.utils.accelerator import kept_random_state
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import log
from timm_lt.utils.longtail import Labels, check_labels

# A data set with random access: len(items) and items[row].
Items: TypeAlias = Any
# Items that are drawn to verify labels that a data set keeps as an attribute.
VERIFIED = 1000
# Attributes where the data sets of torchvision, timm's readers and most people keep labels.
LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "samples", "_samples")
# Columns of a two-dimensional attribute that may be labels.
COLUMNS = 8
PASS = "pass a tensor of them, one integer per image, in its place"


def dataset_labels(dataset: Dataset[Any] | datasets.Dataset, column: str | None = None) -> Tensor:
    """Returns the label of every image of a data set, as the data set itself gives it.

    >>> dataset_labels(TensorDataset(torch.zeros(3, 3, 8, 8), torch.tensor([2, 0, 1])))
    tensor([2, 0, 1])

    No image is decoded for a ``datasets.Dataset`` without a transform, torchvision's
    ``DatasetFolder`` and the classes derived from it such as ``ImageFolder`` and ``ImageNet``,
    timm's ``ImageDataset`` and ``AugMixDataset``, torch's ``TensorDataset`` (its second tensor),
    and a ``Subset`` or ``ConcatDataset`` of these. A ``target_transform`` is applied.

    Of every other data set (others of torchvision, and classes with a ``__getitem__`` of their own)
    items are drawn: a label is the second part of an item, or has a key such as ``"label"``. Up to
    1,000 items all of them are drawn. Of more, 1,000 and the first of each class are; if they
    agree with labels that the data set keeps as an attribute (such as ``targets``, ``_samples``, or
    a column of a table), these are taken. Otherwise every item is drawn, which the log says.

    Args:
        dataset: The data set, or a list of pairs of an image and its label.
        column: Of a ``datasets.Dataset``; None takes ``"label"``, else ``"labels"``.

    Shape:
        (N,) int64.

    Raises:
        UsageError: If an item cannot be drawn or has no label, or a label is not a non-negative
            integer; names its row. Also if the data set is a stream or empty.
    """
    check_random_access(dataset)
    _check_dataset(dataset)
    return check_labels(_labels(dataset, column))


def _check_dataset(dataset: object) -> None:
    kind = type(dataset).__name__
    if isinstance(dataset, IterableDataset):
        raise UsageError(f"the labels of a {kind} are not known, for it is a stream: {PASS}")
    is_items = isinstance(dataset, Sequence) and not isinstance(dataset, str)
    if not (isinstance(dataset, Dataset | datasets.Dataset) or is_items):
        inner = getattr(dataset, "dataset", None)
        cure = ": pass its attribute dataset" if inner is not None else ""
        raise UsageError(f"a {kind} is not a data set{cure}")


def _labels(dataset: Items, column: str | None) -> Tensor:
    """Returns the labels of a data set; there may be none."""
    stored = _stored(dataset, column)
    if stored is not None:
        return stored
    if isinstance(dataset, ConcatDataset) and reads_as(dataset, ConcatDataset):
        return torch.cat([_labels(part, column) for part in dataset.datasets])
    return _tensor(_drawn(dataset, column))


def _tensor(labels: Labels) -> Tensor:
    return check_labels(labels) if len(labels) else torch.empty(0, dtype=torch.int64)


def _stored(dataset: Items, column: str | None = None) -> Tensor | None:
    """Returns the labels of a data set whose class says where they are; None for others."""
    labels: Labels | None = None
    transform: Callable[[Any], Any] | None = None
    match dataset:
        case datasets.Dataset() if is_plain(dataset):
            return _tensor(_column(dataset, label_column(dataset, column)))
        case ImageRows() if reads_as(dataset, ImageRows):
            return _stored(dataset.rows, column)
        case TransformedItems() if reads_as(dataset, TransformedItems):
            return _labels(dataset.items, column)
        case Subset() if reads_as(dataset, Subset):
            stored = _stored(dataset.dataset, column)
            return None if stored is None else stored[subset_rows(dataset)]
        case ConcatDataset() if reads_as(dataset, ConcatDataset):
            parts = [_stored(part, column) for part in dataset.datasets]
            known = [part for part in parts if part is not None]
            return torch.cat(known) if len(known) == len(parts) else None
        case AugMixDataset() | ScheduledTransformDataset():
            known_class = reads_as(dataset, AugMixDataset, ScheduledTransformDataset)
            return _stored(dataset.dataset, column) if known_class else None
        case TensorDataset() if reads_as(dataset, TensorDataset) and len(dataset.tensors) > 1:
            return _tensor(dataset.tensors[1])
        case ImageDataset() if reads_as(dataset, ImageDataset):
            labels, transform = _reader_labels(dataset.reader), dataset.target_transform
        case DatasetFolder() if reads_as(dataset, DatasetFolder):
            labels, transform = [label for _, label in dataset.samples], dataset.target_transform
    return None if labels is None else _tensor(_transformed(labels, transform))


def subset_rows(subset: Subset[Any]) -> list[int]:
    """Returns the rows of a subset in the data set that it is of.

    Raises:
        UsageError: If one is out of range.
    """
    rows, size = [int(index) for index in subset.indices], len(cast("Sized", subset.dataset))
    if rows and not -size <= min(rows) <= max(rows) < size:
        raise UsageError(
            f"a Subset has indices from {min(rows)} to {max(rows)}, but the data set that it is of "
            f"has {size} items"
        )
    return rows


def is_plain(rows: datasets.Dataset) -> bool:
    """Tells whether a ``datasets.Dataset`` has no transform of its own."""
    return bool(rows.format["type"] != "custom")


def _column(dataset: datasets.Dataset, column: str) -> Labels:
    values: Labels = dataset.with_format("numpy")[column][:]
    return values


def _reader_labels(reader: Reader) -> Labels | None:
    """Returns the labels of a reader of timm, if it keeps them."""
    if not type(reader).__module__.startswith("timm.data.readers."):
        return None
    if isinstance(reader, ReaderHfds):
        plain = not (reader.target_keys or reader.remap_class)
        if plain and reader.label_key in reader.dataset.column_names:
            return _column(reader.dataset, reader.label_key)
        return list(reader.iter_targets())
    targets: Labels | None = getattr(reader, "targets", None)
    if targets is None and hasattr(reader, "samples"):
        return [label for _, label in reader.samples]
    return targets


def _transformed(labels: Labels, transform: Callable[[Any], Any] | None) -> Labels:
    if transform is None:
        return labels
    return [transform(label) for label in check_labels(labels).tolist()]


def _drawn(dataset: Items, column: str | None) -> Labels:
    """Returns the labels of the items; of many, those of an attribute that agrees with them."""
    kind = type(dataset).__name__
    if getattr(type(dataset), "__getitem__", Dataset.__getitem__) is Dataset.__getitem__:
        # It has no items, so nothing to disagree with.
        for labels in _candidates(dataset):
            return labels
        raise UsageError(f"the labels of a {kind} are not known, for it has no items: {PASS}")
    if not hasattr(dataset, "__len__"):
        raise UsageError(f"the labels of a {kind} are not known, for it has no length: {PASS}")
    drawn: dict[int, Any] = {}

    def label_of(row: int) -> Items:
        if row not in drawn:
            drawn[row] = _label_of_item(dataset, row, column)
        return drawn[row]

    rows = range(len(dataset))
    # Some data sets of torchvision open files that they leave to the garbage collector.
    with kept_random_state(), catch_warnings(action="ignore", category=ResourceWarning):
        if len(rows) > VERIFIED:
            some = np.random.default_rng(0).permutation(len(rows))[:VERIFIED].tolist()
            for labels in _candidates(dataset):
                firsts = np.unique(labels.numpy(), return_index=True)[1].tolist()
                if all(_is_equal(label_of(row), labels[row]) for row in [*some, *firsts]):
                    return labels
            log.info("drawing all %d items of a %s for their labels", len(rows), kind)
        return [label_of(row) for row in rows]


def _is_equal(drawn: object, label: Tensor) -> bool:
    return isinstance(drawn, int | np.integer | Tensor | np.ndarray) and bool(
        np.ndim(drawn) == 0 and drawn == label.item()
    )


def _label_of_item(dataset: Items, row: int, column: str | None) -> Items:
    try:
        if column is not None and isinstance(dataset, datasets.Dataset):
            return dataset[row][column]
        return drawn_item(dataset, row)[1]
    except UsageError as error:
        kind = type(dataset).__name__
        raise UsageError(f"the labels of a {kind} are not known: {error}; or {PASS}") from error


def _candidates(dataset: Items) -> Iterator[Tensor]:
    """Yields what may be the labels of a data set: non-negative integers, one for each item."""
    if isinstance(dataset, Subset):
        yield from (labels[subset_rows(dataset)] for labels in _candidates(dataset.dataset))
    transform = getattr(dataset, "target_transform", None)
    for values in _attributes(dataset):
        for column in _columns(values):
            # What is not a label may be anything, and a transform fail on it.
            with suppress(UsageError, TypeError, ValueError, LookupError):
                yield check_labels(_transformed(column, transform))


def _attributes(dataset: Items) -> Iterator[Items]:
    """Yields what a data set has of its own, one entry for each item: columns, or attributes."""
    if isinstance(dataset, datasets.Dataset):
        plain = dataset.with_format("numpy")
        names = sorted(dataset.column_names, key=lambda name: name not in LABEL_KEYS)
        dtypes = {name: getattr(dataset.features[name], "dtype", None) for name in names}
        yield from (plain[name][:] for name in names if "int" in str(dtypes[name]))
        return
    for name in dict.fromkeys((*LABEL_ATTRIBUTES, *getattr(dataset, "__dict__", ()))):
        values: Items = getattr(dataset, name, None)
        with suppress(TypeError):
            if not hasattr(dataset, "__len__") or len(values) == len(dataset):
                yield values


def _columns(values: Items) -> Iterator[Any]:
    """Yields an attribute, or the parts of its entries, the likely labels first."""
    if isinstance(values, Dataset | datasets.Dataset):
        stored = _stored(values)
        if stored is not None:
            yield stored
    elif hasattr(values, "iloc"):
        # A table of pandas, or one of its columns.
        table = values.to_dict("list") if values.ndim == 2 else {}
        yield from table.values() or [values]
    elif isinstance(values, Tensor | np.ndarray):
        if values.ndim <= 2:
            yield from [values] if values.ndim == 1 else values.T[:COLUMNS]
    elif not isinstance(values, Sequence) or isinstance(values, str) or not values:
        yield values
    elif all(isinstance(row, Mapping) for row in values):
        keys = dict.fromkeys((*LABEL_KEYS, *values[0]))
        yield from ([row.get(key) for row in values] for key in keys)
    elif all(isinstance(row, Sequence) and not isinstance(row, str) for row in values):
        first, *others = zip(*values, strict=False)
        yield from (*others[:1], first, *others[1:])
    else:
        yield values
