"""Counting correct predictions per class, as a ratio to a scan of all images for each class.

``python benchmarks/shot_metrics.py``: one thread, CPU time, interleaved, medians. ``scan`` loops
over the classes with boolean masks in NumPy, a new mask for every use as in published evaluation
code, and gets what ``counting`` gets: images, right images and predictions of each class. ``lean``
is the fastest such loop that we know: a mask is made once and only the images are counted and those
that are right. ``counting`` is ``ShotMetrics.update`` with its checks, ``report`` all of
``shot_accuracy``. A ratio says how many scans fit into the time of the other.
"""

import argparse
import statistics
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from timing import seconds
from torch import Tensor

from timm_lt.metrics import ShotMetrics, shot_accuracy

# Images by classes: ImageNet-LT's test split, iNaturalist 2018's validation split.
SIZES = {1000: 50_000, 8142: 24_426}
REQUIRED = {1000: 200, 8142: 2000}


class Row(NamedTuple):
    """Median times of one size in seconds, and median ratios."""

    num_classes: int
    num_images: int
    scan: float
    lean: float
    counting: float
    report: float
    scan_to_counting: float
    lean_to_counting: float
    scan_to_report: float


def predictions(num_classes: int, num_images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns predictions, half of them correct, and shuffled balanced targets."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randperm(num_images, generator=generator) % num_classes
    others = torch.randint(num_classes, (num_images,), generator=generator)
    right = torch.rand(num_images, generator=generator) < 0.5
    return torch.where(right, targets, others), targets


def scan(preds: NDArray, targets: NDArray, num_classes: int) -> list[tuple[int, int, int]]:
    """Counts images, correct images and predictions of each class, class by class."""
    rows = []
    for c in range(num_classes):
        images = len(targets[targets == c])
        right = (preds[targets == c] == targets[targets == c]).sum()
        rows.append((images, right, len(preds[preds == c])))
    return rows


def lean_scan(preds: NDArray, targets: NDArray, num_classes: int) -> list[tuple[int, int]]:
    """Counts images and correct images of each class, with one mask per class."""
    rows = []
    for c in range(num_classes):
        mask = targets == c
        rows.append((np.count_nonzero(mask), np.count_nonzero(preds[mask] == c)))
    return rows


def measure(rounds: int = 9) -> list[Row]:
    """Returns the times at each size, after checking that results agree."""
    check_equal()
    return [_measure(*size, rounds) for size in SIZES.items()]


def _measure(num_classes: int, num_images: int, rounds: int) -> Row:
    preds, targets = predictions(num_classes, num_images)
    class_counts = torch.logspace(3, 0.5, num_classes).long()
    arrays = (preds.numpy(), targets.numpy(), num_classes)
    metrics = ShotMetrics(class_counts)
    times = []
    for _ in range(rounds):
        # Interleaved, so that other load affects all of them.
        counting = seconds(lambda: metrics.update(preds, targets), 200)
        scanned, lean = seconds(lambda: scan(*arrays)), seconds(lambda: lean_scan(*arrays))
        report = seconds(lambda: shot_accuracy(preds, targets, class_counts), 100)
        ratios = (scanned / counting, lean / counting, scanned / report)
        times.append((scanned, lean, counting, report, *ratios))
    return Row(num_classes, num_images, *map(statistics.median, zip(*times, strict=True)))


def check_equal() -> None:
    """Checks that scan and counting agree."""
    preds, targets = predictions(50, 1000)
    report = shot_accuracy(preds, targets, [5] * 50)
    right, images = report.right_and_images()
    counted = np.stack([images, right, report.predicted], axis=1).tolist()
    arrays = (preds.numpy(), targets.numpy(), 50)
    if counted != [list(row) for row in scan(*arrays)]:
        raise SystemExit("scan and counting differ")
    if [row[:2] for row in counted] != [list(row) for row in lean_scan(*arrays)]:
        raise SystemExit("lean scan and counting differ")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = ("scan", "lean", "counting", "report")
    ratios = ("scan/counting", "required", "lean/counting", "scan/report")
    print(
        f"{'classes':>7} {'images':>6} " + " ".join(f"{name + ' ms':>11}" for name in names),
        end=" ",
    )
    print(" ".join(f"{name:>13}" for name in ratios))
    for row in measure(arguments.rounds):
        times = " ".join(f"{1000 * value:11.3f}" for value in row[2:6])
        values = (row.scan_to_counting, REQUIRED[row.num_classes], *row[7:])
        found = " ".join(f"{value:13.0f}" for value in values)
        print(f"{row.num_classes:7} {row.num_images:6} {times} {found}")


if __name__ == "__main__":
    main()
