"""Data sets by name: each is a function that returns one split as a ``datasets.Dataset``."""

import inspect
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from timm_lt.utils.checks import UsageError, check_choice, check_options
from timm_lt.utils.longtail import SelectionProtocol
from timm_lt.utils.registry import Registry

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "val", "test"]
# Names of splits, compared without case.
SPLIT_WORDS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
Source = TypeVar("Source", bound="Callable[..., Dataset | Mapping[Split, Dataset] | None]")

# Files in a column of paths: more with the longest paths would not fit 2 GiB.
FILES = 500_000

DATASETS: "Registry[Callable[..., Any]]" = Registry("data set")
# Data sets by name on whose test split a paper selected, and which paper.
SELECTED_ON_TEST: dict[str, str] = {}


def register_dataset(
    name: str, *, selected_on_test: str | None = None
) -> Callable[[Source], Source]:
    """Returns a decorator that registers a data set under a name.

    The decorated function is called as ``function(split, **options)`` and returns a
    ``datasets.Dataset`` with the columns ``image`` (a ``datasets.Image``) and ``label`` (a
    ``datasets.ClassLabel``), or None for ``"val"`` if there is no such split; its keyword-only
    parameters are the options. One that reads files has a keyword-only parameter ``root``.

    One that makes all of its splits together, because files are listed once, has no parameter
    ``split``: it is called as ``function(**options)`` and returns them by name.

    Args:
        name: The name, a lower-case identifier.
        selected_on_test: The paper that selected hyper-parameters or the epoch on the test split of
            this data set, if one did: it permits the protocol ``"paper"``, which does so too.

    Raises:
        UsageError: If the name is taken or is no lower-case identifier.
    """
    register = DATASETS.register(name)

    def add(source: Source) -> Source:
        register(source)
        if selected_on_test is not None:
            SELECTED_ON_TEST[name] = selected_on_test
        return source

    return add


def list_datasets() -> list[str]:
    """Returns the names of the data sets.

    >>> "glyph_lt" in list_datasets()
    True
    """
    return list(DATASETS)


def check_protocol(name: str, protocol: str) -> None:
    """Checks that a data set may be used under a protocol.

    Args:
        name: A name out of :func:`list_datasets`.
        protocol: ``"standard"``, or ``"paper"``, which selects on the test split.

    Raises:
        UsageError: If there is no such protocol, or no paper selected on the test split of the data
            set; the message lists where one did.
    """
    check_choice("data set", name, tuple(DATASETS))
    check_choice("protocol", protocol, get_args(SelectionProtocol))
    if protocol == "standard" or name in SELECTED_ON_TEST:
        return
    known = [f"{key} ({paper})" for key, paper in SELECTED_ON_TEST.items() if key in DATASETS]
    raise UsageError(
        "protocol paper selects hyper-parameters and the epoch on the test split, and is there "
        f"only where a paper did so, which none is known to have done for {name!r}: take protocol "
        f"standard; it is there for: {', '.join(known) or 'no data set'}"
    )


def create_dataset(
    name: str, *, split: Split = "train", root: str | Path | None = None, **options: Any
) -> "Dataset":
    """Builds one split of a data set.

    >>> dataset = create_dataset("glyph_lt", split="val")
    >>> len(dataset), dataset[0]["image"].size, dataset.features["label"].num_classes
    (2000, (32, 32), 100)

    Args:
        name: A name out of :func:`list_datasets`.
        split: ``"train"``, ``"val"`` or ``"test"``.
        root: The folder with the files, for data sets that read files; the others refuse it.
        options: The data set's own options.

    Returns:
        A ``datasets.Dataset`` with the columns ``image`` (decoded to a PIL image in RGB, as in a
        run) and
        ``label`` (an integer, with the class names in ``features["label"].names``).

    Raises:
        UsageError: If the name, the split or an option is unknown; the message lists the valid
            ones. Also if a root is given to a data set that needs none, or the data set has no
            validation split.
    """
    dataset = find_split(name, split=split, root=root, **options)
    if dataset is None:
        raise UsageError(
            f"data set {name!r} has no {split} split: hold out a part of train with "
            "timm_lt.data.hold_out, as a run does"
        )
    return dataset


def find_split(
    name: str, *, split: Split, root: str | Path | None = None, **options: Any
) -> "Dataset | None":
    """Builds one split as :func:`create_dataset` does; None if there is no such split."""
    from timm_lt.data.columns import as_rgb

    source = checked_source(name, root, options)
    check_choice(f"split of data set {name!r}", split, get_args(Split))
    takes_split = _takes_split(source)
    found = source(split, **options) if takes_split else source(**options).get(split)
    return None if found is None else as_rgb(found)


