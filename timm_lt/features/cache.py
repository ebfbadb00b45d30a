"""A feature cache: one safetensors file per key, made row by row and opened as a mapped file.

While ``KEY.safetensors`` is made, its rows are in ``KEY.partial`` behind room for the header, their
targets in ``KEY.targets``, and ``KEY.journal`` says how many batches of them are whole. The process
that makes it holds ``KEY.lock``, which stays.
"""

import json
import os
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from timm_lt.features.mapped import NAMES, content, map_file
from timm_lt.features.order import check_shown
from timm_lt.features.values import Features, check_views
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import log
from timm_lt.utils.files import flush_folder, read_json, write_atomic

# Layout of all files: another number, and they are made anew.
LAYOUT = 2
# A safetensors header is padded with spaces: its room is there before its content is known.
HEADER = 16384
NO_IMAGES = (
    "the loader has no images that can be read: no features to extract (all labels are -1, which "
    "marks an image that cannot be read)"
)
# Longest word of a description in the header.
WORD = 1000
# What a kill may cost beside the batch that it cut off.
SYNC_SECONDS = 1.0


@dataclass
class Journal:
    """How far a file is.

    Attributes:
        settings: What it is made with; another partial file is not gone on with.
        view: View that is being taken.
        batches: Whole batches of that view.
        rows: Rows of all whole batches, over all views.
        shown: Images of all whole batches, with those that could not be read.
        width: Columns D; 0 as long as there is no row.
    """

    settings: dict[str, Any]
    view: int = 0
    batches: int = 0
    rows: int = 0
    shown: int = 0
    width: int = 0


class FeatureFile:
    """The file of one key, finished or not.

    Args:
        folder: The cache.
        key: A digest, which names the file.
        description: What the key was made of, for people: goes into the header.
    """

    def __init__(self, folder: Path, key: str, description: Mapping[str, str]) -> None:
        self.folder, self.key = folder, key
        self.description = {name: word[:WORD] for name, word in description.items()}
        self.path = folder / f"{key}.safetensors"

    def open(self) -> Features | None:
        """Opens the finished file, without reading its values; None if there is none.

        A file that is damaged counts as none: a warning says so, and it is made anew.
        """
        try:
            tensors, metadata = map_file(self.path)
            if metadata.get("key") != self.key or not {"values", "targets"} <= tensors.keys():
                raise ValueError("it is not the file of its name")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            log.warning("%s is damaged (%s): features are extracted anew", self.path, error)
            return None
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read: {error.strerror}") from error
        views = int(metadata["views"])
        return Features.from_checked(tensors["values"], tensors["targets"], views)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lets one process at a time make the file; the others wait for it.

        Raises:
            UsageError: If the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f"{self.key}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info("waiting for the process that extracts the same features")
                lock.acquire()
        except OSError as error:
            raise UsageError(f"cache_dir {self.folder} cannot be written: {error}") from error
        try:
            yield
        finally:
            # Its file stays: whoever waits for it has it open.
            lock.release()


