"""The last block of a backbone: what is trained beside the classifier, on any architecture."""

from collections.abc import Iterable

from torch import nn

from timm_lt.models.attention import ModulatedAttention
from timm_lt.models.bilateral import BilateralBlock
from timm_lt.utils.checks import UsageError

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
