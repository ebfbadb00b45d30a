"""The order in which a loader shows its images: is it fixed, and how is a part of it left out."""

import itertools
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, cast

from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher
from timm.data.loader import PrefetchLoader
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler

from timm_lt.data.draws import InOrder
from timm_lt.data.loader import Loader
from timm_lt.registry import UsageError


def batch_sampler_of(loader: object) -> tuple[BatchSampler | None, int]:
    """Returns what makes the batches of a loader, and how many of them all processes show at once.

    None if it is not known, as for a list of batches.
    """
    inner: Any = loader.loader if isinstance(loader, PrefetchLoader) else loader
    known = isinstance(inner, Loader | DataLoader) or hasattr(inner, "base_dataloader")
    if not known or isinstance(inner, DataLoaderDispatcher):
        return None, 1
    batches, at_once = inner.batch_sampler, 1
    while isinstance(batches, BatchSamplerShard):
        at_once *= 1 if batches.split_batches else batches.num_processes
        batches = batches.batch_sampler
    # Not a subclass: a schedule of sizes has batches of its own.
    return (batches, at_once) if type(batches) is BatchSampler else (None, 1)


def num_images(loader: object) -> int | None:
    """Returns how many images a loader shows, over all processes; None if it is not known."""
    batches, _ = batch_sampler_of(loader)
    if batches is None or not isinstance(batches.sampler, Sized):
        return None
    number = len(batches.sampler)
    return number - number % batches.batch_size if batches.drop_last else number


def images_at_once(loader: object) -> int | None:
    """Returns the images of a batch, over all processes; None if it is not known."""
    batches, at_once = batch_sampler_of(loader)
    return None if batches is None else batches.batch_size * at_once


def check_order(loader: object) -> None:
    """Checks that a loader shows its images in the order of the data set, every time.

    Raises:
        UsageError: If it draws them.
    """
    batches, _ = batch_sampler_of(loader)
    sampler = None if batches is None else batches.sampler
    if sampler is not None and not isinstance(sampler, SequentialSampler | InOrder):
        raise UsageError(
            f"cache_dir= is for a loader that shows its images in the order of the data set, not "
            f"as a {type(sampler).__name__} draws them: pass an evaluation loader, without "
            "shuffle= and sampler="
        )


@contextmanager
def without_first(loader: Iterable[Any], batches: int) -> Iterator[Iterable[Any]]:
    """Yields a loader that leaves out its first batches.

    Where the order is a sampler's, the images that are left out are not read.
    """
    of_all, at_once = batch_sampler_of(loader)
    if batches == 0:
        yield loader
    elif of_all is None:
        yield itertools.islice(loader, batches, None)
    else:
        order = of_all.sampler
        of_all.sampler = _Rest(order, batches * of_all.batch_size * at_once)
        try:
            yield loader
        finally:
            of_all.sampler = order


class _Rest(Sampler[int]):
    """An order without its first images."""

    def __init__(self, order: Iterable[int], first: int) -> None:
        self.order, self.first = order, first

    def __len__(self) -> int:
        return max(len(cast(Sized, self.order)) - self.first, 0)

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self.order, self.first, None)
