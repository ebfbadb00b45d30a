"""Reading images that may be damaged, in processes that may die.

Pixels of every image mode as RGB of 8 bits: deep grey levels, floats and transparency.

Finding files that no decoder will read, before training, without decoding them.

Damaged images of all splits together, and what is left without them.
"""

import io
import multiprocessing
import os
import re
import struct
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from datasets import Image as ImageColumn
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import get_worker_info

from timm_lt.data.sources import Split, dataset_from_files
from timm_lt.utils.checks import WHITE, Problems, UsageError, check_background, shown_names
from timm_lt.utils.console import ignore_pillow_warnings, log

if TYPE_CHECKING:
    from datasets import Dataset

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262
REMEDY = "save it with 8 or 16 bits"
# Below this, floats beyond 1 are not taken for levels of 8 bits.
DARK = 16


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
    :func:`timm_lt.data.decode.to_rgb`.

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


# Bytes that are read of the start and of the end of a file; and of the end of one with more after
# its image, such as padding, or what a telephone adds.
HEAD, TAIL, LONG_TAIL = 512, 2, 2**16
# Files of fewer bytes are decoded: their two ends say little.
SHORT = 256
# Files that a thread looks at in a row; threads wait for the disk together.
ROWS, THREADS = 500, 8
# A pipe would wait for its writer.
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

END_OF_PNG = b"IEND\xaeB`\x82"
JPEG, END_OF_JPEG = b"\xff\xd8\xff", b"\xff\xd9"
START_OF_SCAN = 0xDA
STARTS_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
# How width and height are stored, and where.
SIZES = {b"\x89PNG": (">II", 16), b"GIF8": ("<HH", 6), b"BM": ("<ii", 18)}
# The tags of where strips start and how long they are; and of tiles.
TIFF_PARTS = ((273, 279), (324, 325))
PNM_HEADER = re.compile(rb"P([56])(?:\s|#[^\n]*\n)+(\d+)\s+(\d+)\s+(\d+)\s")

Item = TypeVar("Item")
Result = TypeVar("Result")


class Damage(NamedTuple):
    """An image that cannot be read.

    Attributes:
        row: Its row in the data set.
        name: What it is called in messages.
        reason: Why it cannot be read, in a few words.
    """

    row: int
    name: str
    reason: str


class Content(Protocol):
    """The bytes of an image file, wherever they are."""

    @property
    def size(self) -> int:
        """Number of bytes."""

    def at(self, start: int, length: int) -> bytes:
        """Returns the bytes from a position on, fewer at the end."""

    def file(self) -> BinaryIO:
        """Returns them as a file for Pillow."""


class Stored(NamedTuple):
    """Bytes in memory, mapped or not."""

    content: memoryview

    @property
    def size(self) -> int:
        """Number of bytes."""
        return len(self.content)

    def at(self, start: int, length: int) -> bytes:
        """Returns the bytes from a position on."""
        return bytes(self.content[start : start + length])

    def file(self) -> BinaryIO:
        """Returns the bytes as a file."""
        return io.BytesIO(self.content)


class Opened(NamedTuple):
    """A file on disk, open."""

    descriptor: int
    size: int

    def at(self, start: int, length: int) -> bytes:
        """Returns the bytes from a position on."""
        os.lseek(self.descriptor, start, os.SEEK_SET)
        return os.read(self.descriptor, length)

    def file(self) -> BinaryIO:
        """Returns the same open file."""
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        return os.fdopen(self.descriptor, "rb", closefd=False)


