"""Text lists, ``path label`` on each line, read at the speed of NumPy.

Columns of lists beside paths and labels: the split, and those that are not used.

Many file paths in little memory: one string after another, not one Python object each.

Lists as tables: CSV, and the same with tabs.

Lists as JSON: BBN's annotations, and those of COCO and iNaturalist.

One function that reads a list of images in any of the formats that are in use.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from timm_lt.data.folder import IMAGE_SUFFIXES, suffix
from timm_lt.data.sources import SPLIT_WORDS, Split
from timm_lt.utils.checks import UsageError, shown_names
from timm_lt.utils.console import log, one_line

SPLIT_COLUMN = "split"


def read_splits(path: Path, values: "Sequence[str] | pa.Array") -> NDArray[np.str_]:
    """Returns the split of each image, ``"train"``, ``"val"`` or ``"test"``.

    Args:
        path: The list, for messages.
        values: The column, (N,): names of splits as directories have them, in any case.

    Raises:
        UsageError: If a value is not the name of a split; names those values.
    """
    coded = pa.array(values, pa.string()).dictionary_encode()
    words = coded.dictionary.to_pylist()
    unknown = [repr(word) for word in words if word.strip().lower() not in SPLIT_WORDS]
    if unknown:
        raise UsageError(
            f"{path}: the column {SPLIT_COLUMN} has values that are not the name of a split: "
            f"{shown_names(unknown)}; expected {', '.join(SPLIT_WORDS)}"
        )
    splits = np.array([SPLIT_WORDS[word.strip().lower()] for word in words], np.str_)
    found: NDArray[np.str_] = splits[coded.indices.to_numpy()]
    return found


def note_unused(owner: str | Path, names: Sequence[str]) -> None:
    """Logs which columns of a list or table are not used."""
    if names:
        log.warning(
            "%s: columns that are not used: %s",
            owner,
            shown_names([name or "''" for name in names], 8),
        )


# Paths that become Python objects together when all are iterated over.
BLOCK = 10_000


class Paths(Sequence[str]):
    """A sequence of strings as an Arrow array: the bytes of each path and 4 or 8 more.

    >>> paths = Paths(["a/1.jpg", "a/2.jpg", "b/3.jpg"])
    >>> paths[-1], paths[:2]
    ('b/3.jpg', Paths(['a/1.jpg', 'a/2.jpg']))

    ``pyarrow.array(paths)`` gives the array.

    Args:
        paths: Strings, or an Arrow array of them, which is not copied.
        step: Of the array, every so manieth string is a path.
    """

    def __init__(self, paths: "Sequence[str] | pa.Array", step: int = 1) -> None:
        self._strings = paths if isinstance(paths, pa.Array) else pa.array(paths, pa.string())
        self._step = step

    @property
    def arrow(self) -> "pa.Array":
        """The paths alone; they are copied if other strings are between them."""
        if self._step == 1:
            return self._strings
        return self._strings.take(pa.array(np.arange(0, len(self._strings), self._step)))

    def __len__(self) -> int:
        return len(range(0, len(self._strings), self._step))

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Paths": ...
    def __getitem__(self, index: int | slice) -> "str | Paths":
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self.take(np.arange(start, stop, step))
        path: str = self._strings[range(len(self))[index] * self._step].as_py()
        return path

    def __iter__(self) -> Iterator[str]:
        block = BLOCK * self._step
        for start in range(0, len(self._strings), block):
            yield from self._strings[start : start + block].to_pylist()[:: self._step]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        more = ", ..." if len(self) > 5 else ""
        return f"Paths([{', '.join(map(repr, self[:5]))}{more}])"

    def __arrow_array__(self, type: "pa.DataType | None" = None) -> "pa.Array":
        return self.arrow if type is None else self.arrow.cast(type)

    def take(self, rows: NDArray[Any]) -> "Paths":
        """Returns the paths of some rows."""
        return Paths(self._strings.take(pa.array(rows * self._step)))

    def parts(self, depth: int = 1) -> "tuple[Paths, Paths]":
        """Returns each path in two: its folder, and its last components, ``depth`` of them.

        >>> Paths(["x/y/1.jpg", "2.jpg"]).parts()
        (Paths(['x/y', '']), Paths(['1.jpg', '2.jpg']))
        """
        import pyarrow.compute as pc

        split = pc.split_pattern(self.arrow, "/", max_splits=depth, reverse=True)
        sizes = np.diff(split.offsets.to_numpy())
        first = split.offsets.to_numpy()[:-1]
        parts = split.flatten()
        deep = sizes > depth
        # A path that is not as deep has no folder.
        folder = pc.if_else(pa.array(deep), parts.take(pa.array(first)), "")
        tail = parts.take(pa.array(first + deep))
        for more in range(1, depth):
            there = more < sizes - deep
            following = parts.take(pa.array(np.where(there, first + deep + more, first)))
            joined = pc.binary_join_element_wise(tail, following, "/")
            tail = pc.if_else(pa.array(there), joined, tail)
        return Paths(folder), Paths(tail)


# Bytes that are looked at together: what is computed of them stays in the processor's cache.
TEXT_BLOCK = 2**20
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
    block = content[start : start + TEXT_BLOCK]
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


PATH_COLUMNS = ("path", "image", "filename", "file_name", "filepath")
LABEL_COLUMNS = ("label", "target", "class", "category")
INTEGER = r"^[0-9]{1,18}$"
# What is meant to be a number and no class name.
NUMBER = r"^[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$"


class Columns(NamedTuple):
    """Where a table has what.

    Attributes:
        path: Index of the column of paths.
        label: Index of that of labels.
        names: Names of all columns; empty texts without a header.
        header: Lines before the first image, 0 or 1.
    """

    path: int
    label: int
    names: list[str]
    header: int

    @property
    def split(self) -> int | None:
        """Index of the column of splits, if there is one."""
        return self.names.index(SPLIT_COLUMN) if SPLIT_COLUMN in self.names else None

    @property
    def unused(self) -> list[str]:
        """Names of the columns that are not used."""
        used = (self.path, self.label, self.split)
        return [name for place, name in enumerate(self.names) if place not in used]


class Table(NamedTuple):
    """Columns of a list; see :class:`~timm_lt.data.lists.ImageList`."""

    paths: pa.Array
    labels: NDArray[np.int64]
    names: list[str] | None = None
    splits: NDArray[np.str_] | None = None


def header_columns(line: bytes, delimiter: str = ",") -> Columns | None:
    """Finds the columns in the first line of a table; None if it does not name them."""
    fields = _fields(line, delimiter)
    names = [field.strip().lower() for field in fields]
    path = next((names.index(name) for name in PATH_COLUMNS if name in names), None)
    label = next((names.index(name) for name in LABEL_COLUMNS if name in names), None)
    if path is None or label is None:
        return None
    return Columns(path, label, names, 1)


def _fields(line: bytes, delimiter: str) -> list[str]:
    text = line.decode("utf-8-sig", "replace").splitlines()
    return next(csv.reader(text[:1], delimiter=delimiter), [])


def read_table(path: Path, *, delimiter: str) -> Table:
    """Reads paths, labels, class names and splits; see :func:`read_image_list`."""
    import pyarrow.compute as pc

    columns = _columns(path, delimiter)
    if columns is None:
        return Table(pa.array([], pa.string()), np.empty(0, np.int64))
    try:
        table = _parsed(path, delimiter, columns)
    except pa.ArrowInvalid as error:
        with suppress(csv.Error):
            _raise_fault(path, delimiter, columns)
        raise UsageError(f"{path} is no table: {error}") from error
    paths, texts, *others = (column.combine_chunks() for column in table.columns)
    texts = pc.utf8_trim_whitespace(texts)
    integers = pc.match_substring_regex(texts, INTEGER)
    numbers = pc.or_(pc.match_substring_regex(texts, NUMBER), pc.equal(texts, ""))
    all_integers = pc.all(integers).as_py()
    if pc.any(pc.equal(paths, "")).as_py() or (pc.any(numbers).as_py() and not all_integers):
        _raise_fault(path, delimiter, columns)
    note_unused(path, columns.unused)
    splits = read_splits(path, others[0]) if others else None
    if all_integers:
        return Table(paths, texts.cast(pa.int64()).to_numpy(), None, splits)
    words = texts.dictionary_encode()
    names = np.array(words.dictionary.to_pylist(), object)
    order = names.argsort()
    ranks = np.empty(len(names), np.int64)
    ranks[order] = np.arange(len(names))
    return Table(paths, ranks[words.indices.to_numpy()], names[order].tolist(), splits)


def _columns(path: Path, delimiter: str) -> Columns | None:
    """Returns where the columns are; None if the file is empty.

    Raises:
        UsageError: If the first line neither names them nor is the path of an image and a label.
    """
    with path.open("rb") as file:
        line = next((line for line in file if line.strip()), None)
    if line is None:
        return None
    if columns := header_columns(line, delimiter):
        return columns
    fields = _fields(line, delimiter)
    if len(fields) == 2 and (fields[1].strip().isdecimal() or suffix(fields[0]) in IMAGE_SUFFIXES):
        return Columns(0, 1, ["", ""], 0)
    if any(suffix(field) in IMAGE_SUFFIXES for field in fields):
        raise UsageError(
            f"{path} has no header, which may be missing only if there are a path and a label "
            f"alone: its first line is {', '.join(map(repr, fields))}; put a line before it that "
            "names the columns, e.g. path,label,split"
        )
    raise UsageError(
        f"{path} has no column of {'paths' if _lacks(fields, PATH_COLUMNS) else 'labels'}: its "
        f"first line is {', '.join(map(repr, fields))}, and should have one of "
        f"{', '.join(PATH_COLUMNS)} and one of {', '.join(LABEL_COLUMNS)}"
    )


def _lacks(fields: list[str], names: tuple[str, ...]) -> bool:
    return not {field.strip().lower() for field in fields} & {*names}


def _parsed(path: Path, delimiter: str, columns: Columns) -> pa.Table:
    """Returns the columns of paths, labels and perhaps splits, as strings."""
    from pyarrow import csv as arrow_csv

    names = [str(place) for place in range(len(columns.names))]
    places = (columns.path, columns.label, columns.split)
    wanted = [names[place] for place in places if place is not None]
    read = arrow_csv.ReadOptions(
        use_threads=False, column_names=names, skip_rows_after_names=columns.header
    )
    convert = arrow_csv.ConvertOptions(
        include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string())
    )
    parse = arrow_csv.ParseOptions(delimiter=delimiter)
    return arrow_csv.read_csv(path, read, parse, convert)


def _raise_fault(path: Path, delimiter: str, columns: Columns) -> None:
    """Reads the table once more, row by row, and raises what is wrong first; names the line."""
    check_utf8(path.read_bytes(), path)
    integers = None
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter)
        for number, row in enumerate(filter(None, rows)):
            if number < columns.header:
                continue
            fault = _table_fault(row, columns)
            if fault is None:
                integer = row[columns.label].strip().isdecimal()
                integers = integer if integers is None else integers
                if integer != integers:
                    fault = (
                        f"label {row[columns.label]!r} is {'an' if integer else 'no'} integer, "
                        "unlike those above: labels are all integers or all names"
                    )
            if fault:
                raise UsageError(f"{path}, line {rows.line_num}: {fault}")


def _table_fault(row: list[str], columns: Columns) -> str | None:
    """Returns what is wrong with a row by itself."""
    if len(row) != len(columns.names):
        return (
            f"{len(row)} fields, not {len(columns.names)}: a field with a comma in it needs quotes"
        )
    label = row[columns.label].strip()
    if not row[columns.path]:
        return "no path"
    if not label:
        return "no label"
    if re.match(NUMBER, label) and not re.match(INTEGER, label):
        return f"label {label!r} is not a non-negative integer"
    return None


PATH_KEYS = ("fpath", "im_path", "image_path", "path", "file_name", "filename")
LABEL_KEYS = ("category_id", "label", "target")
SURROGATE = re.compile("[\ud800-\udfff]")
Entry = Mapping[str, Any]
Id = int | str
KINDS = {int: "an integer of at most 64 bits", str: "a text in Unicode"}


class Annotations(NamedTuple):
    """What a file of annotations says; see :class:`~timm_lt.data.lists.ImageList`."""

    paths: list[str]
    labels: NDArray[np.int64]
    names: list[str] | None
    num_classes: int | None
    splits: NDArray[np.str_] | None = None


def read_annotations(path: Path) -> Annotations:
    """Reads JSON annotations; see :func:`~timm_lt.data.lists.read_image_list`."""
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}, line {error.lineno}, column {error.colno}: no JSON: {error.msg}"
        ) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}, line {line}: no UTF-8 text: {error.reason}") from error
    except RecursionError as error:
        raise UsageError(f"{path} has lists in lists too deep to be read") from error
    except ValueError as error:
        # Of integers that are too long, the advice is to a programmer.
        reason = str(error).partition(";")[0]
        raise UsageError(f"{path} has a number that cannot be read: {reason}") from error
    if isinstance(content, list):
        content = {"annotations": content}
    if not isinstance(content, dict) or "annotations" not in content:
        found = f"keys {', '.join(content)}" if isinstance(content, dict) else repr(content)[:40]
        raise UsageError(
            f"{path} has no 'annotations', which give the labels, as the test images of a "
            f"competition; found {found}"
        )
    if "images" in content:
        return _of_images(path, content)
    return _of_paths(path, content)


def _of_paths(path: Path, content: Entry) -> Annotations:
    """Reads annotations that have paths and labels, as BBN's."""
    entries = _entries(path, content, "annotations")
    if not entries:
        return Annotations([], np.empty(0, np.int64), None, None)
    path_key = _key(path, entries[0], PATH_KEYS, "annotations")
    label_key = _key(path, entries[0], LABEL_KEYS, "annotations")
    paths = _values(path, entries, path_key, "annotations", str)
    labels = np.array(_values(path, entries, label_key, "annotations", int), np.int64)
    num_classes = content.get("num_classes")
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise UsageError(f"{path}: num_classes is {num_classes!r}, not an integer of 1 or more")
    bad = labels < 0
    if num_classes is not None:
        bad |= labels >= num_classes
    if bad.any():
        row = int(bad.argmax())
        raise UsageError(
            f"{path}: annotations[{row}] ({paths[row]}) has {label_key} {labels[row]}, "
            + ("which is negative" if labels[row] < 0 else f"but num_classes is {num_classes}")
        )
    note_unused(path, _other_keys(entries, path_key, label_key))
    return Annotations(paths, labels, None, num_classes, _splits(path, entries, "annotations"))


