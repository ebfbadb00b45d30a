"""Finding files that no decoder will read, before training, without decoding them."""

import io
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from timm_lt.data.pixels import to_rgb
from timm_lt.data.reading import (
    DAMAGE,
    EMPTY,
    damage_of,
    encoded_images,
    image_name,
    is_remote,
    pillow_errors,
)

if TYPE_CHECKING:
    from datasets import Dataset

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
