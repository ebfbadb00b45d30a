"""Text lists, ``path label`` on each line, read at the speed of NumPy."""

from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from timm_lt.data.lists.paths import Paths
from timm_lt.utils.checks import UsageError

# Bytes that are looked at together: what is computed of them stays in the processor's cache.
BLOCK = 2**20
# A label has no more digits: it fits an int64.
MAX_DIGITS = 18
SPACE, TAB, RETURN, NEWLINE, ZERO = b" \t\r\n0"
BOM = b"\xef\xbb\xbf"
# Bytes before the file in memory, so that there are 8 before the end of every line.
MARGIN = 8

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]


class Lines(NamedTuple):
    """What some lines say.

    Attributes:
        labels: Of each image, (B,).
        starts: Where its path starts in the bytes, (B,).
        ends: Where its path ends, (B,).
        next_start: Where the line after them starts.
        number: How many lines they are, with empty ones.
    """

    labels: Integers
    starts: Integers
    ends: Integers
    next_start: int
    number: int


def read_text(path: Path) -> tuple[Paths, Integers]:
    """Reads the paths and labels of a text list; see :func:`~timm_lt.data.lists.read_image_list`.

    The paths stay where they are in the bytes of the file, which are kept. While it is read, 16
    bytes a line are needed beside the result, which has the file and 16 bytes a line.
    """
    content = _content(path)
    narrow = np.int32 if len(content) < 2**31 else np.int64
    bounds: list[NDArray[Any]] = [np.empty(0, narrow)]
    labels = [np.empty(0, np.int64)]
    start, line = MARGIN, 1
    if content[start : start + len(BOM)].tobytes() == BOM:
        content[start : start + len(BOM)] = NEWLINE
        start += len(BOM)
    while start < len(content):
        lines = _read_block(content, start, path, line)
        both = np.empty(2 * len(lines.labels), narrow)
        both[::2], both[1::2] = lines.starts, lines.ends
        bounds.append(both)
        labels.append(lines.labels)
        start, line = lines.next_start, line + lines.number
    ends_of_strings = np.concatenate(bounds)
    del bounds
    kind = pa.string() if narrow is np.int32 else pa.large_string()
    buffers = [None, pa.py_buffer(ends_of_strings), pa.py_buffer(content)]
    # A path, the rest of its line, the next path, ...
    strings = pa.Array.from_buffers(kind, max(len(ends_of_strings) - 1, 0), buffers)
    return Paths(strings, step=2), np.concatenate(labels)


def _content(path: Path) -> Bytes:
    """Returns the bytes of a file behind a margin, with a newline at the end."""
    with path.open("rb", buffering=0) as file:
        size = path.stat().st_size
        content = np.empty(MARGIN + size + 1, np.uint8)
        content[:MARGIN] = content[-1] = NEWLINE
        place = memoryview(cast(Any, content))[MARGIN:-1]
        # One call reads 2 GiB at most.
        while place and (read := file.readinto(place)):
            place = place[read:]
    if place:
        raise UsageError(f"{path} became shorter while it was read")
    return content[:-1] if content[-2] == NEWLINE else content


def check_utf8(block: bytes, path: Path, line: int = 1) -> None:
    """Refuses bytes that are no UTF-8; names the line, of which ``line`` is the block's first."""
    try:
        block.decode()
    except UnicodeDecodeError as error:
        place = line + block.count(b"\n", 0, error.start)
        raise UsageError(
            f"{path}, line {place}: byte 0x{block[error.start]:02x} is not UTF-8; save the list as "
            "UTF-8"
        ) from None


def _read_block(content: Bytes, start: int, path: Path, line: int) -> Lines:
    """Reads the lines of a block, of which ``line`` is the first."""
    block = content[start : start + BLOCK]
    # Newlines, carriage returns, and two characters between them that are in no path.
    breaks = np.flatnonzero((block - np.uint8(NEWLINE)) < 4) + start
    ends, newlines = _line_ends(content, breaks)
    if short := _short_labels(content, ends, NEWLINE if ends is newlines else RETURN):
        labels, ends = short
        starts = np.concatenate([[start], newlines[:-1] + 1])
    else:
        newlines = breaks[content[breaks] == NEWLINE]
        if len(newlines) == 0:
            raise UsageError(f"{path} has a line of more than {BLOCK:,} bytes: it is no list")
        labels, starts, ends = _any_labels(content, start, newlines, path, line)
    end = int(newlines[-1]) + 1
    if block.max() > 127:
        check_utf8(content[start:end].tobytes(), path, line)
    return Lines(labels, starts, ends, end, len(newlines))


def _line_ends(content: Bytes, breaks: Integers) -> tuple[Integers, Integers]:
    """Returns where lines end and where their newlines are: behind carriage returns in Windows."""
    if len(breaks) > 1 and content[breaks[0]] == RETURN:
        newlines = breaks[1::2]
        ends = breaks[::2][: len(newlines)]
        if np.array_equal(ends + 1, newlines) and (content[newlines] == NEWLINE).all():
            return ends, newlines
    return breaks, breaks


