"""Decoding of images of every kind to RGB, and images that cannot be decoded."""

import io
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import get_worker_info

from timm_lt.data.sources import Split, dataset_from_files
from timm_lt.utils.checks import (
    WHITE,
    Problems,
    UsageError,
    check_background,
    shown_names,
    user_errors,
)
from timm_lt.utils.console import ignore_pillow_warnings, log

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262
# Least maximum of floats that are levels of 8 or 16 bits. A smaller one, above 1, is ambiguous:
# fractions beyond 1, or a nearly black image.
DARK = 16
# Whether an unreadable image stops a run or is skipped.
Unreadable = Literal["raise", "skip"]
# Target of an image that could not be read.
UNREADABLE = -1
# Errors of Pillow's decoders for damaged files.
DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError),
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
# Images per batch of header reads.
ROWS = 500
# Start of torch's message for an error raised in a worker.
CAUGHT = "Caught "


class ImageError(ValueError):
    """An image that cannot be decoded; the message is the reason."""


def to_rgb(image: Image.Image, background: str = WHITE) -> Image.Image:
    """Returns an image in RGB; an RGB image without a transparent colour is not copied.

    Grey levels with more than 8 bits are scaled by the range of the file's type, such as 0 to 65535
    for 16 bits. 32-bit types have no usual range: floats from 0 to 1 are multiplied by 255; other
    values up to 255 are levels of 8 bits, and up to 65535 levels of 16 bits. Other values are a
    ValueError, also floats whose largest is between 1 and 16, which are ambiguous.
    """
    _scale_transparency(image)
    image.load()
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(with_alpha(image))
        return canvas.convert("RGB")
    return image if image.mode == "RGB" else _with_8_bits(image).convert("RGB")


def with_alpha(image: Image.Image) -> Image.Image:
    """Returns an image with any kind of transparency as RGBA with 8 bits."""
    if image.mode == "La":
        image = image.convert("LA")
    elif _is_deep(image):
        # Pillow compares a transparent grey level with the upper byte of 16 bits.
        alpha = np.asarray(image) != image.info["transparency"]
        image = _with_8_bits(image)
        image.putalpha(Image.fromarray(alpha.astype(np.uint8) * np.uint8(255)))
    return image.convert("RGBA")


def loses_levels(image: Image.Image) -> bool:
    """Tells whether an opened image that is not loaded has more than 8 bits per channel."""
    return _is_deep(image) or ";16" in _raw_mode(image)


def _is_deep(image: Image.Image) -> bool:
    """Tells whether Pillow keeps more than 8 bits of the grey levels of an image."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _with_8_bits(image: Image.Image) -> Image.Image:
    """Returns an image with grey levels of more than 8 bits scaled, without its transparency."""
    if not _is_deep(image):
        return image
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    is_float, low, high = image.mode == "F", values.min(), values.max()
    bits = (tags.get(BITS_PER_SAMPLE) or (32,))[0]
    if image.mode.startswith("I;16") or image.format in ("PPM", "PNG"):
        bits = 12 if bits == 12 else 16
    fractions = np.rint(values.astype(np.float64) * 255) if is_float else values
    if is_float and fractions.min() >= 0 and fractions.max() <= 255:
        levels = fractions
    elif not is_float and bits < 32 and low >= 0:
        # Where white is zero, Pillow inverts 8 bits only.
        white_is_zero = tags.get(PHOTOMETRIC) == 0
        levels = ((1 << bits) - 1 - values if white_is_zero else values) >> (bits - 8)
    elif (bits == 32 or is_float) and low >= 0 and (DARK if is_float else 0) <= high <= 65535:
        levels = np.rint(values) if high <= 255 else values // 256
    else:
        raise ValueError(
            f"its values go from {low:g} to {high:g}, which is none of the ranges that can be "
            "read (0 to 1 of floats, 0 to 255, 0 to 65535); save it with 8 or 16 bits"
        )
    return Image.fromarray(levels.astype(np.uint8))


def _scale_transparency(image: Image.Image) -> None:
    """Scales the transparent colour of a PNG file to 8 bits, as Pillow scales its pixels."""
    key, raw = image.info.get("transparency"), _raw_mode(image)
    if raw in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * (85 if raw == "L;2" else 17)
    elif raw.startswith("RGB;16") and isinstance(key, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in key)


def _raw_mode(image: Image.Image) -> str:
    """Returns the layout of an image's pixels in its file; empty once it is loaded."""
    for tile in getattr(image, "tile", ()):
        return str(tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args)
    return ""


