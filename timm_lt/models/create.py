"""Models with a chosen head: any timm architecture, a registered one, or a decoupled checkpoint.

The images that a model takes: their size, normalisation and crop.
"""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from httpx2 import HTTPError
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from timm.layers import to_2tuple
from timm.models import get_arch_pretrained_cfgs, parse_model_name
from torch import nn

from timm_lt.checkpoint import (
    BACKGROUND,
    BLOCK,
    CONFIG,
    CheckpointInfo,
    bounded_build,
    check_memory,
    check_shapes,
    check_sizes,
    check_weights_file,
    load_model_head,
    read_checkpoint,
    read_config,
)
from timm_lt.heads import (
    HEADS,
    Head,
    check_head_options,
    get_heads,
    head_option_names,
    set_head,
)
from timm_lt.models.repo import Repo
from timm_lt.utils.checks import UsageError, check_choice, check_number, unknown_name
from timm_lt.utils.hub import hub_errors

LOCAL_DIR = "local-dir:"


def create_model(
    name: str | Path,
    pretrained: bool | None = None,
    *,
    head: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> nn.Module:
    """Creates a timm model with a head.

    From the Hub come the config, the backbone and the file of the one head, each once: what is in
    the cache is not downloaded again, and with ``HF_HUB_OFFLINE=1`` nothing is. No pickle is read.

    Args:
        name: Any timm architecture, a registered ``lt_*`` one, ``"local-dir:FOLDER"`` (or just the
            folder) with a decoupled checkpoint or one of timm's, or ``"hf-hub:NAMESPACE/NAME"``
            with the same, ``@REVISION`` behind it for a branch, tag or commit.
        pretrained: Load weights; None means yes for a checkpoint and no otherwise.
        head: One of :func:`timm_lt.list_heads`, or the name of a head of the checkpoint; None
            leaves the joint classifier. With ``features_only=True`` there is no classifier, and the
            head is only checked.
        token: For ``hf-hub:``, as everywhere on the Hub: None takes the one that is logged in or
            set as ``HF_TOKEN``.
        **options: Options of the head (they take the place of stored ones), and anything that
            ``timm.create_model`` takes, such as ``cache_dir``.

    Returns:
        The model, in training mode as timm's.

    Raises:
        UsageError: For an unknown architecture or head, one without pretrained weights, a wrong
            option, a head on a model with ``num_classes=0``, a checkpoint that is not whole or not
            what it says, or a repo that cannot be read.

    >>> create_model("test_resnet", num_classes=3, head="cosine").get_classifier()
    CosineHead(in_features=96, out_features=3, bias=True, scale=16.0, learn_scale=False)
    """
    name = _name_of_folder(name)
    source, place = _parse_name(name)
    if source == "hf-hub":
        repo = Repo.parse(place, cache_dir=options.get("cache_dir"), token=token)
        return _create_from_hub(repo, pretrained is not False, head, options)
    if token is not None:
        raise UsageError(f"token is for names that start with hf-hub:, not for {name!r}")
    if source == "local-dir":
        return _create_from_folder(Path(place), pretrained is not False, head, options)
    pretrained = bool(pretrained)
    architecture = name.partition(".")[0]
    _check_architecture(name)
    with _named_options(name, head), _weights_errors(name):
        if head is None:
            return timm.create_model(name, pretrained=pretrained, **options)
        if timm.models.is_model(architecture):
            entrypoint = timm.models.model_entrypoint(architecture)
            if entrypoint.__module__.startswith("timm_lt."):
                return timm.create_model(name, pretrained=pretrained, head=head, **options)
        ours, theirs = split_options(head, options)
        model = timm.create_model(name, pretrained=pretrained, **theirs)
        if theirs.get("features_only"):
            check_head_options(head, ours)
            return model
        return set_head(model, head, **ours)


def _name_of_folder(name: str | Path) -> str:
    """Returns ``local-dir:FOLDER`` for a folder with a checkpoint, and any other name as it is.

    Raises:
        UsageError: If it is a folder without a checkpoint, or a path at which there is none.
    """
    if isinstance(name, str) and (":" in name or timm.models.is_model(name.partition(".")[0])):
        return name
    folder = Path(name).expanduser()
    if (folder / CONFIG).is_file():
        return f"{LOCAL_DIR}{folder}"
    if folder.is_dir():
        raise UsageError(f"the folder {name} has no {CONFIG}: it is not a checkpoint of timm")
    if folder.is_file():
        raise UsageError(
            f"{name} is a file: create the architecture that it has weights of, with "
            f"checkpoint_path={str(name)!r}"
        )
    if isinstance(name, Path) or name.startswith(("./", "../", "/", "~")):
        raise UsageError(f"there is no folder {name}")
    return name


def _parse_name(name: str) -> tuple[str | None, str]:
    try:
        return parse_model_name(name)
    except ValueError as error:
        raise UsageError(str(error)) from error


@contextmanager
def _named_options(name: str, head: str | None) -> Iterator[None]:
    # timm hands an option that it does not know to the architecture, whose error names neither.
    try:
        yield
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None:
            raise
        hint = "is head= missing?"
        if head is not None and head in HEADS:
            hint = f"options of head {head!r}: {', '.join(head_option_names(head)) or 'none'}"
        raise UsageError(f"{name} has no option {found[1]!r}; {hint}") from error


@contextmanager
def _weights_errors(name: str) -> Iterator[None]:
    """Turns what stands between this machine and timm's weights into a UsageError."""
    try:
        yield
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        with hub_errors(name):
            raise error
    except RuntimeError as error:
        if "No pretrained weights exist" not in str(error):
            raise
        raise UsageError(
            f"there are no pretrained weights of {name}; load a file of weights or leave "
            "pretrained out"
        ) from error


def _check_architecture(name: str) -> None:
    """Raises UsageError for an architecture or a tag that timm does not know."""
    architecture, _, tag = name.partition(".")
    if not timm.models.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        hint = f"; close to it are {', '.join(close)}" if close else ""
        raise UsageError(f"unknown architecture {architecture!r}{hint}; timm.list_models() has all")
    tags = [key.partition(".")[2] for key in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise unknown_name(f"tag of {architecture!r}:", tag, [key for key in tags if key])


def split_options(
    head: str | None, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits keyword arguments into those of the head and the others."""
    names = head_option_names(head) if head else []
    ours = {key: value for key, value in options.items() if key in names}
    return ours, {key: value for key, value in options.items() if key not in names}


def _create_from_hub(
    repo: Repo, pretrained: bool, head: str | None, options: dict[str, Any]
) -> nn.Module:
    folder = repo.download(weights=pretrained, head=head)
    model = _create_from_folder(folder, pretrained, head, options)
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict):
        # As timm has it for a model from the Hub.
        config |= {"source": "hf-hub", "hf_hub_id": str(repo)}
        config.pop("file", None)
    return model


def _create_from_folder(
    folder: Path, pretrained: bool, head: str | None, options: dict[str, Any]
) -> nn.Module:
    config = read_config(folder)
    info = read_checkpoint(folder) if BLOCK in config else None
    _check_build(folder, config, info, pretrained=pretrained)
    model = _create_with_head(folder, pretrained, head, info, options)
    if info is not None:
        model.__dict__[BACKGROUND] = info.background
    return model


def _create_with_head(
    folder: Path,
    pretrained: bool,
    head: str | None,
    info: CheckpointInfo | None,
    options: dict[str, Any],
) -> nn.Module:
    if head is None:
        return _create_joint(folder, pretrained, None, options)
    if not pretrained:
        raise UsageError(f"head {head!r} of {folder} needs its backbone; leave pretrained as it is")
    if info is None:
        return _create_from_plain(folder, head, options)
    kind = info.heads[head].kind if head in info.heads else head
    ours, theirs = split_options(kind, options)
    classes = theirs.get("num_classes", info.num_classes)
    if classes != info.num_classes:
        raise UsageError(
            f"head {head!r} of {folder} has {info.num_classes} classes, not {classes}: "
            "create the model without head=, train it, and fit the head again"
        )
    model = _create_joint(folder, True, head, theirs)
    return load_model_head(folder, model, head, **ours)


def _create_from_plain(folder: Path, head: str, options: dict[str, Any]) -> nn.Module:
    """Puts a head that needs no fit on a checkpoint of timm's own."""
    free = [name for name in HEADS if not HEADS[name].own_state]
    if head not in free:
        raise UsageError(
            f"{folder} is a plain timm checkpoint without heads: choose one of {', '.join(free)}, "
            f"or create the model without head= and fit one"
        )
    ours, theirs = split_options(head, options)
    model = set_head(_create_joint(folder, True, head, theirs), head, **ours)
    for new in get_heads(model).values():
        assert isinstance(new, Head)
        new.check_fitted()
    return model


def _check_build(
    folder: Path, config: dict[str, Any], info: CheckpointInfo | None, *, pretrained: bool
) -> None:
    """Checks a checkpoint's weights and sizes, without memory for more than its file has."""
    shapes = check_weights_file(folder, info) if pretrained else {}
    check_sizes(folder / CONFIG, config, shapes)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("meta"),
            bounded_build(folder, shapes),
        ):
            model = timm.create_model(f"{LOCAL_DIR}{folder}", pretrained=False)
    except UsageError:
        raise
    except Exception as error:
        if _is_somebodys_own(config["architecture"]):
            # It may read its tensors while it is built, which those without memory do not allow.
            return
        raise _unloadable(folder, error) from error
    check_memory(folder, shapes, model)
    if pretrained:
        wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        check_shapes(folder, shapes, wanted, exact=info is not None)


def _is_somebodys_own(architecture: str) -> bool:
    """Returns whether an architecture was registered by neither timm nor timm_lt."""
    if not timm.models.is_model(architecture):
        return False
    module = timm.models.model_entrypoint(architecture).__module__
    return not module.startswith(("timm.", "timm_lt."))


def _create_joint(
    folder: Path, pretrained: bool, head: str | None, options: dict[str, Any]
) -> nn.Module:
    name = f"{LOCAL_DIR}{folder}"
    with _named_options(name, head):
        try:
            return timm.create_model(name, pretrained=pretrained, **options)
        except TypeError as error:
            if "unexpected keyword argument" in str(error):
                raise
            raise _unloadable(folder, error) from error
        except UsageError:
            raise
        except Exception as error:
            # The configuration in the folder may hold anything, and timm does not check it.
            raise _unloadable(folder, error) from error


def _unloadable(folder: Path, error: Exception) -> UsageError:
    reason = " ".join(str(error).split())[:300]
    return UsageError(f"the checkpoint {folder} cannot be loaded: {type(error).__name__}: {reason}")


# Fields of timm's configuration of a model; arguments of create_loader and create_transform.
FIELDS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")

CHOICES = {
    "interpolation": ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
    "crop_mode": ("center", "squash", "border"),
}


def create_sized_model(
    name: str,
    pretrained: bool,
    image_size: int | tuple[int, int] | None = None,
    *,
    head: str | None = None,
    **options: Any,
) -> nn.Module:
    """Creates a model for images of a size, with the preprocessing among its options.

    An architecture that takes ``img_size``, such as a ViT, is built for that size; timm resamples
    the position embeddings of pretrained weights. The size is noted in the model's configuration,
    where whoever loads the model finds it.

    Args:
        name: As for :func:`timm_lt.create_model`.
        pretrained: As there.
        image_size: Side, or height and width, in pixels; None is the model's own.
        head: As there.
        **options: Arguments of :func:`timm_lt.create_model`, and any of ``FIELDS``.

    Raises:
        UsageError: If there is no such model, or the architecture cannot take that size.
    """
    options = with_overlay({}, options)
    try:
        if image_size is None:
            return create_model(name, pretrained, head=head, **options)
        model = _create_at(name, pretrained, image_size, head=head, **options)
    except UsageError:
        raise
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        size = "" if image_size is None else f" for images of {image_size} pixels"
        raise UsageError(f"{name} cannot be built{size} with {options}: {reason}") from error
    config: dict[str, Any] = {**(getattr(model, "pretrained_cfg", None) or {})}
    # What the model would be tested at instead, and how.
    for key in ("test_input_size", "test_crop_pct"):
        config.pop(key, None)
    config["input_size"] = (options.get("in_chans", 3), *to_2tuple(image_size))
    model.__dict__["pretrained_cfg"] = model.__dict__["default_cfg"] = config
    return model


def _create_at(
    name: str, pretrained: bool, image_size: int | tuple[int, int], **options: Any
) -> nn.Module:
    # A network of any size fits its embeddings to each image.
    sized = {} if options.get("dynamic_img_size") else {"img_size": image_size}
    try:
        return create_model(name, pretrained, **{**sized, **options})
    except UsageError as error:
        # Most convolutional architectures take images of any size, and no such argument.
        if not isinstance(error.__cause__, TypeError):
            raise
        return create_model(name, pretrained, **options)


def with_overlay(first: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Returns options with their preprocessing where timm takes it, in ``pretrained_cfg_overlay``.

    Args:
        first: Options that the others take the place of.
        options: The others.

    Raises:
        UsageError: If a value is not one of timm's.

    >>> with_overlay({"std": 0.5, "crop_pct": 1.0}, {"crop_pct": 0.9, "global_pool": "max"})
    {'global_pool': 'max', 'pretrained_cfg_overlay': {'std': (0.5, 0.5, 0.5), 'crop_pct': 0.9}}
    """
    key = "pretrained_cfg_overlay"
    overlay: dict[str, Any] = {}
    for given in (first, options):
        overlay |= given.get(key) or {}
        overlay |= {k: _checked(k, v) for k, v in given.items() if k in FIELDS}
    others = {k: v for k, v in {**first, **options}.items() if k not in (key, *FIELDS)}
    return others | ({key: overlay} if overlay else {})


def _checked(field: str, value: Any) -> Any:  # noqa: ANN401
    if field == "crop_pct":
        return check_number(field, value, "(0, inf)")
    if field in CHOICES:
        check_choice(f"{field}:", value, CHOICES[field])
        return value
    values = [*value] if isinstance(value, list | tuple) else [value]
    span = "(0, inf)" if field == "std" else "(-inf, inf)"
    numbers = tuple(check_number(field, number, span) for number in values)
    if len(numbers) not in (1, 3):
        raise UsageError(f"{field} must be 1 or 3 numbers, got {len(numbers)}")
    return numbers * (3 // len(numbers))


def image_config(model: nn.Module) -> dict[str, Any]:
    """Returns the size, normalisation and crop of a model's images, as timm's transforms take them.

    Arguments that the model was created with come before its configuration.

    Raises:
        UsageError: If the model does not take images of 3 channels.
    """
    config: dict[str, Any] = timm.data.resolve_data_config(model=model)
    config["input_size"] = input_size(model)
    channels = config["input_size"][0]
    if channels != 3:
        raise UsageError(
            f"{type(model).__name__} takes images of {channels} channels (in_chans), and images "
            "are read as RGB: create the model with in_chans=3"
        )
    return config


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Returns channels, height and width of a model's images."""
    arguments: dict[str, Any] = getattr(model, "_model_args", {})
    channels, height, width = timm.data.resolve_data_config(model=model)["input_size"]
    # Embeddings that are fitted to each image may be of another size than the images.
    if arguments.get("img_size") and not arguments.get("dynamic_img_size"):
        height, width = to_2tuple(arguments["img_size"])
    return arguments.get("in_chans") or channels, height, width
