"""Which images a split has: what says so from run to run, without looking at a file."""

import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from timm_lt.data.sources import SPLIT_WORDS

if TYPE_CHECKING:
    from datasets import Dataset

# Bytes at the end of an image that tell it from others of the same length.
END = 512


def image_keys(dataset: "Dataset", root: str | Path | None = None) -> list[str | bytes] | None:
    """Returns a key for each image that depends on no other image, to hold images out by.

    An image file is known by its path, as :func:`path_keys` returns it, and an image that is stored
    in the data set by the length and the end of its bytes.

    Args:
        dataset: With a column ``image``.
        root: Folder of the files, if it is known.

    Returns:
        The keys, (N,); None if the images are stored in another way.
    """
    stored = _stored(dataset)
    if stored is None:
        return None
    paths, lengths, ends = stored
    return [
        key if length is None else end + length.to_bytes(8, "little")
        for key, length, end in zip(
            path_keys([path or "" for path in paths.to_pylist()], root),
            lengths.to_pylist(),
            ends.to_pylist(),
            strict=True,
        )
    ]


def path_keys(paths: Sequence[str], root: str | Path | None = None) -> list[str]:
    """Returns the paths of image files below the root, without the directory of their split.

    They stay the same when the data are moved or other images are added.

    >>> path_keys(["/photos/cat/1.jpg", "/photos/train/cat/2.jpg"], "/photos")
    ['cat/1.jpg', 'cat/2.jpg']
    >>> path_keys(["/photos/cat/1.jpg"])
    ['cat/1.jpg']

    Args:
        paths: The files.
        root: Their folder; files elsewhere keep their absolute paths. Without it, the name of a
            file and that of its directory are the key.
    """
    # Windows separates by backslashes.
    paths = [path.replace(os.sep, "/") for path in paths]
    if root is None:
        return ["/".join(path.split("/")[-2:]) for path in paths]
    start = os.path.abspath(Path(root).expanduser())  # noqa: PTH100 - links stay as they are
    start = f"{start.replace(os.sep, '/').rstrip('/')}/"
    return [_without_split(path.removeprefix(start)) for path in paths]


def _without_split(path: str) -> str:
    first, _, rest = path.partition("/")
    return rest if "/" in rest and first.lower() in SPLIT_WORDS else path


def split_digests(
    datasets: Mapping[str, "Dataset"],
    labels: Mapping[str, Tensor],
    root: str | Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Returns for each split its number of images and a digest of which they are, in order.

    The digest is of the labels and the keys of the images; no file is looked at.
    """
    digests = {}
    for split, values in labels.items():
        state = sha256(values.numpy().astype("<i8").tobytes())
        for key in image_keys(datasets[split], root) or ():
            state.update(key.encode() if isinstance(key, str) else key)
            state.update(b"\0")
        digests[split] = {"images": len(values), "sha256": state.hexdigest()}
    return digests


def _stored(
    dataset: "Dataset",
) -> "tuple[pa.ChunkedArray, pa.ChunkedArray, pa.ChunkedArray] | None":
    """Returns the paths of the images, and the lengths and ends of the bytes that are stored."""
    column = dataset.data.column("image")
    if not pa.types.is_struct(column.type):
        return None
    paths = pc.struct_field(column, "path")
    content = pc.struct_field(column, "bytes")
    lengths, ends = pc.binary_length(content), pc.binary_slice(content, -END)
    # Before a selection, which would copy the bytes.
    if dataset._indices is not None:
        rows = dataset._indices.column(0)
        paths, lengths, ends = paths.take(rows), lengths.take(rows), ends.take(rows)
    return paths, lengths, ends
