"""Integer arithmetic that all samplers share: keys, rounding, and shares of an epoch."""

from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
