"""A sampler for timm's own train.py, chosen by the environment variable ``TIMM_LT_SAMPLER``.

``TIMM_LT_SAMPLER=class_balanced python train.py DATA --device-modules timm_lt ...``: train.py
imports timm_lt after ``create_loader``, and this puts another in its place. Options are YAML:
``TIMM_LT_SAMPLER='{name: power, q: 0.5, seed: 1}'``. Without the variable nothing is touched.
"""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import timm.data
import torch.distributed as dist
import yaml
from timm.data import create_loader as timm_create_loader
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Sampler

from timm_lt.console import log
from timm_lt.data.labels import dataset_labels
from timm_lt.data.loader import create_loader
from timm_lt.registry import UsageError, check_options
from timm_lt.samplers import SAMPLERS, ClassSampler, create_sampler

VARIABLE = "TIMM_LT_SAMPLER"
# Options that every sampler takes, and that make sense for train.py.
COMMON = ("num_samples", "seed", "num_classes")


class EpochsInTurn(Sampler[int]):
    """A sampler that goes on to the next epoch whenever it is iterated again.

    train.py sets the epoch of a sampler only if it runs several processes, older ones that of no
    data set.

    Attributes:
        epoch: The epoch that the next iteration draws.
    """

    def __init__(self, sampler: ClassSampler) -> None:
        self.sampler = sampler
        self.num_replicas = sampler.num_replicas
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration draws; the one after it draws the next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        # A generator: an iterator that is made and thrown away, as DataLoader does, moves nothing.
        self.sampler.set_epoch(self.epoch)
        self.epoch += 1
        yield from self.sampler


class _SetEpochs:
    """What train.py calls before each epoch, on any number of processes, if a data set has it."""

    def __init__(self, parts: list[Callable[[int], object]]) -> None:
        self.parts = parts

    def __call__(self, epoch: int) -> None:
        for part in self.parts:
            part(epoch)


def install_from_environment() -> None:
    """Puts a ``create_loader`` with a sampler in timm's place, if ``TIMM_LT_SAMPLER`` is set.

    Raises:
        UsageError: If its value is no name of a sampler with options that it has.
    """
    value = os.environ.get(VARIABLE)
    if not value:
        return
    name, options = _parse(value)

    @functools.wraps(timm_create_loader)
    def with_our_sampler(*args: Any, **kwargs: Any) -> PrefetchLoader | DataLoader[Any]:
        call = inspect.signature(timm_create_loader).bind(*args, **kwargs).arguments
        loader: PrefetchLoader | DataLoader[Any]
        if not call.get("is_training"):
            loader = timm_create_loader(**call)
            return loader
        sampler = create_sampler(name, dataset_labels(call["dataset"]), **options)
        if call.get("distributed"):
            sampler.shard(dist.get_rank(), dist.get_world_size())
        if sampler.rank == 0:
            log.info("training images are drawn by timm_lt's sampler %s", value)
        order = EpochsInTurn(sampler)
        loader = create_loader(**call, sampler=order).loader
        dataset = call["dataset"]
        dataset.set_epoch = _SetEpochs(
            [*filter(None, [getattr(dataset, "set_epoch", None)]), order.set_epoch]
        )
        return loader

    for module in (timm.data, timm.data.loader, sys.modules["__main__"]):
        if getattr(module, "create_loader", None) is timm_create_loader:
            module.create_loader = with_our_sampler  # type: ignore[attr-defined]


def _parse(value: str) -> tuple[str, dict[str, Any]]:
    """Returns the name and the options that the variable states."""
    try:
        stated = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"{VARIABLE}={value!r} is not YAML: {error}") from error
    options = {"name": stated} if isinstance(stated, str) else stated
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        raise UsageError(
            f"{VARIABLE}={value!r} must be the name of a sampler or a mapping with its name and "
            "options, as {name: power, q: 0.5}"
        )
    name = options.pop("name")
    try:
        part = SAMPLERS[name]
        own = {key: option for key, option in options.items() if key not in COMMON}
        check_options(f"sampler {name!r}", part, own)
        if getattr(part, "unit", 1) > 1:
            raise UsageError(
                f"sampler {name!r} draws pairs, and timm's train.py has no loss for them: train "
                "with train_lt.py"
            )
    except UsageError as error:
        raise UsageError(f"{VARIABLE}: {error}") from error
    return name, options
