"""One contract for every registered sampler, then what is particular to each."""

import collections
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import DataLoader

from timm_lt import samplers
from timm_lt.registry import UsageError
from timm_lt.samplers import ClassSampler, create_sampler, list_samplers, register_sampler

# A sampler with required options, or whose other options deserve the contract too, has rows here.
OPTIONS = {
    "class_balanced": [{}, {"samples_per_class": 4}],
    "power": [{"q": 0.3}],
    "progressively_balanced": [{"epochs": 9, "schedule": s} for s in ("t/T", "t/(T-1)")],
}
VARIANTS = [
    pytest.param(name, options, id=f"{name}{options or ''}")
    for name in list_samplers()
    for options in OPTIONS.get(name, [{}])
]
contract = pytest.mark.parametrize(("name", "options"), VARIANTS)
# Blocks of one class are no uniformly random arrangement; they have tests of their own.
contract_on_order = pytest.mark.parametrize(
    ("name", "options"), [v for v in VARIANTS if "samples_per_class" not in v.values[1]]
)

# Shuffled, with the empty classes 2 and 5.
COUNTS = [23, 9, 0, 4, 1, 0]
LABELS = torch.repeat_interleave(torch.tensor(COUNTS))[
    torch.randperm(sum(COUNTS), generator=torch.Generator().manual_seed(0))
].tolist()


def check_epoch(sampler, labels):
    """Checks, by naive loops, what holds for every epoch of every sampler."""
    stream = list(sampler)
    n = len(stream)
    assert n == len(sampler)
    assert all(type(index) is int and 0 <= index < len(labels) for index in stream)
    images_of = collections.defaultdict(set)
    for index, label in enumerate(labels):
        images_of[label].add(index)
    p = sampler.class_probabilities()
    assert p.dtype == torch.float64
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    drawn_of = collections.defaultdict(list)
    for index in stream:
        drawn_of[labels[index]].append(index)
    for c in range(len(p)):
        assert c in images_of or p[c] == 0
        drawn, size = drawn_of[c], len(images_of[c])
        assert abs(len(drawn) - n * p[c].item()) < 1
        assert at_cycle_ends(drawn, size), "an image came twice before another came once"


def at_cycle_ends(drawn, size):
    """Whether a class's draws are cycles, of which the first may be the rest of one."""

    def distinct(images):
        return len(set(images)) == len(images)

    return size == 0 or any(
        distinct(drawn[:rest])
        and all(distinct(drawn[i : i + size]) for i in range(rest, len(drawn), size))
        for rest in range(size)
    )


@contract
@pytest.mark.parametrize("num_samples", [None, 1, 3, 36, 1000])
def test_every_epoch_keeps_the_contract(name, options, num_samples):
    sampler = create_sampler(name, LABELS, num_samples=num_samples, num_classes=6, **options)
    assert len(sampler) == (num_samples or len(LABELS))
    assert sampler.class_probabilities().shape == (6,)
    for epoch in range(9):
        sampler.set_epoch(epoch)
        check_epoch(sampler, LABELS)
        assert list(sampler) == sampler.epoch_indices(epoch).tolist()


@contract
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=40),
    num_samples=st.integers(1, 120),
    seed=st.integers(0, 2**70),
    epoch=st.integers(0, 8),
)
def test_any_labels_keep_the_contract(name, options, labels, num_samples, seed, epoch):
    sampler = create_sampler(name, labels, num_samples=num_samples, seed=seed, **options)
    sampler.set_epoch(epoch)
    check_epoch(sampler, labels)


@contract
def test_stream_is_a_function_of_seed_and_epoch_alone(name, options):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    first = create_sampler(name, LABELS, seed=7, **options)
    before = torch.get_rng_state()
    stream = list(first)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    # Having drawn other epochs before leaves no trace either.
    second = create_sampler(name, np.array(LABELS), seed=7, **options)
    second.set_epoch(5)
    list(second)
    second.set_epoch(0)
    assert list(second) == stream == list(first)
    keys = itertools.product(range(4), range(4))
    streams = set()
    for seed, epoch in keys:
        sampler = create_sampler(name, LABELS, seed=seed, **options)
        sampler.set_epoch(epoch)
        streams.add(tuple(sampler))
    assert len(streams) == 16