def _of_images(path: Path, content: Entry) -> Annotations:
    """Joins annotations with the images and categories that they point to."""
    images = _entries(path, content, "images")
    annotations = _entries(path, content, "annotations")
    image_ids = _unique(path, _ids(path, images, "id", "images"), "images")
    paths = _values(path, images, "file_name", "images", str)
    rows = _positions(path, _ids(path, annotations, "image_id", "annotations"), image_ids, "image")
    categories, names = _categories(path, content, annotations)
    found = _positions(
        path, _ids(path, annotations, "category_id", "annotations"), categories, "category"
    )
    labels = np.full(len(images), -1, np.int64)
    labels[rows] = found
    # Of an image with several annotations, the last stays; the others differ from it or not.
    several = np.flatnonzero(labels[rows] != found)
    if len(several):
        places = list(dict.fromkeys(rows[several].tolist()))
        raise UsageError(
            f"{path}: {len(places)} images have annotations of different categories: "
            f"{shown_names([paths[place] for place in places])}; an image has one class: remove "
            "these images, or all but one category of each"
        )
    note_unused(path, _other_keys(images, "id", "file_name"))
    splits = _splits(path, images, "images")
    kept = np.flatnonzero(labels >= 0)
    if len(kept) < len(images):
        bare = np.flatnonzero(labels < 0)
        shown = shown_names([paths[place] for place in bare[:6]])
        log.warning(
            "%s: %d of %d images have no annotation and are left out: %s",
            *(path, len(bare), len(images), shown),
        )
        paths, labels = [paths[row] for row in kept], labels[kept]
        splits = None if splits is None else splits[kept]
    return Annotations(paths, labels, names, len(categories) if names else None, splits)


