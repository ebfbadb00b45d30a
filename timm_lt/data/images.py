"""Images ready for training: in memory as one tensor, or decoded when they are drawn."""

import copy
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetInfo
from datasets.fingerprint import generate_random_fingerprint
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from timm_lt.data.augment import Augmentation, NoAugmentation, random_uniforms
from timm_lt.data.decode import (
    UNREADABLE,
    ImageError,
    Unreadable,
    decode_column,
    describe_huge,
    encoded_images,
    image_name,
    is_huge,
    unreadable_images,
)
from timm_lt.data.items import described, digest, images_fingerprint, tensor_fingerprint
from timm_lt.data.loader import InOrder, Loader, create_loader
from timm_lt.data.sources import label_feature
from timm_lt.samplers.streams import keyed
from timm_lt.utils.accelerator import kept_random_state
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import log
from timm_lt.utils.longtail import check_labels

# Largest size of a data set that is decoded into memory.
MAX_BYTES = 8 * 2**30
# Options of create_loader that training sets.
RESERVED = (
    *("dataset", "input_size", "batch_size", "sampler", "accelerator", "is_training"),
    *("num_workers", "pin_memory", "device", "distributed"),
    *("mean", "std", "crop_pct", "num_aug_splits", "num_aug_repeats"),
)

Batch = tuple[Tensor, Tensor]
Order = Sampler[int] | None
Purpose = Literal["train", "eval", "views"]


class Images(TorchDataset[Any], ABC):
    """An image data set for training, in memory or not; its items are draws.

    A draw is ``t N + i``: draw t of image i, of N. It is augmented the same in every batch, process
    and worker. An image that cannot be read is an error, or has the target -1.
    """

    def __init__(self, labels: Tensor, size: tuple[int, int], unreadable: Unreadable) -> None:
        self.labels, self.size = labels, size
        self.unreadable: Unreadable = unreadable
        # Shared with the workers, which write to them.
        self._missing = torch.zeros(len(labels), dtype=torch.bool).share_memory_()
        self._huge = torch.zeros(len(labels), dtype=torch.bool).share_memory_()

    def train_loader(
        self, batch_size: int, sampler: Sampler[int], accelerator: Accelerator
    ) -> Loader:
        """Creates a loader of augmented images, in whole batches over all processes."""
        return self._loader("train", batch_size, sampler, accelerator)

    def eval_loader(self, batch_size: int, accelerator: Accelerator) -> Loader:
        """Creates a loader of all images in order, not augmented."""
        return self._loader("eval", batch_size, None, accelerator)

    def views_loader(self, batch_size: int, accelerator: Accelerator) -> Loader:
        """Creates a loader of all images in order; view v of image i is its draw ``v N + i``."""
        return self._loader("views", batch_size, InOrder(len(self)), accelerator)

    @abstractmethod
    def _loader(
        self, purpose: Purpose, batch_size: int, sampler: Order, accelerator: Accelerator
    ) -> Loader:
        """Creates a loader; in training, a last batch that is not full is dropped."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Returns a digest of the images in their order, the labels and the transform."""

    def unreadable_rows(self) -> list[int]:
        """Returns the rows of the images that this process and its workers could not read."""
        return [int(row) for row in self._missing.nonzero()]

    def huge_rows(self) -> list[int]:
        """Returns the rows of the images read from files that Pillow warns of for their size."""
        return [int(row) for row in self._huge.nonzero()]

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Any]:
        # Python would wait for an IndexError, and every integer is a draw.
        return map(self.__getitem__, range(len(self)))


