"""Samplers: how often each class is drawn in an epoch, reproducible from (seed, epoch) alone."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from timm_lt.longtail import Labels, check_labels
from timm_lt.registry import Registry, UsageError, check_choice, check_integer, check_number

Schedule = Literal["t/T", "t/(T-1)"]


class ClassSampler(Sampler[int]):
    """Draws images so that class ``j`` has probability ``p_j``: the base of all samplers.

    A sampler is defined by :meth:`class_probabilities`; a new one need not define more. The rest
    follows from it and holds for each epoch, where ``n`` is ``num_samples``:

    - class ``j`` is drawn ``floor(n * p_j)`` or ``ceil(n * p_j)`` times, ``n * p_j`` on average
      (systematic rounding with a random offset, so that epochs do not wander as with independent
      draws);
    - within a class every image is drawn once before any is drawn again;
    - the order is a uniformly random arrangement;
    - the stream is a function of (seed, epoch) and nothing else, least of all the global random
      state: every process draws the same one, and accelerate can give each its share.

    Args:
        labels: Integer labels, one per image of the data set that the indices are for.
        num_samples: Length of an epoch, at least 1; None takes the number of labels.
        seed: A non-negative integer.
        num_classes: Number of classes; None takes the largest label plus one.

    Shape:
        labels (N,); an epoch is ``num_samples`` integers in [0, N).

    Raises:
        UsageError: If a label or value is out of range.
    """

    def __init__(
        self,
        labels: Labels,
        num_samples: int | None = None,
        seed: int = 0,
        num_classes: int | None = None,
    ) -> None:
        values = check_labels(labels, num_classes)
        if num_samples is None:
            num_samples = len(values)
        self.num_samples = check_integer("num_samples", num_samples, minimum=1)
        self.seed = check_integer("seed", seed, minimum=0)
        self.epoch = 0
        self.class_counts = torch.bincount(values, minlength=num_classes or 0)
        self._images_by_class = torch.argsort(values, stable=True)

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns the probability that a draw is of each class.

        Args:
            epoch: 0-based epoch; None means the one that :meth:`set_epoch` set.

        Shape:
            (C,) float64 that sums to 1. A class without images has probability 0.
        """
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Chooses the 0-based epoch that the next iteration draws."""
        self.epoch = check_integer("epoch", epoch, minimum=0)

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        return iter(self.epoch_indices().tolist())

    def epoch_indices(self, epoch: int | None = None) -> Tensor:
        """Returns the indices of a whole epoch in the order in which they are drawn.

        Args:
            epoch: 0-based epoch; None means the one that :meth:`set_epoch` set.

        Shape:
            (num_samples,) int64.
        """
        epoch = self.epoch if epoch is None else check_integer("epoch", epoch, minimum=0)
        generator = _epoch_generator(self.seed, epoch)
        draws = _round_systematically(self.class_probabilities(epoch), self.num_samples, generator)
        images = self._draw_images(draws, generator)
        classes = self._arrange(draws, generator)
        # Places where class 0 is drawn, in order, then class 1, ...: they take the images in order.
        places = torch.argsort(classes, stable=True)
        return torch.empty_like(images).scatter_(0, places, images)

    def _draw_images(self, draws: Tensor, generator: torch.Generator) -> Tensor:
        """Returns ``draws[j]`` images of each class, class after class, from shuffled cycles."""
        counts = self.class_counts
        cycle_class, repeat = _blocks(_ceil_divide(draws, counts.clamp(min=1)))
        size = counts[cycle_class]
        taken = (draws[cycle_class] - repeat * size).clamp(max=size)
        cycle, place = _blocks(size)
        # Sorted by cycle and, within, by a random permutation: each cycle is shuffled uniformly.
        key = cycle * len(cycle) + torch.randperm(len(cycle), generator=generator)
        used = place < taken[cycle]
        order, cycle = torch.argsort(key)[used], cycle[used]
        # From a place among all cycles to one among the images sorted by class.
        shift = (counts.cumsum(0) - counts)[cycle_class] - (size.cumsum(0) - size)
        return self._images_by_class[order + shift[cycle]]

    def _arrange(self, draws: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the class of each draw of the epoch, class ``j`` exactly ``draws[j]`` times."""
        order = torch.randperm(self.num_samples, generator=generator)
        return torch.repeat_interleave(draws)[order]


