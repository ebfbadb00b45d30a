"""Heads on models: finding a timm model's classifier and putting another one in its place."""

import functools
from typing import Any

from torch import nn

from timm_lt.heads.base import HEADS, Head, create_head
from timm_lt.registry import UsageError


def classifier_name(model: nn.Module) -> str:
    """Returns the path of the model's classifier, e.g. ``"fc"`` or ``"head.fc"``.

    Raises:
        UsageError: If the model has no classifier, or one that is not a plain ``nn.Linear``.
    """
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        raise UsageError(
            f"{type(model).__name__} has no classifier to put a head on (no get_classifier method)"
        )
    classifier = get_classifier()
    if not isinstance(classifier, nn.Linear):
        absent = isinstance(classifier, nn.Identity)
        raise UsageError(
            f"the classifier of {type(model).__name__} is {type(classifier).__name__}; a head "
            f"replaces an nn.Linear{' (create the model with num_classes >= 1)' if absent else ''}"
        )
    # The attribute's name differs between architectures; the object does not.
    return next(str(name) for name, module in model.named_modules() if module is classifier)


def get_head(model: nn.Module) -> nn.Linear:
    """Returns the model's classifier: one of our heads, or timm's own ``nn.Linear``."""
    classifier = model.get_submodule(classifier_name(model))
    assert isinstance(classifier, nn.Linear)
    return classifier


def put_head(model: nn.Module, head: nn.Linear) -> None:
    """Replaces the model's classifier and makes the head's kind survive ``reset_classifier``."""
    model.set_submodule(classifier_name(model), head)
    # Undo an earlier stickiness: the class's own method shows again.
    model.__dict__.pop("reset_classifier", None)
    if isinstance(head, Head):
        # A partial on the instance survives deepcopy and pickle, a closure would not.
        model.reset_classifier = functools.partial(  # type: ignore[assignment]
            _reset_classifier, model, head.kind, head.options()
        )


def _reset_classifier(
    model: nn.Module,
    kind: str,
    options: dict[str, Any],
    num_classes: int,
    *args: Any,
    **kwargs: Any,
) -> None:
    type(model).reset_classifier(model, num_classes, *args, **kwargs)  # type: ignore[attr-defined]
    if num_classes > 0:
        fresh = get_head(model)
        head = create_head(
            kind,
            fresh.in_features,
            fresh.out_features,
            bias=fresh.bias is not None,
            device=fresh.weight.device,
            dtype=fresh.weight.dtype,
            **options,
        )
        put_head(model, head.train(model.training))


def set_head(model: nn.Module, head: str | nn.Linear, **options: Any) -> nn.Module:
    """Puts a head on a model, in place.

    A head given by name starts from the weights of the present classifier, so ``tau_norm`` and
    ``logit_adjusted`` work at once; ``lws`` and ``ncm`` must be fitted first and passed as a
    module.

    Args:
        model: A timm model with an ``nn.Linear`` classifier (C, D).
        head: Name of a head, or a fitted head (or any ``nn.Linear``) of the same shape.
        **options: Options of the named head.

    Returns:
        The same model.

    Raises:
        UsageError: For an unknown head or option, a head of another shape, or a model without a
            linear classifier.

    >>> import timm
    >>> model = timm.create_model("test_resnet", num_classes=3)
    >>> set_head(model, "tau_norm", tau=0.7).get_classifier()
    TauNormHead(in_features=96, out_features=3, bias=True, tau=0.7, keep_bias=False)
    """
    present = get_head(model)
    if isinstance(head, str):
        new: nn.Linear = HEADS[head].from_classifier(present, **options)
    elif options:
        raise UsageError(
            f"options {sorted(options)} go with the name of a head, not with a fitted head"
        )
    elif not isinstance(head, nn.Linear):
        raise UsageError(f"a head is a name or an nn.Linear, got {type(head).__name__}")
    else:
        new = head
    if new.weight.shape != present.weight.shape:
        raise UsageError(
            f"the head is {tuple(new.weight.shape)} (classes, features) but the model's "
            f"classifier is {tuple(present.weight.shape)}"
        )
    weight = present.weight
    put_head(model, new.to(weight.device, weight.dtype).train(model.training))
    return model


def fold_head(model: nn.Module) -> nn.Module:
    """Replaces the model's head by a plain ``nn.Linear`` with the same predictions, in place.

    Returns:
        The same model; its ``reset_classifier`` is timm's own again.

    Raises:
        UsageError: If the head is not fitted yet, or not linear in the features.

    >>> import timm
    >>> model = set_head(timm.create_model("test_resnet", num_classes=3), "tau_norm")
    >>> fold_head(model).get_classifier()
    Linear(in_features=96, out_features=3, bias=False)
    """
    head = get_head(model)
    if isinstance(head, Head):
        put_head(model, head.fold())
    return model
