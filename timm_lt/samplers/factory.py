"""The samplers by name."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from timm_lt.samplers.base import ClassSampler
from timm_lt.utils.checks import Registry, UsageError
from timm_lt.utils.longtail import Labels

SAMPLERS: Registry[Callable[..., ClassSampler]] = Registry("sampler")
# What whoever uses a sampler sets, so that it is no option for a user.
SET_BY_OWNER = ("labels", "num_samples", "seed", "num_classes", "rank", "num_replicas")

S = TypeVar("S", bound=type[ClassSampler])


def register_sampler(name: str) -> Callable[[S], S]:
    """Returns a class decorator that registers a :class:`ClassSampler` under a name.

    Its constructor takes ``(labels, num_samples, seed, num_classes)`` and, keyword-only, its own
    options.
    """

    def add(cls: S) -> S:
        SAMPLERS.register(name)(cls)
        return cls

    return add


def list_samplers() -> list[str]:
    """Returns the names that :func:`create_sampler` knows."""
    return list(SAMPLERS)


def create_sampler(
    name: str,
    labels: Labels,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    rank: int = 0,
    num_replicas: int = 1,
    **options: Any,
) -> ClassSampler:
    """Creates a sampler by name; see :class:`ClassSampler` for what all of them guarantee.

    >>> import torch
    >>> sampler = create_sampler("class_balanced", [0] * 90 + [1] * 10, num_samples=40)
    >>> torch.bincount(torch.tensor(list(sampler)) // 90)
    tensor([20, 20])

    Args:
        name: One of :func:`list_samplers`.
        labels: Integer labels (N,), one per image.
        num_samples: Length of an epoch over all processes, at least 1; None takes N.
        seed: A non-negative integer.
        num_classes: Number of classes; None takes the largest label plus one.
        rank: Number of this process, without accelerate; see :meth:`ClassSampler.shard`.
        num_replicas: Number of processes, without accelerate. With it, leave both out.
        **options: The sampler's own options.

    Raises:
        UsageError: If the name or an option is unknown, or a value is out of range.
    """
    sampler = SAMPLERS.create(name, labels, num_samples, seed, num_classes, **options)
    sampler.shard(rank, num_replicas)
    return sampler


def check_sampler(owner: str, sampler: str, options: Mapping[str, Any] | None) -> None:
    """Checks the sampler that something is trained with, name and options, without data.

    Args:
        owner: What is trained, for the message, e.g. ``"of head 'crt'"``.
        sampler: The name.
        options: Its ``sampler_options``, or None.

    Raises:
        UsageError: If the name or an option is unknown, a value is out of range, the option is set
            elsewhere, or the sampler changes from epoch to epoch: all draws of a head are one.
    """
    if options is not None and not isinstance(options, Mapping):
        raise UsageError(f"sampler_options {owner} must be a mapping, got {options!r}")
    given = dict(options or {})
    for key in SET_BY_OWNER:
        if key in given:
            raise UsageError(f"{key} in sampler_options {owner} is set elsewhere: leave it out")
    try:
        made = create_sampler(sampler, [0, 1], num_samples=1, **given)
    except UsageError as error:
        raise UsageError(f"sampler {owner}: {error}") from error
    if getattr(made, "epochs", 1) != 1:
        raise UsageError(
            f"sampler {sampler!r} {owner} changes from epoch to epoch, and all draws of a head are "
            "one: take another, or one that changes within an epoch and epochs: 1"
        )
