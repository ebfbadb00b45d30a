"""Samplers whose class probabilities change during training.

Deferred re-sampling: one sampler, then another.

The two streams of a bilateral-branch network, as one sampler of pairs.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_lt.samplers.balanced import InstanceBalancedSampler, power_probabilities
from timm_lt.samplers.base import SAMPLERS, ClassSampler, Plan, register_sampler, small_integers
from timm_lt.samplers.streams import Integers, Purpose, keyed, seed_word, sort_order
from timm_lt.utils.checks import UsageError, check_choice, check_integer, check_mapping
from timm_lt.utils.longtail import Labels, first_epoch

Schedule = Literal["t/T", "t/(T-1)"]


@register_sampler("progressively_balanced")
class ProgressivelyBalancedSampler(ClassSampler):
    """Moves from instance-balanced to class-balanced: ``p_j(t) = (1 - a) n_j / N + a / C``.

    The paper's formula has ``a = t/T``, with t the current and T the total number of epochs. Its
    code has 0-based ``t/(T-1)``. Here t is 0-based in both:

    - ``"t/T"``: a goes from 0 to (T-1)/T. The first epoch is exactly instance-balanced, the last
      not quite class-balanced.
    - ``"t/(T-1)"``: a goes from 0 to 1. The first epoch is exactly instance-balanced, the last
      exactly class-balanced; a single epoch (T = 1) is instance-balanced.

    With ``steps_per_epoch`` = S > 1, t and T count steps, of which an epoch has S:
    :meth:`class_probabilities` is their mean. A class's draws in any number of steps are within one
    of their expectation. Steps are therefore only about ``num_samples / S`` long: they begin within
    about ``sqrt(C)`` draws of their place. A step is arranged uniformly at random; an epoch costs
    time in proportion to S C beside its draws.

    Args:
        labels, num_samples, seed, num_classes: As in :class:`ClassSampler`.
        epochs: Number of epochs, at least 1.
        schedule: How a grows.
        steps_per_epoch: S, at least 1.

    Raises:
        UsageError: If a value is out of range; when drawing, if the epoch is not below T.

    References:
        Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR
        2020, https://arxiv.org/abs/1910.09217 (equation 2).
    """

    def __init__(
        self,
        labels: Labels,
        num_samples: int | None = None,
        seed: int = 0,
        num_classes: int | None = None,
        *,
        epochs: int,
        schedule: Schedule = "t/T",
        steps_per_epoch: int = 1,
    ) -> None:
        super().__init__(labels, num_samples, seed, num_classes)
        check_choice("schedule", schedule, get_args(Schedule))
        self.epochs = check_integer("epochs", epochs, minimum=1)
        self.schedule = schedule
        self.steps_per_epoch = check_integer("steps_per_epoch", steps_per_epoch, minimum=1)

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns ``(1 - a) n_j / N + a / C``, with several steps in the epoch their mean."""
        return self._mean_probabilities(self._first_step(epoch), self.steps_per_epoch)

    def step_probabilities(self, step: int, epoch: int | None = None) -> Tensor:
        """Returns ``(1 - a) n_j / N + a / C`` (C,) in a 0-based step of an epoch."""
        check_integer("step", step, minimum=0, maximum=self.steps_per_epoch - 1)
        return self._mean_probabilities(self._first_step(epoch) + step, 1)

    def _first_step(self, epoch: int | None) -> int:
        t = self.epoch if epoch is None else epoch
        if not 0 <= t < self.epochs:
            raise UsageError(
                f"epoch {t} is outside the schedule: epochs={self.epochs} covers 0 to "
                f"{self.epochs - 1}"
            )
        return t * self.steps_per_epoch

    def _last_step(self) -> int:
        """Returns the step at which a would be 1."""
        total = self.epochs * self.steps_per_epoch
        return total if self.schedule == "t/T" else max(total - 1, 1)

    def _mean_probabilities(self, t: int, steps: int) -> Tensor:
        """Returns the mean of the probabilities from step t on."""
        a = (t + (steps - 1) / 2) / self._last_step()
        instance_balanced = power_probabilities(self.class_counts, 1.0)
        class_balanced = power_probabilities(self.class_counts, 0.0)
        return (1 - a) * instance_balanced + a * class_balanced

    # With several steps in an epoch, what is arranged together is a tick: a step or, if that is
    # more than a chunk, an equal part of one. A chunk is as many ticks as fit.

    def _ticks_per_step(self) -> int:
        return -(-self.num_samples // (self.steps_per_epoch * self.chunk_size))

    def _ticks(self, first_chunk: int, chunks: int) -> Integers:
        """Returns the ticks at which some chunks begin and end, and those between."""
        total = self.steps_per_epoch * self._ticks_per_step()
        draws = self.chunk_size * total // self.num_samples
        numbers = 4 * self.chunk_size // len(self.class_counts)
        per_chunk = max(min(draws, numbers), 1)
        first = min(first_chunk * per_chunk, total)
        return np.arange(first, min((first_chunk + chunks) * per_chunk, total) + 1)

    def _num_chunks(self, draws: Integers) -> int:
        if self.steps_per_epoch == 1:
            return super()._num_chunks(draws)
        total = self.steps_per_epoch * self._ticks_per_step()
        return -(-total // int(self._ticks(0, 1)[-1]))

    def _drawn_before(self, plan: Plan, chunk: int) -> Integers:
        if self.steps_per_epoch == 1:
            return super()._drawn_before(plan, chunk)
        drawn: Integers = self._drawn_before_ticks(plan, self._ticks(chunk, 0))[0]
        return drawn

    def _drawn_before_ticks(self, plan: Plan, ticks: Integers) -> Integers:
        """Returns how often each class is drawn in the epoch before some ticks (ticks, C)."""
        share = self._expected_before(plan, ticks)
        total = self._expected_before(plan, self._ticks(0, self._num_chunks(plan.draws))[-1:])
        share /= np.where(total > 0, total, 1)
        # Each class is rounded by an offset of its own, again in the middle of one of 2^18 steps.
        key = seed_word(plan.seed, Purpose.SHARES, plan.epoch)
        offset = keyed(key, np.arange(share.shape[1])) >> np.uint64(64 - 18)
        share *= plan.draws
        share += (offset + 0.5) / 2**18
        return share.astype(np.int64)

    def _expected_before(self, plan: Plan, ticks: Integers) -> NDArray[np.float64]:
        """Returns the sum of the probabilities of the steps before some ticks (ticks, C)."""
        steps = ticks / self._ticks_per_step()
        whole = np.floor(steps)
        # The sum of a, which is constant within a step.
        a = self._first_step(plan.epoch) * steps + whole * (whole - 1) / 2 + (steps - whole) * whole
        a /= self._last_step()
        instance_balanced = power_probabilities(self.class_counts, 1.0).numpy()
        class_balanced = power_probabilities(self.class_counts, 0.0).numpy()
        expected: NDArray[np.float64] = np.outer(steps - a, instance_balanced)
        expected += np.outer(a, class_balanced)
        return expected

    def _arrange(
        self, plan: Plan, chunk: int, amounts: Integers, generator: torch.Generator
    ) -> NDArray[Any]:
        if self.steps_per_epoch == 1:
            return super()._arrange(plan, chunk, amounts, generator)
        of_tick = np.diff(self._drawn_before_ticks(plan, self._ticks(chunk, 1)), axis=0)
        tick = np.repeat(small_integers(len(of_tick)), of_tick.sum(axis=1))
        order = torch.randperm(len(tick), generator=generator).numpy()
        order = order[sort_order(tick[order])]
        classes = np.tile(small_integers(len(amounts)), len(of_tick))
        arranged: NDArray[Any] = np.repeat(classes, of_tick.ravel())[order]
        return arranged


@register_sampler("deferred")
class DeferredSampler(ClassSampler):
    """Deferred re-sampling (DRS): draws as one sampler does, and from an epoch on as another.

    Cycles of images go on across the change. An epoch has ``num_samples`` draws before and after
    it, also where a sampler by itself would have others.

    Args:
        labels, num_samples, seed, num_classes: As in :class:`ClassSampler`.
        first: Name of the sampler at first.
        second: Name of the sampler from ``start`` on.
        first_options: Options of the first.
        second_options: Options of the second.
        start: The 0-based epoch of the change, or a fraction of the epochs in (0, 1), rounded
            down: 160 in the paper, 0.8 of its 200.
        epochs: Number of epochs, at least 1, also for a part that has a schedule; a recipe sets
            it. None is unknown, and then start is an epoch.

    Raises:
        UsageError: For options that are wrong here or for a part, or a start that is not within
            the epochs.

    References:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS
        2019, https://arxiv.org/abs/1906.07413 (section 4, DRS).
    """

    def __init__(
        self,
        labels: Labels,
        num_samples: int | None = None,
        seed: int = 0,
        num_classes: int | None = None,
        *,
        first: str = "instance_balanced",
        second: str = "class_balanced",
        first_options: Mapping[str, Any] | None = None,
        second_options: Mapping[str, Any] | None = None,
        start: float = 0.8,
        epochs: int | None = None,
    ) -> None:
        super().__init__(labels, num_samples, seed, num_classes)
        self.epochs = None if epochs is None else check_integer("epochs", epochs, minimum=1)
        self.first_epoch = first_epoch(start, self.epochs)
        self.parts = tuple(
            self._create(
                f"{place}_options", name, labels, check_mapping(f"{place}_options", options)
            )
            for place, name, options in (
                ("first", first, first_options),
                ("second", second, second_options),
            )
        )

    def _create(
        self, owner: str, name: str, labels: Labels, options: dict[str, Any]
    ) -> ClassSampler:
        parameters = inspect.signature(SAMPLERS[name]).parameters
        scheduled = "epochs" in parameters and self.epochs is not None
        if scheduled and options.setdefault("epochs", self.epochs) != self.epochs:
            raise UsageError(
                f"{owner}: epochs is {options['epochs']}, but there are {self.epochs}: leave it out"
            )
        size = (labels, self.num_samples, self.seed, len(self.class_counts))
        part = SAMPLERS.create(name, *size, **options)
        if part.unit > 1:
            raise UsageError(f"sampler {name!r} draws pairs and is no part of a deferred one")
        # One copy of the images is enough.
        part._images = self._images
        return part

    def _part(self, epoch: int | None) -> ClassSampler:
        return self.parts[(self.epoch if epoch is None else epoch) >= self.first_epoch]

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns those of the first sampler before the start, of the second from it on."""
        epoch = self.epoch if epoch is None else epoch
        return self._part(epoch).class_probabilities(epoch)

    @property
    def group(self) -> int:
        """Consecutive draws that stay together on a rank, as the sampler of the epoch has them."""
        return self._part(None).group

    def _round(self, epoch: int) -> Integers:
        part = self._part(epoch)
        part.seed = self.seed
        return part._round(epoch)

    def _chunks(self, plan: Plan, start: int) -> Iterator[tuple[int, NDArray[Any]]]:
        # A part may arrange its epochs in a way of its own.
        return self._part(plan.epoch)._chunks(plan, start)


Rebalancing = Literal["reversed", "class_balanced", "instance_balanced"]


@register_sampler("bilateral")
class BilateralSampler(ClassSampler):
    """Draws pairs ``u_0, r_0, u_1, r_1, ...`` of a uniform and a re-balancing stream.

    The uniform stream is ``instance_balanced`` of the same seed; the other has a seed of its own.
    Each keeps by itself what :class:`ClassSampler` promises: ``u`` shows every image once in an
    epoch of 2 N draws. (The paper draws the images of ``r`` with replacement.) A pair stays
    together: on a rank, and in batches that hold an even number of images for each process.

    It is for a bilateral network (:func:`timm_lt.create_bilateral`), which sends even rows of a
    batch through one branch and odd rows through the other, and for the loss ``bilateral``.

    Args:
        labels, seed, num_classes: As in :class:`ClassSampler`.
        num_samples: Images of an epoch, of both streams together: even, at least 2; None takes 2 N.
        rebalancing: How ``r`` is drawn; the paper's table 3 compares the three.

    Raises:
        UsageError: If ``num_samples`` is odd, or as :class:`ClassSampler`.

    References:
        Zhou et al., BBN: Bilateral-Branch Network with Cumulative Learning for Long-Tailed Visual
        Recognition, CVPR 2020, https://arxiv.org/abs/1912.02413 (section 4.2).

    >>> labels = [0] * 8 + [1] * 2
    >>> stream = list(BilateralSampler(labels))
    >>> sorted(stream[0::2])
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    >>> sum(labels[image] for image in stream[1::2])
    8
    """

    unit: ClassVar[int] = 2

    def __init__(
        self,
        labels: Labels,
        num_samples: int | None = None,
        seed: int = 0,
        num_classes: int | None = None,
        *,
        rebalancing: Rebalancing = "reversed",
    ) -> None:
        check_choice("rebalancing", rebalancing, get_args(Rebalancing))
        pairs = None
        if num_samples is not None:
            if check_integer("num_samples", num_samples, minimum=1) % 2:
                raise UsageError(
                    f"num_samples of sampler 'bilateral' counts the images of pairs and must be "
                    f"even, got {num_samples}"
                )
            pairs = num_samples // 2
        self.conventional = InstanceBalancedSampler(labels, pairs, seed, num_classes)
        self.rebalancing = SAMPLERS.create(rebalancing, labels, pairs, 0, num_classes)
        super().__init__(labels, 2 * self.conventional.num_samples, seed, num_classes)
        # Nothing is drawn from a third copy of the labels.
        self._images = self.conventional._images

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns the mean of the probabilities of both streams."""
        epoch = self.epoch if epoch is None else epoch
        uniform = self.conventional.class_probabilities(epoch)
        return (uniform + self.rebalancing.class_probabilities(epoch)) / 2

    def _plan(self, epoch: int) -> Plan:
        """Returns the plan of the uniform stream; the other's follows from its seed and epoch."""
        self.conventional.seed = self.seed
        return self.conventional._plan(epoch)

    def _chunks(self, plan: Plan, start: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yields what both streams have a chunk of, from a pair on."""
        self.rebalancing.seed = int(seed_word(plan.seed, Purpose.REBALANCING)[0])
        at = start // 2
        uniform = self.conventional._chunks(plan, at)
        other = self.rebalancing._chunks(self.rebalancing._plan(plan.epoch), at)
        (begin_u, u), (begin_r, r) = next(uniform), next(other)
        while True:
            # Both are cut into chunks, though not at the same places.
            end = min(begin_u + len(u), begin_r + len(r))
            pairs = (u[at - begin_u : end - begin_u], r[at - begin_r : end - begin_r])
            yield 2 * at, np.stack(pairs, axis=1).ravel()
            at = end
            if 2 * at == self.num_samples:
                return
            if at == begin_u + len(u):
                begin_u, u = next(uniform)
            if at == begin_r + len(r):
                begin_r, r = next(other)
