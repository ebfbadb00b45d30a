"""The figures of a comparison: by seed, mean, standard deviation, and paired differences."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm_lt.checkpoint import METRICS
from timm_lt.report.tables import GROUPS
from timm_lt.run.comparison.grid import Cell
from timm_lt.run.comparison.plan import Plan, Run
from timm_lt.run.comparison.runs import Outcome
from timm_lt.utils.files import read_json

CLASS_MEAN = "class_mean"


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Attributes:
        mean: The mean; None without a value.
        sd: Sample standard deviation, with n − 1; None of fewer than two values.
    """

    mean: float | None
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread":
        """Returns the spread of the values; of a shot group that is empty, there is none."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return cls(None, None)
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True)
class CellFigures:
    """What a cell of the table shows; accuracies are fractions.

    Attributes:
        cell: The cell.
        per_seed: Test accuracies by seed and figure; seeds whose run failed are not there.
        spreads: By figure, over these seeds.
        differences: By figure and seed, to the first cell; empty for that itself.
        difference_spreads: By figure, over the seeds that both cells have.
    """

    cell: Cell
    per_seed: Mapping[int, Mapping[str, float | None]]
    spreads: Mapping[str, Spread]
    differences: Mapping[str, Mapping[int, float | None]]
    difference_spreads: Mapping[str, Spread]

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it in types that JSON has."""
        return {
            **vars(self.cell),
            "quoted": dict(self.cell.quoted) or None,
            "seeds": list(self.per_seed),
            "per_seed": self.per_seed,
            "mean": {key: spread.mean for key, spread in self.spreads.items()},
            "sd": {key: spread.sd for key, spread in self.spreads.items()},
            "difference_to_first": {
                key: {**vars(self.difference_spreads[key]), "per_seed": by_seed}
                for key, by_seed in self.differences.items()
            },
        }


@dataclass(frozen=True)
class Comparison:
    """All figures.

    Attributes:
        cells: Row by row.
        keys: The figures that there are: shot groups, all, and the mean over the classes if the
            test split is not balanced.
        shots: The shot groups, as in ``metrics.json``; empty before any run has finished.
        note: What a run says below its table, if anything.
    """

    cells: list[CellFigures]
    keys: tuple[str, ...]
    shots: Mapping[str, Mapping[str, Any]]
    note: str | None


def collect(plan: Plan, outcomes: Mapping[Run, Outcome]) -> Comparison:
    """Reads the figures of the finished runs and compares them."""
    metrics = {
        (run.representation, run.seed): read_json(run.folder / METRICS)
        for run in plan.runs
        if outcomes[run].is_whole
    }
    first = next(iter(metrics.values()), {})
    heads = [head for found in metrics.values() for head in found["heads"].values()]
    balanced = all(abs(head["all"] - head[CLASS_MEAN]) < 1e-9 for head in heads)
    keys = (*GROUPS, "all", *([] if balanced else [CLASS_MEAN]))
    by_cell = [_by_seed(cell, plan.seeds, metrics, keys) for cell in plan.cells]
    cells = [
        compare(cell, figures, by_cell[0] if number else None, keys)
        for number, (cell, figures) in enumerate(zip(plan.cells, by_cell, strict=True))
    ]
    return Comparison(cells, keys, first.get("shots", {}), first.get("note"))


def _by_seed(
    cell: Cell,
    seeds: Sequence[int],
    metrics: Mapping[tuple[str, int], Mapping[str, Any]],
    keys: Sequence[str],
) -> dict[int, dict[str, float | None]]:
    found = {seed: metrics.get((cell.representation, seed)) for seed in seeds}
    return {
        seed: {key: run["heads"][cell.head][key] for key in keys}
        for seed, run in found.items()
        if run is not None
    }


def compare(
    cell: Cell,
    figures: Mapping[int, Mapping[str, float | None]],
    first: Mapping[int, Mapping[str, float | None]] | None,
    keys: Sequence[str],
) -> CellFigures:
    """Returns what a cell shows.

    Args:
        cell: The cell.
        figures: Accuracies by seed and figure.
        first: Those of the first cell, or None for that itself.
        keys: The figures.
    """
    differences: dict[str, dict[int, float | None]] = {}
    for key in keys if first is not None else ():
        assert first is not None
        shared = {seed: (figures[seed][key], first[seed][key]) for seed in figures if seed in first}
        differences[key] = {
            seed: None if here is None or there is None else here - there
            for seed, (here, there) in shared.items()
        }
    return CellFigures(
        cell,
        figures,
        {key: Spread.of([by_key[key] for by_key in figures.values()]) for key in keys},
        differences,
        {key: Spread.of(list(by_seed.values())) for key, by_seed in differences.items()},
    )
