"""Files of weights of other projects, matched with the tensors of a model.

Pickles are read with ``weights_only=True`` only, and nowhere else in the package.
"""

import argparse
import collections
import pickle  # noqa: TID251
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor

from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import read_yaml

# Key of the weights in checkpoints of Kang et al.
DECOUPLED = "state_dict_best"
# Usual keys of the weights, preferred to others.
STATE_DICTS = ("state_dict", "model")
# Part of the key or prefix of a moving average, which is used only if asked for, or if alone.
AVERAGE = re.compile(r"(?<![a-z])(?:ema|swa|averaged)(?![a-z])", re.IGNORECASE)
# The arguments of timm's train.py, written beside its checkpoints.
ARGS = "args.yaml"
SHOWN = 3
LEVELS = 3
# Types of weights and counters.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32)
# Prefixes that torch gives to wrapped modules anywhere in a model.
WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(?=.)"
)
COUNTER = "num_batches_tracked"
# Learned scales of an lws head, as Kang et al. name them.
SCALES = "scales"
# Tensors beside those of a network: a loss, torch's AveragedModel, a profiler.
LOSSES = ("criterion", "loss", "loss_fn", "loss_func")
EXTRAS = ("n_averaged", "total_ops", "total_params")
# Harmless values that are often beside the weights; a placeholder takes their place.
UNREAD = (
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
    *("pathlib.PosixPath", "pathlib.WindowsPath"),
    *("pathlib._local.PosixPath", "pathlib._local.WindowsPath"),
)
# Part of the names of tensors whose shapes depend on the image size.
POSITIONS = re.compile(r"pos_emb|rel_pos|relative_position|attention_bias")
# Usual names of a classifier beside a backbone.
CLASSIFIERS = ("fc", "classifier", "head", "linear")
# Beginnings of files that are not the wanted one.
IMPOSTORS = {
    b"version https://git-lfs": "a Git LFS pointer; fetch the file with git lfs pull",
    b"<": "a web page; download the file again",
}


class Unread:
    """Placeholder for a value beside the weights, such as an accuracy of NumPy's."""

    def __init__(self, *content: object) -> None:
        """Ignores the content in the pickle."""

    def __setstate__(self, content: object) -> None:
        """Ignores the content in the pickle."""


@dataclass(frozen=True)
class Weights:
    """The weights of a whole model.

    Attributes:
        tensors: Tensors by timm's keys, without the scales.
        scale: Learned scales (C,) of an lws head; None if there are none.
    """

    tensors: dict[str, Tensor]
    scale: Tensor | None = None


