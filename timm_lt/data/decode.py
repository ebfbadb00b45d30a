"""Images of every kind as RGB, and the images of a data set that cannot be read."""

import io
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import get_worker_info

from timm_lt.utils.checks import WHITE, UsageError, check_background, shown_names
from timm_lt.utils.console import ignore_pillow_warnings

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262
REMEDY = "save it with 8 or 16 bits"
# Floats beyond 1 are levels of 8 or 16 bits only if the largest is at least this.
DARK = 16

# What happens to an image that cannot be read.
Unreadable = Literal["raise", "skip"]
# Target of an image that could not be read.
UNREADABLE = -1
# Errors of Pillow for files that are damaged or not images.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
# Further errors of its decoders: AVIF raises RuntimeError, odd headers any of the others.
ODD_DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError),
    *(struct.error, zlib.error),
)
# Transposition that undoes an EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def to_rgb(image: Image.Image, background: str = WHITE) -> Image.Image:
    """Returns an image in RGB; an RGB image without a transparent colour is not copied.

    Grey levels with more than 8 bits are scaled to 8 bits by the range of the file's type, such as
    0 to 65535 for 16 bits. Types without a usual range (integers and floats with 32 bits) are
    scaled by their values: floats from 0 to 1 are multiplied by 255; other values up to 255 are
    levels of 8 bits, and up to 65535 levels of 16 bits. No value is ever clipped.

    Transparent pixels are composited onto the background.

    Args:
        image: In any mode that Pillow converts.
        background: A colour from :func:`check_background`.

    Raises:
        ValueError: If values are negative, not finite, or in none of these ranges; also if they are
            floats whose largest is between 1 and 16, which are ambiguous.
    """
    _scale_transparency(image)
    image.load()
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(with_alpha(image))
        return canvas.convert("RGB")
    return image if image.mode == "RGB" else _opaque(image).convert("RGB")


def with_alpha(image: Image.Image) -> Image.Image:
    """Returns an image that has any kind of transparency as RGBA with 8 bits."""
    if image.mode == "La":
        image = image.convert("LA")
    elif is_deep(image):
        # Pillow compares a transparent grey level with the upper byte of 16 bits.
        alpha = np.asarray(image) != image.info["transparency"]
        image = _opaque(image)
        image.putalpha(Image.fromarray(alpha.astype(np.uint8) * np.uint8(255)))
    return image.convert("RGBA")


def is_deep(image: Image.Image) -> bool:
    """Tells whether Pillow keeps grey levels of an image with more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def loses_levels(image: Image.Image) -> bool:
    """Tells whether an image that is opened but not loaded has more than 8 bits per channel."""
    return is_deep(image) or ";16" in _raw_mode(image)


def _opaque(image: Image.Image) -> Image.Image:
    """Returns an image without its transparency, with 8 bits per channel."""
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
    # Pillow inverts 8 bits where white is zero, but not more.
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
        # Either fractions beyond 1 or a nearly black image: a wrong guess could lose everything.
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
    """Returns the layout of an image's pixels in its file; empty once it is loaded."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    arguments = tiles[0].args
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def encoded_images(dataset: Dataset) -> Dataset:
    """Returns a data set of the stored images: bytes, or the path of a file.

    A data set with a transform of its own is returned unchanged, because only its own rows have
    the images that it yields.
    """
    if dataset.format["type"] == "custom":
        return dataset
    # Reading a decoded row costs as much again as decoding a small image.
    images = dataset.with_format(None).select_columns("image")
    return images.cast_column("image", ImageColumn(decode=False))


def source_of(encoded: dict[str, Any] | None) -> str | bytes | None:
    """Returns the bytes of a stored image, else its path; None if there is no image."""
    if encoded is None:
        return None
    source: str | bytes | None = encoded["bytes"]
    return encoded["path"] if source is None else source


