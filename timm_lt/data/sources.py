"""Registry of data sets, and data sets made of files or of arrays."""

import inspect
import os
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

# Files per chunk of a column: more of the longest paths would exceed 2 GiB.
FILES = 500_000

DATASETS: "Registry[Callable[..., Any]]" = Registry("data set")
# Papers that selected on the test split, by data set.
SELECTED_ON_TEST: dict[str, str] = {}


def register_dataset(
    name: str, *, selected_on_test: str | None = None
) -> Callable[[Source], Source]:
    """Returns a decorator that registers a data set under a name.

    The decorated function is called as ``function(split, **options)`` and returns a
    ``datasets.Dataset`` with the columns ``image`` (a ``datasets.Image``) and ``label`` (a
    ``datasets.ClassLabel``), or None for a ``"val"`` that does not exist. Its keyword-only
    parameters are the options; a data set that reads files has an option ``root``. A function
    without a parameter ``split`` is called as ``function(**options)`` and returns all splits by
    name.

    Args:
        name: The name, a lower-case identifier.
        selected_on_test: The paper that selected hyper-parameters or the epoch on the test split of
            this data set, if one did; this allows the protocol ``"paper"``.

    Raises:
        UsageError: If the name is taken or is not a lower-case identifier.
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
        name: A name from :func:`list_datasets`.
        protocol: ``"standard"``, or ``"paper"``, which selects on the test split.

    Raises:
        UsageError: If the protocol is unknown, or no paper selected on the test split of the data
            set; the message lists the data sets where one did.
    """
    check_choice("data set", name, tuple(DATASETS))
    check_choice("protocol", protocol, get_args(SelectionProtocol))
    if protocol == "paper" and name not in SELECTED_ON_TEST:
        known = [f"{key} ({paper})" for key, paper in SELECTED_ON_TEST.items() if key in DATASETS]
        raise UsageError(
            "protocol paper selects hyper-parameters and the epoch on the test split, and no paper "
            f"is known to have done so for {name!r}; use protocol standard, or one of: "
            f"{', '.join(known) or 'no data set'}"
        )


def create_dataset(
    name: str, *, split: Split = "train", root: str | Path | None = None, **options: Any
) -> "Dataset":
    """Builds one split of a data set.

    >>> dataset = create_dataset("glyph_lt", split="val")
    >>> len(dataset), dataset[0]["image"].size, dataset.features["label"].num_classes
    (2000, (32, 32), 100)

    Args:
        name: A name from :func:`list_datasets`.
        split: ``"train"``, ``"val"`` or ``"test"``.
        root: The folder with the files, for data sets that read files.
        options: The data set's own options.

    Returns:
        A ``datasets.Dataset`` with the columns ``image`` (decoded to a PIL image in RGB, as in a
        run) and ``label`` (an integer; class names are in ``features["label"].names``).

    Raises:
        UsageError: If the name, the split or an option is unknown; the message lists the valid
            ones. Also if a root is missing or not needed, or the data set has no such split.
    """
    from timm_lt.data.columns import as_rgb

    source = checked_source(name, root, options)
    check_choice(f"split of data set {name!r}", split, get_args(Split))
    dataset = source(split, **options) if _takes_split(source) else source(**options).get(split)
    if dataset is None:
        raise UsageError(
            f"data set {name!r} has no {split} split: hold out a part of train with "
            "timm_lt.data.hold_out, as a run does"
        )
    return as_rgb(dataset)


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
    """Returns the function of a data set after checking its options, which get the root.

    Raises:
        UsageError: If the data set or an option is unknown, or a root is missing or not needed.
    """
    source = DATASETS[name]
    owner = f"data set {name!r}"
    if root is not None:
        if "root" not in inspect.signature(source).parameters:
            raise UsageError(f"{owner} reads no files; remove the root {str(root)!r}")
        options["root"] = root
    check_options(owner, source, options)
    return source


def find_root(root: str | Path) -> str:
    """Returns the absolute path of a folder that holds files; symbolic links are kept.

    Raises:
        UsageError: If it does not exist or is not a folder.
    """
    path = os.path.abspath(Path(root).expanduser())  # noqa: PTH100 - resolve() follows links
    if not Path(path).is_dir():
        fault = "is not a folder" if Path(path).exists() else "does not exist"
        raise UsageError(f"root {path!r} {fault}")
    return path


def _takes_split(source: Callable[..., Any]) -> bool:
    parameters = inspect.signature(source).parameters.values()
    return any(p.kind is not p.KEYWORD_ONLY for p in parameters)


def dataset_from_files(
    paths: "Sequence[str] | pa.Array", labels: NDArray[np.int64], names: list[str] | None
) -> "Dataset":
    """Makes a data set of image files, which are opened when an item is read.

    Args:
        paths: The files, (N,).
        labels: Their labels, (N,).
        names: Class names, (C,), if known.
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
    """Makes a data set of images in memory, encoded as BMP files.

    Shape:
        ``images (N, H, W, 3)``, RGB; ``labels (N,)``, in [0, len(names)).
    """
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features({"image": Image(mode="RGB"), "label": ClassLabel(names=names)})
    files = encode_bmp(images)
    fixed = pa.binary(files.shape[1])
    encoded = pa.Array.from_buffers(fixed, len(files), [None, pa.py_buffer(files)])
    encoded = encoded.cast(pa.binary())
    paths = pa.nulls(len(files), pa.string())
    column = pa.StructArray.from_arrays([encoded, paths], ["bytes", "path"])
    table = pa.table({"image": column, "label": pa.array(labels)})
    return Dataset(table.cast(features.arrow_schema))


def encode_bmp(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Encodes images (N, H, W, 3) of one size as BMP files (N, bytes), with one copy."""
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
