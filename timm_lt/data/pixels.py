"""Pixels of every image mode as RGB of 8 bits: deep grey levels, floats and transparency."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from timm_lt.utils.checks import UsageError

WHITE = "#ffffff"
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262
REMEDY = "save it with 8 or 16 bits"
# Below this, floats beyond 1 are not taken for levels of 8 bits.
DARK = 16


def check_background(background: object) -> str:
    """Returns a background colour as ``#rrggbb``.

    >>> check_background("white"), check_background([0, 128, 255])
    ('#ffffff', '#0080ff')

    Args:
        background: A colour name or specification of ``PIL.ImageColor``, such as ``"black"`` or
            ``"#808080"``; or red, green and blue, from 0 to 255.

    Raises:
        UsageError: If it is none of these, or is transparent itself.
    """
    color: tuple[int, ...] | None = None
    if isinstance(background, str):
        try:
            color = ImageColor.getrgb(background)
        except ValueError:
            color = None
    elif isinstance(background, list | tuple) and all(type(level) is int for level in background):
        color = tuple(background)
    if color is None or len(color) != 3 or not all(0 <= level <= 255 for level in color):
        raise UsageError(
            f"background {background!r} is not a valid colour; expected a name such as 'white', "
            "'#rrggbb', or three integers from 0 to 255"
        )
    return "#{:02x}{:02x}{:02x}".format(*color)


def to_rgb(image: Image.Image, background: str = WHITE) -> Image.Image:
    """Returns an image in RGB; an RGB image without a transparent colour is not copied.

    Grey levels of more than 8 bits are scaled to 8. The range is that of the file's type, such as
    0 to 65535 for 16 bits. Types without a usual range (integers and floats of 32 bits) are read
    by their values: floats from 0 to 1 are multiplied by 255; other values up to 255 are levels of
    8 bits and up to 65535 levels of 16 bits. No value is ever clipped.

    Transparent pixels are composited onto the background.

    Args:
        image: Of any mode that Pillow converts.
        background: As returned by :func:`check_background`.

    Raises:
        ValueError: If values are negative, not finite, or in none of these ranges; also if they are
            floats beyond 1 and below 16, which could be either.
    """
    _scale_transparency(image)
    image.load()
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(with_alpha(image))
        return canvas.convert("RGB")
    return image if image.mode == "RGB" else _opaque(image).convert("RGB")


def with_alpha(image: Image.Image) -> Image.Image:
    """Returns an image that has transparency, of whatever kind, as RGBA of 8 bits."""
    if image.mode == "La":
        image = image.convert("LA")
    elif is_deep(image):
        # Pillow compares a transparent grey level with the upper byte of 16 bits.
        alpha = np.asarray(image) != image.info["transparency"]
        image = _opaque(image)
        image.putalpha(Image.fromarray(alpha.astype(np.uint8) * np.uint8(255)))
    return image.convert("RGBA")


def is_deep(image: Image.Image) -> bool:
    """Tells whether Pillow keeps grey levels of more than 8 bits of an image."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def loses_levels(image: Image.Image) -> bool:
    """Tells whether an image that was opened but not loaded has more than 8 bits per channel."""
    return is_deep(image) or ";16" in _raw_mode(image)


def is_flat(image: Image.Image) -> bool:
    """Tells whether an RGB image has one colour only."""
    extremes: Any = image.getextrema()
    return all(low == high for low, high in extremes)


def _opaque(image: Image.Image) -> Image.Image:
    """Returns an image without its transparency, as 8 bits per channel."""
    if is_deep(image):
        levels = _float_levels(image) if image.mode == "F" else _integer_levels(image)
        return Image.fromarray(levels.astype(np.uint8))
    return image


def _integer_levels(image: Image.Image) -> NDArray[Any]:
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits = (tags.get(BITS_PER_SAMPLE) or (32,))[0]
    if image.mode != "I" or image.format in ("PPM", "PNG"):
        bits = 12 if bits == 12 else 16
    if bits == 32:
        return _levels_by_value(values)
    if values.min() < 0:
        raise _out_of_range(values)
    # Pillow inverts this of 8 bits, but not of more.
    white_is_zero = tags.get(PHOTOMETRIC) == 0
    return ((1 << bits) - 1 - values if white_is_zero else values) >> (bits - 8)


def _float_levels(image: Image.Image) -> NDArray[Any]:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"it has values that are NaN or infinite; replace them and {REMEDY}")
    levels = np.rint(values * 255)
    if levels.min() >= 0 and levels.max() <= 255:
        return levels
    if values.max() < DARK:
        # Fractions beyond 1, or nearly black: reading them as either could lose all of it.
        raise _out_of_range(values)
    return _levels_by_value(values)


def _levels_by_value(values: NDArray[Any]) -> NDArray[Any]:
    if values.min() < 0 or values.max() > 65535:
        raise _out_of_range(values)
    return np.rint(values) if values.max() <= 255 else values // 256


def _out_of_range(values: NDArray[Any]) -> ValueError:
    return ValueError(
        f"its values go from {values.min():g} to {values.max():g}, which is none of the ranges "
        f"that can be read (0 to 1 of floats, 0 to 255, 0 to 65535); {REMEDY}"
    )


def _scale_transparency(image: Image.Image) -> None:
    """Scales the transparent colour of a PNG file to 8 bits, as Pillow scales its pixels."""
    key, raw = image.info.get("transparency"), _raw_mode(image)
    if raw in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * (85 if raw == "L;2" else 17)
    elif raw.startswith("RGB;16") and isinstance(key, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in key)


def _raw_mode(image: Image.Image) -> str:
    """Returns how the pixels of an image are stored in its file; empty once it is loaded."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    arguments = tiles[0].args
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)
