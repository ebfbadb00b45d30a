"""The base class of classifier heads.

A head keeps the keys ``weight`` and ``bias`` of the classifier that it replaces. What it computes
is always ``F.linear(head.transform(features), *head.effective())``; heads differ in these two
functions.

The registry of heads and their factory.
"""

import inspect
import math
import operator
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.utils.checks import UsageError, check_options
from timm_lt.utils.registry import Registry


def is_pointwise(module: object) -> bool:
    """Returns whether a module is a 1×1 convolution, which some models have as their classifier."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


def as_linear(classifier: nn.Linear | nn.Conv2d) -> nn.Linear:
    """Returns a 1×1 convolution as the ``nn.Linear`` (C, D) that it is, with the same memory.

    An ``nn.Linear`` is returned as it is.

    >>> as_linear(nn.Conv2d(8, 3, 1))
    Linear(in_features=8, out_features=3, bias=True)
    """
    if isinstance(classifier, nn.Linear):
        return classifier
    linear = nn.Linear(1, 1, device="meta")
    linear.in_features, linear.out_features = classifier.in_channels, classifier.out_channels
    weight = classifier.weight
    linear.weight = nn.Parameter(weight.detach().flatten(1), weight.requires_grad)
    linear.bias = classifier.bias  # type: ignore[assignment]
    return linear.train(classifier.training)


# Not a tensor that stands for others: fake ones, proxies, wrappers of transforms.
PLAIN = (Tensor, nn.Parameter)


@dataclass(frozen=True, eq=False)
class _Cached:
    """Effective weights, and what they were computed from."""

    state: tuple[Tensor, ...]
    marks: tuple[object, ...]
    # Keeps the memory of the state alive, so no other tensor can come to lie at its address.
    memory: tuple[Tensor, ...]
    weights: tuple[Tensor, Tensor | None]


class Head(nn.Linear):
    """Base of all heads: an ``nn.Linear`` whose input and weights pass through a formula.

    In evaluation mode the effective weights are computed once and kept until a parameter, a buffer
    or an option changes, so inference costs what an ``nn.Linear`` costs. What torch's version
    counters miss goes unseen until ``train()`` or ``eval()`` is called or a gradient is wanted:
    writing into a tensor through ``.data`` or NumPy.

    Attributes:
        spatial: The head stands in the place of a 1×1 convolution, as some architectures have it:
            features are (N, D, H, W), logits (N, C, H, W), and ``weight`` is (C, D, 1, 1) in the
            state dict, as timm has it there.
        auxiliary: The model adds the logits to those of its main classifier, as VOLO does: what is
            to be added to their sum once, such as logit adjustment, is left to that one.
        backbone_statistics: Batch-norm statistics that belong to the head, by key of the model's
            state dict: those of a classifier that was trained while the backbone's statistics moved
            on. :func:`timm_lt.set_head` copies them into the model. None for most heads.

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
        self.spatial = False
        self.auxiliary = False
        self.backbone_statistics: dict[str, Tensor] | None = None
        # How the options were chosen, e.g. {"tau": 0.8, "objective": "all", "split": "val"}.
        self.selection: dict[str, Any] = {}

    @classmethod
    def from_classifier(cls, classifier: nn.Linear | nn.Conv2d, **options: Any) -> Self:
        """Creates the head from a trained classifier, whose weight and bias it copies.

        Args:
            classifier: The joint classifier, (C, D) or a 1×1 convolution (C, D, 1, 1).
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
        spatial = classifier.spatial if isinstance(classifier, Head) else is_pointwise(classifier)
        classifier = as_linear(classifier)
        weight = classifier.weight
        # The weights that are drawn first are replaced: the global generators stay as they are.
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
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
        head.spatial = spatial
        # The copied weight belongs to the statistics that its classifier came with.
        head.backbone_statistics = getattr(classifier, "backbone_statistics", None)
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

    def fold(self) -> nn.Linear | nn.Conv2d:
        """Returns a plain ``nn.Linear`` with the same argmax for every feature vector.

        The logits are the same too, up to rounding, unless the head normalises its input. A
        ``spatial`` head gives the 1×1 convolution whose place it has taken. It has a bias wherever
        that classifier had one, of zeros if the head has none, so that its state dict has the keys
        that plain timm expects.

        Raises:
            UsageError: If the head is not linear in the features, even up to a positive factor.
        """
        self.check_fitted()
        weight, bias = (None if t is None else t.detach() for t in self._folded())
        assert weight is not None
        if bias is None and self.bias is not None:
            bias = torch.zeros_like(self.bias, dtype=weight.dtype)
        size, has_bias = (self.in_features, self.out_features), bias is not None
        plain: nn.Linear | nn.Conv2d
        # On the meta device, it takes no memory and draws no random numbers.
        if self.spatial:
            plain = nn.Conv2d(*size, 1, bias=has_bias, device="meta")
        else:
            plain = nn.Linear(*size, bias=has_bias, device="meta")
        plain.weight = nn.Parameter(weight.view(plain.weight.shape).clone())
        plain.bias = None if bias is None else nn.Parameter(bias.clone())
        return plain.train(self.training)

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
        """Returns the logits (..., C) of features (..., D); (N, C, H, W) if ``spatial``."""
        if torch.jit.is_scripting() or torch.compiler.is_compiling():  # type: ignore[attr-defined]
            weight, bias = self.effective()
        else:
            weight, bias = self._kept_effective(input)
        if self.spatial:
            input = input.movedim(-3, -1)
        logits = F.linear(self.transform(input), weight, bias)
        return logits.movedim(-1, -3) if self.spatial else logits

    @torch.jit.unused
    def _kept_effective(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns ``effective()``, kept from the last call if nothing has changed since."""
        every = (*self._parameters.values(), *self._buffers.values())
        state = tuple(tensor for tensor in every if tensor is not None)
        learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in state)
        # A trace would take what is kept for a constant, or leave its placeholders here.
        tracing = torch.jit.is_tracing() or type(input) not in PLAIN  # type: ignore[attr-defined,no-untyped-call]
        # A parametrised weight is computed from tensors in a submodule.
        off = self.training or learning or tracing or bool(self._modules)
        marks = None if off else _marks(state)
        if marks is None:
            # A step of an optimizer may follow, and fused ones change no version.
            self.__dict__["_cached"] = None
            self.check_fitted()
            return self.effective()
        kept: _Cached | None = self.__dict__["_cached"]
        if kept is None or kept.marks != marks or any(map(operator.is_not, kept.state, state)):
            self.check_fitted()
            # An inference tensor could not be used outside of inference mode afterwards.
            with torch.inference_mode(mode=False), torch.no_grad():
                weights = self.effective()
            memory = tuple(tensor.detach() for tensor in state)
            kept = self.__dict__["_cached"] = _Cached(state, marks, memory, weights)
        return kept.weights

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
        # A parameter if a fit learns it by gradients, else a buffer; NaN marks it as unfitted.
        state = torch.full(size, math.nan, device=self.weight.device, dtype=self.weight.dtype)
        if learned:
            self.register_parameter(name, nn.Parameter(state))
        else:
            self.register_buffer(name, state)

    def _freeze(self, *parameters: Tensor | None) -> None:
        # An unused parameter that asks for a gradient makes DistributedDataParallel fail.
        for parameter in parameters:
            if parameter is not None:
                parameter.requires_grad_(False)


