"""Finding the classifiers of a timm model, one or several, and replacing them by heads."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from timm_lt.heads.base import HEADS, Head, as_linear, is_pointwise
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import check_class_counts

Classifier = nn.Linear | nn.Conv2d


def find_classifiers(model: nn.Module) -> dict[str, Classifier]:
    """Returns a model's classifiers by path, e.g. ``{"head": ..., "head_dist": ...}``.

    Raises:
        UsageError: If there is none, or it is neither linear nor a 1×1 convolution.

    >>> import timm
    >>> list(find_classifiers(timm.create_model("test_resnet")))
    ['fc']
    """
    main = _main_classifiers(model)
    if not main:
        kinds = [type(root).__name__ for root in _classifier_roots(model)]
        raise UsageError(
            f"{type(model).__name__} has no classifier that a head can replace: found "
            f"{', '.join(kinds) or 'no get_classifier method'}, expected nn.Linear or a 1×1 "
            "convolution; create a timm model with num_classes >= 1"
        )
    # The configuration of VOLO also names an auxiliary classifier.
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = {named} if isinstance(named, str) else set(named)
    return {
        path: module
        for path, module in model.named_modules()
        if id(module) in main or (path in names and is_classifier(module))
    }


def _classifier_roots(model: nn.Module) -> list[Any]:
    """Returns the parts of what a model's ``get_classifier`` returns; empty if it has none."""
    return _as_modules(getattr(model, "get_classifier", tuple)())


def _main_classifiers(model: nn.Module) -> set[int]:
    """Returns the ids of the linear modules in a model's ``get_classifier()``."""
    num_classes = getattr(model, "num_classes", None)
    leaves = [_linear_leaves(root, num_classes) for root in _classifier_roots(model)]
    return set(map(id, itertools.chain(*leaves)))


def is_classifier(module: object) -> bool:
    """Tells whether a head can replace a module."""
    return isinstance(module, nn.Linear) or is_pointwise(module)


def _as_modules(classifier: object) -> list[Any]:
    """Flattens nested lists of modules."""
    if isinstance(classifier, list | tuple | nn.ModuleList):
        return [module for part in classifier for module in _as_modules(part)]
    return [classifier]


def _linear_leaves(module: nn.Module, num_classes: int | None) -> Iterator[nn.Module]:
    """Yields the last linear module of each branch of a classifier; none of a non-module."""
    if is_classifier(module):
        yield module
    elif isinstance(module, nn.Module):
        last = []
        for child in module.children():
            if not is_classifier(child):
                yield from _linear_leaves(child, num_classes)
            elif num_classes in (None, as_linear(child).out_features):  # type: ignore[arg-type]
                # The hidden layer of an MLP comes before its output.
                last = [child]
        yield from last


def as_joint(classifier: nn.Module | Sequence[nn.Module]) -> nn.Linear:
    """Returns the only linear classifier in a model's ``get_classifier()`` as ``nn.Linear`` (C, D).

    >>> as_joint(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3)))
    Linear(in_features=8, out_features=3, bias=True)
    """
    leaves = [leaf for module in _as_modules(classifier) for leaf in _linear_leaves(module, None)]
    if len(leaves) != 1:
        raise UsageError(
            "classifier= takes a module with one linear classifier, such as "
            f"model.get_classifier(); got {type(classifier).__name__} with {len(leaves)}"
        )
    return as_linear(leaves[0])  # type: ignore[arg-type]


def classifier_name(model: nn.Module) -> str:
    """Returns the path of a model's only classifier, e.g. ``"fc"`` or ``"head.fc"``."""
    names = list(find_classifiers(model))
    if len(names) > 1:
        raise UsageError(
            f"{type(model).__name__} has {len(names)} classifiers ({', '.join(names)}), but one is "
            "needed; set their heads by path, with timm_lt.set_head(model, {path: head, ...})"
        )
    return names[0]


