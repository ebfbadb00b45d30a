"""Weights that other projects published as pickles, mapped to timm's names.

Read with ``weights_only=True`` or not at all; this is the only place that reads a pickle.
"""

import argparse
import pickle  # noqa: TID251
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from timm_lt.registry import UsageError

# Where a checkpoint keeps the weights: Kang et al., then timm's train.py and common usage.
DECOUPLED = "state_dict_best"
STATE_DICTS = ("state_dict_ema", "state_dict", "model_ema", "model")
SHOWN = 3
# Types of weights and counters; other types have no use there.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32)


@dataclass(frozen=True)
class Weights:
    """The weights of a whole model.

    Attributes:
        tensors: By timm's keys, without the scales.
        scale: Learned scales (C,) of a classifier that has them, of learnable weight scaling.
        architecture: timm's name of the architecture, if the file says it.
    """

    tensors: dict[str, Tensor]
    scale: Tensor | None = None
    architecture: str | None = None


def read_weights(path: str | Path, name: str | None = None) -> Weights:
    """Reads the weights of a whole model from a file of another project.

    Three layouts are known: that of Kang et al. (``state_dict_best`` with ``feat_model`` and
    ``classifier``, every key behind ``module.``), checkpoints of timm's ``train.py`` (of which the
    moving average is taken where there is one), and a bare mapping of names to tensors. The file is
    a pickle or safetensors.

    Args:
        path: The file.
        name: What it is called in messages, e.g. its URL.

    Raises:
        UsageError: If the file is no such checkpoint: truncated, a pickle of anything but tensors
            and plain values, without weights, or with a value that is not finite.
    """
    path, name = Path(path), name or str(path)
    content = _read(path, name)
    if not isinstance(content, Mapping):
        raise UsageError(f"{name} holds {_kind(content)}, not a checkpoint")
    architecture = content.get("arch")
    if DECOUPLED in content:
        state = _decoupled(content[DECOUPLED], name)
    else:
        # timm's train.py stores None for a moving average that it does not keep.
        found = next((content[key] for key in STATE_DICTS if content.get(key)), content)
        state = _state(found, name, "weights")
    scale = state.pop("scales", None)
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UsageError(f"{name} has values in {key} that are not finite")
    return Weights(state, scale, architecture if isinstance(architecture, str) else None)


def _read(path: Path, name: str) -> Any:  # noqa: ANN401
    try:
        with path.open("rb") as file:
            start = file.read(16)
        if start[8:9] == b"{":
            return safetensors.torch.load_file(path)
        if start[:2] == b"PK" and not zipfile.is_zipfile(path):
            raise UsageError(f"{name} is truncated: the end of the archive is missing")
        # timm's train.py stores its arguments, which are plain values in a namespace.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # About the pickle's protocol: it loads or it does not.
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except pickle.UnpicklingError as error:
        raise UsageError(f"{name} is refused: {_refusal(error)}") from error
    except SafetensorError as error:
        raise UsageError(f"{name} is no whole safetensors file: {error}") from error
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror or error}") from error
    except UsageError:
        raise
    except Exception as error:
        # Half a pickle may raise anything.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"{name} is no whole checkpoint, it may be truncated: {reason[:200]}"
        ) from error


def _refusal(error: Exception) -> str:
    """Returns what torch's long advice says of the culprit; loading it anyway is no option here."""
    text = " ".join(str(error).split())
    for mark in ("GLOBAL ", "Unsupported class "):
        if mark in text:
            culprit = text.split(mark, 1)[1].split(" ")[0]
            return f"it is a pickle that asks for {culprit}, not only tensors and plain values"
    return "it is no pickle of only tensors and plain values, or it is damaged"


def _decoupled(content: object, name: str) -> dict[str, Tensor]:
    """Joins the backbone and the classifier of a checkpoint of Kang et al."""
    if not isinstance(content, Mapping) or not {"feat_model", "classifier"} <= set(content):
        raise UsageError(f"{name} has no {DECOUPLED} with feat_model and classifier")
    backbone = _state(content["feat_model"], name, "feat_model")
    return {**backbone, **_state(content["classifier"], name, "classifier")}


def _state(content: object, name: str, what: str) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise UsageError(f"{name} has no {what}: found {_kind(content)}")
    state: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise UsageError(f"{name} has {key!r} for a name in its {what}")
        if not _is_plain(value):
            raise UsageError(f"{name} has {_kind(value)} under {key!r} of its {what}, not a tensor")
        short = key.removeprefix("module.")
        if short in state:
            raise UsageError(f"{name} has {short!r} twice in its {what}")
        state[short] = value
    return state


def _is_plain(value: object) -> bool:
    """Returns whether a value is an ordinary tensor in memory, not a sparse or quantized one."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_nested)
        and value.device.type == "cpu"
        and value.dtype in DTYPES
    )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor, {value.layout}, on {value.device}"
    return "an empty mapping" if value == {} else f"a {type(value).__name__}"


def check_weights(
    weights: Weights,
    expected: Mapping[str, Tensor],
    name: str,
    architecture: str,
    classifier: str = "fc",
) -> None:
    """Checks that weights are those of an architecture: no tensor missing, foreign or misshapen.

    Args:
        weights: The weights.
        expected: The state dict of the architecture, on any device.
        name: What the file is called in messages.
        architecture: What the architecture is called in messages.
        classifier: Path of the classifier.

    Raises:
        UsageError: If they are not; says which tensors.
    """
    found = weights.tensors
    rows = expected[f"{classifier}.weight"].shape
    given = found[f"{classifier}.weight"].shape if f"{classifier}.weight" in found else rows
    if given[1:] == rows[1:] and given[:1] != rows[:1]:
        raise UsageError(f"{name} has {given[0]} classes, {architecture} {rows[0]}")
    missing = [key for key in expected if key not in found]
    foreign = [key for key in found if key not in expected]
    if missing or foreign:
        parts = [("it lacks", missing), ("it has", foreign)]
        shown = "; ".join(f"{what} {_some(keys)}" for what, keys in parts if keys)
        raise UsageError(f"{name} holds no {architecture}: {shown}")
    for key, value in found.items():
        if value.shape != expected[key].shape:
            raise UsageError(
                f"{name} holds no {architecture}: {key} is {tuple(value.shape)}, not "
                f"{tuple(expected[key].shape)}"
            )
        if value.is_floating_point() != expected[key].is_floating_point():
            raise UsageError(
                f"{name} holds no {architecture}: {key} is {value.dtype}, not {expected[key].dtype}"
            )
    scale = weights.scale
    if scale is not None and scale.shape != rows[:1]:
        raise UsageError(f"{name} has scales of shape {tuple(scale.shape)} for {rows[0]} classes")


def _some(keys: list[str]) -> str:
    more = len(keys) - SHOWN
    return ", ".join(keys[:SHOWN]) + (f" and {more} more" if more > 0 else "")