def _other_keys(entries: list[Entry], *used: str) -> list[str]:
    keys = {key for entry in entries for key in entry}
    return sorted(keys - {*used, SPLIT_COLUMN})


def _splits(path: Path, entries: list[Entry], where: str) -> NDArray[np.str_] | None:
    if not any(SPLIT_COLUMN in entry for entry in entries):
        return None
    return read_splits(path, _values(path, entries, SPLIT_COLUMN, where, str))


def _categories(
    path: Path, content: Entry, annotations: list[Entry]
) -> tuple[dict[Any, int], list[str] | None]:
    """Returns the label of each category id, and the names by label.

    Without categories, the ids in the annotations are the labels themselves.
    """
    if "categories" not in content:
        ids = _ids(path, annotations, "category_id", "annotations")
        for number in ids:
            if not isinstance(number, int) or number < 0:
                raise UsageError(
                    f"{path}: category_id {number!r} is not a non-negative integer, and there are "
                    "no categories that name it"
                )
        return {number: int(number) for number in ids}, None
    entries = _entries(path, content, "categories")
    ids = _ids(path, entries, "id", "categories")
    _unique(path, ids, "categories")
    names = dict(zip(ids, _values(path, entries, "name", "categories", str), strict=True))
    if len({*names.values()}) < len(names):
        first: dict[str, Id] = {}
        twice = [name for number, name in names.items() if first.setdefault(name, number) != number]
        raise UsageError(f"{path}: several categories are named {shown_names(twice)}")
    ids = sorted(ids, key=lambda number: (isinstance(number, str), number))
    return {number: label for label, number in enumerate(ids)}, [names[number] for number in ids]


