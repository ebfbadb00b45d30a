"""Lists of images with labels: text, CSV, TSV, and JSON of BBN, COCO and iNaturalist."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from timm_lt.data.folder import IMAGE_SUFFIXES, suffix
from timm_lt.data.sources import SPLIT_WORDS, Paths, Split
from timm_lt.utils.checks import UsageError, shown_names, user_errors
from timm_lt.utils.console import log, one_line

# Column names, compared without case. The first one that a table has is used.
TABLE_COLUMNS = {
    "path": ("path", "image", "filename", "file_name", "filepath"),
    "label": ("label", "target", "class", "category"),
    "split": ("split",),
}
PATH_KEYS = ("fpath", "im_path", "image_path", "path", "file_name", "filename")
LABEL_KEYS = ("category_id", "label", "target")
# A label has at most 18 digits, so it fits an int64.
MAX_DIGITS = 18
INTEGER = rf"^[0-9]{{1,{MAX_DIGITS}}}$"
# Labels that are meant as numbers, not as class names.
NUMBER = r"^[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$"
BOM = b"\xef\xbb\xbf"
SPACE, TAB, RETURN, NEWLINE, ZERO = b" \t\r\n0"
# Bytes parsed at a time: intermediate arrays stay in the processor's cache.
BLOCK = 2**19
# Bytes at the beginning of a file that are read to find its format.
START = 4096


@dataclass(frozen=True, eq=False)
class ImageList:
    """Paths of images with their labels; unpacks as ``paths, labels``.

    Attributes:
        paths: Paths as listed, (N,).
        labels: Labels from 0, (N,) int64.
        names: Class names, (C,), if the list has them.
        num_classes: Number of classes C, if the list states it.
        splits: ``"train"``, ``"val"`` or ``"test"``, (N,), if the list has a split column.
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

    def select(self, rows: NDArray[Any]) -> "ImageList":
        """Returns the list of the images at some positions."""
        splits = None if self.splits is None else self.splits[rows]
        return replace(self, paths=self.paths.take(rows), labels=self.labels[rows], splits=splits)

    def by_split(self) -> "dict[Split, ImageList]":
        """Returns the images of each split; empty without a split column."""
        present = set() if self.splits is None else {*self.splits.tolist()}
        return {
            split: replace(self.select(np.flatnonzero(self.splits == split)), splits=None)
            for split in dict.fromkeys(SPLIT_WORDS.values())
            if split in present
        }


def read_image_list(path: str | Path) -> ImageList:
    r"""Reads a list of image files with their labels.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "list.txt"
    >>> _ = file.write_text("my photos/1.jpg 0\nmy photos/2.jpg 1\n")
    >>> paths, labels = read_image_list(file)
    >>> paths[1], labels
    ('my photos/2.jpg', array([0, 1]))

    The formats, in UTF-8 with the line ends of any system:

    - Text: a path, which may contain blanks, then blanks or tabs and an integer label on each line.
    - CSV (``.csv``; ``.tsv`` with tabs), or text whose first line names the columns: ``path``,
      ``image``, ``filename``, ``file_name`` or ``filepath``; ``label``, ``target``, ``class`` or
      ``category``; optionally ``split``. Two columns of image files or integer labels need no
      header. Labels that are words become the sorted class names.
    - JSON in BBN's format: ``annotations`` with a path (``fpath``, ``im_path``, ...) and a
      ``category_id``, and optionally ``num_classes``.
    - JSON in the format of COCO, COCO Camera Traps and iNaturalist: ``images`` (``id``,
      ``file_name``), ``annotations`` (``image_id``, ``category_id``), ``categories`` (``id``,
      ``name``), which become labels 0 to C - 1 in the order of their ids. Images without an
      annotation are dropped and counted in the log.

    A split, also beside a path in JSON, is a usual name such as ``train``, ``val`` or ``test``.

    Raises:
        UsageError: If the file is missing, empty or in none of these formats, or a label is missing
            or is not a non-negative integer; the message names the file and the line.
    """
    path = Path(path)
    invalid = (OSError, ValueError, OverflowError, RecursionError, csv.Error)
    with user_errors(f"list {path} cannot be read", *invalid):
        found = _read(path)
    if len(found.paths) == 0:
        raise UsageError(f"list {path} is empty: it has no image with a label")
    return found


