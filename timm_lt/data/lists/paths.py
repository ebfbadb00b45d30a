"""Many file paths in little memory: one string after another, not one Python object each."""

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

# Paths that become Python objects together when all are iterated over.
BLOCK = 10_000


class Paths(Sequence[str]):
    """A sequence of strings as an Arrow array: the bytes of each path and 4 or 8 more.

    >>> paths = Paths(["a/1.jpg", "a/2.jpg", "b/3.jpg"])
    >>> paths[-1], paths[:2]
    ('b/3.jpg', Paths(['a/1.jpg', 'a/2.jpg']))

    ``pyarrow.array(paths)`` gives the array.

    Args:
        paths: Strings, or an Arrow array of them, which is not copied.
        step: Of the array, every so manieth string is a path.
    """

    def __init__(self, paths: "Sequence[str] | pa.Array", step: int = 1) -> None:
        self._strings = paths if isinstance(paths, pa.Array) else pa.array(paths, pa.string())
        self._step = step

    @property
    def arrow(self) -> "pa.Array":
        """The paths alone; they are copied if other strings are between them."""
        if self._step == 1:
            return self._strings
        return self._strings.take(pa.array(np.arange(0, len(self._strings), self._step)))

    def __len__(self) -> int:
        return len(range(0, len(self._strings), self._step))

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Paths": ...
    def __getitem__(self, index: int | slice) -> "str | Paths":
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self.take(np.arange(start, stop, step))
        path: str = self._strings[range(len(self))[index] * self._step].as_py()
        return path

    def __iter__(self) -> Iterator[str]:
        block = BLOCK * self._step
        for start in range(0, len(self._strings), block):
            yield from self._strings[start : start + block].to_pylist()[:: self._step]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        more = ", ..." if len(self) > 5 else ""
        return f"Paths([{', '.join(map(repr, self[:5]))}{more}])"

    def __arrow_array__(self, type: "pa.DataType | None" = None) -> "pa.Array":
        return self.arrow if type is None else self.arrow.cast(type)

    def take(self, rows: NDArray[Any]) -> "Paths":
        """Returns the paths of some rows."""
        return Paths(self._strings.take(pa.array(rows * self._step)))

    def parts(self, depth: int = 1) -> "tuple[Paths, Paths]":
        """Returns each path in two: its folder, and its last components, ``depth`` of them.

        >>> Paths(["x/y/1.jpg", "2.jpg"]).parts()
        (Paths(['x/y', '']), Paths(['1.jpg', '2.jpg']))
        """
        import pyarrow.compute as pc

        split = pc.split_pattern(self.arrow, "/", max_splits=depth, reverse=True)
        sizes = np.diff(split.offsets.to_numpy())
        first = split.offsets.to_numpy()[:-1]
        parts = split.flatten()
        deep = sizes > depth
        # A path that is not as deep has no folder.
        folder = pc.if_else(pa.array(deep), parts.take(pa.array(first)), "")
        tail = parts.take(pa.array(first + deep))
        for more in range(1, depth):
            there = more < sizes - deep
            following = parts.take(pa.array(np.where(there, first + deep + more, first)))
            joined = pc.binary_join_element_wise(tail, following, "/")
            tail = pc.if_else(pa.array(there), joined, tail)
        return Paths(folder), Paths(tail)