def is_remote(source: object) -> bool:
    """Tells whether the source of an image is a URL, such as that of a file on the Hub.

    >>> is_remote("hf://datasets/me/birds/a.jpg"), is_remote("/data/a://b.jpg")
    (True, False)
    """
    return isinstance(source, str) and REMOTE.match(source) is not None


def load_image(path: str | Path, *, background: str | Sequence[int] = WHITE) -> Image.Image:
    """Reads an image file as timm_lt does everywhere: in RGB, upright by its EXIF orientation.

    Can be the ``loader=`` of torchvision's ``ImageFolder``. For grey levels with more than 8 bits
    see :func:`timm_lt.data.decode.to_rgb`.

    Args:
        path: The file.
        background: Colour behind transparent pixels: a name, ``"#rrggbb"``, or red, green and blue.

    Raises:
        UsageError: If the file cannot be decoded, or the colour is not valid.
    """
    color = check_background(background)
    try:
        return decode_image({"path": str(path), "bytes": None}, background=color)
    except DAMAGE as error:
        reason = damage_of(error)
        raise UsageError(f"{shown_path(str(path))} cannot be decoded: {reason}") from error


def read_image(encoded: dict[str, Any] | Image.Image, row: int, column: ImageColumn) -> Image.Image:
    """Returns an image in RGB, upright by its EXIF orientation.

    Args:
        encoded: The entry of a row of :func:`encoded_images`.
        row: Number of the row, for the message.
        column: The column of the data set.

    Raises:
        UsageError: If the image cannot be decoded; names its row and file.
    """
    try:
        return decode_column(encoded, column)
    except DAMAGE as error:
        raise unreadable_images({image_name(encoded, row): damage_of(error)}) from error


def decode_column(encoded: dict[str, Any] | Image.Image, column: ImageColumn) -> Image.Image:
    """Decodes an image of a column with the column's background and mode."""
    background = getattr(column, "background", WHITE)
    return decode_image(encoded, background=background, mode=column.mode)


def decode_image(
    encoded: dict[str, Any] | Image.Image | None,
    *,
    background: str = WHITE,
    mode: str | None = None,
) -> Image.Image:
    """Decodes an image to RGB, upright by its EXIF orientation; every image is read here.

    Args:
        encoded: ``path`` and ``bytes``, one of which may be None; or a PIL image.
        background: Colour behind transparent pixels, ``#rrggbb``.
        mode: Mode that the image is converted to before RGB, such as L to remove colours.

    Raises:
        Exception: One of ``DAMAGE`` if the image is damaged or has values in an unknown range.
    """
    if get_worker_info() is not None:
        _ignore_warnings_once()
    source = encoded if isinstance(encoded, Image.Image) else source_of(encoded)
    if source is None:
        raise ValueError("there is no image")
    if is_remote(source):
        source = ImageColumn().decode_example({"path": source, "bytes": None})
    with pillow_errors():
        if isinstance(source, Image.Image):
            return _in_mode(to_rgb(source, background), mode)
        # Without `with`, Pillow leaves damaged files and those with several frames open.
        with open_image(source) as image:
            return upright(_in_mode(to_rgb(image, background), mode), image)


def _in_mode(image: Image.Image, mode: str | None) -> Image.Image:
    return image if mode in (None, "RGB") else image.convert(mode).convert("RGB")


