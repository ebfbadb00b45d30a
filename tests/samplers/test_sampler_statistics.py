"""Chi-square tests of what samplers draw, each shown to fail on a sampler that is broken.

All seeds are fixed, so a test that passes once passes always. An honest sampler must stay above
``PLAUSIBLE``, which one of 10^5 would miss by chance; a broken one must fall below ``ABSURD``.
"""

import collections
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from timm_lt.samplers import (
    ClassSampler,
    base,
    create_sampler,
)
from timm_lt.samplers import (
    streams as arithmetic,
)
from timm_lt.samplers import (
    streams as cycles,
)

PLAUSIBLE, ABSURD = 1e-5, 1e-20


def p_value(observed, expected):
    """The chi-square p-value of counts by category; what is not expected must not be observed."""
    assert set(observed) <= set(expected)
    counts = [observed[category] for category in expected]
    shares = np.array(list(expected.values()), dtype=float)
    return stats.chisquare(counts, shares / shares.sum() * sum(counts)).pvalue


def uniform(*choices):
    return dict.fromkeys(itertools.product(*choices), 1)


def several_chunks(monkeypatch, chunk_size=25):
    """Epochs of many chunks; classes of 5 and 6 images count as large and are shuffled in place."""
    monkeypatch.setattr(ClassSampler, "chunk_size", chunk_size)
    monkeypatch.setattr(cycles, "BLOCK", 4)


def without_mixing(monkeypatch):
    monkeypatch.setattr(arithmetic, "mix", lambda words: words)


def the_same_in_every_epoch(monkeypatch):
    generator = base.torch_generator
    monkeypatch.setattr(
        base, "torch_generator", lambda seed, purpose, _, *rest: generator(seed, purpose, 0, *rest)
    )


def the_same_in_every_cycle(monkeypatch):
    permute = cycles.ImageCycles._permute
    monkeypatch.setattr(
        cycles.ImageCycles, "_permute", lambda self, c, q: permute(self, c, np.zeros_like(q))
    )


def without_arranging(monkeypatch):
    monkeypatch.setattr(
        ClassSampler,
        "_arrange",
        lambda self, plan, chunk, amounts, _: np.repeat(np.arange(len(amounts)), amounts),
    )


def shares_without_shift(monkeypatch):
    monkeypatch.setattr(arithmetic, "keyed", lambda key, numbers: np.zeros_like(numbers, np.uint64))


# Within a class -----------------------------------------------------------------------------------

# Class c has c + 1 images, which follow each other in the data.
SIZES = [1, 2, 3, 4, 5, 6]
FIRST = [0, 1, 3, 6, 10, 15]
SMALL_CLASSES = [label for label, size in enumerate(SIZES) for _ in range(size)]


def orders_over_seeds(runs):
    """The orders of each class's images in the first epoch of many seeds."""
    sampler = create_sampler("instance_balanced", SMALL_CLASSES)
    for seed in range(runs):
        sampler.seed = seed
        yield sampler.epoch_indices(0).tolist()


def orders_over_epochs(runs):
    """The same over the epochs of one seed."""
    sampler = create_sampler("instance_balanced", SMALL_CLASSES)
    for epoch in range(runs):
        yield sampler.epoch_indices(epoch).tolist()


def orders_of_cycles_in_pieces(runs):
    """The same over cycles that begin and end anywhere in an epoch, and in its chunks."""
    sampler = create_sampler("class_balanced", SMALL_CLASSES, num_samples=6 * 50)
    drawn = [[] for _ in SIZES]
    for epoch in range(math.ceil(runs * 6 / 50)):
        for index in sampler.epoch_indices(epoch).tolist():
            drawn[SMALL_CLASSES[index]].append(index)
    for run in range(runs):
        yield [i for c, n in enumerate(SIZES) for i in drawn[c][run * n : (run + 1) * n]]


def p_values_of_orders(epochs):
    observed = [collections.Counter() for _ in SIZES]
    for stream in epochs:
        orders = [[] for _ in SIZES]
        for index in stream:
            orders[SMALL_CLASSES[index]].append(index - FIRST[SMALL_CLASSES[index]])
        for label, order in enumerate(orders):
            observed[label][tuple(order)] += 1
    return [
        p_value(observed[label], dict.fromkeys(itertools.permutations(range(size)), 1))
        for label, size in enumerate(SIZES)
        if size > 1
    ]


@pytest.mark.parametrize(
    ("orders", "in_chunks"),
    [
        (orders_over_seeds, False),
        (orders_over_epochs, False),
        (orders_of_cycles_in_pieces, False),
        (orders_of_cycles_in_pieces, True),
    ],
)
def test_all_orders_within_a_class_are_equally_likely(orders, in_chunks, monkeypatch):
    if in_chunks:
        several_chunks(monkeypatch)
    # 6! = 720 orders of the largest class, five each.
    assert min(p_values_of_orders(orders(3600))) > PLAUSIBLE


@pytest.mark.parametrize("orders", [orders_over_seeds, orders_over_epochs])
def test_without_mixing_orders_are_not_equally_likely(orders, monkeypatch):
    without_mixing(monkeypatch)
    assert max(p_values_of_orders(orders(1000))[1:]) < ABSURD


def p_value_of_consecutive_orders(runs=3600):
    """The orders of a class of 3 images in consecutive cycles: 6 x 6 pairs."""
    sampler = create_sampler("instance_balanced", [0, 0, 0, 1, 1])
    pairs = collections.Counter()
    for seed in range(runs):
        sampler.seed = seed
        pair = [sampler.epoch_indices(epoch).tolist() for epoch in (1, 2)]
        pairs[tuple(tuple(i for i in stream if i < 3) for stream in pair)] += 1
    return p_value(pairs, uniform(*[list(itertools.permutations(range(3)))] * 2))


