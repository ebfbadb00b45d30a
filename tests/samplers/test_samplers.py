"""One contract for every registered sampler, then the particularities of each."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import DataLoader

from timm_lt import samplers
from timm_lt.data.loader import NumberedSampler, prepared_loader
from timm_lt.samplers import ClassSampler, base, create_sampler, list_samplers, streams
from timm_lt.utils.checks import UsageError

BY_FOURS = {"samples_per_class": 4}
STEPS = {"epochs": 9, "steps_per_epoch": 4, "schedule": "t/(T-1)"}
# Samplers with required options, or with other options that the contract should cover.
OPTIONS = {
    "class_balanced": [{}, BY_FOURS],
    "power": [{"q": 0.3}],
    "progressively_balanced": [{"epochs": 9}, {"epochs": 9, "schedule": "t/(T-1)"}, STEPS],
    "effective_number": [{"beta": 0.9}],
    "under_sampled": [{}, {"target": 6}],
    "over_sampled": [{"target": 6}],
    "deferred": [
        {"start": 1},
        {"first": "progressively_balanced", "second_options": BY_FOURS, "start": 0.5, "epochs": 9},
    ],
}
# One for each way to divide and arrange an epoch; the others are exhaustive.
SAMPLE = [("power", {"q": 0.3}), ("class_balanced", BY_FOURS), ("progressively_balanced", STEPS)]
SAMPLE += [("deferred", OPTIONS["deferred"][1]), ("bilateral", {})]
VARIANTS = [(name, options) for name in list_samplers() for options in OPTIONS.get(name, [{}])]
REST = [
    pytest.param(*case, marks=pytest.mark.exhaustive) for case in VARIANTS if case not in SAMPLE
]
contract = pytest.mark.parametrize(("name", "options"), [*SAMPLE, *REST])
# The two streams of a bilateral sampler are single samplers.
single = pytest.mark.parametrize(("name", "options"), [*SAMPLE[:-1], *REST])

# Shuffled, with the empty classes 2 and 5.
COUNTS = [23, 9, 0, 4, 1, 0]
LABELS = torch.repeat_interleave(torch.tensor(COUNTS))[
    torch.randperm(sum(COUNTS), generator=torch.Generator().manual_seed(0))
].tolist()
N = len(LABELS)


@pytest.fixture(params=[False, True], ids=["one_chunk", "small_chunks"])
def chunks(request, monkeypatch):
    """Runs with one chunk, and with several."""
    if request.param:
        monkeypatch.setattr(ClassSampler, "chunk_size", 25)
        monkeypatch.setattr(streams, "BLOCK", 8)


def check_epoch(sampler, stream, labels):
    """Checks, by naive loops, the properties of every epoch of every single sampler."""
    assert all(type(index) is int and 0 <= index < len(labels) for index in stream)
    p = sampler.class_probabilities()
    assert p.dtype == torch.float64
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    sizes, drawn = collections.Counter(labels), images_by_class(stream, labels)
    for c in range(len(p)):
        assert c in sizes or p[c] == 0
        assert abs(len(drawn[c]) - len(stream) * p[c].item()) < sampler.group
        # The first cycle may be the rest of one.
        assert sizes[c] == 0 or any(
            in_cycles(drawn[c][:rest], sizes[c]) and in_cycles(drawn[c][rest:], sizes[c])
            for rest in range(sizes[c])
        ), "an image was drawn twice before another was drawn once"


def images_by_class(stream, labels):
    drawn = collections.defaultdict(list)
    for index in stream:
        drawn[labels[index]].append(index)
    return drawn


def in_cycles(drawn, size):
    return all(len(set(cycle)) == len(cycle) for cycle in groups_of(drawn, size))


def groups_of(stream, size):
    return [stream[i : i + size] for i in range(0, len(stream), size)]


def together(ranks):
    """Returns the parts of ranks in the order of the whole stream."""
    return [part for turn in zip(*ranks, strict=True) for part in turn]


@single
@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("num_samples", [1, 36, 331])
def test_epochs_keep_the_contract_and_continue_the_cycles(name, options, num_samples):
    def create():
        return create_sampler(name, LABELS, num_samples=num_samples, num_classes=6, **options)

    sampler = create()
    drawn = collections.defaultdict(list)
    for epoch in range(9):
        sampler.set_epoch(epoch)
        stream = list(sampler)
        assert len(stream) == len(sampler) == num_samples
        check_epoch(sampler, stream, LABELS)
        # The same without having drawn the epochs before.
        assert create().epoch_indices(epoch).tolist() == stream
        for label, images in images_by_class(stream, LABELS).items():
            drawn[label] += images
    assert all(in_cycles(images, COUNTS[label]) for label, images in drawn.items())


@single
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
    check_epoch(sampler, list(sampler), labels)


@contract
def test_the_stream_is_a_function_of_seed_and_epoch_alone(name, options):
    first = create_sampler(name, LABELS, seed=7, **options)
    before = torch.get_rng_state()
    stream = list(first)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    # Another seed and other epochs before leave no trace either.
    second = create_sampler(name, np.array(LABELS), seed=9, **options)
    second.set_epoch(5)
    next(iter(second))
    second.seed = 7
    second.set_epoch(0)
    first.set_epoch(0)
    assert list(second) == stream == list(first)
    seeds = [create_sampler(name, LABELS, seed=seed, **options) for seed in range(4)]
    drawn = {tuple(s.epoch_indices(epoch).tolist()) for s in seeds for epoch in range(4)}
    assert len(drawn) == 16


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


@contract
@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8, 60])
def test_ranks_share_the_same_stream(name, options, num_replicas):
    n = 40
    stream = create_sampler(name, LABELS, num_samples=n, **options).epoch_indices(2).tolist()
    ranks = []
    for rank in range(num_replicas):
        place = {"rank": rank, "num_replicas": num_replicas}
        sampler = create_sampler(name, LABELS, num_samples=n, **place, **options)
        sampler.set_epoch(2)
        group = sampler.group if num_replicas > 1 else 1
        ranks.append(groups_of(list(sampler), group))
        assert len(sampler) == group * len(ranks[-1]) == group * math.ceil(n / group / num_replicas)
    # The padding is the beginning.
    drawn = together(ranks)
    assert drawn == (groups_of(stream, group) * 6)[: len(drawn)]


@contract
@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 3), (4, 1)])
def test_a_state_resumes_in_the_middle_of_an_epoch(name, options, before, after):
    n = 96

    def create(rank, num_replicas):
        place = {"rank": rank, "num_replicas": num_replicas}
        return create_sampler(name, LABELS, num_samples=n, **place, **options)

    stream, following = (create(0, 1).epoch_indices(epoch).tolist() for epoch in (5, 6))
    for consumed in (0, 1, 12, n // before):
        old = create(before - 1, before)
        old.set_epoch(5)
        collections.deque(itertools.islice(old, consumed), maxlen=0)
        state = json.loads(json.dumps(old.state_dict()))
        # The position is the beginning of a group that stays together.
        whole = old.group if before > 1 else old.unit
        position = consumed // whole * whole * before
        assert state == {"seed": 0, "epoch": 5, "num_samples": n, "position": position}
        group = old.group if max(before, after) > 1 else old.unit
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
        left, drawn = groups_of(stream[position:], group), together(rest)
        assert drawn[: len(left)] == left
        assert len(drawn) == math.ceil(len(left) / after) * after


def test_a_state_of_another_stream_is_refused():
    sampler = create_sampler("class_balanced", LABELS, seed=1)
    for change, message in [
        ({"seed": 2}, "the state has seed 2, the sampler 1"),
        ({"num_samples": 5}, "the state has num_samples 5, the sampler 37"),
        ({"position": 38}, "position must be an integer from 0 to 37, got 38"),
    ]:
        with pytest.raises(UsageError, match=message):
            sampler.load_state_dict(sampler.state_dict() | change)
    pairs = create_sampler("bilateral", LABELS)
    pairs.load_state_dict(pairs.state_dict() | {"position": 7})
    with pytest.raises(UsageError, match="position 7 is inside a group; it must be a multiple of"):
        iter(pairs)


def test_a_sharded_sampler_is_refused_beside_accelerate(monkeypatch):
    sharded = create_sampler("class_balanced", LABELS, rank=1, num_replicas=2)
    monkeypatch.setattr(base, "is_initialized", lambda: True)
    monkeypatch.setattr(base, "PartialState", lambda: types.SimpleNamespace(num_processes=2))
    assert len(list(create_sampler("class_balanced", LABELS))) == N
    with pytest.raises(UsageError, match=r"rank 1 of 2, but accelerate.*: create it without rank="):
        iter(sharded)


@pytest.mark.parametrize("split_batches", [False, True])
def test_batches_that_divide_groups_are_refused(split_batches):
    def prepare(sampler, size, processes):
        accelerator = types.SimpleNamespace(
            num_processes=processes, split_batches=split_batches, prepare_data_loader=lambda x: x
        )
        total = size * processes if split_batches else size
        prepared_loader(DataLoader(range(N), total, sampler=sampler), accelerator)

    sampler = create_sampler("class_balanced", LABELS, num_samples=96, samples_per_class=4)
    numbered = NumberedSampler(sampler, N, 96)
    prepare(sampler, 6, 1)
    prepare(numbered, 8, 2)
    for refused, size in ((sampler, 6), (numbered, 2)):
        with pytest.raises(UsageError, match=rf"groups of 4 .* batches of {size} images on each"):
            prepare(refused, size, 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("power", {"seed": -1, "q": 1}, "seed must be an integer >= 0, got -1"),
        ("power", {"rank": 2, "num_replicas": 2, "q": 1}, "rank must be an integer from 0 to 1"),
        ("uniform", {}, r"unknown sampler 'uniform'.*instance_balanced, class_balanced"),
        ("power", {}, "sampler 'power' needs the option 'q'"),
        ("power", {"q": 1.1}, r"q must be a number in \[0, 1\], got 1.1"),
        ("progressively_balanced", {"epochs": None}, "epochs must be an integer >= 1, got None"),
        ("progressively_balanced", {"epochs": 3, "schedule": "t"}, r"one of: t/T, t/\(T-1\)"),
        ("under_sampled", {"target": 0}, "target must be an integer >= 1, got 0"),
        ("deferred", {}, "start 0.8 is a fraction of the epochs: give epochs, too"),
        ("deferred", {"epochs": 3, "start": 3}, "start 3 is not within the 3 epochs"),
        ("deferred", {"start": 1, "second_options": {"q": 1}}, "'class_balanced' has no option"),
        ("deferred", {"start": 1, "second": "bilateral", "num_samples": 4}, "which draws pairs"),
        ("bilateral", {"num_samples": 7}, "draws pairs; got num_samples=7"),
    ],
)
def test_bad_arguments_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_sampler(name, LABELS, **options)


def test_bad_labels_and_epochs_are_refused(monkeypatch):
    monkeypatch.setattr(streams, "BLOCK", 2)
    with pytest.raises(UsageError, match=r"labels\[3\] = -2 is negative"):
        create_sampler("class_balanced", np.array([0, 1, 0, -2, 1]))
    with pytest.raises(UsageError, match="epoch must be an integer >= 0, got -1"):
        create_sampler("class_balanced", LABELS).set_epoch(-1)


def power_by_hand(q):
    weights = [n**q if n else 0.0 for n in COUNTS]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize(
    ("name", "options", "q"),
    [
        ("instance_balanced", {}, 1),
        ("square_root", {}, 0.5),
        ("class_balanced", {}, 0),
        ("reversed", {}, -1),
        *[("power", {"q": q}, q) for q in (0, 0.3, 0.5, 1)],
    ],
)
def test_power_family(name, options, q):
    p = create_sampler(name, LABELS, num_classes=6, **options).class_probabilities()
    assert p.tolist() == pytest.approx(power_by_hand(q), abs=1e-15)


@pytest.mark.parametrize(("schedule", "last"), [("t/T", 4 / 5), ("t/(T-1)", 1.0)])
def test_progressively_balanced_schedule(schedule, last):
    options = {"num_classes": 6, "schedule": schedule}
    sampler = create_sampler("progressively_balanced", LABELS, epochs=5, **options)
    for t in range(5):
        a = last * t / 4
        expected = [(1 - a) * n / N + (a / 4 if n else 0) for n in COUNTS]
        assert sampler.class_probabilities(t).tolist() == pytest.approx(expected, abs=1e-15)
    assert sampler.class_probabilities(0).tolist() == power_by_hand(1)
    assert (sampler.class_probabilities(4).tolist() == power_by_hand(0)) == (last == 1)
    sampler.set_epoch(5)
    with pytest.raises(UsageError, match="epoch 5 is outside the schedule: epochs=5"):
        iter(sampler)
    single_epoch = create_sampler("progressively_balanced", LABELS, epochs=1, **options)
    assert sorted(single_epoch) == list(range(N))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("schedule", ["t/T", "t/(T-1)"])
def test_progressively_balanced_per_step(schedule):
    epochs, steps, n = 3, 5, 370
    options = {"epochs": epochs, "steps_per_epoch": steps, "schedule": schedule}
    sampler = create_sampler("progressively_balanced", LABELS, num_samples=n, **options)
    last = epochs * steps - (schedule == "t/(T-1)")
    counts = torch.tensor([count for count in COUNTS if count], dtype=torch.float64)
    for epoch in range(epochs):
        stream = [LABELS[index] for index in sampler.epoch_indices(epoch)]
        a = (epoch * steps + torch.arange(steps).double()[:, None]) / last
        p = (1 - a) * counts / N + a / 4
        for step, expected in enumerate((p * n / steps).cumsum(0)):
            # A step ends within C / 2 draws of its position.
            ends = range((step + 1) * n // steps - 4, (step + 1) * n // steps + 5)
            drawn = torch.tensor([[stream[:end].count(c) for c in (0, 1, 3, 4)] for end in ends])
            assert ((drawn - expected).abs() < 2).all(1).any()
        found = sampler.class_probabilities(epoch)[[0, 1, 3, 4]]
        torch.testing.assert_close(found, p.mean(0), rtol=0, atol=1e-15)


@pytest.mark.parametrize("beta", ["0", "0.9", "0.9999", "0.999999999", "0.999999999999"])
def test_effective_number(beta):
    # Exact fractions: E = 1 + beta + ... + beta^(n - 1); an image has the weight 1 / E.
    effective = [sum(Fraction(beta) ** i for i in range(n)) for n in COUNTS]
    of_class = [n / e if n else 0 for n, e in zip(COUNTS, effective, strict=True)]
    sampler = create_sampler("effective_number", LABELS, num_classes=6, beta=float(beta))
    expected = [float(w / sum(of_class)) for w in of_class]
    assert sampler.class_probabilities().tolist() == pytest.approx(expected, rel=1e-14, abs=0)


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


def test_instance_balanced_epoch_is_a_permutation():
    # Many odd class sizes: a rounding error in any n * p_j would drop or repeat an image.
    labels = torch.repeat_interleave(torch.arange(1, 400))
    sampler = create_sampler("instance_balanced", labels)
    for epoch in range(20):
        assert torch.equal(sampler.epoch_indices(epoch).sort().values, torch.arange(len(labels)))
    sampler = create_sampler("instance_balanced", [0, 0, 1, 2])
    orders = collections.Counter(tuple(sampler.epoch_indices(e).tolist()) for e in range(2400))
    assert len(orders) == 24
    assert stats.chisquare(list(orders.values())).pvalue > 1e-3


@pytest.mark.parametrize("k", [2, 4])
def test_samples_per_class_draws_blocks_in_rounds(k):
    sampler = create_sampler("class_balanced", LABELS, num_samples=24 * k, samples_per_class=k)
    orders = set()
    for epoch in range(5):
        blocks = groups_of([LABELS[i] for i in sampler.epoch_indices(epoch).tolist()], k)
        assert all(len(set(block)) == 1 for block in blocks)
        for round_ in groups_of([block[0] for block in blocks], 4):
            assert sorted(round_) == [0, 1, 3, 4]
            orders.add(tuple(round_))
    # 30 rounds in 24 possible orders: all the same or a handful would be no shuffling.
    assert len(orders) > 10


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("num_samples", [3, 42, 1001])
@pytest.mark.parametrize("num_replicas", [2, 3, 7])
def test_a_short_block_is_filled_up_on_several_ranks(num_samples, num_replicas):
    def create(rank):
        size = {"num_samples": num_samples, "rank": rank, "num_replicas": num_replicas}
        return create_sampler("class_balanced", LABELS, samples_per_class=4, **size)

    whole = create(0).epoch_indices(0).tolist()
    number, last = math.ceil(num_samples / 4), (num_samples - 1) % 4 + 1
    for block in [*groups_of(whole, 4)[: number - 1], whole[-last:]]:
        assert len({LABELS[index] for index in block}) == 1
    blocks = together([groups_of(list(create(rank)), 4) for rank in range(num_replicas)])
    filled = groups_of(whole + (whole * 2)[: 4 - last], 4)
    assert blocks == (filled * num_replicas)[: len(blocks)]


def test_deferred_changes_in_its_epoch_and_draws_as_its_parts_do():
    for start, epochs, first in [(160, 200, 160), (0.8, 200, 160), (2, None, 2), (0.5, 3, 1)]:
        sampler = create_sampler("deferred", LABELS, start=start, epochs=epochs, second="reversed")
        for epoch in (0, first - 1, first, first + 1):
            p = create_sampler("reversed" if epoch >= first else "instance_balanced", LABELS)
            assert torch.equal(sampler.class_probabilities(epoch), p.class_probabilities())
    size = {"num_samples": 60, "seed": 5}
    options = {"start": 2, "second_options": {"samples_per_class": 5}}
    sampler = create_sampler("deferred", LABELS, **options, **size)
    first = create_sampler("instance_balanced", LABELS, **size)
    for epoch in range(2):
        assert torch.equal(sampler.epoch_indices(epoch), first.epoch_indices(epoch))
    blocks = torch.tensor(LABELS)[sampler.epoch_indices(2)].view(-1, 5)
    assert (blocks == blocks[:, :1]).all()
    # A part with a length of its own draws num_samples images too.
    sampler = create_sampler("deferred", LABELS, start=1, second="over_sampled")
    assert len(sampler) == N == len(sampler.epoch_indices(1))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("rebalancing", ["reversed", "class_balanced", "instance_balanced"])
@pytest.mark.parametrize("num_samples", [None, 2, 362])
def test_bilateral_streams_alternate(rebalancing, num_samples):
    size = {"num_samples": num_samples, "num_classes": 6, "seed": 3}
    sampler = create_sampler("bilateral", LABELS, rebalancing=rebalancing, **size)
    n = num_samples or 2 * N
    uniform = create_sampler("instance_balanced", LABELS, **size | {"num_samples": n // 2})
    other = create_sampler(rebalancing, LABELS, num_samples=n // 2, num_classes=6)
    drawn = collections.defaultdict(list)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        other.set_epoch(epoch)
        stream = list(sampler)
        assert len(stream) == len(sampler) == n
        assert stream[0::2] == uniform.epoch_indices(epoch).tolist()
        check_epoch(other, stream[1::2], LABELS)
        for label, images in images_by_class(stream[1::2], LABELS).items():
            drawn[label] += images
    assert all(in_cycles(images, COUNTS[label]) for label, images in drawn.items())
    if n == 2 * N:
        # The streams are not the same.
        assert sum(u == r for u, r in zip(stream[0::2], stream[1::2], strict=True)) < N / 2
    expected = other.class_probabilities() / 2 + torch.tensor(COUNTS) / (2 * N)
    torch.testing.assert_close(sampler.class_probabilities(), expected)


def test_shares_of_chunks_follow_the_definition():
    draws, num_chunks, key = np.array([3, 0, 17, 1, 8]), 7, np.array([5], np.uint64)
    numbers = range(int(draws.sum()))
    shift = [int(streams.keyed(key, np.array([i // num_chunks]))[0]) for i in numbers]
    chunk_of = [(i - h) % num_chunks for i, h in zip(numbers, shift, strict=True)]
    label_of = np.repeat(range(5), draws)
    for chunk in range(num_chunks + 1):
        naive = [0] * 5
        for number in numbers:
            naive[label_of[number]] += chunk_of[number] < chunk
        assert streams.drawn_before(draws, chunk, num_chunks, key).tolist() == naive


def test_a_new_sampler_defines_class_probabilities(monkeypatch):
    # Register it in a copy, which other tests do not see.
    monkeypatch.setattr(samplers.SAMPLERS, "_parts", dict(samplers.SAMPLERS._parts))

    @samplers.register_sampler("only_class")
    class OnlyClass(ClassSampler):
        def __init__(self, labels, num_samples=None, seed=0, num_classes=None, *, label):
            super().__init__(labels, num_samples, seed, num_classes)
            self.label = label

        def class_probabilities(self, epoch=None):
            return (torch.arange(len(self.class_counts)) == self.label).double()

    sampler = create_sampler("only_class", LABELS, num_samples=6, num_classes=6, label=3)
    check_epoch(sampler, list(sampler), LABELS)
    with pytest.raises(UsageError, match="must be 0 for a class without images"):
        iter(create_sampler("only_class", LABELS, num_classes=6, label=2))


def warned(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in caught]


def test_an_epoch_that_is_drawn_again_warns_once():
    sampler = create_sampler("class_balanced", LABELS)
    loader = DataLoader(range(N), 4, sampler=sampler)
    assert warned(lambda: list(loader)) == []
    (message,) = warned(lambda: list(loader))
    assert "draws epoch 0 again" in message
    assert "set_epoch of the sampler" in message
    assert warned(lambda: list(loader)) == []
    # Two first batches are not an epoch yet, four are.
    sampler = create_sampler("class_balanced", LABELS)
    assert warned(lambda: [next(iter(sampler)), next(iter(sampler))]) == []
    assert len(warned(lambda: [next(iter(sampler)), next(iter(sampler))])) == 1


def test_epochs_that_are_set_do_not_warn():
    sampler = create_sampler("class_balanced", LABELS)

    def draw():
        # The first batch, before training.
        next(iter(DataLoader(range(N), 4, sampler=sampler)))
        list(sampler)
        for epoch in (1, 2, 2):
            sampler.set_epoch(epoch)
            # The first batch, training, and an evaluation of the training images.
            next(iter(sampler)), list(sampler), list(sampler)
        sampler.load_state_dict(sampler.state_dict() | {"position": 8})
        list(sampler)
        sampler.set_epoch(3)
        # Iterators without draws, as DataLoader makes.
        iter(sampler), iter(sampler), sampler.epoch_indices()
        assert all(first == second for first, second in zip(sampler, sampler, strict=True))

    assert warned(draw) == []
    assert len(warned(lambda: [list(sampler) for _ in range(20)])) == 1
    # accelerate sets the epochs itself.
    sampler = create_sampler("class_balanced", LABELS)
    loader = Accelerator(cpu=True).prepare(DataLoader(range(N), 4, sampler=sampler))
    epochs = []
    assert warned(lambda: epochs.extend(torch.cat(list(loader)).tolist() for _ in range(3))) == []
    assert epochs == [sampler.epoch_indices(epoch).tolist() for epoch in range(3)]
