"""Models with a chosen head, the images that they take, and the names of their classes."""

import difflib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import timm.data
from httpx2 import HTTPError
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.layers import to_2tuple
from timm.models import get_arch_pretrained_cfgs
from torch import nn

from timm_lt.checkpoint.format import BACKGROUND, find_info, read_config
from timm_lt.checkpoint.load import check_build, find_entry, load_error, load_heads
from timm_lt.heads import HEADS, Head, check_head_options, get_heads, head_option_names, set_head
from timm_lt.models.repo import LOCAL_DIR, ModelSource
from timm_lt.utils.checks import UsageError, check_choice, check_number, unknown_name
from timm_lt.utils.console import log
from timm_lt.utils.hub import hub_errors

# Preprocessing of images in timm's configuration of a model.
FIELDS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
CHOICES = {
    "interpolation": ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
    "crop_mode": ("center", "squash", "border"),
}
WORDNET = re.compile(r"n\d{8}")
# Share of class names that must be those of ImageNet; lists differ in the spelling of a few.
SHARE = 0.9


def create_model(
    name: str | Path,
    pretrained: bool | None = None,
    *,
    head: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> nn.Module:
    """Creates a timm model with a head.

    From the Hub, exactly the config, the backbone and the file of the one head are downloaded, into
    the cache. No pickle is read.

    Args:
        name: Any timm architecture, a registered ``lt_*`` one, ``"local-dir:FOLDER"`` (or just the
            folder) with a decoupled checkpoint or one of timm's, or ``"hf-hub:NAMESPACE/NAME"``
            with the same, followed by ``@REVISION`` for a branch, tag or commit.
        pretrained: Load weights; None means yes for a checkpoint and no otherwise.
        head: One of :func:`timm_lt.list_heads`, or the name of a head of the checkpoint; None
            leaves the joint classifier. With ``features_only=True`` only its options are checked.
        token: Token of the Hub for ``hf-hub:``; None is that of the login or of ``HF_TOKEN``.
        **options: Options of the head (the stored ones are the defaults), and anything that
            ``timm.create_model`` takes, such as ``cache_dir``.

    Returns:
        The model, in training mode as timm's.

    Raises:
        UsageError: For an unknown architecture or head, a wrong option, weights that do not exist,
            or a checkpoint or repo that cannot be read or is damaged.

    >>> create_model("test_resnet", num_classes=3, head="cosine").get_classifier()
    CosineHead(in_features=96, out_features=3, bias=True, scale=16.0, learn_scale=False)
    """
    source = ModelSource.parse(name, cache_dir=options.get("cache_dir"), token=token)
    if token is not None and source.repo is None:
        raise UsageError(f"token only applies to names that start with hf-hub:, not to {name!r}")
    folder, weights = source.folder, pretrained is not False
    if source.repo is not None:
        folder = source.repo.download(weights=weights, head=head)
    if folder is not None:
        model = _create_from_folder(folder, weights, head, options)
        config = getattr(model, "pretrained_cfg", None)
        if source.repo is not None and isinstance(config, dict):
            # The same as timm sets for a model from the Hub.
            config |= {"source": "hf-hub", "hf_hub_id": str(source.repo)}
            config.pop("file", None)
        return model
    name, pretrained = source.name, bool(pretrained)
    architecture, _, tag = name.partition(".")
    module = find_entrypoint(architecture).__module__
    tags = [key.partition(".")[2] for key in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise unknown_name(f"tag of {architecture!r}:", tag, [key for key in tags if key])
    with _timm_errors(name, head):
        if head is not None and module.startswith("timm_lt."):
            return timm.create_model(name, pretrained=pretrained, head=head, **options)
        ours, theirs = split_options(head, options)
        model = timm.create_model(name, pretrained=pretrained, **theirs)
        if head is None:
            return model
        if theirs.get("features_only"):
            check_head_options(head, ours)
            return model
        return set_head(model, head, **ours)


def find_entrypoint(architecture: str) -> Callable[..., nn.Module]:
    """Returns timm's function for an architecture; the error for an unknown one lists others."""
    if not timm.models.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        hint = f"; similar names: {', '.join(close)}" if close else ""
        raise UsageError(f"unknown architecture {architecture!r}{hint}; timm.list_models() has all")
    found: Callable[..., nn.Module] = timm.models.model_entrypoint(architecture)
    return found


@contextmanager
def _timm_errors(name: str, head: str | None) -> Iterator[None]:
    """Turns timm's errors for an unknown option or missing weights into UsageError."""
    try:
        yield
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        with hub_errors(name):
            raise error
    except (TypeError, RuntimeError) as error:
        # timm passes options that it does not know to the constructor of the architecture.
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is not None:
            hint = "is head= missing?"
            if head is not None and head in HEADS:
                hint = f"options of head {head!r}: {', '.join(head_option_names(head)) or 'none'}"
            problem = f"has no option {found[1]!r}; {hint}"
        elif "No pretrained weights exist" in str(error):
            problem = "has no pretrained weights; load a file of weights, or remove pretrained"
        else:
            raise
        raise UsageError(f"{name} {problem}") from error


def split_options(
    head: str | None, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits keyword arguments into those of the head and the others."""
    names = head_option_names(head) if head else []
    ours = {key: options[key] for key in names if key in options}
    return ours, {key: value for key, value in options.items() if key not in ours}


def _create_from_folder(
    folder: Path, pretrained: bool, head: str | None, options: dict[str, Any]
) -> nn.Module:
    info, name = find_info(folder), f"{LOCAL_DIR}{folder}"
    check_build(folder, read_config(folder), info, pretrained=pretrained)
    if head is not None and not pretrained:
        raise UsageError(f"head {head!r} of {folder} needs its backbone; remove pretrained=False")
    kind = None if head is None else find_entry(info, head, str(folder)).kind
    ours, theirs = split_options(kind, options)
    try:
        with _timm_errors(name, head):
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **theirs)
    except UsageError:
        raise
    except Exception as error:
        # timm does not check the values in the config of a folder.
        raise load_error(folder, error) from error
    if info is not None:
        model.__dict__[BACKGROUND] = info.background
    if head is None:
        return model
    if info is not None:
        return set_head(model, load_heads(folder, head, model, **ours))
    for new in get_heads(set_head(model, head, **ours)).values():
        assert isinstance(new, Head)
        new.check_fitted()
    return model


def create_sized_model(
    name: str,
    pretrained: bool,
    image_size: int | tuple[int, int] | None = None,
    *,
    head: str | None = None,
    **options: Any,
) -> nn.Module:
    """Creates a model for images of a given size; its options can be any of ``FIELDS``, too.

    An architecture that takes ``img_size``, such as a ViT, is built for that size, and timm
    resamples the position embeddings of pretrained weights.
    """
    options = with_overlay(options)
    # With dynamic_img_size, the embeddings are fitted to each image.
    is_sized = image_size is not None and not options.get("dynamic_img_size")
    sized = {"img_size": image_size, **options} if is_sized else options
    try:
        try:
            model = create_model(name, pretrained, head=head, **sized)
        except UsageError as error:
            # Most convolutional architectures take images of any size and have no img_size.
            if not is_sized or not isinstance(error.__cause__, TypeError):
                raise
            model = create_model(name, pretrained, head=head, **options)
    except UsageError:
        raise
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        size = "" if image_size is None else f" for images of {image_size} pixels"
        raise UsageError(f"{name} cannot be built{size} with {options}: {reason}") from error
    if image_size is not None:
        # timm would prefer the size and crop for testing.
        config = {key: v for key, v in _config(model).items() if not key.startswith("test_")}
        config["input_size"] = (options.get("in_chans", 3), *to_2tuple(image_size))
        model.__dict__["pretrained_cfg"] = model.__dict__["default_cfg"] = config
    return model


def with_overlay(options: dict[str, Any]) -> dict[str, Any]:
    """Returns options with the preprocessing moved to ``pretrained_cfg_overlay``, for timm.

    >>> with_overlay({"std": 0.5, "crop_pct": 0.9, "global_pool": "max"})
    {'global_pool': 'max', 'pretrained_cfg_overlay': {'std': (0.5, 0.5, 0.5), 'crop_pct': 0.9}}
    """
    overlay = {k: _preprocessing(k, v) for k, v in options.items() if k in FIELDS}
    others = {k: v for k, v in options.items() if k not in FIELDS}
    overlay |= others.pop("pretrained_cfg_overlay", None) or {}
    return others | ({"pretrained_cfg_overlay": overlay} if overlay else {})


def _preprocessing(field: str, value: Any) -> Any:  # noqa: ANN401
    if field in CHOICES:
        check_choice(f"{field}:", value, CHOICES[field])
        return value
    is_list = isinstance(value, list | tuple) and field != "crop_pct"
    span = "(-inf, inf)" if field == "mean" else "(0, inf)"
    numbers = tuple(check_number(field, number, span) for number in (value if is_list else [value]))
    if field == "crop_pct":
        return numbers[0]
    if len(numbers) not in (1, 3):
        raise UsageError(f"{field} must be 1 or 3 numbers, got {len(numbers)}")
    return numbers * (3 // len(numbers))


def image_config(model: nn.Module) -> dict[str, Any]:
    """Returns size, normalisation and crop of a model's images, for timm's transforms."""
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
    """Returns channels, height and width of the images for which a model was created."""
    arguments: dict[str, Any] = getattr(model, "_model_args", {})
    channels, height, width = timm.data.resolve_data_config(model=model)["input_size"]
    # With dynamic_img_size, the embeddings may have another size than the images.
    if arguments.get("img_size") and not arguments.get("dynamic_img_size"):
        height, width = to_2tuple(arguments["img_size"])
    return arguments.get("in_chans") or channels, height, width


def label_names(model: nn.Module) -> list[str] | None:
    """Returns the class names of a model: its own, or those of ImageNet; None if unknown."""
    names = _config(model).get("label_names")
    if not names:
        imagenet = _imagenet(model)
        return None if imagenet is None else imagenet.label_descriptions()
    if isinstance(names, Mapping):
        # Labels are strings in JSON.
        by_label = {str(label): name for label, name in names.items()}
        names = [by_label[label] for label in map(str, range(len(names))) if label in by_label]
    return [*map(str, names)] if len(names) == getattr(model, "num_classes", None) else None


def is_for(model: nn.Module, names: Sequence[str] | None) -> bool | None:
    """Returns whether a model's classes have these names, in any order; None if unknown.

    Names of ImageNet's classes are WordNet ids, or one or all words of their synset.
    """
    own = label_names(model)
    # The numbers 0 to C - 1 are not names.
    if own is None or not names or [*names] == [str(label) for label in range(len(names))]:
        return None
    imagenet = _imagenet(model)
    if sorted(own) == sorted(names) or imagenet is None:
        return sorted(own) == sorted(names)
    same: list[bool] = [
        name == synset or _plain(name) in {_plain(text), *map(_plain, text.split(","))}
        for synset, text, name in zip(imagenet.label_names(), own, names, strict=False)
    ]
    return bool(sum(same) >= SHARE * len(names))


def keeps_classifier(model: nn.Module, names: Sequence[str] | None, what: str, cure: str) -> bool:
    """Returns whether to keep the classifier of a model with as many classes as the data.

    If that is unclear, it is kept, and the log names the option ``cure`` that fits another.
    """
    known = is_for(model, names)
    if known is None:
        # With the number of classes of an ImageNet, it may be that of ImageNet.
        doubtful = names and timm.data.infer_imagenet_subset(model)
        log.log(
            logging.WARNING if doubtful else logging.INFO,
            "%s has no names for its %d classes; its classifier is assumed to be for the classes "
            "of the data (%s fits another)",
            *(what, getattr(model, "num_classes", None), cure),
        )
    return known is not False


def shown_as(model: nn.Module, names: Sequence[str]) -> list[str] | None:
    """Returns the class names of a model, as WordNet ids if the given names are such."""
    imagenet = _imagenet(model)
    if imagenet is not None and any(WORDNET.fullmatch(name) for name in names):
        return list(imagenet.label_names())
    return label_names(model)


def _imagenet(model: nn.Module) -> Any:  # noqa: ANN401
    """Returns timm's class names of an ImageNet if the model has timm's weights for it, or None.

    A folder or a repo of others may have any weights together with timm's tag.
    """
    config = _config(model)
    repo, source = config.get("hf_hub_id") or "", config.get("source")
    timms = not source or (source == "hf-hub" and repo.startswith("timm/"))
    as_published = config.get("num_classes") == getattr(model, "num_classes", None)
    if not (timms and as_published and config.get("tag")) or config.get("label_names"):
        return None
    subset = timm.data.infer_imagenet_subset(model)
    return None if subset is None else timm.data.ImageNetInfo(subset)


def _config(model: nn.Module) -> dict[str, Any]:
    return getattr(model, "pretrained_cfg", None) or {}


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[\W_]+", " ", name.casefold()).split())
