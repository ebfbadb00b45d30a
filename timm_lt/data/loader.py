"""timm's loader with any sampler, for one process or several."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.state import PartialState, is_initialized
from timm.data import FastCollateMixup
from timm.data import create_loader as timm_create_loader
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from timm_lt.data.columns import ImageRows, check_random_access
from timm_lt.data.items import with_transform
from timm_lt.data.labels import is_plain
from timm_lt.data.sharing import prepare, sampler_of, with_sampler
from timm_lt.samplers import ClassSampler
from timm_lt.utils.accelerator import default_device
from timm_lt.utils.checks import UsageError, check_integer, unknown_name

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