def _entries(path: Path, content: Entry, key: str) -> list[Entry]:
    entries = content[key]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f"{path}: {key!r} must be a list of objects")
    return entries


def _key(path: Path, entry: Entry, keys: Iterable[str], where: str) -> str:
    for key in keys:
        if key in entry:
            return key
    raise UsageError(
        f"{path}: {where} have none of {', '.join(keys)}; the first has {', '.join(entry)}"
    )


def _values(path: Path, entries: list[Entry], key: str, where: str, *kinds: type) -> list[Any]:
    """Returns a value of every entry."""
    values = [entry.get(key) for entry in entries]
    for row, value in enumerate(values):
        if not _fits(value, kinds):
            raise UsageError(
                f"{path}: {where}[{row}] has {key} {one_line(repr(value))}, not "
                f"{' or '.join(KINDS[kind] for kind in kinds)}"
            )
    return values


def _fits(value: object, kinds: tuple[type, ...]) -> bool:
    """Returns whether a value is an int64, or a text in UTF-8: without lone surrogates."""
    if type(value) not in kinds:
        return False
    if isinstance(value, str):
        return value.isascii() or not SURROGATE.search(value)
    return isinstance(value, int) and value.bit_length() < 64


def _ids(path: Path, entries: list[Entry], key: str, where: str) -> list[Id]:
    return _values(path, entries, key, where, int, str)


