"""Reading images that may be damaged, in processes that may die."""

import io
import multiprocessing
import re
import struct
import traceback
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import get_worker_info

from timm_lt.data.pixels import WHITE, check_background, to_rgb
from timm_lt.utils.checks import UsageError, shown_names
from timm_lt.utils.console import ignore_pillow_warnings

# What to do about an image that cannot be read.
Unreadable = Literal["raise", "skip"]
# The target of an image that could not be read and is left out.
UNREADABLE = -1
# What Pillow raises for files that are damaged, or no images.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
# What its decoders raise besides: of AVIF a RuntimeError, of odd headers any of the others.
ODD_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    struct.error,
    zlib.error,
)
EMPTY = "0 bytes"
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ODD_TIFF = (
    "a TIFF whose bands or bits Pillow does not read, or that is damaged; save it as RGB or grey "
    "of 8 bits"
)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# How torch begins the message of an error that a worker raised.
CAUGHT = "Caught "
# What torch says of a worker that was killed by SIGKILL.
KILLED = "killed by signal: Killed"
# What its parent meets where a worker went away; not a lack of files or of memory.
CUT_OFF = (EOFError, ConnectionError, FileNotFoundError)
# What Python says where a process is started while it still imports the script.
UNGUARDED = "bootstrapping phase"
GUARD = 'its work must be below `if __name__ == "__main__":`'
REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

T = TypeVar("T")


def encoded_images(dataset: Dataset) -> Dataset:
    """Returns a data set of its images as they are stored: bytes, or the path of a file.

    One with a transform of its own stays as it is: its images come decoded.
    """
    if dataset.format["type"] == "custom":
        # Somebody's own transform has to see the rows.
        return dataset
    # Reading a row that is decoded costs as much again as decoding a small image.
    images = dataset.with_format(None).select_columns("image")
    return images.cast_column("image", ImageColumn(decode=False))


def is_remote(path: str) -> bool:
    """Tells whether a path is an address, such as that of a file of the Hub, and no local file.

    >>> is_remote("hf://datasets/me/birds/a.jpg"), is_remote("/data/a://b.jpg")
    (True, False)
    """
    return REMOTE.match(path) is not None


def load_image(path: str | Path, *, background: str | Sequence[int] = WHITE) -> Image.Image:
    """Reads an image file as timm_lt does everywhere: RGB, turned as its EXIF data say.

    Can be the ``loader=`` of torchvision's ``ImageFolder``. For grey levels of more than 8 bits see
    :func:`timm_lt.data.pixels.to_rgb`.

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
    """Returns an image in RGB, turned as its EXIF data say; see :func:`decode_image`.

    Args:
        encoded: As stored in a row of :func:`encoded_images`.
        row: Number of the row, for the message.
        column: The column of the data set.

    Raises:
        UsageError: If it cannot be decoded; names its row and, if known, its file.
    """
    try:
        return decode_column(encoded, column)
    except DAMAGE as error:
        raise unreadable_images({image_name(encoded, row): damage_of(error)}) from error


def decode_column(encoded: dict[str, Any] | Image.Image, column: ImageColumn) -> Image.Image:
    """Decodes an image of a column, with the column's background and mode."""
    background = getattr(column, "background", WHITE)
    return decode_image(encoded, background=background, mode=column.mode)