class StoredFiles:
    """The images of a data set as they are stored, without copying what is in memory.

    Args:
        dataset: With a column ``image``.
        rows: Rows that are looked at.

    Attributes:
        paths: Their files, None for an image that has none.
        in_memory: Whether their bytes are in memory, or in a mapped file.
    """

    def __init__(self, dataset: "Dataset", rows: range) -> None:
        self.rows = rows
        images = dataset.with_format(None).data.column("image")
        self._places = np.asarray(rows, np.int64)
        if dataset._indices is not None:
            self._places = dataset._indices.column(0).to_numpy()[self._places]
        self._contents = pc.struct_field(images, "bytes")
        paths = pc.struct_field(images, "path").to_pylist()
        in_memory = pc.is_valid(self._contents).to_numpy()
        self.paths: list[str | None] = [paths[place] for place in self._places.tolist()]
        self.in_memory: list[bool] = in_memory[self._places].tolist()

    def name(self, number: int) -> str:
        """Returns what an image is called in messages."""
        return image_name({"path": self.paths[number]}, self.rows[number])

    def view(self, number: int) -> memoryview:
        """Returns the bytes of an image in memory: of a mapped file, no page is read yet."""
        return memoryview(self._contents[int(self._places[number])].as_buffer())


def find_damaged(dataset: "Dataset", *, first: int = 0, step: int = 1) -> list[Damage]:
    """Finds the images that no decoder will read: empty files, no images, files that are cut off.

    Each file is opened once, and only its start and its end are read. A file that looks damaged is
    decoded to be sure: what is found cannot be read. What a look at both ends does not show is not
    found. Images at an address, and those of a data set with a transform of its own, are passed.

    Args:
        dataset: With a column ``image``.
        first: The row to begin with.
        step: Distance from one row that is looked at to the next, >= 1.

    Returns:
        What was found, by ascending row.
    """
    if encoded_images(dataset).format["type"] == "custom":
        return []
    files = StoredFiles(dataset, range(first, len(dataset), step))

    def look(number: int) -> str | None:
        if files.in_memory[number]:
            return reason_of(Stored(files.view(number)))
        path = files.paths[number]
        if path is None:
            return "there is no image"
        return None if is_remote(path) else reason_of_file(path)

    return [
        Damage(files.rows[number], files.name(number), reason)
        for number, reason in enumerate(in_threads(look, range(len(files.rows))))
        if reason is not None
    ]


def reason_of_file(path: str) -> str | None:
    """Returns why a file cannot be read as an image; None if nothing speaks against it."""
    try:
        descriptor = os.open(path, OPEN_FLAGS)
        try:
            tail = head = os.read(descriptor, HEAD)
            size = len(head)
            if size == HEAD:
                size = os.lseek(descriptor, -TAIL, os.SEEK_END) + TAIL
                tail = os.read(descriptor, TAIL)
            # Nearly every file.
            ends = head.startswith(JPEG) and tail.endswith(END_OF_JPEG)
            if ends and size >= SHORT and not _has_too_many_pixels(head):
                return None
            return reason_of(Opened(descriptor, size))
        finally:
            os.close(descriptor)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        # A name that no file can have.
        return str(error)


def reason_of(content: Content) -> str | None:
    """Returns why bytes cannot be read as an image; None if nothing speaks against it."""
    if content.size == 0:
        return EMPTY
    head = content.at(0, min(HEAD, content.size))
    is_whole = next((check for magic, check in CHECKS if magic.match(head)), None)
    sure = content.size >= SHORT and not _has_too_many_pixels(head)
    if sure and is_whole is not None and is_whole(content, head):
        return None
    try:
        with pillow_errors(), content.file() as file, Image.open(file) as image:
            # Of formats with no check, the header has to do.
            if is_whole is not None:
                to_rgb(image)
    except DAMAGE as error:
        return damage_of(error)
    return None


def _has_too_many_pixels(head: bytes) -> bool:
    """Tells whether Pillow refuses an image for its size, if the start of the file says it."""
    width, height = _size_in(head)
    limit = Image.MAX_IMAGE_PIXELS
    return limit is not None and width * abs(height) > 2 * limit


def _size_in(head: bytes) -> tuple[int, int]:
    """Returns width and height of an image; 0, 0 if the start of the file does not say them."""
    if head.startswith(JPEG):
        place = 2
        while place + 9 <= len(head) and head[place] == 0xFF:
            if head[place + 1] in STARTS_OF_FRAME:
                height, width = struct.unpack_from(">HH", head, place + 5)
                return width, height
            place += 2 + int.from_bytes(head[place + 2 : place + 4], "big")
        return 0, 0
    if header := PNM_HEADER.match(head):
        return int(header[2]), int(header[3])
    for magic, (form, place) in SIZES.items():
        if head.startswith(magic) and len(head) >= place + struct.calcsize(form):
            width, height = struct.unpack_from(form, head, place)
            return width, height
    return 0, 0


