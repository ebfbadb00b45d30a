"""Fingerprints: digests of all that decides what a data set shows, equal in every process.

Descriptions of transforms and modules: all values that they are made of, equal in every process.

Their ``repr`` is not enough: it rounds numbers and leaves options out.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from hashlib import sha256
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import DatasetFolder

from timm_lt.data.decode import encoded_images, is_remote
from timm_lt.utils.checks import UsageError

# What every module has, beside its weights and its parts.
OF_MODULES = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
# Attributes that do not change what a module does in evaluation before its classifier.
WITHOUT_EFFECT = ("training", "num_classes")
# A place in memory, which is another in every process, or a function without a name.
NAMELESS = r" at 0x[0-9a-fA-F]+|\bLambda\(|<lambda>"


class _NotPlainError(Exception):
    pass


def stable_repr(thing: object) -> str:
    """Returns the ``repr`` of a setting, which says all of it.

    Raises:
        UsageError: If it names a place in memory or a function without a name, or shows a tensor
            or an array, whose values it rounds.
    """
    return _checked(thing, repr(thing), NAMELESS + r"|\b(tensor|array)\(")


def described(thing: object) -> str:
    """Returns all that a transform is made of: its ``repr`` and, part by part, every attribute.

    Functions go by their names, tensors and arrays by a digest of their values.

    >>> described([1, 0.5])
    '["[1, 0.5]", [1, 0.5]]'

    Raises:
        UsageError: If a part does not say what it does, as a lambda.
    """
    text = _checked(thing, repr(thing), NAMELESS)
    description = json.dumps([text, _plain(thing, functools.partial(_parts, within=()))])
    # What a function in a function does depends on values that are not seen here.
    return _checked(thing, description, r"\"function [^\"]*<(lambda|locals)>")


def plain_options(module: nn.Module) -> dict[str, object]:
    """Returns the public attributes of a module that are plain values, functions or tensors."""
    options = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name in WITHOUT_EFFECT:
            continue
        try:
            options[name] = _plain(value, _refuse)
        except _NotPlainError:
            continue
    return options


def qualified_name(thing: type | FunctionType | BuiltinFunctionType) -> str:
    """Returns the name of a class or a function with that of its module."""
    return f"{thing.__module__}.{thing.__qualname__}"


def tensor_fingerprint(tensor: Tensor) -> str:
    """Returns a digest of a tensor's values, type and shape."""
    flat = tensor.detach().cpu().contiguous().flatten()
    content = sha256(flat.view(torch.uint8).numpy().data).hexdigest()
    words = json.dumps([content, str(tensor.dtype), list(tensor.shape)])
    return sha256(words.encode()).hexdigest()


def _checked(thing: object, text: str, refused: str) -> str:
    if re.search(refused, text):
        raise UsageError(
            f"{repr(thing)[:80]} does not say what it does: give it a __repr__ that does and "
            "functions with names, or pass key= with a word that stands for the samples and their "
            "transform"
        )
    return text


def _refuse(_: object) -> object:
    raise _NotPlainError


def _plain(value: object, other: Callable[[object], object]) -> object:
    """Returns a value as JSON has it; of one that it does not have, what ``other`` returns."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Enum() | torch.dtype() | torch.device() | np.generic() | bytes() | range():
            return repr(value)
        case Tensor():
            return f"tensor {tensor_fingerprint(value)}"
        case np.ndarray() if value.dtype.kind != "O":
            content = sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            return f"array {content} {value.dtype} {value.shape}"
        case FunctionType() | BuiltinFunctionType():
            return f"function {qualified_name(value)}"
        case type():
            return f"class {qualified_name(value)}"
        case list() | tuple():
            return [_plain(part, other) for part in value]
    return other(value)


def _parts(thing: object, within: tuple[object, ...]) -> object:
    """Returns the description of what is no plain value, attribute by attribute."""
    if any(thing is outer for outer in within):
        return "a part of itself"
    other = functools.partial(_parts, within=(*within, thing))
    if isinstance(thing, Mapping):
        return {str(name): _plain(thing[name], other) for name in sorted(thing, key=str)}
    if isinstance(thing, functools.partial):
        return _plain([type(thing), thing.func, thing.args, thing.keywords], other)
    if isinstance(thing, MethodType):
        return _plain([thing.__func__, thing.__self__], other)
    if not hasattr(thing, "__dict__"):
        return stable_repr(thing)
    unimportant = OF_MODULES if isinstance(thing, nn.Module) else ()
    options = {name: value for name, value in vars(thing).items() if name not in unimportant}
    return _plain([type(thing), options], other)


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
    plain = [_plain_value(part) for part in parts]
    return sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _plain_value(part: object) -> object:
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
