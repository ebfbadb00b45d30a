"""The images of each class in cycles: every image once, in an order of its own for each cycle.

Integer arithmetic that all samplers share: keys, rounding, and shares of an epoch.
"""

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

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(words: Words) -> Words:
    """Scrambles 64-bit words in place, one to one: the finaliser of splitmix64.

    References:
        Steele et al., Fast Splittable Pseudorandom Number Generators, OOPSLA 2014,
        https://doi.org/10.1145/2660193.2660195
    """
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def keyed(key: Words, numbers: NDArray[Any]) -> Words:
    """Returns a random 64-bit word per (key, number), a function of the two."""
    return mix(numbers.astype(np.uint64) * GOLDEN + key)


class Purpose(IntEnum):
    """What a random number is for, so that no two uses share a stream."""

    ROUNDING = 0
    CYCLES = 1
    SHUFFLING = 2
    SHARES = 3
    ARRANGEMENT = 4
    REBALANCING = 5


def seed_sequence(seed: int, purpose: Purpose, *numbers: int) -> np.random.SeedSequence:
    """Mixes a seed of any size with what it is for and, say, epoch and chunk."""
    return np.random.SeedSequence(seed, spawn_key=(purpose, *numbers))


def seed_word(seed: int, purpose: Purpose, *numbers: int) -> Words:
    """Returns one random 64-bit word of shape (1,)."""
    words = seed_sequence(seed, purpose, *numbers).generate_state(1, np.uint64)
    return words.astype(np.uint64)


def torch_generator(seed: int, purpose: Purpose, *numbers: int) -> torch.Generator:
    """Returns a generator of its own for each purpose and its numbers."""
    return torch.Generator().manual_seed(int(seed_word(seed, purpose, *numbers)[0]))


def blocks(sizes: Integers) -> tuple[Integers, Integers]:
    """Lays blocks end to end; returns, for each place, its block and its number in the block.

    >>> blocks(np.array([2, 0, 3]))
    (array([0, 0, 2, 2, 2]), array([0, 1, 0, 1, 2]))
    """
    block = np.repeat(np.arange(len(sizes)), sizes)
    return block, places(np.zeros_like(sizes), sizes)


def places(starts: Integers, sizes: Integers) -> Integers:
    """Returns the ranges ``starts[i]``, ..., ``starts[i] + sizes[i] - 1``, end to end.

    >>> places(np.array([7, 0]), np.array([2, 3]))
    array([7, 8, 0, 1, 2])
    """
    ranges: Integers = np.repeat(starts - (sizes.cumsum() - sizes), sizes)
    ranges += np.arange(len(ranges))
    return ranges


def sort_order(keys: NDArray[Any]) -> Integers:
    """Returns the stable order of non-negative integers."""
    # torch sorts integers by radix, three times as fast as NumPy's comparisons.
    order: Integers = torch.argsort(torch.from_numpy(keys), stable=True).numpy()
    return order


def round_systematically(
    probabilities: Tensor, num_samples: int, generator: torch.Generator
) -> Tensor:
    """Rounds ``n * p_j`` to integers (C,) that sum to n, each up or down and right on average.

    Marks lie at distance 1, offset by one uniform number; class ``j`` owns a stretch of length
    ``n * p_j`` and gets the marks in it.
    """
    # In a fixed order, neighbouring classes would never round up together.
    order = torch.randperm(len(probabilities), generator=generator)
    ends = probabilities[order].cumsum(0)
    # Dividing by the last sum puts the last end on n exactly.
    ends = ends / ends[-1] * num_samples
    # In the middle of one of 2^18 steps: no closer to 0 or 1 than 2^-19, far more than the rounding
    # errors of `ends`, so that a whole n * p_j is never off by one.
    offset = (torch.randint(2**18, (1,), generator=generator).double() + 0.5) / 2**18
    marks = torch.floor(ends + offset).long()
    draws = torch.empty_like(marks)
    draws[order] = torch.diff(marks, prepend=torch.zeros(1, dtype=torch.long))
    return draws


