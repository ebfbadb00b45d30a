"""The model in training: its checks, frozen modules, and the last block of any architecture."""

import copy
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import nn

from timm_lt.checkpoint import is_statistic
from timm_lt.data.images import Images
from timm_lt.heads import Head, find_classifiers, get_head, get_heads
from timm_lt.models.networks import BilateralBlock, ModulatedAttention
from timm_lt.samplers import ClassSampler
from timm_lt.utils.checks import UsageError, check_choice, unknown_name, user_errors

BatchNorm = Literal["frozen", "shift"]
# Stands in a list of modules for the path that last_block finds.
LAST_BLOCK = "last_block"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def last_block(model: nn.Module) -> str:
    """Returns the path of the last block of a timm model's backbone, e.g. ``"layer4.1"``.

    timm's ``feature_info`` names the module of the last features: a stage, whose last block is
    returned, or a single layer, such as a norm, after the last block.
    """
    try:
        path = str(list(model.feature_info)[-1]["module"])  # type: ignore[arg-type]
        last = model.get_submodule(path)
    except (AttributeError, TypeError, LookupError) as error:
        raise _unknown(model, f"its feature_info names no module of it ({error})") from error
    if _is_block(last):
        return _innermost(model, path)
    place = path
    while place:
        parent, _, name = place.rpartition(".")
        names = [child for child, _ in model.get_submodule(parent).named_children()]
        for before in reversed(names[: names.index(name)]):
            candidate = f"{parent}.{before}".removeprefix(".")
            if _is_block(model.get_submodule(candidate)):
                return _innermost(model, candidate)
        place = parent
    raise _unknown(model, f"{path} and all before it are single layers")


def _unknown(model: nn.Module, reason: str) -> UsageError:
    return UsageError(
        f"the last block of {type(model).__name__} is unknown, since {reason}: name the modules in "
        f"trained, from {', '.join(name for name, _ in model.named_children())}"
    )


def _is_block(module: nn.Module) -> bool:
    """Returns whether a module has several layers with weight matrices, which norms lack."""
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
        no_attention = {k: m for k, m in children.items() if not isinstance(m, ModulatedAttention)}
        blocks = [name for name, child in no_attention.items() if _is_block(child)]
        alike = len({type(child) for child in children.values()}) == 1
        if not blocks or not (isinstance(module, CONTAINERS) or alike):
            return path
        path = f"{path}.{blocks[-1]}"


class FrozenParts:
    """Freezes a model except for some modules and its classifier.

    Frozen modules are in evaluation mode with ``bn="frozen"``. With ``bn="shift"`` they are in
    training mode, as in the code of Kang et al.: batch norm normalises by the batch, its running
    statistics move, and dropout is active. ``trained`` are the paths of the modules to train;
    ``"last_block"`` is the path from :func:`last_block`; None trains all.
    """

    def __init__(
        self, model: nn.Module, trained: Sequence[str] | None, bn: BatchNorm = "frozen"
    ) -> None:
        check_choice("bn", bn, get_args(BatchNorm))
        chosen = [model] if trained is None else _modules(model, trained)
        if bn == "shift" and (trained is None or not any(map(is_statistic, model.state_dict()))):
            reason = f"{type(model).__name__} has no batch-norm statistics"
            reason = "no modules are named in trained" if trained is None else reason
            raise UsageError(f"bn shift has no effect, since {reason}: remove it")
        parameters = {id(parameter) for module in chosen for parameter in module.parameters()}
        frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in parameters]
        for parameter in frozen:
            parameter.requires_grad_(False)
        self._parameters = frozen
        # Modules that stay in evaluation mode.
        self.evaluated = _beside(model, chosen) if bn == "frozen" else []

    def set_mode(self) -> None:
        """Gives the frozen modules their mode, after ``train()`` of the model."""
        for module in self.evaluated:
            module.training = False

    def thaw(self) -> None:
        """Lets the frozen parameters have gradients again."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)

    def try_batch(self, model: nn.Module, size: tuple[int, int], batch: int) -> None:
        """Passes the smallest batch, which batch norm may refuse, through a copy of the model."""
        each = 2 if takes_pairs(model) else 1
        if batch > each:
            return
        # One call, so that the copied parts are those of the copied model.
        model, parts = copy.deepcopy((model, self))
        model.train()
        parts.set_mode()
        images = next(model.parameters()).new_zeros(each, 3, *size)
        fault = f"batch norm cannot normalise over {batch} images in a process's batch"
        fault += ", one for each branch" if each > 1 else ""
        cure = "take a larger batch_size, or fewer processes or accumulation_steps"
        refused = user_errors(fault, ValueError, cure=cure)
        with refused, torch.random.fork_rng(devices=[]), torch.no_grad():
            model(images)


def _modules(model: nn.Module, trained: Sequence[str]) -> list[nn.Module]:
    """Returns the modules at some paths, and the classifiers."""
    modules = dict(model.named_modules())
    chosen: list[nn.Module] = list(find_classifiers(model).values())
    for given in trained:
        name = last_block(model) if given == LAST_BLOCK and given not in modules else given
        if not name or name not in modules:
            raise unknown_name("module in trained:", name, _nearest(modules, name))
        chosen.append(modules[name])
    return chosen


def _nearest(modules: Mapping[str, nn.Module], name: str) -> list[str]:
    """Returns the children of the deepest module on a wrong path that exists."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    start = f"{name}." if name else ""
    return [f"{start}{child}" for child, _ in modules[name].named_children()] or [name]


