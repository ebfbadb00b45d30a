"""Files of weights of other projects, such as timm's ``train.py``, and models with these weights.

Pickles are read with ``weights_only=True`` only, and nowhere else in the package.
"""

import argparse
import collections
import math
import pickle  # noqa: TID251
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import timm.data
import torch
from torch import Tensor, nn

from timm_lt.checkpoint.format import RESERVED
from timm_lt.checkpoint.load import check_sizes
from timm_lt.heads import classifier_name
from timm_lt.models.create import FIELDS, create_sized_model, with_overlay
from timm_lt.utils.checks import UsageError, shown_names, user_errors
from timm_lt.utils.console import log
from timm_lt.utils.files import read_yaml

# Usual keys of the weights, preferred to others.
STATE_DICTS = {"state_dict", "model"}
# Part of the key of a moving average, which is used only if asked for, or if alone.
AVERAGE = re.compile(r"(?<![a-z])(?:ema|swa|averaged)(?![a-z])", re.IGNORECASE)
# Names shown in messages, and nested mappings that are searched for weights.
SHOWN, LEVELS = 3, 4
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
# Arguments of create_model by those of timm's train.py, and those that are handled separately.
MODEL_ARGS = {"gp": "global_pool", "in_chans": "in_chans", "bn_eps": "bn_eps"}
OTHERS = ("num_classes", "img_size")
# Fields of pretrained_cfg about weights other than those of the file.
ORIGIN = ("tag", "license", "origin_url", "paper_ids", "label_names", "label_descriptions")


class Unread:
    """Placeholder for a value beside the weights, such as an accuracy of NumPy's."""

    def __init__(self, *content: object) -> None:
        """Ignores the content in the pickle."""

    __setstate__ = __init__


@dataclass(frozen=True)
class Weights:
    """The weights of a whole model by timm's keys, and learned scales (C,) of an lws head."""

    tensors: dict[str, Tensor]
    scale: Tensor | None = None


