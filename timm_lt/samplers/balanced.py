"""Samplers with fixed class probabilities, from instance-balanced to reversed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from timm_lt.samplers import streams
from timm_lt.samplers.base import ClassSampler, Plan, register_sampler
from timm_lt.samplers.streams import Array, Integers, Purpose
from timm_lt.utils.longtail import ClassCounts, check_class_counts


def power_probabilities(class_counts: ClassCounts, q: float) -> Tensor:
    """Returns ``p_j = n_j^q / sum_k n_k^q`` over the classes that have images, 0 for the others.

    >>> power_probabilities(torch.tensor([9, 0, 1]), q=0.5)
    tensor([0.7500, 0.0000, 0.2500], dtype=torch.float64)
    """
    # 0^0 is 1: without the mask, q = 0 would draw from empty classes.
    counts = check_class_counts(class_counts)
    weights = torch.where(counts > 0, counts.double() ** q, 0.0)
    return weights / weights.sum()


class _PowerLawSampler(ClassSampler):
    """Draws classes by a power of their size: ``p_j = n_j^q / sum_k n_k^q``."""

    q: float

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        return power_probabilities(self.class_counts, self.q)


@register_sampler("instance_balanced")
class InstanceBalancedSampler(_PowerLawSampler):
    """Draws every image equally often: ``p_j = n_j / N``, ordinary shuffling.

    With ``num_samples`` = N an epoch is a random permutation of the data set.
    """

    q = 1.0


@register_sampler("class_balanced")
@dataclass(eq=False, kw_only=True)
class ClassBalancedSampler(_PowerLawSampler):
    """Draws every class equally often: ``p_j = 1 / C`` over the C classes that have images.

    With ``samples_per_class`` = k > 1 an epoch consists of rounds through the classes, shuffled for
    each round, with a block of k images of each class: a batch of 512 has 128 classes x 4. The last
    block is shorter if k does not divide ``num_samples``. A block stays on one rank; with
    accelerate, if k divides the batch size of a process.

    Args:
        samples_per_class: k, the consecutive draws of one class, at least 1.

    References:
        Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR
        2020, https://arxiv.org/abs/1910.09217 (their code has k = 4).
    """

    q = 0.0

    samples_per_class: Annotated[int, 1] = 1

    @property
    def group(self) -> int:
        """Number of consecutive draws of one class, k."""
        return self.samples_per_class

    def _round(self, epoch: int) -> Integers:
        k = self.samples_per_class
        generator = streams.torch_generator(self.seed, Purpose.ROUNDING, epoch)
        num_blocks = -(-self.num_samples // k)
        probabilities = self.class_probabilities(epoch)
        draws = k * streams.round_systematically(probabilities, num_blocks, generator)
        # The short block belongs to a class of the last round.
        last = np.flatnonzero(draws == draws.max())
        shorter = last[int(torch.randint(len(last), (1,), generator=generator))]
        draws[shorter] -= k * num_blocks - self.num_samples
        return draws

    def _division(self, plan: Plan) -> tuple[int, Callable[[int], Integers]]:
        k = self.samples_per_class
        if k == 1:
            return super()._division(plan)
        # A chunk consists of whole rounds, at least one.
        per_chunk = k * max(self.chunk_size // (k * len(plan.draws)), 1)
        num_chunks = -(-int(plan.draws.max()) // per_chunk)
        return num_chunks, lambda chunk: np.minimum(plan.draws, chunk * per_chunk)

    def _arrange(self, plan: Plan, chunk: int, amounts: Integers, rng: torch.Generator) -> Array:
        k = self.samples_per_class
        if k == 1:
            return super()._arrange(plan, chunk, amounts, rng)
        block_class, round_number = streams.numbered(-(-amounts // k))
        size = np.minimum(amounts[block_class] - round_number * k, k)
        order = torch.randperm(len(block_class), generator=rng).numpy()
        # Sorted by round; a short block comes last.
        order = order[streams.sort_order((round_number + (size < k))[order])]
        classes = streams.small_integers(len(amounts))[block_class[order]]
        return np.repeat(classes, size[order])


@register_sampler("square_root")
class SquareRootSampler(_PowerLawSampler):
    """Draws classes by the square root of their size: ``p_j = sqrt(n_j) / sum_k sqrt(n_k)``.

    References:
        Mahajan et al., Exploring the Limits of Weakly Supervised Pretraining, ECCV 2018,
        https://arxiv.org/abs/1805.00932
    """

    q = 0.5


@register_sampler("power")
@dataclass(eq=False, kw_only=True)
class PowerSampler(_PowerLawSampler):
    """Draws classes by a power of their size: ``p_j = n_j^q / sum_k n_k^q``.

    ``q`` = 1 is instance-balanced, 1/2 square-root and 0 class-balanced sampling.

    Args:
        q: The exponent, in [0, 1].

    References:
        Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR
        2020, https://arxiv.org/abs/1910.09217 (equation 1).
    """

    q: Annotated[float, "[0, 1]"]


@register_sampler("reversed")
class ReversedSampler(_PowerLawSampler):
    """Draws rare classes most often: ``p_j = w_j / sum_k w_k`` with ``w_j = n_max / n_j``.

    The sampler of BBN's re-balancing branch, whose paper draws images with replacement.

    References:
        Zhou et al., BBN: Bilateral-Branch Network with Cumulative Learning for Long-Tailed Visual
        Recognition, CVPR 2020, https://arxiv.org/abs/1912.02413 (section 4.2).
    """

    q = -1.0


@register_sampler("effective_number")
@dataclass(eq=False, kw_only=True)
class EffectiveNumberSampler(ClassSampler):
    """Draws images by the inverse effective number of their class: ``p_j`` prop. to ``n_j / E_j``.

    ``E_j = (1 - beta^n_j) / (1 - beta)``. The paper weights the loss of each image by ``1 / E_j``.
    ``beta`` = 0 is instance-balanced, ``beta`` towards 1 class-balanced.

    Args:
        beta: In [0, 1); the paper tries 0.9, 0.99, 0.999 and 0.9999.

    References:
        Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019,
        https://arxiv.org/abs/1901.05555 (equations 2 and 6).
    """

    beta: Annotated[float, "[0, 1)"]

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns ``n_j / E_j``, normalised."""
        n = self.class_counts.double()
        beta = torch.tensor(self.beta, dtype=torch.float64)
        # 1 - beta^n without its rounding error for beta near 1; the factor 1 - beta cancels.
        weights = n * (-1 / torch.expm1(n.clamp(min=1) * torch.log(beta)))
        return weights / weights.sum()


@dataclass(eq=False, kw_only=True)
class _TargetSampler(ClassSampler):
    """Draws each class by its target number of images."""

    target: Annotated[int, 1] | None = None

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        images = self.images_per_class().double()
        return images / images.sum()


@register_sampler("under_sampled")
class UnderSampledSampler(_TargetSampler):
    """Draws at most ``target`` images per class and epoch: ``p_j`` prop. to min(n_j, target).

    Later epochs draw the remaining images, which the reference discards.

    Args:
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
    """Draws at least ``target`` images per class and epoch: ``p_j`` prop. to max(n_j, target).

    The images of a small class are repeated equally often, up to a difference of one.

    Args:
        num_samples: None takes ``sum_j max(n_j, target)``; another length keeps the proportions.
        target: Images per class, at least 1; None takes the largest class.

    References:
        He and Garcia, Learning from Imbalanced Data, TKDE 2009,
        https://doi.org/10.1109/TKDE.2008.239 (section 3.1).
    """

    def images_per_class(self) -> Tensor:
        """Returns ``max(n_j, target)`` for a class with images."""
        counts = self.class_counts
        return counts.clamp(min=self.target or int(counts.max())).where(counts > 0, 0)