def _beside(model: nn.Module, chosen: Sequence[nn.Module]) -> list[nn.Module]:
    """Returns the modules that are not in a chosen one and do not contain one."""
    inside = {id(part) for module in chosen for part in module.modules()}
    return [m for m in model.modules() if not any(id(part) in inside for part in m.modules())]


def start_classifier(loss: nn.Module, model: nn.Module, num_classes: int) -> None:
    """Gives a fresh classifier the bias that the loss starts with, if it has one."""
    value = getattr(loss, "initial_bias", lambda _: None)(num_classes)
    if value is not None:
        for classifier in find_classifiers(model).values():
            if classifier.bias is not None:
                nn.init.constant_(classifier.bias, value)


def check_model(model: nn.Module, images: Images) -> None:
    """Checks that a model takes images of this size, and that its head, if any, can be folded."""
    classifier, size = get_head(model), (3, *images.size)
    refusals = (UsageError, RuntimeError, AssertionError)
    with user_errors(f"the model cannot be trained on images of size {size}", *refusals):
        if isinstance(classifier, Head):
            classifier.fold()
        with torch.inference_mode():
            model.eval()(next(model.parameters()).new_zeros(1, *size))


def takes_pairs(model: nn.Module) -> bool:
    """Returns whether the rows of a batch are pairs for a model in training mode."""
    return any(isinstance(m, BilateralBlock) and m.paired for m in model.modules())


def check_loss(loss: nn.Module, model: nn.Module, sampler: ClassSampler, epochs: int) -> None:
    """Checks that a loss fits the model, the sampler and the number of epochs."""
    if (set_epoch := getattr(loss, "set_epoch", None)) is not None:
        set_epoch(0, epochs)
    check_classifier = getattr(loss, "check_classifier", None)
    # Only timm's models tell which module is the classifier.
    if check_classifier is not None and hasattr(model, "get_classifier"):
        for classifier in get_heads(model).values():
            check_classifier(classifier)
    bilateral = {
        "model": takes_pairs(model),
        "sampler": getattr(sampler, "unit", 1) > 1,
        "loss": getattr(loss, "takes_pairs", False),
    }
    if not any(bilateral.values()):
        return
    # Mixed logits are those of mixed features for a linear classifier only.
    bilateral["linear classifier"] = getattr(get_head(model), "kind", "linear") == "linear"
    missing = ", ".join(name for name, is_one in bilateral.items() if not is_one)
    if missing:
        raise UsageError(
            f"not bilateral: {missing}; BBN is trained with all of: a model lt_bbn_* (or from "
            "create_bilateral) with a linear classifier, sampler bilateral and loss bilateral"
        )
