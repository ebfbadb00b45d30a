"""Heads on models: finding a timm model's classifiers and putting others in their place.

Most architectures have one ``nn.Linear``. Some wrap it in a module, some have a 1×1 convolution
instead, and distilled and multi-scale ones have several classifiers, whose logits they combine.

Batch-norm statistics that belong to a head: those with which its classifier was trained.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from timm_lt.heads.base import HEADS, Head, as_linear, is_pointwise
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import check_class_counts


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


Classifier = nn.Linear | nn.Conv2d


class NoClassifierError(UsageError, TypeError):
    """A model has no linear classifier that a head could replace."""


def find_classifiers(model: nn.Module) -> dict[str, Classifier]:
    """Returns a model's classifiers by path, e.g. ``{"head": ..., "head_dist": ...}``.

    Raises:
        NoClassifierError: If there is none, or it is neither linear nor a 1×1 convolution.

    >>> import timm
    >>> list(find_classifiers(timm.create_model("test_resnet")))
    ['fc']
    """
    kind = type(model).__name__
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        raise NoClassifierError(
            f"{kind} has no classifier to put a head on (no get_classifier method)"
        )
    roots = _as_modules(get_classifier())
    num_classes = getattr(model, "num_classes", None)
    leaves = _main_classifiers(model)
    if not leaves:
        found = ", ".join(type(root).__name__ for root in roots)
        absent = num_classes == 0 or all(isinstance(root, nn.Identity) for root in roots)
        raise NoClassifierError(
            f"the classifier of {kind} is {found}; a head replaces an nn.Linear or a 1×1 "
            f"convolution{' (create the model with num_classes >= 1)' if absent else ''}"
        )
    # A configuration may name more classifiers: VOLO adds the logits of an auxiliary one.
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = {named} if isinstance(named, str) else set(named)
    return {
        path: module
        for path, module in model.named_modules()
        if id(module) in leaves or (path in names and is_classifier(module))
    }


def _main_classifiers(model: Any) -> set[int]:  # noqa: ANN401
    """Returns the ids of the classifiers that a model's ``get_classifier`` gives."""
    num_classes = getattr(model, "num_classes", None)
    roots = _as_modules(model.get_classifier())
    return {id(leaf) for root in roots for leaf in _linear_leaves(root, num_classes)}


def is_classifier(module: object) -> bool:
    """Returns whether a module is one that a head can replace."""
    return isinstance(module, nn.Linear) or is_pointwise(module)


def _as_modules(classifier: object) -> list[Any]:
    """Returns the parts of nested lists of modules; what is neither stays, to be refused."""
    if isinstance(classifier, list | tuple | nn.ModuleList):
        return [module for part in classifier for module in _as_modules(part)]
    return [classifier]


def _linear_leaves(module: nn.Module, num_classes: int | None) -> Iterator[nn.Module]:
    """Yields the last linear module of each branch of a classifier; of what is no module, none."""
    if is_classifier(module):
        yield module
    if is_classifier(module) or not isinstance(module, nn.Module):
        return
    last = None
    for child in module.children():
        if not is_classifier(child):
            yield from _linear_leaves(child, num_classes)
        elif num_classes in (None, as_linear(child).out_features):  # type: ignore[arg-type]
            # The hidden layer of an MLP comes before its output.
            last = child
    if last is not None:
        yield last


def as_joint(classifier: nn.Module | Sequence[nn.Module]) -> nn.Linear:
    """Returns what a model's ``get_classifier()`` gives as the one ``nn.Linear`` (C, D) that it is.

    A module around it is left out, a 1×1 convolution is viewed as one.

    Raises:
        UsageError: If it is neither a module nor a list, tuple or ``nn.ModuleList`` of modules, or
            there is no linear classifier in it, or several.

    >>> as_joint(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3)))
    Linear(in_features=8, out_features=3, bias=True)
    """
    modules = _as_modules(classifier)
    for module in modules:
        if not isinstance(module, nn.Module):
            raise UsageError(
                "classifier= takes a module, such as model.get_classifier(), got "
                f"{type(module).__name__} {module!r}"
            )
    leaves = [leaf for module in modules for leaf in _linear_leaves(module, None)]
    if len(leaves) != 1:
        kinds = ", ".join(type(module).__name__ for module in modules)
        raise UsageError(
            f"classifier= takes one linear classifier, got {kinds} with {len(leaves)}; of several, "
            "pass one at a time"
        )
    return as_linear(leaves[0])  # type: ignore[arg-type]


