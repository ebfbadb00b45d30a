"""A large folder of images: time to the first batch, and throughput.

``python benchmarks/folders.py``: 100,000 hard links to a few hundred JPEG files of about 300 x 200
pixels, in 1,000 classes with a long tail. First the seconds of what happens before training, then
the CPU time of batches relative to timm's own reader over the same files with the same transform,
in turn, one thread. A ratio above 1 says that timm_lt decodes more images in the same time.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from timing import seconds
from torchvision.datasets import ImageFolder

from timm_lt import create_sampler
from timm_lt.data import Splits, create_splits
from timm_lt.data.decode import find_damaged
from timm_lt.data.folder import list_folder
from timm_lt.data.loader import NumberedSampler
from timm_lt.utils.accelerator import create_accelerator
from timm_lt.utils.longtail import long_tailed_counts

CLASSES, IMBALANCE = 1000, 100
SIZE, BATCH = (224, 224), 256
PREPROCESSING = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic"}
AUGMENTATION = {"scale": (0.08, 1.0), "hflip": 0.5, "color_jitter": 0.4}


def make_folder(root: Path, number: int, distinct: int) -> int:
    """Writes the folder; returns the number of images."""
    generator = np.random.default_rng(0)
    files = []
    (root.parent / "distinct").mkdir()
    for place in range(distinct):
        width, height = (int(side) for side in generator.integers((250, 170), (350, 230)))
        coarse = generator.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        grain = generator.integers(-12, 13, (height, width, 3))
        pixels = (np.asarray(smooth).astype(int) + grain).clip(0, 255).astype(np.uint8)
        files.append(root.parent / "distinct" / f"{place}.jpg")
        Image.fromarray(pixels).save(files[-1], quality=88)
    shape = long_tailed_counts(CLASSES, 10**6, IMBALANCE)
    counts = [max(count * number // sum(shape), 3) for count in shape]
    for label, count in enumerate(counts):
        of_class = root / f"class_{label:04d}"
        of_class.mkdir(parents=True)
        for place in range(count):
            os.link(files[(label + place) % distinct], of_class / f"image_{place:06d}.jpg")
    return sum(counts)


def timed(work: Callable[[], Any]) -> tuple[Any, str]:
    """Returns the result of a function with its wall and CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return result, f"{wall:8.2f} {cpu:8.2f}"


def our_batches(splits: Splits, workers: int) -> Iterator[Any]:
    """Yields the batches of an epoch of the training loader."""
    images = splits.stored_images(
        "train",
        size=SIZE,
        preprocessing=PREPROCESSING,
        augmentation=AUGMENTATION,
        workers=workers,
    )
    number = len(images)
    sampler = NumberedSampler(create_sampler("instance_balanced", images.labels), number, number)
    return iter(images.train_loader(BATCH, sampler, create_accelerator(mixed_precision="no")))


def timm_batches(root: Path, workers: int) -> Iterator[Any]:
    """Yields the batches of an epoch of timm's loader."""
    loader: Iterable[Any] = timm.data.create_loader(
        timm.data.ImageDataset(root),
        (3, *SIZE),
        BATCH,
        is_training=True,
        num_workers=workers,
        device=torch.device("cpu"),
        persistent_workers=False,
        **PREPROCESSING,
        **AUGMENTATION,
    )
    return iter(loader)


def startup(root: Path) -> None:
    """Prints the seconds of each step before the first batch."""
    print(f"{'':48} {'wall s':>8} {'CPU s':>8}")
    _, listing = timed(lambda: list_folder(root))
    print(f"{'listing':48} {listing}")
    splits, making = timed(lambda: create_splits("folder", root=root))
    print(f"{'listing, splits, labels and class counts':48} {making}")
    _, verifying = timed(lambda: [find_damaged(data) for data in splits.datasets.values()])
    print(f"{'verification of all files':48} {verifying}")
    _, first = timed(lambda: next(our_batches(splits, 0)))
    print(f"{f'loader and first batch of {BATCH}':48} {first}")
    _, theirs = timed(lambda: ImageFolder(root))
    print(f"{'torchvision: ImageFolder':48} {theirs}")
    _, theirs = timed(lambda: timm.data.ImageDataset(root))
    print(f"{'timm: ImageDataset':48} {theirs}")
    _, theirs = timed(lambda: next(timm_batches(root, 0)))
    print(f"{f'timm: ImageDataset, loader and first batch of {BATCH}':48} {theirs}")


def throughput(root: Path, rounds: int, batches: int) -> None:
    """Prints images per CPU-second of both loaders, measured in turn, and the median ratio."""
    splits = create_splits("folder", root=root)
    ours, theirs = our_batches(splits, 0), timm_batches(root, 0)
    next(ours), next(theirs)
    times: list[tuple[float, float]] = []
    for number in range(rounds):
        pair = [
            seconds(lambda loader=loader: list(islice(loader, batches)))
            for loader in ((ours, theirs) if number % 2 else (theirs, ours))
        ]
        times.append((pair[0], pair[1]) if number % 2 else (pair[1], pair[0]))
    images = BATCH * batches
    for name, column in zip(("timm_lt", "timm"), zip(*times, strict=True), strict=True):
        print(f"{name:8} {images / statistics.median(column):8.1f} images per CPU-second")
    ratio = statistics.median(their / our for our, their in times)
    print(f"ratio    {ratio:8.3f}")


def main() -> None:
    """Creates the folder and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--distinct", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batches", type=int, default=2, help="per round")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        number = make_folder(root, arguments.images, arguments.distinct)
        print(f"{number:,} images of {CLASSES} classes")
        startup(root)
        throughput(root, arguments.rounds, arguments.batches)


if __name__ == "__main__":
    main()
