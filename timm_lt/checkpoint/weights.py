"""The file with backbone and joint classifier: is it the one that the config describes."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
from safetensors import SafetensorError

from timm_lt.checkpoint.format import CONFIG, WEIGHTS, CheckpointInfo
from timm_lt.files import file_sha256
from timm_lt.registry import UsageError

Shapes = dict[str, tuple[int, ...]]
# An integer argument up to this is built without a look at the weights: the width of a layer, say.
ORDINARY = 4096


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

    A model of a billion classes or a million layers would fill the memory before its weights are
    compared; a list of numbers counts as their sum, for it may be layers by stage.

    Raises:
        UsageError: If a number is larger than ten times all sizes in the weights; it is named.
            If a value is nested too deeply to look for numbers.
    """
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    limit = max(ORDINARY, 10 * largest, len(shapes))
    for key in ("model_args", "pretrained_cfg"):
        try:
            integers = list(_integers(config.get(key, {}), key))
        except RecursionError as error:
            raise UsageError(f"{path}: {key} is nested too deeply") from error
        for name, size in integers:
            if abs(size) > limit:
                raise UsageError(f"{path}: {name} is {size}, far beyond the sizes in {WEIGHTS}")


def _integers(value: object, name: str) -> Iterator[tuple[str, int]]:
    """Yields the integers in nested objects by path, and the sum of those in each list."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _integers(part, f"{name}.{key}")
    elif isinstance(value, list):
        inside = [pair for part in value for pair in _integers(part, name)]
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
