"""Weights that other projects left in a file, matched with the names of a model's own tensors.

Read with ``weights_only=True`` or not at all; this is the only place that reads a pickle.
"""

import argparse
import collections
import pickle  # noqa: TID251
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor

from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import read_yaml

# Where Kang et al. keep the weights.
DECOUPLED = "state_dict_best"
# The usual keys of the weights, which come before any other.
STATE_DICTS = ("state_dict", "model")
# Part of a key or prefix of a moving average, which is taken only if asked for, or if alone.
AVERAGE = re.compile(r"(?<![a-z])(?:ema|swa|averaged)(?![a-z])", re.IGNORECASE)
# The arguments of timm's train.py, which it also writes beside its checkpoints.
ARGS = "args.yaml"
SAVE = "of a model save its state_dict() alone"
SHOWN = 3
LEVELS = 3
# Types of weights and counters; other types have no use there.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32)
# What torch puts into the names of wrapped modules, wherever they are in the model.
WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(?=.)"
)
COUNTER = "num_batches_tracked"
# Tensors beside those of a network: a loss, torch's AveragedModel, a profiler.
LOSSES = ("criterion", "loss", "loss_fn", "loss_func")
EXTRAS = ("n_averaged", "total_ops", "total_params")
# Values that are often beside the weights. They are not made, for nothing is needed of them.
UNREAD = (
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
    *("pathlib.PosixPath", "pathlib.WindowsPath"),
    *("pathlib._local.PosixPath", "pathlib._local.WindowsPath"),
)
# What projects call a classifier beside a backbone.
CLASSIFIERS = ("fc", "classifier", "head", "linear")


class Unread:
    """A value beside the weights that is passed over, such as an accuracy of NumPy's."""

    def __init__(self, *content: object) -> None:
        """Does nothing with the content in the pickle."""

    def __setstate__(self, content: object) -> None:
        """Does nothing with the content in the pickle."""


@dataclass(frozen=True)
class Weights:
    """The weights of a whole model.

    Attributes:
        tensors: By timm's keys, without the scales.
        scale: Learned scales (C,) of a classifier that has them, of learnable weight scaling.
    """

    tensors: dict[str, Tensor]
    scale: Tensor | None = None


@dataclass(frozen=True)
class State:
    """The tensors of one network in a file.

    Attributes:
        name: Name of the file in messages.
        place: Keys and prefix under which the tensors are, such as ``state_dict.model``.
        others: Other places with the same names.
        prefix: Prefix of the names, such as ``model.``.
        tensors: By name without the prefix.
        beside: Other tensors in the same mapping, by name.
    """

    name: str
    place: str
    others: list[str]
    prefix: str
    tensors: dict[str, Any]
    beside: dict[str, Any]

    def num_classes(self, classifier: str) -> int | None:
        """Returns the number of classes of the classifier at a path; None if there is none."""
        weight = self.tensors.get(f"{classifier}.weight")
        return len(weight) if isinstance(weight, Tensor) and weight.ndim else None


