"""CPU-seconds to generate GlyphLT-100: ``python benchmarks/generate_glyph_lt.py``.

One thread, process time, median of five; each run builds the three splits as ``datasets.Dataset``.
"""

import statistics
import time
from typing import get_args

import torch

import timm_lt
from timm_lt.data.sources import Split


def main() -> None:
    """Prints the median and the range."""
    torch.set_num_threads(1)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        images = sum(
            len(timm_lt.create_dataset("glyph_lt", split=split)) for split in get_args(Split)
        )
        seconds.append(time.process_time() - started)
    print(
        f"{images:,} images: {statistics.median(seconds):.2f} CPU-seconds "
        f"({min(seconds):.2f} to {max(seconds):.2f})"
    )


if __name__ == "__main__":
    main()
