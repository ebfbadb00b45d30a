"""Base class of samplers, which draws the stream of an epoch, and their registry."""

import bisect
import itertools
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import InitVar, dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar, cast

import numpy as np
import torch
from accelerate.state import PartialState, is_initialized
from torch import Tensor
from torch.utils.data import Sampler

from timm_lt.samplers import streams
from timm_lt.samplers.streams import Array, Integers, Purpose
from timm_lt.utils.checks import (
    Registry,
    UsageError,
    check_fields,
    check_integer,
    check_mapping,
    user_errors,
)
from timm_lt.utils.longtail import Labels

# Draws that are converted to Python integers at once.
PIECE = 2**12
# Iterations of an epoch without a warning after set_epoch: a first batch, training, evaluation.
PASSES = 3


class Plan(NamedTuple):
    """Draws of each class (C,) in an epoch, and in all epochs before it."""

    seed: int
    epoch: int
    draws: Integers
    drawn: Integers


@dataclass(eq=False)
class ClassSampler(Sampler[int]):
    """Base class of samplers: class ``j`` is drawn with probability ``p_j``.

    A subclass defines :meth:`class_probabilities`; its options are keyword-only fields. In each
    epoch of n = ``num_samples`` draws:

    - class ``j`` is drawn ``floor(n * p_j)`` or ``ceil(n * p_j)`` times, ``n * p_j`` on average;
    - each image of a class is drawn once before any is drawn again, across epochs too;
    - the stream is a function of (seed, epoch) and independent of the global random state: all
      processes draw the same one, and accelerate gives each its batches.

    An epoch is computed without those before it, in K chunks of about 2^18 draws (at least four per
    class), each arranged uniformly at random. If K > 1, a draw is still equally likely at every
    position, but a class is spread more evenly than by chance: within two of ``1 / K`` of its draws
    in each chunk.

    Args:
        labels: Integer labels (N,), one per image of the data set; an index is in [0, N).
        num_samples: Length of an epoch, at least 1; None takes the number of labels.
        seed: A non-negative integer.
        num_classes: Number of classes; None takes the largest label plus one.

    Attributes:
        epoch: Epoch of the next iteration.
        class_counts: Images of each class (C,).
        warns_of_repetition: Whether to warn if an epoch is drawn again.

    Raises:
        UsageError: If a label or value is out of range.
    """

    # Draws per chunk, unless there are more than a quarter as many classes.
    chunk_size: ClassVar[int] = 2**18
    # Draws that cannot be divided when the stream is resumed: 2 for pairs.
    unit: ClassVar[int] = 1

    labels: InitVar[Labels]
    num_samples: Annotated[int, 1] = None  # type: ignore[assignment]
    seed: Annotated[int, 0] = 0
    num_classes: InitVar[int | None] = None

    def __post_init__(self, labels: Labels, num_classes: int | None) -> None:
        check_fields(self)
        self._images = streams.ImageCycles(labels, num_classes)
        self.class_counts = torch.from_numpy(self._images.counts)
        if self.num_samples is None:
            self.num_samples = int(self.images_per_class().sum())
        self.epoch = 0
        self.rank, self.num_replicas = 0, 1
        self.warns_of_repetition = True
        self._start, self._cursor = 0, _Cursor(0)
        # A first batch and an epoch may be drawn before set_epoch is called.
        self._begun, self._passes = 0, 2
        self._last_plan: Plan | None = None

    def images_per_class(self) -> Tensor:
        """Returns the draws of each class (C,) in an epoch of the default length."""
        return self.class_counts

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns the probability of each class in a draw.

        Args:
            epoch: 0-based epoch; None takes that of :meth:`set_epoch`.

        Shape:
            (C,) float64 that sums to 1. An empty class has probability 0.
        """
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Sets the 0-based epoch of the next iteration.

        Call it before each epoch; otherwise every iteration draws the same one. The sampler warns
        once, at the fourth iteration of an epoch. Setting the epoch of a loaded state keeps its
        position.
        """
        epoch = check_integer("epoch", epoch, minimum=0)
        if epoch != self.epoch:
            self._start, self._cursor = 0, _Cursor(0)
        self.epoch, self._begun, self._passes = epoch, 0, PASSES

    def shard(self, rank: int, num_replicas: int) -> None:
        """Makes this the sampler of one of several processes, for use without accelerate.

        Rank ``r`` of ``R = num_replicas`` gets the groups ``r``, ``r + R``, ... of :attr:`group`
        consecutive draws. As in torch's DistributedSampler, the first draws of the epoch fill up
        its end, so that all ranks have equally many.

        Raises:
            UsageError: If ``rank`` is not from 0 to R - 1; when iterating, if accelerate runs
                several processes, since it divides the batches itself.
        """
        self.num_replicas = check_integer("num_replicas", num_replicas, minimum=1)
        self.rank = check_integer("rank", rank, minimum=0, maximum=num_replicas - 1)

    @property
    def group(self) -> int:
        """Number of consecutive draws that stay on one rank: 2 for pairs, 1 for most samplers."""
        return self.unit

    def __len__(self) -> int:
        if self.num_replicas == 1:
            return self.num_samples
        return -(-self.num_samples // (self.num_replicas * self.group)) * self.group

    def __iter__(self) -> Iterator[int]:
        if self.num_replicas > 1 and is_initialized() and PartialState().num_processes > 1:
            raise UsageError(
                f"the sampler has rank {self.rank} of {self.num_replicas}, but accelerate divides "
                "the batches itself: create it without rank= and num_replicas="
            )
        plan, start = self._plan(self.epoch), self._start
        group = self.group if self.num_replicas > 1 else self.unit
        if start % group and start < self.num_samples:
            raise UsageError(
                f"position {start} is inside a group; it must be a multiple of {group}"
            )
        self._start, self._cursor = 0, _Cursor(start, group, self.num_replicas)
        # A generator of single draws would take longer than computing them.
        return itertools.chain.from_iterable(self._pieces(plan, self._cursor, self.rank))

    def _pieces(self, plan: Plan, cursor: "_Cursor", rank: int) -> Iterator[Iterator[int]]:
        """Yields the draws of one rank from the start of the cursor on, which moves along."""
        if self._begun >= self._passes and self.warns_of_repetition:
            self.warns_of_repetition = False
            warnings.warn(
                f"{type(self).__name__} draws epoch {self.epoch} again, the same images in the "
                "same order: call set_epoch of the sampler or its loader before each epoch",
                stacklevel=2,
            )
        self._begun += 1
        ahead = rank
        for images in self._filled(plan, cursor):
            groups = images.reshape(-1, cursor.group)
            mine = groups[ahead :: cursor.stride].ravel()
            ahead = (ahead - len(groups)) % cursor.stride
            for low in range(0, len(mine), PIECE):
                yield cursor.over(mine[low : low + PIECE].tolist())
        if self._passes < PASSES:
            self._passes = 1

    def _filled(self, plan: Plan, cursor: "_Cursor") -> Iterator[Array]:
        """Yields the stream from the start of a cursor on, in whole groups and turns of the ranks.

        Missing draws at the end are the first ones of the epoch.
        """
        start, turn = cursor.start, cursor.group * cursor.stride
        missing = -self.num_samples % cursor.group
        left = -(-(self.num_samples - start) // turn) * turn
        while left > 0:
            for begin, images in self._chunks(plan, start):
                drawn = images[max(start - begin, 0) :]
                if begin + len(images) == self.num_samples and missing:
                    _, first = next(self._chunks(plan, 0))
                    drawn = np.append(drawn, np.resize(first[:missing], missing))
                yield drawn[:left]
                left -= len(drawn)
                if left <= 0:
                    break
            start = 0

    def state_dict(self) -> dict[str, int]:
        """Returns the position of the last iteration: the draws of all ranks, in whole groups.

        A DataLoader with workers draws ahead. In this case, replace ``"position"`` by the number of
        images in its batches, over all ranks.
        """
        position = min(self._cursor.position(), self.num_samples)
        stream = {"seed": self.seed, "epoch": self.epoch, "num_samples": self.num_samples}
        return stream | {"position": position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from a state in the next iteration, and only in that one.

        The number of ranks may differ, as long as the batches over all ranks have the same size.

        Raises:
            UsageError: If the state is of another stream, or a value is out of range.
        """
        for name in ("seed", "num_samples"):
            own = getattr(self, name)
            if state.get(name) != own:
                raise UsageError(f"the state has {name} {state.get(name)}, the sampler {own}")
        self.epoch = check_integer("epoch", state["epoch"], minimum=0)
        self._start = check_integer("position", state["position"], 0, self.num_samples)
        self._cursor = _Cursor(self._start)
        self._begun, self._passes = 0, PASSES

    def epoch_indices(self, epoch: int | None = None) -> Tensor:
        """Returns the indices (num_samples,) of a whole epoch, by default of the current one."""
        epoch = self.epoch if epoch is None else check_integer("epoch", epoch, minimum=0)
        indices = np.empty(self.num_samples, dtype=np.int64)
        for begin, images in self._chunks(self._plan(epoch), 0):
            indices[begin : begin + len(images)] = images
        return torch.from_numpy(indices)

    def _plan(self, epoch: int) -> Plan:
        """Returns the plan of an epoch, from the last one that was planned if that is earlier."""
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
        generator = streams.torch_generator(self.seed, Purpose.ROUNDING, epoch)
        draws = streams.round_systematically(probabilities, self.num_samples, generator)
        if (draws[self._images.counts == 0] > 0).any():
            raise UsageError("class_probabilities must be 0 for a class without images")
        return draws

    def _chunks(self, plan: Plan, start: int) -> Iterator[tuple[int, Array]]:
        """Yields the chunks of an epoch from that of a position on, with their first positions."""
        num_chunks, before = self._division(plan)
        first = bisect.bisect_right(range(1, num_chunks), start, key=lambda c: int(before(c).sum()))
        drawn = before(first)
        for chunk in range(first, num_chunks):
            following = before(chunk + 1)
            amounts = following - drawn
            images = self._images.draw(plan.seed, plan.drawn + drawn, amounts)
            generator = streams.torch_generator(plan.seed, Purpose.ARRANGEMENT, plan.epoch, chunk)
            # The positions of each class in order, as its images are.
            order = streams.sort_order(self._arrange(plan, chunk, amounts, generator))
            arranged = np.empty_like(images)
            arranged[order] = images
            yield int(drawn.sum()), arranged
            drawn = following

    def _division(self, plan: Plan) -> tuple[int, Callable[[int], Integers]]:
        """Returns the number of chunks, and a function: the draws of each class before a chunk."""
        num_chunks = -(-self.num_samples // max(self.chunk_size, 4 * len(plan.draws)))
        key = streams.seed_word(plan.seed, Purpose.SHARES, plan.epoch)
        return num_chunks, lambda chunk: streams.drawn_before(plan.draws, chunk, num_chunks, key)

    def _arrange(self, plan: Plan, chunk: int, amounts: Integers, rng: torch.Generator) -> Array:
        """Returns the class of each draw of a chunk; class ``j`` has ``amounts[j]`` draws."""
        order = torch.randperm(int(amounts.sum()), generator=rng).numpy()
        classes: Array = np.repeat(streams.small_integers(len(amounts)), amounts)[order]
        return classes


class _Cursor:
    """Position of an iteration, without counting: a list iterator knows what it has left."""

    def __init__(self, start: int, group: int = 1, stride: int = 1) -> None:
        self.start, self.group, self.stride = start, group, stride
        self.drawn = 0
        self.piece: Iterator[int] = iter(())

    def over(self, piece: list[int]) -> Iterator[int]:
        """Returns an iterator over the next draws of one rank, which the cursor follows."""
        self.drawn += len(piece)
        self.piece = iter(piece)
        return self.piece

    def position(self) -> int:
        """Returns the draws of all ranks, in whole groups."""
        drawn = self.drawn - operator.length_hint(self.piece)
        return self.start + drawn // self.group * self.group * self.stride


SAMPLERS: Registry[Callable[..., ClassSampler]] = Registry("sampler")
S = TypeVar("S", bound=type[ClassSampler])


def register_sampler(name: str) -> Callable[[S], S]:
    """Returns a class decorator that registers a :class:`ClassSampler` under a name.

    Options are keyword-only fields or parameters after those of :class:`ClassSampler`.
    """
    return cast("Callable[[S], S]", SAMPLERS.register(name))


def list_samplers() -> list[str]:
    """Returns the names of the samplers."""
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
        rank: Rank of this process, without accelerate; see :meth:`ClassSampler.shard`.
        num_replicas: Number of processes, without accelerate.
        **options: Options of the sampler.

    Raises:
        UsageError: If the name or an option is unknown, or a value is out of range.
    """
    sampler = SAMPLERS.create(name, labels, num_samples, seed, num_classes, **options)
    sampler.shard(rank, num_replicas)
    return sampler


def check_sampler(owner: str, sampler: str, options: Mapping[str, Any] | None) -> None:
    """Checks the sampler with which a head is trained, in a single epoch."""
    given = check_mapping(f"sampler_options {owner}", options)
    with user_errors(f"sampler {owner}", UsageError):
        made = SAMPLERS.create(sampler, [0, 1], 1, **given)
    if getattr(made, "epochs", 1) != 1:
        raise UsageError(
            f"sampler {sampler!r} {owner} changes from epoch to epoch, but a head is trained in a "
            "single epoch; choose another sampler, or epochs: 1 and steps_per_epoch"
        )
