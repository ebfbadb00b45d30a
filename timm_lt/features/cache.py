"""A feature cache: one safetensors file per key, made row by row and opened as a mapped file.

While ``KEY.safetensors`` is made, its rows are in ``KEY.partial`` behind room for the header, their
targets in ``KEY.targets``, and ``KEY.journal`` says how many batches of them are whole. The process
that makes it holds ``KEY.lock``, which stays.

Tensors in a safetensors file that is mapped into memory, however large.

The key of a feature cache: a digest of all that decides the bits of the features, but rounding.

Not part of it: how many images a batch has, how many processes and workers there are, and where the
cache lies.
"""

import itertools
import json
import math
import mmap
import os
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Sampler,
    SequentialSampler,
    default_collate,
)

from timm_lt.data.fingerprint import (
    dataset_fingerprint,
    described,
    digest,
    plain_options,
    qualified_name,
    tensor_fingerprint,
)
from timm_lt.data.images import as_it_is, collate
from timm_lt.data.loader import InOrder, Loader
from timm_lt.features.values import Features, check_views
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import log
from timm_lt.utils.files import flush_folder, read_json, write_atomic

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def content(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor, without a copy of them if it is contiguous."""
    array: NDArray[np.uint8] = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return array.data


def map_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a safetensors file, mapped, and its metadata.

    The file may be larger than the memory. ``safetensors.safe_open`` reserves as much as it maps,
    which Linux then refuses. What is written to the tensors does not reach the file.

    Raises:
        ValueError: If it is no such file, or has another length than its header says.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        room = int.from_bytes(file.read(8), "little")
        length = os.fstat(file.fileno()).st_size
        if not 0 < room <= length - 8:
            raise ValueError("its header is cut off")
        header = json.loads(file.read(room))
        metadata = header.pop("__metadata__", {})
        ends = [entry["data_offsets"][1] for entry in header.values()]
        if length != 8 + room + max(ends, default=0):
            raise ValueError(f"{length:,} bytes, but its header says {8 + room + max(ends):,}")
        mapped = _mapped(file)
    tensors = {}
    for name, entry in header.items():
        if name != "padding":
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            offset, count = 8 + room + entry["data_offsets"][0], math.prod(shape)
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset)
            tensors[name] = flat.view(shape)
    return tensors, metadata


def _mapped(file: BinaryIO) -> mmap.mmap:
    if sys.platform == "linux":
        # Python has its name since 3.13.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


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


# Functions that make a batch of the samples as they are.
COLLATING = (default_collate, fast_collate, collate, as_it_is)


def backbone_fingerprint(model: nn.Module, classifier: str) -> str:
    """Returns a digest of a model without its classifier: weights, buffers, and what its parts are.

    Args:
        model: The model.
        classifier: Path of the classifier; it may be any, fitted or not.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    state = {
        name: tensor_fingerprint(tensor)
        for name, tensor in tensors
        if not _within(name, classifier)
    }
    # Strides, the kind of pooling and the like are in no tensor.
    parts = {
        name: [qualified_name(type(part)), part.extra_repr(), plain_options(part)]
        for name, part in model.named_modules()
        if not _within(name, classifier)
    }
    return digest(state, parts)


def _within(name: str, classifier: str) -> bool:
    return name == classifier or name.startswith(f"{classifier}.")


def samples_fingerprint(loader: object) -> str:
    """Returns a digest of what a loader shows: the samples in their order, and their transform.

    Raises:
        UsageError: If it is not known, see
            :func:`~timm_lt.data.fingerprint.dataset_fingerprint`, or the loader has a
            ``collate_fn`` of its own.
    """
    data = getattr(loader, "dataset", None)
    if data is None:
        raise UsageError(
            f"what a {type(loader).__name__} shows is not known: pass key= with a word that stands "
            "for its samples and their transform"
        )
    inner = layers_of(loader)[-1]
    if isinstance(inner, DataLoader) and inner.collate_fn not in COLLATING:
        raise UsageError(
            f"what collate_fn={inner.collate_fn!r} does to the images is not known: leave it out, "
            "or pass key= with a word that stands for the samples and what is done to them"
        )
    return digest(dataset_fingerprint(data), num_images(loader), _normalization(loader))


def _normalization(loader: object) -> list[Any]:
    """Returns what timm's prefetcher does to the images beside their transform."""
    found = [part for part in layers_of(loader) if isinstance(part, PrefetchLoader)]
    if not found:
        return []
    inner = found[0]
    erasing = {} if inner.random_erasing is None else vars(inner.random_erasing)
    shown = {name: value for name, value in erasing.items() if name != "device"}
    return [inner.mean.tolist(), inner.std.tolist(), str(inner.img_dtype), described(shown)]


def layers_of(loader: object) -> list[Any]:
    """Returns a loader and those that it is made of; torch's, if there is one, is the last."""
    layers: list[Any] = [loader]
    while True:
        outer = layers[-1]
        known = isinstance(outer, Loader | PrefetchLoader)
        inner = outer.loader if known else getattr(outer, "base_dataloader", None)
        if inner is None:
            return layers
        layers.append(inner)


def is_prepared(loader: object) -> bool:
    """Tells whether accelerate gives each process its share of the batches."""
    return any(
        isinstance(part, DataLoaderShard | DataLoaderDispatcher) for part in layers_of(loader)
    )


def batch_sampler_of(loader: object) -> tuple[BatchSampler | None, int]:
    """Returns what makes the batches of a loader, and how many of them all processes show at once.

    None if it is not known, as for a list of batches.
    """
    inner: Any = loader.loader if isinstance(loader, PrefetchLoader) else loader
    known = isinstance(inner, Loader | DataLoader) or hasattr(inner, "base_dataloader")
    if not known or isinstance(inner, DataLoaderDispatcher):
        return None, 1
    batches, at_once = inner.batch_sampler, 1
    while isinstance(batches, BatchSamplerShard):
        at_once *= 1 if batches.split_batches else batches.num_processes
        batches = batches.batch_sampler
    # Not a subclass: a schedule of sizes has batches of its own.
    return (batches, at_once) if type(batches) is BatchSampler else (None, 1)


def num_images(loader: object) -> int | None:
    """Returns how many images a loader shows, over all processes; None if it is not known."""
    batches, at_once = batch_sampler_of(loader)
    if batches is None or not isinstance(batches.sampler, Sized):
        return None
    number = len(batches.sampler)
    return number - number % (batches.batch_size * at_once) if batches.drop_last else number


def images_at_once(loader: object) -> int | None:
    """Returns the images of a batch, over all processes; None if it is not known."""
    batches, at_once = batch_sampler_of(loader)
    return None if batches is None else batches.batch_size * at_once


def check_shown(shown: int, expected: int | None) -> None:
    """Checks that every image was shown once in each view, if it is known how many there are.

    Args:
        shown: Images that were shown over all processes and views, readable or not.
        expected: How many there are.

    Raises:
        UsageError: If there were more or fewer.
    """
    if expected not in (None, shown):
        raise UsageError(
            f"the loader showed {shown} images in all and should have shown {expected}, each once "
            "in each view: with several processes, prepare it with the accelerator and pass "
            "accelerator="
        )


def check_order(loader: object, key: str | None = None) -> None:
    """Checks that a loader shows its images in the order of the data set, every time.

    Args:
        loader: The loader.
        key: Stands for the order where it is not known.

    Raises:
        UsageError: If it draws them, or a ``DataLoader`` has batches of its own and there is no
            key.
    """
    inner = layers_of(loader)[-1]
    if not isinstance(inner, DataLoader):
        return
    sampler = _order_of(inner)
    if sampler is not None and not isinstance(sampler, SequentialSampler | InOrder):
        raise UsageError(
            f"cache_dir= is for a loader that shows its images in the order of the data set, not "
            f"as a {type(sampler).__name__} draws them: pass an evaluation loader, without "
            "shuffle= and sampler="
        )
    if key is None and batch_sampler_of(loader)[0] is None:
        raise UsageError(
            f"the order in which a {type(inner).__name__} shows its images is not known, as its "
            "batches are made by a part of its own: pass key= with a word that stands for the "
            "samples in their order and their transform"
        )


def _order_of(loader: DataLoader[Any]) -> object:
    """Returns the order of a loader's images, whatever makes batches of it; None if not known."""
    batches = loader.batch_sampler
    order: Any = loader if batches is None else batches
    while True:
        names = ("sampler", "batch_sampler")
        inner = next((getattr(order, name) for name in names if hasattr(order, name)), None)
        if inner is None:
            return None if order is batches else order
        order = inner


@contextmanager
def without_first(loader: Iterable[Any], batches: int) -> Iterator[Iterable[Any]]:
    """Yields a loader that leaves out its first batches.

    Where the order is a sampler's, the images that are left out are not read.
    """
    of_all, at_once = batch_sampler_of(loader)
    if batches == 0:
        yield loader
    elif of_all is None:
        yield itertools.islice(loader, batches, None)
    else:
        order = of_all.sampler
        of_all.sampler = _Rest(order, batches * of_all.batch_size * at_once)
        try:
            yield loader
        finally:
            of_all.sampler = order


class _Rest(Sampler[int]):
    """An order without its first images."""

    def __init__(self, order: Iterable[int], first: int) -> None:
        self.order, self.first = order, first

    def __len__(self) -> int:
        return max(len(cast(Sized, self.order)) - self.first, 0)

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self.order, self.first, None)
