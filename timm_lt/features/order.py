"""The order in which a loader shows its images: is it fixed, and how is a part of it left out."""

import itertools
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, cast

from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard
from timm.data.loader import PrefetchLoader
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler

from timm_lt.data.draws import InOrder
from timm_lt.data.loader import Loader
from timm_lt.utils.checks import UsageError


def layers_of(loader: object) -> list[Any]:
    """Returns a loader and those that it is made of; torch's, if there is one, is the last."""
    layers: list[Any] = [loader]
    while True:
        outer = layers[-1]
        known = isinstance(outer, Loader | PrefetchLoader)
        inner = outer.loader if known else getattr(outer, "base_dataloader", None)
        if inner is None:
            return layers
        layers.append(inner)


def is_prepared(loader: object) -> bool:
    """Tells whether accelerate gives each process its share of the batches."""
    return any(
        isinstance(part, DataLoaderShard | DataLoaderDispatcher) for part in layers_of(loader)
    )


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
    batches, at_once = batch_sampler_of(loader)
    if batches is None or not isinstance(batches.sampler, Sized):
        return None
    number = len(batches.sampler)
    return number - number % (batches.batch_size * at_once) if batches.drop_last else number


def images_at_once(loader: object) -> int | None:
    """Returns the images of a batch, over all processes; None if it is not known."""
    batches, at_once = batch_sampler_of(loader)
    return None if batches is None else batches.batch_size * at_once


def check_shown(shown: int, expected: int | None) -> None:
    """Checks that every image was shown once in each view, if it is known how many there are.

    Args:
        shown: Images that were shown over all processes and views, readable or not.
        expected: How many there are.

    Raises:
        UsageError: If there were more or fewer.
    """
    if expected not in (None, shown):
        raise UsageError(
            f"the loader showed {shown} images in all and should have shown {expected}, each once "
            "in each view: with several processes, prepare it with the accelerator and pass "
            "accelerator="
        )


def check_order(loader: object, key: str | None = None) -> None:
    """Checks that a loader shows its images in the order of the data set, every time.

    Args:
        loader: The loader.
        key: Stands for the order where it is not known.

    Raises:
        UsageError: If it draws them, or a ``DataLoader`` has batches of its own and there is no
            key.
    """
    inner = layers_of(loader)[-1]
    if not isinstance(inner, DataLoader):
        return
    sampler = _order_of(inner)
    if sampler is not None and not isinstance(sampler, SequentialSampler | InOrder):
        raise UsageError(
            f"cache_dir= is for a loader that shows its images in the order of the data set, not "
            f"as a {type(sampler).__name__} draws them: pass an evaluation loader, without "
            "shuffle= and sampler="
        )
    if key is None and batch_sampler_of(loader)[0] is None:
        raise UsageError(
            f"the order in which a {type(inner).__name__} shows its images is not known, as its "
            "batches are made by a part of its own: pass key= with a word that stands for the "
            "samples in their order and their transform"
        )


def _order_of(loader: DataLoader[Any]) -> object:
    """Returns the order of a loader's images, whatever makes batches of it; None if not known."""
    batches = loader.batch_sampler
    order: Any = loader if batches is None else batches
    while True:
        names = ("sampler", "batch_sampler")
        inner = next((getattr(order, name) for name in names if hasattr(order, name)), None)
        if inner is None:
            return None if order is batches else order
        order = inner


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