def _is_whole_jpeg(content: Content, head: bytes) -> bool:
    if content.at(content.size - 2, 2) == END_OF_JPEG:
        return True
    # More may follow. A preview in the header has an end of its own, which does not count.
    start = max(content.size - LONG_TAIL, _start_of_scan(content))
    return END_OF_JPEG in content.at(start, content.size - start)


def _start_of_scan(content: Content) -> int:
    """Returns where the pixels of a JPEG begin; the end of the file if it has none."""
    place = 2
    while place + 4 <= content.size:
        marker = content.at(place, 4)
        if marker[0] != 0xFF or marker[1] == START_OF_SCAN:
            return place
        # A marker may be preceded by any number of 0xFF.
        place += 1 if marker[1] == 0xFF else 2 + int.from_bytes(marker[2:], "big")
    return content.size


def _is_whole_png(content: Content, head: bytes) -> bool:
    start = content.size - len(END_OF_PNG)
    if content.at(start, len(END_OF_PNG)) == END_OF_PNG:
        return True
    start = max(content.size - LONG_TAIL, 0)
    return END_OF_PNG in content.at(start, content.size - start)


def _is_whole_gif(content: Content, head: bytes) -> bool:
    return content.at(content.size - 2, 2) == b"\0;"


def _is_whole_webp(content: Content, head: bytes) -> bool:
    return int.from_bytes(head[4:8], "little") + 8 <= content.size


def _is_whole_bmp(content: Content, head: bytes) -> bool:
    return 26 <= int.from_bytes(head[2:6], "little") <= content.size


def _is_whole_pnm(content: Content, head: bytes) -> bool:
    header = PNM_HEADER.match(head)
    if header is None:
        return False
    kind, width, height, maximum = (int(group) for group in header.groups())
    channels, depth = (3 if kind == 6 else 1), (2 if maximum > 255 else 1)
    return header.end() + width * height * channels * depth <= content.size


def _is_whole_tiff(content: Content, head: bytes) -> bool:
    """Tells whether the strips or tiles of the first image end within the file."""
    try:
        with pillow_errors(), content.file() as file, Image.open(file) as image:
            tags = getattr(image, "tag_v2", {})
            # Values may be in no known range.
            if image.mode in ("I", "F"):
                return False
    except DAMAGE:
        return False
    parts = ((tags.get(starts, ()), tags.get(sizes, ())) for starts, sizes in TIFF_PARTS)
    ends = [start + size for pair in parts for start, size in zip(*pair, strict=False)]
    return max(ends, default=0) <= content.size


# By the first bytes of a file.
CHECKS: list[tuple["re.Pattern[bytes]", Callable[[Content, bytes], bool]]] = [
    (re.compile(JPEG), _is_whole_jpeg),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), _is_whole_png),
    (re.compile(rb"GIF8[79]a"), _is_whole_gif),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), _is_whole_webp),
    (re.compile(rb"BM"), _is_whole_bmp),
    (re.compile(rb"P[56]\s"), _is_whole_pnm),
    (re.compile(rb"II[\x2a\x2b]\x00|MM\x00[\x2a\x2b]"), _is_whole_tiff),
]


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], rows: int = ROWS
) -> Iterator[Result]:
    """Yields what a function returns for each item, in order; several threads call it."""
    parts = [items[start : start + rows] for start in range(0, len(items), rows)]
    threads = ThreadPoolExecutor(THREADS)
    try:
        for results in threads.map(lambda part: [function(item) for item in part], parts):
            yield from results
    finally:
        # Nobody who interrupts this waits for the rest.
        threads.shutdown(cancel_futures=True)


