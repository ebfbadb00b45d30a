"""Gives timm's loader another sampler, and accelerate's processes their share of its batches."""

from collections.abc import Iterable, Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderAdapter, prepare_data_loader
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import DataLoader, Sampler

from timm_lt.samplers import ClassSampler
from timm_lt.utils.checks import UsageError

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
