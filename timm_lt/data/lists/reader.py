"""One function that reads a list of images in any of the formats that are in use."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from timm_lt.data.lists.annotations import read_annotations
from timm_lt.data.lists.paths import Paths
from timm_lt.data.lists.table import header_columns, read_table
from timm_lt.data.lists.text import BOM, read_text
from timm_lt.data.sources import Split
from timm_lt.utils.checks import UsageError

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
