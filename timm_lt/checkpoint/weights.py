"""The file with backbone and joint classifier: is it the one that the config describes."""

import itertools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from timm_lt.checkpoint.format import CONFIG, WEIGHTS, CheckpointInfo
from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import file_sha256

Shapes = dict[str, tuple[int, ...]]
# An integer argument up to this is ordinary: a width, a number of classes or layers.
ORDINARY = 2**16
# Of a model without weights to compare with: parameters, and their elements.
MOST_PARAMETERS, MOST_ELEMENTS = 20_000, 2**30
# Elements of buffers that are not stored, beyond four for each that is: tables of positions, say.
FREE_BUFFERS = 2**24
# Levels of lists and objects in a config; no architecture's arguments have ten.
MOST_LEVELS = 100


class _NestingError(Exception):
    """Raised for values that are nested too deeply to be looked into."""


def check_weights_file(folder: Path, info: CheckpointInfo | None) -> Shapes:
    """Checks the weights of a checkpoint folder, before anything is built.

    Args:
        folder: The folder.
        info: What it says of itself; None for a plain timm checkpoint, which has no digest.

    Returns:
        The shape of each tensor.

    Raises:
        UsageError: If the file is missing, damaged, or not the one that the config describes.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    if info is not None and file_sha256(path) != info.weights_sha256:
        raise UsageError(f"{path} is not the one that {CONFIG} describes (SHA-256 differs)")
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is no safetensors file: {error}") from error


def check_sizes(path: Path, config: dict[str, Any], shapes: Shapes) -> None:
    """Refuses a config whose numbers are far beyond what its weights can have.

    A list of numbers counts as their sum, for it may be layers by stage.

    Args:
        path: The config.
        config: Its content.
        shapes: Shapes in the weights; empty if there are none.

    Raises:
        UsageError: If a number is neither ordinary nor within the sizes of the weights; it is
            named. If a value is nested too deeply to look for numbers.
    """
    # A tensor without elements costs nothing, whatever its other sizes are.
    limit = max(
        [ORDINARY, *(size for shape in shapes.values() if 0 not in shape for size in shape)]
    )
    for key in ("model_args", "pretrained_cfg"):
        try:
            integers = list(_integers(config.get(key, {}), key))
        except _NestingError as error:
            raise UsageError(f"{path}: {key} is nested too deeply") from error
        for name, size in integers:
            if abs(size) > limit:
                raise UsageError(f"{path}: {name} is {size}, far beyond the sizes in {WEIGHTS}")


@contextmanager
def bounded_build(folder: Path, shapes: Shapes) -> Iterator[None]:
    """Stops a build that registers far more parameters than the weights have.

    Args:
        folder: The checkpoint folder.
        shapes: Shapes in the weights; empty if there are none.

    Raises:
        UsageError: As soon as it does: a million layers are never built.
    """
    limit = 2 * len(shapes) + 1000 if shapes else MOST_PARAMETERS
    builder, count = threading.get_ident(), itertools.count(1)

    def count_parameter(*_: object) -> None:
        # Other threads may build what they like.
        if threading.get_ident() == builder and next(count) > limit:
            raise UsageError(f"the model of {folder / CONFIG} has far more layers than {WEIGHTS}")

    handle = register_module_parameter_registration_hook(count_parameter)
    try:
        yield
    finally:
        handle.remove()


def check_memory(folder: Path, shapes: Shapes, model: nn.Module) -> None:
    """Checks that a model needs memory in proportion to its weights, its buffers included.

    Args:
        folder: The checkpoint folder.
        shapes: Shapes in the weights; empty if there are none.
        model: The model, on the meta device.

    Raises:
        UsageError: If it needs far more.
    """
    buffers = sum(buffer.numel() for buffer in model.buffers())
    if not shapes:
        elements = buffers + sum(parameter.numel() for parameter in model.parameters())
        if elements > MOST_ELEMENTS:
            raise UsageError(
                f"the model of {folder / CONFIG} has {elements:,} numbers, more than "
                f"{MOST_ELEMENTS:,}; create it with its weights, or by the architecture's name"
            )
    elif buffers > 4 * sum(map(math.prod, shapes.values())) + FREE_BUFFERS:
        raise UsageError(
            f"the model of {folder / CONFIG} has buffers of {buffers:,} numbers, far more than "
            f"{WEIGHTS}"
        )


def _integers(value: object, name: str, level: int = 0) -> Iterator[tuple[str, int]]:
    """Yields the integers in nested objects by path, and the sum of those in each list."""
    if level > MOST_LEVELS:
        raise _NestingError
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _integers(part, f"{name}.{key}", level + 1)
    elif isinstance(value, list):
        inside = [pair for part in value for pair in _integers(part, name, level + 1)]
        yield name, sum(abs(size) for _, size in inside)
        yield from inside
    elif type(value) is int:
        yield name, value


def check_shapes(folder: Path, shapes: Shapes, wanted: Shapes, *, exact: bool) -> None:
    """Checks that the weights are those of the model that the config builds.

    Args:
        folder: The checkpoint folder.
        shapes: Shapes in the file.
        wanted: Shapes of the model's state dict.
        exact: Names and shapes must be the same. Otherwise only the number of elements must be
            alike, since timm adapts weights of other projects.

    Raises:
        UsageError: If they are not; the first difference is named.
    """
    path = folder / WEIGHTS
    if not exact:
        there, here = (sum(map(math.prod, part.values())) for part in (shapes, wanted))
        if here > 2 * there + 10**6:
            raise UsageError(f"{path} has {there:,} numbers, the model of {CONFIG} {here:,}")
        return
    for key in [*wanted, *shapes]:
        if shapes.get(key) != wanted.get(key):
            raise UsageError(
                f"{path} has {_shape(shapes, key)} for {key}, the model of {CONFIG} "
                f"{_shape(wanted, key)}"
            )


def _shape(shapes: Shapes, key: str) -> str:
    return str(shapes[key]) if key in shapes else "nothing"
