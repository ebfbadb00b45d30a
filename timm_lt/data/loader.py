"""timm's loader with any sampler, in one process or several, and errors of its workers."""

import inspect
import itertools
import multiprocessing
import operator
import traceback
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import datasets
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.state import PartialState, is_initialized
from timm.data import FastCollateMixup
from timm.data import create_loader as timm_create_loader
from timm.data.loader import PrefetchLoader
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from timm_lt.data.decode import CAUGHT, is_worker_death
from timm_lt.data.items import ImageRows, check_dataset, is_plain, with_transform
from timm_lt.samplers import ClassSampler
from timm_lt.utils.accelerator import default_device
from timm_lt.utils.checks import UsageError, check_choice

OPTIONS = tuple(inspect.signature(timm_create_loader).parameters)[3:]
# Options that conflict with a sampler or an accelerator.
CONFLICTS = {
    "sampler": ("num_aug_repeats",),
    "accelerator": ("distributed", "use_multi_epochs_loader", "num_aug_repeats", "device"),
}
# Settings of a DataLoader, and of a schedule of sizes, that are kept with another sampler.
SETTINGS = ("num_workers", "collate_fn", "pin_memory", "worker_init_fn", "persistent_workers")
SCHEDULE = (
    *("batch_sizes", "choice_weights", "seed", "drop_last", "choice_schedule"),
    *("schedule_epochs", "schedule_spread", "schedule_random_mix"),
)
RESUME = "go on with --resume"
# Errors in the main process when a worker dies while it sends a batch.
CUT_OFF = (EOFError, ConnectionError, FileNotFoundError)

T = TypeVar("T")