def _short_labels(content: Bytes, ends: Integers, end: int) -> tuple[Integers, Integers] | None:
    """Reads lines that end in one blank and a label of 1 to 5 digits, as nearly all lists have.

    ``end``, which must be the byte at the end of a line, and the 7 bytes before it are one 64-bit
    word, whose highest byte is the last.

    Returns:
        The labels and where the paths end; None if a line is another.
    """
    if len(ends) == 0:
        return None
    words = np.ndarray((len(content) - 7,), "<u8", content, 0, (1,))[ends - 7]
    usual = words >> 56 == end
    words <<= 8
    digits = words ^ _in_each(8, ZERO)  # a byte is 0 to 9 now, or it was no digit
    others = digits & _in_each(8, 0x7F)
    others += _in_each(8, 0x76)
    others |= digits
    others &= _in_each(8, 0x80)
    # The highest bit that is set belongs to the last byte that is no digit.
    before = np.frexp(others.astype(np.float64))[1].astype(np.uint64)
    bits = 64 - before
    usual &= bits - 8 <= 32
    words <<= bits
    words >>= 48  # what is left is the blank and, below it, the last byte of the path
    usual &= (words - _pair(SPACE, SPACE + 1) < 0xFF - SPACE) | (
        words - _pair(TAB, SPACE + 1) < 0xFF - SPACE
    )
    if not usual.all():
        return None
    digits >>= before
    digits <<= before
    # Pairs of neighbours become numbers of 2, of 4, of 8 digits; the lower byte comes first.
    for width, factor in ((8, 10), (16, 100), (32, 10_000)):
        digits *= np.uint64((factor << width) + 1)
        digits >>= width
        digits &= _in_each(2 * width, (1 << width) - 1)
    bits >>= 3
    return digits.view(np.int64), ends - 1 - bits.view(np.int64)


def _pair(high: int, low: int) -> np.uint64:
    return np.uint64((high << 8) + low)


def _in_each(width: int, value: int) -> np.uint64:
    """Returns the word with a value in each of its fields of some width."""
    return np.uint64(sum(value << place for place in range(0, 64, width)))


def _any_labels(
    content: Bytes, start: int, newlines: Integers, path: Path, line: int
) -> tuple[Integers, Integers, Integers]:
    """Reads lines of any kind: returns the labels, and where the paths start and end."""
    starts = np.concatenate([[start], newlines[:-1] + 1])
    ends = _without_blanks(content, starts, newlines)
    rows = np.flatnonzero(ends > starts)
    starts, ends = starts[rows], ends[rows]
    labels, label_starts = _trailing_integers(content, starts, ends)
    path_ends = _without_blanks(content, starts, label_starts)
    bad = (path_ends == label_starts) | (path_ends == starts) | (label_starts == ends)
    inner = _inner_return(content[start : newlines[-1] + 1])
    if inner is not None:
        bad |= (starts <= start + inner) & (ends > start + inner)
    if bad.any():
        row = int(bad.argmax())
        text = content[starts[row] : ends[row]].tobytes()
        place = line + int(rows[row])
        check_utf8(text, path, place)
        raise UsageError(f"{path}, line {place}: {_fault(text.decode())}")
    return labels, starts, path_ends


def _inner_return(block: Bytes) -> int | None:
    """Returns where a carriage return stands inside a line; None if there is none."""
    returns = np.flatnonzero(block == RETURN)
    # The block ends in a newline, so there is always a byte behind.
    following = block[returns + 1]
    inner = returns[(following != NEWLINE) & (following != RETURN)]
    return int(inner[0]) if len(inner) else None


def _without_blanks(content: Bytes, starts: Integers, ends: Integers) -> Integers:
    """Returns where texts end when the blanks at their ends are left out."""
    while True:
        last = content[ends - 1]
        # The byte before an empty text is not its own.
        blank = ((last == SPACE) | (last == TAB) | (last == RETURN)) & (ends > starts)
        if not blank.any():
            return ends
        ends = ends - blank


def _trailing_integers(
    content: Bytes, starts: Integers, ends: Integers
) -> tuple[Integers, Integers]:
    """Returns the integers at the ends of texts, and where they start."""
    values = np.zeros(len(ends), np.int64)
    places = ends.copy()
    going_on = np.ones(len(ends), bool)
    for exponent in range(MAX_DIGITS):
        digits = content[places - 1] - np.uint8(ZERO)  # wraps around: no digit is 10 or more
        going_on &= (digits < 10) & (places > starts)
        if not going_on.any():
            break
        values += np.where(going_on, digits, 0) * np.int64(10**exponent)
        places -= going_on
    return values, places


def _fault(line: str) -> str:
    """Returns what is wrong with a line."""
    for character, name in (("\0", "zero byte"), ("\r", "carriage return")):
        if character in line:
            return f"there is a {name} inside: save the list as UTF-8 text"
    parts = line.replace("\t", " ").rsplit(" ", 1)
    if len(parts) < 2 or not parts[0].strip():
        return f"{line!r} has no label: a line is a path, a blank and a label"
    hint = "; a list separated by commas is named .csv" if "," in parts[1] else ""
    return f"label {parts[1]!r} is not a non-negative integer{hint}"
