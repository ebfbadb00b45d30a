"""What every sampler is: the registry, the factory and the stream of an epoch."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from timm_lt.longtail import Labels, check_labels
from timm_lt.registry import Registry, check_integer


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
        cycle_class, repeat = blocks(ceil_divide(draws, counts.clamp(min=1)))
        size = counts[cycle_class]
        taken = (draws[cycle_class] - repeat * size).clamp(max=size)
        cycle, place = blocks(size)
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


def blocks(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Lays blocks end to end; returns, for each place, its block and its number in the block.

    >>> blocks(torch.tensor([2, 0, 3]))
    (tensor([0, 0, 2, 2, 2]), tensor([0, 1, 0, 1, 2]))
    """
    block = torch.repeat_interleave(sizes)
    return block, torch.arange(len(block)) - (sizes.cumsum(0) - sizes)[block]


def ceil_divide(dividend: Tensor, divisor: Tensor | int) -> Tensor:
    """Divides integers (N,) and rounds up, exactly: a quotient of tensors is only float32."""
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


SAMPLERS: Registry[Callable[..., ClassSampler]] = Registry("sampler")


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
    return SAMPLERS.create(name, labels, num_samples, seed, num_classes, **options)
