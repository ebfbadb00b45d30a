"""Image data sets that are decoded when they are drawn, with all that timm does to an image."""

import copy
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler, get_worker_info

from timm_lt.data.images import Batch, TrainLoader
from timm_lt.data.loader import Loader, create_loader
from timm_lt.data.reading import UNREADABLE, Unreadable, read_image
from timm_lt.registry import UsageError

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
        self._preprocessing = dict(preprocessing)
        self._augmentation = dict(augmentation or {})
        self._seed = seed
        self._workers = workers
        # Shared with the workers, which find them.
        self._missing = torch.zeros(len(labels), dtype=torch.bool).share_memory_()
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

    def _loader(self, batch_size: int, accelerator: Accelerator, **options: Any) -> Loader:
        # create_loader gives the data set its transform.
        return create_loader(
            copy.copy(self),
            (3, *self.size),
            batch_size,
            accelerator=accelerator,
            num_workers=self._workers,
            pin_memory=accelerator.device.type == "cuda",
            **options,
        )

    def unreadable_rows(self) -> list[int]:
        """Returns the rows of the images that this process and its workers could not read."""
        rows: list[int] = self._missing.nonzero().flatten().tolist()
        return rows

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        # Without it, Python would count on an IndexError, and every integer is a draw.
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, draw: int) -> tuple[Any, int]:
        row = draw % len(self)
        target = int(self.labels[row])
        try:
            image = read_image(self.dataset, row)
        except UsageError as error:
            if self.unreadable == "raise":
                raise UsageError(f"{self.name}: {error}") from error
            self._missing[row] = True
            image, target = Image.new("RGB", self.size[::-1]), UNREADABLE
        if self.transform is None:
            return image, target
        with _seeded(self._seed, draw):
            return self.transform(image), target


@contextmanager
def _seeded(seed: int, draw: int) -> Iterator[None]:
    """Makes all that timm's transforms draw from a function of (seed, draw)."""
    alone = get_worker_info() is None
    # A worker has its random state for nothing else.
    kept = _random_states() if alone else None
    words = np.random.SeedSequence([seed, draw]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])  # noqa: NPY002
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        if kept is not None:
            random.setstate(kept[0])
            np.random.set_state(kept[1])  # noqa: NPY002
            torch.set_rng_state(kept[2])


def _random_states() -> tuple[Any, Any, Tensor]:
    """Returns the global states that timm's transforms draw from."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