@dataclass(frozen=True)
class WeightsFile:
    """The content of a file of weights, or one network of it.

    ``tensors`` are those of the file, and values beside them, by their path in nested mappings.
    ``architecture`` and ``args`` are what timm's ``train.py`` notes, if it wrote the file. ``key``
    is the path of the selected network, and ``others`` are those with the same names of tensors.
    """

    name: str
    tensors: dict[str, Any]
    architecture: str | None
    args: dict[str, Any]
    key: str = ""
    others: tuple[str, ...] = ()

    def num_classes(self, classifier: str) -> int | None:
        """Returns the number of classes of the classifier at a path; None if there is none."""
        weight = self.tensors.get(f"{classifier}.weight")
        return len(weight) if isinstance(weight, Tensor) and weight.ndim else None

    def fit(
        self, expected: Mapping[str, Tensor], architecture: str, classifier: str = "fc"
    ) -> Weights:
        """Returns the weights of an architecture: no tensor missing, foreign or misshapen.

        ``expected`` is its state dict, on any device. Batch-norm counters that an old file lacks
        are zero. Tensors of a loss and the like are ignored.
        """
        found, num_classes = self.tensors, len(expected[f"{classifier}.weight"])
        if SCALES in found:
            expected = {**expected, SCALES: torch.empty(num_classes)}
        counters = [key for key in expected if key.endswith(COUNTER)]
        tensors = {key: torch.zeros_like(expected[key], device="cpu") for key in counters}
        tensors |= {key: found[key] for key in expected if key in found}
        missing = [key for key in expected if key not in tensors]
        extra = [key for key in found if key not in expected and isinstance(found[key], Tensor)]
        # A loss, or a counter of torch's or a profiler's, is usual beside a network.
        foreign = [
            key
            for key in extra
            if key.partition(".")[0] not in LOSSES and key.rpartition(".")[2] not in EXTRAS
        ]
        problems = [f"it lacks {shown_names(missing, SHOWN)}"] if missing else []
        problems += [f"it has {shown_names(foreign, SHOWN)}"] if foreign else []
        for key, value in {} if problems else tensors.items():
            problem = _tensor_problem(key, value, expected[key])
            problems += [f"{key} {problem}"] if problem else []
        if problems:
            raise UsageError(
                f"{self.name} does not fit {architecture} with {num_classes} classes: "
                f"{'; '.join(problems[:2])}"
            )
        return Weights(tensors, tensors.pop(SCALES, None))

    def select(
        self,
        expected: Mapping[str, Tensor],
        architecture: str,
        classifier: str = "fc",
        *,
        key: str | None = None,
    ) -> "WeightsFile":
        """Selects the network with a model's names of tensors, whatever their prefix.

        ``expected`` is the state dict of the model, on any device; ``key`` chooses one of several.
        """
        key = key and key.rstrip(".")
        wanted = {name for name in expected if not name.endswith(COUNTER)}
        counts = collections.Counter(
            prefix
            for name in self.tensors
            for prefix, rest in _splits(name)
            if rest in wanted and (key is None or f".{key}." in f".{prefix}")
        )
        most = max(counts.values(), default=0)
        found = sorted((at for at, number in counts.items() if number == most), key=_rank)
        # Another architecture may repeat a few of the names, such as bn1.weight, in every block.
        if not found or (len(found) > 1 and 2 * most < len(wanted)):
            lacks = sorted(wanted - self.tensors.keys()) or sorted(wanted)
            has = shown_names([*self.tensors], SHOWN)
            raise UsageError(
                f"{self.name} has no weights of {architecture}{f' under {key!r}' if key else ''}: "
                f"it lacks {shown_names(lacks, SHOWN)}; it has {has}"
            )
        best, *others = (prefix.rstrip(".") for prefix in found)
        if sum(_rank(prefix) == _rank(found[0]) for prefix in found) > 1:
            raise UsageError(
                f"{self.name} has several networks: {', '.join([best, *others])}; choose one with "
                "--checkpoint-key (in a recipe model.checkpoint_key)"
            )
        tensors = {
            name.removeprefix(found[0]): value
            for name, value in self.tensors.items()
            if name.startswith(found[0])
        }
        if f"{classifier}.weight" not in tensors:
            tensors |= self._classifier_beside(found[0], classifier)
        return replace(self, tensors=tensors, key=best, others=tuple(others))

    def _classifier_beside(self, prefix: str, classifier: str) -> dict[str, Any]:
        """Returns the classifier that a module keeps beside a backbone, with learned scales."""
        found: list[str] = []
        parent = prefix
        while parent and not found:
            outer = parent[:-1].rpartition(".")[0]
            parent = f"{outer}." if outer else ""
            found = [
                name.removesuffix(".weight")
                for name in self.tensors
                if name.startswith(parent) and not name.startswith(prefix)
                if name.endswith(".weight") and name.split(".")[-2] in CLASSIFIERS
            ]
        if len(found) != 1:
            return {}
        names = {f"{classifier}.{part}": f"{found[0]}.{part}" for part in ("weight", "bias")}
        names[SCALES] = f"{found[0].rpartition('.')[0]}.{SCALES}"
        return {ours: self.tensors[name] for ours, name in names.items() if name in self.tensors}


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Yields a name as prefix and rest, split at each dot."""
    yield "", name
    for dot in re.finditer(r"\.", name):
        yield name[: dot.end()], name[dot.end() :]


def _rank(prefix: str) -> tuple[bool, bool]:
    return AVERAGE.search(prefix) is not None, STATE_DICTS.isdisjoint(prefix.split("."))


def _tensor_problem(key: str, value: object, wanted: Tensor) -> str | None:
    """Describes why a value cannot be a tensor of the model; None if it can."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    is_plain = value.layout == torch.strided and not (value.is_quantized or value.is_nested)
    if not is_plain or value.device.type != "cpu" or value.dtype not in DTYPES:
        return f"is a {value.dtype} tensor, {value.layout}, on {value.device}"
    if value.shape != wanted.shape:
        cure = "; give the size of its images with --image-size (in a recipe data.image_size)"
        shapes = f"is {tuple(value.shape)}, not {tuple(wanted.shape)}"
        return shapes + (cure if POSITIONS.search(key) else "")
    # Conversion to half precision often includes the counters.
    if value.is_floating_point() != wanted.is_floating_point() and not key.endswith(COUNTER):
        return f"is {value.dtype}, not {wanted.dtype}"
    return None if value.isfinite().all() else "has values that are not finite"


def read_weights(path: str | Path, name: str | None = None) -> WeightsFile:
    """Reads a file of weights of another project, a pickle or safetensors.

    Any nested mappings of names to tensors are supported, such as those of timm's ``train.py`` and
    of Kang et al. Pickles of anything but tensors and plain values are refused. ``name`` is that of
    the file in messages, e.g. its URL.
    """
    path = Path(path).expanduser()
    name = name or str(path)
    content = _read(path, name)
    found = _flatten(content) if isinstance(content, Mapping) else ()
    tensors = {WRAPPERS.sub("", key): value for key, value in found}
    if not any(isinstance(value, Tensor) for value in tensors.values()):
        raise UsageError(f"{name} has no weights: found a {type(content).__name__}")
    args = _args(content, path)
    return WeightsFile(name, tensors, _architecture(content.get("arch") or args.get("model")), args)


