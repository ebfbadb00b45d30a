"""Time of an epoch's draws, as a ratio to torch's RandomSampler, and their memory.

``python benchmarks/sampler_cost.py``: one thread, CPU time, the samplers interleaved, each epoch a
new one, median of the ratios. ``python benchmarks/sampler_cost.py --memory`` takes 100 M labels and
counts the resident memory beyond them.
"""

import argparse
import collections
import random
import resource
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import RandomSampler, Sampler

import timm_lt

SIZES = {
    "ImageNet-LT": (115_846, 1_000),
    "iNaturalist 2018": (437_513, 8_142),
    "10 M": (10_000_000, 100_000),
}
STEPS = 100
SAMPLERS = {
    "instance_balanced": {},
    "class_balanced": {},
    "class_balanced, 4 in a row": {"samples_per_class": 4},
    "square_root": {},
    "power": {"q": 0.25},
    "progressively_balanced": {"epochs": 1000},
    f"progressively_balanced, {STEPS} steps": {"epochs": 1000, "steps_per_epoch": STEPS},
    "under_sampled": {"target": 50},
    "over_sampled": {"target": 100},
    "reversed": {},
    "effective_number": {"beta": 0.999},
}


def long_tailed_labels(num_images: int, num_classes: int) -> np.ndarray:
    """Returns shuffled labels of classes that shrink as a power of their rank, from 4 images up."""
    weights = np.arange(1, num_classes + 1) ** -0.8
    counts = np.maximum((weights / weights.sum() * num_images).astype(int), 4)
    counts[0] += num_images - counts.sum()
    return np.random.default_rng(0).permutation(np.repeat(np.arange(num_classes), counts))


class PlainClassAwareSampler(Sampler[int]):
    """Class-balanced sampling in plain Python, with lists and random.

    Goes through a shuffled list of the classes; of each takes the next images of its own shuffled
    list; a list that is at its end is shuffled again.
    """

    def __init__(self, labels: Iterable[int], samples_per_class: int = 1) -> None:
        images = collections.defaultdict(list)
        for index, label in enumerate(labels):
            images[label].append(index)
            self.length = index + 1
        self.images = [self.cycle(of_class) for of_class in images.values()]
        self.classes = self.cycle(list(range(len(self.images))))
        self.samples_per_class = samples_per_class

    @staticmethod
    def cycle(items: list[int]) -> Iterator[int]:
        """Yields the items forever, reshuffled in each cycle."""
        while True:
            random.shuffle(items)
            yield from items

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        left = self.length
        while left:
            images = self.images[next(self.classes)]
            for _ in range(min(self.samples_per_class, left)):
                yield next(images)
                left -= 1


def seconds(sampler: Iterable[int]) -> float:
    """Returns the CPU time of iterating once."""
    start = time.process_time()
    collections.deque(sampler, maxlen=0)
    return time.process_time() - start


def compare(labels: np.ndarray, rounds: int) -> None:
    """Prints a row per sampler: cost per draw over that of RandomSampler and of the plain one."""
    n = len(labels)
    reference = RandomSampler(range(n))
    plain = PlainClassAwareSampler(labels.tolist())
    samplers = {}
    for name, options in SAMPLERS.items():
        start = time.process_time()
        samplers[name] = timm_lt.create_sampler(name.split(",")[0], labels, **options)
        created = time.process_time() - start
    print(f"creating one: {1e3 * created:.1f} ms; epochs per row: 1 + {rounds}")
    first = {name: seconds(sampler) for name, sampler in samplers.items()}
    to_random, to_plain = collections.defaultdict(list), collections.defaultdict(list)
    for epoch in range(1, rounds + 1):
        of_reference, of_plain = seconds(reference) / n, seconds(plain) / n
        for name, sampler in samplers.items():
            sampler.set_epoch(epoch)
            cost = seconds(sampler) / len(sampler)
            to_random[name].append(cost / of_reference)
            to_plain[name].append(cost / of_plain)
            last = of_reference * len(sampler)
            first[name] = first[name] / last if epoch == 1 else first[name]
    print(f"{'sampler':36}{'draws':>12}{'/ random':>10}{'first':>8}{'/ plain':>10}")
    for name, sampler in samplers.items():
        ratios = statistics.median(to_random[name]), first[name], statistics.median(to_plain[name])
        print(f"{name:36}{len(sampler):12,}{ratios[0]:10.3f}{ratios[1]:8.2f}{ratios[2]:10.3f}")


def resident() -> int:
    """Returns the bytes of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Returns the peak memory so far in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory(num_images: int, num_classes: int, ranks: int) -> None:
    """Prints the peak memory of one rank's sampler beyond the labels."""
    labels = torch.empty(num_images, dtype=torch.long)
    # Generated in parts, so that the peak memory is the sampler's.
    for part in labels.split(2**18):
        part.copy_((torch.rand(len(part)) ** 4 * num_classes).long())
    timm_lt.create_sampler("class_balanced", labels[:1000])
    before = resident()
    print(
        f"{num_images:,} labels, {num_classes:,} classes; peak so far {peak() - before:,} over now"
    )
    start = time.process_time()
    sampler = timm_lt.create_sampler("class_balanced", labels, rank=0, num_replicas=ranks)
    print(f"created: {time.process_time() - start:.1f} s", end="; ")
    print(f"peak {(peak() - before) / num_images:.2f} bytes per label beyond the labels")
    spent = seconds(sampler)
    beyond = peak() - before
    print(f"an epoch of one rank of {ranks}: {spent:.1f} s", end="; ")
    print(
        f"peak {beyond / num_images:.2f} bytes per label, {(beyond - 4 * num_images) / 2**20:.0f} "
        "MiB more than 4"
    )


def main() -> None:
    """Prints the tables, or the memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="fewer above 1 M images: a fifth")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--images", type=int, default=100_000_000)
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    if arguments.memory:
        measure_memory(arguments.images, arguments.classes, arguments.ranks)
        return
    for name in arguments.sizes:
        num_images, num_classes = SIZES[name]
        print(f"\n{name}: {num_images:,} images, {num_classes:,} classes")
        rounds = arguments.rounds if num_images < 10**6 else max(arguments.rounds // 5, 1)
        compare(long_tailed_labels(num_images, num_classes), rounds)


if __name__ == "__main__":
    main()
