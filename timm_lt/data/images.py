"""Image data sets in memory: decoded once, then batches at the speed of tensor indexing."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetInfo, Value
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from timm_lt.data.augment import Augmentation, NoAugmentation, random_uniforms
from timm_lt.data.described import described, tensor_fingerprint
from timm_lt.data.draws import InOrder
from timm_lt.data.fingerprint import digest
from timm_lt.data.reading import (
    DAMAGE,
    UNREADABLE,
    Unreadable,
    damage_of,
    decode_column,
    describe_huge,
    encoded_images,
    image_name,
    is_huge,
    unreadable_images,
)
from timm_lt.data.sharing import check_groups
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import log
from timm_lt.utils.longtail import check_labels

# Beyond this, decoded images do not belong in memory.
MAX_BYTES = 8 * 2**30

Batch = tuple[Tensor, Tensor]


class TrainLoader(Protocol):
    """Yields the batches of an epoch on the device, normalised."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the 0-based epoch of the next iteration."""

    def __iter__(self) -> Iterator[Batch]:
        """Yields (images (B, 3, H, W), targets (B,))."""


class Images(Protocol):
    """What training needs of an image data set, in memory or not.

    Attributes:
        labels: (N,) int64.
        size: (H, W) of the images in a batch.
        unreadable: What happens to an image that cannot be read. With ``"skip"`` its target is -1.
    """

    labels: Tensor
    size: tuple[int, int]
    unreadable: Unreadable

    def __len__(self) -> int:
        """Returns N."""

    def train_loader(
        self, batch_size: int, sampler: Sampler[int], accelerator: Accelerator
    ) -> TrainLoader:
        """Creates a loader of augmented images, in whole batches over all processes.

        The sampler yields draws, ``t N + i``, or images i.
        """

    def eval_loader(self, batch_size: int, accelerator: Accelerator) -> Iterable[Batch]:
        """Creates a loader of all images as they are, in order."""

    def views_loader(self, batch_size: int, accelerator: Accelerator) -> TrainLoader:
        """Creates a loader of all images in order, augmented; each epoch is another view.

        View v of image i is draw ``v N + i``, whatever the batches and the processes.
        """

    def fingerprint(self) -> str:
        """Returns a digest of the images in their order, the labels and the transform."""

    def unreadable_rows(self) -> list[int]:
        """Returns the rows of the images that this process could not read so far."""

    def huge_rows(self) -> list[int]:
        """Returns the rows of the images that Pillow warns of for their size, as far as read."""