@contract
def test_draws_are_right_on_average(name, options):
    sampler = create_sampler(name, LABELS, num_samples=17, num_classes=6, **options)
    epochs, epoch = 1000, 4
    total = torch.zeros(6)
    for seed in range(epochs):
        sampler.seed = seed
        images = sampler.epoch_indices(epoch)
        total += torch.bincount(torch.tensor(LABELS)[images], minlength=6)
    # Rounding up or down has a standard deviation of at most 1/2.
    error = (total / epochs - 17 * sampler.class_probabilities(epoch)).abs()
    assert error.max() < 4 * 0.5 / math.sqrt(epochs)


@contract_on_order
def test_every_image_is_equally_likely_at_every_place(name, options):
    labels, num_samples, epochs, epoch = [0, 1, 0, 0, 1, 2], 8, 2000, 4
    sampler = create_sampler(name, labels, num_samples=num_samples, **options)
    observed = torch.zeros(num_samples, len(labels))
    for seed in range(epochs):
        sampler.seed = seed
        observed[torch.arange(num_samples), sampler.epoch_indices(epoch)] += 1
    p = sampler.class_probabilities(epoch)
    share = torch.tensor([p[label].item() / labels.count(label) for label in labels])
    for place in range(num_samples):
        assert stats.chisquare(observed[place], epochs * share).pvalue > 1e-4


def test_all_orders_are_equally_likely():
    sampler = create_sampler("instance_balanced", [0, 0, 1, 2])
    orders = collections.Counter()
    for epoch in range(2400):
        orders[tuple(sampler.epoch_indices(epoch).tolist())] += 1
    assert len(orders) == 24
    assert stats.chisquare(list(orders.values())).pvalue > 1e-3


def test_rounding_ties_no_pair_of_classes_together():
    # Two draws among four equal classes: each of the six pairs should come equally often.
    sampler = create_sampler("class_balanced", [0, 1, 2, 3], num_samples=2)
    pairs = collections.Counter(
        frozenset(sampler.epoch_indices(epoch).tolist()) for epoch in range(1500)
    )
    assert len(pairs) == 6
    assert stats.chisquare(list(pairs.values())).pvalue > 1e-3


@contract
def test_data_loader_draws_the_same_stream(name, options):
    sampler = create_sampler(name, LABELS, **options)
    loader = DataLoader(range(len(LABELS)), batch_size=5, sampler=sampler)
    assert torch.cat(list(loader)).tolist() == list(sampler)


