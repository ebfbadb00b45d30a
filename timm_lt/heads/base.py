"""What every classifier head is: the registry, the factory and the base class.

A head keeps the keys ``weight`` and ``bias`` of the classifier that it replaces. What it computes
is always ``F.linear(head.transform(features), *head.effective())``; heads differ in these two
functions.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.registry import Registry, UsageError, check_options

HEADS: Registry[type["Head"]] = Registry("head")
H = TypeVar("H", bound="type[Head]")


def register_head(name: str) -> Callable[[H], H]:
    """Returns a class decorator that registers a head and writes its name into ``kind``."""
    add = HEADS.register(name)

    def decorate(cls: H) -> H:
        cls.kind = name
        add(cls)
        return cls

    return decorate


def list_heads() -> list[str]:
    """Names the registered heads.

    >>> sorted(list_heads())
    ['cosine', 'crt', 'linear', 'logit_adjusted', 'lws', 'ncm', 'tau_norm']
    """
    return list(HEADS)


def check_flag(noun: str, value: bool) -> bool:
    """Returns a boolean after checking that it is one: the text ``"false"`` would count as true.

    >>> check_flag("keep_bias", "false")
    Traceback (most recent call last):
    timm_lt.registry.UsageError: keep_bias must be true or false, got 'false'

    Raises:
        UsageError: If the value is no boolean.
    """
    if not isinstance(value, bool):
        raise UsageError(f"{noun} must be true or false, got {value!r}")
    return value


def head_option_names(name: str) -> list[str]:
    """Returns the names of the options that a head takes; an unknown head raises UsageError."""
    parameters = inspect.signature(HEADS[name]).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def create_head(
    name: str,
    in_features: int,
    num_classes: int,
    *,
    bias: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> "Head":
    """Creates a head with a freshly initialised classifier.

    Args:
        name: One of :func:`list_heads`.
        in_features: Width D of the features.
        num_classes: Number of classes C.
        bias: Whether the classifier has a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **options: Options of that head.

    Raises:
        UsageError: For an unknown head or option, or a value out of its range.

    >>> create_head("tau_norm", 8, 3, tau=0.5)
    TauNormHead(in_features=8, out_features=3, bias=True, tau=0.5, keep_bias=False)
    """
    check_options(f"head {name!r}", HEADS[name], options)
    return HEADS[name](in_features, num_classes, bias, device, dtype, **options)


class Head(nn.Linear):
    """Base of all heads: an ``nn.Linear`` whose input and weights pass through a formula.

    Shape:
        - features: (N, D) or (..., D)
        - logits: (N, C) or (..., C)
    """

    kind: ClassVar[str]
    # State beside weight and bias. It is NaN until the head is fitted or loaded, so an unfitted
    # state that was saved is still unfitted after loading.
    fitted_state: ClassVar[tuple[str, ...]] = ()
    # What a checkpoint stores for this head; all else comes from the joint classifier, the options
    # and the class counts.
    own_state: ClassVar[tuple[str, ...]] = ()
    # Options that the fitted state depends on: they cannot change once the head is fitted.
    fixed_options: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        # How the options were chosen, e.g. {"tau": 0.8, "objective": "all", "split": "val"}.
        self.selection: dict[str, Any] = {}

    @classmethod
    def from_classifier(cls, classifier: nn.Linear, **options: Any) -> Self:
        """Creates the head from a trained classifier, whose weight and bias it copies.

        Args:
            classifier: The joint classifier, (C, D).
            **options: Options of the head.

        Raises:
            UsageError: For a wrong option, or a fitted head whose weight is no classifier's.
        """
        check_options(f"head {cls.kind!r}", cls, options)
        if (
            isinstance(classifier, Head)
            and classifier.fitted_state
            and "weight" in classifier.own_state
            and classifier.is_fitted()
        ):
            raise UsageError(
                f"the weight of a fitted {classifier.kind!r} head is not a classifier that a "
                f"{cls.kind!r} head can start from; start from the joint classifier"
            )
        weight = classifier.weight
        head = cls(
            classifier.in_features,
            classifier.out_features,
            classifier.bias is not None,
            weight.device,
            weight.dtype,
            **options,
        )
        with torch.no_grad():
            head.weight.copy_(weight)
            if classifier.bias is not None:
                head.bias.copy_(classifier.bias)
        return head.train(classifier.training)

    @property
    def uses_bias(self) -> bool:
        """Whether the logits depend on ``bias``, which is there as timm expects it."""
        return True

    def options(self) -> dict[str, Any]:
        """Returns the options that would create this head again, ready for JSON."""
        return {}

    def transform(self, features: Tensor) -> Tensor:
        """Maps features (..., D) to the space (..., D) in which the head is linear."""
        return features

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Returns the weight (C, D) and bias (C,) or None that act on transformed features."""
        return self.weight, self.bias

    def fold(self) -> nn.Linear:
        """Returns a plain ``nn.Linear`` with the same argmax for every feature vector.

        The logits are the same too, up to rounding, unless the head normalises its input.

        Raises:
            UsageError: If the head is not linear in the features, even up to a positive factor.
        """
        self.check_fitted()
        weight, bias = (None if t is None else t.detach() for t in self._folded())
        assert weight is not None
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        return linear.train(self.training)

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        return self.effective()

    @torch.jit.unused
    def is_fitted(self) -> bool:
        """Returns whether all state is there; on the meta device nobody knows, and it counts."""
        states = [getattr(self, name) for name in self.fitted_state]
        return not any(bool(torch.isnan(state).any()) for state in states if not state.is_meta)

    @torch.jit.unused
    def check_fitted(self) -> None:
        """Raises UsageError if the head has no fitted state yet, and says how to fit it."""
        if not self.is_fitted():
            raise UsageError(self._unfitted_message())

    def _unfitted_message(self) -> str:
        return (
            f"head {self.kind!r} is not fitted yet: fit it with timm_lt.fit_head({self.kind!r}, "
            "features, ...) on extract_features(model, loader), or load a checkpoint that has it"
        )

    def forward(self, input: Tensor) -> Tensor:
        """Returns the logits (..., C) of features (..., D)."""
        if not (torch.jit.is_scripting() or torch.compiler.is_compiling()):  # type: ignore[attr-defined]
            self.check_fitted()
        weight, bias = self.effective()
        return F.linear(self.transform(input), weight, bias)

    def extra_repr(self) -> str:
        """Shows the options after what ``nn.Linear`` shows."""
        return ", ".join([super().extra_repr(), *(f"{k}={v!r}" for k, v in self.options().items())])

    def _set_unfitted(self, name: str, size: int, *, learned: bool = False) -> None:
        # A parameter if a fit learns it by gradients, else a buffer; NaN marks it as unfitted.
        state = torch.full((size,), math.nan, device=self.weight.device, dtype=self.weight.dtype)
        if learned:
            self.register_parameter(name, nn.Parameter(state))
        else:
            self.register_buffer(name, state)

    def _freeze(self, *parameters: Tensor | None) -> None:
        # An unused parameter that asks for a gradient makes DistributedDataParallel fail.
        for parameter in parameters:
            if parameter is not None:
                parameter.requires_grad_(False)
