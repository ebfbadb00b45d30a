"""A model as a function from images to features, in float32 or in bfloat16."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Literal

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from timm_lt.heads import classifier_name, find_classifiers
from timm_lt.utils.checks import UsageError, unknown_name

ComputeDtype = Literal["float32", "bfloat16"]


class _BeforeClassifier(Exception):  # noqa: N818
    """Ends a forward pass just before the classifier, which may not be fitted yet."""


def chosen_classifier(model: nn.Module, name: str | None) -> str:
    """Returns the path of the classifier whose input is taken: the one given, or the only one.

    Raises:
        UsageError: If there is no such classifier, or none is named and there are several.
    """
    classifiers = find_classifiers(model)
    if name is None and len(classifiers) > 1:
        raise UsageError(
            f"{type(model).__name__} has {len(classifiers)} classifiers, each with features of its "
            f"own: pass classifier= with one of {', '.join(classifiers)}"
        )
    name = classifier_name(model) if name is None else name
    if name not in classifiers:
        raise unknown_name(f"classifier of {type(model).__name__}:", name, list(classifiers))
    return name


@contextmanager
def backbone(
    model: nn.Module, classifier: str, compute_dtype: ComputeDtype
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields a function from images (B, 3, H, W) to features (B, D), float32.

    Images get the type of the model's weights, so that a model in bfloat16, float16 or float64
    computes in it. Of a model that accelerate prepared, the mixed precision is off.
    Meanwhile the model is in evaluation mode; afterwards it is as it came, each module in its mode
    and each weight where it lay in memory.

    Args:
        model: A timm model.
        classifier: Path of the classifier whose input is taken.
        compute_dtype: ``"bfloat16"`` is autocast with the channels last in memory; what is pooled
            over the image is summed and kept in float32.

    Raises:
        UsageError: If the weights are float16 or float64 and ``compute_dtype`` is ``"bfloat16"``.
            By the function, if the model does not call its classifier, or calls it for more than
            one vector an image.
    """
    taken_from = find_classifiers(model)[classifier]
    device = taken_from.weight.device
    low = compute_dtype == "bfloat16"
    dtypes = (weight.dtype for weight in model.parameters() if weight.is_floating_point())
    dtype = next(dtypes, None)
    if low and dtype in (torch.float16, torch.float64):
        raise UsageError(
            f"compute_dtype='bfloat16' is for a model with float32 weights, and these are {dtype}: "
            "pass compute_dtype='float32', which then computes in the type of the weights"
        )
    taken: list[Tensor] = []

    def take(_: nn.Module, inputs: tuple[Tensor]) -> None:
        taken.append(inputs[0])
        raise _BeforeClassifier

    def features(images: Tensor) -> Tensor:
        images = images.to(device, dtype if images.is_floating_point() else None)
        if low and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with _autocast(device, enabled=low), contextlib.suppress(_BeforeClassifier):
            model(images)
        if not taken:
            raise UsageError(
                f"{type(model).__name__} computes its output without calling its classifier"
            )
        return as_rows(taken.pop(), taken_from).float()

    with ExitStack() as stack:
        stack.enter_context(_evaluation_mode(model))
        stack.enter_context(_own_precision(model))
        # Not forward_head(pre_logits=True): for some architectures that is not the classifier's
        # input.
        stack.callback(taken_from.register_forward_pre_hook(take).remove)
        # Of a caller's autocast, too. Within it, weights are cast once and not for each batch.
        stack.enter_context(_autocast(device, enabled=False))
        if low:
            stack.enter_context(_channels_last(model))
            for module in model.modules():
                if isinstance(module, SelectAdaptivePool2d | nn.AdaptiveAvgPool2d):
                    stack.callback(module.register_forward_pre_hook(_in_float32).remove)
        yield features


def _autocast(device: torch.device, *, enabled: bool) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _in_float32(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.float() for tensor in inputs)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    # Module by module: a part of a model in training may have been frozen in evaluation mode.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _own_precision(model: nn.Module) -> Iterator[None]:
    """Calls the ``forward`` that accelerate's mixed precision is wrapped around."""
    wrapped = [module for module in model.modules() if "_original_forward" in vars(module)]
    forwards = [vars(module).get("forward") for module in wrapped]
    try:
        for module in wrapped:
            vars(module)["forward"] = vars(module)["_original_forward"]
        yield
    finally:
        for module, forward in zip(wrapped, forwards, strict=True):
            vars(module)["forward"] = forward


@contextmanager
def _channels_last(model: nn.Module) -> Iterator[None]:
    """Has the weights of convolutions with the channels last in memory."""
    # Put back afterwards, not converted back: optimizers and others may share their memory.
    weights = [(weight, weight.data) for weight in model.parameters() if weight.ndim == 4]
    try:
        for weight, data in weights:
            weight.data = data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight, data in weights:
            weight.data = data


def as_rows(values: Tensor, classifier: nn.Module) -> Tensor:
    """Returns a classifier's input as (B, D); a 1×1 convolution's is (B, D, 1, 1)."""
    spatial = isinstance(classifier, nn.Conv2d) or getattr(classifier, "spatial", False)
    if spatial and values.shape[2:] == (1, 1):
        values = values.flatten(1)
    if values.ndim != 2:
        raise UsageError(
            f"the classifier's input has shape {tuple(values.shape)}, but features are one vector "
            "an image, (batch, width)"
        )
    return values
