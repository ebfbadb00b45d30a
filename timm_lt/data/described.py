"""Descriptions of transforms and modules: all values that they are made of, equal in every process.

Their ``repr`` is not enough: it rounds numbers and leaves options out.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from enum import Enum
from hashlib import sha256
from types import BuiltinFunctionType, FunctionType, MethodType

import numpy as np
import torch
from torch import Tensor, nn

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
