"""The labels of a data set of any kind, without decoding an image."""

from collections.abc import Callable
from typing import Any

import datasets
import torch
from timm.data import AugMixDataset, ImageDataset
from timm.data.readers.reader import Reader
from timm.data.readers.reader_hfds import ReaderHfds
from timm.data.scheduled_sampler import ScheduledTransformDataset
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from timm_lt.data.columns import ImageRows, check_random_access, label_column
from timm_lt.longtail import Labels, check_labels
from timm_lt.registry import UsageError

# Where the data sets of torchvision, the readers of timm and most of people's own keep labels, and
# where they keep pairs of a file and its label.
LABEL_ATTRIBUTES = ("targets", "labels", "_labels")
PAIR_ATTRIBUTES = ("samples", "_samples")


def dataset_labels(dataset: Dataset[Any] | datasets.Dataset, column: str | None = None) -> Tensor:
    """Returns the label of every image of a data set, as the data set itself would give it.

    >>> dataset_labels(TensorDataset(torch.zeros(3, 3, 8, 8), torch.tensor([2, 0, 1])))
    tensor([2, 0, 1])

    No image is read or decoded. Known are ``datasets.Dataset``, the data sets of torchvision,
    timm's ``ImageDataset`` and ``AugMixDataset``, torch's ``Subset``, ``ConcatDataset`` and
    ``TensorDataset`` (its second tensor), and whatever has an attribute ``labels`` or ``targets``.
    A ``target_transform`` is applied.

    Args:
        dataset: The data set.
        column: Of a ``datasets.Dataset``; None takes ``"label"``, else ``"labels"``.

    Shape:
        (N,) int64.

    Raises:
        UsageError: If the labels are not to be had without decoding, or one is not a non-negative
            integer; names its row. Also if the data set is a stream.
    """
    check_random_access(dataset)
    return check_labels(_raw_labels(dataset, column))


def _raw_labels(dataset: Dataset[Any] | datasets.Dataset, column: str | None) -> Labels:
    match dataset:
        case datasets.Dataset():
            return _column(dataset, label_column(dataset, column))
        case ImageRows():
            return dataset_labels(dataset.rows, column)
        case Subset():
            return dataset_labels(dataset.dataset, column)[torch.as_tensor(dataset.indices)]
        case ConcatDataset():
            return torch.cat([dataset_labels(part, column) for part in dataset.datasets])
        case AugMixDataset() | ScheduledTransformDataset():
            return dataset_labels(dataset.dataset, column)
        case TensorDataset() if len(dataset.tensors) > 1:
            return dataset.tensors[1]
        case ImageDataset():
            labels = _reader_labels(dataset.reader)
        case _:
            labels = _stored_labels(dataset)
    if labels is None:
        raise UsageError(
            f"the labels of a {type(dataset).__name__} are not known without decoding its images: "
            "pass a tensor of them, one integer per image, in its place"
        )
    return _transformed(labels, getattr(dataset, "target_transform", None))


def _column(dataset: datasets.Dataset, column: str) -> Labels:
    values: Labels = dataset.with_format("numpy")[column][:]
    return values


def _reader_labels(reader: Reader) -> Labels | None:
    """Returns the labels of a reader of timm, if it keeps them."""
    if isinstance(reader, ReaderHfds):
        plain = not (reader.target_keys or reader.remap_class)
        if plain and reader.label_key in reader.dataset.column_names:
            return _column(reader.dataset, reader.label_key)
        return list(reader.iter_targets())
    return _stored_labels(reader)


def _stored_labels(owner: object) -> Labels | None:
    for name in LABEL_ATTRIBUTES:
        if (labels := getattr(owner, name, None)) is not None:
            return labels  # type: ignore[no-any-return]
    for name in PAIR_ATTRIBUTES:
        if (pairs := getattr(owner, name, None)) is not None:
            return [label for _, label in pairs]
    return None


def _transformed(labels: Labels, transform: Callable[[Any], Any] | None) -> Labels:
    if transform is None:
        return labels
    return [transform(label) for label in check_labels(labels).tolist()]
