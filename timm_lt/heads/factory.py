"""The registry of heads and their factory."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from timm_lt.heads.base import Head
from timm_lt.utils.checks import Registry, UsageError, check_options

HEADS: Registry[type[Head]] = Registry("head")
H = TypeVar("H", bound=type[Head])


def register_head(name: str) -> Callable[[H], H]:
    """Returns a class decorator that registers a head and writes its name into ``kind``."""
    add = HEADS.register(name)

    def decorate(cls: H) -> H:
        cls.kind = name
        add(cls)
        return cls

    return decorate


def list_heads() -> list[str]:
    """Names the registered heads.

    >>> sorted(list_heads())
    ['cosine', 'crt', 'fslwf', 'linear', 'logit_adjusted', 'lws', 'ncm', 'oltr', 'tau_norm']
    """
    return list(HEADS)


def check_flag(noun: str, value: bool) -> bool:
    """Returns a boolean after checking that it is one: the text ``"false"`` would count as true.

    >>> check_flag("keep_bias", "false")
    Traceback (most recent call last):
    timm_lt.utils.checks.UsageError: keep_bias must be true or false, got 'false'

    Raises:
        UsageError: If the value is no boolean.
    """
    if not isinstance(value, bool):
        raise UsageError(f"{noun} must be true or false, got {value!r}")
    return value


def head_option_names(name: str) -> list[str]:
    """Returns the names of the options that a head takes; an unknown head raises UsageError."""
    parameters = inspect.signature(HEADS[name]).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def check_head_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Checks the options of a head without creating one of any size; returns all of them.

    Raises:
        UsageError: For an unknown head or option, or a value out of its range.

    >>> check_head_options("tau_norm", {"tau": 0.5})
    {'tau': 0.5, 'keep_bias': False}
    """
    check_options(f"head {name!r}", HEADS[name], options)
    # These depend on the number of classes.
    sized = {key: value for key, value in options.items() if key != "class_counts"}
    return HEADS[name](1, 1, **sized).options()


def create_head(
    name: str,
    in_features: int,
    num_classes: int,
    *,
    bias: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Head:
    """Creates a head with a freshly initialised classifier.

    Args:
        name: One of :func:`list_heads`.
        in_features: Width D of the features.
        num_classes: Number of classes C.
        bias: Whether the classifier has a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **options: Options of that head.

    Raises:
        UsageError: For an unknown head or option, or a value out of its range.

    >>> create_head("tau_norm", 8, 3, tau=0.5)
    TauNormHead(in_features=8, out_features=3, bias=True, tau=0.5, keep_bias=False)
    """
    check_options(f"head {name!r}", HEADS[name], options)
    return HEADS[name](in_features, num_classes, bias, device, dtype, **options)
