"""Samplers between instance-balanced and class-balanced."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_lt.samplers.arithmetic import (
    Integers,
    Purpose,
    blocks,
    round_systematically,
    sort_order,
    torch_generator,
)
from timm_lt.samplers.base import ClassSampler, Plan, small_integers
from timm_lt.samplers.factory import register_sampler
from timm_lt.utils.checks import check_integer, check_number
from timm_lt.utils.longtail import ClassCounts, Labels, check_class_counts


def power_probabilities(class_counts: ClassCounts, q: float) -> Tensor:
    """Returns ``p_j = n_j^q / sum_k n_k^q`` over the classes that have images, 0 for the others.

    >>> power_probabilities(torch.tensor([9, 0, 1]), q=0.5)
    tensor([0.7500, 0.0000, 0.2500], dtype=torch.float64)
    """
    # 0^0 is 1: without the mask, q = 0 would draw from empty classes.
    counts = check_class_counts(class_counts)
    weights = torch.where(counts > 0, counts.double() ** q, 0.0)
    return weights / weights.sum()


@register_sampler("instance_balanced")
class InstanceBalancedSampler(ClassSampler):
    """Draws every image equally often: ``p_j = n_j / N``, ordinary shuffling.

    With ``num_samples`` = N an epoch is a random permutation of the data set.
    """

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns ``n_j / N``."""
        return power_probabilities(self.class_counts, 1.0)


@register_sampler("class_balanced")
class ClassBalancedSampler(ClassSampler):
    """Draws every class equally often: ``p_j = 1 / C`` over the C classes that have images.

    With ``samples_per_class`` = k > 1 the order is not uniformly random: an epoch is a sequence of
    rounds through the classes, in an order shuffled for each round, and a round draws k images of
    a class in a row. A batch of 512 then holds 128 classes x 4. Classes are drawn in whole blocks
    of k: numbers differ by at most k. Where ``num_samples`` is not a multiple of k, the last block
    of the epoch is shorter. A block stays together on a rank, and with accelerate in batches whose
    size on each process is a multiple of k.

    Args:
        labels, num_samples, seed, num_classes: As in :class:`ClassSampler`.
        samples_per_class: k, the consecutive draws of one class, at least 1.

    References:
        Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR
        2020, https://arxiv.org/abs/1910.09217 (their code has k = 4).
    """

    def __init__(
        self,
        labels: Labels,
        num_samples: int | None = None,
        seed: int = 0,
        num_classes: int | None = None,
        *,
        samples_per_class: int = 1,
    ) -> None:
        super().__init__(labels, num_samples, seed, num_classes)
        self.samples_per_class = check_integer("samples_per_class", samples_per_class, minimum=1)

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns ``1 / C``."""
        return power_probabilities(self.class_counts, 0.0)

    @property
    def group(self) -> int:
        """Consecutive draws of one class, k."""
        return self.samples_per_class

    def _round(self, epoch: int) -> Integers:
        k = self.samples_per_class
        if k == 1:
            return super()._round(epoch)
        generator = torch_generator(self.seed, Purpose.ROUNDING, epoch)
        num_blocks = -(-self.num_samples // k)
        drawn = k * round_systematically(self.class_probabilities(epoch), num_blocks, generator)
        # The last block of the epoch is that of a class in the last round.
        last = (drawn == drawn.max()).nonzero().flatten()
        shorter = last[torch.randint(len(last), (1,), generator=generator)]
        drawn[shorter] -= k * num_blocks - self.num_samples
        draws: Integers = drawn.numpy()
        return draws

    def _num_chunks(self, draws: Integers) -> int:
        if self.samples_per_class == 1:
            return super()._num_chunks(draws)
        return -(-int(draws.max()) // self._draws_per_chunk())

    def _drawn_before(self, plan: Plan, chunk: int) -> Integers:
        if self.samples_per_class == 1:
            return super()._drawn_before(plan, chunk)
        return np.minimum(plan.draws, chunk * self._draws_per_chunk())

    def _draws_per_chunk(self) -> int:
        """Returns how often a class is drawn in a chunk: in whole rounds, at least one."""
        k = self.samples_per_class
        return k * max(self.chunk_size // (k * len(self.class_counts)), 1)

    def _arrange(
        self, plan: Plan, chunk: int, amounts: Integers, generator: torch.Generator
    ) -> NDArray[Any]:
        if self.samples_per_class == 1:
            return super()._arrange(plan, chunk, amounts, generator)
        block_class, round_number = blocks(-(-amounts // self.samples_per_class))
        size = amounts[block_class] - round_number * self.samples_per_class
        order = torch.randperm(len(block_class), generator=generator).numpy()
        size = np.minimum(size, self.samples_per_class)
        # The short block, if there is one, comes last.
        order = order[sort_order((round_number + (size < self.samples_per_class))[order])]
        classes = small_integers(len(amounts))[block_class[order]]
        return np.repeat(classes, size[order])


@register_sampler("square_root")
class SquareRootSampler(ClassSampler):
    """Draws classes by the square root of their size: ``p_j = sqrt(n_j) / sum_k sqrt(n_k)``.

    References:
        Mahajan et al., Exploring the Limits of Weakly Supervised Pretraining, ECCV 2018,
        https://arxiv.org/abs/1805.00932
    """

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns ``sqrt(n_j) / sum_k sqrt(n_k)``."""
        return power_probabilities(self.class_counts, 0.5)


@register_sampler("power")
class PowerSampler(ClassSampler):
    """Draws classes by a power of their size: ``p_j = n_j^q / sum_k n_k^q``.

    ``q`` = 1 is instance-balanced, 1/2 square-root and 0 class-balanced sampling.

    Args:
        labels, num_samples, seed, num_classes: As in :class:`ClassSampler`.
        q: The exponent, in [0, 1].

    References:
        Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR
        2020, https://arxiv.org/abs/1910.09217 (equation 1).
    """

    def __init__(
        self,
        labels: Labels,
        num_samples: int | None = None,
        seed: int = 0,
        num_classes: int | None = None,
        *,
        q: float,
    ) -> None:
        super().__init__(labels, num_samples, seed, num_classes)
        self.q = check_number("q", q, "[0, 1]")

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns ``n_j^q / sum_k n_k^q``."""
        return power_probabilities(self.class_counts, self.q)