def get_head(model: nn.Module) -> nn.Linear:
    """Returns a model's only classifier: a head, or timm's own as an ``nn.Linear``.

    A 1×1 convolution is returned as an ``nn.Linear`` with the same memory.
    """
    return as_linear(find_classifiers(model)[classifier_name(model)])


def get_heads(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns a model's classifiers by path, each as :func:`get_head` returns it."""
    return {path: as_linear(module) for path, module in find_classifiers(model).items()}


def put_heads(model: nn.Module, heads: Mapping[str, Classifier]) -> None:
    """Replaces a model's classifiers by path; ``reset_classifier`` keeps the kinds of the heads."""
    for path, head in heads.items():
        model.set_submodule(path, head)
    main = _main_classifiers(model)
    create = {}
    for path, head in heads.items():
        if isinstance(head, Head):
            head.auxiliary = id(head) not in main
            create[path] = functools.partial(head.from_classifier, **head.options())
    # A compiled model passes attributes on to the one inside of it.
    model = getattr(model, "_orig_mod", model)
    model.__dict__.pop("reset_classifier", None)
    if create:
        # A partial on the instance survives deepcopy and pickle, a closure would not.
        model.reset_classifier = functools.partial(_reset_classifier, model, create)


def _reset_classifier(
    model: nn.Module,
    create: Mapping[str, Callable[[Classifier], Head]],
    num_classes: int,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Calls timm's ``reset_classifier``, then puts heads on the new classifiers."""
    type(model).reset_classifier(model, num_classes, *args, **kwargs)  # type: ignore[attr-defined]
    if num_classes > 0:
        first = next(iter(create.values()))
        new = find_classifiers(model)
        put_heads(model, {path: create.get(path, first)(new[path]) for path in new})


def set_head(
    model: nn.Module, head: str | Classifier | Mapping[str, Classifier], **options: Any
) -> nn.Module:
    """Puts a head on a model, in place.

    A head given by name starts from the weights of the present classifier: ``tau_norm`` and
    ``logit_adjusted`` can be used at once; ``lws`` and ``ncm`` must be fitted first and passed as a
    module. In a model with several classifiers (distilled, multi-scale) each gets the named head.

    Args:
        model: A timm model whose classifier has an ``nn.Linear`` or a 1×1 convolution (C, D).
        head: Name of a head; or a fitted head (or any ``nn.Linear``) of the same shape; or such
            modules by path, one for each classifier.
        **options: Options of the named head.

    Returns:
        The same model.

    Raises:
        UsageError: For an unknown head or option, a model without a linear classifier, a head of
            another shape, or one whose batch-norm statistics are not the model's.

    >>> import timm
    >>> model = timm.create_model("test_resnet", num_classes=3)
    >>> set_head(model, "tau_norm", tau=0.7).get_classifier()
    TauNormHead(in_features=96, out_features=3, bias=True, tau=0.7, keep_bias=False)
    """
    present = find_classifiers(model)
    if isinstance(head, str):
        if options.get("class_counts") is not None:
            num_classes = as_linear(next(iter(present.values()))).out_features
            names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ()
            counts = check_class_counts(options["class_counts"], num_classes, names)
            options["class_counts"] = counts
        for old in present.values():
            _check_statistics(old, fits="weight" in getattr(old, "own_state", ()))
        create = HEADS[head].from_classifier
        put_heads(model, {path: create(old, **options) for path, old in present.items()})
        return model
    if options:
        raise UsageError(
            f"options {sorted(options)} belong to a head given by name, not to a fitted head"
        )
    given = dict(head) if isinstance(head, Mapping) else {classifier_name(model): head}
    if set(given) != set(present):
        raise UsageError(
            f"{type(model).__name__} has the classifiers {', '.join(present)}, got heads for "
            f"{', '.join(map(str, given)) or 'none'}"
        )
    statistics = statistics_of(given.values(), model)
    put_heads(model, {path: _replacement(path, present[path], new) for path, new in given.items()})
    model.load_state_dict(statistics, strict=False)
    return model


def _replacement(path: str, old: Classifier, new: Classifier) -> Classifier:
    """Returns a classifier with the device, type, mode and form of the one that it replaces."""
    if not is_classifier(new):
        raise UsageError(f"a head is a name or an nn.Linear, got {type(new).__name__}")
    shapes = [tuple(as_linear(part).weight.shape) for part in (new, old)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"the head is {shapes[0]} (classes, features) but classifier {path!r} is {shapes[1]}"
        )
    _check_statistics(old, fits=bool(getattr(new, "backbone_statistics", None)))
    spatial = old.spatial if isinstance(old, Head) else is_pointwise(old)
    if isinstance(new, Head):
        new.spatial = spatial
    elif spatial != is_pointwise(new):
        plain = HEADS["linear"].from_classifier(new)
        plain.spatial = spatial
        new = plain.fold()
    uses_bias = getattr(new, "uses_bias", True)
    if new.bias is None and old.bias is not None:
        # timm loads strictly, so the key must exist.
        zeros = new.weight.new_zeros(len(new.weight))
        learned = new.weight.requires_grad and uses_bias
        new.register_parameter("bias", nn.Parameter(zeros, learned))
    elif new.bias is not None and old.bias is None and not (uses_bias and new.bias.any()):
        new.register_parameter("bias", None)
    return new.to(old.weight.device, old.weight.dtype).train(old.training)


def fold_head(model: nn.Module) -> nn.Module:
    """Replaces the model's heads by plain classifiers with the same predictions, in place.

    Each becomes an ``nn.Linear`` or a 1×1 convolution, as in timm, with a bias of zeros if the head
    has none. The state dict loads strictly into timm's own model. Returns the same model.

    Raises:
        UsageError: If a head is not fitted, or not linear in the features.

    >>> import timm
    >>> model = set_head(timm.create_model("test_resnet", num_classes=3), "tau_norm")
    >>> fold_head(model).get_classifier()
    Linear(in_features=96, out_features=3, bias=True)
    """
    heads = find_classifiers(model)
    folded = {path: old.fold() if isinstance(old, Head) else old for path, old in heads.items()}
    put_heads(model, folded)
    return model


def _check_statistics(old: Classifier, *, fits: bool) -> None:
    """Refuses to replace a head that changed the backbone, unless the new one fits the change."""
    if isinstance(old, Head) and old.backbone_statistics and not fits:
        raise UsageError(
            f"the batch-norm statistics of the backbone are those of its {old.kind} head, and "
            "another head does not fit them; create the model again"
        )


def statistics_of(heads: Iterable[nn.Module], model: nn.Module) -> dict[str, Tensor]:
    """Returns the batch-norm statistics of heads, which must be the model's and the same."""
    state = model.state_dict()
    statistics: dict[str, Tensor] = {}
    for head in heads:
        for key, value in (getattr(head, "backbone_statistics", None) or {}).items():
            if key not in state or state[key].shape != value.shape:
                raise UsageError(
                    f"the head's batch-norm statistics are not the model's: {type(model).__name__} "
                    f"has no {key} of shape {tuple(value.shape)}"
                )
            if key in statistics and not torch.equal(statistics[key], value):
                raise UsageError(
                    f"the heads have different batch-norm statistics, for instance {key}; choose "
                    "heads that were trained with the same"
                )
            statistics[key] = value
    return statistics


@contextmanager
def head_statistics(model: nn.Module, head: nn.Module) -> Iterator[nn.Module]:
    """Gives a model the batch-norm statistics of a head while the block runs.

    Extract the features of a head with ``backbone_statistics`` inside the block. The head is not
    put on the model.
    """
    statistics = statistics_of([head], model)
    state = model.state_dict()
    own = {key: state[key].clone() for key in statistics}
    model.load_state_dict(statistics, strict=False)
    try:
        yield model
    finally:
        model.load_state_dict(own, strict=False)