@dataclass(frozen=True)
class WeightsFile:
    """The content of a file of weights.

    Attributes:
        name: Name of the file in messages.
        states: Mappings of names to tensors, by the keys that lead to them.
        architecture: timm's name of the architecture, if the file has it.
        args: Arguments of the training, as timm's ``train.py`` keeps them; empty if unknown.
    """

    name: str
    states: dict[str, dict[str, Any]]
    architecture: str | None
    args: dict[str, Any]

    def select(
        self,
        expected: Mapping[str, Tensor],
        architecture: str,
        classifier: str = "fc",
        *,
        key: str | None = None,
    ) -> State:
        """Finds the network with a model's names of tensors, whatever prefix they have.

        Args:
            expected: The state dict of the model, on any device.
            architecture: Name of the model in messages.
            classifier: Path of the classifier.
            key: A key or prefix to take, where several networks have these names.

        Raises:
            UsageError: If no network has these names, or several and nothing says which.
        """
        key = key and key.rstrip(".")
        wanted = {name for name in expected if not name.endswith(COUNTER)}
        counts = collections.Counter(
            (place, prefix)
            for place, state in self.states.items()
            for name in state
            for prefix, rest in _splits(name)
            if rest in wanted and (key is None or f".{key}." in f".{_label(place, prefix)}.")
        )
        most = max(counts.values(), default=0)
        found = [at for at, number in counts.items() if number == most]
        # Another architecture may repeat a few of the names, such as bn1.weight, in every block.
        if not found or (len(found) > 1 and 2 * most < len(wanted)):
            names = [name for state in self.states.values() for name in state]
            under = f" under {key!r}" if key else ""
            raise UsageError(
                f"{self.name} holds no {architecture}{under}: it lacks "
                f"{some(sorted(wanted - {*names}) or sorted(wanted))}; it "
                f"has {some([*self.states] if key else names)}"
            )
        found.sort(key=lambda at: _rank(*at))
        best = [_label(*at) for at in found if _rank(*at) == _rank(*found[0])]
        if len(best) > 1:
            raise UsageError(
                f"{self.name} has several networks: {', '.join(best)}; choose one with "
                "--checkpoint-key (in a recipe model.checkpoint_key)"
            )
        return self._state(*found[0], [_label(*at) for at in found[1:]], classifier)

    def _state(self, place: str, prefix: str, others: list[str], classifier: str) -> State:
        inside: dict[str, Any] = {}
        beside: dict[str, Any] = {}
        for name, value in self.states[place].items():
            part = inside if name.startswith(prefix) else beside
            part[name.removeprefix(prefix)] = value
        twice = [name for name in beside if name in inside]
        if twice:
            raise UsageError(f"{self.name} has {twice[0]!r} twice in its weights")
        inside = _classifier_beside(inside, beside, classifier)
        return State(self.name, _label(place, prefix), others, prefix, inside, beside)


def _classifier_beside(
    inside: dict[str, Any], beside: dict[str, Any], classifier: str
) -> dict[str, Any]:
    """Adds the classifier of a module that has it beside a backbone without one."""
    names = [
        key.removesuffix(".weight")
        for key in beside
        if key.endswith(".weight") and key.removesuffix(".weight").split(".")[-1] in CLASSIFIERS
    ]
    if f"{classifier}.weight" in inside or len(names) != 1:
        return inside
    parts = {part: beside.get(f"{names[0]}.{part}") for part in ("weight", "bias")}
    found = {f"{classifier}.{part}": value for part, value in parts.items() if value is not None}
    return {**inside, **found}


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Yields a name as prefix and rest, split before each of its parts."""
    yield "", name
    for dot in re.finditer(r"\.", name):
        yield name[: dot.end()], name[dot.end() :]


def _label(place: str, prefix: str) -> str:
    return ".".join(part for part in (place, prefix.rstrip(".")) if part)


def _rank(place: str, prefix: str) -> tuple[bool, bool]:
    is_average = AVERAGE.search(_label(place, prefix)) is not None
    return is_average, place.rpartition(".")[2] not in STATE_DICTS


def read_weights(path: str | Path, name: str | None = None) -> WeightsFile:
    """Reads a file of weights of another project, a pickle or safetensors.

    Known are the layout of Kang et al. (``state_dict_best`` with ``feat_model`` and
    ``classifier``), checkpoints of timm's ``train.py``, and mappings of names to tensors under any
    keys.

    Args:
        path: The file.
        name: Name of the file in messages, e.g. its URL.

    Raises:
        UsageError: If the file is not a checkpoint: truncated, a pickle of anything but tensors
            and plain values, or without weights.
    """
    path, name = Path(path), name or str(path)
    content = _read(path, name)
    if not isinstance(content, Mapping):
        raise UsageError(f"{name} holds {_kind(content)}, not a checkpoint")
    if DECOUPLED in content:
        states = {DECOUPLED: _decoupled(content[DECOUPLED], name)}
    else:
        states = {place: _clean(state, name) for place, state in _states(content)}
    if not states:
        raise UsageError(f"{name} has no weights: found {_kind(content)}")
    args = _args(content, path)
    architecture = content.get("arch") or args.get("model")
    return WeightsFile(name, states, _architecture(architecture), args)


def _architecture(name: object) -> str | None:
    """Returns timm's name of an architecture, with a tag if timm has it; None if it has neither."""
    if not isinstance(name, str):
        return None
    base = name.partition(".")[0]
    if not timm.models.is_model(base):
        return None
    return name if name in timm.models.get_arch_pretrained_cfgs(base) else base


