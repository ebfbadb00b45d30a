"""Feature cache on disk, which grows batch by batch, and its key.

``KEY.values.npy`` and ``KEY.targets.npy`` have the rows, ``KEY.json`` counts the whole batches in
them, and ``KEY.lock`` is held by the process that makes them.
"""

import itertools
import json
import math
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, default_collate

from timm_lt.data.items import (
    dataset_fingerprint,
    described,
    digest,
    plain_options,
    tensor_fingerprint,
)
from timm_lt.data.loader import InOrder
from timm_lt.utils.checks import UsageError, user_errors
from timm_lt.utils.console import log
from timm_lt.utils.files import flush_folder, read_json, write_atomic

# Version of the file layout; it is a part of the key.
LAYOUT = 4
# Bytes of the header of a ``.npy`` file. NumPy pads it, so that any number of rows fits in.
HEADER = 128
# Seconds of work that a kill may cost, beside the batch that it cut off.
SYNC_SECONDS = 1.0
# NumPy has no bfloat16: its bits are kept as integers.
DTYPES = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<u2"}
# Advice for a folder that cannot be written.
CURE = "make room and run it again, to continue, or choose another cache_dir"
# Functions that make a batch of the samples as they are.
COLLATING = (default_collate, fast_collate, tuple)


@dataclass
class Progress:
    """Counter of the rows on the disk, with the parts of the key for people."""

    # Settings that divide the images into batches; only the same can continue.
    settings: dict[str, Any]
    description: dict[str, str]
    # View that is being extracted, and its whole batches.
    view: int = 0
    batches: int = 0
    # Rows of all whole batches over all views, and their images, readable or not.
    rows: int = 0
    images: int = 0
    # Columns D; 0 before the first batch.
    width: int = 0
    complete: bool = False


class FeatureCache:
    """Files of one key in a folder; if they cannot be written, methods fail with a UsageError.

    The key is a digest of the ``description``, of type and number of views. The ``settings`` divide
    the images into batches, on which rounding depends.
    """

    def __init__(
        self,
        folder: Path,
        description: Mapping[str, str],
        settings: Mapping[str, Any],
        dtype: torch.dtype,
        views: int,
    ) -> None:
        self.folder, self.dtype, self.views = folder, dtype, views
        self.progress = Progress(dict(settings), dict(description))
        key = digest(LAYOUT, self.progress.description, str(dtype), views)
        self._values, self._targets, self._counter, self._lock = (
            folder / f"{key}.{end}" for end in ("values.npy", "targets.npy", "json", "lock")
        )
        self._files: list[BinaryIO] = []
        self._synced = time.monotonic()
        fault = f"cache_dir {folder} cannot be written"
        self._writing = partial(user_errors, fault, cure=CURE)

    def read(self) -> tuple[Tensor, Tensor] | None:
        """Maps finished values (N, D) and targets (N,) without reading them; None without any.

        Writing to the values does not change the file. Damaged files count as none, with a warning.
        """
        try:
            if not Progress(**read_json(self._counter)).complete:
                return None
            return _mapped(self._values, self.dtype), _mapped(self._targets, torch.int64)
        except (UsageError, ValueError, TypeError, OSError) as error:
            if self._counter.exists():
                log.warning(
                    "%s is damaged (%s): features are extracted again", self._counter, error
                )
            return None

    @contextmanager
    def growing(self) -> Iterator[Progress | None]:
        """Locks the files and opens them after the last whole batch.

        Yields None if another process has finished them meanwhile.
        """
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            # The file of the lock stays: whoever waits for it has it open.
            lock = FileLock(self._lock)
            try:
                held = lock.acquire(timeout=0)
            except Timeout:
                log.info("waiting for the process that extracts the same features")
                held = lock.acquire()
        with held:
            if self.read() is not None:
                yield None
                return
            with self._writing():
                if not self._continues():
                    self._discard()
                self._files = [path.open("ab") for path in (self._values, self._targets)]
                for file, size in zip(self._files, self._sizes(), strict=True):
                    file.truncate(size)
            try:
                yield self.progress
            finally:
                for file in self._files:
                    # The last rows may not have been written for lack of room.
                    with suppress(OSError):
                        file.close()

    def append(self, values: Tensor, targets: Tensor, view: int, images: int) -> None:
        """Adds the readable rows (B, D) and (B,) of the next batch of a view, of ``images``."""
        progress = self.progress
        with self._writing():
            for file, rows in zip(self._files, (values, targets.long()), strict=True):
                file.write(rows.contiguous().flatten().view(torch.uint8).numpy().data)
            progress.batches = progress.batches + 1 if view == progress.view else 1
            progress.view, progress.width = view, values.shape[1]
            progress.rows += len(values)
            progress.images += images
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                self._sync()

    def finish(self, check: Callable[[Tensor, int, int], None]) -> None:
        """Marks the files as finished, or removes them if ``check(targets, views, images)`` fails.

        Otherwise the next call would continue after these rows, to the same error.
        """
        progress = self.progress
        with self._writing():
            self._sync()
            targets = torch.from_numpy(np.fromfile(self._targets, np.int64, offset=HEADER))
            try:
                check(targets, self.views, progress.images)
            except UsageError:
                self._discard()
                raise
            for path, kind, shape in (
                (self._values, DTYPES[self.dtype], (progress.rows, progress.width)),
                (self._targets, "<i8", (progress.rows,)),
            ):
                with path.open("r+b") as file:
                    header = {"descr": kind, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
            progress.complete = True
            self._sync()
            flush_folder(self.folder)

    def _sizes(self) -> tuple[int, int]:
        """Returns the bytes of both files up to the last counted row."""
        rows, row_size = self.progress.rows, self.progress.width * self.dtype.itemsize
        return HEADER + rows * row_size, HEADER + rows * 8

    def _continues(self) -> bool:
        """Takes up an unfinished extraction in the same batches, if its files are whole."""
        new = self.progress
        with suppress(UsageError, TypeError, OSError):
            self.progress = Progress(**read_json(self._counter))
            found = [path.stat().st_size for path in (self._values, self._targets)]
            whole = all(size >= end for size, end in zip(found, self._sizes(), strict=True))
            if whole and self.progress.settings == new.settings and not self.progress.complete:
                log.info("continuing %s after %d rows", self._values, self.progress.rows)
                return True
        self.progress = new
        return False

    def _discard(self) -> None:
        for path in (self._counter, self._targets, self._values):
            path.unlink(missing_ok=True)

    def _sync(self) -> None:
        """Puts the rows on the disk, and only then counts them."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        write_atomic(self._counter, json.dumps(asdict(self.progress), indent=2))
        self._synced = time.monotonic()


def _mapped(path: Path, dtype: torch.dtype) -> Tensor:
    """Maps a ``.npy`` file of a cache, which may be larger than memory."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
        first, count = file.tell(), math.prod(shape)
        # A private mapping can be written to, but Linux refuses one that is larger than memory
        # unless told not to reserve any. Python has the name of the flag since 3.13.
        if sys.platform == "linux":
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
            content = mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=first).view(shape)


