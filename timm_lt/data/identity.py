"""Which images a split has: what says so from run to run, without looking at a file."""

import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset


def image_keys(dataset: "Dataset", root: str | Path | None = None) -> list[str] | None:
    """Returns the paths of image files as seen from the root; None if not all images are files.

    Args:
        dataset: With a column ``image``.
        root: Where the paths start, so that they stay the same when the data are moved; files
            elsewhere keep their absolute paths. Without it, the files' common directory.
    """
    stored = _stored(dataset)
    if stored is None or stored[0].null_count or stored[1].null_count < len(dataset):
        return None
    return _relative(stored[0].to_pylist(), root)


def split_digests(
    datasets: Mapping[str, "Dataset"],
    labels: Mapping[str, Tensor],
    root: str | Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Returns for each split its number of images and a digest of which they are, in order.

    The digest is of labels, paths as seen from the root, and lengths of the images that are stored
    in the data set; no file is looked at.
    """
    digests = {}
    for split, values in labels.items():
        state = sha256(values.numpy().astype("<i8").tobytes())
        stored = _stored(datasets[split])
        if stored is not None:
            paths, lengths = stored
            known = [path or "" for path in paths.to_pylist()]
            state.update("\0".join(_relative(known, root)).encode())
            state.update(lengths.fill_null(-1).to_numpy().astype("<i8").tobytes())
        digests[split] = {"images": len(values), "sha256": state.hexdigest()}
    return digests


def _stored(dataset: "Dataset") -> "tuple[pa.ChunkedArray, pa.ChunkedArray] | None":
    """Returns the paths of the images, and how many bytes of each are in the table, or null."""
    column = dataset.data.column("image")
    if not pa.types.is_struct(column.type):
        return None
    paths = pc.struct_field(column, "path")
    lengths = pc.binary_length(pc.struct_field(column, "bytes"))
    # Before a selection, which would copy the bytes.
    if dataset._indices is not None:
        rows = dataset._indices.column(0)
        paths, lengths = paths.take(rows), lengths.take(rows)
    return paths, lengths


def _relative(paths: list[str], root: str | Path | None) -> list[str]:
    if not paths:
        return paths
    if root is None:
        # What the first and the last have in common, all have; down to a whole directory.
        common = os.path.commonprefix([min(paths), max(paths)])  # noqa: RUF071
        start = common.rpartition("/")[0]
    else:
        start = os.path.abspath(Path(root).expanduser())  # noqa: PTH100 - links stay as they are
    start = f"{start.rstrip('/')}/"
    return [path.removeprefix(start) for path in paths]