def _read(path: Path, name: str) -> Any:  # noqa: ANN401
    try:
        with path.open("rb") as file:
            start = file.read(64)
        kinds = [kind for mark, kind in IMPOSTORS.items() if start.lstrip().startswith(mark)]
        if kinds or not start:
            raise UsageError(f"{name} is {kinds[0] if kinds else 'empty'}")
        if start[8:9] == b"{":
            return safetensors.torch.load_file(path)
        # timm's train.py stores its arguments, which are plain values in a namespace.
        known: list[Any] = [argparse.Namespace, *((Unread, kind) for kind in UNREAD)]
        with torch.serialization.safe_globals(known), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # About the pickle's protocol: it loads or it does not.
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        # Without torch's advice to load the file anyway.
        culprit = re.search(r"(?:GLOBAL |Unsupported class )(\S+)", " ".join(str(error).split()))
        asks = f"a pickle that asks for {culprit[1]}, not" if culprit else "damaged, or not"
        problem = f"is refused: it is {asks} only tensors and plain values; save the state_dict()"
        raise UsageError(f"{name} {problem} of a model alone") from error
    except Exception as error:
        # A part of a pickle may raise anything.
        reason = " ".join(str(error).split()).partition(". ")[0][:200] or type(error).__name__
        reason = getattr(error, "strerror", None) or f"{reason}; it may be truncated"
        raise UsageError(f"{name} cannot be read as weights: {reason}") from error


def _flatten(content: Mapping[Any, Any], levels: int = LEVELS) -> Iterator[tuple[str, Any]]:
    """Yields the values in nested mappings by dotted path."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            inside = _flatten(value, levels - 1) if levels > 1 and isinstance(key, str) else ()
            yield from ((f"{key}.{rest}", part) for rest, part in inside)
        elif isinstance(key, str):
            yield key, value


def _architecture(name: object) -> str | None:
    """Returns timm's name of an architecture, with the tag if timm has it; None if unknown."""
    base = name.partition(".")[0] if isinstance(name, str) else ""
    if not timm.models.is_model(base):
        return None
    return str(name) if name in timm.models.get_arch_pretrained_cfgs(base) else base