def encoded_images(dataset: Dataset) -> Dataset:
    """Returns a data set of images as stored; unchanged if it has a transform of its own."""
    if dataset.format["type"] == "custom":
        return dataset
    # Rows with a decoded image take twice as long for small images.
    images = dataset.with_format(None).select_columns("image")
    return images.cast_column("image", ImageColumn(decode=False))


def source_of(encoded: dict[str, Any] | None) -> str | bytes | None:
    """Returns the bytes of a stored image, else its path; None if there is no image."""
    content, path = (encoded or {}).get("bytes"), (encoded or {}).get("path")
    return path if content is None else content


def is_remote(source: object) -> bool:
    """Tells whether the source of an image is a URL, such as that of a file on the Hub."""
    return isinstance(source, str) and REMOTE.match(source) is not None


def load_image(path: str | Path, *, background: str | Sequence[int] = WHITE) -> Image.Image:
    """Reads an image file as timm_lt does everywhere: in RGB, upright by its EXIF orientation.

    Works as the ``loader=`` of torchvision's ``ImageFolder``.

    Args:
        path: The file.
        background: Colour behind transparent pixels: a name, ``"#rrggbb"``, or red, green and blue.

    Raises:
        UsageError: If the file cannot be decoded, or the colour is not valid.
    """
    color = check_background(background)
    with user_errors(f"{shown_path(str(path))} cannot be decoded", ImageError):
        return decode_image({"path": str(path), "bytes": None}, background=color)


def read_image(encoded: dict[str, Any] | Image.Image, row: int, column: ImageColumn) -> Image.Image:
    """Decodes an image of :func:`encoded_images`; a UsageError names its row and file."""
    try:
        return decode_column(encoded, column)
    except ImageError as error:
        raise unreadable_images({image_name(encoded, row): str(error)}) from error


def decode_column(encoded: dict[str, Any] | Image.Image, column: ImageColumn) -> Image.Image:
    """Decodes an image with the background and mode of its column."""
    return decode_image(encoded, getattr(column, "background", WHITE), column.mode)


def decode_image(
    encoded: dict[str, Any] | Image.Image | None, background: str = WHITE, mode: str | None = None
) -> Image.Image:
    """Decodes an image to RGB, upright by its EXIF orientation; every image is read here.

    A mode such as L removes colours before RGB. A damaged image is an :class:`ImageError`.
    """
    if get_worker_info() is not None:
        _ignore_warnings_once()
    source = encoded if isinstance(encoded, Image.Image) else source_of(encoded)
    with damage_explained():
        if is_remote(source):
            source = ImageColumn().decode_example({"path": source, "bytes": None})
        if source is None:
            raise ValueError("there is no image")
        if isinstance(source, Image.Image):
            rgb = to_rgb(source, background)
        else:
            # Otherwise Pillow leaves damaged files and those with several frames open.
            with open_image(source) as image:
                rgb = upright(to_rgb(image, background), image)
        return rgb if mode in (None, "RGB") else rgb.convert(mode).convert("RGB")


_ignore_warnings_once = cache(ignore_pillow_warnings)


@contextmanager
def damage_explained() -> Iterator[None]:
    """Turns Pillow's errors for damaged images into :class:`ImageError`."""
    try:
        yield
    except DAMAGE as error:
        # torch reports the death of a worker wherever the main process is.
        if is_worker_death(error):
            raise
        raise ImageError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image, or has a format that Pillow does not read"
    if isinstance(error, Image.DecompressionBombError):
        # Pillow warns above its limit, and refuses above twice its limit.
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        return f"it has more than {limit:.0f} million pixels, the most that Pillow reads"
    if isinstance(error, OSError | ValueError | SyntaxError | EOFError):
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return str(reason).removesuffix(".")
    return f"Pillow cannot decode it ({type(error).__name__}: {error})"


