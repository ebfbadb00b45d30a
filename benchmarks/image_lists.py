"""Reading lists of images, as a ratio to a loop over their lines in Python; memory of a long one.

``python benchmarks/image_lists.py``: one thread, CPU time, interleaved, medians. The list has
437,513 lines of the form of iNaturalist 2018's. ``--files`` also looks 115,846 files up on disk,
directory by directory and one by one. The memory is what the process has at most beyond what it
had, a line, for 10 M lines with paths of 40 characters.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from timing import seconds

from timm_lt.data import read_image_list
from timm_lt.data.lists import missing_rows
from timm_lt.data.sources import Paths

LINES = 437_513
LONG = 10_000_000
FILES, FOLDERS = 115_846, 1000
GROUPS = ("Plantae", "Insecta", "Aves", "Fungi")


def write_inaturalist(path: Path, blank: str = " ", end: str = "\n") -> None:
    """Writes a list in the format of iNaturalist 2018's."""
    rng = np.random.default_rng(0)
    digits = rng.bytes(16 * LINES).hex()
    labels = rng.integers(8142, size=LINES).tolist()
    with path.open("w", newline="") as file:
        for row, label in enumerate(labels):
            name = digits[32 * row : 32 * row + 32]
            group = GROUPS[label % len(GROUPS)]
            file.write(f"train_val2018/{group}/{label}/{name}.jpg{blank}{label}{end}")


def write_long(path: Path) -> None:
    """Writes 10 M lines with paths of 40 characters."""
    with path.open("w") as file:
        for start in range(0, LONG, 100_000):
            rows = range(start, start + 100_000)
            file.writelines(f"images/{row % 1000:04}/{row:024}.jpg {row % 1000}\n" for row in rows)


def loop(path: Path) -> tuple[list[str], list[int]]:
    """Reads a list line by line."""
    paths, labels = [], []
    with path.open() as file:
        for line in file:
            name, label = line.rsplit(None, 1)
            paths.append(name)
            labels.append(int(label))
    return paths, labels


def check_equal(path: Path) -> None:
    """Checks that both read the same."""
    paths, labels = read_image_list(path)
    expected = loop(path)
    if list(paths) != expected[0] or labels.tolist() != expected[1]:
        raise SystemExit("the list and the loop differ")


def compare(
    name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> None:
    """Prints the median times of two functions and the median ratio."""
    times = [(seconds(ours), seconds(theirs)) for _ in range(rounds + 1)][1:]
    ratio = statistics.median(mine / other for mine, other in times)
    medians = [1000 * statistics.median(column) for column in zip(*times, strict=True)]
    print(f"{name:34} {medians[0]:8.1f} {medians[1]:8.1f} {ratio:7.3f}")


def print_memory(path: Path) -> None:
    """Prints the peak memory per line of reading a list, in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    paths, _ = read_image_list(path)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{len(paths):,} lines: {1024 * more / len(paths):.1f} bytes a line at the peak")


def compare_presence(folder: Path, rounds: int) -> None:
    """Compares ways to find which of many files exist."""
    names = []
    for row in range(FILES):
        file = folder / f"{row % FOLDERS:04}" / f"{row}.jpg"
        if row < FOLDERS:
            file.parent.mkdir()
        file.touch()
        names.append(str(file))
    paths = Paths(names)
    compare(
        "files there: listed / one by one",
        lambda: missing_rows(paths),
        lambda: [row for row, name in enumerate(names) if not os.path.isfile(name)],  # noqa: PTH113
        rounds,
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--files", action="store_true")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_memory(arguments.memory_of)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.txt"
        print(f"{'':34} {'ours ms':>8} {'loop ms':>8} {'ratio':>7}")
        for name, blank, end in (
            ("path label", " ", "\n"),
            ("tabs", "\t", "\n"),
            ("Windows' line ends", " ", "\r\n"),
        ):
            write_inaturalist(path, blank, end)
            check_equal(path)
            compare(name, lambda: read_image_list(path), lambda: loop(path), arguments.rounds)
        if arguments.files:
            compare_presence(Path(folder), arguments.rounds)
        write_long(path)
        # In a fresh process.
        subprocess.run([sys.executable, __file__, "--memory-of", str(path)], check=True)


if __name__ == "__main__":
    main()
