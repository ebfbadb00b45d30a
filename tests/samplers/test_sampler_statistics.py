"""Chi-square tests of samplers, each shown to fail for a sampler that is broken.

All seeds are fixed, so a test that passes once passes always. A correct sampler must stay above
``PLAUSIBLE``, which one in 10^5 would miss by chance; a broken one must fall below ``ABSURD``.
"""

import collections
import itertools

import numpy as np
import pytest
from scipy import stats

from timm_lt.samplers import ClassSampler, create_sampler, streams

PLAUSIBLE, ABSURD = 1e-5, 1e-20
exhaustive = pytest.mark.exhaustive


def p_value(observed, categories):
    """Returns the chi-square p-value of observations of equally likely categories."""
    counts = collections.Counter(observed)
    categories = list(categories)
    assert set(counts) <= set(categories)
    return stats.chisquare([counts[category] for category in categories]).pvalue


def epoch_of(sampler, seed, epoch=0):
    sampler.seed = seed
    return sampler.epoch_indices(epoch).tolist()


def several_chunks(monkeypatch, chunk_size=25):
    """Divides an epoch into many chunks, and their classes into many blocks."""
    monkeypatch.setattr(ClassSampler, "chunk_size", chunk_size)
    monkeypatch.setattr(streams, "BLOCK", 4)


# Ways to break a sampler


def without_mixing(monkeypatch):
    monkeypatch.setattr(streams, "mix", lambda words: words)


def the_same_in_every_epoch(monkeypatch):
    right = streams.torch_generator
    same = lambda seed, purpose, _, *rest: right(seed, purpose, 0, *rest)  # noqa: E731
    monkeypatch.setattr(streams, "torch_generator", same)


def the_same_in_every_cycle(monkeypatch):
    right = streams.ImageCycles._permute
    same = lambda self, classes, cycles: right(self, classes, np.zeros_like(cycles))  # noqa: E731
    monkeypatch.setattr(streams.ImageCycles, "_permute", same)


def without_arranging(monkeypatch):
    def arrange(self, plan, chunk, amounts, rng):
        return np.repeat(np.arange(len(amounts)), amounts)

    monkeypatch.setattr(ClassSampler, "_arrange", arrange)


def shares_without_shift(monkeypatch):
    monkeypatch.setattr(streams, "keyed", lambda key, numbers: np.zeros_like(numbers, np.uint64))


# Class c has c + 1 images, which follow each other in the data.
SIZES = [1, 2, 3, 4, 5, 6]
FIRST = [0, 1, 3, 6, 10, 15]
SMALL_CLASSES = [label for label, size in enumerate(SIZES) for _ in range(size)]


def orders_over(seeds=1, epochs=1):
    """Returns the orders of the images of each class in first epochs, or in those of one seed."""
    sampler = create_sampler("instance_balanced", SMALL_CLASSES)
    return [epoch_of(sampler, seed, epoch) for seed in range(seeds) for epoch in range(epochs)]


