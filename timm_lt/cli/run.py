"""``timm-lt run``: runs one of timm's own scripts with the models and samplers of timm_lt."""

import argparse
import functools
import inspect
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import timm.data
import torch.distributed as dist
from timm.data import create_loader as timm_create_loader
from torch.utils.data import Sampler

from timm_lt.cli.common import Commands, add_command
from timm_lt.data import create_loader, dataset_labels
from timm_lt.models import lt_resnet as lt_resnet  # importing it registers the architectures
from timm_lt.run.recipe import prefixed
from timm_lt.samplers import ClassSampler, create_sampler
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import log
from timm_lt.utils.files import YAML_ERRORS, parse_yaml

SAMPLER = "--sampler"


def add_run(commands: Commands) -> None:
    """Adds the command to the parser."""
    run = add_command(commands, "run", run_script)
    sampler = "a name, or YAML with options, as '{name: power, q: 0.5}'"
    run.add_argument(SAMPLER, help=f"sampler of the training images: {sampler}")
    run.add_argument("script", metavar="SCRIPT", help="a Python file")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")


def run_script(arguments: argparse.Namespace) -> None:
    """Runs a script with the lt_* models registered, such as validate.py or train.py of timm.

    They are in timm's repository, not in its package. The arguments after SCRIPT are those of the
    script, except for --sampler directly after it.

    Examples:
        timm-lt run validate.py photos --model lt_resnext50.imagenet_lt --pretrained
        timm-lt run train.py --sampler class_balanced photos --model resnet18
    """
    path, sampler, rest = Path(arguments.script), arguments.sampler, arguments.arguments
    if not path.is_file():
        raise UsageError(
            f"there is no script {path}; timm's own are in its repository, not in its package: "
            "clone it, and give the path of the script"
        )
    if rest and rest[0].partition("=")[0] == SAMPLER:
        own = argparse.ArgumentParser()
        own.add_argument(SAMPLER)
        number = 1 if "=" in rest[0] else 2
        sampler, rest = own.parse_args(rest[:number]).sampler, rest[number:]
    before = sys.argv, sys.path[:]
    with (
        nullcontext(None) if sampler is None else training_sampler(*parse_sampler(sampler)) as used
    ):
        sys.argv = [str(path), *rest]
        sys.path.insert(0, str(path.resolve().parent))
        try:
            runpy.run_path(str(path), run_name="__main__")
        finally:
            sys.argv, sys.path[:] = before
    if used == []:
        raise UsageError(
            f"{SAMPLER} had no effect: {path} created no training loader with "
            "timm.data.create_loader"
        )


def parse_sampler(text: str) -> tuple[str, dict[str, Any]]:
    """Returns the name and the options of a sampler, from its name or YAML with both."""
    with prefixed(SAMPLER):
        try:
            options = parse_yaml(text)
        except YAML_ERRORS:
            options = None
        options = {"name": options} if isinstance(options, str) else options
        if not isinstance(options, dict) or not isinstance(options.get("name"), str):
            raise UsageError(
                f"{text!r} must be the name of a sampler, or YAML with its name and options, as "
                "{name: power, q: 0.5}"
            )
        name = options.pop("name")
        # A number of classes is for the script's own labels.
        own = {key: value for key, value in options.items() if key != "num_classes"}
        if getattr(create_sampler(name, [0, 1], **own), "unit", 1) > 1:
            raise UsageError(
                f"sampler {name!r} draws pairs, and timm's train.py has no loss for them; use "
                "timm-lt train"
            )
    return name, options


@contextmanager
def training_sampler(name: str, options: dict[str, Any]) -> Iterator[list["EpochsInTurn"]]:
    """Makes ``timm.data.create_loader`` draw training images with a sampler while the block runs.

    Yields the samplers of the training loaders that the block has created.
    """
    used: list[EpochsInTurn] = []

    @functools.wraps(timm_create_loader)
    def with_sampler(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        call = inspect.signature(timm_create_loader).bind(*args, **kwargs).arguments
        if not call.get("is_training"):
            return timm_create_loader(**call)
        dataset = call["dataset"]
        sampler = create_sampler(name, dataset_labels(dataset), **options)
        if call.get("distributed"):
            sampler.shard(dist.get_rank(), dist.get_world_size())
        if sampler.rank == 0:
            log.info("training images are drawn by sampler %s %s", name, options or "")
        used.append(EpochsInTurn(sampler, getattr(dataset, "set_epoch", None)))
        loader = create_loader(**call, sampler=used[-1]).loader
        # train.py calls it before each epoch; workers get a copy.
        dataset.set_epoch = used[-1].set_epoch
        return loader

    modules: tuple[Any, ...] = (timm.data, timm.data.loader)
    try:
        for module in modules:
            module.create_loader = with_sampler
        yield used
    finally:
        for module in modules:
            module.create_loader = timm_create_loader


class EpochsInTurn(Sampler[int]):
    """A sampler that moves on to the next epoch whenever it is iterated again.

    train.py sets the epoch of a sampler only in several processes.
    """

    def __init__(
        self, sampler: ClassSampler, of_dataset: Callable[[int], object] | None = None
    ) -> None:
        self.sampler, self.of_dataset = sampler, of_dataset
        self.num_replicas = sampler.num_replicas
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next iteration draws, and that of the data set."""
        self.epoch = epoch
        if self.of_dataset is not None:
            self.of_dataset(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        # A generator: creating an iterator alone, as DataLoader does, must not move on.
        self.sampler.set_epoch(self.epoch)
        self.epoch += 1
        yield from self.sampler
