"""One registry class for every kind of named part: register, create, list."""

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from timm_lt.utils.checks import UsageError, check_options, unknown_name

T = TypeVar("T")
P = TypeVar("P")


class Registry(Generic[T]):
    """Named parts of one kind, in the order in which they were registered.

    Args:
        noun: Name of a part in messages, e.g. ``"head"``.
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that registers a class or function under a name.

        Raises:
            UsageError: If the name is taken or not a lower-case identifier.
        """
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
        """Builds the part of that name from positional arguments and options.

        By convention, the arguments that all parts of the kind take come first, and the part's own
        options are keyword-only.

        Raises:
            UsageError: If the name or an option is unknown, or a required option is missing.
        """
        part = self[name]
        check_options(f"{self.noun} {name!r}", part, options)
        return part(*args, **options)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