def orders_of_cycles_in_pieces(runs):
    """Returns the same over cycles that begin and end anywhere in an epoch, and in its chunks."""
    sampler = create_sampler("class_balanced", SMALL_CLASSES, num_samples=6 * 50)
    drawn = [[] for _ in SIZES]
    for epoch in range(runs * 6 // 50):
        for index in epoch_of(sampler, 0, epoch):
            drawn[SMALL_CLASSES[index]].append(index)
    return [
        [i for images, n in zip(drawn, SIZES, strict=True) for i in images[run * n : (run + 1) * n]]
        for run in range(runs)
    ]


def p_values_of_orders(epochs):
    observed = [[] for _ in SIZES]
    for stream in epochs:
        orders = [[] for _ in SIZES]
        for index in stream:
            orders[SMALL_CLASSES[index]].append(index - FIRST[SMALL_CLASSES[index]])
        for label, order in enumerate(orders):
            observed[label].append(tuple(order))
    return [p_value(observed[n - 1], itertools.permutations(range(n))) for n in SIZES[1:]]


@pytest.mark.parametrize("in_chunks", [False, True])
def test_all_orders_of_cycles_are_equally_likely(in_chunks, monkeypatch):
    if in_chunks:
        several_chunks(monkeypatch)
    # 6! = 720 orders of the largest class, five each.
    assert min(p_values_of_orders(orders_of_cycles_in_pieces(3600))) > PLAUSIBLE


@pytest.mark.parametrize("over", ["seeds", "epochs"])
def test_all_orders_within_a_class_are_equally_likely(over, monkeypatch):
    assert min(p_values_of_orders(orders_over(**{over: 3600}))) > PLAUSIBLE
    without_mixing(monkeypatch)
    assert max(p_values_of_orders(orders_over(**{over: 1000}))[1:]) < ABSURD


LABELS = [0] * 10 + [1] * 5 + [2] * 3 + [3]


def p_values_of_positions(name, runs=1500, **options):
    """Returns a p-value for each position of an epoch of several chunks: the image drawn there."""
    n = 60
    sampler = create_sampler(name, LABELS, num_samples=n, **options)
    observed = np.zeros((n, len(LABELS)))
    for seed in range(runs):
        observed[np.arange(n), epoch_of(sampler, seed, 1)] += 1
    p = sampler.class_probabilities(1).numpy()[LABELS]
    expected = runs * p / np.bincount(LABELS)[LABELS]
    return stats.chisquare(observed, expected[None].repeat(n, 0), axis=1).pvalue


@pytest.mark.parametrize("chunk_size", [20, pytest.param(1000, marks=exhaustive)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("power", {"q": 0.3}),
        *(pytest.param(name, {}, marks=exhaustive) for name in ("class_balanced", "reversed")),
        pytest.param("effective_number", {"beta": 0.9}, marks=exhaustive),
        pytest.param("progressively_balanced", {"epochs": 3}, marks=exhaustive),
        pytest.param("deferred", {"start": 1}, marks=exhaustive),
    ],
)
def test_every_image_is_equally_likely_at_every_position(name, options, chunk_size, monkeypatch):
    several_chunks(monkeypatch, chunk_size)
    # The least of 60.
    assert p_values_of_positions(name, **options).min() > PLAUSIBLE


def test_without_arranging_positions_are_not_equally_likely(monkeypatch):
    several_chunks(monkeypatch, chunk_size=20)
    without_arranging(monkeypatch)
    assert p_values_of_positions("class_balanced", 500).min() < ABSURD


def consecutive_orders(runs):
    """Returns the p-value of the orders of 3 images in consecutive cycles: 6 x 6 pairs."""
    sampler = create_sampler("instance_balanced", [0, 0, 0, 1, 1])
    pairs = [
        tuple(tuple(i for i in epoch_of(sampler, seed, epoch) if i < 3) for epoch in (1, 2))
        for seed in range(runs)
    ]
    return p_value(pairs, itertools.product(itertools.permutations(range(3)), repeat=2))


def consecutive_positions(runs):
    """Returns the p-value of the positions of one image in consecutive epochs: 6 x 6 pairs."""
    sampler = create_sampler("instance_balanced", [0, 1, 1, 1, 2, 2])
    positions = [epoch_of(sampler, 0, epoch).index(0) for epoch in range(2 * runs)]
    pairs = zip(positions[::2], positions[1::2], strict=True)
    return p_value(pairs, itertools.product(range(6), repeat=2))


def consecutive_rounding(runs):
    """Returns the p-value of two of four equal classes in consecutive epochs: 6 x 6 pairs."""
    sampler = create_sampler("class_balanced", [0, 1, 2, 3], num_samples=2)
    drawn = [tuple(sorted(epoch_of(sampler, 0, epoch))) for epoch in range(2 * runs)]
    classes = itertools.combinations(range(4), 2)
    return p_value(zip(drawn[::2], drawn[1::2], strict=True), itertools.product(classes, repeat=2))


def position_of_one(runs):
    """Returns the p-value of the position of a class's only image, in an epoch of two chunks."""
    sampler = create_sampler("instance_balanced", [0] * 9 + [1])
    return p_value([epoch_of(sampler, seed).index(9) for seed in range(runs)], range(10))


@pytest.mark.parametrize(
    ("measure", "break_it"),
    [
        (consecutive_orders, the_same_in_every_cycle),
        (consecutive_positions, the_same_in_every_epoch),
        (consecutive_rounding, the_same_in_every_epoch),
        (position_of_one, shares_without_shift),
    ],
)
def test_draws_are_independent_and_broken_ones_are_not(measure, break_it, monkeypatch):
    if measure is position_of_one:
        several_chunks(monkeypatch, chunk_size=8)
    assert measure(3000) > PLAUSIBLE
    break_it(monkeypatch)
    assert measure(500) < ABSURD
