"""Lists as tables: CSV, and the same with tabs."""

import csv
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from timm_lt.data.folder.files import IMAGE_SUFFIXES, suffix
from timm_lt.data.lists.columns import SPLIT_COLUMN, note_unused, read_splits
from timm_lt.data.lists.text import check_utf8
from timm_lt.utils.checks import UsageError

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
            fault = _fault(row, columns)
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


def _fault(row: list[str], columns: Columns) -> str | None:
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
