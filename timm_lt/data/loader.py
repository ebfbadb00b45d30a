"""timm's loader with any sampler, for one process or several.

Gives timm's loader another sampler, and accelerate's processes their share of its batches.

Numbered draws: which image, and which of all draws of the training it is.
"""

import inspect
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderAdapter, DataLoaderShard, prepare_data_loader
from accelerate.state import PartialState, is_initialized
from timm.data import FastCollateMixup
from timm.data import create_loader as timm_create_loader
from timm.data.loader import PrefetchLoader
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from timm_lt.data.columns import ImageRows, check_random_access
from timm_lt.data.items import with_transform
from timm_lt.data.labels import is_plain
from timm_lt.samplers import ClassSampler
from timm_lt.utils.accelerator import default_device
from timm_lt.utils.checks import UsageError, check_integer, unknown_name

# What a DataLoader is made of, beside its data set and the order of its images.
SETTINGS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)

# A scheduled batch: pairs of an index and the number of a size.
Batch = list[tuple[Any, int]]


class PartOfBatches(Sampler[Batch]):
    """The part of each batch of a schedule that one process shows: accelerate cannot divide them.

    Args:
        batches: The batches of all processes together, each a multiple of their number.
        rank: Number of this process.
        num_processes: Number of processes.
    """

    def __init__(self, batches: ScheduledBatchSampler, rank: int, num_processes: int) -> None:
        self.batches = batches
        self.rank, self.num_processes = rank, num_processes

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the schedule and of its sampler."""
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            part = len(batch) // self.num_processes
            yield batch[self.rank * part : (self.rank + 1) * part]


def with_sampler(
    loader: DataLoader[Any], sampler: Sampler[Any], num_batches: int | None
) -> DataLoader[Any]:
    """Returns a loader like one that was not iterated yet, with another order of its images.

    Args:
        loader: timm's, with its own sampler.
        sampler: The order.
        num_batches: timm's option of that name, for a schedule of sizes.
    """
    if isinstance(loader.batch_sampler, ScheduledBatchSampler):
        schedule = scheduled(loader.batch_sampler, sampler, num_batches)
        return rebuild(loader, batch_sampler=schedule)
    batches = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    return rebuild(loader, sampler=sampler, **batches)


def rebuild(loader: DataLoader[Any], **batches: Any) -> DataLoader[Any]:
    """Returns a loader with the same data set and settings and other batches."""
    settings = {name: getattr(loader, name) for name in SETTINGS}
    return type(loader)(loader.dataset, **batches, **settings)


def scheduled(
    like: ScheduledBatchSampler,
    sampler: Sampler[Any],
    num_batches: int | None,
    scale: int = 1,
) -> ScheduledBatchSampler:
    """Returns a schedule like another, over another sampler, batches ``scale`` times as large."""
    # A schedule begins the epoch again where it needs more images than there are.
    if isinstance(sampler, ClassSampler):
        sampler.warns_of_repetition = False
    return ScheduledBatchSampler(
        sampler,
        batch_sizes=[scale * size for size in like.batch_sizes],
        choice_weights=like.choice_weights.tolist(),
        seed=like.seed,
        drop_last=like.drop_last,
        num_batches=num_batches,
        choice_schedule=like.choice_schedule,
        schedule_epochs=like.schedule_epochs,
        schedule_spread=like.schedule_spread,
        schedule_random_mix=like.schedule_random_mix,
    )


def sampler_of(loader: DataLoader[Any]) -> Sampler[Any] | Iterable[Any]:
    """Returns the order of a loader's images."""
    batches = loader.batch_sampler
    return batches.sampler if isinstance(batches, ScheduledBatchSampler) else loader.sampler


def prepare(
    loader: DataLoader[Any], accelerator: Accelerator, num_batches: int | None
) -> DataLoaderAdapter:
    """Prepares a loader of timm with accelerate, which cannot divide the batches of a schedule.

    Raises:
        UsageError: If a batch size is no multiple of the number of processes that share it.
    """
    if isinstance(loader.batch_sampler, ScheduledBatchSampler):
        return _prepare_schedule(loader, loader.batch_sampler, accelerator, num_batches)
    _check_shared(accelerator, [loader.batch_size or 1], loader.sampler)
    return accelerator.prepare_data_loader(loader)