@contract
def test_bad_arguments_are_refused(name, options):
    for keyword, value in (("num_samples", 0), ("seed", -1), ("num_classes", 0)):
        with pytest.raises(UsageError, match=f"{keyword} must be an integer >= "):
            create_sampler(name, LABELS, **{keyword: value}, **options)
    with pytest.raises(UsageError, match=r"labels\[1\] = -2 is negative"):
        create_sampler(name, [0, -2], **options)
    with pytest.raises(UsageError, match=r"has no option 'batch_size'.*; valid options: "):
        create_sampler(name, LABELS, batch_size=2, **options)
    with pytest.raises(UsageError, match="epoch must be an integer >= 0, got -1"):
        create_sampler(name, LABELS, **options).set_epoch(-1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("uniform", {}, r"unknown sampler 'uniform'.*instance_balanced, class_balanced"),
        ("power", {}, "sampler 'power' needs the option 'q'"),
        ("power", {"q": 1.1}, r"q must be a number in \[0, 1\], got 1.1"),
        ("power", {"q": -0.1}, r"q must be a number in \[0, 1\], got -0.1"),
        ("power", {"p": 0.5}, "sampler 'power' has no option 'p'; valid options: q"),
        ("class_balanced", {"samples_per_class": 0}, "samples_per_class must be an integer >= 1"),
        ("progressively_balanced", {"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ("progressively_balanced", {"epochs": 3, "schedule": "t"}, r"one of: t/T, t/\(T-1\)"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_sampler(name, LABELS, **options)


# Probabilities, against the formulas worked out in plain Python. ---------------------------------


def power_by_hand(q):
    weights = [n**q if n else 0.0 for n in COUNTS]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize(
    ("name", "options", "q"),
    [
        ("instance_balanced", {}, 1),
        ("square_root", {}, 0.5),
        ("class_balanced", {}, 0),
        *[("power", {"q": q}, q) for q in (0, 0.3, 0.5, 1)],
    ],
)
def test_power_family(name, options, q):
    p = create_sampler(name, LABELS, num_classes=6, **options).class_probabilities()
    assert p.tolist() == pytest.approx(power_by_hand(q), abs=1e-15)


def test_square_root_equals_per_image_weights():
    # The released form of square-root sampling: each image weighs (n_j / N)^(1/2) / (n_j / N).
    weights = [math.sqrt(COUNTS[y] / len(LABELS)) / (COUNTS[y] / len(LABELS)) for y in LABELS]
    of_class = [sum(w for w, y in zip(weights, LABELS, strict=True) if y == c) for c in range(6)]
    expected = [w / sum(weights) for w in of_class]
    p = create_sampler("square_root", LABELS, num_classes=6).class_probabilities()
    assert p.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("schedule", "last"), [("t/T", 4 / 5), ("t/(T-1)", 1.0)])
def test_progressively_balanced_schedule(schedule, last):
    sampler = create_sampler(
        "progressively_balanced", LABELS, num_classes=6, epochs=5, schedule=schedule
    )
    for t in range(5):
        a = last * t / 4
        expected = [(1 - a) * n / len(LABELS) + (a / 4 if n else 0) for n in COUNTS]
        assert sampler.class_probabilities(t).tolist() == pytest.approx(expected, abs=1e-15)
    assert sampler.class_probabilities(0).tolist() == power_by_hand(1)
    assert (sampler.class_probabilities(4).tolist() == power_by_hand(0)) == (last == 1)
    sampler.set_epoch(3)
    assert torch.equal(sampler.class_probabilities(), sampler.class_probabilities(3))
    sampler.set_epoch(5)
    with pytest.raises(UsageError, match=r"epoch 5 is outside .*epochs=5 covers 0 to 4"):
        iter(sampler)


def test_progressively_balanced_single_epoch_is_instance_balanced():
    for schedule in ("t/T", "t/(T-1)"):
        sampler = create_sampler("progressively_balanced", LABELS, epochs=1, schedule=schedule)
        assert sorted(sampler) == list(range(len(LABELS)))


def test_instance_balanced_epoch_is_a_permutation():
    # Many odd class sizes: a rounding error in any n * p_j would drop or repeat an image.
    labels = torch.repeat_interleave(torch.arange(1, 400))
    sampler = create_sampler("instance_balanced", labels)
    for epoch in range(20):
        assert torch.equal(sampler.epoch_indices(epoch).sort().values, torch.arange(len(labels)))


@pytest.mark.parametrize("k", [2, 4])
def test_samples_per_class_draws_blocks_in_rounds(k):
    rounds = 6
    sampler = create_sampler(
        "class_balanced", LABELS, num_samples=4 * k * rounds, samples_per_class=k
    )
    orders = set()
    for epoch in range(5):
        sampler.set_epoch(epoch)
        classes = [LABELS[index] for index in sampler]
        blocks = [classes[i : i + k] for i in range(0, len(classes), k)]
        assert all(len(set(block)) == 1 for block in blocks)
        heads = [block[0] for block in blocks]
        for start in range(0, len(heads), 4):
            assert sorted(heads[start : start + 4]) == [0, 1, 3, 4]
            orders.add(tuple(heads[start : start + 4]))
    # 30 rounds in 24 possible orders: all the same or a handful would be no shuffling.
    assert len(orders) > 10


def test_samples_per_class_ends_with_the_short_blocks():
    # 15 draws of each class in blocks of 4: three full rounds, then one of blocks of 3.
    sampler = create_sampler("class_balanced", LABELS, num_samples=60, samples_per_class=4)
    classes = [LABELS[index] for index in sampler]
    lengths = [4] * 12 + [3] * 4
    starts = itertools.accumulate(lengths, initial=0)
    for start, length in zip(starts, lengths, strict=False):
        assert len(set(classes[start : start + length])) == 1


def test_a_new_sampler_is_a_new_class_probabilities(monkeypatch):
    # Into a copy of the registry: no other test should meet this sampler.
    monkeypatch.setattr(samplers.SAMPLERS, "_parts", dict(samplers.SAMPLERS._parts))

    @register_sampler("only_the_last")
    class OnlyTheLast(ClassSampler):
        def class_probabilities(self, epoch=None):
            return (torch.arange(len(self.class_counts)) == len(self.class_counts) - 1).double()

    sampler = create_sampler("only_the_last", LABELS, num_samples=6)
    assert isinstance(sampler, OnlyTheLast)
    check_epoch(sampler, LABELS)
    assert {LABELS[index] for index in sampler} == {4}