class ImageTensors(TorchDataset[Batch]):
    """An image-classification data set as one tensor, with augmentation and normalisation.

    Args:
        images: All images, (N, 3, H, W) uint8.
        labels: Their labels, (N,) int64.
        mean: Mean of each channel, fractions of full scale, (3,).
        std: Standard deviation of each channel, (3,).
        augmentation: Applied to each batch before normalisation.
        seed: Seed of the augmentation.
        missing: Rows of images that could not be read; their target is -1.

    Shape:
        A batch is (images (B, 3, H, W) float32, targets (B,) int64).
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.25, 0.25, 0.25),
        augmentation: Augmentation | None = None,
        seed: int = 0,
        missing: Sequence[int] = (),
    ) -> None:
        rgb = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
        if not rgb or len(images) != len(labels):
            raise UsageError(
                f"images must be (N, 3, H, W) uint8 with N labels, got {tuple(images.shape)} "
                f"{images.dtype} and {len(labels)} labels"
            )
        self.images = images
        self.labels = labels
        self.size = (images.shape[2], images.shape[3])
        self.mean = torch.tensor(mean).view(-1, 1, 1) * 255
        self.std = torch.tensor(std).view(-1, 1, 1) * 255
        self.augmentation = augmentation or NoAugmentation()
        self.seed = seed
        self.missing = list(missing)
        self.unreadable: Unreadable = "skip" if self.missing else "raise"
        self._targets = labels
        if self.missing:
            self._targets = labels.clone()
            self._targets[self.missing] = UNREADABLE

    def without_augmentation(self) -> "ImageTensors":
        """Returns the same images as they are, sharing their memory."""
        plain = copy.copy(self)
        plain.augmentation = NoAugmentation()
        return plain

    def train_loader(
        self, batch_size: int, sampler: Sampler[int], accelerator: Accelerator
    ) -> TrainLoader:
        """Creates a loader of augmented images, in whole batches over all processes."""
        processes = accelerator.num_processes
        share = batch_size // processes if accelerator.split_batches else batch_size
        check_groups(sampler, share, processes)
        loader: TrainLoader = accelerator.prepare_data_loader(
            batches(self, batch_size, sampler, drop_last=True)
        )
        return loader

    def eval_loader(self, batch_size: int, accelerator: Accelerator) -> Iterable[Batch]:
        """Creates a loader of all images as they are, in order."""
        loader: Iterable[Batch] = accelerator.prepare_data_loader(
            batches(self.without_augmentation(), batch_size)
        )
        return loader

    def views_loader(self, batch_size: int, accelerator: Accelerator) -> TrainLoader:
        """Creates a loader of all images in order, augmented; each epoch is another view."""
        loader: TrainLoader = accelerator.prepare_data_loader(
            batches(self, batch_size, InOrder(len(self)))
        )
        return loader

    def fingerprint(self) -> str:
        """Returns a digest of the images in their order, the labels and the transform."""
        tensors = (self.images, self._targets, self.mean, self.std)
        parts = [digest(*map(tensor_fingerprint, tensors)), self.unreadable]
        if type(self.augmentation) is not NoAugmentation:
            parts += [described(self.augmentation), str(self.seed)]
        return digest(*parts)

    def unreadable_rows(self) -> list[int]:
        """Returns the rows of the images that could not be read."""
        return self.missing

    def huge_rows(self) -> list[int]:
        """Returns no row: :func:`decode_images` has named such images."""
        return []

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Batch]:
        # Without it, Python would count on an IndexError, and every integer is a draw.
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, draw: int) -> Batch:
        images, labels = self.__getitems__([draw])
        return images[0], labels[0]

    def __getitems__(self, draws: list[int]) -> Batch:
        """Returns a whole batch; torch's loader calls this instead of one call per image.

        Args:
            draws: Indices of images, or draws out of a
                :class:`~timm_lt.data.draws.NumberedSampler`, which are augmented independently.
        """
        draw = torch.tensor(draws)
        chosen = draw % len(self)
        images = self.images[chosen].float()
        count = self.augmentation.count
        uniforms = random_uniforms(self.seed, draw, count) if count else images
        images = self.augmentation(images, uniforms)
        return (images - self.mean) / self.std, self._targets[chosen]


def decode_images(
    dataset: Dataset, size: tuple[int, int] | None = None, *, missing: list[int] | None = None
) -> Tensor:
    """Decodes every image of a data set into one tensor.

    Args:
        dataset: With a column ``image`` that decodes to PIL images.
        size: (H, W) to which images of another size are resized, bilinear; None takes the size of
            the first that can be read.
        missing: Takes the rows of images that cannot be decoded, which are black then; with None
            such an image is an error.

    Returns:
        (N, 3, H, W) uint8.

    Raises:
        UsageError: If the data set is empty or too large to be held in memory, or an image cannot
            be decoded; the message names all such rows. Also if no image can be.
    """
    if len(dataset) == 0:
        raise UsageError("the data set has no images")
    images: np.ndarray[Any, Any] | None = None
    rejected: dict[int, tuple[str, str]] = {}
    column = dataset.features["image"]
    huge: list[str] = []
    for row, encoded in enumerate(encoded_images(dataset)):
        try:
            image = decode_column(encoded["image"], column)
        except DAMAGE as error:
            rejected[row] = image_name(encoded["image"], row), damage_of(error)
            continue
        if is_huge(image.size):
            huge.append(image_name(encoded["image"], row))
        if images is None:
            size = size or (image.height, image.width)
            images = _empty_images(len(dataset), size)
        height, width = images.shape[1:3]
        # Of an image that has the size already, this is a copy.
        images[row] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    if huge:
        log.info("%s", describe_huge(len(huge), len(dataset), huge))
    if rejected and missing is None:
        raise unreadable_images(dict(rejected.values()), len(dataset))
    if images is None:
        raise UsageError(f"none of the {len(dataset)} images can be read")
    if missing is not None:
        missing += rejected
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _empty_images(number: int, size: tuple[int, int]) -> "np.ndarray[Any, Any]":
    height, width = size
    if number * height * width * 3 > MAX_BYTES:
        raise UsageError(
            f"{number:,} images of {height}x{width} need more than "
            f"{MAX_BYTES / 2**30:.0f} GiB of memory; choose a smaller image size, or decode them "
            "when they are drawn with --data.augmentation timm"
        )
    return np.zeros((number, height, width, 3), dtype=np.uint8)


def label_tensor(dataset: Dataset) -> Tensor:
    """Returns the labels of a data set, (N,) int64, without decoding an image.

    Raises:
        UsageError: If a label is not a non-negative integer; names its row.
    """
    column = dataset.data.column("label")
    if column.null_count or not pa.types.is_integer(column.type):
        return check_labels(dataset.with_format("numpy")["label"][:])
    # Formatting the rows takes ten times as long.
    if dataset._indices is not None:
        column = column.take(dataset._indices.column(0))
    return check_labels(column.to_numpy())


def label_names(dataset: Dataset) -> list[str] | None:
    """Returns the class names of a data set, (C,), if it knows them."""
    feature = dataset.features["label"]
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def relabelled(dataset: Dataset, labels: NDArray[np.int64], names: list[str] | None) -> Dataset:
    """Returns a data set with other labels; images are not copied.

    Args:
        dataset: With a column ``label``.
        labels: The labels, (N,).
        names: Class names, (C,), if known.
    """
    rows = np.arange(len(dataset))
    if dataset._indices is not None:
        rows = dataset._indices.column(0).to_numpy()
    whole = np.zeros(len(dataset.data), np.int64)
    whole[rows] = labels
    features = dataset.features.copy()
    features["label"] = Value("int64") if names is None else ClassLabel(names=names)
    place = dataset.data.column_names.index("label")
    table = dataset.data.table.set_column(place, "label", pa.array(whole))
    table = table.replace_schema_metadata(None)
    found = Dataset(
        table,
        info=DatasetInfo(features=features),
        split=dataset.split,
        indices_table=dataset._indices,
        # Otherwise all bytes of the table are hashed.
        fingerprint=digest(dataset._fingerprint, labels.tolist(), names)[:16],
    )
    form = dataset.format
    return found.with_format(
        form["type"], form["columns"], form["output_all_columns"], **form["format_kwargs"]
    )


def batches(
    data: ImageTensors,
    batch_size: int,
    sampler: Sampler[int] | None = None,
    *,
    drop_last: bool = False,
) -> DataLoader[Batch]:
    """Creates a loader whose batches come from ``__getitems__`` as they are.

    Args:
        data: The images.
        batch_size: Images per batch, over all processes.
        sampler: Draws of images, in order; None is the order of the data set.
        drop_last: Leave out a last batch that is not full.
    """
    return DataLoader(data, batch_size, sampler=sampler, drop_last=drop_last, collate_fn=as_it_is)


def as_it_is(batch: list[Any]) -> list[Any]:
    """Returns what ``__getitems__`` returned: it is a batch already."""
    return batch
