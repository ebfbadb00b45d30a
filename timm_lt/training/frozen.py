"""Training parts of a model: which ones, and what the frozen rest does meanwhile.

The last block of a backbone: what is trained beside the classifier, on any architecture.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import torch
from torch import nn

from timm_lt.checkpoint import is_statistic
from timm_lt.heads import find_classifiers
from timm_lt.models.networks import BilateralBlock, ModulatedAttention, takes_pairs
from timm_lt.training.head import BatchNorm
from timm_lt.utils.checks import UsageError, check_choice, unknown_name

# In the list of modules that are trained: the path that last_block finds.
LAST_BLOCK = "last_block"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def last_block(model: nn.Module) -> str:
    """Returns the path of the last block of a timm model's backbone, e.g. ``"layer4.1"``.

    timm's ``feature_info`` names the module that gives the last features. Where that is a stage,
    its last block is taken. Where it is a single layer, such as the norm or the 1×1 convolution
    that some architectures have at the end, it is the last block before it; a block has two layers
    with a weight matrix or more.

    Args:
        model: A timm model.

    Raises:
        UsageError: If its ``feature_info`` is missing, names no module that the model has, or there
            is no block.

    >>> import timm
    >>> last_block(timm.create_model("test_resnet"))
    'layer4.0'
    """
    path = _last_features(model)
    place = path
    if _is_block(model.get_submodule(path)):
        return _innermost(model, path)
    while place:
        parent, _, name = place.rpartition(".")
        names = [child for child, _ in model.get_submodule(parent).named_children()]
        for before in reversed(names[: names.index(name)]):
            candidate = f"{parent}.{before}".removeprefix(".")
            if _is_block(model.get_submodule(candidate)):
                return _innermost(model, candidate)
        place = parent
    raise _unknown(model, f"{path} and all before it are single layers")


def _last_features(model: nn.Module) -> str:
    """Returns the path of the module that gives the last features."""
    info = getattr(model, "feature_info", None)
    try:
        path = str(list(info)[-1]["module"])  # type: ignore[arg-type]
    except (TypeError, IndexError, KeyError) as error:
        raise _unknown(model, "it has no feature_info") from error
    if path not in dict(model.named_modules()):
        raise _unknown(model, f"its feature_info names {path}, which it does not have")
    return path


def _unknown(model: nn.Module, reason: str) -> UsageError:
    return UsageError(
        f"the last block of {type(model).__name__} is not known, since {reason}: name the modules "
        f"in trained, of {', '.join(name for name, _ in model.named_children())}"
    )


def _is_block(module: nn.Module) -> bool:
    """Returns whether a module has several layers with weights, which norms have not."""
    return sum(any(p.ndim > 1 for p in m.parameters(recurse=False)) for m in module.modules()) > 1


def _innermost(model: nn.Module, path: str) -> str:
    """Goes down from a stage, or a list of stages, to the last block in it."""
    while True:
        module = model.get_submodule(path)
        if isinstance(module, BilateralBlock):
            # Its branches are one block, and neither is last.
            return path
        if path.rpartition(".")[0].endswith("blocks") and not isinstance(module, CONTAINERS):
            return path
        children = dict(module.named_children())
        if isinstance(children.get("blocks"), CONTAINERS):
            path = f"{path}.blocks"
            continue
        blocks = [
            name
            for name, child in children.items()
            if _is_block(child) and not isinstance(child, ModulatedAttention)
        ]
        if not blocks or not (isinstance(module, CONTAINERS) or _are_alike(children.values())):
            return path
        path = f"{path}.{blocks[-1]}"


def _are_alike(modules: Iterable[nn.Module]) -> bool:
    """Returns whether modules are of one class, as the blocks of a stage that has nothing else."""
    return len({type(module) for module in modules}) == 1


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
            is the path that :func:`~timm_lt.training.frozen.last_block` finds.
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
