"""One contract for every registered sampler, then what is particular to each."""

import collections
import itertools
import json
import math
import types
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import BatchSampler, DataLoader

from timm_lt import samplers
from timm_lt.data.loader import NumberedSampler, check_groups
from timm_lt.samplers import (
    ClassSampler,
    base,
    create_sampler,
    list_samplers,
    register_sampler,
)
from timm_lt.samplers import (
    streams as arithmetic,
)
from timm_lt.samplers import (
    streams as cycles,
)
from timm_lt.utils.checks import UsageError

# A sampler with required options, or whose other options deserve the contract too, has rows here.
OPTIONS = {
    "class_balanced": [{}, {"samples_per_class": 4}],
    "power": [{"q": 0.3}],
    "progressively_balanced": [
        *({"epochs": 9, "schedule": s} for s in ("t/T", "t/(T-1)")),
        {"epochs": 9, "steps_per_epoch": 4, "schedule": "t/(T-1)"},
    ],
    "effective_number": [{"beta": 0.9}],
    "under_sampled": [{}, {"target": 6}],
    "over_sampled": [{"target": 6}],
    "deferred": [
        {"start": 1},
        {
            "first": "progressively_balanced",
            "second_options": {"samples_per_class": 4},
            "start": 0.5,
            "epochs": 9,
        },
    ],
}
VARIANTS = [
    pytest.param(name, options, id=f"{name}{options or ''}")
    for name in list_samplers()
    if name != "bilateral"  # of two streams: test_bilateral_sampler.py
    for options in OPTIONS.get(name, [{}])
]
contract = pytest.mark.parametrize(("name", "options"), VARIANTS)
# Blocks of one class, and steps, are no uniformly random arrangement; they have their own tests.
contract_on_order = pytest.mark.parametrize(
    ("name", "options"),
    [
        v
        for v in VARIANTS
        if not {"samples_per_class", "steps_per_epoch", "second_options"} & set(v.values[1])
    ],
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
        assert abs(len(drawn) - n * p[c].item()) < sampler.group
        assert at_cycle_ends(drawn, size), "an image came twice before another came once"


def default_length(name, options):
    if name == "under_sampled":
        return sum(min(n, options.get("target", 1)) for n in COUNTS)
    if name == "over_sampled":
        return sum(max(n, options["target"]) for n in COUNTS if n)
    return len(LABELS)


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
    assert len(sampler) == (num_samples or default_length(name, options))
    assert sampler.class_probabilities().shape == (6,)
    for epoch in range(9):
        sampler.set_epoch(epoch)
        check_epoch(sampler, LABELS)
        sampler.set_epoch(epoch)
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
    first.set_epoch(0)
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
    # Every epoch before it is rounded for every seed.
    epochs, epoch = 1000, 1
    total = torch.zeros(6)
    for seed in range(epochs):
        sampler.seed = seed
        images = sampler.epoch_indices(epoch)
        total += torch.bincount(torch.tensor(LABELS)[images], minlength=6)
    # Rounding up or down has a standard deviation of at most 1/2.
    error = (total / epochs - 17 * sampler.class_probabilities(epoch)).abs()
    assert error.max() < 4 * 0.5 / math.sqrt(epochs)


@contract
def test_equal_counts_are_drawn_equally(name, options):
    sampler = create_sampler(name, [0, 1, 2] * 8, num_samples=24, **options)
    for epoch in (0, 3, 8):
        third = pytest.approx(1 / 3, abs=1e-12)
        assert sampler.class_probabilities(epoch).tolist() == [third] * 3
        assert torch.bincount(sampler.epoch_indices(epoch) % 3).tolist() == [8] * 3


@contract
def test_ten_thousand_classes(name, options):
    classes = 10_000
    labels = torch.cat([torch.arange(classes), torch.arange(50).repeat(40)])
    sampler = create_sampler(name, labels, num_samples=15_000, **options)
    for epoch in (8, 0):
        sampler.set_epoch(epoch)
        drawn = sampler.epoch_indices()
        of_class = torch.bincount(labels[drawn], minlength=classes)
        assert (of_class - 15_000 * sampler.class_probabilities()).abs().max() < sampler.group
    # In the first epoch every class's cycle begins: no image is two draws ahead of another.
    cycles = -(-of_class // sampler.class_counts)
    assert (torch.bincount(drawn, minlength=len(labels)) <= cycles[labels]).all()


@contract_on_order
def test_every_image_is_equally_likely_at_every_place(name, options):
    labels, num_samples, epochs, epoch = [0, 1, 0, 0, 1, 2], 8, 2000, 1
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
    assert torch.cat(list(loader)).tolist() == sampler.epoch_indices().tolist()


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
        ("progressively_balanced", {"epochs": 3, "steps_per_epoch": 0}, "steps_per_epoch must be"),
        ("effective_number", {}, "sampler 'effective_number' needs the option 'beta'"),
        ("effective_number", {"beta": 1.0}, r"beta must be a number in \[0, 1\), got 1.0"),
        ("under_sampled", {"target": 0}, "target must be an integer >= 1, got 0"),
        ("deferred", {}, "start 0.8 is a fraction of the epochs: give epochs, too"),
        ("deferred", {"epochs": 3, "start": 3}, "start 3 is not within the 3 epochs"),
        ("deferred", {"start": 1, "second": "shift"}, "unknown sampler 'shift'"),
        ("deferred", {"start": 1, "second_options": {"q": 1}}, "'class_balanced' has no option"),
        (
            "deferred",
            {"epochs": 3, "first": "progressively_balanced", "first_options": {"epochs": 2}},
            "first_options: epochs is 2, but there are 3: leave it out",
        ),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_sampler(name, LABELS, **options)


# Cycles and chunks --------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["one_chunk", "small_chunks"])
def chunks(request, monkeypatch):
    """Small data are one chunk; here also several, with classes that are shuffled in place."""
    if request.param:
        monkeypatch.setattr(ClassSampler, "chunk_size", 25)
        monkeypatch.setattr(cycles, "BLOCK", 8)


@contract
@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("num_samples", [1, 7, 100, 331])
def test_cycles_go_on_across_epochs(name, options, num_samples):
    sampler = create_sampler(name, LABELS, num_samples=num_samples, seed=3, **options)
    drawn_of = collections.defaultdict(list)
    for epoch in range(9):
        sampler.set_epoch(epoch)
        check_epoch(sampler, LABELS)
        for index in sampler.epoch_indices().tolist():
            drawn_of[LABELS[index]].append(index)
        # Without having drawn the epochs before, it is the same.
        fresh = create_sampler(name, LABELS, num_samples=num_samples, seed=3, **options)
        assert torch.equal(fresh.epoch_indices(epoch), sampler.epoch_indices(epoch))
    for label, drawn in drawn_of.items():
        for start in range(0, len(drawn), COUNTS[label]):
            cycle = drawn[start : start + COUNTS[label]]
            assert len(set(cycle)) == len(cycle)


@contract
@pytest.mark.usefixtures("chunks")
def test_iterators_do_not_disturb_each_other(name, options):
    sampler = create_sampler(name, LABELS, num_samples=200, **options)
    expected = [sampler.epoch_indices(epoch).tolist() for epoch in range(2)]
    first = iter(sampler)
    drawn = [next(first) for _ in range(110)]
    sampler.set_epoch(1)
    assert list(sampler) == expected[1]
    assert drawn + list(first) == expected[0]


def test_shares_of_chunks_follow_the_definition():
    draws, num_chunks, key = np.array([3, 0, 17, 1, 8]), 7, np.array([5], np.uint64)
    numbers = range(int(draws.sum()))
    shift = [int(arithmetic.keyed(key, np.array([i // num_chunks]))[0]) for i in numbers]
    chunk_of = [(i - h) % num_chunks for i, h in zip(numbers, shift, strict=True)]
    label_of = np.repeat(range(5), draws)
    for chunk in range(num_chunks + 1):
        naive = [0] * 5
        for number in numbers:
            naive[label_of[number]] += chunk_of[number] < chunk
        assert arithmetic.drawn_before(draws, chunk, num_chunks, key).tolist() == naive


def test_no_label_needs_more_than_four_bytes():
    sampler = create_sampler("instance_balanced", torch.zeros(10_000, dtype=torch.long))
    assert [
        value.nbytes
        for value in vars(sampler._images).values()
        if isinstance(value, np.ndarray) and value.nbytes > 1000
    ] == [40_000]


# Ranks and states ---------------------------------------------------------------------------------


def groups_of(stream, size):
    return [stream[i : i + size] for i in range(0, len(stream), size)]


@contract
@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8, 60])
def test_ranks_share_the_same_stream(name, options, num_replicas):
    n = 40
    stream = create_sampler(name, LABELS, num_samples=n, **options).epoch_indices(2).tolist()
    ranks = []
    for rank in range(num_replicas):
        sampler = create_sampler(
            name, LABELS, num_samples=n, rank=rank, num_replicas=num_replicas, **options
        )
        sampler.set_epoch(2)
        group = sampler.group if num_replicas > 1 else 1
        ranks.append(groups_of(list(sampler), group))
        turns = math.ceil(n / group / num_replicas)
        assert len(sampler) == group * len(ranks[-1]) == group * turns
    together = [part for turn in zip(*ranks, strict=True) for part in turn]
    # The padding is the beginning.
    assert together == (groups_of(stream, group) * 6)[: len(together)]


@contract
@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 3), (4, 1)])
def test_a_state_resumes_in_the_middle_of_an_epoch(name, options, before, after):
    n = 96

    def create(rank, num_replicas):
        return create_sampler(
            name, LABELS, num_samples=n, rank=rank, num_replicas=num_replicas, **options
        )

    stream = create(0, 1).epoch_indices(5).tolist()
    following = create(0, 1).epoch_indices(6).tolist()
    for consumed in (0, 1, 12, n // before):
        old = create(before - 1, before)
        old.set_epoch(5)
        iterator = iter(old)
        for _ in range(consumed):
            next(iterator)
        state = json.loads(json.dumps(old.state_dict()))
        group = old.group if max(before, after) > 1 else 1
        # Within a group that stays together, the rest begins with the group.
        position = consumed // (group if before > 1 else 1) * (group if before > 1 else 1) * before
        assert state["position"] == position
        if position % group:
            continue
        rest = []
        for rank in range(after):
            new = create(rank, after)
            new.load_state_dict(state)
            assert new.state_dict() == state
            # As accelerate does.
            new.set_epoch(5)
            rest.append(groups_of(list(new), group))
            assert new.state_dict()["position"] == n
            # Only the first iteration is a rest.
            new.set_epoch(6)
            turns = math.ceil(n / group / after)
            expected = (groups_of(following, group) * 2)[rank : turns * after : after]
            assert groups_of(list(new), group) == expected
        left = groups_of(stream[position:], group)
        together = [part for turn in zip(*rest, strict=True) for part in turn]
        assert together[: len(left)] == left
        assert len(together) == math.ceil(len(left) / after) * after


def test_a_state_of_another_stream_is_refused():
    state = create_sampler("class_balanced", LABELS, seed=1).state_dict()
    assert state == {"seed": 1, "epoch": 0, "num_samples": len(LABELS), "position": 0}
    with pytest.raises(UsageError, match=r"the state has seed 1, the sampler 2: .*this stream"):
        create_sampler("class_balanced", LABELS, seed=2).load_state_dict(state)
    with pytest.raises(UsageError, match="the state has num_samples 37, the sampler 5"):
        create_sampler("class_balanced", LABELS, num_samples=5, seed=1).load_state_dict(state)
    with pytest.raises(UsageError, match="position must be an integer from 0 to 37, got 38"):
        create_sampler("class_balanced", LABELS, seed=1).load_state_dict(state | {"position": 38})


@pytest.mark.parametrize(("rank", "num_replicas"), [(2, 2), (-1, 2), (0, 0)])
def test_wrong_ranks_are_refused(rank, num_replicas):
    with pytest.raises(UsageError, match=r"(rank|num_replicas) must be an integer"):
        create_sampler("class_balanced", LABELS, rank=rank, num_replicas=num_replicas)


def test_a_sharded_sampler_is_refused_beside_accelerate(monkeypatch):
    sharded = create_sampler("class_balanced", LABELS, rank=1, num_replicas=2)
    whole = create_sampler("class_balanced", LABELS)
    monkeypatch.setattr(base, "is_initialized", lambda: True)
    monkeypatch.setattr(base, "PartialState", lambda: types.SimpleNamespace(num_processes=2))
    assert len(list(whole)) == len(LABELS)
    with pytest.raises(UsageError, match=r"rank 1 of 2.*2 processes too: create it without rank="):
        iter(sharded)


@contract
def test_accelerate_shares_the_batches_of_one_stream(name, options):
    stream = create_sampler(name, LABELS, num_samples=40, **options).epoch_indices(0)
    batches = stream.view(8, 5).tolist()
    for rank in range(2):
        sampler = create_sampler(name, LABELS, num_samples=40, **options)
        shard = BatchSamplerShard(BatchSampler(sampler, 5, drop_last=False), 2, rank)
        assert list(shard) == batches[rank::2]


@pytest.mark.parametrize("split_batches", [False, True])
def test_accelerate_keeps_samples_per_class_together(split_batches):
    def create():
        return create_sampler("class_balanced", LABELS, num_samples=96, samples_per_class=4)

    whole = groups_of(create().epoch_indices(0).tolist(), 4)
    shards = []
    for rank in range(2):
        batches = BatchSampler(create(), 16, drop_last=True)
        shard = BatchSamplerShard(batches, 2, rank, split_batches=split_batches)
        shards.append([block for batch in shard for block in groups_of(batch, 4)])
    assert sorted(shards[0] + shards[1]) == sorted(whole)
    with pytest.raises(UsageError, match=r"groups of 4 .* batches of 6 images on each of 2 proc"):
        check_groups(create(), 6, 2)
    check_groups(create(), 6, 1)
    check_groups(NumberedSampler(create(), len(LABELS), 96), 8, 2)
    with pytest.raises(UsageError, match="groups of 4"):
        check_groups(NumberedSampler(create(), len(LABELS), 96), 2, 2)


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


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("num_samples", [3, 36, 42, 58, 1001])
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 7])
def test_samples_per_class_stay_together_on_a_rank(num_samples, num_replicas):
    def create(rank):
        return create_sampler(
            *("class_balanced", LABELS),
            num_samples=num_samples,
            samples_per_class=4,
            rank=rank,
            num_replicas=num_replicas,
        )

    for epoch in range(3):
        ranks = []
        for rank in range(num_replicas):
            sampler = create(rank)
            sampler.set_epoch(epoch)
            ranks.append(groups_of(list(sampler), 4))
        blocks = [part for turn in itertools.zip_longest(*ranks) for part in turn if part]
        number = math.ceil(num_samples / 4)
        last = num_samples - 4 * (number - 1)
        for block in blocks[: number - 1]:
            assert len(block) == 4
            assert len({LABELS[index] for index in block}) == 1
        # The last block may be short; with several ranks it is filled up from the beginning.
        assert len({LABELS[index] for index in blocks[number - 1][:last]}) == 1
        stream = [index for block in blocks for index in block]
        whole = create(0).epoch_indices(epoch).tolist()
        assert stream[:num_samples] == whole
        if num_replicas > 1:
            filled = groups_of(whole + (whole * 2)[: 4 - last], 4)
            assert blocks == (filled * num_replicas)[: len(blocks)]
            assert len({len(rank) for rank in ranks}) == 1


def test_samples_per_class_draws_every_class_equally_often_in_the_long_run():
    # 30 draws are 7 blocks of 4 and one of 2, of 4 classes: 2 blocks each, one of them shorter.
    sampler = create_sampler("class_balanced", LABELS, num_samples=30, samples_per_class=4)
    drawn = collections.Counter()
    for epoch in range(400):
        counts = collections.Counter(LABELS[i] for i in sampler.epoch_indices(epoch).tolist())
        assert sorted(counts.values()) == [6, 8, 8, 8]
        drawn += counts
    # Which class has 6 is chosen uniformly: 7.5 on average, with a deviation of .87 per epoch.
    assert {c: n / 400 for c, n in drawn.items()} == {
        c: pytest.approx(7.5, abs=4 * 0.87 / 20) for c in (0, 1, 3, 4)
    }


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("schedule", ["t/T", "t/(T-1)"])
def test_progressively_balanced_per_step(schedule):
    epochs, steps, n = 3, 5, 370
    sampler = create_sampler(
        "progressively_balanced",
        LABELS,
        num_samples=n,
        epochs=epochs,
        steps_per_epoch=steps,
        schedule=schedule,
    )
    last = epochs * steps - (schedule == "t/(T-1)")
    counts = [count for count in COUNTS[:5] if count]
    for epoch in range(epochs):
        mean, expected_so_far, drawn = [0] * 4, [0] * 4, 0
        stream = [LABELS[index] for index in sampler.epoch_indices(epoch)]
        for step in range(steps):
            a = (epoch * steps + step) / last
            p = [(1 - a) * count / len(LABELS) + a / 4 for count in counts]
            found = sampler.step_probabilities(step, epoch)
            assert found[[0, 1, 3, 4]].tolist() == pytest.approx(p, abs=1e-15)
            mean = [m + x / steps for m, x in zip(mean, p, strict=True)]
            expected_so_far = [e + x * n / steps for e, x in zip(expected_so_far, p, strict=True)]
            # A step ends within C / 2 draws of its place; until there, classes are as they should.
            ends = range((step + 1) * n // steps - 4, (step + 1) * n // steps + 5)
            drawn = [[stream[:end].count(c) for c in (0, 1, 3, 4)] for end in ends]
            assert any(
                all(abs(d - e) < 2 for d, e in zip(counted, expected_so_far, strict=True))
                for counted in drawn
            )
        p = sampler.class_probabilities(epoch)[[0, 1, 3, 4]]
        assert p.tolist() == pytest.approx(mean, abs=1e-15)


def test_reversed():
    # BBN's code: w = n_max / n, normalised.
    weights = [max(COUNTS) / n if n else 0 for n in COUNTS]
    p = create_sampler("reversed", LABELS, num_classes=6).class_probabilities()
    assert p.tolist() == pytest.approx([w / sum(weights) for w in weights], abs=1e-15)


@pytest.mark.parametrize("beta", ["0", "0.9", "0.9999", "0.999999999"])
def test_effective_number(beta):
    # Exact fractions: E = 1 + beta + ... + beta^(n - 1); an image weighs 1 / E.
    effective = [sum(Fraction(beta) ** i for i in range(n)) for n in COUNTS]
    of_class = [n / e if n else 0 for n, e in zip(COUNTS, effective, strict=True)]
    sampler = create_sampler("effective_number", LABELS, num_classes=6, beta=float(beta))
    expected = [float(w / sum(of_class)) for w in of_class]
    assert sampler.class_probabilities().tolist() == pytest.approx(expected, rel=1e-14, abs=0)


def test_effective_number_ends():
    near_one = create_sampler("effective_number", LABELS, num_classes=6, beta=1 - 1e-12)
    assert near_one.class_probabilities().tolist() == pytest.approx(power_by_hand(0), abs=1e-10)
    zero = create_sampler("effective_number", LABELS, num_classes=6, beta=0.0)
    assert zero.class_probabilities().tolist() == pytest.approx(power_by_hand(1), abs=1e-15)


@pytest.mark.parametrize(
    ("name", "target", "expected"),
    [
        ("under_sampled", None, [1, 1, 0, 1, 1, 0]),
        ("under_sampled", 5, [5, 5, 0, 4, 1, 0]),
        ("over_sampled", None, [23, 23, 0, 23, 23, 0]),
        ("over_sampled", 5, [23, 9, 0, 5, 5, 0]),
    ],
)
def test_targets_are_met_exactly(name, target, expected):
    sampler = create_sampler(name, LABELS, num_classes=6, target=target)
    assert len(sampler) == sum(expected)
    for epoch in range(20):
        drawn = torch.tensor(LABELS)[sampler.epoch_indices(epoch)]
        assert torch.bincount(drawn, minlength=6).tolist() == expected


def test_under_sampling_loses_no_image():
    sampler = create_sampler("under_sampled", LABELS, target=4)
    seen = {index for epoch in range(6) for index in sampler.epoch_indices(epoch).tolist()}
    # The largest class has 23 images and gives 4 of them per epoch.
    assert seen == set(range(len(LABELS)))


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
    assert {LABELS[index] for index in sampler.epoch_indices().tolist()} == {4}


def test_more_images_than_a_float_counts():
    """torch.multinomial, and with it WeightedRandomSampler, ends at 2^24."""
    labels = torch.zeros(2**24 + 5, dtype=torch.long)
    labels[2**24 :] = 1
    sampler = create_sampler("class_balanced", labels, num_samples=20, seed=1)
    rare = sorted(index - 2**24 for index in sampler if index >= 2**24)
    assert rare == sorted(2 * list(range(5)))


# Deferred ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "epochs", "first"), [(160, 200, 160), (0.8, 200, 160), (2, None, 2), (0.5, 3, 1)]
)
def test_deferred_changes_in_its_epoch(start, epochs, first):
    sampler = create_sampler(
        "deferred", LABELS, num_classes=6, start=start, epochs=epochs, second="reversed"
    )
    parts = [create_sampler(n, LABELS, num_classes=6) for n in ("instance_balanced", "reversed")]
    for epoch in (0, first - 1, first, first + 1):
        expected = parts[epoch >= first].class_probabilities()
        assert torch.equal(sampler.class_probabilities(epoch), expected)
        sampler.set_epoch(epoch)
        assert torch.equal(sampler.class_probabilities(), expected)


def test_deferred_draws_as_its_parts_do():
    options = {"num_samples": 60, "seed": 5}
    sampler = create_sampler(
        "deferred", LABELS, start=2, second_options={"samples_per_class": 5}, **options
    )
    first = create_sampler("instance_balanced", LABELS, **options)
    for epoch in range(2):
        assert torch.equal(sampler.epoch_indices(epoch), first.epoch_indices(epoch))
    blocks = torch.tensor(LABELS)[sampler.epoch_indices(2)].view(-1, 5)
    assert (blocks == blocks[:, :1]).all()
    # A part has no epochs of its own length.
    sampler = create_sampler("deferred", LABELS, start=1, second="over_sampled")
    assert len(sampler) == len(LABELS) == len(sampler.epoch_indices(1))


# Epochs that are not set -------------------------------------------------------------------------


def warned(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in caught]


@contract
def test_an_epoch_that_is_drawn_again_warns_once(name, options):
    sampler = create_sampler(name, LABELS, **options)
    loader = DataLoader(range(len(LABELS)), 4, sampler=sampler)
    assert warned(lambda: list(loader)) == []
    (message,) = warned(lambda: list(loader))
    assert warned(lambda: list(loader)) == []
    assert "draws epoch 0 again" in message
    assert "set_epoch(epoch)" in message


def test_epochs_that_are_set_do_not_warn():
    sampler = create_sampler("class_balanced", LABELS)

    def draw():
        # A look at the first batch, before training.
        next(iter(DataLoader(range(len(LABELS)), 4, sampler=sampler)))
        list(sampler)
        for epoch in (1, 2, 2):
            sampler.set_epoch(epoch)
            list(sampler)
        sampler.load_state_dict(sampler.state_dict() | {"position": 8})
        list(sampler)
        sampler.set_epoch(3)
        # Iterators that are made and not drawn from, as DataLoader does.
        iter(sampler), iter(sampler)
        for pair in zip(sampler, sampler, strict=True):
            assert pair[0] == pair[1]
        sampler.epoch_indices()

    assert warned(draw) == []


def test_an_epoch_that_was_set_is_trained_on_and_evaluated():
    sampler = create_sampler("class_balanced", LABELS)

    def train():
        for epoch in range(3):
            sampler.set_epoch(epoch)
            # Looks at a batch, trains, and evaluates on the training images.
            next(iter(sampler)), list(sampler), list(sampler)

    assert warned(train) == []
    # Never set again: it was forgotten.
    assert len(warned(lambda: [list(sampler) for _ in range(20)])) == 1


def test_loops_that_end_early_are_epochs_too():
    sampler = create_sampler("class_balanced", LABELS)
    assert warned(lambda: [next(iter(sampler)), next(iter(sampler))]) == []
    assert len(warned(lambda: [next(iter(sampler)), next(iter(sampler))])) == 1


def test_accelerate_sets_the_epochs_itself():
    sampler = create_sampler("class_balanced", LABELS)
    loader = Accelerator(cpu=True).prepare(DataLoader(range(len(LABELS)), 4, sampler=sampler))
    epochs = []
    assert warned(lambda: epochs.extend(torch.cat(list(loader)).tolist() for _ in range(3))) == []
    assert epochs == [sampler.epoch_indices(epoch).tolist() for epoch in range(3)]