def _blocks(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Lays blocks end to end; returns, for each place, its block and its number in the block.

    >>> _blocks(torch.tensor([2, 0, 3]))
    (tensor([0, 0, 2, 2, 2]), tensor([0, 1, 0, 1, 2]))
    """
    block = torch.repeat_interleave(sizes)
    return block, torch.arange(len(block)) - (sizes.cumsum(0) - sizes)[block]


def _ceil_divide(dividend: Tensor, divisor: Tensor | int) -> Tensor:
    # In integers: the quotient of two int64 tensors is only float32.
    return -(-dividend // divisor)


def _epoch_generator(seed: int, epoch: int) -> torch.Generator:
    # SeedSequence mixes well: (0, 1) and (1, 0), or neighbouring epochs, have unrelated streams.
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))


def _round_systematically(
    probabilities: Tensor, num_samples: int, generator: torch.Generator
) -> Tensor:
    """Rounds ``n * p_j`` to integers (C,) that sum to n, each up or down and right on average.

    Marks lie at distance 1, offset by one uniform number; class ``j`` owns a stretch of length
    ``n * p_j`` and gets the marks in it.
    """
    # In a fixed order, neighbouring classes would never round up together.
    order = torch.randperm(len(probabilities), generator=generator)
    ends = probabilities[order].cumsum(0)
    # Dividing by the last sum puts the last end on n exactly.
    ends = ends / ends[-1] * num_samples
    # In the middle of one of 2^18 steps: no closer to 0 or 1 than 2^-19, far more than the rounding
    # errors of `ends`, so that a whole n * p_j is never off by one.
    offset = (torch.randint(2**18, (1,), generator=generator).double() + 0.5) / 2**18
    marks = torch.floor(ends + offset).long()
    draws = torch.empty_like(marks)
    draws[order] = torch.diff(marks, prepend=torch.zeros(1, dtype=torch.long))
    return draws


def power_probabilities(class_counts: Tensor, q: float) -> Tensor:
    """Returns ``p_j = n_j^q / sum_k n_k^q`` over the classes that have images, 0 for the others.

    >>> power_probabilities(torch.tensor([9, 0, 1]), q=0.5)
    tensor([0.7500, 0.0000, 0.2500], dtype=torch.float64)
    """
    # 0^0 is 1: without the mask, q = 0 would draw from empty classes.
    weights = torch.where(class_counts > 0, class_counts.double() ** q, 0.0)
    return weights / weights.sum()


_SAMPLERS: Registry[Callable[..., ClassSampler]] = Registry("sampler")

S = TypeVar("S", bound=type[ClassSampler])


def register_sampler(name: str) -> Callable[[S], S]:
    """Returns a class decorator that registers a :class:`ClassSampler` under a name.

    Its constructor takes ``(labels, num_samples, seed, num_classes)`` and, keyword-only, its own
    options.
    """

    def add(cls: S) -> S:
        _SAMPLERS.register(name)(cls)
        return cls

    return add


def list_samplers() -> list[str]:
    """Returns the names that :func:`create_sampler` knows."""
    return list(_SAMPLERS)


def create_sampler(
    name: str,
    labels: Labels,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    **options: Any,
) -> ClassSampler:
    """Creates a sampler by name; see :class:`ClassSampler` for what all of them guarantee.

    >>> sampler = create_sampler("class_balanced", [0] * 90 + [1] * 10, num_samples=40)
    >>> torch.bincount(torch.tensor(list(sampler)) // 90)
    tensor([20, 20])

    Args:
        name: One of :func:`list_samplers`.
        labels: Integer labels (N,), one per image.
        num_samples: Length of an epoch, at least 1; None takes N.
        seed: A non-negative integer.
        num_classes: Number of classes; None takes the largest label plus one.
        **options: The sampler's own options.

    Raises:
        UsageError: If the name or an option is unknown, or a value is out of range.
    """
    return _SAMPLERS.create(name, labels, num_samples, seed, num_classes, **options)


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
    a class in a row. A batch of 512 then holds 128 classes x 4. Where a class's draws are no
    multiple of k, its last block is shorter.

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

    def _arrange(self, draws: Tensor, generator: torch.Generator) -> Tensor:
        if self.samples_per_class == 1:
            return super()._arrange(draws, generator)
        block_class, round_number = _blocks(_ceil_divide(draws, self.samples_per_class))
        size = draws[block_class] - round_number * self.samples_per_class
        order = torch.randperm(len(block_class), generator=generator)
        order = order[torch.argsort(round_number[order], stable=True)]
        return torch.repeat_interleave(
            block_class[order], size.clamp(max=self.samples_per_class)[order]
        )


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


@register_sampler("progressively_balanced")
class ProgressivelyBalancedSampler(ClassSampler):
    """Moves from instance-balanced to class-balanced: ``p_j(t) = (1 - a) n_j / N + a / C``.

    The paper's formula has ``a = t/T``, with t the current and T the total number of epochs. Its
    code has 0-based ``t/(T-1)``. Here t is 0-based in both:

    - ``"t/T"``: a goes from 0 to (T-1)/T. The first epoch is exactly instance-balanced, the last
      not quite class-balanced.
    - ``"t/(T-1)"``: a goes from 0 to 1. The first epoch is exactly instance-balanced, the last
      exactly class-balanced; a single epoch (T = 1) is instance-balanced.

    Args:
        labels, num_samples, seed, num_classes: As in :class:`ClassSampler`.
        epochs: T, at least 1.
        schedule: How a grows.

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
    ) -> None:
        super().__init__(labels, num_samples, seed, num_classes)
        check_choice("schedule", schedule, get_args(Schedule))
        self.epochs = check_integer("epochs", epochs, minimum=1)
        self.schedule = schedule

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns ``(1 - a) n_j / N + a / C``."""
        t = self.epoch if epoch is None else epoch
        if not 0 <= t < self.epochs:
            raise UsageError(
                f"epoch {t} is outside the schedule: epochs={self.epochs} covers 0 to "
                f"{self.epochs - 1}"
            )
        last = self.epochs if self.schedule == "t/T" else max(self.epochs - 1, 1)
        a = t / last
        instance_balanced = power_probabilities(self.class_counts, 1.0)
        class_balanced = power_probabilities(self.class_counts, 0.0)
        return (1 - a) * instance_balanced + a * class_balanced