class Writer:
    """Makes the file of a key row by row; goes on with what a killed process left.

    Args:
        file: The file, locked.
        dtype: Of the values.
        settings: What decides how rows are shared out among batches.

    Attributes:
        journal: Of what is whole.

    Raises:
        UsageError: If it cannot be written.
    """

    def __init__(self, file: FeatureFile, dtype: torch.dtype, settings: Mapping[str, Any]) -> None:
        self.file, self.dtype = file, dtype
        self._names = [file.folder / f"{file.key}.{end}" for end in ("partial", "targets")]
        self._journal_path = file.folder / f"{file.key}.journal"
        self.journal = Journal({**settings, "layout": LAYOUT, "dtype": NAMES[dtype]})
        with self._writing():
            self._values, self._targets = self._resume() or self._start()
        self._synced = time.monotonic()

    def append(self, values: Tensor, targets: Tensor, view: int, shown: int) -> None:
        """Adds the rows of the next batch, (B, D) and (B,); there may be none.

        Args:
            values: Of the images that could be read.
            targets: Theirs.
            view: View of the batch.
            shown: Images of the batch, with those that could not be read.

        Raises:
            UsageError: If they cannot be written, or have another width than those before.
        """
        journal = self.journal
        width = values.shape[1]
        if journal.width not in (0, width):
            raise UsageError(f"features have width {width} after rows of width {journal.width}")
        with self._writing():
            self._values.write(content(values))
            self._targets.write(content(targets.long()))
            journal.batches = journal.batches + 1 if view == journal.view else 1
            journal.view, journal.width = view, width
            journal.rows += len(values)
            journal.shown += shown
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                self._sync()

    def finish(self, expected: int | None = None) -> None:
        """Gives the file its header and its name.

        Args:
            expected: Images over all views, if known.

        Raises:
            UsageError: If it cannot be written, there are no rows, the number of images is another,
                or the views are not of the same images. But for the first, it is to be started
                anew.
        """
        with self._writing():
            self._sync()
            targets = self._checked_targets(expected)
            # Integers lie at a multiple of their size.
            padding = -self._row_bytes() % 8
            self._values.write(bytes(padding) + targets.tobytes())
            self._values.seek(0)
            self._values.write(self._header(padding))
            self._values.flush()
            os.fsync(self._values.fileno())
            self.close()
            self._names[0].replace(self.file.path)
            flush_folder(self.file.folder)
            self._discard()

    def _checked_targets(self, expected: int | None) -> NDArray[np.int64]:
        """Returns the targets of all rows; if the rows are not as they should be, removes them."""
        try:
            if self.journal.rows == 0:
                raise UsageError(NO_IMAGES)
            check_shown(self.journal.shown, expected)
            targets = np.fromfile(self._names[1], np.int64, self.journal.rows)
            check_views(torch.from_numpy(targets), self.journal.settings["views"])
        except UsageError:
            # Else the next call would go on behind them, to the same error.
            self.close()
            self._discard()
            raise
        return targets

    def _discard(self) -> None:
        for leftover in (self._journal_path, *self._names):
            leftover.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the files, which are gone on with later."""
        for file in (self._values, self._targets):
            # What is still to be written may have no room.
            with suppress(OSError):
                file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(
                f"{self._names[0]} cannot be written: {error.strerror or error}; what is whole is "
                "kept: make room and call it again, or choose another cache_dir"
            ) from error

    def _row_bytes(self) -> int:
        return self.journal.rows * self.journal.width * self.dtype.itemsize

    def _sync(self) -> None:
        """Makes the rows so far last, and then notes that they do."""
        for file in (self._values, self._targets):
            file.flush()
            os.fsync(file.fileno())
        write_atomic(self._journal_path, json.dumps(asdict(self.journal)))
        self._synced = time.monotonic()

    def _resume(self) -> list[BinaryIO] | None:
        """Opens what another process left, if there is something that fits."""
        try:
            found = Journal(**read_json(self._journal_path))
        except (UsageError, TypeError):
            return None
        if found.settings != self.journal.settings:
            return None
        lengths = [HEADER + found.rows * found.width * self.dtype.itemsize, 8 * found.rows]
        for name, length in zip(self._names, lengths, strict=True):
            if not name.is_file() or name.stat().st_size < length:
                return None
        self.journal = found
        log.info("going on with %s behind %d rows", self._names[0], found.rows)
        files: list[BinaryIO] = []
        for name, length in zip(self._names, lengths, strict=True):
            files.append(name.open("r+b"))
            files[-1].truncate(length)
            files[-1].seek(length)
        return files

    def _start(self) -> list[BinaryIO]:
        self._journal_path.unlink(missing_ok=True)
        files: list[BinaryIO] = [name.open("wb") for name in self._names]
        files[0].write(bytes(HEADER))
        return files

    def _header(self, padding: int) -> bytes:
        rows, end = self.journal.rows, self._row_bytes()
        shapes: list[tuple[str, str, list[int], int]] = [
            ("values", NAMES[self.dtype], [rows, self.journal.width], end),
            ("padding", "U8", [padding], padding),
            ("targets", "I64", [rows], 8 * rows),
        ]
        header: dict[str, Any] = {"__metadata__": {**self.file.description, "key": self.file.key}}
        first = 0
        for name, dtype, shape, length in shapes:
            if length:
                offsets = [first, first + length]
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            first += length
        text = json.dumps(header).encode()
        return struct.pack("<Q", HEADER - 8) + text.ljust(HEADER - 8)