def _marks(state: tuple[Tensor, ...]) -> tuple[object, ...] | None:
    """Returns what changes when a tensor is written to; None for tensors that do not tell."""
    try:
        versions = [(tensor._version, tensor.data_ptr()) for tensor in state]
    except RuntimeError:
        return None
    # On a GPU autocast computes norms in another type.
    return (torch.is_autocast_enabled(), *versions)


HEADS: Registry[type[Head]] = Registry("head")
H = TypeVar("H", bound=type[Head])


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
    ['cosine', 'crt', 'fslwf', 'linear', 'logit_adjusted', 'lws', 'ncm', 'oltr', 'tau_norm']
    """
    return list(HEADS)


def check_flag(noun: str, value: bool) -> bool:
    """Returns a boolean after checking that it is one: the text ``"false"`` would count as true.

    >>> check_flag("keep_bias", "false")
    Traceback (most recent call last):
    timm_lt.utils.checks.UsageError: keep_bias must be true or false, got 'false'

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


def check_head_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Checks the options of a head without creating one of any size; returns all of them.

    Raises:
        UsageError: For an unknown head or option, or a value out of its range.

    >>> check_head_options("tau_norm", {"tau": 0.5})
    {'tau': 0.5, 'keep_bias': False}
    """
    check_options(f"head {name!r}", HEADS[name], options)
    # These depend on the number of classes.
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
