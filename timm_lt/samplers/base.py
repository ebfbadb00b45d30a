"""What every sampler is: the stream of an epoch.

The samplers by name.
"""

import bisect
import itertools
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from accelerate.state import PartialState, is_initialized
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from timm_lt.samplers.streams import (
    ImageCycles,
    Integers,
    Purpose,
    drawn_before,
    round_systematically,
    seed_word,
    sort_order,
    torch_generator,
)
from timm_lt.utils.checks import UsageError, check_integer
from timm_lt.utils.longtail import Labels
from timm_lt.utils.registry import Registry

# Draws that are turned into Python integers at once.
PIECE = 2**12
# Iterations of an epoch that was set: looks at the first batches, training and an evaluation.
PASSES = 3


class ClassSampler(Sampler[int]):
    """Draws images so that class ``j`` has probability ``p_j``: the base of all samplers.

    A sampler is defined by :meth:`class_probabilities`; a new one need not define more. The rest
    follows from it and holds for each epoch, where ``n`` is ``num_samples``:

    - class ``j`` is drawn ``floor(n * p_j)`` or ``ceil(n * p_j)`` times, ``n * p_j`` on average
      (systematic rounding with a random offset, so that epochs do not wander as with independent
      draws); a sampler of blocks of a class rounds to whole blocks;
    - within a class every image is drawn once before any is drawn again, over all epochs: an epoch
      goes on in the class's cycle of images where the one before it ended;
    - the stream is a function of (seed, epoch) and nothing else, least of all the global random
      state: every process draws the same one, and accelerate can give each its share.

    How it works. How often each class was drawn in all earlier epochs is the sum of their rounded
    numbers: C integers per epoch and no images. It says where in its cycles a class stands. An
    epoch is cut into K chunks of about 2^18 draws (or four per class, if more), whose sizes differ
    by at most one; every class's draws are shared evenly among them. Any chunk can be made without
    the others: the images that each class is to give are taken from its cycles, in order, and the
    classes are arranged uniformly at random.

    An epoch of one chunk is a uniformly random arrangement. In a longer one every draw still has
    the same probability at every place, but a class's draws are spread over the chunks more evenly
    than chance would, within two of ``1 / K`` of them in each.

    Args:
        labels: Integer labels, one per image of the data set that the indices are for.
        num_samples: Length of an epoch, at least 1; None takes the number of labels.
        seed: A non-negative integer.
        num_classes: Number of classes; None takes the largest label plus one.

    Attributes:
        epoch: The epoch that the next iteration draws.
        class_counts: Images of each class (C,).
        warns_of_repetition: Whether a warning is to come if an epoch is drawn again.

    Shape:
        labels (N,); an epoch is ``num_samples`` integers in [0, N).

    Raises:
        UsageError: If a label or value is out of range.
    """

    # Draws that are made at once, unless there are more than a quarter as many classes.
    chunk_size: ClassVar[int] = 2**18
    # Draws between which the stream cannot be resumed: 2 for pairs.
    unit: ClassVar[int] = 1

    def __init__(
        self,
        labels: Labels,
        num_samples: int | None = None,
        seed: int = 0,
        num_classes: int | None = None,
    ) -> None:
        self._images = ImageCycles(labels, num_classes)
        self.class_counts = torch.from_numpy(self._images.counts)
        if num_samples is None:
            num_samples = int(self.class_counts.sum())
        self.num_samples = check_integer("num_samples", num_samples, minimum=1)
        self.seed = check_integer("seed", seed, minimum=0)
        self.epoch = 0
        self.rank, self.num_replicas = 0, 1
        # Iterations since the epoch was set, if it ever was, and whether one came to its end.
        self._begun, self._exhausted, self._was_set = 0, False, False
        self.warns_of_repetition = True
        self._rewind(0)
        self._last_plan: Plan | None = None

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns the probability that a draw is of each class.

        Args:
            epoch: 0-based epoch; None means the one that :meth:`set_epoch` set.

        Shape:
            (C,) float64 that sums to 1. A class without images has probability 0.
        """
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Chooses the 0-based epoch that the next iteration draws, from its beginning.

        Call it before each epoch: without it every iteration draws the same epoch, of which a
        sampler warns once. An epoch that was set can be iterated three times without a warning, as
        for training and an evaluation.

        After :meth:`load_state_dict`, setting the epoch of the state leaves its position.
        """
        epoch = check_integer("epoch", epoch, minimum=0)
        if epoch != self.epoch:
            self._rewind(0)
        self.epoch = epoch
        self._begun, self._exhausted, self._was_set = 0, False, True

    def shard(self, rank: int, num_replicas: int) -> None:
        """Makes this the sampler of one of several processes, for use without accelerate.

        The stream is the same whatever the number of processes. It is shared in groups of
        :attr:`group` consecutive draws: rank ``r`` of ``R`` gets groups ``r``, ``r + R``, ... As in
        torch's DistributedSampler, all ranks draw equally many: if the groups cannot be shared
        evenly, or the last is not full, the first draws of the epoch are drawn again at its end.
        Every rank makes the whole stream, a chunk at a time, and keeps its own.

        Args:
            rank: From 0 to ``num_replicas`` - 1.
            num_replicas: Number of processes, at least 1.

        Raises:
            UsageError: If a value is out of range; when iterating, if accelerate runs several
                processes, for it shares the batches among them itself.
        """
        self.num_replicas = check_integer("num_replicas", num_replicas, minimum=1)
        self.rank = check_integer("rank", rank, minimum=0, maximum=num_replicas - 1)

    @property
    def group(self) -> int:
        """Consecutive draws that stay together on a rank: 2 for pairs, 1 for most samplers."""
        return self.unit

    def __len__(self) -> int:
        if self.num_replicas == 1:
            return self.num_samples
        turn = self.num_replicas * self.group
        return -(-self.num_samples // turn) * self.group

    def __iter__(self) -> Iterator[int]:
        if self.num_replicas > 1 and is_initialized() and PartialState().num_processes > 1:
            raise UsageError(
                f"this sampler is sharded (rank {self.rank} of {self.num_replicas}), and "
                f"accelerate shares batches among its {PartialState().num_processes} processes "
                "too: create it without rank= and num_replicas="
            )
        plan = self._plan(self.epoch)
        start = self._start
        self._rewind(0)
        group = self.group if self.num_replicas > 1 else self.unit
        if start % group and start < self.num_samples:
            raise UsageError(
                f"position {start} lies within a group of {group} draws, which stay together on a "
                f"process: resume from a multiple of {group}"
            )
        self._cursor = _Cursor(start, self.num_replicas, group)
        # A generator that yields every draw would take longer than making them.
        return itertools.chain.from_iterable(self._pieces(plan, self._cursor, self.rank))

    def _rewind(self, position: int) -> None:
        self._start = position
        self._cursor = _Cursor(position)

    def _pieces(self, plan: "Plan", cursor: "_Cursor", rank: int) -> Iterator[Iterator[int]]:
        """Yields one rank's draws from the cursor on, which moves along, piece by piece."""
        self._warn_of_repetition()
        stride, group = cursor.stride, cursor.group
        # The end of the last group, which may be filled up.
        total = -(-self.num_samples // group) * group
        start = total if cursor.end == self.num_samples else cursor.end
        at = start + rank * group
        for begin, images in self._groups(plan, start, total):
            mine = images.reshape(-1, group)[(at - begin) // group :: stride].ravel()
            at += len(mine) * stride
            for low in range(0, len(mine), PIECE):
                yield cursor.over(mine[low : low + PIECE].tolist())
        # A rank that comes out one group short goes on at the beginning.
        turn = stride * group
        if at < start - (start - total) // turn * turn:
            begin, images = next(self._groups(plan, at % total, total))
            place = at % total - begin
            yield cursor.over(images[place : place + group].tolist())
        self._exhausted = True

    def _warn_of_repetition(self) -> None:
        """Warns once if an epoch is drawn again and was not set again."""
        # A look at the first batches is not an epoch yet; a second look is a habit.
        passes = PASSES if self._was_set else 1 if self._exhausted else 2
        if self._begun >= passes and self.warns_of_repetition:
            self.warns_of_repetition = False
            warnings.warn(
                f"{type(self).__name__} draws epoch {self.epoch} again, the same images in the "
                "same order: call set_epoch(epoch) of the sampler, or of its loader, before each "
                "epoch",
                stacklevel=3,
            )
        self._begun += 1

    def _groups(self, plan: "Plan", start: int, total: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yields chunks from a place on, the last filled up with the first draws of the epoch."""
        for begin, images in self._chunks(plan, start):
            if begin + len(images) == self.num_samples < total:
                _, first = next(self._chunks(plan, 0))
                missing = total - self.num_samples
                yield begin, np.concatenate([images, np.resize(first[:missing], missing)])
            else:
                yield begin, images

    def state_dict(self) -> dict[str, int]:
        """Returns where the last iteration is: how much all ranks have drawn of which stream.

        Within a group that stays together on a rank, that is the beginning of the group.

        A DataLoader with workers draws ahead of what it has given. Count its batches then, and put
        their images, over all ranks, in ``"position"``.

        Returns:
            ``seed``, ``epoch``, ``num_samples`` and ``position``, a place in the stream.
        """
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "num_samples": self.num_samples,
            "position": min(self._cursor.position(), self.num_samples),
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Lets the next iteration, and only that, go on from a state.

        The number of ranks need not be what it was, as long as the batches over all ranks have
        the same size: the stream is the same.

        Raises:
            UsageError: If the state is not of this stream, or its values are out of range.
        """
        for name in ("seed", "num_samples"):
            if state.get(name) != getattr(self, name):
                raise UsageError(
                    f"the state has {name} {state.get(name)}, the sampler {getattr(self, name)}: "
                    "it is not of this stream"
                )
        epoch = check_integer("epoch", state["epoch"], minimum=0)
        position = check_integer("position", state["position"], 0, self.num_samples)
        if position % self.unit:
            raise UsageError(f"position {position} lies within a pair: it must be even")
        self.epoch = epoch
        self._begun, self._exhausted = 0, False
        self._rewind(position)

    def epoch_indices(self, epoch: int | None = None) -> Tensor:
        """Returns the indices of a whole epoch in the order in which they are drawn, by all ranks.

        Args:
            epoch: 0-based epoch; None means the one that :meth:`set_epoch` set.

        Shape:
            (num_samples,) int64.
        """
        epoch = self.epoch if epoch is None else check_integer("epoch", epoch, minimum=0)
        indices = np.empty(self.num_samples, dtype=np.int64)
        for begin, images in self._chunks(self._plan(epoch), 0):
            indices[begin : begin + len(images)] = images
        return torch.from_numpy(indices)

    def _plan(self, epoch: int) -> "Plan":
        """Sums up what earlier epochs drew of each class, from the epoch planned last if it can."""
        plan = self._last_plan
        if plan is None or plan.seed != self.seed or plan.epoch > epoch:
            plan = Plan(self.seed, 0, self._round(0), np.zeros_like(self._images.counts))
        while plan.epoch < epoch:
            following = plan.epoch + 1
            plan = Plan(self.seed, following, self._round(following), plan.drawn + plan.draws)
        self._last_plan = plan
        return plan

    def _round(self, epoch: int) -> Integers:
        """Returns how often each class (C,) is drawn in an epoch."""
        probabilities = self.class_probabilities(epoch)
        generator = torch_generator(self.seed, Purpose.ROUNDING, epoch)
        draws: Integers = round_systematically(probabilities, self.num_samples, generator).numpy()
        if (draws[self._images.counts == 0] > 0).any():
            raise UsageError("class_probabilities gives a class without images more than 0")
        return draws

    def _chunks(self, plan: "Plan", start: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yields the chunks of an epoch from a place on, each with the place at which it begins."""
        num_chunks = self._num_chunks(plan.draws)

        def before(chunk: int) -> Integers:
            if chunk == 0:
                return np.zeros_like(plan.draws)
            return plan.draws if chunk == num_chunks else self._drawn_before(plan, chunk)

        # bisect_right gives the first chunk that begins after the place.
        chunks = range(1, num_chunks)
        first = bisect.bisect_right(chunks, start, key=lambda chunk: int(before(chunk).sum()))
        drawn = before(first)
        for chunk in range(first, num_chunks):
            following = before(chunk + 1)
            amounts = following - drawn
            images = self._images.draw(plan.seed, plan.drawn + drawn, amounts)
            generator = torch_generator(plan.seed, Purpose.ARRANGEMENT, plan.epoch, chunk)
            # Places of the first class, in order, then of the next: they take the images in order.
            order = sort_order(self._arrange(plan, chunk, amounts, generator))
            arranged = np.empty_like(images)
            arranged[order] = images
            yield int(drawn.sum()), arranged
            drawn = following

    def _num_chunks(self, draws: Integers) -> int:
        """Returns the number of chunks of an epoch."""
        return -(-self.num_samples // max(self.chunk_size, 4 * len(draws)))

    def _drawn_before(self, plan: "Plan", chunk: int) -> Integers:
        """Returns how often each class (C,) is drawn in the epoch before a chunk."""
        key = seed_word(plan.seed, Purpose.SHARES, plan.epoch)
        return drawn_before(plan.draws, chunk, self._num_chunks(plan.draws), key)

    def _arrange(
        self, plan: "Plan", chunk: int, amounts: Integers, generator: torch.Generator
    ) -> NDArray[Any]:
        """Returns the class of each draw of a chunk, class ``j`` exactly ``amounts[j]`` times."""
        order = torch.randperm(int(amounts.sum()), generator=generator).numpy()
        classes: NDArray[Any] = np.repeat(small_integers(len(amounts)), amounts)[order]
        return classes


class _Cursor:
    """How far an iteration is, without counting: a list iterator knows what it has left."""

    def __init__(self, start: int, stride: int = 1, group: int = 1) -> None:
        self.start, self.end = start, start
        self.stride, self.group = stride, group
        self.piece: Iterator[int] = iter(())

    def over(self, piece: list[int]) -> Iterator[int]:
        """Returns an iterator over the next draws of one rank, which the cursor follows."""
        self.end += len(piece) * self.stride
        self.piece = iter(piece)
        return self.piece

    def position(self) -> int:
        """Returns how much all ranks have drawn, in whole groups."""
        drawn = (self.end - self.start) // self.stride - operator.length_hint(self.piece)
        return self.start + drawn // self.group * self.group * self.stride


@dataclass(frozen=True)
class Plan:
    """What an epoch draws of each class (C,), and what was drawn before it."""

    seed: int
    epoch: int
    draws: Integers
    drawn: Integers


def small_integers(stop: int) -> NDArray[Any]:
    """Returns 0, ..., stop - 1 as the smallest integers that hold them: the fastest to sort."""
    return np.arange(stop, dtype=np.int16 if stop <= 2**15 else np.int32)


SAMPLERS: Registry[Callable[..., ClassSampler]] = Registry("sampler")
# What whoever uses a sampler sets, so that it is no option for a user.
SET_BY_OWNER = ("labels", "num_samples", "seed", "num_classes", "rank", "num_replicas")

S = TypeVar("S", bound=type[ClassSampler])


def register_sampler(name: str) -> Callable[[S], S]:
    """Returns a class decorator that registers a :class:`ClassSampler` under a name.

    Its constructor takes ``(labels, num_samples, seed, num_classes)`` and, keyword-only, its own
    options.
    """

    def add(cls: S) -> S:
        SAMPLERS.register(name)(cls)
        return cls

    return add


def list_samplers() -> list[str]:
    """Returns the names that :func:`create_sampler` knows."""
    return list(SAMPLERS)


def create_sampler(
    name: str,
    labels: Labels,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    rank: int = 0,
    num_replicas: int = 1,
    **options: Any,
) -> ClassSampler:
    """Creates a sampler by name; see :class:`ClassSampler` for what all of them guarantee.

    >>> import torch
    >>> sampler = create_sampler("class_balanced", [0] * 90 + [1] * 10, num_samples=40)
    >>> torch.bincount(torch.tensor(list(sampler)) // 90)
    tensor([20, 20])

    Args:
        name: One of :func:`list_samplers`.
        labels: Integer labels (N,), one per image.
        num_samples: Length of an epoch over all processes, at least 1; None takes N.
        seed: A non-negative integer.
        num_classes: Number of classes; None takes the largest label plus one.
        rank: Number of this process, without accelerate; see :meth:`ClassSampler.shard`.
        num_replicas: Number of processes, without accelerate. With it, leave both out.
        **options: The sampler's own options.

    Raises:
        UsageError: If the name or an option is unknown, or a value is out of range.
    """
    sampler = SAMPLERS.create(name, labels, num_samples, seed, num_classes, **options)
    sampler.shard(rank, num_replicas)
    return sampler


def check_sampler(owner: str, sampler: str, options: Mapping[str, Any] | None) -> None:
    """Checks the sampler that something is trained with, name and options, without data.

    Args:
        owner: What is trained, for the message, e.g. ``"of head 'crt'"``.
        sampler: The name.
        options: Its ``sampler_options``, or None.

    Raises:
        UsageError: If the name or an option is unknown, a value is out of range, the option is set
            elsewhere, or the sampler changes from epoch to epoch: all draws of a head are one.
    """
    if options is not None and not isinstance(options, Mapping):
        raise UsageError(f"sampler_options {owner} must be a mapping, got {options!r}")
    given = dict(options or {})
    for key in SET_BY_OWNER:
        if key in given:
            raise UsageError(f"{key} in sampler_options {owner} is set elsewhere: leave it out")
    try:
        made = create_sampler(sampler, [0, 1], num_samples=1, **given)
    except UsageError as error:
        raise UsageError(f"sampler {owner}: {error}") from error
    if getattr(made, "epochs", 1) != 1:
        raise UsageError(
            f"sampler {sampler!r} {owner} changes from epoch to epoch, and all draws of a head are "
            "one: take another, or one that changes within an epoch and epochs: 1"
        )
