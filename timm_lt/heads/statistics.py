"""Batch-norm statistics that belong to a head: those with which its classifier was trained."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from timm_lt.heads.base import Head
from timm_lt.utils.checks import UsageError


def check_statistics_stay(old: Head) -> None:
    """Refuses to replace a head whose statistics are in the backbone by one of the joint weight."""
    if old.backbone_statistics:
        raise UsageError(
            f"the {old.kind} head has brought its own batch-norm statistics into the backbone, "
            "which another head does not fit; create the model again"
        )


def statistics_of(heads: Iterable[nn.Module], model: nn.Module) -> dict[str, Tensor]:
    """Returns the batch-norm statistics that heads bring along, checked against the model.

    Raises:
        UsageError: If they are not the model's, or two heads bring different ones.
    """
    state = model.state_dict()
    statistics: dict[str, Tensor] = {}
    for head in heads:
        for key, value in (getattr(head, "backbone_statistics", None) or {}).items():
            if key not in state or state[key].shape != value.shape:
                there = f"is {tuple(state[key].shape)}" if key in state else "is missing"
                raise UsageError(
                    f"the head's batch-norm statistics are not the model's: {key} is "
                    f"{tuple(value.shape)} with the head and {there} in {type(model).__name__}"
                )
            if key in statistics and not torch.equal(statistics[key], value):
                raise UsageError(
                    f"two heads bring different batch-norm statistics, for instance {key}: a "
                    "backbone has one of them; put on heads that were trained with the same"
                )
            statistics[key] = value
    return statistics


@contextmanager
def head_statistics(model: nn.Module, head: nn.Module) -> Iterator[nn.Module]:
    """Gives a model the batch-norm statistics of a head while the block runs.

    The features of a head that has ``backbone_statistics`` are taken inside of it. Afterwards the
    model has its own statistics again, bit for bit. For a head without any, nothing changes.

    Args:
        model: A model with the backbone on which the head was trained.
        head: A fitted head; it is not put on the model.

    Yields:
        The same model.

    Raises:
        UsageError: If the head's statistics are not the model's.
    """
    statistics = statistics_of([head], model)
    state = model.state_dict()
    kept = {key: state[key].clone() for key in statistics}
    model.load_state_dict(statistics, strict=False)
    try:
        yield model
    finally:
        model.load_state_dict(kept, strict=False)
