"""Image data sets that are decoded when they are drawn, with all that timm does to an image."""

import copy
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from timm.data.loader import fast_collate
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler, get_worker_info

from timm_lt.data.described import described, tensor_fingerprint
from timm_lt.data.draws import InOrder
from timm_lt.data.fingerprint import digest, images_fingerprint
from timm_lt.data.images import Batch, TrainLoader
from timm_lt.data.loader import Loader, create_loader
from timm_lt.data.reading import UNREADABLE, Unreadable, encoded_images, is_huge, read_image
from timm_lt.samplers.arithmetic import keyed
from timm_lt.utils.checks import UsageError

# Options of create_loader that training sets.
OURS = (
    *("dataset", "input_size", "batch_size", "sampler", "accelerator", "is_training"),
    *("num_workers", "pin_memory", "device", "distributed"),
    *("mean", "std", "crop_pct", "num_aug_splits", "num_aug_repeats"),
)


class StoredImages(TorchDataset[tuple[Any, int]]):
    """An image-classification data set whose images go through timm's transforms one by one.

    What is random about a draw is a function of (seed, draw), whatever process or worker makes it.

    Args:
        dataset: With a column ``image`` that decodes to PIL images.
        labels: Their labels, (N,) int64.
        size: (H, W) of the images in a batch.
        preprocessing: timm's data config of the model: mean, std, interpolation, crop_pct.
        augmentation: Further arguments of ``timm.data.create_loader`` for training, e.g.
            ``{"auto_augment": "rand-m9-mstd0.5"}``.
        seed: Seed of the augmentation.
        workers: Processes that decode, for each process that trains; 0 decodes in that one.
        unreadable: What happens to an image that cannot be read.
        name: What the data set is called in messages.
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
        self.dataset = dataset
        self.name = name
        self.labels = labels
        self.size = size
        self.unreadable: Unreadable = unreadable
        self.transform: Any = None
        self.augmented = False
        self._encoded, self._column = encoded_images(dataset), dataset.features["image"]
        self._preprocessing = dict(preprocessing)
        self._augmentation = dict(augmentation or {})
        self._key = np.random.SeedSequence(seed).generate_state(1, np.uint64).astype(np.uint64)
        self._workers = workers
        # Shared with the workers, which find them.
        self._missing = torch.zeros(len(labels), dtype=torch.bool).share_memory_()
        self._huge = torch.zeros(len(labels), dtype=torch.bool).share_memory_()
        self._check()

    def _check(self) -> None:
        for name in OURS:
            if name in self._augmentation:
                raise UsageError(f"augmentation option {name!r} is set elsewhere: leave it out")
        options = self._preprocessing | self._augmentation
        try:
            create_loader(copy.copy(self), (3, *self.size), 1, is_training=True, **options)
        except UsageError:
            raise
        except (AssertionError, TypeError, ValueError, KeyError) as error:
            raise UsageError(
                f"timm takes no augmentation {self._augmentation}: {error or type(error).__name__}"
            ) from error

    def train_loader(
        self, batch_size: int, sampler: Sampler[int], accelerator: Accelerator
    ) -> TrainLoader:
        """Creates a loader of augmented images, in whole batches over all processes."""
        options = self._preprocessing | self._augmentation
        return self._loader(batch_size, accelerator, sampler=sampler, is_training=True, **options)

    def eval_loader(self, batch_size: int, accelerator: Accelerator) -> Iterable[Batch]:
        """Creates a loader of all images in order, with timm's transform for evaluation."""
        # Workers of a second loader would lie idle while the first is read.
        return self._loader(
            batch_size, accelerator, persistent_workers=False, **self._preprocessing
        )

    def views_loader(self, batch_size: int, accelerator: Accelerator) -> TrainLoader:
        """Creates a loader of all images in order, augmented; each epoch is another view."""
        if self._augmentation.get("input_size_choices"):
            raise UsageError("views of images of several sizes: leave out input_size_choices")
        options = self._preprocessing | self._augmentation
        if options.get("re_prob"):
            # Beside the transform, what is erased would not be a function of the draw.
            options["use_prefetcher"] = False
        size = (3, *self.size)
        augmented = create_loader(copy.copy(self), size, 1, is_training=True, **options)
        # Not in training, where a last batch that is not full would be left out.
        loader = self._loader(
            batch_size,
            accelerator,
            sampler=InOrder(len(self)),
            persistent_workers=False,
            **options,
        )
        shown: Any = loader.dataset
        shown.transform, shown.augmented = cast(Any, augmented.dataset).transform, True
        return loader

    def fingerprint(self) -> str:
        """Returns a digest of the images in their order, the labels and the transform."""
        parts = [images_fingerprint(self.dataset), tensor_fingerprint(self.labels), *self.size]
        parts += [self._preprocessing, described(self.transform), self.unreadable]
        if self.augmented:
            parts += [self._augmentation, str(self._key)]
        return digest(*parts)

    def _loader(self, batch_size: int, accelerator: Accelerator, **options: Any) -> Loader:
        if options.get("use_prefetcher", True):
            options.setdefault("collate_fn", collate)
        # create_loader gives the data set its transform.
        loader = create_loader(
            copy.copy(self),
            (3, *self.size),
            batch_size,
            accelerator=accelerator,
            num_workers=self._workers,
            pin_memory=accelerator.device.type == "cuda",
            **options,
        )
        if options.get("collate_fn") is collate and not options.get("input_size_choices"):
            loader.normalize_by_rows(self.size[1])
        return loader

    def unreadable_rows(self) -> list[int]:
        """Returns the rows of the images that this process and its workers could not read."""
        rows: list[int] = self._missing.nonzero().flatten().tolist()
        return rows

    def huge_rows(self) -> list[int]:
        """Returns the rows of the images that Pillow warns of for their size."""
        rows: list[int] = self._huge.nonzero().flatten().tolist()
        return rows

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        # Without it, Python would count on an IndexError, and every integer is a draw.
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, draw: int) -> tuple[Any, int]:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: list[int]) -> list[tuple[Any, int]]:
        """Returns the images of a batch; torch's loader calls this instead of one call per image.

        Args:
            draws: Rows, or draws out of a :class:`~timm_lt.data.draws.NumberedSampler`, which are
                augmented independently.
        """
        number = len(self)
        rows = [draw % number for draw in draws]
        targets = self.labels[rows].tolist()
        seeds = keyed(self._key, np.array(draws, np.int64)).tolist()
        pairs = []
        with _random_states_kept():
            for place, encoded in enumerate(self._encoded[rows]["image"]):
                try:
                    image = read_image(encoded, rows[place], self._column)
                    if is_huge(image.size):
                        self._huge[rows[place]] = True
                except UsageError as error:
                    if self.unreadable == "raise":
                        raise UsageError(f"{self.name}: {error}") from error
                    self._missing[rows[place]] = True
                    image, targets[place] = Image.new("RGB", self.size[::-1]), UNREADABLE
                if self.transform is not None:
                    _seed(seeds[place])
                    image = self.transform(image)
                pairs.append((image, targets[place]))
        return pairs


def collate(batch: list[tuple[Any, int]]) -> Batch:
    """Returns what timm's collate function does, with the channels last in memory."""
    if not isinstance(batch[0][0], Tensor):
        # Of a transform that is not timm's.
        collated: Batch = fast_collate(batch)
        return collated
    # Pillow has the channels last, and so has the model: they are never moved.
    images = torch.stack([image.permute(1, 2, 0) for image, _ in batch])
    return images.permute(0, 3, 1, 2), torch.tensor([target for _, target in batch])


def _seed(word: int) -> None:
    """Makes all that timm's transforms draw a function of a 64-bit word."""
    random.seed(word)
    # Given the same 32 bits, NumPy and torch would draw the same.
    np.random.seed(word & 0xFFFFFFFF)  # noqa: NPY002
    torch.default_generator.manual_seed(word >> 32)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Restores the global states that timm's transforms draw from."""
    if get_worker_info() is not None:
        # A worker has them for nothing else.
        yield
        return
    of_python, of_torch = random.getstate(), torch.get_rng_state()
    of_numpy = np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(of_python)
        torch.set_rng_state(of_torch)
        np.random.set_state(of_numpy)  # noqa: NPY002
