"""Samplers that bring every class to a target number of images per epoch."""

from torch import Tensor

from timm_lt.samplers.base import ClassSampler
from timm_lt.samplers.factory import register_sampler
from timm_lt.utils.checks import check_integer
from timm_lt.utils.longtail import Labels


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