def _args(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns the arguments of timm's ``train.py``, out of the file or of the one beside it."""
    args = content.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if isinstance(args, Mapping):
        return {str(key): value for key, value in args.items()}
    beside = path.parent / ARGS
    found = read_yaml(beside) if beside.is_file() else {}
    # Other projects write a file of the same name.
    return found if _architecture(found.get("model")) else {}


def _read(path: Path, name: str) -> Any:  # noqa: ANN401
    try:
        with path.open("rb") as file:
            start = file.read(64)
        _check_start(start, name)
        if start[8:9] == b"{":
            return safetensors.torch.load_file(path)
        if start[:2] == b"PK" and not zipfile.is_zipfile(path):
            raise UsageError(f"{name} is truncated: the end of the archive is missing")
        # timm's train.py stores its arguments, which are plain values in a namespace.
        known: list[Any] = [argparse.Namespace, *((Unread, kind) for kind in UNREAD)]
        with torch.serialization.safe_globals(known), warnings.catch_warnings():
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
        if "TorchScript" in reason:
            raise UsageError(f"{name} is a TorchScript program: {SAVE}") from error
        raise UsageError(
            f"{name} is no whole checkpoint, it may be truncated: {reason[:200]}"
        ) from error


def _check_start(start: bytes, name: str) -> None:
    """Refuses files that were put in the place of the one that was wanted."""
    if not start:
        raise UsageError(f"{name} is empty")
    if start.startswith(b"version https://git-lfs"):
        raise UsageError(
            f"{name} is a pointer of Git LFS, not the file itself: fetch that with git lfs pull"
        )
    if start.lstrip()[:1] == b"<":
        raise UsageError(
            f"{name} is a web page, no pickle of only tensors and plain values: download the file "
            "again"
        )


def _refusal(error: Exception) -> str:
    """Returns what torch's long advice says of the culprit; loading it anyway is no option here."""
    text = " ".join(str(error).split())
    for mark in ("GLOBAL ", "Unsupported class "):
        if mark in text:
            culprit = text.split(mark, 1)[1].split(" ")[0]
            return (
                f"it is a pickle that asks for {culprit}, not only tensors and plain values; {SAVE}"
            )
    return "it is no pickle of only tensors and plain values, or it is damaged"


def _decoupled(content: object, name: str) -> dict[str, Any]:
    """Joins the backbone and the classifier of a checkpoint of Kang et al."""
    if not isinstance(content, Mapping) or not {"feat_model", "classifier"} <= set(content):
        raise UsageError(f"{name} has no {DECOUPLED} with feat_model and classifier")
    parts = {}
    for key in ("feat_model", "classifier"):
        if not isinstance(content[key], Mapping) or not content[key]:
            raise UsageError(f"{name} has no {key}: found {_kind(content[key])}")
        parts.update(content[key])
    return _clean(parts, name)


def _states(content: Mapping[Any, Any], place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the mappings of names to tensors in a checkpoint, by the keys that lead to them."""
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    if any(isinstance(value, Tensor) for value in named.values()):
        yield place, named
    if place.count(".") + 1 < LEVELS:
        for key, value in named.items():
            if isinstance(value, Mapping):
                yield from _states(value, _label(place, key))


def _clean(state: Mapping[Any, Any], name: str) -> dict[str, Any]:
    """Removes what torch put into the names of wrapped modules."""
    cleaned: dict[str, Any] = {}
    for key, value in state.items():
        short = WRAPPERS.sub("", str(key))
        if short in cleaned:
            raise UsageError(f"{name} has {short!r} twice in its weights")
        cleaned[short] = value
    return cleaned


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
    state: State,
    expected: Mapping[str, Tensor],
    architecture: str,
    classifier: str = "fc",
) -> Weights:
    """Returns the weights of an architecture: no tensor missing, foreign or misshapen.

    Counters of batch norm that an old file lacks are zero. A loss's weights and the like are left.

    Args:
        state: The tensors.
        expected: The state dict of the architecture, on any device.
        architecture: Name of the architecture in messages.
        classifier: Path of the classifier.

    Raises:
        UsageError: If they are not; says which tensors.
    """
    name, found = state.name, state.tensors
    rows = expected[f"{classifier}.weight"].shape
    given = getattr(found.get(f"{classifier}.weight"), "shape", rows)
    if given[1:] == rows[1:] and given[:1] != rows[:1]:
        raise UsageError(f"{name} has {given[0]} classes, {architecture} {rows[0]}")
    tensors = {
        key: torch.zeros(value.shape, dtype=value.dtype)
        for key, value in expected.items()
        if key.endswith(COUNTER)
    }
    tensors |= {key: found[key] for key in expected if key in found}
    _check_names(state, expected, tensors, architecture)
    for key, value in tensors.items():
        _check_tensor(state, key, value, expected[key], architecture)
    scale = found.get("scales")
    if scale is not None and getattr(scale, "shape", None) != rows[:1]:
        raise UsageError(f"{name} has scales of shape {tuple(scale.shape)} for {rows[0]} classes")
    return Weights(tensors, scale)


def _check_names(
    state: State, expected: Mapping[str, Tensor], tensors: Mapping[str, Any], architecture: str
) -> None:
    missing = [key for key in expected if key not in tensors]
    foreign = [
        key
        for key, value in state.tensors.items()
        if isinstance(value, Tensor) and key not in expected and not _is_extra(key)
    ]
    if missing:
        foreign += [key for key in state.beside if key not in foreign]
    if missing or foreign:
        parts = [("it lacks", missing), ("it has", foreign)]
        shown = "; ".join(f"{what} {some(keys)}" for what, keys in parts if keys)
        raise UsageError(f"{state.name} holds no {architecture}: {shown}")


def _is_extra(key: str) -> bool:
    """Returns whether a tensor may be there beside those of the network."""
    parts = key.split(".")
    return key == "scales" or parts[0] in LOSSES or parts[-1] in EXTRAS


def _check_tensor(state: State, key: str, value: object, wanted: Tensor, architecture: str) -> None:
    name = state.name
    if not isinstance(value, Tensor) or not _is_plain(value):
        raise UsageError(
            f"{name} has {_kind(value)} under {state.prefix + key!r} of its weights, not a tensor"
        )
    if value.shape != wanted.shape:
        raise UsageError(
            f"{name} holds no {architecture}: {key} is {tuple(value.shape)}, not "
            f"{tuple(wanted.shape)}"
        )
    # Whoever converts all tensors to half precision converts the counters, too.
    if value.is_floating_point() != wanted.is_floating_point() and not key.endswith(COUNTER):
        raise UsageError(
            f"{name} holds no {architecture}: {key} is {value.dtype}, not {wanted.dtype}"
        )
    if value.is_floating_point() and not value.isfinite().all():
        raise UsageError(f"{name} has values in {key} that are not finite")


def some(keys: list[str]) -> str:
    """Returns the first of several names, and how many more there are."""
    more = len(keys) - SHOWN
    return ", ".join(keys[:SHOWN]) + (f" and {more} more" if more > 0 else "")
