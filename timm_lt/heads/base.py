"""Base class of classifier heads, and their registry.

A head has the keys ``weight`` and ``bias`` of the classifier that it replaces, and computes
``F.linear(head.transform(features), *head.effective())``.
"""

import functools
import inspect
import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.utils.checks import Registry, UsageError, check_options


def is_pointwise(module: object) -> bool:
    """Tells whether a module is a 1×1 convolution, the classifier of some models."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


def as_linear(classifier: nn.Linear | nn.Conv2d) -> nn.Linear:
    """Returns an ``nn.Linear`` unchanged, and a 1×1 convolution as one with the same memory."""
    if isinstance(classifier, nn.Linear):
        return classifier
    linear = nn.Linear(classifier.in_channels, classifier.out_channels, device="meta")
    weight = classifier.weight
    linear.weight = nn.Parameter(weight.detach().flatten(1), weight.requires_grad)
    linear.bias = classifier.bias  # type: ignore[assignment]
    return linear.train(classifier.training)


# Not a tuple, which TorchScript would take for an attribute to compile.
@dataclass(frozen=True, eq=False)
class _Cached:
    """Effective weights, and marks of the state that they were computed from."""

    marks: tuple[object, ...]
    weights: tuple[Tensor, Tensor | None]
    # The state and its memory, so that no other tensor can get the same id or address.
    references: tuple[Tensor, ...]


class Head(nn.Linear):
    """Base class of heads: an ``nn.Linear`` with a formula for its input and its weights.

    In evaluation mode the effective weights are cached until a parameter, a buffer or an option
    changes, so inference costs as much as with an ``nn.Linear``. A change through ``.data`` or
    NumPy is not noticed until ``train()`` or ``eval()`` is called or a gradient is needed.

    The arguments of ``nn.Linear`` come first; the options of a head are keyword-only.

    Attributes:
        spatial: Whether the head replaces a 1×1 convolution: features are (N, D, H, W), logits
            (N, C, H, W), and ``weight`` is (C, D, 1, 1) in the state dict.
        auxiliary: Whether the model adds the logits to those of its main classifier, as VOLO does.
            Logit adjustment is then applied to the main one only.
        uses_bias: Whether the logits depend on ``bias``, which timm expects in the state dict.
        backbone_statistics: Batch-norm statistics with which the head was trained, by key of the
            model's state dict, or None; :func:`timm_lt.set_head` copies them into the model.
        selection: How the options were selected, e.g. ``{"tau": 0.8, "split": "val"}``.

    Shape:
        - features: (N, D) or (..., D)
        - logits: (N, C) or (..., C)
    """

    kind: ClassVar[str]
    # State besides weight and bias. NaN marks it as not fitted, also in a state dict.
    fitted_state: ClassVar[tuple[str, ...]] = ()
    # State in a checkpoint; the rest follows from joint classifier, options and class counts.
    own_state: ClassVar[tuple[str, ...]] = ()
    # Options that cannot change once the head is fitted.
    fixed_options: ClassVar[tuple[str, ...]] = ()
    uses_bias: bool = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.spatial = self.auxiliary = False
        self.backbone_statistics: dict[str, Tensor] | None = None
        self.selection: dict[str, Any] = {}
        if not self.uses_bias:
            self._freeze(self.bias)

    @classmethod
    def from_classifier(cls, classifier: nn.Linear | nn.Conv2d, **options: Any) -> Self:
        """Creates the head from the weight and bias of a trained, joint classifier.

        Args:
            classifier: ``nn.Linear`` (C, D) or a 1×1 convolution (C, D, 1, 1).
            **options: Options of the head.

        Raises:
            UsageError: For a wrong option, or a fitted head whose weight is not a classifier's.
        """
        check_options(f"head {cls.kind!r}", cls, options)
        old = classifier if isinstance(classifier, Head) else None
        spatial = old.spatial if old else is_pointwise(classifier)
        if old and old.fitted_state and "weight" in old.own_state and old.is_fitted():
            raise UsageError(
                f"the weight of a fitted {old.kind!r} head is not a classifier that a "
                f"{cls.kind!r} head can start from; start from the joint classifier"
            )
        classifier = as_linear(classifier)
        weight, has_bias = classifier.weight, classifier.bias is not None
        size = (classifier.in_features, classifier.out_features, has_bias)
        # The initial weights are replaced: leave the global generators as they are.
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            head = cls(*size, weight.device, weight.dtype, **options)
        with torch.no_grad():
            head.weight.copy_(weight)
            if has_bias:
                head.bias.copy_(classifier.bias)
        head.spatial = spatial
        # The copied weight was trained with these statistics.
        head.backbone_statistics = getattr(classifier, "backbone_statistics", None)
        return head.train(classifier.training)

    def options(self) -> dict[str, Any]:
        """Returns the options that would create this head again, ready for JSON."""
        return {name: getattr(self, name) for name in _option_names(type(self))}

    def transform(self, features: Tensor) -> Tensor:
        """Maps features (..., D) to the space (..., D) in which the head is linear."""
        return features

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Returns the weight (C, D) and bias (C,) or None that act on transformed features."""
        return self.weight, self.bias

    def fold(self) -> nn.Linear | nn.Conv2d:
        """Returns a plain ``nn.Linear`` with the same argmax for every feature vector.

        The logits are the same too, up to rounding, unless the head normalises its input. A
        ``spatial`` head gives a 1×1 convolution. The state dict has the keys that timm expects: the
        bias is zeros if the head does not use the one of its classifier.

        Raises:
            UsageError: If the head is not linear in the features, even up to a positive factor.
        """
        self.check_fitted()
        weight, bias = self._folded()
        if bias is None and self.bias is not None:
            bias = torch.zeros_like(self.bias, dtype=weight.dtype)
        create: Callable[..., nn.Linear | nn.Conv2d] = nn.Linear
        if self.spatial:
            create = functools.partial(nn.Conv2d, kernel_size=1)
        # On the meta device: no memory, no random numbers.
        plain = create(self.in_features, self.out_features, bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.detach().view(plain.weight.shape).clone())
        plain.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return plain.train(self.training)

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        return self.effective()

    @torch.jit.unused
    def is_fitted(self) -> bool:
        """Returns whether all state is fitted; state on the meta device counts as fitted."""
        states = [getattr(self, name) for name in self.fitted_state]
        return not any(bool(torch.isnan(state).any()) for state in states if not state.is_meta)

    @torch.jit.unused
    def check_fitted(self) -> None:
        """Raises a UsageError that says how to fit the head if it is not fitted yet."""
        if not self.is_fitted():
            raise UsageError(self._unfitted_message())

    def _unfitted_message(self) -> str:
        return (
            f"head {self.kind!r} is not fitted yet: fit it with timm_lt.fit_head({self.kind!r}, "
            "features, ...) on extract_features(model, loader), or load a checkpoint that has it"
        )

    def forward(self, input: Tensor) -> Tensor:
        """Returns the logits (..., C) of features (..., D); (N, C, H, W) if ``spatial``."""
        if torch.jit.is_scripting() or torch.compiler.is_compiling():  # type: ignore[attr-defined]
            weight, bias = self.effective()
        else:
            weight, bias = self._cached_effective(input)
        if self.spatial:
            input = input.movedim(-3, -1)
        logits = F.linear(self.transform(input), weight, bias)
        return logits.movedim(-1, -3) if self.spatial else logits

    @torch.jit.unused
    def _cached_effective(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns ``effective()``, from the cache if nothing has changed since the last call."""
        every = (*self._parameters.values(), *self._buffers.values())
        state = tuple(tensor for tensor in every if tensor is not None)
        learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in state)
        # A trace would take the cache for a constant, or leave fake tensors and proxies in it.
        ordinary = type(input) in (Tensor, nn.Parameter)
        tracing = torch.jit.is_tracing() or not ordinary  # type: ignore[attr-defined,no-untyped-call]
        # A parametrised weight is computed from tensors in a submodule.
        off = self.training or learning or tracing or bool(self._modules)
        marks = None if off else _marks(state)
        if marks is None:
            # An optimizer may step next, and fused ones change no version.
            self.__dict__["_cached"] = None
            self.check_fitted()
            return self.effective()
        cached: _Cached | None = self.__dict__["_cached"]
        if cached is None or cached.marks != marks:
            self.check_fitted()
            # An inference tensor could not be used outside of inference mode afterwards.
            with torch.inference_mode(mode=False), torch.no_grad():
                weights = self.effective()
            references = (*state, *(tensor.detach() for tensor in state))
            cached = self.__dict__["_cached"] = _Cached(marks, weights, references)
        return cached.weights

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        # An option such as tau, or the mode.
        self.__dict__["_cached"] = None
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def _save_to_state_dict(
        self, destination: MutableMapping[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.spatial:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"][..., None, None]

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Tensor], prefix: str, *args: Any
    ) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if self.spatial and weight is not None and weight.shape[2:] == (1, 1):
            state_dict[f"{prefix}weight"] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Shows the options after what ``nn.Linear`` shows."""
        return ", ".join([super().extra_repr(), *(f"{k}={v!r}" for k, v in self.options().items())])

    def _set_unfitted(self, name: str, *size: int, learned: bool = False) -> None:
        """Registers state that is not fitted: a parameter if it is learned, otherwise a buffer."""
        state = torch.full(size, math.nan, device=self.weight.device, dtype=self.weight.dtype)
        if learned:
            self.register_parameter(name, nn.Parameter(state))
        else:
            self.register_buffer(name, state)

    def _freeze(self, *parameters: Tensor | None) -> None:
        # DistributedDataParallel fails if an unused parameter requires a gradient.
        for parameter in parameters:
            if parameter is not None:
                parameter.requires_grad_(False)


def _marks(state: tuple[Tensor, ...]) -> tuple[object, ...] | None:
    """Returns values that change when a tensor is written to; None for tensors without versions."""
    try:
        versions = [(id(tensor), tensor._version, tensor.data_ptr()) for tensor in state]
    except RuntimeError:
        return None
    # On a GPU, autocast computes norms in another type.
    return (torch.is_autocast_enabled(), *versions)


HEADS: Registry[type[Head]] = Registry("head")
H = TypeVar("H", bound=type[Head])


def register_head(name: str) -> Callable[[H], H]:
    """Returns a class decorator that registers a head and sets its ``kind`` to the name."""
    add = HEADS.register(name)

    def decorate(cls: H) -> H:
        cls.kind = name
        return add(cls)  # type: ignore[return-value]

    return decorate


def list_heads() -> list[str]:
    """Returns the names of the heads.

    >>> sorted(list_heads())
    ['cosine', 'crt', 'fslwf', 'linear', 'logit_adjusted', 'lws', 'ncm', 'oltr', 'tau_norm']
    """
    return list(HEADS)


def _option_names(cls: type[Head]) -> list[str]:
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def head_option_names(name: str) -> list[str]:
    """Returns the names of the options of a head; an unknown head raises UsageError."""
    return _option_names(HEADS[name])


def check_head_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Checks the options of a head on one of size 1; returns all of them with their defaults."""
    check_options(f"head {name!r}", HEADS[name], options)
    # class_counts depend on the number of classes.
    sized = {key: value for key, value in options.items() if key != "class_counts"}
    return HEADS[name](1, 1, **sized).options()


def create_head(
    name: str,
    in_features: int,
    num_classes: int,
    *,
    bias: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Head:
    """Creates a head with a freshly initialised classifier.

    The name is one of :func:`list_heads`, the features have the width ``in_features``, and the
    options are those of the head; the others are arguments of ``nn.Linear``.

    Raises:
        UsageError: For an unknown head or option, or a value out of its range.

    >>> create_head("tau_norm", 8, 3, tau=0.5)
    TauNormHead(in_features=8, out_features=3, bias=True, tau=0.5, keep_bias=False)
    """
    check_options(f"head {name!r}", HEADS[name], options)
    return HEADS[name](in_features, num_classes, bias, device, dtype, **options)