def _args(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns the arguments of timm's ``train.py``, in the file or in ``args.yaml`` beside it."""
    args = content.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if isinstance(args, Mapping):
        return {str(key): value for key, value in args.items()}
    beside = path.parent / "args.yaml"
    found = read_yaml(beside) if beside.is_file() else {}
    # Other projects have a file of that name, too.
    return found if _architecture(found.get("model")) else {}


def create_from_file(name: str, path: str | Path, **options: Any) -> nn.Module:
    """Creates a model with the weights in a file of another project; options as :func:`build`."""
    model, weights = build(read_weights(path), name, **options)
    if weights.scale is not None:
        raise UsageError(
            f"{path} has the scales of an lws head, not a joint classifier; convert it to a "
            "checkpoint with timm-lt convert"
        )
    return model


def build(
    file: WeightsFile,
    name: str,
    *,
    num_classes: int | None = None,
    classifier: bool | None = True,
    key: str | None = None,
    image_size: int | None = None,
    **options: Any,
) -> tuple[nn.Module, Weights]:
    """Creates a model with the weights of a file, and returns both.

    Pooling, channels, image size, normalisation and crop are those of the training, if the file (or
    ``args.yaml`` beside it) has the arguments of timm's ``train.py``. Otherwise the image size is
    that of the position embeddings. Options given here take precedence; they are those of
    :func:`timm_lt.models.create.create_sized_model`. ``classifier`` says whether to load the
    weights of the classifier; None loads them if their number of classes is that of the model.
    """
    stated, given = (text.partition(".")[0] for text in (file.architecture or "", name))
    if stated and timm.models.is_model(given) and _base(stated) != _base(given):
        raise UsageError(f"{file.name} has weights of {file.architecture}, not of {name}")
    if name == stated:
        # With the tag, which determines the normalisation of the images.
        name = file.architecture or name
    trained, size = _training_options(file)
    options = with_overlay({**trained, **options})
    # On the meta device: the file may ask for any size.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        probe = create_sized_model(name, False, image_size or size, num_classes=1, **options)
    path = classifier_name(probe)
    state = file.select(probe.state_dict(), name, path, key=key)
    classes = state.num_classes(path)
    pixels = image_size or size or _embedded_size(state, probe)
    model = create_sized_model(
        name, False, pixels, num_classes=num_classes or classes or 1, **options
    )
    own, tensors = model.state_dict(), state.tensors
    if not (classes == model.num_classes if classifier is None else classifier):
        # The classifier stays as it was drawn.
        tensors = {k: v for k, v in tensors.items() if not k.startswith(f"{path}.")}
        tensors |= {k: v for k, v in own.items() if k.startswith(f"{path}.")}
    if image_size is not None:
        tensors = _resampled(tensors, model)
    weights = replace(state, tensors=tensors).fit(own, name, path)
    model.load_state_dict(weights.tensors)
    if state.others:
        log.info(
            "%s: loaded the weights under %s, not %s (--checkpoint-key chooses)",
            *(state.name, state.key, ", ".join(state.others)),
        )
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    config = {key: value for key, value in config.items() if key not in ORIGIN}
    model.__dict__["pretrained_cfg"] = model.__dict__["default_cfg"] = config
    return model, weights


def classes_of_file(path: str | Path, model: nn.Module, key: str | None = None) -> int | None:
    """Returns the number of classes of a file for this kind of model; None without a classifier."""
    classifier = classifier_name(model)
    state = read_weights(path).select(model.state_dict(), type(model).__name__, classifier, key=key)
    return state.num_classes(classifier)


def _base(architecture: str) -> str:
    """Returns the architecture of timm that a name stands for."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        warnings.simplefilter("ignore")  # Deprecated names.
        model: Any = timm.create_model(architecture)
    base = getattr(model, "timm_base", None)
    return str(base.architecture if base else model.pretrained_cfg["architecture"])


def _training_options(file: WeightsFile) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Returns the options of the model and the image size with which a file was trained."""
    args = {key: value for key, value in file.args.items() if value is not None}
    tensors = {key: value for key, value in file.tensors.items() if isinstance(value, Tensor)}
    kinds = (AssertionError, TypeError, ValueError, KeyError, UsageError)
    with user_errors(f"{file.name} has training arguments beyond timm's", *kinds):
        kwargs = dict(args.get("model_kwargs") or {})
        if isinstance(args.get("input_size"), int):
            # In scripts derived from timm's.
            args["img_size"] = args.get("img_size", args.pop("input_size"))
        pixels = args.setdefault("img_size", kwargs.get("img_size"))
        if isinstance(pixels, list | tuple):
            args["input_size"] = (args.get("in_chans", 3), *pixels)
        options = {key: v for key, v in kwargs.items() if key not in (*RESERVED, *OTHERS)}
        options |= {ours: args[key] for key, ours in MODEL_ARGS.items() if args.get(key)}
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        check_sizes(Path(file.name), {"model_args": options}, shapes)
        options |= {key: args.pop(key) for key in FIELDS if args.get(key)}
        with_overlay(options)
        config = timm.data.resolve_data_config(args, pretrained_cfg={"architecture": ""})
        channels, height, width = (int(pixels) for pixels in config["input_size"])
        if min(height, width) < 1:
            raise ValueError(f"images of {height} × {width} pixels")
    if channels != 3:
        options["in_chans"] = channels
    is_sized = args["img_size"] is not None or "input_size" in args
    size = (height, width) if is_sized else None
    if values := {**options, **({"image size": size} if size else {})}:
        listing = ", ".join(f"{key} {value}" for key, value in values.items())
        log.info("%s was trained with %s", file.name, listing)
    return options, size


def _embedded_size(state: WeightsFile, model: nn.Module) -> tuple[int, int] | None:
    """Returns the image size of position embeddings; None if it is that of the model, or unknown.

    They have shape (1, tokens, D) or (1, rows, columns, D).
    """
    there, here = (tensors.get("pos_embed") for tensors in (state.tensors, model.state_dict()))
    patches: Any = getattr(model, "patch_embed", None)
    grid, pixels = (getattr(patches, name, None) for name in ("grid_size", "img_size"))
    if not (grid and pixels and isinstance(here, Tensor) and isinstance(there, Tensor)):
        return None
    if there.ndim != here.ndim or there.shape[-1] != here.shape[-1] or there.shape == here.shape:
        return None
    rows, columns = there.shape[1:3]
    if there.ndim == 3:
        tokens = there.shape[1] - here.shape[1] + math.prod(grid)
        rows = columns = math.isqrt(max(tokens, 0))
        if rows * columns != tokens:
            return None
    # In a hybrid, the patches are those of the stem's output.
    return rows * pixels[0] // grid[0], columns * pixels[1] // grid[1]


def _resampled(tensors: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Returns tensors with position embeddings that timm resampled to the model's image size."""
    # A function in the module of each architecture that needs it.
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    own = model.state_dict().items()
    same = all(getattr(tensors.get(key), "shape", v.shape) == v.shape for key, v in own)
    if adapt is None or same:
        return tensors
    try:
        return {**tensors, **adapt(dict(tensors), model)}
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        # The shapes differ in more than the image size, which WeightsFile.fit reports.
        return tensors
