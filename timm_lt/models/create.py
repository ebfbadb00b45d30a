"""Models with a chosen head: any timm architecture, a registered one, or a decoupled checkpoint.

Also the images that a model takes: size, normalisation and crop.
"""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import timm.data
from httpx2 import HTTPError
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from timm.layers import to_2tuple
from timm.models import get_arch_pretrained_cfgs
from torch import nn

from timm_lt.checkpoint import (
    BACKGROUND,
    CheckpointInfo,
    check_build,
    find_entry,
    find_info,
    load_error,
    load_model_head,
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
from timm_lt.models.repo import LOCAL_DIR, ModelSource, Repo
from timm_lt.utils.checks import UsageError, check_choice, check_number, unknown_name
from timm_lt.utils.hub import hub_errors


def create_model(
    name: str | Path,
    pretrained: bool | None = None,
    *,
    head: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> nn.Module:
    """Creates a timm model with a head.

    From the Hub, only the config, the backbone and the file of the one head are downloaded, each
    once; cached files are not downloaded again, and nothing is with ``HF_HUB_OFFLINE=1``. No pickle
    is read.

    Args:
        name: Any timm architecture, a registered ``lt_*`` one, ``"local-dir:FOLDER"`` (or just the
            folder) with a decoupled checkpoint or one of timm's, or ``"hf-hub:NAMESPACE/NAME"``
            with the same, followed by ``@REVISION`` for a branch, tag or commit.
        pretrained: Load weights; None means yes for a checkpoint and no otherwise.
        head: One of :func:`timm_lt.list_heads`, or the name of a head of the checkpoint; None
            leaves the joint classifier. With ``features_only=True`` there is no classifier, and
            only the options of the head are checked.
        token: Token of the Hub for ``hf-hub:``; None is that of the login or of ``HF_TOKEN``.
        **options: Options of the head (the stored ones are the defaults), and anything that
            ``timm.create_model`` takes, such as ``cache_dir``.

    Returns:
        The model, in training mode as timm's.

    Raises:
        UsageError: For an unknown architecture or head, one without pretrained weights, a wrong
            option, a head on a model with ``num_classes=0``, a checkpoint that is damaged or does
            not match its config, or a repo that cannot be read.

    >>> create_model("test_resnet", num_classes=3, head="cosine").get_classifier()
    CosineHead(in_features=96, out_features=3, bias=True, scale=16.0, learn_scale=False)
    """
    source = ModelSource.parse(name, cache_dir=options.get("cache_dir"), token=token)
    if source.repo is not None:
        return _create_from_hub(source.repo, pretrained is not False, head, options)
    if token is not None:
        raise UsageError(f"token only applies to names that start with hf-hub:, not to {name!r}")
    if source.folder is not None:
        return _create_from_folder(source.folder, pretrained is not False, head, options)
    name, pretrained = source.name, bool(pretrained)
    _check_architecture(name)
    with _timm_errors(name, head):
        if head is None:
            return timm.create_model(name, pretrained=pretrained, **options)
        entrypoint = timm.models.model_entrypoint(name.partition(".")[0])
        if entrypoint.__module__.startswith("timm_lt."):
            return timm.create_model(name, pretrained=pretrained, head=head, **options)
        ours, theirs = split_options(head, options)
        model = timm.create_model(name, pretrained=pretrained, **theirs)
        if theirs.get("features_only"):
            check_head_options(head, ours)
            return model
        return set_head(model, head, **ours)


def _check_architecture(name: str) -> None:
    """Raises UsageError for an architecture or a tag that timm does not have."""
    architecture, _, tag = name.partition(".")
    if not timm.models.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        hint = f"; similar names: {', '.join(close)}" if close else ""
        raise UsageError(f"unknown architecture {architecture!r}{hint}; timm.list_models() has all")
    tags = [key.partition(".")[2] for key in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise unknown_name(f"tag of {architecture!r}:", tag, [key for key in tags if key])


@contextmanager
def _timm_errors(name: str, head: str | None) -> Iterator[None]:
    """Turns timm's errors for an unknown option or missing weights into UsageError."""
    try:
        yield
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        with hub_errors(name):
            raise error
    except TypeError as error:
        # timm passes options that it does not know to the constructor of the architecture.
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None:
            raise
        hint = "is head= missing?"
        if head is not None and head in HEADS:
            hint = f"options of head {head!r}: {', '.join(head_option_names(head)) or 'none'}"
        raise UsageError(f"{name} has no option {found[1]!r}; {hint}") from error
    except RuntimeError as error:
        if "No pretrained weights exist" not in str(error):
            raise
        raise UsageError(
            f"{name} has no pretrained weights; load a file of weights, or remove pretrained"
        ) from error


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
        # The same as timm sets for a model from the Hub.
        config |= {"source": "hf-hub", "hf_hub_id": str(repo)}
        config.pop("file", None)
    return model


def _create_from_folder(
    folder: Path, pretrained: bool, head: str | None, options: dict[str, Any]
) -> nn.Module:
    info = find_info(folder)
    check_build(folder, read_config(folder), info, pretrained=pretrained)
    if head is None:
        model = _create_joint(folder, pretrained, None, options)
    elif pretrained:
        model = _create_with_head(folder, head, info, options)
    else:
        raise UsageError(f"head {head!r} of {folder} needs its backbone; remove pretrained=False")
    if info is not None:
        model.__dict__[BACKGROUND] = info.background
    return model


def _create_with_head(
    folder: Path, head: str, info: CheckpointInfo | None, options: dict[str, Any]
) -> nn.Module:
    ours, theirs = split_options(find_entry(info, head, str(folder)).kind, options)
    model = _create_joint(folder, True, head, theirs)
    if info is not None:
        return load_model_head(folder, model, head, **ours)
    for new in get_heads(set_head(model, head, **ours)).values():
        assert isinstance(new, Head)
        new.check_fitted()
    return model


def _create_joint(
    folder: Path, pretrained: bool, head: str | None, options: dict[str, Any]
) -> nn.Module:
    name = f"{LOCAL_DIR}{folder}"
    try:
        with _timm_errors(name, head):
            return timm.create_model(name, pretrained=pretrained, **options)
    except UsageError:
        raise
    except Exception as error:
        # timm does not check the values in the config of a folder.
        raise load_error(folder, error) from error


# Preprocessing of images in timm's configuration of a model.
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
    """Creates a model for images of a given size and preprocessing.

    An architecture that takes ``img_size``, such as a ViT, is built for that size, and timm
    resamples the position embeddings of pretrained weights. The size becomes part of the model's
    configuration.

    Args:
        name: A name as for :func:`timm_lt.create_model`.
        pretrained: Load weights.
        image_size: Side, or height and width, in pixels; None is the size of the model.
        head: A head as for :func:`timm_lt.create_model`.
        **options: Arguments of :func:`timm_lt.create_model`, and any of ``FIELDS``.

    Raises:
        UsageError: If there is no such model, or the architecture does not take that size.
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
    # Otherwise timm would prefer these for testing.
    for key in ("test_input_size", "test_crop_pct"):
        config.pop(key, None)
    config["input_size"] = (options.get("in_chans", 3), *to_2tuple(image_size))
    model.__dict__["pretrained_cfg"] = model.__dict__["default_cfg"] = config
    return model


def _create_at(
    name: str, pretrained: bool, image_size: int | tuple[int, int], **options: Any
) -> nn.Module:
    # With dynamic_img_size, the embeddings are fitted to each image.
    sized = {} if options.get("dynamic_img_size") else {"img_size": image_size}
    try:
        return create_model(name, pretrained, **{**sized, **options})
    except UsageError as error:
        # Most convolutional architectures take images of any size and have no img_size.
        if not isinstance(error.__cause__, TypeError):
            raise
        return create_model(name, pretrained, **options)


def with_overlay(first: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Returns options with the preprocessing moved to ``pretrained_cfg_overlay``, for timm.

    Args:
        first: Defaults of the options.
        options: The options.

    Raises:
        UsageError: If timm does not take a value.

    >>> with_overlay({"std": 0.5, "crop_pct": 1.0}, {"crop_pct": 0.9, "global_pool": "max"})
    {'global_pool': 'max', 'pretrained_cfg_overlay': {'std': (0.5, 0.5, 0.5), 'crop_pct': 0.9}}
    """
    key = "pretrained_cfg_overlay"
    overlay: dict[str, Any] = {}
    for given in (first, options):
        overlay |= given.get(key) or {}
        overlay |= {k: _preprocessing(k, v) for k, v in given.items() if k in FIELDS}
    others = {k: v for k, v in {**first, **options}.items() if k not in (key, *FIELDS)}
    return others | ({key: overlay} if overlay else {})


def _preprocessing(field: str, value: Any) -> Any:  # noqa: ANN401
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
    """Returns size, normalisation and crop of a model's images, as arguments of timm's transforms.

    Arguments with which the model was created take precedence over its configuration.

    Raises:
        UsageError: If the model does not take images of 3 channels.
    """
    config: dict[str, Any] = timm.data.resolve_data_config(model=model)
    config["input_size"] = input_size(model)
    channels = config["input_size"][0]
    if channels != 3:
        raise UsageError(
            f"{type(model).__name__} takes images of {channels} channels (in_chans), but images "
            "are read as RGB; create the model with in_chans=3"
        )
    return config


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Returns channels, height and width of a model's images."""
    arguments: dict[str, Any] = getattr(model, "_model_args", {})
    channels, height, width = timm.data.resolve_data_config(model=model)["input_size"]
    # With dynamic_img_size, the embeddings may have another size than the images.
    if arguments.get("img_size") and not arguments.get("dynamic_img_size"):
        height, width = to_2tuple(arguments["img_size"])
    return arguments.get("in_chans") or channels, height, width
