"""Interleaved timing of two functions."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Ratio(NamedTuple):
    """A row of a table."""

    what: str
    size: str
    to: str
    ratio: float
    bound: str


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Returns the mean CPU time of repeated calls."""
    started = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - started) / repeats


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> float:
    """Returns the median ratio of two CPU times, interleaved, after one warm-up round."""
    ours(), theirs()
    return statistics.median(seconds(ours) / seconds(theirs) for _ in range(rounds))
