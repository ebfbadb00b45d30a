"""The sampler of pairs: each of its streams is a registered sampler, whose contract holds."""

import collections
import itertools
import json
import math

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader

from timm_lt.samplers import ClassSampler, create_sampler
from timm_lt.samplers import streams as cycles
from timm_lt.utils.checks import UsageError

COUNTS = [23, 9, 0, 4, 1, 0]
LABELS = torch.repeat_interleave(torch.tensor(COUNTS)).tolist()
N = len(LABELS)
OTHERS = ["reversed", "class_balanced", "instance_balanced"]


@pytest.fixture(params=[False, True], ids=["one_chunk", "small_chunks"])
def chunks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(ClassSampler, "chunk_size", 25)
        monkeypatch.setattr(cycles, "BLOCK", 8)


def create(num_samples=None, **options):
    return create_sampler("bilateral", LABELS, num_samples=num_samples, num_classes=6, **options)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("rebalancing", OTHERS)
@pytest.mark.parametrize("num_samples", [None, 2, 6, 362])
def test_the_streams_alternate(rebalancing, num_samples):
    sampler = create(num_samples, seed=3, rebalancing=rebalancing)
    n = num_samples or 2 * N
    uniform = create_sampler("instance_balanced", LABELS, num_samples=n // 2, seed=3, num_classes=6)
    drawn = collections.defaultdict(list)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        uniform.set_epoch(epoch)
        stream = list(sampler)
        assert len(stream) == len(sampler) == n
        assert sampler.epoch_indices(epoch).tolist() == stream
        assert stream[0::2] == list(uniform)
        # The other stream is that of a registered sampler, of a seed of its own.
        assert stream[1::2] == sampler.rebalancing.epoch_indices(epoch).tolist()
        for image in stream[1::2]:
            drawn[LABELS[image]].append(image)
    other = create_sampler(rebalancing, LABELS, num_samples=n // 2, num_classes=6)
    assert type(sampler.rebalancing) is type(other)
    assert sampler.rebalancing.seed not in (0, 3)
    # Cycles go on across epochs.
    for c, images in drawn.items():
        for start in range(0, len(images), COUNTS[c]):
            cycle = images[start : start + COUNTS[c]]
            assert len(set(cycle)) == len(cycle)
    expected = other.class_probabilities() / 2 + torch.tensor(COUNTS) / (2 * N)
    torch.testing.assert_close(sampler.class_probabilities(), expected)


def test_the_other_stream_is_reversed():
    # The paper's equation 4, worked out by hand: P_i = (n_max / n_i) / sum of the same.
    weights = [23 / n if n else 0 for n in COUNTS]
    found = torch.zeros(6)
    sampler = create(200)
    for epoch in range(50):
        odd = torch.tensor(LABELS)[sampler.epoch_indices(epoch)[1::2]]
        found += torch.bincount(odd, minlength=6)
    expected = [5000 * w / sum(weights) for w in weights]
    assert found.tolist() == pytest.approx(expected, abs=4 * 0.5 * math.sqrt(50))


def test_the_streams_do_not_show_the_same():
    sampler = create(rebalancing="instance_balanced")
    stream = sampler.epoch_indices(0)
    for part in (stream[0::2], stream[1::2]):
        assert part.sort().values.tolist() == list(range(N))
    assert (stream[0::2] == stream[1::2]).float().mean() < 0.2


def test_stream_is_a_function_of_seed_and_epoch_alone():
    streams = set()
    for seed, epoch in itertools.product(range(4), range(4)):
        sampler = create(seed=seed)
        sampler.set_epoch(epoch)
        streams.add(tuple(sampler))
        # Another that was at other seeds and epochs, and is in the middle of one.
        other = create(seed=9)
        other.set_epoch(5)
        next(iter(other))
        other.seed = seed
        other.set_epoch(epoch)
        assert list(other) == sampler.epoch_indices().tolist()
    assert len(streams) == 16


@pytest.mark.usefixtures("chunks")
def test_iterators_do_not_disturb_each_other():
    sampler = create(200)
    expected = [sampler.epoch_indices(epoch).tolist() for epoch in range(2)]
    first = iter(sampler)
    drawn = [next(first) for _ in range(110)]
    sampler.set_epoch(1)
    assert list(sampler) == expected[1]
    assert drawn + list(first) == expected[0]


def pairs(stream):
    return list(zip(stream[0::2], stream[1::2], strict=True))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8, 70])
def test_ranks_keep_pairs_together(num_replicas):
    stream = pairs(create(100).epoch_indices(2).tolist())
    ranks = []
    for rank in range(num_replicas):
        sampler = create(100, rank=rank, num_replicas=num_replicas)
        sampler.set_epoch(2)
        drawn = list(sampler)
        assert len(drawn) == len(sampler) == 2 * math.ceil(50 / num_replicas)
        ranks.append(pairs(drawn))
    together = [pair for turn in zip(*ranks, strict=True) for pair in turn]
    assert together == (stream + stream)[: len(together)]


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 3), (4, 1)])
def test_a_state_resumes_in_the_middle_of_an_epoch(before, after):
    stream = pairs(create(96).epoch_indices(5).tolist())
    for consumed in (0, 2, 12, 96 // before):
        old = create(96, rank=before - 1, num_replicas=before)
        old.set_epoch(5)
        iterator = iter(old)
        for _ in range(consumed):
            next(iterator)
        state = json.loads(json.dumps(old.state_dict()))
        assert state["position"] == consumed * before
        rest = []
        for rank in range(after):
            new = create(96, rank=rank, num_replicas=after)
            new.load_state_dict(state)
            new.set_epoch(5)
            rest.append(pairs(list(new)))
        left = stream[consumed * before // 2 :]
        together = [pair for turn in zip(*rest, strict=True) for pair in turn]
        assert together[: len(left)] == left


@pytest.mark.parametrize("split_batches", [False, True])
def test_accelerate_shares_whole_pairs(split_batches):
    stream = create(96).epoch_indices(0).tolist()
    shards = []
    for rank in range(2):
        batches = BatchSampler(create(96), 8, drop_last=True)
        shard = BatchSamplerShard(batches, 2, rank, split_batches=split_batches)
        shards.append([pairs(batch) for batch in shard])
        assert {len(batch) for batch in shards[-1]} == {2 if split_batches else 4}
    together = [pair for turn in zip(*shards, strict=True) for batch in turn for pair in batch]
    assert together == pairs(stream)


def test_data_loader_draws_the_same_stream():
    sampler = create()
    loader = DataLoader(range(N), batch_size=6, sampler=sampler)
    assert torch.cat(list(loader)).tolist() == sampler.epoch_indices().tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 7}, "counts the images of pairs and must be even, got 7"),
        ({"num_samples": 0}, "num_samples must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"rebalancing": "power"}, "'power'.*reversed, class_balanced, instance_balanced"),
        ({"batch_size": 2}, "has no option 'batch_size'; valid options: rebalancing"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        create_sampler("bilateral", LABELS, **options)


def test_no_part_of_a_deferred_sampler():
    with pytest.raises(UsageError, match="'bilateral' draws pairs and is no part of a deferred"):
        create_sampler("deferred", LABELS, num_samples=40, second="bilateral", start=2)


def test_a_state_between_the_two_of_a_pair_is_refused():
    state = create(96).state_dict()
    with pytest.raises(UsageError, match="position 7 lies within a pair"):
        create(96).load_state_dict(state | {"position": 7})
