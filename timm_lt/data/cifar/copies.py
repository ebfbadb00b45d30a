"""Copies of CIFAR in every layout: labels at once, images only when they are taken."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from timm_lt.data.cifar.facts import NO_LABEL, CifarFacts
from timm_lt.data.hub.columns import find_image_column
from timm_lt.data.hub.tables import find_tables, open_repo
from timm_lt.data.sources import dataset_from_arrays
from timm_lt.utils.checks import UsageError, shown_names

if TYPE_CHECKING:
    from datasets import Dataset, Features

Part = Literal["train", "test"]
PIXELS = 3 * 32 * 32
# What the Hub's copy of CIFAR-100 calls a class.
MISSPELT = {"cra": "crab"}


@dataclass(frozen=True)
class StoredPart:
    """The training or the test images of a copy.

    Attributes:
        labels: As they are stored, (N,); ``NO_LABEL`` where there is none.
        take: Returns the images of some rows, in that order, as a data set.
    """

    labels: NDArray[np.int64]
    take: "Callable[[NDArray[np.int64]], Dataset]"


def open_copy(
    facts: CifarFacts, root: Path | None, cache_dir: str | Path | None = None
) -> dict[Part, StoredPart]:
    """Opens a copy: the Hub's, or a local one in one of three layouts.

    A folder of the Python version is read through torchvision, which unpickles a file only after
    its MD5 was found to be the published one. The binary version and parquet hold no code.

    Args:
        facts: Which data set.
        root: Folder with the Hub's parquet files, or with the Python or the binary version, or one
            of these itself; None is the Hub.
        cache_dir: Where the ``datasets`` library keeps what it prepares of the Hub's copy.

    Raises:
        UsageError: If there is no copy, or it is damaged.
    """
    if root is None:
        return _open_repo(facts, cache_dir)
    if not root.is_dir():
        raise UsageError(f"root {str(root)!r} is no folder: {_wanted(facts)}")
    for folder, read in ((facts.python, _open_python), (facts.binary, _open_binary)):
        found = root if root.name == folder else root / folder
        if found.is_dir():
            return read(facts, found)
    if any(root.rglob("*.parquet")):
        return _open_parquet(facts, root)
    content = shown_names(sorted(path.name for path in root.iterdir())) or "nothing"
    raise UsageError(f"root {str(root)!r} has {content}: {_wanted(facts)}")


def _wanted(facts: CifarFacts) -> str:
    archives = f"{facts.python.removesuffix('-batches-py').removesuffix('-python')}"
    return (
        f"{facts.name} is the folder {facts.python} (unpack {archives}-python.tar.gz), the folder "
        f"{facts.binary} (unpack {archives}-binary.tar.gz), or the parquet files of {facts.repo}; "
        "without a root it comes from the Hub"
    )


def _open_python(facts: CifarFacts, folder: Path) -> dict[Part, StoredPart]:
    from torchvision import datasets as torchvision

    loader: Any = getattr(torchvision, facts.name.replace("-", ""))
    try:
        with warnings.catch_warnings():
            # Of NumPy, about how these old files describe their arrays.
            warnings.simplefilter("ignore")
            parts = {
                train: loader(folder.parent, train=train, download=False) for train in (True, False)
            }
    except RuntimeError as error:
        expected = [name for name, _ in [*loader.train_list, *loader.test_list]]
        missing = [name for name in expected if not (folder / name).is_file()]
        why = f"lacks {shown_names(missing)}" if missing else "has a file with another MD5"
        raise UsageError(
            f"{folder} is not the official Python version of {facts.name}: it {why}; such files "
            "can hold code, and are read only as they were published"
        ) from error
    return {
        name: _from_arrays(facts, parts[name == "train"].data, parts[name == "train"].targets)
        for name in ("train", "test")
    }


def _open_binary(facts: CifarFacts, folder: Path) -> dict[Part, StoredPart]:
    files: dict[Part, Sequence[str]] = {"train": facts.binary_train, "test": (facts.binary_test,)}
    if missing := [n for names in files.values() for n in names if not (folder / n).is_file()]:
        raise UsageError(f"{folder} lacks {shown_names(missing)}: {_wanted(facts)}")
    parts: dict[Part, StoredPart] = {}
    for part, names in files.items():
        rows = np.concatenate([_read_binary(folder / name, facts.label_bytes) for name in names])
        images = rows[:, facts.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts[part] = _from_arrays(facts, images, rows[:, facts.label_bytes - 1])
    return parts


def _read_binary(file: Path, label_bytes: int) -> NDArray[np.uint8]:
    content = np.fromfile(file, np.uint8)
    size = label_bytes + PIXELS
    if len(content) == 0 or len(content) % size:
        raise UsageError(
            f"{file} has {len(content):,} bytes, no multiple of {size:,}, the bytes of an image: "
            "it is cut off, or another file"
        )
    return content.reshape(-1, size)


def _from_arrays(
    facts: CifarFacts, images: NDArray[np.uint8], labels: Sequence[int] | NDArray[Any]
) -> StoredPart:
    numbers = np.asarray(labels, np.int64)
    return StoredPart(
        numbers, lambda rows: dataset_from_arrays(images[rows], numbers[rows], list(facts.names))
    )


def _open_parquet(facts: CifarFacts, root: Path) -> dict[Part, StoredPart]:
    import pyarrow.parquet as pq
    from datasets import Features

    files = find_tables(root)
    if missing := [part for part in ("train", "test") if part not in files]:
        raise UsageError(
            f"root {str(root)!r} has no parquet file of {' and '.join(missing)}, only "
            f"{', '.join(files)}"
        )
    parts: dict[Part, StoredPart] = {}
    for part in ("train", "test"):
        try:
            tables = [pq.read_table(file) for file in files[part]]
        except (OSError, ValueError) as error:
            raise UsageError(f"{files[part][0]} cannot be read: {error}") from error
        table = pa.concat_tables(tables)
        features = Features.from_arrow_schema(table.schema)
        image = _checked_columns(facts, features)
        labels = _numbers(table.column(facts.label))
        parts[part] = StoredPart(labels, _taker(facts, table.column(image), labels))
    return parts


def _taker(
    facts: CifarFacts, images: pa.ChunkedArray, labels: NDArray[np.int64]
) -> "Callable[[NDArray[np.int64]], Dataset]":
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features({"image": Image(mode="RGB"), "label": ClassLabel(names=list(facts.names))})

    def take(rows: NDArray[np.int64]) -> "Dataset":
        table = pa.table({"image": images.take(pa.array(rows)), "label": labels[rows]})
        return Dataset(table.cast(features.arrow_schema))

    return take


def _open_repo(facts: CifarFacts, cache_dir: str | Path | None) -> dict[Part, StoredPart]:
    tables = open_repo(facts.repo, None, None, cache_dir).read(["train", "test"])
    parts: dict[Part, StoredPart] = {}
    for part in ("train", "test"):
        table = tables[part].with_format("arrow")
        image = _checked_columns(facts, table.features)
        labels = cast(pa.Table, table.select_columns(facts.label)[:]).column(0)
        numbers = _numbers(labels)
        images = cast(pa.Table, table.select_columns(image)[:]).column(0)
        parts[part] = StoredPart(numbers, _taker(facts, images, numbers))
    return parts


def _numbers(labels: pa.ChunkedArray) -> NDArray[np.int64]:
    numbers: NDArray[np.int64] = labels.cast(pa.int64(), safe=False).fill_null(NO_LABEL).to_numpy()
    return numbers


def _checked_columns(facts: CifarFacts, features: "Features") -> str:
    """Returns the column of images, after a check that the labels are those of the data set."""
    if facts.label not in features:
        raise UsageError(
            f"the table has no column {facts.label!r} as {facts.repo} has, only "
            f"{', '.join(features)}"
        )
    names = [MISSPELT.get(name, name) for name in getattr(features[facts.label], "names", [])]
    if names and names != list(facts.names):
        raise UsageError(
            f"the classes of column {facts.label!r} are {shown_names(names)}, not those of "
            f"{facts.name}: {shown_names(facts.names)}"
        )
    return find_image_column(features)