class Loader:
    """timm's loader with a sampler; see :func:`create_loader`.

    Attributes:
        loader: timm's ``PrefetchLoader``, or a ``DataLoader`` if ``use_prefetcher`` is False; with
            an accelerator, the loader that it prepared.
        sampler: Order of the images.
    """

    def __init__(
        self,
        inner: DataLoader[Any],
        prefetcher: PrefetchLoader | None,
        accelerator: Accelerator | None,
    ) -> None:
        batches: Any = inner.batch_sampler
        is_scheduled = isinstance(batches, ScheduledBatchSampler)
        self.sampler: Any = batches.sampler if is_scheduled else inner.sampler
        self.loader: Any = inner if prefetcher is None else prefetcher
        if accelerator is not None:
            prepared = prepared_loader(inner, accelerator)
            inner = prepared.base_dataloader
            if prefetcher is not None:
                # Inside accelerate's loader. Outside, the prefetcher's one-batch lookahead would
                # make accelerate set `end_of_dataloader` too early.
                prepared.base_dataloader = prefetcher
            self.loader = prepared
        if prefetcher is not None:
            prefetcher.loader = inner
        self._inner = inner
        self._prepared = accelerator is not None

    def set_epoch(self, epoch: int) -> None:
        """Sets the 0-based epoch of the next iteration, also of sampler, schedule and data set.

        With ``use_multi_epochs_loader``, which draws ahead, only the first epoch can be set.
        Persistent workers keep copies of the data set, whose epoch does not change.
        """
        parts: tuple[Any, ...] = (self.sampler, self.batch_sampler, self.dataset, self.loader)
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        processes = PartialState().num_processes if is_initialized() else 1
        is_whole = isinstance(self.sampler, ClassSampler) and self.sampler.num_replicas == 1
        if processes > 1 and is_whole and not self._prepared:
            raise UsageError(
                f"accelerate runs {processes} processes, each of which would draw all images; pass "
                "accelerator= to create_loader"
            )
        for batch in self.loader:
            # accelerate computes it from the length of the data set, not of the sampler.
            shard = isinstance(self.loader, DataLoaderShard) and self.loader.remainder >= 0
            if shard and hasattr(self.sampler, "__len__"):
                self.loader.remainder = len(self.sampler) % self.loader.total_batch_size
            yield batch

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def dataset(self) -> Dataset[Any]:
        """The data set, with the transform that timm set."""
        return self._inner.dataset

    @property
    def batch_sampler(self) -> Sampler[Any] | Iterable[Any] | None:
        """The sampler that groups the images into batches."""
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
            # Persistent workers have copies: the next iteration starts new ones.
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

    With ``is_training=True`` a last batch that is not full is dropped, as in timm; otherwise every
    image of the sampler is loaded. Several processes need one of:

    - ``accelerator=``: each process loads its share of the batches. The batch size counts images
      over all processes if the accelerator splits batches (``split_batches=True``), else the images
      of each process (accelerate's default). Call ``loader.set_epoch`` before each epoch, not that
      of the sampler. ``gather_for_metrics`` yields each image of an evaluation once.
    - ``distributed=True`` with torch.distributed, without accelerate: the batch size is that of
      each process. A timm_lt sampler is sharded here; any other must be sharded already, as torch's
      DistributedSampler is.

    Args:
        dataset: A data set with a ``transform`` that timm sets, such as timm's ``ImageDataset`` or
            torchvision's ``ImageFolder``; a ``datasets.Dataset`` of images and labels; or any other
            with random access whose items have an image (of PIL, a path, or uint8) and its label.
            Images of the latter two are transformed here; with ``use_prefetcher=False``,
            floating-point tensors are not changed.
        input_size: Size of the images, (channels, height, width), (height, width) or the side.
        batch_size: Images per batch.
        sampler: Order of the images; None is timm's own: random in training, else in order.
        accelerator: Prepares the loader; do not prepare it again.
        background: Colour behind transparent pixels of a ``datasets.Dataset``, such as ``"black"``
            or ``"#808080"``; None is white. Other data sets decode their images themselves, e.g.
            with ``loader=timm_lt.load_image``.
        **options: Those of ``timm.data.create_loader``. ``device`` defaults to the device that
            accelerate would compute on; with an accelerator it is the accelerator's.

    Raises:
        UsageError: If an option is unknown or conflicts with another; the sampler is not of this
            data set, is not shared among the processes, or is too short for one batch; or the data
            set has no random access.
    """
    for name, value in options.items():
        check_choice("option of create_loader:", name, OPTIONS)
        for part, given in (("sampler", sampler), ("accelerator", accelerator)):
            if value and given is not None and name in CONFLICTS[part]:
                raise UsageError(f"{name}= does not go with {part}=; remove one of them")
    device = accelerator.device if accelerator else options.get("device") or default_device()
    options["device"] = torch.device(device)
    check_dataset(dataset, streams=True)
    images: Any
    if isinstance(dataset, datasets.Dataset) and is_plain(dataset):
        images = ImageRows(dataset.with_format(None), background=background)
    elif background is None:
        # The prefetcher would treat any tensor as uint8.
        images = with_transform(dataset, takes_tensors=not options.get("use_prefetcher", True))
    else:
        raise UsageError(
            f"background only applies to a datasets.Dataset that decodes its images; a "
            f"{type(dataset).__name__} decodes them itself, such as with timm_lt.load_image"
        )
    if sampler is not None:
        _fit_sampler(sampler, images, distributed=bool(options.get("distributed")))
    loader = timm_create_loader(images, input_size, batch_size, **options)
    prefetcher = loader if isinstance(loader, PrefetchLoader) else None
    inner = loader if prefetcher is None else prefetcher.loader
    if sampler is not None:
        inner = _with_sampler(inner, sampler, options.get("num_batches"))
    created = Loader(inner, prefetcher, accelerator)
    if not isinstance(images, IterableDataset) and len(created) == 0:
        raise UsageError(
            f"the {len(created.sampler)} images of an epoch do not fill a batch of {batch_size} in "
            "every process, and in training only full batches are loaded"
        )
    return created


def _fit_sampler(sampler: Sampler[Any], dataset: Any, *, distributed: bool) -> None:  # noqa: ANN401
    """Checks that a sampler is of a data set; shards it among distributed processes."""
    if isinstance(sampler, ClassSampler):
        num_labels = int(sampler.class_counts.sum())
        if num_labels != len(dataset):
            raise UsageError(
                f"the sampler was created from {num_labels} labels, but the data set has "
                f"{len(dataset)} images; pass dataset_labels(dataset) to create_sampler"
            )
    if not distributed:
        return
    if not hasattr(sampler, "num_replicas"):
        raise UsageError(
            f"with distributed=True every process would draw the same from a "
            f"{type(sampler).__name__}; pass a sampler of timm_lt or a DistributedSampler"
        )
    if isinstance(sampler, ClassSampler) and sampler.num_replicas == 1:
        sampler.shard(dist.get_rank(), dist.get_world_size())


def _with_sampler(
    loader: DataLoader[Any], sampler: Sampler[Any], num_batches: int | None
) -> DataLoader[Any]:
    """Returns timm's loader with another sampler."""
    batches: Any = loader.batch_sampler
    order: dict[str, Any]
    if isinstance(batches, ScheduledBatchSampler):
        if isinstance(sampler, ClassSampler):
            # A schedule restarts the epoch when it needs more images than there are.
            sampler.warns_of_repetition = False
        schedule: dict[str, Any] = {name: getattr(batches, name) for name in SCHEDULE}
        schedule |= {"choice_weights": batches.choice_weights.tolist(), "num_batches": num_batches}
        order = {"batch_sampler": ScheduledBatchSampler(sampler, **schedule)}
    else:
        drop_last = loader.drop_last and not isinstance(sampler, InOrder)
        order = {"sampler": sampler, "batch_size": loader.batch_size, "drop_last": drop_last}
    settings: dict[str, Any] = {name: getattr(loader, name) for name in SETTINGS}
    return type(loader)(loader.dataset, **settings, **order)


def prepared_loader(loader: DataLoader[Any], accelerator: Accelerator) -> Any:  # noqa: ANN401
    """Returns accelerate's loader, which gives each process its share of the batches."""
    processes, batches = accelerator.num_processes, loader.batch_sampler
    if isinstance(batches, ScheduledBatchSampler):
        if processes > 1:
            raise UsageError("input_size_choices does not go with several processes of accelerate")
        # accelerate reads it when it splits batches.
        batches.batch_size = max(batches.batch_sizes)  # type: ignore[attr-defined]
    group, share = getattr(loader.sampler, "group", 1), loader.batch_size or 1
    share //= processes if accelerator.split_batches else 1
    if processes > 1 and share % group:
        raise UsageError(
            f"the sampler draws groups of {group} images that belong together, and batches of "
            f"{share} images on each of {processes} processes would divide them; use a "
            f"multiple of {group}"
        )
    return accelerator.prepare_data_loader(loader)


class NumberedSampler(Sampler[int]):
    """Numbers the draws of a sampler, so that each draw of an image is augmented differently.

    A draw is ``t N + i``: ``i`` is the image, of N, and ``t`` counts the draws from the first epoch
    on, the same on every process and after a restart. An epoch has ``length`` draws; the rest of
    each epoch of the sampler is dropped.
    """

    def __init__(self, sampler: ClassSampler, num_images: int, length: int) -> None:
        self.sampler, self.num_images, self.length = sampler, num_images, length
        # Consecutive draws that stay together on a process.
        self.group = sampler.group

    def set_epoch(self, epoch: int) -> None:
        """Sets the 0-based epoch of the next iteration."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        first = self.sampler.epoch * self.length * self.num_images
        numbers = itertools.count(first, self.num_images)
        images = itertools.islice(self.sampler, self.length)
        return map(operator.add, images, numbers)


class InOrder(Sampler[int]):
    """Yields every image once, in order; in epoch v, image i of N is draw ``v N + i``."""

    def __init__(self, num_images: int) -> None:
        self.num_images, self.view = num_images, 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the 0-based view of the next iteration."""
        self.view = epoch

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[int]:
        first = self.view * self.num_images
        return iter(range(first, first + self.num_images))


def loaded(batches: Iterable[T], *, again: str = RESUME) -> Iterator[T]:
    """Yields batches; an error of a worker becomes a UsageError with advice how to continue."""
    begun = False
    try:
        for batch in batches:
            begun = True
            yield batch
    except Exception as error:
        if is_worker_death(error) or _is_cut_off(error):
            if not begun and multiprocessing.get_start_method() != "fork":
                again = (
                    "each data worker imports the script anew here: its work must be below "
                    '`if __name__ == "__main__":`'
                )
            message = describe_worker_death(error, again)
        elif isinstance(error, UsageError):
            message = _last_line(error)
        elif str(error).startswith(CAUGHT):
            message = f"a data worker failed: {_last_line(error)}; fix it and {again}"
        else:
            raise
        raise UsageError(message) from error


def describe_worker_death(error: BaseException, again: str = RESUME) -> str:
    """Returns the message about the death of a worker; see :func:`loaded`."""
    # The first report of torch has the signal.
    first = error.__cause__ if error.__cause__ and is_worker_death(error.__cause__) else error
    reason = _last_line(first).strip().rstrip(".")
    if "killed by signal: Killed" in reason:
        reason = "killed by signal 9, often a sign of too little memory; fewer workers need less"
    return f"a data worker died ({reason}); {again}"


def _is_cut_off(error: BaseException) -> bool:
    """Tells whether a worker died while it sent a batch."""
    frames = (frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__))
    from_worker = any(name.startswith("multiprocessing.") for name in frames)
    return isinstance(error, CUT_OFF) and from_worker


def _last_line(error: BaseException) -> str:
    """Returns the message of a worker's error without the traceback in front."""
    text = str(error)
    if not text.startswith(CAUGHT):
        return text
    return text.strip().rpartition("\n")[2].removeprefix("timm_lt.utils.checks.UsageError: ")
