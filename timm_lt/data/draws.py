"""Numbered draws: which image, and which of all draws of the training it is."""

import itertools
import operator
from collections.abc import Iterator

from torch.utils.data import Sampler

from timm_lt.samplers import ClassSampler


class NumberedSampler(Sampler[int]):
    """Gives every draw of a sampler a number, so that its augmentation can depend on it.

    A class-balanced epoch draws a rare image many times: each of these draws is to be augmented
    differently, but the same on every process and after a restart. A draw is one integer, ``t N +
    i``: ``i`` is the image, of N, and ``t`` counts the draws from the first epoch on.

    Args:
        sampler: The order of the images.
        num_images: N.
        length: Draws per epoch; the rest of each epoch of the sampler is left out.

    >>> from timm_lt.samplers import create_sampler
    >>> sampler = NumberedSampler(create_sampler("instance_balanced", [0, 1, 2]), 3, 2)
    >>> sampler.set_epoch(5)
    >>> [draw // 3 for draw in sampler]
    [10, 11]
    """

    def __init__(self, sampler: ClassSampler, num_images: int, length: int) -> None:
        self.sampler = sampler
        self.num_images = num_images
        self.length = length

    @property
    def group(self) -> int:
        """Consecutive draws that stay together on a process."""
        return self.sampler.group

    def set_epoch(self, epoch: int) -> None:
        """Chooses the 0-based epoch that the next iteration draws."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        first = self.sampler.epoch * self.length * self.num_images
        numbers = itertools.count(first, self.num_images)
        images = itertools.islice(self.sampler, self.length)
        return map(operator.add, images, numbers)


class InOrder(Sampler[int]):
    """Shows every image once, in the order of the data set; each epoch is another view of them.

    View v of image i, of N, is draw ``v N + i``, whatever came before: its augmentation depends on
    nothing else.

    Args:
        num_images: N.

    >>> sampler = InOrder(3)
    >>> sampler.set_epoch(2)
    >>> list(sampler)
    [6, 7, 8]
    """

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self.view = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the 0-based view that the next iteration shows."""
        self.view = epoch

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[int]:
        first = self.view * self.num_images
        return iter(range(first, first + self.num_images))