def _unique(path: Path, ids: list[Id], where: str) -> dict[Id, int]:
    """Returns the place of each id."""
    places = {number: place for place, number in enumerate(ids)}
    if len(places) < len(ids):
        twice = [number for place, number in enumerate(ids) if places[number] != place]
        raise UsageError(f"{path}: {where} have an id more than once: {shown_names(twice)}")
    return places


def _positions(path: Path, ids: list[Id], places: Mapping[Id, int], noun: str) -> NDArray[np.int64]:
    """Returns the place of what each annotation points to."""
    found = np.array([places.get(number, -1) for number in ids], np.int64)
    unknown = np.flatnonzero(found < 0)
    if len(unknown):
        shown = shown_names([repr(wrong) for wrong in dict.fromkeys(ids[row] for row in unknown)])
        raise UsageError(
            f"{path}: {len(unknown)} annotations have values of {noun}_id that are the id of no "
            f"{noun}: {shown}"
        )
    return found


# Bytes of a file that tell its format, and the end of a line of a text list.
START = 4096
LABELLED = re.compile(rb"\S[ \t]+[0-9]+\s*$")


@dataclass(frozen=True, eq=False)
class ImageList:
    """Image files with their labels; unpacks as ``paths, labels``.

    Attributes:
        paths: As the list has them, (N,): a sequence of strings in little memory.
        labels: (N,) int64, 0 or more.
        names: Class names, (C,), if the list has them.
        num_classes: C, if the list says it.
        splits: ``"train"``, ``"val"`` or ``"test"``, (N,), if the list says it.
    """

    paths: Paths
    labels: NDArray[np.int64]
    names: list[str] | None = None
    num_classes: int | None = None
    splits: NDArray[np.str_] | None = None

    def __iter__(self) -> Iterator[Any]:
        """Yields the paths and the labels."""
        yield self.paths
        yield self.labels

    def by_split(self) -> "dict[Split, ImageList]":
        """Returns the images of each split that the list names."""
        if self.splits is None:
            return {}
        parts: dict[Split, ImageList] = {}
        for split in get_args(Split):
            rows = np.flatnonzero(self.splits == split)
            if len(rows):
                parts[split] = replace(
                    self, paths=self.paths.take(rows), labels=self.labels[rows], splits=None
                )
        return parts