def decode_image(
    encoded: dict[str, Any] | Image.Image | None,
    *,
    background: str = WHITE,
    mode: str | None = None,
) -> Image.Image:
    """Decodes an image: the one way from what is stored to RGB.

    Args:
        encoded: ``path`` and ``bytes``, one of which may be None; or an image of Pillow.
        background: Colour behind transparent pixels, ``#rrggbb``.
        mode: Mode that the image is converted to on the way, such as L to take colours away.

    Returns:
        An image in RGB, turned as its EXIF data say.

    Raises:
        Exception: One of ``DAMAGE`` if the image is damaged, or has values in an unknown range.
    """
    if get_worker_info() is not None:
        _ignore_warnings_once()
    if isinstance(encoded, dict):
        path, content = encoded["path"], encoded["bytes"]
        if content is not None or not (path is None or is_remote(path)):
            # Pillow would leave files of several frames, and damaged ones, open.
            with pillow_errors(), open_image(path if content is None else content) as image:
                rgb = _in_mode(to_rgb(image, background), mode)
                turn = turn_of(image)
                return rgb if turn is None else rgb.transpose(turn)
        encoded = ImageColumn().decode_example(encoded)
    if not isinstance(encoded, Image.Image):
        raise ValueError("there is no image")
    with pillow_errors():
        return _in_mode(to_rgb(encoded, background), mode)


def _in_mode(image: Image.Image, mode: str | None) -> Image.Image:
    return image if mode in (None, "RGB") else image.convert(mode).convert("RGB")


_ignore_warnings_once = cache(ignore_pillow_warnings)


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Turns whatever Pillow raises for an image that is damaged into one of ``DAMAGE``."""
    try:
        yield
    except ODD_DAMAGE as error:
        # Torch reports that in the middle of whatever goes on.
        if is_worker_death(error):
            raise
        raise ValueError(f"Pillow cannot decode it ({type(error).__name__}: {error})") from error


def open_image(source: str | bytes) -> Image.Image:
    """Opens an image, of a path or of bytes; an empty file and an odd TIFF are named as such."""
    try:
        return Image.open(source if isinstance(source, str) else io.BytesIO(source))
    except UnidentifiedImageError:
        start = _start_of(source)
        if not start:
            raise ValueError(EMPTY) from None
        if start in TIFF_STARTS:
            raise ValueError(ODD_TIFF) from None
        raise


def _start_of(source: str | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:4]
    with Path(source).open("rb") as file:
        return file.read(4)


def turned_upright(image: Image.Image) -> Image.Image:
    """Returns an image turned as its EXIF data say; as it is, if they cannot be read."""
    image.load()
    turn = turn_of(image)
    return image if turn is None else image.transpose(turn)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Returns how a loaded image has to be turned; None if its EXIF data say nothing of it.

    ``ImageOps.exif_transpose`` would also write all of them anew, and fail on what is odd in any.
    """
    try:
        with pillow_errors():
            return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGE:
        return None


def is_huge(size: tuple[int, int]) -> bool:
    """Tells whether Pillow warns that an image of this width and height may be malicious."""
    limit = Image.MAX_IMAGE_PIXELS
    return limit is not None and size[0] * size[1] > limit


def describe_huge(number: int, total: int, names: Sequence[str], split: str = "") -> str:
    """Returns what to say of images that Pillow would warn of one by one."""
    limit, noun = (Image.MAX_IMAGE_PIXELS or 0) / 1e6, f"{split} images" if split else "images"
    return (
        f"{number} of {total} {noun} have more than {limit:.0f} million pixels, and were read all "
        f"the same: {shown_names(names)}"
    )


