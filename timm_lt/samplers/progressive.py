"""Samplers whose class probabilities change during training."""

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from timm_lt.longtail import Labels
from timm_lt.registry import UsageError, check_choice, check_integer
from timm_lt.samplers.arithmetic import Integers, keyed, seed_word
from timm_lt.samplers.balanced import power_probabilities
from timm_lt.samplers.base import SHARES, ClassSampler, Plan, register_sampler

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
    about ``sqrt(C)`` draws of their place. A step is arranged uniformly at random; it costs time
    in proportion to C.

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

    def _mean_probabilities(self, t: int, steps: int) -> Tensor:
        """Returns the mean of the probabilities from step t on."""
        total = self.epochs * self.steps_per_epoch
        last = total if self.schedule == "t/T" else max(total - 1, 1)
        a = (t + (steps - 1) / 2) / last
        instance_balanced = power_probabilities(self.class_counts, 1.0)
        class_balanced = power_probabilities(self.class_counts, 0.0)
        return (1 - a) * instance_balanced + a * class_balanced

    def _num_chunks(self, draws: Integers) -> int:
        if self.steps_per_epoch == 1:
            return super()._num_chunks(draws)
        return self.steps_per_epoch * self._chunks_per_step()

    def _chunks_per_step(self) -> int:
        return -(-self.num_samples // (self.steps_per_epoch * self.chunk_size))

    def _drawn_before(self, plan: Plan, chunk: int) -> Integers:
        if self.steps_per_epoch == 1:
            return super()._drawn_before(plan, chunk)
        step, part = divmod(chunk, self._chunks_per_step())
        first = self._first_step(plan.epoch)
        expected = step * self._mean_probabilities(first, step)
        expected += part / self._chunks_per_step() * self._mean_probabilities(first + step, 1)
        total = self.steps_per_epoch * self.class_probabilities(plan.epoch)
        share = torch.where(total > 0, expected / total, 0.0).numpy()
        # Each class is rounded by an offset of its own, again in the middle of one of 2^18 steps.
        key = seed_word(plan.seed, plan.epoch, SHARES)
        offset = keyed(key, np.arange(len(share))) >> np.uint64(64 - 18)
        before: Integers = np.floor(plan.draws * share + (offset + 0.5) / 2**18).astype(np.int64)
        return before
