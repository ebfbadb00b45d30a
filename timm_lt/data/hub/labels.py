"""Labels of somebody's tables, of any kind, as integers with one list of names for all splits."""

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from timm_lt.data.hub.columns import described, label_kind
from timm_lt.utils.checks import Problems, UsageError, shown_names

if TYPE_CHECKING:
    from datasets import Dataset

UNLABELLED = -1


def read_labels(
    tables: "Mapping[str, Dataset]", column: str
) -> tuple[dict[str, NDArray[np.int64]], list[str] | None]:
    """Reads the labels of all splits.

    A ``ClassLabel`` has its names; of a split that lists them in another order the labels are
    renumbered. Integers have none. Texts are the names, sorted over all splits.

    Args:
        tables: The splits by the names that messages have for them, that for training first.
        column: The column of labels.

    Returns:
        The labels by split, (N,) int64, -1 where an image has none; and the class names, (C,).

    Raises:
        UsageError: If a class has no image in any split though a later one has, two names differ in
            case only, or the splits have different kinds of labels or other classes than the first.
    """
    kinds = {split: label_kind(table.features[column]) for split, table in tables.items()}
    first, kind = next(iter(kinds.items()))
    for split, other in kinds.items():
        if other != kind:
            shown = [described(tables[name].features[column]) for name in (split, first)]
            raise UsageError(
                f"column {column!r} is {shown[0]} in split {split!r} but {shown[1]} in {first!r}"
            )
    if kind == "names":
        return _named(tables, column)
    values = {split: _column(table, column) for split, table in tables.items()}
    if kind == "texts":
        return _texts(values, column)
    labels = {split: _integers(array, column) for split, array in values.items()}
    _check_gaps(labels, column)
    return labels, None


def _column(table: "Dataset", column: str) -> pa.ChunkedArray:
    rows = cast(pa.Table, table.select_columns(column).with_format("arrow")[:])
    return rows.column(0)


def _integers(values: pa.ChunkedArray, column: str) -> NDArray[np.int64]:
    try:
        filled = values.cast(pa.int64()).fill_null(UNLABELLED)
    except pa.ArrowInvalid as error:
        raise UsageError(
            f"labels of column {column!r} must be 0 to C - 1, got {pc.max(values).as_py()}"
        ) from error
    numbers: NDArray[np.int64] = filled.to_numpy()
    return numbers


def _named(
    tables: "Mapping[str, Dataset]", column: str
) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    names: list[str] = list(next(iter(tables.values())).features[column].names)
    problems = Problems()
    labels = {}
    for split, table in tables.items():
        numbers = _integers(_column(table, column), column)
        own = list(table.features[column].names)
        if unknown := sorted(set(own) - set(names)):
            problems.add(
                f"{len(unknown)} classes of split {split!r} are not among those of "
                f"{next(iter(tables))!r}: {shown_names(unknown)}"
            )
            continue
        wrong = np.unique(numbers[(numbers < UNLABELLED) | (numbers >= len(own))])
        if len(wrong):
            problems.add(
                f"labels of split {split!r} must be 0 to {len(own) - 1}, as column {column!r} has "
                f"{len(own)} classes: got {shown_names(wrong.tolist())}"
            )
        elif own != names:
            # The last place is that of -1.
            place = np.array([*map(names.index, own), UNLABELLED])
            numbers = place[numbers]
        labels[split] = numbers
    problems.check()
    return labels, names


def _texts(
    values: dict[str, pa.ChunkedArray], column: str
) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    values = {split: _without_empty(array) for split, array in values.items()}
    distinct: set[str] = set()
    for array in values.values():
        distinct.update(pc.unique(array).drop_null().to_pylist())
    names = sorted(distinct)
    same = defaultdict(list)
    for name in names:
        same[name.strip().casefold()].append(repr(name))
    alike = [" and ".join(group) for group in same.values() if len(group) > 1]
    if alike:
        raise UsageError(
            f"{len(alike)} classes of column {column!r} are written in several ways: "
            f"{shown_names(alike)}; write each in one way, or make the column a ClassLabel if they "
            "are different classes"
        )
    known = pa.array(names, pa.string())
    encoded: dict[str, Any] = {
        split: pc.index_in(array, value_set=known) for split, array in values.items()
    }
    return {split: _integers(array, column) for split, array in encoded.items()}, names


def _without_empty(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns texts with nulls in place of those that are empty, or blank."""
    texts = texts.cast(pa.string())
    blank = pc.equal(pc.utf8_trim_whitespace(texts), "")
    return cast(pa.ChunkedArray, pc.if_else(blank, pa.scalar(None, pa.string()), texts))


def _check_gaps(labels: dict[str, NDArray[np.int64]], column: str) -> None:
    used = np.unique(np.concatenate(list(labels.values())))
    if len(used) and used[0] < UNLABELLED:
        raise UsageError(f"column {column!r} has negative labels: {int(used[0])}")
    used = used[used >= 0]
    if len(used) == 0 or int(used[-1]) + 1 == len(used):
        return
    top = int(used[-1])
    # Of up to top labels, the first that are missing lie within the first len(used) + 5.
    missing = np.setdiff1d(np.arange(min(top, len(used) + 5)), used)
    shown = shown_names([*missing.tolist()[:5], *(["..."] if top + 1 - len(used) > 5 else [])], 6)
    raise UsageError(
        f"labels of column {column!r} must be 0 to C - 1 without a gap: the largest is {top}, and "
        f"{top + 1 - len(used)} below it occur in no split: {shown}; renumber them, or make them "
        "texts or a ClassLabel"
    )
