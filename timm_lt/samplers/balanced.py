"""Samplers between instance-balanced and class-balanced.

Samplers that draw rare classes more often than frequent ones, or by effective numbers.

Samplers that bring every class to a target number of images per epoch.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_lt.samplers.base import ClassSampler, Plan, register_sampler, small_integers
from timm_lt.samplers.streams import (
    Integers,
    Purpose,
    blocks,
    round_systematically,
    sort_order,
    torch_generator,
)
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


@register_sampler("reversed")
class ReversedSampler(ClassSampler):
    """Draws rare classes most often: ``p_j = w_j / sum_k w_k`` with ``w_j = n_max / n_j``.

    The sampler of the re-balancing branch of BBN. Unlike there, the images of a class are drawn in
    cycles and not independently.

    References:
        Zhou et al., BBN: Bilateral-Branch Network with Cumulative Learning for Long-Tailed Visual
        Recognition, CVPR 2020, https://arxiv.org/abs/1912.02413 (section 4.2).
    """

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns ``(1 / n_j) / sum_k (1 / n_k)``; n_max cancels."""
        return power_probabilities(self.class_counts, -1.0)


@register_sampler("effective_number")
class EffectiveNumberSampler(ClassSampler):
    """Draws every image by the inverse effective number of its class: ``p_j`` is as ``n_j / E_j``.

    ``E_j = (1 - beta^n_j) / (1 - beta)``, so ``p_j = (n_j / E_j) / sum_k (n_k / E_k)``: the paper
    weighs the loss of each image by ``1 / E_j``, this draws it that often. ``beta`` = 0 is
    instance-balanced (E_j = 1), ``beta`` towards 1 class-balanced (E_j towards n_j).

    Args:
        labels, num_samples, seed, num_classes: As in :class:`ClassSampler`.
        beta: In [0, 1); the paper tries 0.9, 0.99, 0.999 and 0.9999.

    References:
        Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019,
        https://arxiv.org/abs/1901.05555 (equations 2 and 6).
    """

    def __init__(
        self,
        labels: Labels,
        num_samples: int | None = None,
        seed: int = 0,
        num_classes: int | None = None,
        *,
        beta: float,
    ) -> None:
        super().__init__(labels, num_samples, seed, num_classes)
        self.beta = check_number("beta", beta, "[0, 1)")

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns ``n_j / E_j``, normalised."""
        n = self.class_counts.double()
        beta = torch.tensor(self.beta, dtype=torch.float64)
        # 1 - beta^n without its rounding error for beta near 1; 1 - beta cancels.
        inverse = -1 / torch.expm1(n.clamp(min=1) * torch.log(beta))
        weights = n * inverse
        return weights / weights.sum()


class _TargetSampler(ClassSampler):
    """Draws ``m_j`` images of each class in an epoch, as the target says."""

    def __init__(
        self,
        labels: Labels,
        num_samples: int | None = None,
        seed: int = 0,
        num_classes: int | None = None,
        *,
        target: int | None = None,
    ) -> None:
        super().__init__(labels, num_samples, seed, num_classes)
        self.target = None if target is None else check_integer("target", target, minimum=1)
        if num_samples is None:
            self.num_samples = int(self.images_per_class().sum())

    def images_per_class(self) -> Tensor:
        """Returns ``m_j`` (C,), 0 for a class without images."""
        raise NotImplementedError

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns ``m_j / sum_k m_k``."""
        images = self.images_per_class().double()
        return images / images.sum()


@register_sampler("under_sampled")
class UnderSampledSampler(_TargetSampler):
    """Draws at most ``target`` images of each class in an epoch: ``p_j`` is as min(n_j, target).

    The images that an epoch leaves out come in the next ones: none is lost for good, unlike where
    a data set is reduced once and for all, as for random under-sampling in the reference.

    Args:
        labels, seed, num_classes: As in :class:`ClassSampler`.
        num_samples: None takes ``sum_j min(n_j, target)``; another length keeps the proportions.
        target: Images per class, at least 1; None takes the smallest class that has any.

    References:
        He and Garcia, Learning from Imbalanced Data, TKDE 2009,
        https://doi.org/10.1109/TKDE.2008.239 (section 3.1).
    """

    def images_per_class(self) -> Tensor:
        """Returns ``min(n_j, target)``."""
        counts = self.class_counts
        return counts.clamp(max=self.target or int(counts[counts > 0].min()))


@register_sampler("over_sampled")
class OverSampledSampler(_TargetSampler):
    """Draws at least ``target`` images of each class in an epoch: ``p_j`` is as max(n_j, target).

    The images of a small class repeat equally often, give or take one.

    Args:
        labels, seed, num_classes: As in :class:`ClassSampler`.
        num_samples: None takes ``sum_j max(n_j, target)``; another length keeps the proportions.
        target: Images per class, at least 1; None takes the largest class.

    References:
        He and Garcia, Learning from Imbalanced Data, TKDE 2009,
        https://doi.org/10.1109/TKDE.2008.239 (section 3.1).
    """

    def images_per_class(self) -> Tensor:
        """Returns ``max(n_j, target)`` for a class with images."""
        counts = self.class_counts
        target = self.target or int(counts.max())
        return counts.clamp(min=target).where(counts > 0, 0)