_ignore_warnings_once = cache(ignore_pillow_warnings)


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Turns every error of Pillow about a damaged image into one of ``DAMAGE``."""
    try:
        yield
    except ODD_DAMAGE as error:
        # Torch reports the death of a worker wherever the main process happens to be.
        if is_worker_death(error):
            raise
        raise ValueError(f"Pillow cannot decode it ({type(error).__name__}: {error})") from error


def open_image(source: str | bytes) -> Image.Image:
    """Opens an image, given its path or its bytes."""
    try:
        return Image.open(source if isinstance(source, str) else io.BytesIO(source))
    except UnidentifiedImageError:
        if (Path(source).stat().st_size if isinstance(source, str) else len(source)) == 0:
            raise ValueError("0 bytes") from None
        raise


def upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """Returns pixels turned by the EXIF orientation of a loaded image, if that can be read.

    ``ImageOps.exif_transpose`` would also rewrite all EXIF data, and fail on any odd entry.
    """
    try:
        with pillow_errors():
            turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGE:
        return pixels
    return pixels if turn is None else pixels.transpose(turn)


def is_huge(size: tuple[int, int]) -> bool:
    """Tells whether Pillow warns that an image of this width and height may be malicious."""
    limit = Image.MAX_IMAGE_PIXELS
    return limit is not None and size[0] * size[1] > limit


def describe_huge(number: int, total: int, names: Sequence[str], split: str = "") -> str:
    """Returns the message about all images that Pillow would warn of one by one."""
    limit, noun = (Image.MAX_IMAGE_PIXELS or 0) / 1e6, f"{split} images" if split else "images"
    return (
        f"{number} of {total} {noun} have more than {limit:.0f} million pixels, and were read all "
        f"the same: {shown_names(names)}"
    )


def damage_of(error: Exception) -> str:
    """Returns in a few words why an image cannot be decoded."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image, or has a format that Pillow does not read"
    if isinstance(error, Image.DecompressionBombError):
        # Pillow warns above its limit, and refuses above twice that.
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        return f"it has more than {limit:.0f} million pixels, the most that Pillow reads"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).removesuffix(".") or type(error).__name__


def image_name(encoded: dict[str, Any] | Image.Image, row: int) -> str:
    """Returns the name of an image in messages: its row and, if it has one, its file."""
    path = encoded["path"] if isinstance(encoded, dict) else None
    return f"image {row}" + (f" ({shown_path(path)})" if path else "")


def shown_path(path: str) -> str:
    r"""Returns a path as messages show it: in quotes if it has unprintable characters.

    >>> shown_path("my cat.jpg"), shown_path("my\ncat.jpg")
    ('my cat.jpg', "'my\\ncat.jpg'")
    """
    return path if path.isprintable() else repr(path)


def unreadable_images(reasons: Mapping[str, str], number: int | None = None) -> UsageError:
    """Returns the error about images that cannot be read: their number, and the first five.

    Args:
        reasons: Reason of each, by its :func:`image_name`.
        number: Number of all images; not needed for a single unreadable one.
    """
    # Only training stops at such images; other commands skip them.
    fix = "train without such images with --data.unreadable skip"
    if len(reasons) == 1:
        ((name, reason),) = reasons.items()
        return UsageError(f"{name} cannot be decoded: {reason}; repair it, or {fix}")
    shown = shown_names([f"{name}: {reason}" for name, reason in reasons.items()])
    return UsageError(
        f"{len(reasons)} of {number} images cannot be decoded: {shown}; repair them, or {fix}"
    )


def without_unreadable(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces images of a batch that could not be read with other images of the batch.

    Shape:
        images (B, ...), targets (B,), -1 for an image that could not be read.

    Raises:
        UsageError: If no image of the batch could be read.
    """
    missing = targets == UNREADABLE
    if not missing.any():
        return images, targets
    readable = torch.nonzero(~missing).flatten()
    if len(readable) == 0:
        raise UsageError(f"none of the {len(targets)} images of a batch can be read")
    indices = torch.arange(len(targets), device=targets.device)
    rows = torch.where(missing, readable[indices % len(readable)], indices)
    return images[rows], targets[rows]


# Start of torch's message about an error that a worker raised.
CAUGHT = "Caught "


def is_worker_death(error: BaseException) -> bool:
    """Tells whether torch reports the death of a worker, wherever the main process was."""
    text = str(error)
    dead = isinstance(error, RuntimeError) and "DataLoader worker" in text
    return dead and not text.startswith(CAUGHT)