def _read(path: Path) -> ImageList:
    with path.open("rb") as file:
        start = file.read(START).removeprefix(BOM).lstrip()
    kind = path.suffix.lower()
    if kind == ".json":
        return _read_json(path)
    if start[:1] in (b"{", b"[") and kind not in (".csv", ".tsv"):
        # A path may begin like JSON.
        with suppress(json.JSONDecodeError):
            return _read_json(path)
    line = re.split(rb"[\r\n]", start, maxsplit=1)[0]
    delimiter = "\t" if kind == ".tsv" else ","
    fields = next(csv.reader([line.decode(errors="replace").strip()], delimiter=delimiter), [])
    if kind in (".csv", ".tsv") or {"path", "label"} <= _used_columns(fields).keys():
        return _read_table(path, delimiter) if fields else _read_lines(path)
    return _read_text(path)


def read_utf8(path: Path) -> str:
    """Returns the text of a file without byte order mark; names the line of a wrong byte."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; save the "
            "file as UTF-8"
        ) from None


def _read_text(path: Path) -> ImageList:
    """Reads lines of a path, a blank and a label."""
    content = np.fromfile(path, np.uint8)
    if content[-1:].tobytes() != b"\n":
        content = np.append(content, np.uint8(NEWLINE))
    start = len(BOM) if content[: len(BOM)].tobytes() == BOM else 0
    chunks, labels = [], []
    while start < len(content):
        block = content[start : start + BLOCK]
        parsed = _parse_lines(block)
        if parsed is None:
            return _read_lines(path)
        offsets, values = parsed
        # Strings: a path, the rest of its line, the next path, ...
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(block)]
        strings = pa.Array.from_buffers(pa.string(), len(offsets) - 1, buffers)
        chunks.append(strings.take(pa.array(np.arange(0, len(strings), 2))))
        labels.append(values)
        start += int(offsets[-1])
    paths = pa.chunked_array(chunks)
    if content.max() > 127:
        try:
            paths.validate(full=True)
        except pa.ArrowInvalid:
            return _read_lines(path)
    return ImageList(Paths(paths), np.concatenate(labels))


def _parse_lines(block: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int64]] | None:
    """Returns the starts and ends of the paths in a block of lines, and the labels.

    None if a line is not a path, one blank and a label.
    """
    newlines = np.flatnonzero(block == NEWLINE)
    # The shortest line is a path, a blank and a label of one byte each.
    if len(newlines) == 0 or newlines[0] < 3:
        return None
    returns = block[newlines - 1] == RETURN
    last = newlines - 1 - returns
    ends, labels = last, np.zeros(len(newlines), np.int64)
    for exponent in range(MAX_DIGITS + 1):
        digits = block[ends] - np.uint8(ZERO)  # wraps around: other bytes give 10 or more
        is_digit = digits < 10
        if not is_digit.any():
            break
        labels += digits * is_digit * np.int64(10**exponent)
        ends = ends - is_digit
    blank, before = block[ends], block[ends - 1]
    is_usual = (ends < last) & ((blank == SPACE) | (blank == TAB)) & (before > SPACE)
    is_usual[1:] &= ends[1:] > newlines[:-1] + 1
    # A carriage return inside a line ends one, too.
    inside = np.count_nonzero(block[: newlines[-1]] == RETURN) - np.count_nonzero(returns)
    if inside or is_digit.any() or not is_usual.all():
        return None
    offsets = np.zeros(2 * len(ends) + 1, np.int32)
    offsets[1::2], offsets[2::2] = ends, newlines + 1
    return offsets, labels


def _read_lines(path: Path) -> ImageList:
    """Reads a text list line by line."""
    paths, labels = [], []
    for number, line in enumerate(io.StringIO(read_utf8(path), newline=None), 1):
        fields = line.rsplit(None, 1)
        if not fields:
            continue
        if len(fields) < 2 or not re.match(INTEGER, fields[1]):
            hint = "; a list separated by commas is named .csv" if "," in line else ""
            raise UsageError(
                f"{path}, line {number}: expected a path, a blank and a label that is a "
                f"non-negative integer, found {one_line(repr(line.strip()))}{hint}"
            )
        paths.append(fields[0])
        labels.append(int(fields[1]))
    return ImageList(Paths(paths), np.array(labels, np.int64))


def _used_columns(fields: Sequence[str]) -> dict[str, int]:
    """Returns the positions of path, label and split in a header."""
    names = [field.strip().lower() for field in fields]
    return {
        use: next(names.index(word) for word in words if word in names)
        for use, words in TABLE_COLUMNS.items()
        if not set(words).isdisjoint(names)
    }


def _read_table(path: Path, delimiter: str) -> ImageList:
    """Reads a table, with or without a header."""
    rows = csv.reader(io.StringIO(read_utf8(path), newline=None), delimiter=delimiter)
    lines = [(rows.line_num, row) for row in rows if row]
    fields = lines[0][1]
    used = _used_columns(fields)
    if {"path", "label"} <= used.keys():
        lines = lines[1:]
        note_unused(path, [name for n, name in enumerate(fields) if n not in used.values()])
    elif len(fields) == 2 and (fields[1].isdecimal() or suffix(fields[0]) in IMAGE_SUFFIXES):
        used = {"path": 0, "label": 1}
    else:
        raise UsageError(
            f"{path} has no header that names a column of paths and one of labels: its first line "
            f"is {', '.join(map(repr, fields))}; expected one of "
            f"{', '.join(TABLE_COLUMNS['path'])} and one of {', '.join(TABLE_COLUMNS['label'])}"
        )
    width = len(fields)
    texts = [row[used["label"]].strip() if len(row) == width else "" for _, row in lines]
    are_integers = any(re.match(NUMBER, text) for text in texts)
    for (line, row), text in zip(lines, texts, strict=True):
        if not text or not row[used["path"]] or (are_integers and not re.match(INTEGER, text)):
            kind = "a non-negative integer" if are_integers else "a class name"
            raise UsageError(
                f"{path}, line {line}: expected {width} fields with a path and {kind} as the "
                f"label, found {one_line(repr(delimiter.join(row)))}; a field with a "
                f"{delimiter!r} in it needs quotes, and labels are all integers or all names"
            )
    names, labels = np.unique(texts, return_inverse=True)
    if are_integers:
        labels = names.astype(np.int64)[labels]
    splits = None
    if "split" in used:
        splits = _as_splits(path, [row[used["split"]] for _, row in lines])
    paths = Paths(row[used["path"]] for _, row in lines)
    return ImageList(paths, labels, None if are_integers else names.tolist(), splits=splits)


def _as_splits(path: Path, values: Sequence[str]) -> NDArray[np.str_]:
    """Returns the splits that a column names, as ``"train"``, ``"val"`` or ``"test"``."""
    words = [value.strip().lower() for value in values]
    unknown = [repr(word) for word in dict.fromkeys(words) if word not in SPLIT_WORDS]
    if unknown:
        raise UsageError(
            f"{path}: the column split has values that are not the name of a split: "
            f"{shown_names(unknown)}; expected {', '.join(SPLIT_WORDS)}"
        )
    return np.array([SPLIT_WORDS[word] for word in words])


def note_unused(owner: str | Path, names: Sequence[str]) -> None:
    """Logs which columns of a list or table are not used."""
    if names:
        shown = shown_names([name or "''" for name in names], 8)
        log.warning("%s: columns that are not used: %s", owner, shown)


def _read_json(path: Path) -> ImageList:
    content = json.loads(read_utf8(path))
    if isinstance(content, list):
        content = {"annotations": content}
    if not isinstance(content, dict) or "annotations" not in content:
        keys = f"the keys {', '.join(content)}" if isinstance(content, dict) else repr(content)
        raise UsageError(
            f"{path} has no 'annotations', which give the labels (the test set of a competition "
            f"has none); found {one_line(keys)}"
        )
    found = _of_images(path, content) if "images" in content else _of_paths(path, content)
    limit = 2**63 if found.num_classes is None else found.num_classes
    bad = np.flatnonzero((found.labels < 0) | (found.labels > limit - 1))
    if len(bad):
        label, name = found.labels[bad[0]], found.paths[int(bad[0])]
        raise UsageError(f"{path}: image {name} has label {label}; expected 0 to {limit - 1:,}")
    return found


def _of_paths(path: Path, content: Mapping[str, Any]) -> ImageList:
    """Reads annotations that have paths and labels, as BBN's."""
    where, number = "annotations", content.get("num_classes")
    paths = Paths(_column(path, content, where, PATH_KEYS, str))
    labels = np.array(_column(path, content, where, LABEL_KEYS, int), np.int64)
    splits = _other_columns(path, content[where], *PATH_KEYS, *LABEL_KEYS)
    return ImageList(paths, labels, None, number if isinstance(number, int) else None, splits)


