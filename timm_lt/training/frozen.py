"""Training parts of a model: which ones, and what the frozen rest does meanwhile."""

import copy
from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import nn

from timm_lt.checkpoint import is_statistic
from timm_lt.heads import find_classifiers
from timm_lt.models.bilateral import takes_pairs
from timm_lt.training.head_plan import BatchNorm
from timm_lt.training.last_block import LAST_BLOCK, last_block
from timm_lt.utils.checks import UsageError, check_choice, unknown_name


def check_trained(model: nn.Module, trained: Sequence[str] | None, bn: BatchNorm) -> None:
    """Checks which parts of a model are to be trained; see :class:`FrozenParts`.

    Raises:
        UsageError: If the model has no such module, it has no parameters, or ``bn`` has no effect.
    """
    check_choice("bn", bn, get_args(BatchNorm))
    if trained is not None:
        _modules(model, trained)
    if bn != "shift":
        return
    if trained is None:
        raise UsageError(
            "bn shift is for what is frozen beside the modules in trained, and none are named: "
            "leave it out"
        )
    if not any(map(is_statistic, model.state_dict())):
        raise UsageError(
            f"bn shift has no effect, since {type(model).__name__} has no batch-norm statistics: "
            "leave it out"
        )


class FrozenParts:
    """Freezes a model but for some modules and its classifier.

    The frozen parameters ask for no gradient, so no optimiser moves or decays them. Of frozen
    modules, ``bn="frozen"`` has all in evaluation mode: batch norm normalises by the statistics
    that it has, and they stay. With ``bn="shift"`` they are in training mode, as in the code of
    Kang et al.: batch norm normalises by the batch, its running statistics move to those of the
    training data, and dropout is active.

    Args:
        model: A timm model with its classifier.
        trained: Paths of the modules that are trained, with all that is in them; ``"last_block"``
            is the path that :func:`~timm_lt.training.last_block.last_block` finds.
        bn: What frozen modules do.

    Raises:
        UsageError: As :func:`check_trained`.
    """

    def __init__(self, model: nn.Module, trained: Sequence[str], bn: BatchNorm) -> None:
        check_trained(model, trained, bn)
        chosen = _modules(model, trained)
        parameters = {id(parameter) for module in chosen for parameter in module.parameters()}
        frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in parameters]
        for parameter in frozen:
            parameter.requires_grad_(False)
        self._parameters = frozen
        self._evaluated = _beside(model, chosen) if bn == "frozen" else []

    def set_mode(self) -> None:
        """Gives the frozen modules their mode, after ``train()`` of the model."""
        for module in self._evaluated:
            module.training = False

    def thaw(self) -> None:
        """Lets the frozen parameters ask for gradients again."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)


def check_statistics(
    model: nn.Module,
    size: tuple[int, int],
    *,
    batch: int,
    trained: Sequence[str] | None = None,
    bn: BatchNorm = "frozen",
) -> None:
    """Checks that batch norm has a variance in each batch, as of one image it may not have.

    Args:
        model: What is trained; it stays as it is.
        size: Height and width of the images.
        batch: Images that a process takes at once.
        trained: As of :class:`FrozenParts`; None trains all.
        bn: As there.

    Raises:
        UsageError: If a map of a single pixel is normalised over a single image.
    """
    of_each = 2 if takes_pairs(model) else 1
    if batch > of_each:
        return
    copied = copy.deepcopy(model)
    frozen = None if trained is None else FrozenParts(copied, trained, bn)
    copied.train()
    if frozen is not None:
        frozen.set_mode()
    weight = next(model.parameters())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            copied(weight.new_zeros(of_each, 3, *size))
        except ValueError as error:
            raise UsageError(
                f"batch norm cannot normalise over {batch} images in a process's batch"
                f"{', one for each branch' if of_each > 1 else ''} ({error}): take a larger "
                "batch_size, or fewer processes or accumulation_steps"
            ) from error


def _modules(model: nn.Module, trained: Sequence[str]) -> list[nn.Module]:
    """Returns the modules of some paths, and the classifiers."""
    if isinstance(trained, str):
        raise UsageError(f"trained must be a list of modules, got {trained!r}: put it in brackets")
    modules = dict(model.named_modules())
    chosen: list[nn.Module] = list(find_classifiers(model).values())
    for given in trained:
        name = last_block(model) if given == LAST_BLOCK and given not in modules else given
        if not name or name not in modules:
            raise unknown_name("module in trained:", name, _nearest(modules, name))
        if not any(True for _ in modules[name].parameters()):
            raise UsageError(f"module {name!r} in trained has no parameters: leave it out")
        chosen.append(modules[name])
    return chosen


def _nearest(modules: Mapping[str, nn.Module], name: str) -> list[str]:
    """Returns the paths of the modules in the last one that a wrong path gets right."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    start = f"{name}." if name else ""
    return [f"{start}{child}" for child, _ in modules[name].named_children()] or [name]


def _beside(model: nn.Module, chosen: Sequence[nn.Module]) -> list[nn.Module]:
    """Returns the modules that are in none of the chosen ones, and have none of them inside."""
    inside = {id(part) for module in chosen for part in module.modules()}
    return [
        module
        for module in model.modules()
        if not any(id(part) in inside for part in module.modules())
    ]
