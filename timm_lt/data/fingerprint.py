"""Fingerprints, equal in every process: digests of images, tensors, transforms and modules."""

import json
from hashlib import sha256
from pathlib import Path
from types import BuiltinFunctionType, FunctionType

import torch
from datasets import Dataset, Image
from datasets.fingerprint import Hasher
from torch import Tensor, nn

from timm_lt.data.decode import is_remote
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


def images_fingerprint(dataset: Dataset, column: str = "image") -> str:
    """Returns a digest of the stored images of a data set without a transform: bytes, or files."""
    if dataset.format["type"] == "custom":
        raise UsageError(f"a data set with a transform of its own has no fingerprint; {KEY}")
    state = sha256()
    images = dataset.with_format(None).select_columns(column)
    images = images.cast_column(column, Image(decode=False)).with_format("arrow")
    for rows in images.iter(batch_size=ROWS):
        for image in rows.column(column).to_pylist():
            content = image["bytes"]
            if content is None:
                content = file_fingerprint(image["path"]).encode()
            state.update(len(content).to_bytes(8, "little") + content)
    return digest(state.hexdigest(), repr(dataset.features[column]))


def digest(*parts: object) -> str:
    """Returns a digest of texts, numbers, and lists and mappings of them.

    >>> digest("a", [1]) == digest("a", [1]) != digest("a", [2])
    True
    """
    return sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()


def file_fingerprint(path: str) -> str:
    """Returns the path, the size and the modification time of a file; the URL of a remote one."""
    if is_remote(path):
        return path
    with user_errors(f"{path} cannot be read"):
        status = Path(path).stat()
    return f"{path} {status.st_size} {status.st_mtime_ns}"
