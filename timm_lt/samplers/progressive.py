"""Samplers whose class probabilities change during training."""

from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_lt.samplers.arithmetic import Integers, Purpose, keyed, seed_word, sort_order
from timm_lt.samplers.balanced import power_probabilities
from timm_lt.samplers.base import ClassSampler, Plan, small_integers
from timm_lt.samplers.factory import register_sampler
from timm_lt.utils.checks import UsageError, check_choice, check_integer
from timm_lt.utils.longtail import Labels

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