def drawn_before(draws: Integers, chunk: int, num_chunks: int, key: Words) -> Integers:
    """Shares the draws (C,) of an epoch evenly among K chunks; returns those before a chunk (C,).

    The draws of class 0, then class 1, ... are numbered and cut into groups of K. Each group gives
    one draw to each chunk, beginning at a chunk that is random: number ``i`` of group ``g`` goes to
    chunk ``(i - h(g)) mod K``. What is counted here is, below the last number of each class, how
    many went to a chunk before the given one.
    """
    ends = draws.cumsum()
    group, rest = np.divmod(ends, num_chunks)
    shift = (keyed(key, group) % np.uint64(num_chunks)).astype(np.int64)
    # Chunks c' with (c' + shift) mod K < rest, among those before the given one.
    turns, place = np.divmod(shift + chunk, num_chunks)
    begun = turns * rest + np.minimum(place, rest) - np.minimum(shift, rest)
    before: Integers = np.diff(group * chunk + begun, prepend=0)
    return before


# Labels, or images, that are handled at once: what is temporary is proportional to it.
BLOCK = 2**18


class ImageCycles:
    """The endless sequence of each class: cycle 0, cycle 1, ..., each a permutation of its images.

    The permutation is a function of (seed, class, cycle): the images sorted by a hash of these
    three and the image. It has at least 40 bits, so two images tie once in 10^12 pairs.

    The one array with a number per image holds, for each class, the permutation of one cycle: the
    one that was drawn from last. What is drawn does not depend on which one that is, only the
    time: within a cycle, drawing copies; a new cycle costs a sort of the class, and is done where
    the array is.

    Args:
        labels: Integer labels, one per image.
        num_classes: Number of classes; None takes the largest label plus one.

    Raises:
        UsageError: If a label is out of range.
    """

    def __init__(self, labels: Labels, num_classes: int | None) -> None:
        self.counts = np.zeros(num_classes or 0, dtype=np.int64)
        for _, part in _parts(labels, num_classes):
            more = np.bincount(part, minlength=len(self.counts))
            more[: len(self.counts)] += self.counts
            self.counts = more
        ends = self.counts.cumsum()
        self._starts = ends - self.counts
        total = int(ends[-1])
        self._images = np.empty(total, dtype=np.int32 if total < 2**31 else np.int64)
        following = self._starts.copy()
        for start, part in _parts(labels, num_classes):
            order = sort_order(part)
            counts = np.bincount(part, minlength=len(self.counts))
            self._images[places(following, counts)] = order + start
            following += counts
        # -1 is no cycle: the images in ascending order.
        self._cycles = np.full(len(self.counts), -1)
        self._seed: int | None = None

    def draw(self, seed: int, ranks: Integers, amounts: Integers) -> NDArray[Any]:
        """Returns the next images of each class, class after class.

        Args:
            seed: Seed of the permutations.
            ranks: Images of each class (C,) that were drawn before, over all epochs.
            amounts: Images of each class (C,) to draw; 0 where it has none.
        """
        if seed != self._seed:
            self._seed, self._key = seed, seed_word(seed, Purpose.CYCLES)
            self._cycles.fill(-1)
        images = np.empty(amounts.sum(), dtype=self._images.dtype)
        begin = amounts.cumsum() - amounts
        large = self.counts > BLOCK
        for c in np.flatnonzero(large & (amounts > 0)):
            part = images[begin[c] : begin[c] + amounts[c]]
            self._draw_large(int(c), int(ranks[c]), part)
        classes = np.flatnonzero(~large & (amounts > 0))
        # What is temporary is proportional to the images of the classes, or the draws if more.
        work = (self.counts[classes] + amounts[classes]).cumsum() // BLOCK
        for few in np.split(classes, np.flatnonzero(np.diff(work)) + 1):
            self._draw_small(few, ranks[few], amounts[few], begin[few], images)
        return images

    def _draw_small(
        self,
        classes: Integers,
        ranks: Integers,
        amounts: Integers,
        begin: Integers,
        images: NDArray[Any],
    ) -> None:
        """Writes the draws of some classes to ``images``, each from the place ``begin`` on."""
        sizes = self.counts[classes]
        first = ranks // sizes
        touched = (ranks + amounts - 1) // sizes - first + 1
        # From here on, one row per (class, cycle).
        which, repeat = blocks(touched)
        last = repeat == touched[which] - 1
        cycle, size, home = first[which] + repeat, sizes[which], self._starts[classes][which]
        # Of each cycle the places `low` to `low + taken` are drawn.
        low = np.where(repeat == 0, ranks[which] - cycle * size, 0)
        taken = np.where(last, (ranks + amounts)[which] - cycle * size, size) - low
        to = begin[which] + cycle * size + low - ranks[which]
        kept = cycle == self._cycles[classes][which]
        source = places((home + low)[kept], taken[kept])
        images[places(to[kept], taken[kept])] = self._images[source]
        if kept.all():
            return
        new = ~kept
        which, cycle, size, low, taken = (a[new] for a in (which, cycle, size, low, taken))
        permuted = self._permute(classes[which], cycle)
        start = size.cumsum() - size
        images[places(to[new], taken)] = permuted[places(start + low, taken)]
        # A cycle that ends here is not drawn from again.
        unfinished = last[new] & (low + taken < size)
        self._keep(
            classes[which[unfinished]],
            cycle[unfinished],
            permuted[places(start[unfinished], size[unfinished])],
        )

    def _keep(self, classes: Integers, cycles: Integers, permuted: NDArray[Any]) -> None:
        """Stores the permutations of some classes, end to end, in place of those that it has."""
        # An interrupt between these lines must not leave an order under the name of another.
        self._cycles[classes] = -1
        self._images[places(self._starts[classes], self.counts[classes])] = permuted
        self._cycles[classes] = cycles

    def _permute(self, classes: Integers, cycles: Integers) -> NDArray[Any]:
        """Returns the permutations of some (class, cycle), end to end."""
        sizes = self.counts[classes]
        images = self._images[places(self._starts[classes], sizes)]
        row = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
        key = np.repeat(keyed(keyed(self._key, classes), cycles), sizes)
        # Sorted by row and, within, by as many bits of the hash as there is room for.
        bits = np.uint64(len(sizes).bit_length() + 1)
        hashes = keyed(key, images)
        hashes >>= bits
        row <<= np.uint64(64) - bits
        hashes |= row
        return images[sort_order(hashes.view(np.int64))]

    def _draw_large(self, c: int, rank: int, images: NDArray[Any]) -> None:
        """Writes the draws of one class, shuffled in place, for it may be most of the data."""
        size, start = int(self.counts[c]), self._starts[c]
        home = self._images[start : start + size]
        done = 0
        while done < len(images):
            cycle, place = divmod(rank + done, size)
            if self._cycles[c] != cycle:
                self._cycles[c] = -1
                home.sort()
                bits = seed_sequence(self._seed or 0, Purpose.SHUFFLING, c, cycle)
                np.random.Generator(np.random.Philox(bits)).shuffle(home)
                self._cycles[c] = cycle
            part = home[place : place + len(images) - done]
            images[done : done + len(part)] = part
            done += len(part)


def _parts(labels: Labels, num_classes: int | None) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yields checked labels part by part, each with the number of those before it."""
    if not isinstance(labels, Tensor | np.ndarray) or labels.ndim != 1 or len(labels) == 0:
        labels = check_labels(labels, num_classes)
    for start in range(0, len(labels), BLOCK):
        try:
            part = check_labels(labels[start : start + BLOCK], num_classes)
        except UsageError:
            # Names the label by its place among all.
            check_labels(labels, num_classes)
            raise
        yield start, part.numpy()
