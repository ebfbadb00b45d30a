"""The two streams of a bilateral-branch network, as one sampler of pairs."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from timm_lt.samplers.arithmetic import Purpose, seed_word
from timm_lt.samplers.balanced import InstanceBalancedSampler
from timm_lt.samplers.base import ClassSampler, Plan
from timm_lt.samplers.factory import SAMPLERS, register_sampler
from timm_lt.utils.checks import UsageError, check_choice, check_integer
from timm_lt.utils.longtail import Labels

Rebalancing = Literal["reversed", "class_balanced", "instance_balanced"]


@register_sampler("bilateral")
class BilateralSampler(ClassSampler):
    """Draws pairs ``u_0, r_0, u_1, r_1, ...`` of a uniform and a re-balancing stream.

    The uniform stream is ``instance_balanced`` of the same seed; the other has a seed of its own.
    Each keeps by itself what :class:`ClassSampler` promises: ``u`` shows every image once in an
    epoch of 2 N draws. (The paper draws the images of ``r`` with replacement.) A pair stays
    together: on a rank, and in batches that hold an even number of images for each process.

    It is for a bilateral network (:func:`timm_lt.create_bilateral`), which sends even rows of a
    batch through one branch and odd rows through the other, and for the loss ``bilateral``.

    Args:
        labels, seed, num_classes: As in :class:`ClassSampler`.
        num_samples: Images of an epoch, of both streams together: even, at least 2; None takes 2 N.
        rebalancing: How ``r`` is drawn; the paper's table 3 compares the three.

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

    def __init__(
        self,
        labels: Labels,
        num_samples: int | None = None,
        seed: int = 0,
        num_classes: int | None = None,
        *,
        rebalancing: Rebalancing = "reversed",
    ) -> None:
        check_choice("rebalancing", rebalancing, get_args(Rebalancing))
        pairs = None
        if num_samples is not None:
            if check_integer("num_samples", num_samples, minimum=1) % 2:
                raise UsageError(
                    f"num_samples of sampler 'bilateral' counts the images of pairs and must be "
                    f"even, got {num_samples}"
                )
            pairs = num_samples // 2
        self.conventional = InstanceBalancedSampler(labels, pairs, seed, num_classes)
        self.rebalancing = SAMPLERS.create(rebalancing, labels, pairs, 0, num_classes)
        super().__init__(labels, 2 * self.conventional.num_samples, seed, num_classes)
        # Nothing is drawn from a third copy of the labels.
        self._images = self.conventional._images

    def class_probabilities(self, epoch: int | None = None) -> Tensor:
        """Returns the mean of the probabilities of both streams."""
        epoch = self.epoch if epoch is None else epoch
        uniform = self.conventional.class_probabilities(epoch)
        return (uniform + self.rebalancing.class_probabilities(epoch)) / 2

    def _plan(self, epoch: int) -> Plan:
        """Returns the plan of the uniform stream; the other's follows from its seed and epoch."""
        self.conventional.seed = self.seed
        return self.conventional._plan(epoch)

    def _chunks(self, plan: Plan, start: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yields what both streams have a chunk of, from a pair on."""
        self.rebalancing.seed = int(seed_word(plan.seed, Purpose.REBALANCING)[0])
        at = start // 2
        uniform = self.conventional._chunks(plan, at)
        other = self.rebalancing._chunks(self.rebalancing._plan(plan.epoch), at)
        (begin_u, u), (begin_r, r) = next(uniform), next(other)
        while True:
            # Both are cut into chunks, though not at the same places.
            end = min(begin_u + len(u), begin_r + len(r))
            pairs = (u[at - begin_u : end - begin_u], r[at - begin_r : end - begin_r])
            yield 2 * at, np.stack(pairs, axis=1).ravel()
            at = end
            if 2 * at == self.num_samples:
                return
            if at == begin_u + len(u):
                begin_u, u = next(uniform)
            if at == begin_r + len(r):
                begin_r, r = next(other)
