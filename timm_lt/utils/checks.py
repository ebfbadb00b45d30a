"""Errors for users, checks of options, numbers and choices, and registries of named parts."""

import dataclasses
import difflib
import inspect
import math
import numbers
import operator
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
P = TypeVar("P")
# Background of transparent pixels.
WHITE = "#ffffff"


class UsageError(ValueError):
    """An error in the user's input: the message says what is wrong and how to fix it.

    timm_lt raises it for all invalid input. ``problems`` has one sentence for each mistake.
    """

    def __init__(self, message: str = "", *, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems) or [message]


@contextmanager
def user_errors(fault: str, *kinds: type[Exception], cure: str = "") -> Iterator[None]:
    """Turns errors of these kinds into a UsageError: ``fault``, their reason, and the cure.

    The default is OSError. A UsageError passes unchanged, unless it is among the kinds.
    """
    try:
        yield
    except Exception as error:
        is_theirs = isinstance(error, UsageError) and UsageError not in kinds
        if is_theirs or not isinstance(error, kinds or OSError):
            raise
        reason: object = error
        if isinstance(error, OSError) and str(error.filename or "") in fault:
            reason = error.strerror or error
        raise UsageError(f"{fault}: {reason}" + (f"; {cure}" if cure else "")) from error


class Problems:
    """Collects the problems of some input, named by ``owner``, to report all together."""

    def __init__(self, owner: str = "") -> None:
        self.owner = owner
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        """Adds a problem: what is wrong, and how to fix it."""
        self.found.append(problem)

    @contextmanager
    def collected(self, prefix: str = "") -> Iterator[None]:
        """Adds the problems of a :class:`UsageError` in a block, instead of raising it."""
        try:
            yield
        except UsageError as error:
            self.found += [prefix + problem for problem in error.problems]

    def check(self) -> None:
        """Raises a UsageError with all problems, if there are any; several are a list."""
        if not self.found:
            return
        owner = f"{self.owner}: " if self.owner else ""
        if len(self.found) == 1:
            raise UsageError(owner + self.found[0])
        lines = "".join(f"\n- {problem}" for problem in self.found)
        raise UsageError(f"{owner}{len(self.found)} problems{lines}", problems=self.found)


def shown_names(names: Sequence[object], limit: int = 5) -> str:
    """Joins the first names of a list, for messages: ``a, b, ...``."""
    return ", ".join(map(str, names[:limit])) + (", ..." if len(names) > limit else "")


def unknown_name(noun: str, name: object, choices: list[str]) -> UsageError:
    """Returns the error for a name that is not among the choices: it lists them and the closest."""
    close = difflib.get_close_matches(str(name), choices, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return UsageError(f"unknown {noun} {name!r}{hint}; choose one of: {', '.join(choices)}")


def check_options(owner: str, part: Callable[..., Any], options: dict[str, Any]) -> None:
    """Checks the names of a part's options against its keyword-only parameters.

    A ``**kwargs`` in its signature takes any name.
    """
    parameters = inspect.signature(part).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    valid = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    listing = f"valid options: {', '.join(valid) or 'none'}"
    for name in options:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UsageError(f"{owner} has no option {name!r}{hint}; {listing}")
    for name, parameter in valid.items():
        if parameter.default is parameter.empty and name not in options:
            raise UsageError(f"{owner} needs the option {name!r}; {listing}")


def check_choice(noun: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises a UsageError that lists the choices if a value is not one of them."""
    if value not in choices:
        raise unknown_name(noun, value, list(choices))


def check_mapping(noun: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns options as a dict, empty for None; UsageError if they are not a mapping by name."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{noun} must be a mapping of names to values, got {value!r}")
    return dict(value)


def check_number(noun: str, value: float, interval: str) -> float:
    """Returns a number after checking that it lies in an interval such as ``"(0, inf)"``.

    A round bracket excludes its bound, ``inf`` means no bound, and NaN lies in no interval.
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = operator.ge if interval[0] == "[" else operator.gt
    below = operator.le if interval[-1] == "]" else operator.lt
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    # An integer beyond all floats is below inf.
    is_number = is_number and abs(value) <= sys.float_info.max
    if not (is_number and above(value, low) and below(value, high)):
        raise UsageError(f"{noun} must be a number in {interval}, got {value!r}")
    return float(value)


def check_integer(noun: str, value: int, minimum: int, maximum: float = math.inf) -> int:
    """Returns an integer after checking its range; NumPy integers are integers, booleans not."""
    is_integer = hasattr(value, "__index__") and not isinstance(value, bool)
    if not (is_integer and minimum <= operator.index(value) <= maximum):
        bounds = f">= {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"
        raise UsageError(f"{noun} must be an integer {bounds}, got {value!r}")
    return operator.index(value)


def check_flag(noun: str, value: bool) -> bool:
    """Returns a boolean after checking that it is one: the text ``"false"`` would count as true."""
    if not isinstance(value, bool):
        raise UsageError(f"{noun} must be true or false, got {value!r}")
    return value


def check_fields(part: Any, owner: str = "") -> None:  # noqa: ANN401
    """Checks the fields of a dataclass by their annotations, for its ``__post_init__``.

    A ``Literal`` lists the choices, ``Annotated[float, "[0, 1)"]`` has an interval, and
    ``Annotated[int, 1]`` a minimum. None is valid where it is the default.
    """
    for field in dataclasses.fields(part):
        name, value, kind = field.name, getattr(part, field.name), field.type
        if value is None and field.default is None:
            continue
        if NoneType in typing.get_args(kind):
            kind = typing.get_args(kind)[0]
        arguments, origin = typing.get_args(kind), typing.get_origin(kind)
        noun = f"{name} of {owner}" if owner else name
        if origin is typing.Literal:
            check_choice(noun, value, arguments)
        elif kind is bool:
            check_flag(noun, value)
        elif origin is typing.Annotated:
            check = check_number if arguments[0] is float else check_integer
            # The dataclass may be frozen.
            object.__setattr__(part, name, check(noun, value, arguments[1]))


def check_background(background: object) -> str:
    """Returns an opaque colour, by name, code or levels from 0 to 255, as ``#rrggbb``."""
    from PIL import ImageColor

    try:
        levels: Any = ImageColor.getrgb(background) if isinstance(background, str) else background
        color = bytes([*levels])
    except (TypeError, ValueError):
        color = b""
    if len(color) != 3:
        raise UsageError(
            f"background {background!r} is not a valid colour; expected a name such as 'white', "
            "'#rrggbb', or three integers from 0 to 255"
        )
    return f"#{color.hex()}"


class Registry(Generic[T]):
    """Named parts of one kind, such as the heads, in the order of registration."""

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that registers a class or function under a free, lower-case name."""
        if not (name.isidentifier() and name == name.lower()):
            raise UsageError(f"{self.noun} name {name!r} must be a lower-case identifier")
        if name in self._parts:
            raise UsageError(
                f"{self.noun} {name!r} is registered already, by {self._parts[name]!r}"
            )

        def add(part: T) -> T:
            self._parts[name] = part
            return part

        return add

    def __getitem__(self, name: str) -> T:
        """Returns the part of that name; UsageError with the valid names for another one."""
        if not isinstance(name, str) or name not in self._parts:
            raise unknown_name(self.noun, name, list(self._parts))
        return self._parts[name]

    def create(self: "Registry[Callable[..., P]]", name: str, /, *args: Any, **options: Any) -> P:
        """Builds the part of that name; its own options are keyword-only."""
        part = self[name]
        check_options(f"{self.noun} {name!r}", part, options)
        return part(*args, **options)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)