def damage_of(error: Exception) -> str:
    """Returns in a few words why an image cannot be decoded."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image, or of no format that Pillow reads"
    if isinstance(error, Image.DecompressionBombError):
        # Pillow warns above its limit, and refuses above twice that.
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        return f"it has more than {limit:.0f} million pixels, the most that Pillow reads"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).removesuffix(".") or type(error).__name__


def image_name(encoded: dict[str, Any] | Image.Image, row: int) -> str:
    """Returns what to call an image in a message: its row and, if it has one, its file."""
    path = encoded["path"] if isinstance(encoded, dict) else None
    return f"image {row}" + (f" ({shown_path(path)})" if path else "")


def image_names(dataset: Dataset, rows: Sequence[int]) -> list[str]:
    """Returns what to call some images of a data set in a message, by :func:`image_name`."""
    encoded = encoded_images(dataset)
    if encoded.format["type"] == "custom":
        # Somebody's own transform may fail on the image itself.
        return [f"image {row}" for row in rows]
    return [image_name(encoded[row]["image"], row) for row in rows]


def shown_path(path: str) -> str:
    r"""Returns a path as it is shown in a message: in quotes if it has characters that do not show.

    >>> shown_path("my cat.jpg"), shown_path("my\ncat.jpg")
    ('my cat.jpg', "'my\\ncat.jpg'")
    """
    return path if path.isprintable() else repr(path)


def unreadable_images(reasons: Mapping[str, str], number: int | None = None) -> UsageError:
    """Returns the error that names images that cannot be read: how many, and the first five.

    Args:
        reasons: Why, by :func:`image_name`.
        number: How many images there are; one that stands for itself needs none.
    """
    # Only a training stops at them, unless it is told not to.
    fix = "train without such images with --data.unreadable skip"
    if len(reasons) == 1:
        ((name, reason),) = reasons.items()
        return UsageError(f"{name} cannot be decoded: {reason}; repair it, or {fix}")
    shown = shown_names([f"{name}: {reason}" for name, reason in reasons.items()])
    return UsageError(
        f"{len(reasons)} of {number} images cannot be decoded: {shown}; repair them, or {fix}"
    )


def without_unreadable(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Puts other images of the same batch in the places of those that could not be read.

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
    places = torch.arange(len(targets), device=targets.device)
    rows = torch.where(missing, readable[places % len(readable)], places)
    return images[rows], targets[rows]


def loaded(
    batches: Iterable[T], *, again: str = "go on with --resume", fewer: str = "Fewer --workers"
) -> Iterator[T]:
    """Yields batches; what goes wrong in a worker process is a UsageError in one line.

    Args:
        batches: A loader.
        again: What to do when the cause is removed, for messages.
        fewer: What needs less memory, for messages.

    Raises:
        UsageError: If a worker process failed or died.
    """
    begun = False
    try:
        for batch in batches:
            begun = True
            yield batch
    except UsageError as error:
        raise UsageError(_last_line(error)) from error
    except Exception as error:
        if UNGUARDED in str(error):
            raise UsageError(f"a data worker imports the script anew: {GUARD}") from error
        if is_worker_death(error) or _is_cut_off(error):
            if not begun and multiprocessing.get_start_method() != "fork":
                again = f"each data worker imports the script anew here: {GUARD}"
            raise UsageError(describe_worker_death(error, again, fewer)) from error
        if not str(error).startswith(CAUGHT):
            raise
        raise UsageError(
            f"a data worker failed: {_last_line(error)}; mend it and {again}"
        ) from error


def is_worker_death(error: BaseException) -> bool:
    """Tells whether torch reports the death of a worker: wherever the main process just was."""
    text = str(error)
    dead = isinstance(error, RuntimeError) and "DataLoader worker" in text
    return dead and not text.startswith(CAUGHT)


def describe_worker_death(
    error: BaseException, again: str = "go on with --resume", fewer: str = "Fewer --workers"
) -> str:
    """Returns what to do about the death of a worker; see :func:`loaded`."""
    # The first that torch noticed says by which signal.
    first = error.__cause__ if error.__cause__ and is_worker_death(error.__cause__) else error
    reason = _last_line(first).strip()
    if KILLED not in reason:
        return f"a data worker died ({reason.rstrip('.')}); {again}"
    return (
        "a data worker died (killed by signal 9, often a sign of too little memory): "
        f"{fewer} need less; {again}"
    )


def _is_cut_off(error: BaseException) -> bool:
    """Tells whether a worker went away in the middle of handing over a batch."""
    frames = (frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, CUT_OFF) and any(
        name.startswith("multiprocessing.") for name in frames
    )


def _last_line(error: BaseException) -> str:
    """Returns what an error of a worker says, without the traceback that torch puts before it."""
    text = str(error)
    if not text.startswith(CAUGHT):
        return text
    return text.strip().rpartition("\n")[2].removeprefix("timm_lt.utils.checks.UsageError: ")