def classifier_name(model: nn.Module) -> str:
    """Returns the path of a model's only classifier, e.g. ``"fc"`` or ``"head.fc"``.

    Raises:
        UsageError: If the model has no linear classifier, or several.
    """
    names = list(find_classifiers(model))
    if len(names) > 1:
        raise UsageError(
            f"{type(model).__name__} has {len(names)} classifiers ({', '.join(names)}) where one "
            "is needed; heads go on them by path, with timm_lt.set_head(model, {path: head, ...})"
        )
    return names[0]


def get_head(model: nn.Module) -> nn.Linear:
    """Returns a model's only classifier: one of our heads, or timm's own as an ``nn.Linear``.

    For a 1×1 convolution that is a view of it, with the same memory.

    Raises:
        UsageError: If the model has no linear classifier, or several.
    """
    return as_linear(find_classifiers(model)[classifier_name(model)])


def get_heads(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns a model's classifiers by path, each as :func:`get_head` returns it."""
    return {path: as_linear(module) for path, module in find_classifiers(model).items()}


def put_heads(model: nn.Module, heads: Mapping[str, Classifier]) -> None:
    """Replaces a model's classifiers and makes the kinds of heads survive ``reset_classifier``.

    Args:
        model: The model.
        heads: The new classifiers by path.
    """
    for path, head in heads.items():
        model.set_submodule(path, head)
    main = _main_classifiers(model)
    for head in heads.values():
        if isinstance(head, Head):
            head.auxiliary = id(head) not in main
    kept = {path: head for path, head in heads.items() if isinstance(head, Head)}
    remember_heads(model, {path: (head.kind, head.options()) for path, head in kept.items()})


def remember_heads(model: nn.Module, heads: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
    """Makes ``reset_classifier`` put heads on the new classifiers.

    Args:
        model: The model.
        heads: Kind and options by path of the classifier; a path that is not there gets the first.
            Empty makes the method timm's own again.
    """
    # A compiled model hands on to the one inside of it.
    model = getattr(model, "_orig_mod", model)
    model.__dict__.pop("reset_classifier", None)
    if heads:
        # A partial on the instance survives deepcopy and pickle, a closure would not.
        model.reset_classifier = functools.partial(_reset_classifier, model, dict(heads))


def _reset_classifier(
    model: nn.Module,
    heads: dict[str, tuple[str, dict[str, Any]]],
    num_classes: int,
    *args: Any,
    **kwargs: Any,
) -> None:
    type(model).reset_classifier(model, num_classes, *args, **kwargs)  # type: ignore[attr-defined]
    if num_classes > 0:
        first = next(iter(heads.values()))
        fresh = {}
        for path, classifier in find_classifiers(model).items():
            kind, options = heads.get(path, first)
            fresh[path] = HEADS[kind].from_classifier(classifier, **options)
        put_heads(model, fresh)


def set_head(
    model: nn.Module, head: str | Classifier | Mapping[str, Classifier], **options: Any
) -> nn.Module:
    """Puts a head on a model, in place.

    A head given by name starts from the weights of the present classifier, so ``tau_norm`` and
    ``logit_adjusted`` work at once; ``lws`` and ``ncm`` must be fitted first and passed as a
    module. A model with several classifiers (distilled, multi-scale) gets the named head on each;
    fitted ones are passed by the paths of the classifiers.

    Args:
        model: A timm model with a classifier (C, D): an ``nn.Linear``, alone or inside of a module,
            or a 1×1 convolution.
        head: Name of a head; or a fitted head (or any ``nn.Linear``) of the same shape; or such
            modules by path, one for each classifier.
        **options: Options of the named head.

    Returns:
        The same model.

    Raises:
        UsageError: For an unknown head or option, a head of another shape, or one whose batch-norm
            statistics are not the model's.
        NoClassifierError: A UsageError and TypeError, for a model without a linear classifier.

    >>> import timm
    >>> model = timm.create_model("test_resnet", num_classes=3)
    >>> set_head(model, "tau_norm", tau=0.7).get_classifier()
    TauNormHead(in_features=96, out_features=3, bias=True, tau=0.7, keep_bias=False)
    """
    present = find_classifiers(model)
    if options.get("class_counts") is not None:
        # Names of the classes are known of some models.
        names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
        num_classes = as_linear(next(iter(present.values()))).out_features
        names = names if names and len(names) == num_classes else None
        options["class_counts"] = check_class_counts(options["class_counts"], num_classes, names)
    if isinstance(head, str):
        cls = HEADS[head]
        for old in present.values():
            if isinstance(old, Head) and "weight" not in old.own_state:
                check_statistics_stay(old)
        put_heads(
            model, {path: cls.from_classifier(old, **options) for path, old in present.items()}
        )
        return model
    if options:
        raise UsageError(
            f"options {sorted(options)} go with the name of a head, not with a fitted head"
        )
    given = dict(head) if isinstance(head, Mapping) else {classifier_name(model): head}
    if set(given) != set(present):
        raise UsageError(
            f"{type(model).__name__} has the classifiers {', '.join(present)}, got heads for "
            f"{', '.join(map(str, given)) or 'none'}"
        )
    for path, new in given.items():
        _check_replacement(path, new, present[path])
    statistics = statistics_of(given.values(), model)
    for path, new in given.items():
        given[path] = _in_place_of(present[path], new)
    put_heads(model, given)
    model.load_state_dict(statistics, strict=False)
    return model


def _check_replacement(path: str, new: object, old: Classifier) -> None:
    if not isinstance(new, nn.Module) or not is_classifier(new):
        raise UsageError(f"a head is a name or an nn.Linear, got {type(new).__name__}")
    shapes = [tuple(as_linear(part).weight.shape) for part in (new, old)]  # type: ignore[arg-type]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"the head is {shapes[0]} (classes, features) but the model's classifier {path!r} is "
            f"{shapes[1]}"
        )
    if isinstance(old, Head) and not getattr(new, "backbone_statistics", None):
        check_statistics_stay(old)


def _in_place_of(old: Classifier, new: Classifier) -> Classifier:
    """Returns a classifier with the device, type, mode and form of the one that it replaces."""
    spatial = old.spatial if isinstance(old, Head) else is_pointwise(old)
    if isinstance(new, Head):
        new.spatial = spatial
    elif spatial != is_pointwise(new):
        plain = HEADS["linear"].from_classifier(new)
        plain.spatial = spatial
        new = plain.fold()
    if new.bias is None and old.bias is not None:
        # The key must be there, for timm loads strictly.
        learned = new.weight.requires_grad and getattr(new, "uses_bias", True)
        zeros = new.weight.new_zeros(len(new.weight))
        new.register_parameter("bias", nn.Parameter(zeros, learned))
    elif new.bias is not None and old.bias is None and not _needs_bias(new):
        new.register_parameter("bias", None)
    return new.to(old.weight.device, old.weight.dtype).train(old.training)


def _needs_bias(classifier: Classifier) -> bool:
    """Returns whether the logits change without the bias."""
    used = not isinstance(classifier, Head) or classifier.uses_bias
    return used and bool(classifier.bias is not None and classifier.bias.any())


def fold_head(model: nn.Module) -> nn.Module:
    """Replaces the model's heads by plain classifiers with the same predictions, in place.

    Each becomes what stood there before it: an ``nn.Linear`` or a 1×1 convolution, with a bias of
    zeros where the head has none. The state dict loads strictly into timm's own model.

    Returns:
        The same model; its ``reset_classifier`` is timm's own again.

    Raises:
        UsageError: If a head is not fitted yet, or not linear in the features; nothing is replaced
            then.

    >>> import timm
    >>> model = set_head(timm.create_model("test_resnet", num_classes=3), "tau_norm")
    >>> fold_head(model).get_classifier()
    Linear(in_features=96, out_features=3, bias=True)
    """
    heads = find_classifiers(model)
    put_heads(
        model,
        {path: head.fold() if isinstance(head, Head) else head for path, head in heads.items()},
    )
    return model
