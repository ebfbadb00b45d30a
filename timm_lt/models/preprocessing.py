"""The images that a model takes: their size, normalisation and crop."""

from typing import Any

import timm.data
from timm.layers import to_2tuple
from torch import nn

from timm_lt.models.create import create_model
from timm_lt.utils.checks import UsageError, check_choice, check_number

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