def verify_images(
    datasets: "Mapping[str, Dataset]", accelerator: Accelerator, *, unreadable: Unreadable = "raise"
) -> dict[str, list[int]]:
    """Looks for damaged images in all splits, of which each process takes its part.

    Args:
        datasets: The splits by name.
        accelerator: Of the run.
        unreadable: With ``"skip"``, how many were found is logged.

    Returns:
        The rows of those images, by split.

    Raises:
        UsageError: If an image cannot be read, unless such images are to be skipped; counts those
            of every split and names the first five, each with the reason.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    ours = [
        (split, damage)
        for split, dataset in datasets.items()
        for damage in find_damaged(dataset, first=rank, step=processes)
    ]
    found: Iterable[tuple[str, Damage]] = gather_object(ours)
    by_split: dict[str, list[Damage]] = {}
    for split, damage in sorted(found, key=lambda pair: pair[1].row):
        by_split.setdefault(split, []).append(damage)
    problems = Problems()
    for split, dataset in datasets.items():
        damaged = by_split.get(split, [])
        if not damaged:
            continue
        if unreadable == "skip":
            log.info("%d of %d %s images cannot be read", len(damaged), len(dataset), split)
            continue
        note_damaged(problems, split, damaged, len(dataset))
    problems.check()
    return {split: [one.row for one in by_split.get(split, [])] for split in datasets}


def note_damaged(problems: Problems, split: str, damaged: Sequence[Damage], number: int) -> None:
    """Notes the images of a split that cannot be read.

    Args:
        problems: Takes the note.
        split: Name of the split.
        damaged: Of :func:`~timm_lt.data.decode.find_damaged`; may be empty.
        number: How many images the split has.
    """
    if damaged:
        with problems.collected(f"{split} split: "):
            raise unreadable_images({one.name: one.reason for one in damaged}, number)


def note_damaged_files(problems: Problems, files: Mapping[Split, Sequence[str]]) -> None:
    """Notes damaged files by split, of data that have to be mended anyway.

    Files that are not there are passed.
    """
    for split, paths in files.items():
        dataset = dataset_from_files(list(paths), np.zeros(len(paths), np.int64), None)
        damaged = [one for one in find_damaged(dataset) if Path(paths[one.row]).is_file()]
        note_damaged(problems, split, damaged, len(paths))


def log_exceptional(
    split: str, dataset: "Dataset", left_out: int, unreadable: Sequence[int], huge: Sequence[int]
) -> None:
    """Logs the images of a split that were left out, and those that Pillow would warn of.

    Args:
        split: Name of the split.
        dataset: The split.
        left_out: How many images could not be read.
        unreadable: Their rows, as far as they are known.
        huge: Rows of images with more pixels than Pillow reads without a warning.
    """
    if left_out:
        shown = shown_names(image_names(dataset, unreadable))
        log.warning(
            "%d of %d %s images cannot be read and were left out%s",
            *(left_out, len(dataset), split, f": {shown}" if shown else ""),
        )
    if huge:
        names = image_names(dataset, huge)
        log.warning("%s", describe_huge(len(huge), len(dataset), names, split))


def check_classes_left(
    labels: Mapping[str, Tensor], unreadable: Mapping[str, list[int]], names: list[str] | None
) -> None:
    """Checks that enough is left of the splits without the images that cannot be read.

    Args:
        labels: By split, (N,).
        unreadable: Rows of those images, by split.
        names: Class names, (C,), if known.

    Raises:
        UsageError: If a class that a split has loses all its images, in train or val, or a split
            does; names all such splits and classes.
    """
    problems = Problems()
    for split, rows in unreadable.items():
        there = torch.ones(len(labels[split]), dtype=torch.bool)
        there[rows] = False
        if not there.any():
            problems.add(f"{split} split: none of the {len(there)} images can be read")
            continue
        left = set(labels[split][there].tolist())
        lost = [c for c in labels[split].unique().tolist() if c not in left]
        # A class without a test image has no accuracy; the report says so.
        if lost and split != "test":
            shown = shown_names([f"{c} ({names[c]})" if names else c for c in lost])
            problems.add(
                f"{split} split: {len(lost)} classes have no image that can be read: {shown}; "
                "repair some, or leave these classes out"
            )
    problems.check()
