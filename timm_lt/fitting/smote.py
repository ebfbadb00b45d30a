"""Synthetic features of rare classes, between neighbours of the same class (SMOTE)."""

import tempfile
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from timm_lt.features import Features
from timm_lt.fitting.rows import row_blocks, scratch_matrix, take_rows
from timm_lt.utils.checks import UsageError, check_integer
from timm_lt.utils.longtail import class_counts

SmoteTarget: TypeAlias = int | Literal["largest"]
NEIGHBORS = 5
# Rows of a class, at most.
MAX_ROWS = 10_000_000


def check_smote(target: SmoteTarget | None) -> None:
    """Checks to how many rows classes are to be filled up, and that the library is there."""
    if target is None:
        return
    if target != "largest":
        if isinstance(target, str):
            raise UsageError(
                f"smote must be a number of rows or 'largest', the rows of the largest class; got "
                f"{target!r}"
            )
        check_integer("smote", target, minimum=1, maximum=MAX_ROWS)
    _import_smote()


def _import_smote() -> Any:  # noqa: ANN401
    try:
        from imblearn.over_sampling import SMOTE
    except ImportError as error:
        raise UsageError("smote needs imbalanced-learn: pip install 'timm_lt[smote]'") from error
    return SMOTE


def add_smote_rows(
    features: Features, num_classes: int, target: SmoteTarget, *, seed: int = 0
) -> Features:
    """Adds synthetic rows behind the given ones, until each class has enough.

    A synthetic row is ``x + u (x' − x)``: ``x'`` is one of the ``k = min(5, n − 1)`` nearest rows
    of the same class, of ``n``, and ``u`` is uniform in [0, 1]. A class of one row has no
    neighbour: its row is repeated.

    Args:
        features: Values (N, D).
        num_classes: C.
        target: Rows that each class has afterwards, if it has not more; ``"largest"`` is those of
            the largest class.
        seed: Seed of the draws.

    Raises:
        UsageError: If the target is no positive number, imbalanced-learn is not installed, or there
            is no room for the rows.

    References:
        Chawla et al., SMOTE: Synthetic Minority Over-sampling Technique, JAIR 2002,
        https://arxiv.org/abs/1106.1813
    """
    check_smote(target)
    counts = class_counts(features.targets, num_classes)
    missing = smote_counts(counts, target) - counts
    rows = len(features) + int(missing.sum())
    try:
        values = scratch_matrix(rows, features.num_features)
    except OSError as error:
        raise UsageError(
            f"smote makes {rows:,} rows, for which {tempfile.gettempdir()} has no room ({error}): "
            "take fewer rows, or set TMPDIR to a folder on another disk"
        ) from error
    end = 0
    for block in row_blocks(features.values, 1):
        values[end : end + len(block)] = block
        end += len(block)
    by_class = features.targets.sort(stable=True).indices.split(counts.tolist())
    for label in missing.nonzero().flatten().tolist():
        added = int(missing[label])
        of_class = take_rows(features.values, by_class[label])
        values[end : end + added] = _synthetic(of_class, added, seed + label)
        end += added
    labels = torch.repeat_interleave(torch.arange(num_classes), missing)
    return Features(values, torch.cat([features.targets.cpu(), labels]))


def smote_counts(counts: Tensor, target: SmoteTarget) -> Tensor:
    """Returns the rows per class (C,) after :func:`add_smote_rows`; an empty class stays so."""
    wanted = int(counts.max()) if target == "largest" else target
    return torch.where(counts == 0, 0, counts.clamp_min(wanted))


def _synthetic(rows: Tensor, number: int, seed: int) -> Tensor:
    """Returns synthetic rows (number, D) between the rows (n, D) of a class."""
    if len(rows) == 1:
        return rows.expand(number, -1)
    smote = _import_smote()(
        sampling_strategy={1: len(rows) + number},
        k_neighbors=min(NEIGHBORS, len(rows) - 1),
        random_state=seed % 2**32,
    )
    # imbalanced-learn wants a second class, of which it adds nothing.
    labels = [1] * len(rows) + [0]
    resampled, _ = smote.fit_resample(torch.cat([rows, rows[:1]]).numpy(), labels)
    return torch.from_numpy(resampled[len(labels) :])