def _of_images(path: Path, content: Mapping[str, Any]) -> ImageList:
    """Joins annotations with the images and categories that they refer to, as COCO's."""
    where = "annotations"
    paths = Paths(_column(path, content, "images", ("file_name",), str))
    image_ids = _column(path, content, "images", ("id",), int, str)
    annotated = _column(path, content, where, ("image_id",), int, str)
    rows = _positions(path, "image", annotated, image_ids)
    names: list[str] | None = None
    if "categories" in content:
        ids = _column(path, content, "categories", ("id",), int, str)
        titles = _column(path, content, "categories", ("name",), str)
        order = sorted(range(len(ids)), key=lambda row: (isinstance(ids[row], str), ids[row]))
        wanted = _column(path, content, where, ("category_id",), int, str)
        found = _positions(path, "category", wanted, [ids[row] for row in order])
        names = [titles[row] for row in order]
    else:
        found = np.array(_column(path, content, where, ("category_id",), int), np.int64)
    labels = np.full(len(paths), -1, np.int64)
    labels[rows] = found
    # The last annotation of an image stays; another one differs from it or not.
    if len(several := np.unique(rows[labels[rows] != found])):
        raise UsageError(
            f"{path}: {len(several)} images have annotations of different categories: "
            f"{shown_names(paths.take(several[:6]))}; keep one category for each"
        )
    splits = _other_columns(path, content["images"], "id", "file_name")
    bare = np.setdiff1d(np.arange(len(paths)), rows)
    if len(bare):
        log.warning(
            "%s: %d of %d images have no annotation and are left out: %s",
            *(path, len(bare), len(paths), shown_names(paths.take(bare[:6]))),
        )
    listed = ImageList(paths, labels, names, len(names) if names else None, splits)
    return listed.select(np.unique(rows))


