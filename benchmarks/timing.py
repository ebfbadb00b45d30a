"""Timing two things against each other, for the benchmarks."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Ratio(NamedTuple):
    """A row of a table: what was measured, of which size, relative to what."""

    what: str
    size: str
    to: str
    ratio: float
    bound: str


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Returns the CPU time of some work, the mean of some times in a row."""
    started = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - started) / repeats


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> float:
    """Returns the median ratio of two CPU times, measured in turn after one round to warm up."""
    ours(), theirs()
    return statistics.median(seconds(ours) / seconds(theirs) for _ in range(rounds))