class ImageTensors(Images):
    """Images (N, 3, H, W), uint8, in memory, which are augmented and normalised when drawn.

    The mean and std of each channel are fractions of full scale. The target of a ``missing`` row,
    an image that could not be read, is -1.
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
        super().__init__(labels, (images.shape[2], images.shape[3]), "skip" if missing else "raise")
        self.images = images
        self.mean = torch.tensor(mean).view(-1, 1, 1) * 255
        self.std = torch.tensor(std).view(-1, 1, 1) * 255
        self.augmentation = augmentation or NoAugmentation()
        self.seed = seed
        self._missing[list(missing)] = True
        self._targets = labels.masked_fill(self._missing, UNREADABLE)

    def _loader(
        self, purpose: Purpose, batch_size: int, sampler: Order, accelerator: Accelerator
    ) -> Loader:
        data = copy.copy(self)
        data.augmentation = NoAugmentation() if purpose == "eval" else self.augmentation
        # The result of __getitems__ is a batch already.
        loader: DataLoader[Batch] = DataLoader(
            data, batch_size, sampler=sampler, drop_last=purpose == "train", collate_fn=tuple
        )
        return Loader(loader, None, accelerator)

    def fingerprint(self) -> str:
        """Returns a digest of the images in their order, the labels and the transform."""
        tensors = (self.images, self._targets, self.mean, self.std)
        parts = [*map(tensor_fingerprint, tensors), self.unreadable]
        if type(self.augmentation) is not NoAugmentation:
            parts += [described(self.augmentation), str(self.seed)]
        return digest(*parts)

    def __getitem__(self, draw: int) -> Batch:
        images, labels = self.__getitems__([draw])
        return images[0], labels[0]

    def __getitems__(self, draws: list[int]) -> Batch:
        """Returns a whole batch."""
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
    """Decodes the column ``image`` into one tensor, (N, 3, H, W) uint8, all of the first's size.

    The list ``missing`` receives the rows of images that cannot be decoded, which become black.
    """
    images: NDArray[np.uint8] | None = None
    reasons: dict[str, str] = {}
    unread, huge, column = [], [], dataset.features["image"]
    for row, encoded in enumerate(encoded_images(dataset)):
        name = image_name(encoded["image"], row)
        try:
            image = decode_column(encoded["image"], column)
        except ImageError as error:
            reasons[name] = str(error)
            unread.append(row)
            continue
        if is_huge(image.size):
            huge.append(name)
        if images is None:
            height, width = size or (image.height, image.width)
            if len(dataset) * height * width * 3 > MAX_BYTES:
                raise UsageError(
                    f"{len(dataset):,} images of {height}x{width} need more than "
                    f"{MAX_BYTES / 2**30:.0f} GiB of memory; choose a smaller image size, or "
                    "decode them when they are drawn with --data.augmentation timm"
                )
            images = np.zeros((len(dataset), height, width, 3), np.uint8)
        # For an image that has the size already, this is a copy.
        images[row] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    if huge:
        log.info("%s", describe_huge(len(huge), len(dataset), huge))
    if reasons and missing is None:
        raise unreadable_images(reasons, len(dataset))
    if images is None:
        raise UsageError(f"none of the {len(dataset)} images can be read")
    if missing is not None:
        missing += unread
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def label_tensor(dataset: Dataset) -> Tensor:
    """Returns the labels of a data set, (N,) int64, without decoding an image."""
    # Formatting the rows takes ten times as long.
    column = dataset.data.column("label")
    if dataset._indices is not None:
        column = column.take(dataset._indices.column(0))
    return check_labels(column.to_numpy())


def label_names(dataset: Dataset) -> list[str] | None:
    """Returns the class names of a data set, (C,), if they are known."""
    feature = dataset.features["label"]
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def relabelled(dataset: Dataset, labels: NDArray[np.int64], names: list[str] | None) -> Dataset:
    """Returns a data set with other labels (N,) and class names (C,); images are not copied."""
    whole, selected = np.zeros(len(dataset.data), np.int64), dataset._indices
    whole[slice(None) if selected is None else selected.column(0).to_numpy()] = labels
    features = dataset.features.copy()
    features["label"] = label_feature(names)
    index = dataset.data.column_names.index("label")
    table = dataset.data.table.set_column(index, "label", pa.array(whole))
    found = Dataset(
        table.replace_schema_metadata(None),
        info=DatasetInfo(features=features),
        indices_table=selected,
        # Otherwise all bytes of the table are hashed.
        fingerprint=generate_random_fingerprint(),
    )
    form = dict(dataset.format)
    return found.with_format(**form.pop("format_kwargs"), **form)


class StoredImages(Images):
    """Images of a data set, which are decoded and transformed by timm when drawn.

    Random numbers of timm's transforms are a function of (seed, draw), in any process and worker.

    Args:
        dataset: With a column ``image``.
        labels: Their labels, (N,) int64.
        size: (H, W) of the images in a batch.
        preprocessing: timm's data config of the model: mean, std, interpolation, crop_pct.
        augmentation: More arguments of ``timm.data.create_loader`` for training.
        seed: Seed of the augmentation.
        workers: Processes that decode, for each process that trains.
        unreadable: ``"raise"`` or ``"skip"`` images that cannot be read.
        name: Name of the data set in messages.
    """

    def __init__(
        self,
        dataset: Dataset,
        labels: Tensor,
        *,
        size: tuple[int, int],
        preprocessing: Mapping[str, Any],
        augmentation: Mapping[str, Any] | None = None,
        seed: int = 0,
        workers: int = 0,
        unreadable: Unreadable = "raise",
        name: str = "data set",
    ) -> None:
        super().__init__(labels, size, unreadable)
        self.dataset, self.name = dataset, name
        self.transform: Any = None
        self._views = False
        self._encoded, self._column = encoded_images(dataset), dataset.features["image"]
        self._preprocessing = dict(preprocessing)
        self._augmentation = dict(augmentation or {})
        self._key = np.random.SeedSequence(seed).generate_state(1, np.uint64).astype(np.uint64)
        self._workers = workers
        try:
            if reserved := self._augmentation.keys() & RESERVED:
                raise ValueError(f"{min(reserved)!r} is set automatically; remove it")
            options = self._preprocessing | self._augmentation
            create_loader(copy.copy(self), (3, *size), 1, is_training=True, **options)
        except (AssertionError, TypeError, ValueError, KeyError) as error:
            reason = error if str(error) else type(error).__name__
            raise UsageError(f"augmentation {self._augmentation} is not valid: {reason}") from error

    def _loader(
        self, purpose: Purpose, batch_size: int, sampler: Order, accelerator: Accelerator
    ) -> Loader:
        options = self._preprocessing | ({} if purpose == "eval" else self._augmentation)
        if purpose != "train":
            # Workers for evaluation would stay alive, and idle, during training.
            options["persistent_workers"] = False
        if purpose == "views" and options.get("re_prob"):
            # Erasing in the prefetcher would not be a function of the draw.
            options["use_prefetcher"] = False
        # create_loader sets the transform of the data set.
        data = copy.copy(self)
        data._views = purpose == "views"
        return create_loader(
            data,
            (3, *self.size),
            batch_size,
            sampler=sampler,
            accelerator=accelerator,
            is_training=purpose != "eval",
            num_workers=self._workers,
            pin_memory=accelerator.device.type == "cuda",
            **options,
        )

    def fingerprint(self) -> str:
        """Returns a digest of the images in their order, the labels and the transform."""
        options = [self.size, self._preprocessing, self.transform, self.unreadable]
        if self._views:
            options += [self._augmentation, str(self._key)]
        images = images_fingerprint(self.dataset)
        return digest(images, tensor_fingerprint(self.labels), described(options))

    def __getitem__(self, draw: int) -> tuple[Any, int]:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: list[int]) -> list[tuple[Any, int]]:
        """Returns the images and targets of several draws."""
        rows = [draw % len(self) for draw in draws]
        seeds = keyed(self._key, np.array(draws, np.int64)).tolist()
        stored = self._encoded[rows]["image"]
        # A worker uses its random states for nothing else.
        with kept_random_state() if get_worker_info() is None else nullcontext():
            return [self._item(*part) for part in zip(rows, stored, seeds, strict=True)]

    def _item(self, row: int, encoded: Any, seed: int) -> tuple[Any, int]:  # noqa: ANN401
        target = int(self.labels[row])
        try:
            image = decode_column(encoded, self._column)
            self._huge[row] |= is_huge(image.size)
        except ImageError as error:
            if self.unreadable == "raise":
                name = f"{self.name}: {image_name(encoded, row)}"
                raise unreadable_images({name: str(error)}) from error
            self._missing[row] = True
            image, target = Image.new("RGB", self.size[::-1]), UNREADABLE
        if self.transform is not None:
            _seed(seed)
            image = self.transform(image)
        return image, target


def _seed(word: int) -> None:
    """Makes all random numbers of timm's transforms a function of a 64-bit word."""
    random.seed(word)
    # With the same 32 bits, NumPy and torch would draw the same.
    np.random.seed(word & 0xFFFFFFFF)  # noqa: NPY002
    torch.default_generator.manual_seed(word >> 32)
