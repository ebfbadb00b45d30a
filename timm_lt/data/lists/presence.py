"""Which of many files are there, asked directory by directory."""

import os

import numpy as np
from numpy.typing import NDArray

from timm_lt.data.lists.paths import Paths
from timm_lt.utils.checks import UsageError


def missing_rows(paths: Paths) -> NDArray[np.int64]:
    """Returns the rows of paths where there is no file, ascending.

    Each directory is listed once: asking for file after file takes twice as long on a local disk,
    and far longer where each question is a round trip in a network.

    Raises:
        UsageError: If a directory may not be listed.
    """
    folders, names = paths.parts()
    groups = folders.arrow.dictionary_encode()
    codes = groups.indices.to_numpy()
    order = codes.argsort(kind="stable")
    of_folder = np.split(order, np.cumsum(np.bincount(codes, minlength=len(groups.dictionary))))
    missing: list[int] = []
    for folder, rows in zip(groups.dictionary.to_pylist(), of_folder, strict=False):
        entries = _entries(folder)
        for row, name in zip(rows.tolist(), names.take(rows), strict=True):
            if name not in entries or not entries[name].is_file():
                missing.append(row)
    return np.array(sorted(missing), np.int64)


def _entries(folder: str) -> dict[str, "os.DirEntry[str]"]:
    """Returns what is in a directory, by name; nothing if there is no such directory."""
    try:
        # The folder of a file in the root directory is empty.
        with os.scandir(folder or "/") as entries:
            return {entry.name: entry for entry in entries}
    except (FileNotFoundError, NotADirectoryError, ValueError):
        # A zero byte in a name is a ValueError.
        return {}
    except OSError as error:
        raise UsageError(f"{folder} cannot be listed: {error.strerror or error}") from error
