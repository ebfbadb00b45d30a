"""Fingerprints: digests of all that decides what a data set shows, equal in every process."""

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from types import FunctionType
from typing import Any

from datasets import Dataset
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import DatasetFolder

from timm_lt.data.described import described, qualified_name, stable_repr, tensor_fingerprint
from timm_lt.data.reading import encoded_images, is_remote
from timm_lt.utils.checks import UsageError

# Rows of a data set that are read together.
ROWS = 1000


def dataset_fingerprint(data: object) -> str:
    """Returns a digest of the samples of a data set in their order, and of its transform.

    It is known for data sets that have a method ``fingerprint() -> str``, timm's ``ImageDataset``
    of a folder, torchvision's folders, torch's ``TensorDataset``, and a ``Subset`` of one of them;
    not for a class derived from one of these that has a ``__getitem__`` of its own. A file counts
    as another when its path, its size or its time of change is another.

    Raises:
        UsageError: If the data set is none of these, its transform does not say what it does, or a
            file is missing.
    """
    fingerprint = getattr(data, "fingerprint", None)
    if callable(fingerprint):
        return str(fingerprint())
    if isinstance(data, Subset) and reads_as(data, Subset):
        return digest(dataset_fingerprint(data.dataset), map(int, data.indices))
    if isinstance(data, TensorDataset) and reads_as(data, TensorDataset):
        return digest(*map(tensor_fingerprint, data.tensors))
    if isinstance(data, ImageDataset) and reads_as(data, ImageDataset):
        # Of other readers it is not known what they read.
        if type(data.reader) is ReaderImageFolder:
            options = [data.transform, data.target_transform, data.input_img_mode, data.load_bytes]
            return digest(_files(data.reader.samples), map(described, options))
    elif isinstance(data, DatasetFolder) and reads_as(data, DatasetFolder):
        options = [data.transform, data.target_transform, data.transforms, _function(data.loader)]
        return digest(_files(data.samples), map(described, options))
    raise UsageError(
        f"what a {type(data).__name__} shows is not known: pass key= with a word that stands for "
        "its samples and their transform"
    )


def reads_as(data: object, *known: type) -> bool:
    """Tells whether a data set has the items of a known class that it is derived from."""
    methods = ("__getitem__", "__getitems__", "__len__")
    return any(
        isinstance(data, cls)
        and all(getattr(type(data), name, None) is getattr(cls, name, None) for name in methods)
        for cls in known
    )


def _function(loader: object) -> str:
    """Returns the name of a folder's function that reads a file."""
    if not isinstance(loader, FunctionType) or "<" in loader.__qualname__:
        raise UsageError(
            f"what the loader {loader!r} of a folder does is not known: make it a function of a "
            "module, or pass key= with a word that stands for the samples and their transform"
        )
    return qualified_name(loader)


def images_fingerprint(dataset: Dataset) -> str:
    """Returns a digest of the images of a data set as they are stored: bytes, or files.

    Raises:
        UsageError: If the data set has a transform of its own, or a file is missing.
    """
    encoded = encoded_images(dataset)
    if encoded.format["type"] == "custom":
        raise UsageError(
            "what the data set's own transform shows is not known: pass key= with a word that "
            "stands for its samples and their transform"
        )
    state = sha256()
    for rows in encoded.with_format("arrow").iter(batch_size=ROWS):
        for image in rows.column("image").to_pylist():
            content = image["bytes"]
            if content is None:
                content = _file(image["path"]).encode()
            state.update(len(content).to_bytes(8, "little") + content)
    return digest(state.hexdigest(), stable_repr(dataset.features["image"]))


def digest(*parts: object) -> str:
    """Returns a digest of texts, numbers, and lists and mappings of them.

    >>> digest("a", [1]) == digest("a", [1]) != digest("a", [2])
    True
    """
    plain = [_plain(part) for part in parts]
    return sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _plain(part: object) -> object:
    if isinstance(part, Mapping):
        return {str(name): stable_repr(value) for name, value in part.items()}
    return list(part) if isinstance(part, Iterable) and not isinstance(part, str) else part


def _files(samples: Iterable[tuple[str, int]]) -> list[list[Any]]:
    return [[_file(path), int(target)] for path, target in samples]


def _file(path: str) -> str:
    """Returns what says whether a file is the same: its path, its size and its time of change."""
    if is_remote(path):
        return path
    try:
        status = Path(path).stat()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    return f"{path} {status.st_size} {status.st_mtime_ns}"
