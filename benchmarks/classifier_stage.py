"""Every cost ratio of the classifier stage in one run.

``python benchmarks/classifier_stage.py``: one thread, CPU time, the two in turn, medians. What each
row compares is explained, and the baseline written, in the benchmark of its own that it comes from:
``feature_throughput.py``, ``tau_curve.py``, ``fits.py`` and ``shot_metrics.py``. A bound is what
the project asks of itself.
"""

import argparse
from collections.abc import Iterator

import feature_throughput
import fits
import shot_metrics
import tau_curve
from timing import Ratio


def feature_ratios(rounds: int) -> Iterator[Ratio]:
    """Yields the speed-up of feature extraction in native bfloat16."""
    for row in feature_throughput.rows(rounds):
        size = f"{row.case.model}, {row.case.size} px"
        yield Ratio("features in bfloat16, images/s", size, "eager float32", row.ratio, ">= 2.2")
        error = 100 * row.median_error
        yield Ratio("  their error, percent", size, "eager float32", error, "<= 0.5")


def curve_ratios(rounds: int) -> Iterator[Ratio]:
    """Yields the cost of accuracy at every tau."""
    for num_classes in tau_curve.SIZES:
        row = tau_curve.measure(num_classes, 0.15, rounds)
        size, to = f"{num_classes} classes", "a product + argmax"
        yield Ratio("every tau of tau_norm", size, to, row.norm, "<= 1.2")
        yield Ratio("every tau of logit_adjusted", size, to, row.prior, "<= 1.2")
        yield Ratio("21 taus, evaluated directly", size, to, row.sweep, "-")


def metric_ratios(rounds: int) -> Iterator[Ratio]:
    """Yields the cost of a scan per class relative to one count."""
    for row in shot_metrics.measure(rounds):
        size, bound = f"{row.num_classes} classes", f">= {shot_metrics.REQUIRED[row.num_classes]}"
        yield Ratio("a scan per class", size, "counting", row.scan_to_counting, bound)


def main() -> None:
    """Prints the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"{'what':32} {'of':24} {'to':20} {'ratio':>8}  bound")
    for part in (feature_ratios, curve_ratios, fits.rows, metric_ratios):
        for row in part(rounds):
            print(
                f"{row.what:32} {row.size:24} {row.to:20} {row.ratio:8.2f}  {row.bound}", flush=True
            )


if __name__ == "__main__":
    main()
