"""The registry of losses and their factory."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from timm_lt.utils.checks import Registry, UsageError
from timm_lt.utils.longtail import ClassCounts

LOSSES: Registry[Callable[..., nn.Module]] = Registry("loss")

L = TypeVar("L", bound=Callable[..., nn.Module])


def register_loss(name: str) -> Callable[[L], L]:
    """Returns a class decorator that registers a loss under a name.

    Its constructor takes ``class_counts``, which may be None, and, keyword-only, its own options.
    """

    def add(cls: L) -> L:
        LOSSES.register(name)(cls)
        return cls

    return add


def list_losses() -> list[str]:
    """Returns the names that :func:`create_loss` knows."""
    return list(LOSSES)


def create_loss(name: str, class_counts: ClassCounts | None = None, **options: Any) -> nn.Module:
    """Creates a loss by name: a module that takes logits (N, C) and targets (N,).

    >>> import torch
    >>> loss = create_loss("balanced_softmax", class_counts=[90, 10])
    >>> loss(torch.zeros(2, 2), torch.tensor([0, 1]))  # -(log .9 + log .1) / 2
    tensor(1.2040)

    Args:
        name: One of :func:`list_losses`.
        class_counts: Training images per class (C,). May be given to every loss; some need it.
        **options: The loss's own options.

    Raises:
        UsageError: If the name or an option is unknown, a value is out of range, or the loss needs
            class_counts and has none.
    """
    loss = LOSSES[name]
    if class_counts is None and getattr(loss, "needs_class_counts", False):
        raise UsageError(f"loss {name!r} needs class_counts, the training images per class")
    return LOSSES.create(name, class_counts, **options)