@dataclass(frozen=True)
class State:
    """The tensors of one network in a file.

    Attributes:
        name: Name of the file in messages.
        key: Keys and prefix of the network, such as ``state_dict.model``.
        others: Keys of other networks with the same names of tensors.
        tensors: Tensors by name without the prefix.
        beside: Other values in the same mapping, by name.
    """

    name: str
    key: str
    others: list[str]
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
        """Finds the network with a model's names of tensors, whatever their prefix.

        ``expected`` is the state dict of the model, on any device; ``key`` chooses one of several.

        Raises:
            UsageError: If no network has these names, or several and the choice is not clear.
        """
        key = key and key.rstrip(".")
        wanted = {name for name in expected if not name.endswith(COUNTER)}
        counts = collections.Counter(
            (keys, prefix)
            for keys, state in self.states.items()
            for name in state
            for prefix, rest in _splits(name)
            if rest in wanted and (key is None or f".{key}." in f".{_label(keys, prefix)}.")
        )
        most = max(counts.values(), default=0)
        found = [at for at, number in counts.items() if number == most]
        # Another architecture may repeat a few of the names, such as bn1.weight, in every block.
        if not found or (len(found) > 1 and 2 * most < len(wanted)):
            names = [name for state in self.states.values() for name in state]
            under = f" under {key!r}" if key else ""
            raise UsageError(
                f"{self.name} has no weights of {architecture}{under}: it lacks "
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
        keys, prefix = found[0]
        inside: dict[str, Any] = {}
        beside: dict[str, Any] = {}
        for name, value in self.states[keys].items():
            part = inside if name.startswith(prefix) else beside
            part[name.removeprefix(prefix)] = value
        twice = inside.keys() & beside.keys()
        if twice:
            raise UsageError(f"{self.name} has {min(twice)!r} twice in its weights")
        inside = _classifier_beside(inside, beside, classifier)
        others = [_label(*at) for at in found[1:]]
        return State(self.name, _label(keys, prefix), others, inside, beside)


def _classifier_beside(
    inside: dict[str, Any], beside: dict[str, Any], classifier: str
) -> dict[str, Any]:
    """Adds the classifier of a module that keeps it beside a backbone without one."""
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
    """Yields a name as prefix and rest, split at each dot."""
    yield "", name
    for dot in re.finditer(r"\.", name):
        yield name[: dot.end()], name[dot.end() :]


def _label(keys: str, prefix: str) -> str:
    return ".".join(part for part in (keys, prefix.rstrip(".")) if part)


def _rank(keys: str, prefix: str) -> tuple[bool, bool]:
    is_average = AVERAGE.search(_label(keys, prefix)) is not None
    return is_average, keys.rpartition(".")[2] not in STATE_DICTS


def read_weights(path: str | Path, name: str | None = None) -> WeightsFile:
    """Reads a file of weights of another project, a pickle or safetensors.

    Supported are the layout of Kang et al. (``state_dict_best`` with ``feat_model`` and
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
    states = {}
    if isinstance(content, Mapping):
        joined = _decoupled(content.get(DECOUPLED))
        found = _states(content) if joined is None else [(DECOUPLED, joined)]
        states = {keys: _clean(state, name) for keys, state in found}
    if not states:
        raise UsageError(f"{name} has no weights: found {_kind(content)}")
    args = _args(content, path)
    architecture = content.get("arch") or args.get("model")
    return WeightsFile(name, states, _architecture(architecture), args)


def _architecture(name: object) -> str | None:
    """Returns timm's name of an architecture, with the tag if timm has it; None if unknown."""
    if not isinstance(name, str):
        return None
    base = name.partition(".")[0]
    if not timm.models.is_model(base):
        return None
    return name if name in timm.models.get_arch_pretrained_cfgs(base) else base


def _args(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns the arguments of timm's ``train.py``, in the file or in ``args.yaml`` beside it."""
    args = content.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if isinstance(args, Mapping):
        return {str(key): value for key, value in args.items()}
    beside = path.parent / ARGS
    found = read_yaml(beside) if beside.is_file() else {}
    # Other projects have a file of that name, too.
    return found if _architecture(found.get("model")) else {}


def _read(path: Path, name: str) -> Any:  # noqa: ANN401
    try:
        with path.open("rb") as file:
            start = file.read(64)
        marks = [mark for mark in IMPOSTORS if start.lstrip().startswith(mark)]
        if marks or not start:
            raise UsageError(f"{name} is {IMPOSTORS[marks[0]] if marks else 'empty'}")
        if start[8:9] == b"{":
            return safetensors.torch.load_file(path)
        # timm's train.py stores its arguments, which are plain values in a namespace.
        known: list[Any] = [argparse.Namespace, *((Unread, kind) for kind in UNREAD)]
        with torch.serialization.safe_globals(known), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # About the pickle's protocol: it loads or it does not.
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except pickle.UnpicklingError as error:
        raise UsageError(f"{name} is refused: {_refusal(error)}") from error
    except UsageError:
        raise
    except Exception as error:
        # A part of a pickle may raise anything.
        reason = getattr(error, "strerror", None)
        if reason is None:
            first = " ".join(str(error).partition(". ")[0].split())[:200]
            reason = f"{first or type(error).__name__}; it may be truncated"
        raise UsageError(f"{name} cannot be read as weights: {reason}") from error


def _refusal(error: Exception) -> str:
    """Returns the reason in torch's long message, without its advice to load the file anyway."""
    text = " ".join(str(error).split())
    for mark in ("GLOBAL ", "Unsupported class "):
        if mark in text:
            culprit = text.split(mark, 1)[1].split(" ")[0]
            return (
                f"it is a pickle that asks for {culprit}, not only tensors and plain values; save "
                "the state_dict() of a model alone"
            )
    return "it is not a pickle of only tensors and plain values, or it is damaged"


def _decoupled(content: object) -> dict[Any, Any] | None:
    """Joins the backbone and the classifier of a checkpoint of Kang et al.; None for others."""
    content = content if isinstance(content, Mapping) else {}
    parts = [content.get(key) for key in ("feat_model", "classifier")]
    mappings = [part for part in parts if isinstance(part, Mapping) and part]
    return {**mappings[0], **mappings[1]} if len(mappings) == 2 else None


def _states(content: Mapping[Any, Any], keys: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the mappings of names to tensors in a checkpoint, with the keys that lead to them."""
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    if any(isinstance(value, Tensor) for value in named.values()):
        yield keys, named
    if keys.count(".") + 1 < LEVELS:
        for key, value in named.items():
            if isinstance(value, Mapping):
                yield from _states(value, _label(keys, key))


def _clean(state: Mapping[Any, Any], name: str) -> dict[str, Any]:
    """Removes torch's prefixes of wrapped modules from the names."""
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

    ``expected`` is the state dict of the architecture, on any device. Batch-norm counters that an
    old file lacks are zero. Tensors of a loss and the like are ignored.

    Raises:
        UsageError: If the tensors do not fit; names the first.
    """
    found = state.tensors
    num_classes = len(expected[f"{classifier}.weight"])
    if SCALES in found:
        expected = {**expected, SCALES: torch.empty(num_classes)}
    tensors = {
        key: torch.zeros(value.shape, dtype=value.dtype)
        for key, value in expected.items()
        if key.endswith(COUNTER)
    }
    tensors |= {key: found[key] for key in expected if key in found}
    problems = _foreign_names(state, expected, tensors)
    for key, value in tensors.items():
        problem = None if problems else _tensor_problem(key, value, expected[key])
        if problem is not None:
            problems = f"{key} {problem}"
    if problems:
        raise UsageError(
            f"{state.name} does not fit {architecture} with {num_classes} classes: {problems}"
        )
    return Weights(tensors, tensors.pop(SCALES, None))


def _foreign_names(
    state: State, expected: Mapping[str, Tensor], tensors: Mapping[str, Any]
) -> str | None:
    """Describes the missing and foreign names of tensors; None if there are none."""
    missing = [key for key in expected if key not in tensors]
    foreign = [
        key
        for key, value in state.tensors.items()
        if isinstance(value, Tensor) and key not in expected and not _is_extra(key)
    ]
    if missing:
        foreign += [key for key in state.beside if key not in foreign]
    parts = [("it lacks", missing), ("it has", foreign)]
    return "; ".join(f"{what} {some(keys)}" for what, keys in parts if keys) or None


def _is_extra(key: str) -> bool:
    """Returns whether a tensor is not one of the network, but usual beside them."""
    parts = key.split(".")
    return parts[0] in LOSSES or parts[-1] in EXTRAS


def _tensor_problem(key: str, value: object, wanted: Tensor) -> str | None:
    """Describes why a value cannot be a tensor of the model; None if it can."""
    if not isinstance(value, Tensor) or not _is_plain(value):
        return f"is {_kind(value)}, not a tensor"
    if value.shape != wanted.shape:
        cure = "; give the size of its images with --image-size (in a recipe data.image_size)"
        shapes = f"is {tuple(value.shape)}, not {tuple(wanted.shape)}"
        return shapes + (cure if POSITIONS.search(key) else "")
    # Conversion to half precision often includes the counters.
    if value.is_floating_point() != wanted.is_floating_point() and not key.endswith(COUNTER):
        return f"is {value.dtype}, not {wanted.dtype}"
    if value.is_floating_point() and not value.isfinite().all():
        return "has values that are not finite"
    return None


def some(names: list[str]) -> str:
    """Returns the first of several names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