def find_splits(
    name: str, *, root: str | Path | None = None, **options: Any
) -> "dict[str, Dataset]":
    """Builds all splits that a data set has, as :func:`create_dataset` builds one."""
    from timm_lt.data.columns import as_rgb

    source = checked_source(name, root, options)
    if _takes_split(source):
        found = {split: source(split, **options) for split in get_args(Split)}
    else:
        found = source(**options)
    return {split: as_rgb(dataset) for split, dataset in found.items() if dataset is not None}


def checked_source(
    name: str, root: str | Path | None, options: dict[str, Any]
) -> Callable[..., Any]:
    """Returns the function of a data set; puts the root into its options and checks their names.

    Raises:
        UsageError: If the data set or an option is unknown, or a root is missing or out of place.
    """
    source = DATASETS[name]
    owner = f"data set {name!r}"
    if root is not None:
        options["root"] = root
    try:
        check_options(owner, source, options)
    except UsageError as error:
        if "root" in options and "no option 'root'" in str(error):
            raise UsageError(f"{owner} needs no root, got {str(root)!r}: leave it out") from None
        if "needs the option 'root'" in str(error):
            raise UsageError(f"{owner} reads files: give their folder as root") from None
        raise
    return source


def _takes_split(source: Callable[..., Any]) -> bool:
    parameters = inspect.signature(source).parameters.values()
    return any(p.kind is not p.KEYWORD_ONLY for p in parameters)


def dataset_from_files(
    paths: "Sequence[str] | pa.Array", labels: NDArray[np.int64], names: list[str] | None
) -> "Dataset":
    """Makes a data set of image files, which are opened when they are drawn.

    Args:
        paths: The files, (N,).
        labels: Their labels, (N,).
        names: Class names, (C,); None leaves the classes without names.
    """
    from datasets import ClassLabel, Dataset, Features, Image, Value

    label = Value("int64") if names is None else ClassLabel(names=names)
    features = Features({"image": Image(mode="RGB"), "label": label})
    tables = []
    for start in range(0, max(len(paths), 1), FILES):
        files = pa.array(paths[start : start + FILES], pa.string())
        content = pa.nulls(len(files), pa.binary())
        column = pa.StructArray.from_arrays([content, files], ["bytes", "path"])
        part = pa.array(labels[start : start + FILES], pa.int64())
        tables.append(pa.table({"image": column, "label": part}).cast(features.arrow_schema))
    return Dataset(pa.concat_tables(tables))


def dataset_from_arrays(
    images: NDArray[np.uint8], labels: NDArray[np.int64], names: list[str]
) -> "Dataset":
    """Wraps images in memory as a data set.

    Shape:
        ``images (N, H, W, 3)``, RGB; ``labels (N,)``, in [0, len(names)).
    """
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features({"image": Image(mode="RGB"), "label": ClassLabel(names=names)})
    files = encode_bmp(images)
    offsets = np.arange(len(files) + 1, dtype=np.int64) * files.shape[1]
    encoded = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(files), [None, pa.py_buffer(offsets), pa.py_buffer(files)]
    ).cast(pa.binary())
    paths = pa.nulls(len(files), pa.string())
    column = pa.StructArray.from_arrays([encoded, paths], ["bytes", "path"])
    table = pa.table({"image": column, "label": pa.array(labels)})
    return Dataset(table.cast(features.arrow_schema))


def encode_bmp(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Encodes images of one size as BMP files: a header and the pixels, so it costs one copy.

    PNG would take a second of processor time for the images of GlyphLT-100 and save nothing on
    noise.

    Shape:
        ``images (N, H, W, 3)``, RGB; returns ``(N, bytes per file)``.
    """
    number, height, width, _ = images.shape
    row = -(-width * 3 // 4) * 4  # rows are padded to whole words
    size = 54 + height * row
    header = struct.pack("<2sIHHI", b"BM", size, 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, height * row, 0, 0, 0, 0)
    files = np.zeros((number, size), np.uint8)
    files[:, :54] = np.frombuffer(header, np.uint8)
    pixels = files[:, 54:].reshape(number, height, row)[:, :, : width * 3]
    # From the bottom row up, blue first. The slice of a padded row stays a view when split.
    pixels.reshape(number, height, width, 3, copy=False)[:] = images[:, ::-1, :, ::-1]
    return files