def test_consecutive_cycles_are_independent():
    assert p_value_of_consecutive_orders() > PLAUSIBLE


def test_the_same_order_in_every_cycle_is_not_independent(monkeypatch):
    the_same_in_every_cycle(monkeypatch)
    assert p_value_of_consecutive_orders(500) < ABSURD


# Over epochs --------------------------------------------------------------------------------------


def p_value_of_consecutive_places(runs=3600):
    """The place of one image, the only one of its class, in consecutive epochs: 6 x 6 pairs."""
    sampler = create_sampler("instance_balanced", [0, 1, 1, 1, 2, 2])
    pairs = collections.Counter()
    for epoch in range(runs):
        pair = [sampler.epoch_indices(2 * epoch + k).tolist() for k in range(2)]
        pairs[tuple(stream.index(0) for stream in pair)] += 1
    return p_value(pairs, uniform(range(6), range(6)))


def p_value_of_consecutive_rounding(runs=3600):
    """Which two of four equal classes are drawn, in consecutive epochs: 6 x 6 pairs."""
    sampler = create_sampler("class_balanced", [0, 1, 2, 3], num_samples=2)
    pairs = collections.Counter()
    for epoch in range(runs):
        pair = [sampler.epoch_indices(2 * epoch + k).tolist() for k in range(2)]
        pairs[tuple(tuple(sorted(stream)) for stream in pair)] += 1
    return p_value(pairs, uniform(*[list(itertools.combinations(range(4), 2))] * 2))


CONSECUTIVE = pytest.mark.parametrize(
    "measure", [p_value_of_consecutive_places, p_value_of_consecutive_rounding]
)


@CONSECUTIVE
def test_consecutive_epochs_are_independent(measure):
    assert measure() > PLAUSIBLE


@CONSECUTIVE
def test_the_same_epoch_again_is_not_independent(measure, monkeypatch):
    the_same_in_every_epoch(monkeypatch)
    assert measure(500) < ABSURD


# Over places --------------------------------------------------------------------------------------

LABELS = [0] * 10 + [1] * 5 + [2] * 3 + [3]


def p_values_of_places(name, runs=1500, **options):
    """For every place of an epoch of several chunks: which image is drawn there."""
    n = 60
    sampler = create_sampler(name, LABELS, num_samples=n, **options)
    observed = np.zeros((n, len(LABELS)))
    for seed in range(runs):
        sampler.seed = seed
        observed[np.arange(n), sampler.epoch_indices(1)] += 1
    p = sampler.class_probabilities(1)[torch.tensor(LABELS)]
    expected = runs * p.numpy() / np.bincount(LABELS)[LABELS]
    return stats.chisquare(observed, expected[None].repeat(n, 0), axis=1).pvalue


@pytest.mark.parametrize(
    ("name", "options"),
    [("instance_balanced", {}), ("class_balanced", {}), ("power", {"q": 0.3}), ("reversed", {})],
)
def test_every_image_is_equally_likely_at_every_place_of_every_chunk(name, options, monkeypatch):
    several_chunks(monkeypatch, chunk_size=20)
    # The least of 60.
    assert p_values_of_places(name, **options).min() > PLAUSIBLE


def test_without_arranging_places_are_not_equally_likely(monkeypatch):
    several_chunks(monkeypatch, chunk_size=20)
    without_arranging(monkeypatch)
    assert p_values_of_places("class_balanced", 500).min() < ABSURD


def p_value_of_the_place_of_one(runs=2000):
    """Where the only image of a class is drawn, in an epoch of two chunks."""
    sampler = create_sampler("instance_balanced", [0] * 9 + [1])
    observed = collections.Counter()
    for seed in range(runs):
        sampler.seed = seed
        observed[sampler.epoch_indices(0).tolist().index(9)] += 1
    return p_value(observed, dict.fromkeys(range(10), 1))


def test_a_single_draw_is_as_likely_in_every_chunk(monkeypatch):
    several_chunks(monkeypatch, chunk_size=8)
    assert p_value_of_the_place_of_one() > PLAUSIBLE


def test_without_shift_a_single_draw_is_not_as_likely_in_every_chunk(monkeypatch):
    several_chunks(monkeypatch, chunk_size=8)
    shares_without_shift(monkeypatch)
    assert p_value_of_the_place_of_one(500) < ABSURD


# Over ranks ---------------------------------------------------------------------------------------


def p_value_of_ranks(runs=3000):
    """What two ranks draw at the same time: two different images, equally likely."""
    labels = [0, 0, 0, 1, 1, 2]
    ranks = [
        create_sampler("instance_balanced", labels, rank=rank, num_replicas=2) for rank in range(2)
    ]
    pairs = collections.Counter()
    for seed in range(runs):
        for sampler in ranks:
            sampler.seed = seed
            sampler.set_epoch(0)
        pairs[tuple(list(sampler)[1] for sampler in ranks)] += 1
    return p_value(pairs, dict.fromkeys(itertools.permutations(range(6), 2), 1))


def test_ranks_are_uncorrelated():
    assert p_value_of_ranks() > PLAUSIBLE


def test_ranks_of_a_stream_that_is_not_arranged_are_correlated(monkeypatch):
    without_arranging(monkeypatch)
    assert p_value_of_ranks(500) < ABSURD
