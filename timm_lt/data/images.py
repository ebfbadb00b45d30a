"""Image data sets in memory: decoded once, then batches at the speed of tensor indexing."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from timm_lt.data.augment import Augmentation, NoAugmentation, random_uniforms
from timm_lt.longtail import check_labels
from timm_lt.registry import UsageError

# Beyond this, decoded images do not belong in memory.
MAX_BYTES = 8 * 2**30

Batch = tuple[Tensor, Tensor]


class ImageTensors(TorchDataset[Batch]):
    """An image-classification data set as one tensor, with augmentation and normalisation.

    Args:
        images: All images, (N, 3, H, W) uint8.
        labels: Their labels, (N,) int64.
        mean: Mean of each channel, fractions of full scale, (3,).
        std: Standard deviation of each channel, (3,).
        augmentation: Applied to each batch before normalisation.
        seed: Seed of the augmentation.

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
    ) -> None:
        rgb = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
        if not rgb or len(images) != len(labels):
            raise UsageError(
                f"images must be (N, 3, H, W) uint8 with N labels, got {tuple(images.shape)} "
                f"{images.dtype} and {len(labels)} labels"
            )
        self.images = images
        self.labels = labels
        self.mean = torch.tensor(mean).view(-1, 1, 1) * 255
        self.std = torch.tensor(std).view(-1, 1, 1) * 255
        self.augmentation = augmentation or NoAugmentation()
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose augmentation the next batches show."""
        self.epoch = epoch

    def without_augmentation(self) -> "ImageTensors":
        """Returns the same images as they are, sharing their memory."""
        plain = copy.copy(self)
        plain.augmentation = NoAugmentation()
        return plain

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Returns a whole batch; torch's loader calls this instead of one call per image."""
        chosen = torch.tensor(indices)
        images = self.images[chosen].float()
        count = self.augmentation.count
        uniforms = random_uniforms(self.seed, self.epoch, chosen, count) if count else images
        images = self.augmentation(images, uniforms)
        return (images - self.mean) / self.std, self.labels[chosen]


def decode_images(dataset: Dataset, size: tuple[int, int] | None = None) -> Tensor:
    """Decodes every image of a data set into one tensor.

    Args:
        dataset: With a column ``image`` that decodes to PIL images.
        size: (H, W) to which images of another size are resized, bilinear; None takes the size of
            the first.

    Returns:
        (N, 3, H, W) uint8.

    Raises:
        UsageError: If the data set is empty or too large to be held in memory, or an image cannot
            be decoded; the message names the row.
    """
    if len(dataset) == 0:
        raise UsageError("the data set has no images")
    if size is None:
        first = next(_decoded(dataset))
        size = first.height, first.width
    height, width = size
    if len(dataset) * height * width * 3 > MAX_BYTES:
        raise UsageError(
            f"{len(dataset):,} images of {height}x{width} need more than "
            f"{MAX_BYTES / 2**30:.0f} GiB of memory; choose a smaller image size"
        )
    images = np.empty((len(dataset), height, width, 3), dtype=np.uint8)
    for row, image in enumerate(_decoded(dataset)):
        # Of an image that has the size already, this is a copy.
        images[row] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _decoded(dataset: Dataset) -> Iterator[Image.Image]:
    """Yields the images of a data set in RGB."""
    rows = iter(dataset.select_columns(["image"]))
    for row in range(len(dataset)):
        try:
            yield next(rows)["image"].convert("RGB")
        except OSError as error:
            raise UsageError(f"image {row} cannot be decoded: {error}") from error


def label_tensor(dataset: Dataset) -> Tensor:
    """Returns the labels of a data set, (N,) int64, without decoding an image.

    Raises:
        UsageError: If a label is not a non-negative integer; names its row.
    """
    return check_labels(dataset.with_format("numpy")["label"][:])


def label_names(dataset: Dataset) -> list[str] | None:
    """Returns the class names of a data set, (C,), if it knows them."""
    feature = dataset.features["label"]
    return list(feature.names) if isinstance(feature, ClassLabel) else None


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
        sampler: Order of the images; None is the order of the data set.
        drop_last: Leave out a last batch that is not full.
    """
    return DataLoader(data, batch_size, sampler=sampler, drop_last=drop_last, collate_fn=_as_it_is)


def _as_it_is(batch: list[Any]) -> list[Any]:
    # What __getitems__ returned is a batch already.
    return batch
