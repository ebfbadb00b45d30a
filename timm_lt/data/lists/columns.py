"""Columns of lists beside paths and labels: the split, and those that are not used."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from timm_lt.data.sources import SPLIT_WORDS
from timm_lt.utils.checks import UsageError, shown_names
from timm_lt.utils.console import log

SPLIT_COLUMN = "split"


def read_splits(path: Path, values: "Sequence[str] | pa.Array") -> NDArray[np.str_]:
    """Returns the split of each image, ``"train"``, ``"val"`` or ``"test"``.

    Args:
        path: The list, for messages.
        values: The column, (N,): names of splits as directories have them, in any case.

    Raises:
        UsageError: If a value is not the name of a split; names those values.
    """
    coded = pa.array(values, pa.string()).dictionary_encode()
    words = coded.dictionary.to_pylist()
    unknown = [repr(word) for word in words if word.strip().lower() not in SPLIT_WORDS]
    if unknown:
        raise UsageError(
            f"{path}: the column {SPLIT_COLUMN} has values that are not the name of a split: "
            f"{shown_names(unknown)}; expected {', '.join(SPLIT_WORDS)}"
        )
    splits = np.array([SPLIT_WORDS[word.strip().lower()] for word in words], np.str_)
    found: NDArray[np.str_] = splits[coded.indices.to_numpy()]
    return found


def note_unused(owner: str | Path, names: Sequence[str]) -> None:
    """Logs which columns of a list or table are not used."""
    if names:
        log.warning(
            "%s: columns that are not used: %s",
            owner,
            shown_names([name or "''" for name in names], 8),
        )
