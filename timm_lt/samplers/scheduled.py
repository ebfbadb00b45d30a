"""Samplers that change during training, and the sampler of pairs of a bilateral network."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_lt.samplers import streams
from timm_lt.samplers.balanced import InstanceBalancedSampler, power_probabilities
from timm_lt.samplers.base import SAMPLERS, ClassSampler, Plan, register_sampler
from timm_lt.samplers.streams import Array, Integers, Purpose, keyed, seed_word, small_integers
from timm_lt.utils.checks import UsageError, check_mapping
from timm_lt.utils.longtail import Labels, first_epoch


@register_sampler("progressively_balanced")
@dataclass(eq=False, kw_only=True)
class ProgressivelyBalancedSampler(ClassSampler):
    """Moves from instance-balanced to class-balanced: ``p_j(t) = (1 - a) n_j / N + a / C``.

    t is the 0-based epoch, T the number of epochs. With ``steps_per_epoch`` = S > 1 they count
    steps, S per epoch, each arranged uniformly at random, and :meth:`class_probabilities` is the
    mean over the steps. In any number of steps, the draws of a class differ by less than one from
    their expectation; a step starts within about ``sqrt(C)`` draws of its position. The time of an
    epoch grows with S C.

    Args:
        epochs: Number of epochs, at least 1.
        schedule: a is ``"t/T"``, from 0 to (T-1)/T, as in the paper, or ``"t/(T-1)"``, from 0 to 1,
            as in its code.
        steps_per_epoch: S, at least 1.

    Raises:
        UsageError: If a value is out of range; when drawing, if the epoch is not below T.

    References:
        Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR
        2020, https://arxiv.org/abs/1910.09217 (equation 2).
    """

    epochs: Annotated[int, 1]
    schedule: Literal["t/T", "t/(T-1)"] = "t/T"
    steps_per_epoch: Annotated[int, 1] = 1

    def __post_init__(self, labels: Labels, num_classes: int | None) -> None:
        super().__post_init__(labels, num_classes)
        total = self.epochs * self.steps_per_epoch
        # The step at which a would be 1.
        self._last_step = total if self.schedule == "t/T" else max(total - 1, 1)
        # A chunk consists of whole steps, at least one.
        by_draws = self.chunk_size * self.steps_per_epoch // self.num_samples
        by_memory = 4 * self.chunk_size // len(self.class_counts)
        self._steps_per_chunk = max(min(by_draws, by_memory), 1)

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns ``(1 - a) n_j / N + a / C``, averaged over the steps of the epoch."""
        a = (self._first_step(epoch) + (self.steps_per_epoch - 1) / 2) / self._last_step
        instance_balanced, class_balanced = self._ends()
        return (1 - a) * instance_balanced + a * class_balanced

    def _ends(self) -> list[Tensor]:
        """Returns the probabilities at a = 0 and a = 1."""
        return [power_probabilities(self.class_counts, q) for q in (1.0, 0.0)]

    def _first_step(self, epoch: int | None) -> int:
        t = self.epoch if epoch is None else epoch
        if not 0 <= t < self.epochs:
            raise UsageError(f"epoch {t} is outside the schedule: epochs={self.epochs}")
        return t * self.steps_per_epoch

    def _division(self, plan: Plan) -> tuple[int, Callable[[int], Integers]]:
        if self.steps_per_epoch == 1:
            return super()._division(plan)
        num_chunks = -(-self.steps_per_epoch // self._steps_per_chunk)
        return num_chunks, lambda chunk: self._drawn_before(plan, self._steps_of(chunk)[:1])[0]

    def _steps_of(self, chunk: int) -> Integers:
        """Returns the steps of a chunk and the one after them."""
        first = chunk * self._steps_per_chunk
        return np.arange(first, first + self._steps_per_chunk + 1).clip(max=self.steps_per_epoch)

    def _drawn_before(self, plan: Plan, steps: Integers) -> Integers:
        """Returns how often each class is drawn in the epoch before some steps (steps, C)."""
        share = self._expected_before(plan, steps)
        total = self._expected_before(plan, np.array([self.steps_per_epoch]))
        share /= np.where(total > 0, total, 1)
        # Rounded with an offset for each class, a multiple of 2^-18 plus 2^-19.
        key = seed_word(plan.seed, Purpose.SHARES, plan.epoch)
        offset = keyed(key, np.arange(share.shape[1])) >> np.uint64(64 - 18)
        share *= plan.draws
        share += (offset + 0.5) / 2**18
        return share.astype(np.int64)

    def _expected_before(self, plan: Plan, steps: Integers) -> NDArray[np.float64]:
        """Returns the sum of the probabilities in the epoch before some steps (steps, C)."""
        # The sum of a over these steps.
        a = steps * (self._first_step(plan.epoch) + (steps - 1) / 2) / self._last_step
        instance_balanced, class_balanced = (end.numpy() for end in self._ends())
        return np.outer(steps - a, instance_balanced) + np.outer(a, class_balanced)

    def _arrange(self, plan: Plan, chunk: int, amounts: Integers, rng: torch.Generator) -> Array:
        if self.steps_per_epoch == 1:
            return super()._arrange(plan, chunk, amounts, rng)
        of_step = np.diff(self._drawn_before(plan, self._steps_of(chunk)), axis=0)
        step = np.repeat(small_integers(len(of_step)), of_step.sum(axis=1))
        order = torch.randperm(len(step), generator=rng).numpy()
        order = order[streams.sort_order(step[order])]
        classes = np.tile(small_integers(len(amounts)), len(of_step))
        arranged: Array = np.repeat(classes, of_step.ravel())[order]
        return arranged


@register_sampler("deferred")
@dataclass(eq=False, kw_only=True)
class DeferredSampler(ClassSampler):
    """Deferred re-sampling (DRS): one sampler at first, another from an epoch on.

    The cycles of images continue after the change. An epoch always has ``num_samples`` draws, also
    with a sampler that has another length by default.

    Args:
        first, first_options, second, second_options: Names and options of the two samplers.
        start: The 0-based epoch of the change, or a fraction of the epochs in (0, 1), rounded
            down: 160 in the paper, 0.8 of its 200.
        epochs: Number of epochs, at least 1; a recipe sets it. A sampler with a schedule takes it
            as well, unless its options have another. None: ``start`` must be an epoch.

    Raises:
        UsageError: For a wrong option, also of one of the two samplers, or a start that is not
            within the epochs.

    References:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS
        2019, https://arxiv.org/abs/1906.07413 (section 4, DRS).
    """

    first: str = "instance_balanced"
    second: str = "class_balanced"
    first_options: Mapping[str, Any] | None = None
    second_options: Mapping[str, Any] | None = None
    start: float = 0.8
    epochs: Annotated[int, 1] | None = None

    def __post_init__(self, labels: Labels, num_classes: int | None) -> None:
        super().__post_init__(labels, num_classes)
        self.first_epoch = first_epoch(self.start, self.epochs)
        self.parts = (
            self._create(self.first, labels, check_mapping("first_options", self.first_options)),
            self._create(self.second, labels, check_mapping("second_options", self.second_options)),
        )

    def _create(self, name: str, labels: Labels, options: dict[str, Any]) -> ClassSampler:
        if self.epochs is not None and "epochs" in inspect.signature(SAMPLERS[name]).parameters:
            options.setdefault("epochs", self.epochs)
        size = (labels, self.num_samples, self.seed, len(self.class_counts))
        part = SAMPLERS.create(name, *size, **options)
        if part.unit > 1:
            raise UsageError(f"sampler 'deferred' cannot use {name!r}, which draws pairs")
        # Share one copy of the images.
        part._images = self._images
        return part

    def _part(self, epoch: int | None = None) -> ClassSampler:
        """Returns the sampler of an epoch."""
        return self.parts[(self.epoch if epoch is None else epoch) >= self.first_epoch]

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns those of the first sampler before the start, of the second from it on."""
        epoch = self.epoch if epoch is None else epoch
        return self._part(epoch).class_probabilities(epoch)

    @property
    def group(self) -> int:
        """Number of consecutive draws that stay on one rank in the current epoch."""
        return self._part().group

    def _round(self, epoch: int) -> Integers:
        part = self._part(epoch)
        part.seed = self.seed
        return part._round(epoch)

    def _chunks(self, plan: Plan, start: int) -> Iterator[tuple[int, Array]]:
        return self._part(plan.epoch)._chunks(plan, start)


@register_sampler("bilateral")
@dataclass(eq=False, kw_only=True)
class BilateralSampler(ClassSampler):
    """Draws pairs ``u_0, r_0, u_1, r_1, ...`` of a uniform and a re-balancing stream.

    The uniform stream is ``instance_balanced`` with the same seed, the other has a seed of its own.
    A pair stays on one rank, and in one batch if the batch size of each process is even. A
    bilateral network (:func:`timm_lt.create_bilateral`) sends even and odd rows through different
    branches; the loss ``bilateral`` mixes their logits.

    Args:
        num_samples: Images of both streams in an epoch, an even number; None takes 2 N.
        rebalancing: Sampler of ``r``; the paper's table 3 compares the three.

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

    rebalancing: Literal["reversed", "class_balanced", "instance_balanced"] = "reversed"

    def __post_init__(self, labels: Labels, num_classes: int | None) -> None:
        super().__post_init__(labels, num_classes)
        pairs, odd = divmod(self.num_samples, 2)
        if odd:
            raise UsageError(f"sampler 'bilateral' draws pairs; got num_samples={self.num_samples}")
        self._uniform = InstanceBalancedSampler(labels, pairs, self.seed, num_classes)
        self._other = SAMPLERS.create(self.rebalancing, labels, pairs, 0, num_classes)
        # Share one copy of the images.
        self._images = self._uniform._images

    def images_per_class(self) -> Tensor:
        """Returns the images of both streams: 2 N in all."""
        return 2 * self.class_counts

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns the mean of the probabilities of both streams."""
        uniform = self._uniform.class_probabilities(epoch)
        return (uniform + self._other.class_probabilities(epoch)) / 2

    def _chunks(self, plan: Plan, start: int) -> Iterator[tuple[int, Array]]:
        """Yields the whole epoch, since the chunks of the streams end at different positions."""
        self._uniform.seed = plan.seed
        self._other.seed = int(seed_word(plan.seed, Purpose.REBALANCING)[0])
        pairs = [part.epoch_indices(plan.epoch) for part in (self._uniform, self._other)]
        yield 0, torch.stack(pairs, dim=1).flatten().numpy()