def open_image(source: str | bytes) -> Image.Image:
    """Opens an image by its path or its bytes."""
    try:
        return Image.open(source if isinstance(source, str) else io.BytesIO(source))
    except UnidentifiedImageError:
        if (Path(source).stat().st_size if isinstance(source, str) else len(source)) == 0:
            raise ValueError("0 bytes") from None
        raise


def upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """Returns pixels turned by the EXIF orientation of a loaded image, if that can be read."""
    turn = None
    # ImageOps.exif_transpose would rewrite all EXIF data, and fail on any odd entry.
    with suppress(ImageError), damage_explained():
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return pixels if turn is None else pixels.transpose(turn)


def is_huge(size: tuple[int, int]) -> bool:
    """Tells whether Pillow warns of an image of this width and height."""
    return size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf)


def describe_huge(number: int, total: int, names: Sequence[str], split: str = "") -> str:
    """Returns one message about all images that Pillow would warn of."""
    limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
    return (
        f"{number} of {total} {split}{' ' * bool(split)}images have more than {limit:.0f} million "
        f"pixels, and were read all the same: {shown_names(names)}"
    )


def image_name(encoded: dict[str, Any] | Image.Image, row: int) -> str:
    """Returns the name of an image in messages: its row and its file, if known."""
    path = encoded["path"] if isinstance(encoded, dict) else None
    return f"image {row}" + (f" ({shown_path(path)})" if path else "")


def shown_path(path: str) -> str:
    """Returns a path as messages show it: in quotes if it has unprintable characters."""
    return path if path.isprintable() else repr(path)


def unreadable_images(reasons: Mapping[str, str], number: int | None = None) -> UsageError:
    """Returns the error for images, of so many, that cannot be read: reasons by image name."""
    fix = "train without such images with --data.unreadable skip"
    if len(reasons) == 1:
        ((name, reason),) = reasons.items()
        return UsageError(f"{name} cannot be decoded: {reason}; repair it, or {fix}")
    shown = shown_names([f"{name}: {reason}" for name, reason in reasons.items()])
    return UsageError(
        f"{len(reasons)} of {number} images cannot be decoded: {shown}; repair them, or {fix}"
    )


