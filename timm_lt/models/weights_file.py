"""Models from a file of weights of another project, such as timm's ``train.py``."""

import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from torch import Tensor, nn

from timm_lt.checkpoint import check_sizes
from timm_lt.checkpoint.format import RESERVED
from timm_lt.heads import classifier_name
from timm_lt.models.create import FIELDS, create_sized_model, with_overlay
from timm_lt.models.third_party import Weights, WeightsFile, read_weights
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import log

# Arguments of create_model by those of timm's train.py.
MODEL_ARGS = {"gp": "global_pool", "in_chans": "in_chans", "bn_eps": "bn_eps"}
# Arguments of create_model that are handled separately.
OTHERS = ("num_classes", "img_size")
# Fields of pretrained_cfg about weights other than those of the file.
ORIGIN = ("tag", "license", "origin_url", "paper_ids", "label_names", "label_descriptions")


def create_from_file(name: str, path: str | Path, **options: Any) -> nn.Module:
    """Creates a model with the weights in a file of another project; options as :func:`build`."""
    model, weights = build(read_weights(Path(path).expanduser()), name, **options)
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
    that of the position embeddings. Options given here take precedence.

    Args:
        file: The file.
        name: A timm architecture, or another name as for :func:`timm_lt.create_model`.
        num_classes: Number of classes; None is that of the file.
        classifier: Whether to load the weights of the classifier; None loads them if their number
            of classes is that of the model.
        key: Key or prefix of the weights, if the file has several networks.
        image_size: Side of the images in pixels; None is that of the file, or of the model.
        **options: Arguments of :func:`timm_lt.models.create.create_sized_model`.
    """
    stated, given = (text.partition(".")[0] for text in (file.architecture or "", name))
    if stated and timm.models.is_model(given) and _base(stated) != _base(given):
        raise UsageError(f"{file.name} has weights of {file.architecture}, not of {name}")
    if name == stated:
        # With the tag, which determines the normalisation of the images.
        name = file.architecture or name
    trained, size = _training_options(file)
    _log_training(file, trained, size)
    options = with_overlay({**trained, **options})
    # On the meta device: the file may ask for any size.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        probe = create_sized_model(name, False, image_size or size, num_classes=1, **options)
    path = classifier_name(probe)
    state = file.select(probe.state_dict(), name, path, key=key)
    classes = state.num_classes(path)
    model = create_sized_model(
        name,
        False,
        image_size or size or _embedded_size(state, probe),
        num_classes=num_classes or classes or 1,
        **options,
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
    file = read_weights(Path(path).expanduser())
    state = file.select(model.state_dict(), type(model).__name__, classifier, key=key)
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
    shapes = {
        key: tuple(value.shape) for key, value in file.tensors.items() if isinstance(value, Tensor)
    }
    try:
        kwargs = dict(args.get("model_kwargs") or {})
        if isinstance(args.get("input_size"), int):
            # In scripts derived from timm's.
            args["img_size"] = args.get("img_size", args.pop("input_size"))
        pixels = args.setdefault("img_size", kwargs.get("img_size"))
        if isinstance(pixels, list | tuple):
            args["input_size"] = (args.get("in_chans", 3), *pixels)
        options = {key: v for key, v in kwargs.items() if key not in (*RESERVED, *OTHERS)}
        options |= {ours: args[key] for key, ours in MODEL_ARGS.items() if args.get(key)}
        check_sizes(Path(file.name), {"model_args": options}, shapes)
        options |= {key: args.pop(key) for key in FIELDS if args.get(key)}
        with_overlay(options)
        config = timm.data.resolve_data_config(args, pretrained_cfg={"architecture": ""})
        channels, height, width = (int(pixels) for pixels in config["input_size"])
        if min(height, width) < 1:
            raise ValueError(f"images of {height} × {width} pixels")
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{file.name} has training arguments beyond timm's: {reason}") from error
    if channels != 3:
        options["in_chans"] = channels
    is_sized = args["img_size"] is not None or "input_size" in args
    return options, (height, width) if is_sized else None


def _log_training(file: WeightsFile, options: dict[str, Any], size: tuple[int, int] | None) -> None:
    values = {**options, **({"image size": size} if size else {})}
    if values:
        listing = ", ".join(f"{key} {value}" for key, value in values.items())
        log.info("%s was trained with %s", file.name, listing)
    if file.args.get("class_map"):
        log.warning(
            "%s was trained with --class-map %s: its classes have the order of that file, not that "
            "of the folders",
            *(file.name, file.args["class_map"]),
        )


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