def backbone_fingerprint(model: nn.Module, classifier: str) -> str:
    """Returns a digest of a model without its classifier: weights, buffers and kinds of modules."""

    def outside(name: str) -> bool:
        return name != classifier and not name.startswith(f"{classifier}.")

    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    state = {name: tensor_fingerprint(tensor) for name, tensor in tensors if outside(name)}
    # Strides, the kind of pooling and the like are in no tensor.
    parts = {
        name: [str(type(part)), part.extra_repr(), plain_options(part)]
        for name, part in model.named_modules()
        if outside(name)
    }
    return digest(state, parts)


def samples_fingerprint(
    layers: Sequence[Any], batches: BatchSampler | None, images: int | None, key: str | None = None
) -> str:
    """Returns a digest of the samples of a loader in their order, with their transform.

    The loader is given by its layers, its batch sampler and its number of images. A key stands for
    samples that cannot be identified, see :func:`~timm_lt.data.items.dataset_fingerprint`.
    """
    if batches is not None and not isinstance(batches.sampler, SequentialSampler | InOrder):
        raise UsageError(
            "cache_dir= needs a loader with the images in the order of the data set, not as a "
            f"{type(batches.sampler).__name__} draws them: pass an evaluation loader, without "
            "shuffle= and sampler="
        )
    if key is not None:
        return f"key {key}"
    is_known = not isinstance(layers[-1], DataLoader) or (
        batches is not None and layers[-1].collate_fn in COLLATING
    )
    data = getattr(layers[0], "dataset", None)
    if data is None or not is_known:
        raise UsageError(
            f"the samples of a {type(layers[0]).__name__} without a data set, or with batches or a "
            "collate_fn of its own, cannot be identified; pass key= with a word that stands for "
            "the samples, their order and their transform"
        )
    normalization = [
        [part.mean.tolist(), part.std.tolist(), str(part.img_dtype), described(part.random_erasing)]
        for part in layers
        if isinstance(part, PrefetchLoader)
    ]
    return digest(dataset_fingerprint(data), images, normalization)
