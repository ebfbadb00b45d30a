"""Fingerprints, equal in every process: digests of data sets, transforms and modules."""

import json
from hashlib import sha256
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import DatasetFolder

from timm_lt.data.decode import encoded_images, is_remote
from timm_lt.utils.checks import UsageError, user_errors

# Attributes that do not change the features of a module in evaluation.
WITHOUT_EFFECT = ("training", "num_classes")
PLAIN = (
    *(str, int, float, type(None), type, FunctionType, BuiltinFunctionType),
    *(Tensor, torch.dtype, torch.device),
)
KEY = "pass key= with a word that stands for the samples and their transform"
# Rows of a data set that are read together.
ROWS = 1000


def described(thing: object) -> str:
    """Returns a digest of a transform: the values and functions that it consists of.

    >>> described([1, 0.5]) == described([1, 0.5]) != described([1, 0.25])
    True

    Raises:
        UsageError: If a part of it cannot be pickled.
    """
    with user_errors(f"{repr(thing)[:80]} cannot be hashed", Exception, cure=KEY):
        return str(Hasher.hash(thing))


def plain_options(module: nn.Module) -> str:
    """Returns a digest of a module's public attributes that are plain values or tensors."""
    options = {
        name: value
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name not in WITHOUT_EFFECT and _is_plain(value)
    }
    return described(options)


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def tensor_fingerprint(tensor: Tensor) -> str:
    """Returns a digest of a tensor's values, type and shape."""
    flat = tensor.detach().cpu().contiguous().flatten()
    content = sha256(flat.view(torch.uint8).numpy().data).hexdigest()
    return digest(content, str(tensor.dtype), list(tensor.shape))


def qualified_name(thing: type) -> str:
    """Returns the name of a class with that of its module."""
    return f"{thing.__module__}.{thing.__qualname__}"


def dataset_fingerprint(data: object) -> str:
    """Returns a digest of the samples of a data set in their order, and of its transform.

    Supported are data sets with a method ``fingerprint() -> str``, timm's ``ImageDataset`` of a
    folder, torchvision's folders, torch's ``TensorDataset``, and a ``Subset`` of one of them; not
    classes derived from these with a ``__getitem__`` of their own. Files are known by path, size
    and modification time.

    Raises:
        UsageError: If the data set is none of these, its transform cannot be hashed, or a file is
            missing.
    """
    fingerprint = getattr(data, "fingerprint", None)
    if callable(fingerprint):
        return str(fingerprint())
    if isinstance(data, Subset) and reads_as(data, Subset):
        return digest(dataset_fingerprint(data.dataset), map(int, data.indices))
    if isinstance(data, TensorDataset) and reads_as(data, TensorDataset):
        return digest(*map(tensor_fingerprint, data.tensors))
    folders = ImageDataset | DatasetFolder
    if isinstance(data, folders) and reads_as(data, ImageDataset, DatasetFolder):
        samples: Any = None
        if isinstance(data, DatasetFolder):
            samples, options = data.samples, [data.transforms, data.loader]
        # Other readers of timm may read anything.
        elif type(data.reader) is ReaderImageFolder:
            samples, options = data.reader.samples, [data.input_img_mode, data.load_bytes]
        if samples is not None:
            files = [[_file(path), int(target)] for path, target in samples]
            return digest(files, described([data.transform, data.target_transform, *options]))
    raise UsageError(f"the samples of a {type(data).__name__} have no fingerprint; {KEY}")


def reads_as(data: object, *known: type) -> bool:
    """Tells whether a data set has the items of a known class that it is derived from."""
    methods = ("__getitem__", "__getitems__", "__len__")
    return any(
        isinstance(data, cls)
        and all(getattr(type(data), name, None) is getattr(cls, name, None) for name in methods)
        for cls in known
    )


def images_fingerprint(dataset: Dataset) -> str:
    """Returns a digest of the stored images of a data set without a transform: bytes, or files."""
    encoded = encoded_images(dataset)
    if encoded.format["type"] == "custom":
        raise UsageError(f"a data set with a transform of its own has no fingerprint; {KEY}")
    state = sha256()
    for rows in encoded.with_format("arrow").iter(batch_size=ROWS):
        for image in rows.column("image").to_pylist():
            content = image["bytes"]
            if content is None:
                content = _file(image["path"]).encode()
            state.update(len(content).to_bytes(8, "little") + content)
    return digest(state.hexdigest(), repr(dataset.features["image"]))


def digest(*parts: object) -> str:
    """Returns a digest of texts, numbers, and lists and mappings of them.

    >>> digest("a", [1]) == digest("a", [1]) != digest("a", [2])
    True
    """
    return sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()


def _file(path: str) -> str:
    """Returns the path, the size and the modification time of a file."""
    if is_remote(path):
        return path
    with user_errors(f"{path} cannot be read"):
        status = Path(path).stat()
    return f"{path} {status.st_size} {status.st_mtime_ns}"