def _column(
    path: Path, content: Mapping[str, Any], where: str, keys: Sequence[str], *kinds: type
) -> list[Any]:
    """Returns the value of one of several keys of every entry of a list of objects."""
    entries = content[where] if isinstance(content[where], list) else [content[where]]
    values = []
    for row, entry in enumerate(entries):
        value = None
        if isinstance(entry, dict):
            value = next((entry[key] for key in keys if key in entry), None)
        if type(value) not in kinds:
            wanted = " or ".join("an integer" if kind is int else "a text" for kind in kinds)
            raise UsageError(
                f"{path}: {where}[{row}] must have {' or '.join(keys)}, {wanted}; found "
                f"{one_line(repr(entry))}"
            )
        values.append(value)
    return values


def _other_columns(
    path: Path, entries: Sequence[Mapping[str, Any]], *used: str
) -> NDArray[np.str_] | None:
    """Returns the splits of entries if any has one, and logs the keys that are not used."""
    others = {key for entry in entries for key in entry} - {*used}
    note_unused(path, sorted(others - {"split"}))
    if "split" not in others:
        return None
    return _as_splits(path, [str(entry.get("split", "")) for entry in entries])


def _positions(
    path: Path, noun: str, wanted: Sequence[Hashable], ids: Sequence[Hashable]
) -> NDArray[np.int64]:
    """Returns the position of each wanted id among unique ids."""
    counts, positions = Counter(ids), {one: position for position, one in enumerate(ids)}
    wrong = [repr(one) for one in dict.fromkeys([*wanted, *ids]) if counts[one] != 1]
    if wrong:
        raise UsageError(f"{path}: not exactly one {noun} has the id {shown_names(wrong)}")
    return np.array([positions[one] for one in wanted], np.int64)
