"""Random numbers, rounding and shuffled images that are functions of (seed, epoch) alone."""

from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import Labels, check_labels

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]
Array = NDArray[Any]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Labels or images per block: bounds the temporary memory.
BLOCK = 2**18


class Purpose(IntEnum):
    """Use of a random number; each has a stream of its own."""

    ROUNDING = 0
    CYCLES = 1
    SHARES = 3
    ARRANGEMENT = 4
    REBALANCING = 5


def mix(words: Words) -> Words:
    """Scrambles 64-bit words in place, one to one: splitmix64, doi.org/10.1145/2660193.2660195."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def keyed(key: Words, numbers: Array) -> Words:
    """Returns a random 64-bit word for each pair of key and number."""
    return mix(numbers.astype(np.uint64) * GOLDEN + key)


def seed_word(seed: int, purpose: Purpose, *numbers: int) -> Words:
    """Returns a random 64-bit word (1,) for a purpose and numbers such as an epoch and a chunk."""
    sequence = np.random.SeedSequence(seed, spawn_key=(purpose, *numbers))
    return sequence.generate_state(1, np.uint64).astype(np.uint64)


def torch_generator(seed: int, purpose: Purpose, *numbers: int) -> torch.Generator:
    """Returns a generator that is seeded for a purpose."""
    return torch.Generator().manual_seed(int(seed_word(seed, purpose, *numbers)[0]))


def small_integers(stop: int) -> Array:
    """Returns 0, ..., stop - 1 in a small integer type, which is faster to sort."""
    return np.arange(stop, dtype=np.int16 if stop <= 2**15 else np.int32)


def ranges(starts: Integers, sizes: Integers) -> Integers:
    """Concatenates the ranges ``starts[i]``, ..., ``starts[i] + sizes[i] - 1``.

    >>> ranges(np.array([7, 0]), np.array([2, 3]))
    array([7, 8, 0, 1, 2])
    """
    offsets: Integers = np.repeat(starts - (sizes.cumsum() - sizes), sizes)
    return offsets + np.arange(len(offsets))


def numbered(sizes: Integers) -> tuple[Integers, Integers]:
    """Returns the group of each item, e.g. 0, 0, 1 for sizes 2, 1, and its number in the group."""
    return np.repeat(np.arange(len(sizes)), sizes), ranges(np.zeros_like(sizes), sizes)


def sort_order(keys: Array) -> Integers:
    """Returns the stable order of non-negative integers."""
    # torch sorts integers by radix, three times as fast as NumPy's comparisons.
    return torch.argsort(torch.from_numpy(keys), stable=True).numpy()


def round_systematically(probabilities: Tensor, total: int, rng: torch.Generator) -> Integers:
    """Rounds ``n * p_j`` up or down to integers (C,) that sum to n and are right on average.

    The intervals of length ``n * p_j`` are laid end to end; a class gets as many draws as there are
    marks in its interval. The marks are 1 apart and have a random offset.
    """
    # In a fixed order, neighbouring classes would never round up together.
    order = torch.randperm(len(probabilities), generator=rng)
    ends = probabilities[order].cumsum(0)
    # The division makes the last end exactly n.
    ends = ends / ends[-1] * total
    # Multiples of 2^-18 plus 2^-19: never so close to 0 or 1 that rounding errors of `ends` count.
    offset = (torch.randint(2**18, (1,), generator=rng).double() + 0.5) / 2**18
    marks = torch.floor(ends + offset).long()
    draws: Integers = np.empty(len(order), dtype=np.int64)
    draws[order.numpy()] = np.diff(marks.numpy(), prepend=0)
    return draws


def drawn_before(draws: Integers, chunk: int, num_chunks: int, key: Words) -> Integers:
    """Divides the draws (C,) of an epoch evenly among K chunks; returns those before a chunk (C,).

    The draws of class 0, then class 1, ... are numbered and cut into groups of K. A group has one
    draw for each chunk, from a random chunk on: draw ``i`` of group ``g`` belongs to chunk
    ``(i - h(g)) mod K``.
    """
    ends = draws.cumsum()
    group, rest = np.divmod(ends, num_chunks)
    shift = (keyed(key, group) % np.uint64(num_chunks)).astype(np.int64)
    # Number of chunks c' before the given one with (c' + shift) mod K < rest.
    turns, within = np.divmod(shift + chunk, num_chunks)
    begun = turns * rest + np.minimum(within, rest) - np.minimum(shift, rest)
    before: Integers = np.diff(group * chunk + begun, prepend=0)
    return before


class ImageCycles:
    """Endless sequence of the images of each class: one permutation, a cycle, after another.

    A permutation is a function of (seed, class, cycle): the images sorted by a hash of these and
    the image, of at least 40 bits. The latest cycle of each class is stored, one integer per image.
    """

    def __init__(self, labels: Labels, num_classes: int | None) -> None:
        self.counts = np.zeros(num_classes or 0, dtype=np.int64)
        for _, part in _parts(labels, num_classes):
            counts = np.bincount(part, minlength=len(self.counts))
            counts[: len(self.counts)] += self.counts
            self.counts = counts
        ends = self.counts.cumsum()
        self._starts = ends - self.counts
        total = int(ends[-1])
        self._images = np.empty(total, dtype=np.int32 if total < 2**31 else np.int64)
        following = self._starts.copy()
        for start, part in _parts(labels, num_classes):
            counts = np.bincount(part, minlength=len(self.counts))
            self._images[ranges(following, counts)] = sort_order(part) + start
            following += counts
        # -1: no cycle yet, the images are in ascending order.
        self._cycles = np.full(len(self.counts), -1)
        self._seed: int | None = None

    def draw(self, seed: int, ranks: Integers, amounts: Integers) -> Array:
        """Returns ``amounts`` (C,) images, class after class, behind the first ``ranks`` (C,)."""
        if seed != self._seed:
            self._seed, self._key = seed, seed_word(seed, Purpose.CYCLES)
            self._cycles.fill(-1)
        images = np.empty(amounts.sum(), dtype=self._images.dtype)
        begin = amounts.cumsum() - amounts
        classes = np.flatnonzero(amounts)
        work = (self.counts[classes] + amounts[classes]).cumsum() // BLOCK
        for few in np.split(classes, np.flatnonzero(np.diff(work)) + 1):
            self._draw(few, ranks[few], amounts[few], begin[few], images)
        return images

    def _draw(
        self, classes: Integers, ranks: Integers, amounts: Integers, begin: Integers, images: Array
    ) -> None:
        """Writes the draws of some classes to ``images``, those of each class from ``begin`` on."""
        sizes = self.counts[classes]
        first = ranks // sizes
        touched = (ranks + amounts - 1) // sizes - first + 1
        # From here on, one row per (class, cycle).
        which, repeat = numbered(touched)
        last = repeat == touched[which] - 1
        cycle, size, home = first[which] + repeat, sizes[which], self._starts[classes][which]
        # Of each cycle, the images from `low` to `low + taken` are drawn.
        low = np.where(repeat == 0, ranks[which] - cycle * size, 0)
        taken = np.where(last, (ranks + amounts)[which] - cycle * size, size) - low
        to = begin[which] + cycle * size + low - ranks[which]
        stored = cycle == self._cycles[classes][which]
        source = ranges((home + low)[stored], taken[stored])
        images[ranges(to[stored], taken[stored])] = self._images[source]
        if stored.all():
            return
        new = ~stored
        which, cycle, size, low, taken = (a[new] for a in (which, cycle, size, low, taken))
        permuted = self._permute(classes[which], cycle)
        start = size.cumsum() - size
        images[ranges(to[new], taken)] = permuted[ranges(start + low, taken)]
        # Store the cycles that more will be drawn from.
        open_ = last[new] & (low + taken < size)
        done = classes[which[open_]]
        # After an interrupt between these lines, the cycle counts as not stored.
        self._cycles[done] = -1
        self._images[ranges(self._starts[done], self.counts[done])] = permuted[
            ranges(start[open_], size[open_])
        ]
        self._cycles[done] = cycle[open_]

    def _permute(self, classes: Integers, cycles: Integers) -> Array:
        """Returns the permutations of some (class, cycle), one after another."""
        sizes = self.counts[classes]
        images = self._images[ranges(self._starts[classes], sizes)]
        row = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
        key = np.repeat(keyed(keyed(self._key, classes), cycles), sizes)
        # The sort key is the row, then as many bits of the hash as there is room for.
        bits = np.uint64(len(sizes).bit_length() + 1)
        hashes = keyed(key, images)
        hashes >>= bits
        row <<= np.uint64(64) - bits
        hashes |= row
        return images[sort_order(hashes.view(np.int64))]


def _parts(labels: Labels, num_classes: int | None) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yields checked labels block by block, each with the index of its first label."""
    if not isinstance(labels, Tensor | np.ndarray) or labels.ndim != 1 or len(labels) == 0:
        labels = check_labels(labels, num_classes)
    try:
        for start in range(0, len(labels), BLOCK):
            yield start, check_labels(labels[start : start + BLOCK], num_classes).numpy()
    except UsageError:
        # The error names the index among all labels.
        check_labels(labels, num_classes)
