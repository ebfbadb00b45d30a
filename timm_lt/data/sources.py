"""Registry of data sets, and data sets made of files or of arrays."""

import inspect
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from timm_lt.utils.checks import Registry, UsageError, check_choice, check_options, shown_names
from timm_lt.utils.longtail import SelectionProtocol

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "val", "test"]
# Names of splits, compared without case.
SPLIT_WORDS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Images in memory per chunk of a column.
ROWS = 1000
Source = TypeVar("Source", bound="Callable[..., Dataset | Mapping[Split, Dataset] | None]")

DATASETS: Registry[Callable[..., Any]] = Registry("data set")
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
        selected_on_test: A paper that selected hyper-parameters or the epoch on the test split of
            this data set; this allows the protocol ``"paper"``.

    Raises:
        UsageError: If the name is taken or is not a lower-case identifier.
    """
    register = DATASETS.register(name)
    if selected_on_test is not None:
        SELECTED_ON_TEST[name] = selected_on_test
    return cast("Callable[[Source], Source]", register)


def list_datasets() -> list[str]:
    """Returns the names of the data sets.

    >>> "glyph_lt" in list_datasets()
    True
    """
    return list(DATASETS)


def check_protocol(name: str, protocol: str) -> None:
    """Checks that a data set may be used under a protocol, ``"standard"`` or ``"paper"``."""
    check_choice("data set", name, tuple(DATASETS))
    check_choice("protocol", protocol, get_args(SelectionProtocol))
    if protocol == "paper" and name not in SELECTED_ON_TEST:
        known = ", ".join(f"{key} ({paper})" for key, paper in SELECTED_ON_TEST.items())
        raise UsageError(
            "protocol paper selects hyper-parameters and the epoch on the test split, and no paper "
            f"is known to have done so for {name!r}; use protocol standard, or one of: {known}"
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
        UsageError: If the name, the split or an option is not valid, a root is missing or not
            needed, or the data set has no such split.
    """
    check_choice(f"split of data set {name!r}", split, get_args(Split))
    found = find_splits(name, root=root, splits=(split,), **options)
    if split not in found:
        raise UsageError(
            f"data set {name!r} has no {split} split: hold out a part of train with "
            "timm_lt.data.hold_out, as a run does"
        )
    return found[split]


def find_splits(
    name: str,
    *,
    root: str | Path | None = None,
    splits: Sequence[str] = get_args(Split),
    **options: Any,
) -> "dict[str, Dataset]":
    """Builds those of the splits that a data set has, as :func:`create_dataset` builds one."""
    from timm_lt.data.items import as_rgb

    source = checked_source(name, root, options)
    parameters = inspect.signature(source).parameters.values()
    if any(p.kind is not p.KEYWORD_ONLY for p in parameters):
        found = {split: source(split, **options) for split in splits}
    else:
        found = source(**options)
    return {split: as_rgb(found[split]) for split in splits if found.get(split) is not None}


def checked_source(
    name: str, root: str | Path | None, options: dict[str, Any]
) -> Callable[..., Any]:
    """Returns the function of a data set after checking its options, to which the root is added."""
    source = DATASETS[name]
    if root is not None:
        options["root"] = root
    check_options(f"data set {name!r}", source, options)
    return source


def find_root(root: str | Path) -> str:
    """Returns the absolute path of a folder after checking that it exists; links are kept."""
    path = os.path.abspath(Path(root).expanduser())  # noqa: PTH100 - resolve() follows links
    if not Path(path).is_dir():
        fault = "is not a folder" if Path(path).exists() else "does not exist"
        raise UsageError(f"root {path!r} {fault}")
    return path


class Paths(Sequence[str]):
    """Paths of files as an Arrow array."""

    def __init__(self, paths: "Iterable[str] | pa.ChunkedArray") -> None:
        if not isinstance(paths, pa.ChunkedArray):
            paths = pa.chunked_array([pa.array(paths, pa.string())])
        self.arrow = paths

    def __len__(self) -> int:
        return len(self.arrow)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Paths": ...
    def __getitem__(self, index: int | slice) -> "str | Paths":
        found = self.arrow[index]
        return Paths(found) if isinstance(found, pa.ChunkedArray) else str(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrow.to_pylist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"Paths([{shown_names([repr(path) for path in self[:6]])}])"

    def __arrow_array__(self, type: "pa.DataType | None" = None) -> "pa.ChunkedArray":
        return self.arrow

    def take(self, rows: NDArray[Any]) -> "Paths":
        """Returns the paths at some positions."""
        return Paths(self.arrow.take(pa.array(rows)))


def dataset_from_files(
    paths: Sequence[str], labels: NDArray[np.int64], names: list[str] | None
) -> "Dataset":
    """Makes a data set of image files (N,), which are opened when an item is read."""
    content = pa.scalar(None, pa.binary())
    images = pc.make_struct(content, pa.array(paths, pa.string()), field_names=["bytes", "path"])
    return dataset_from_images(images, labels, names)


def dataset_from_arrays(
    images: NDArray[np.uint8], labels: NDArray[np.int64], names: list[str]
) -> "Dataset":
    """Makes a data set of RGB images in memory, (N, H, W, 3), encoded as BMP files."""
    encoded = []
    for pixels in images:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "BMP")
        encoded.append({"bytes": file.getvalue(), "path": None})
    return dataset_from_images(encoded, labels, names)


def dataset_from_images(
    images: "Sequence[Mapping[str, Any]] | pa.Array | pa.ChunkedArray",
    labels: NDArray[np.int64],
    names: list[str] | None,
) -> "Dataset":
    """Makes a data set of encoded images: mappings of bytes and path, or a column of them."""
    from datasets import Dataset, Features, Image

    schema = Features({"image": Image(mode="RGB"), "label": label_feature(names)}).arrow_schema
    if not isinstance(images, pa.Array | pa.ChunkedArray):
        kind = schema.field("image").type
        # One array holds up to 2 GiB.
        chunks = [images[row : row + ROWS] for row in range(0, len(images), ROWS)]
        images = pa.chunked_array([pa.array(chunk, kind) for chunk in chunks], kind)
    return Dataset(pa.table({"image": images, "label": labels}).cast(schema))


def label_feature(names: list[str] | None) -> Any:  # noqa: ANN401 - datasets has no types
    """Returns the type of a column of labels with class names (C,), or without."""
    from datasets import ClassLabel, Value

    return Value("int64") if names is None else ClassLabel(names=names)