def read_image_list(path: str | Path) -> ImageList:
    r"""Reads a list of image files with their labels.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "list.txt"
    >>> _ = file.write_text("my photos/1.jpg 0\nmy photos/2.jpg 1\n")
    >>> paths, labels = read_image_list(file)
    >>> paths[1], labels
    ('my photos/2.jpg', array([0, 1]))

    The formats:

    - Text, a line for each image: a path, which may have blanks in it, blanks or tabs, and a label.
      Empty lines count for nothing.
    - CSV (``.csv``; ``.tsv`` with tabs), or text whose first line names such columns: ``path``,
      ``image``, ``filename``, ``file_name`` or ``filepath``, and ``label``, ``target``, ``class``
      or ``category``; perhaps ``split``. Other columns are named in the log. The first line may be
      missing if there are a path and a label only, and the label is an integer or the path ends as
      images do. Labels that are words become the sorted class names.
    - JSON (``.json``, or text that starts like one and whose first line does not end in a label)
      as BBN's: ``annotations`` with a path (``fpath``, ``im_path``, ...) and a ``category_id``, and
      ``num_classes``.
    - JSON as COCO's, COCO Camera Traps' and iNaturalist's: ``images`` with ``id`` and
      ``file_name``, ``annotations`` with ``image_id`` and ``category_id``, ``categories`` with
      ``id`` and ``name``. Ids are integers or texts. The categories become labels 0 to C - 1 in the
      order of their ids. Images without an annotation are left out, and counted in the log.

    JSON may have a ``split`` too, beside each path. The value is ``train``, ``val``, ``valid``,
    ``validation``, ``dev`` or ``test``, in any case.

    Text is UTF-8, with or without byte order mark, with line ends of any system.

    Args:
        path: The list.

    Returns:
        Paths as they are in the list, labels, and class names and splits if there are any.

    Raises:
        UsageError: If the file is missing, empty or no such list, or a label is missing or is not a
            non-negative integer; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"list {path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        found = _read(path)
    except OSError as error:
        raise UsageError(f"list {path} cannot be read: {error.strerror or error}") from error
    if len(found.paths) == 0:
        raise UsageError(f"list {path} is empty: it names no image with a label")
    return found


def _read(path: Path) -> ImageList:
    with path.open("rb") as file:
        start = file.read(START)
    is_whole = len(start) < START
    line, end, _ = start.removeprefix(BOM).lstrip().partition(b"\n")
    ending = path.suffix.lower()
    # The path of a line with a label may start like JSON.
    is_line = bool(end or is_whole) and LABELLED.search(line)
    starts_as_json = line[:1] in (b"{", b"[") and not is_line and ending not in (".csv", ".tsv")
    if ending == ".json" or starts_as_json:
        annotations = read_annotations(path)
        return ImageList(Paths(annotations.paths), *annotations[1:])
    if ending in (".csv", ".tsv") or header_columns(line):
        table = read_table(path, delimiter="\t" if ending == ".tsv" else ",")
        return ImageList(Paths(table.paths), table.labels, table.names, splits=table.splits)
    return ImageList(*read_text(path))
