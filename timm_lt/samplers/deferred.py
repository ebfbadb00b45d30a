"""Deferred re-sampling: one sampler, then another."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from timm_lt.samplers.arithmetic import Integers
from timm_lt.samplers.base import ClassSampler, Plan
from timm_lt.samplers.factory import SAMPLERS, register_sampler
from timm_lt.utils.checks import UsageError, check_integer, check_mapping
from timm_lt.utils.deferral import first_epoch
from timm_lt.utils.longtail import Labels


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
