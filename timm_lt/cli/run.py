"""``timm-lt run``: one of timm's own scripts, with the models and samplers of timm_lt."""

import argparse
import functools
import inspect
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm.data
import torch.distributed as dist
import yaml
from timm.data import create_loader as timm_create_loader
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Sampler

from timm_lt.cli.common import Commands, add_command
from timm_lt.data import create_loader, dataset_labels
from timm_lt.samplers import SAMPLERS, ClassSampler, create_sampler
from timm_lt.utils.checks import UsageError, check_options
from timm_lt.utils.console import log

SAMPLER = "--sampler"
SAMPLER_HELP = (
    "of the script's training images: a name, or YAML with options, as '{name: power, q: 0.5}'"
)
# Options of all samplers that suit a script of timm.
COMMON = ("num_samples", "seed", "num_classes")


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    run = add_command(
        commands,
        "run",
        summary="run one of timm's scripts, with the lt_* models and samplers",
        description=(
            "Runs a script, such as timm's validate.py, inference.py and train.py, which lie in "
            "timm's repository and not in its package, after timm_lt has registered its models. "
            "What follows SCRIPT is for the script, except for --sampler directly behind it."
        ),
        examples=[
            "timm-lt run validate.py photos --model lt_resnext50.imagenet_lt --pretrained",
            "timm-lt run train.py --sampler class_balanced photos --model resnet18",
        ],
    )
    run.add_argument(SAMPLER, metavar="SAMPLER", help=SAMPLER_HELP)
    run.add_argument("script", metavar="SCRIPT", help="a Python file")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    run.set_defaults(command=run_script)


def run_script(arguments: argparse.Namespace) -> None:
    """Runs a script as if Python did, and ends as it does."""
    path = Path(arguments.script)
    if not path.is_file():
        raise UsageError(
            f"there is no script {path}: timm's own are in its repository, not in its package; "
            "clone it, and give the path of the script"
        )
    sampler, rest = _split_sampler(arguments.sampler, arguments.arguments)
    if sampler is None:
        _run(path, rest)
        return
    name, options = parse_sampler(sampler)
    with training_sampler(name, options) as used:
        _run(path, rest)
    if not used:
        raise UsageError(
            f"{SAMPLER} had no effect: {path} created no training loader with "
            "timm.data.create_loader"
        )


def _split_sampler(sampler: str | None, arguments: list[str]) -> tuple[str | None, list[str]]:
    """Returns the value of ``--sampler`` and the arguments of the script."""
    first, equals, value = arguments[0].partition("=") if arguments else ("", "", "")
    if first != SAMPLER or sampler is not None:
        return sampler, arguments
    if equals:
        return value, arguments[1:]
    if len(arguments) < 2:
        raise UsageError(f"{SAMPLER} needs the name of a sampler")
    return arguments[1], arguments[2:]


def _run(path: Path, arguments: list[str]) -> None:
    before = sys.argv, sys.path[:]
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before


def parse_sampler(text: str) -> tuple[str, dict[str, Any]]:
    """Returns the name and the options of a sampler.

    Args:
        text: A name, or YAML with the key ``name`` and options.

    Raises:
        UsageError: If it is neither, or there is no such sampler or option.
    """
    try:
        stated = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{SAMPLER} {text!r} is not valid YAML: {error}") from error
    options = {"name": stated} if isinstance(stated, str) else stated
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        raise UsageError(
            f"{SAMPLER} {text!r} must be the name of a sampler or a mapping with its name and "
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
        raise UsageError(f"{SAMPLER}: {error}") from error
    return name, options


@contextmanager
def training_sampler(name: str, options: dict[str, Any]) -> Iterator[list["EpochsInTurn"]]:
    """Has ``timm.data.create_loader`` draw training images with a sampler while the block runs.

    Args:
        name: Name of the sampler.
        options: Its options.

    Yields:
        The samplers of the training loaders that the block has created.
    """
    used: list[EpochsInTurn] = []

    @functools.wraps(timm_create_loader)
    def with_sampler(*args: Any, **kwargs: Any) -> PrefetchLoader | DataLoader[Any]:
        call = inspect.signature(timm_create_loader).bind(*args, **kwargs).arguments
        loader: PrefetchLoader | DataLoader[Any]
        if not call.get("is_training"):
            loader = timm_create_loader(**call)
            return loader
        sampler = create_sampler(name, dataset_labels(call["dataset"]), **options)
        if call.get("distributed"):
            sampler.shard(dist.get_rank(), dist.get_world_size())
        if sampler.rank == 0:
            log.info("training images are drawn by sampler %s %s", name, options or "")
        used.append(EpochsInTurn(sampler))
        loader = create_loader(**call, sampler=used[-1]).loader
        dataset = call["dataset"]
        dataset.set_epoch = _SetEpochs(
            [*filter(None, [getattr(dataset, "set_epoch", None)]), used[-1].set_epoch]
        )
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
    """The ``set_epoch`` of a data set, which train.py calls before each epoch."""

    def __init__(self, parts: list[Callable[[int], object]]) -> None:
        self.parts = parts

    def __call__(self, epoch: int) -> None:
        for part in self.parts:
            part(epoch)