def without_unreadable(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces unreadable images of a batch, whose target is -1, with others of the batch."""
    missing = targets == UNREADABLE
    if not missing.any():
        return images, targets
    readable = torch.nonzero(~missing).flatten()
    if len(readable) == 0:
        raise UsageError(f"none of the {len(targets)} images of a batch can be read")
    indices = torch.arange(len(targets), device=targets.device)
    rows = torch.where(missing, readable[indices % len(readable)], indices)
    return images[rows], targets[rows]


class UnreadableImage(NamedTuple):
    """An image that cannot be read, its name in messages, and the reason."""

    row: int
    name: str
    reason: str


def find_damaged(dataset: Dataset, rows: Sequence[int] | None = None) -> list[UnreadableImage]:
    """Finds empty files, files that are not images, and truncated JPEG files.

    Reads headers, and decodes a JPEG without its end marker to be sure. Does not check remote files
    and data sets with a transform of their own.
    """
    encoded, found = encoded_images(dataset), []
    if encoded.format["type"] == "custom":
        return []
    left = iter(range(len(dataset)) if rows is None else rows)
    with ThreadPoolExecutor() as threads:
        batches = encoded if rows is None else encoded.select(rows)
        for batch in batches.with_format("arrow").iter(ROWS):
            images = batch.column("image").to_pylist()
            for image, reason in zip(images, threads.map(_damage, images), strict=True):
                row = next(left)
                if reason is not None:
                    found.append(UnreadableImage(row, image_name(image, row), reason))
    return found


def _damage(encoded: dict[str, Any] | None) -> str | None:
    """Returns why an image cannot be read, if its header or its end shows it."""
    source = source_of(encoded)
    if source is None or is_remote(source):
        return "there is no image" if source is None else None
    try:
        with damage_explained(), open_image(source) as image:
            if image.format in ("JPEG", "MPO"):
                file = cast(Any, image).fp
                file.seek(-2, os.SEEK_END)
                if file.read(2) != b"\xff\xd9":
                    image.load()
    except ImageError as error:
        return str(error)
    return None


def verify_images(
    datasets: Mapping[str, Dataset], accelerator: Accelerator, *, unreadable: Unreadable = "raise"
) -> dict[str, list[int]]:
    """Returns the rows of damaged images by split; unless skipped, these are a UsageError.

    Each process checks its share of the files.
    """
    first, step = accelerator.process_index, accelerator.num_processes
    problems, rows = Problems(), {}
    for split, data in datasets.items():
        images = sorted(gather_object(find_damaged(data, range(first, len(data), step))))
        if images and unreadable == "skip":
            log.info("%d of %d %s images cannot be read", len(images), len(data), split)
        else:
            note_damaged(problems, split, images, len(data))
        rows[split] = [image.row for image in images]
    problems.check()
    return rows


def note_damaged(
    problems: Problems, split: str, damaged: Sequence[UnreadableImage], number: int
) -> None:
    """Adds the damaged images of a split, of so many images, to the problems."""
    if damaged:
        reasons = {image.name: image.reason for image in damaged}
        problems.add(f"{split} split: {unreadable_images(reasons, number)}")


def note_damaged_files(problems: Problems, files: Mapping[Split, Sequence[str]]) -> None:
    """Adds the damaged files of all splits to the problems, but not missing ones."""
    for split, paths in files.items():
        dataset = dataset_from_files(list(paths), np.zeros(len(paths), np.int64), None)
        damaged = [image for image in find_damaged(dataset) if Path(paths[image.row]).is_file()]
        note_damaged(problems, split, damaged, len(paths))


def log_exceptional(
    split: str, dataset: Dataset, left_out: int, unreadable: Sequence[int], huge: Sequence[int]
) -> None:
    """Logs the images of a split that were left out, if known by row, and the huge ones."""
    encoded = encoded_images(dataset)

    def names(rows: Sequence[int]) -> list[str]:
        # The data set's own transform may fail on the image.
        if encoded.format["type"] == "custom":
            return [f"image {row}" for row in rows]
        return [image_name(encoded[row]["image"], row) for row in rows]

    if left_out:
        shown = f": {shown_names(names(unreadable))}" if unreadable else ""
        log.warning(
            "%d of %d %s images cannot be read and were left out%s",
            *(left_out, len(dataset), split, shown),
        )
    if huge:
        log.warning("%s", describe_huge(len(huge), len(dataset), names(huge), split))


def check_classes_left(
    labels: Mapping[str, Tensor], unreadable: Mapping[str, list[int]], names: list[str] | None
) -> None:
    """Checks that every split, and every class of train and val, has a readable image."""
    problems = Problems()
    for split, rows in unreadable.items():
        values = labels[split].tolist()
        left = {*np.delete(values, rows).tolist()}
        lost = sorted({*values} - left)
        if not left:
            problems.add(f"{split} split: none of the {len(values)} images can be read")
        elif lost and split != "test":
            # A class without a test image has no accuracy, as the report says.
            shown = shown_names([f"{c} ({names[c]})" if names else c for c in lost])
            problems.add(
                f"{split} split: {len(lost)} classes have no image that can be read: {shown}; "
                "repair some, or remove these classes"
            )
    problems.check()


def is_worker_death(error: BaseException) -> bool:
    """Tells whether an error is torch's report of the death of a worker."""
    text = str(error)
    is_death = isinstance(error, RuntimeError) and "DataLoader worker" in text
    return is_death and not text.startswith(CAUGHT)