def _prepare_schedule(
    loader: DataLoader[Any],
    schedule: ScheduledBatchSampler,
    accelerator: Accelerator,
    num_batches: int | None,
) -> DataLoaderAdapter:
    processes = accelerator.num_processes
    if processes > 1 and not hasattr(schedule.sampler, "set_epoch"):
        raise UsageError(
            "input_size_choices over several processes needs a sampler that draws the same in each "
            "of them: pass sampler=timm_lt.create_sampler(...)"
        )
    scale = 1 if accelerator.split_batches else processes
    _check_shared(accelerator, schedule.batch_sizes, schedule.sampler)
    batches = scheduled(schedule, schedule.sampler, num_batches, scale)
    part = PartOfBatches(batches, accelerator.process_index, processes)
    return prepare_data_loader(
        rebuild(loader, batch_sampler=part),
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=accelerator.device_placement,
        rng_types=list(accelerator.rng_types),
        non_blocking=accelerator.non_blocking,
    )


def _check_shared(
    accelerator: Accelerator, batch_sizes: Iterable[int], sampler: Sampler[Any] | Iterable[Any]
) -> None:
    """Checks that accelerate can share batches of these sizes."""
    processes = accelerator.num_processes
    for size in batch_sizes:
        if accelerator.split_batches and size % processes:
            raise UsageError(
                f"batch_size {size} is shared by {processes} processes, so it must be a multiple "
                f"of {processes}"
            )
        check_groups(sampler, size // processes if accelerator.split_batches else size, processes)


def check_groups(sampler: Sampler[Any] | Iterable[Any], batch_size: int, processes: int) -> None:
    """Checks that several processes do not share draws that a sampler keeps together.

    Args:
        sampler: Order of the images.
        batch_size: Images of a batch on each process.
        processes: Number of processes.

    Raises:
        UsageError: If the batch size is not a multiple of the size of the sampler's groups.
    """
    group = getattr(sampler, "group", 1)
    if processes > 1 and batch_size % group:
        raise UsageError(
            f"the sampler draws groups of {group} images that belong together, and batches of "
            f"{batch_size} images on each of {processes} processes would divide them: make it a "
            f"multiple of {group}"
        )


OPTIONS = tuple(inspect.signature(timm_create_loader).parameters)[3:]


class Loader:
    """What :func:`create_loader` returns: timm's loader, whose epoch can be set.

    Attributes:
        loader: timm's ``PrefetchLoader``, or a ``DataLoader`` if ``use_prefetcher`` is False; with
            an accelerator, what it prepared.
        sampler: The order of the images.
    """

    def __init__(
        self,
        inner: DataLoader[Any],
        prefetcher: PrefetchLoader | None,
        accelerator: Accelerator | None,
        num_batches: int | None,
    ) -> None:
        self.sampler: Any = sampler_of(inner)
        self.loader: Any = inner if prefetcher is None else prefetcher
        if accelerator is not None:
            prepared = prepare(inner, accelerator, num_batches)
            inner = prepared.base_dataloader
            if prefetcher is not None:
                # Below what accelerate made, not above: accelerate notes the end of the data as a
                # batch leaves its loader, and a prefetcher above it would read one ahead.
                prepared.base_dataloader = prefetcher
            self.loader = prepared
        if prefetcher is not None:
            prefetcher.loader = inner
        self._inner = inner
        self._prefetcher = prefetcher
        self._prepared = accelerator is not None

    def set_epoch(self, epoch: int) -> None:
        """Chooses the 0-based epoch that the next iteration shows.

        It reaches the sampler, the schedule of sizes and the data set, where they have epochs, and
        accelerate, which otherwise goes on counting by itself. ``use_multi_epochs_loader`` draws
        ahead: its epochs follow one another from the one that was set first. Persistent workers
        have copies of the data set, which are not reached.
        """
        epoch = check_integer("epoch", epoch, minimum=0)
        parts: tuple[Any, ...] = (self.sampler, self.batch_sampler, self.dataset, self.loader)
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def normalize_by_rows(self, width: int) -> None:
        """Lets timm normalise batches with the channels last in memory row by row.

        Pixel by pixel, three values at a time, it would take twice the time of a batch with the
        channels first. The result is the same.

        Args:
            width: Of all images.
        """
        if self._prefetcher is None:
            return
        for name in ("mean", "std"):
            of_channels = getattr(self._prefetcher, name)
            of_row = of_channels.expand(-1, -1, -1, width)
            setattr(self._prefetcher, name, of_row.contiguous(memory_format=torch.channels_last))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self._prepared:
            _check_processes(self.sampler)
        for batch in self.loader:
            # Accelerate takes it from the length of the data set; the sampler's may be another.
            shard = isinstance(self.loader, DataLoaderShard) and self.loader.remainder >= 0
            if shard and hasattr(self.sampler, "__len__"):
                self.loader.remainder = len(self.sampler) % self.loader.total_batch_size
            yield batch

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def dataset(self) -> Dataset[Any]:
        """The data set, with the transform that timm gave it."""
        return self._inner.dataset

    @property
    def batch_sampler(self) -> Sampler[Any] | Iterable[Any] | None:
        """What makes batches of the sampler's indices."""
        return self._inner.batch_sampler

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are mixed; can be set if ``collate_fn`` is a ``FastCollateMixup``."""
        mixup = self._inner.collate_fn
        return isinstance(mixup, FastCollateMixup) and mixup.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        mixup = self._inner.collate_fn
        if isinstance(mixup, FastCollateMixup) and mixup.mixup_enabled != enabled:
            mixup.mixup_enabled = enabled
            # Persistent workers have a copy of their own: the next iteration starts new ones.
            self._inner._iterator = None


def create_loader(
    dataset: Dataset[Any] | datasets.Dataset,
    input_size: int | tuple[int, int] | tuple[int, int, int],
    batch_size: int,
    *,
    sampler: Sampler[Any] | None = None,
    accelerator: Accelerator | None = None,
    background: str | Sequence[int] | None = None,
    **options: Any,
) -> Loader:
    """Creates timm's loader, with all of its options, over any sampler.

    Augmentation, mixup (``collate_fn=timm.data.FastCollateMixup(...)``), prefetcher, persistent
    workers, scheduled sizes and the rest are timm's own. With ``is_training=True`` a last batch
    that is not full is left out, as in timm; otherwise every image of the sampler is shown.

    Several processes, one of:

    - ``accelerator=``: each process shows its share of the batches. The batch size counts images
      over all processes if the accelerator splits batches (``split_batches=True``, as in timm_lt's
      own training), and the images of each process if not (accelerate's default). Call
      ``loader.set_epoch``, not that of the sampler, before each epoch. ``gather_for_metrics``
      gives each image of an evaluation once.
    - ``distributed=True`` with torch.distributed and no accelerate: the batch size is each
      process's. A timm_lt sampler becomes that of this process (``sampler.shard``); any other must
      be shared already, as torch's DistributedSampler is.

    Args:
        dataset: With random access and a ``transform`` that timm sets, such as timm's
            ``ImageDataset`` or one of torchvision; a ``datasets.Dataset`` of images and labels; or
            whatever else has items of an image (of PIL, a path, or uint8) and its label, such as a
            ``Subset`` or a list of pairs. Of these the loader itself transforms the images; with
            ``use_prefetcher=False``, floating-point tensors stay as they are.
        input_size: Of the images, (channels, height, width), (height, width) or the side.
        batch_size: Images per batch.
        sampler: Order of the images; None is timm's own: random in training, else in order.
        accelerator: Prepares the loader; do not prepare it again.
        background: Colour behind transparent pixels of a ``datasets.Dataset``, such as ``"black"``
            or ``"#808080"``; None is white. Other data sets decode their images themselves:
            torchvision's ``ImageFolder`` as a run does with ``loader=timm_lt.load_image``.
        **options: Those of ``timm.data.create_loader``. ``device`` is the accelerator's; without
            one, the device that accelerate would compute on.

    Raises:
        UsageError: If an option is unknown or does not go with another, the sampler is not of this
            data set, not shared among the processes, or too short for one batch; or the data set is
            a stream of the ``datasets`` library.
    """
    check_random_access(dataset)
    _check_options(options, sampler, accelerator)
    options["device"] = _device(options.get("device"), accelerator)
    if isinstance(dataset, datasets.Dataset) and is_plain(dataset):
        images: Any = ImageRows(dataset.with_format(None), background=background)
    elif background is not None:
        raise UsageError(
            f"background only applies to a datasets.Dataset that decodes its images; a "
            f"{type(dataset).__name__} with a way of its own reads them as it does, such as with "
            "timm_lt.load_image"
        )
    else:
        # The prefetcher takes whatever it is given for uint8.
        prefetches = options.get("use_prefetcher", True)
        images = with_transform(dataset, takes_tensors=not prefetches)
    if sampler is not None:
        _check_sampler(sampler, images)
        if options.get("distributed"):
            _share_among_ranks(sampler)
    if not isinstance(images, IterableDataset) and len(images) == 0:
        raise UsageError(f"the {type(dataset).__name__} has no images")
    loader = timm_create_loader(images, input_size, batch_size, **options)
    inner = loader.loader if isinstance(loader, PrefetchLoader) else loader
    if sampler is not None:
        inner = with_sampler(inner, sampler, options.get("num_batches"))
    prefetcher = loader if isinstance(loader, PrefetchLoader) else None
    shown = Loader(inner, prefetcher, accelerator, options.get("num_batches"))
    if not isinstance(images, IterableDataset) and len(shown) == 0:
        raise UsageError(
            f"the {len(shown.sampler)} images of an epoch do not fill a batch of {batch_size} in "
            "every process, and in training only full batches are shown"
        )
    return shown


def _check_options(
    options: dict[str, Any], sampler: Sampler[Any] | None, accelerator: Accelerator | None
) -> None:
    for name in options:
        if name not in OPTIONS:
            raise unknown_name("option of create_loader:", name, list(OPTIONS))
    if accelerator is not None and options.get("distributed"):
        raise UsageError("accelerator= shares the batches itself: leave out distributed=True")
    if accelerator is not None and options.get("use_multi_epochs_loader"):
        raise UsageError(
            "use_multi_epochs_loader does not go with accelerator=: take persistent_workers=True"
        )
    if options.get("num_aug_repeats") and (sampler is not None or accelerator is not None):
        raise UsageError(
            "num_aug_repeats is a sampler of timm's own, for distributed=True: leave it out or "
            "leave out sampler= and accelerator="
        )
    if accelerator is None and not options.get("distributed"):
        _check_processes(sampler)


def _check_processes(sampler: object) -> None:
    """Checks that a sampler is not to show every process of accelerate the same images."""
    processes = PartialState().num_processes if is_initialized() else 1
    if isinstance(sampler, ClassSampler) and sampler.num_replicas == 1 and processes > 1:
        raise UsageError(
            f"accelerate runs {processes} processes, and each of them would show all images: pass "
            "accelerator= to create_loader"
        )


def _check_sampler(sampler: Sampler[Any], dataset: Dataset[Any]) -> None:
    if isinstance(dataset, IterableDataset):
        raise UsageError(
            f"a sampler needs a data set with random access, and {type(dataset).__name__} is read "
            "in its own order"
        )
    if not isinstance(sampler, ClassSampler):
        return
    num_labels, num_images = int(sampler.class_counts.sum()), len(dataset)  # type: ignore[arg-type]
    if num_labels != num_images:
        raise UsageError(
            f"the sampler was created from {num_labels} labels, but the data set has {num_images} "
            "images: pass dataset_labels(dataset) to create_sampler"
        )


def _share_among_ranks(sampler: Sampler[Any]) -> None:
    if not dist.is_initialized():
        raise UsageError("distributed=True needs torch.distributed.init_process_group first")
    if not hasattr(sampler, "num_replicas"):
        raise UsageError(
            f"with distributed=True every process would draw the same from a "
            f"{type(sampler).__name__}: pass a sampler of timm_lt or a DistributedSampler"
        )
    if isinstance(sampler, ClassSampler) and sampler.num_replicas == 1:
        sampler.shard(dist.get_rank(), dist.get_world_size())


def _device(device: torch.device | str | None, accelerator: Accelerator | None) -> torch.device:
    if accelerator is None:
        return default_device() if device is None else torch.device(device)
    if device is not None and torch.device(device) != accelerator.device:
        raise UsageError(f"device={device} is not the accelerator's, {accelerator.device}")
    return torch.device(accelerator.device)


class NumberedSampler(Sampler[int]):
    """Gives every draw of a sampler a number, so that its augmentation can depend on it.

    A class-balanced epoch draws a rare image many times: each of these draws is to be augmented
    differently, but the same on every process and after a restart. A draw is one integer, ``t N +
    i``: ``i`` is the image, of N, and ``t`` counts the draws from the first epoch on.

    Args:
        sampler: The order of the images.
        num_images: N.
        length: Draws per epoch; the rest of each epoch of the sampler is left out.

    >>> from timm_lt.samplers import create_sampler
    >>> sampler = NumberedSampler(create_sampler("instance_balanced", [0, 1, 2]), 3, 2)
    >>> sampler.set_epoch(5)
    >>> [draw // 3 for draw in sampler]
    [10, 11]
    """

    def __init__(self, sampler: ClassSampler, num_images: int, length: int) -> None:
        self.sampler = sampler
        self.num_images = num_images
        self.length = length

    @property
    def group(self) -> int:
        """Consecutive draws that stay together on a process."""
        return self.sampler.group

    def set_epoch(self, epoch: int) -> None:
        """Chooses the 0-based epoch that the next iteration draws."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        first = self.sampler.epoch * self.length * self.num_images
        numbers = itertools.count(first, self.num_images)
        images = itertools.islice(self.sampler, self.length)
        return map(operator.add, images, numbers)


class InOrder(Sampler[int]):
    """Shows every image once, in the order of the data set; each epoch is another view of them.

    View v of image i, of N, is draw ``v N + i``, whatever came before: its augmentation depends on
    nothing else.

    Args:
        num_images: N.

    >>> sampler = InOrder(3)
    >>> sampler.set_epoch(2)
    >>> list(sampler)
    [6, 7, 8]
    """

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self.view = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the 0-based view that the next iteration shows."""
        self.view = epoch

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[int]:
        first = self.view * self.num_images
        return iter(range(first, first + self.num_images))
