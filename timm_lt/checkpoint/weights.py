"""The weights of a checkpoint: opened after a check, and compared with the model of its config."""

import itertools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from timm_lt.checkpoint.format import CONFIG, WEIGHTS, CheckpointInfo
from timm_lt.utils.checks import UsageError, user_errors
from timm_lt.utils.files import file_sha256

Shapes = dict[str, tuple[int, ...]]
# Largest integer that is accepted as an argument whatever the weights: a width, say.
ORDINARY = 2**16
# Most parameters and elements of a model that is built without weights.
MOST_PARAMETERS, MOST_ELEMENTS = 20_000, 2**30
# Elements that a model may have beyond its weights, for buffers that are not stored.
FREE_ELEMENTS = 2**24
# Elements that timm's adaptation may add to the weights of another project.
FREE_ADAPTED = 10**6


@contextmanager
def open_weights(path: Path, digest: str | None) -> Iterator[Any]:
    """Opens a safetensors file of a checkpoint, whose SHA-256 is ``digest`` unless None."""
    with user_errors(f"{path} is not a readable safetensors file", SafetensorError, OSError):
        if digest is not None and file_sha256(path) != digest:
            raise UsageError(f"{path} is not the file that {CONFIG} describes (SHA-256 differs)")
        with safetensors.safe_open(path, "pt") as file:
            yield file


def read_shapes(folder: Path, info: CheckpointInfo | None) -> Shapes:
    """Returns the shape of each tensor in the weights of a checkpoint; ``info`` has the digest."""
    with open_weights(folder / WEIGHTS, info.weights_sha256 if info else None) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def check_build(
    folder: Path, config: dict[str, Any], info: CheckpointInfo | None, *, pretrained: bool
) -> None:
    """Checks that the model of a config is that of the weights, before memory is taken for it.

    Without ``pretrained``, only the size of the model is checked. timm adapts the weights of a
    plain timm checkpoint, which has no ``info``.
    """
    shapes = read_shapes(folder, info) if pretrained else {}
    check_sizes(folder / CONFIG, config, shapes)
    model = _build_on_meta(folder, config["architecture"], shapes)
    if model is None:
        return
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    stored, needed = (sum(map(math.prod, part.values())) for part in (shapes, wanted))
    # Buffers that are not stored count, too.
    elements = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    limit = 5 * stored + FREE_ELEMENTS if pretrained else MOST_ELEMENTS
    problem = None
    if elements > limit:
        problem = f"has {elements:,} numbers, more than the {limit:,} that are accepted for it"
    elif pretrained and info is None and needed > 2 * stored + FREE_ADAPTED:
        problem = f"has {needed:,} numbers, {WEIGHTS} {stored:,}"
    elif pretrained and info is not None:
        for key in [*wanted, *shapes]:
            here, there = wanted.get(key, "nothing"), shapes.get(key, "nothing")
            if here != there:
                problem = f"has {here} for {key}, {WEIGHTS} {there}"
                break
    if problem is not None:
        raise UsageError(f"the model of {folder / CONFIG} {problem}")


def _build_on_meta(folder: Path, architecture: str, shapes: Shapes) -> nn.Module | None:
    """Builds a model without memory; returns None for an architecture of the user that cannot."""
    builder, count = threading.get_ident(), itertools.count(1)
    limit = 2 * len(shapes) + 1000 if shapes else MOST_PARAMETERS

    def count_parameter(*_: object) -> None:
        if threading.get_ident() == builder and next(count) > limit:
            raise UsageError(f"the model of {folder / CONFIG} has far more layers than {WEIGHTS}")

    handle = register_module_parameter_registration_hook(count_parameter)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=False)
            return model
    except UsageError:
        raise
    except Exception as error:
        if timm.models.is_model(architecture):
            module = timm.models.model_entrypoint(architecture).__module__
            if not module.startswith(("timm.", "timm_lt.")):
                # Its constructor may read values of its tensors.
                return None
        raise load_error(folder, error) from error
    finally:
        handle.remove()


def load_error(folder: Path, error: Exception) -> UsageError:
    """Returns the error for a folder whose model cannot be built or loaded."""
    reason = " ".join(str(error).split())[:300]
    return UsageError(f"the checkpoint {folder} cannot be loaded: {type(error).__name__}: {reason}")


def check_sizes(path: Path, config: dict[str, Any], shapes: Shapes) -> None:
    """Refuses a config with numbers far beyond the sizes in its weights.

    A list of numbers counts as their sum, since it may be layers by stage.
    """
    # A tensor without elements costs nothing, whatever its other sizes are.
    sizes = [size for shape in shapes.values() if 0 not in shape for size in shape]
    limit = max([ORDINARY, *sizes])
    problem = None
    for key in ("model_args", "pretrained_cfg"):
        try:
            for name, size in _integers(config.get(key, {}), key):
                if abs(size) > limit:
                    problem = problem or f"{name} is {size}, far beyond the sizes in {WEIGHTS}"
        except RecursionError:
            problem = f"{key} is nested too deeply"
    if problem is not None:
        raise UsageError(f"{path}: {problem}")


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
