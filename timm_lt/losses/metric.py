"""Metric-learning losses: cross-entropy plus a term on distances between a batch's features."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_lt.losses.base import ClassLoss, NonNegative, register_loss
from timm_lt.utils.checks import UsageError, check_choice, check_number
from timm_lt.utils.longtail import ClassCounts

# Lower bound of squared distances, which the harmonic mean divides by.
NO_DISTANCE = 1e-12
Finite = Annotated[float, "(-inf, inf)"]


@dataclass(eq=False, repr=False, kw_only=True)
class _MetricLoss(ClassLoss):
    """Cross-entropy plus ``weight`` times a term of the batch, added to the loss of each image."""

    needs_features = True

    weight: NonNegative

    def per_example(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="none")

    def batch_term(self, features: Tensor, targets: Tensor) -> Tensor:
        """Returns the term, a scalar, of features (N, D), float32 or float64, and targets (N,)."""
        raise NotImplementedError

    def forward(self, logits: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor:
        """Returns the reduced loss of a batch; features (N, D) are the input of the classifier."""
        losses = super().forward(logits, targets)
        if features is None or features.ndim != 2 or len(features) != len(targets):
            got = None if features is None else tuple(features.shape)
            needs = f"{type(self).__name__} needs the classifier's input (N, D) as features"
            raise UsageError(f"{needs}, got {got} for {len(targets)} targets")
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        term = self.weight * self.batch_term(features, targets.long())
        return losses + (len(targets) * term if self.reduction == "sum" else term)


@register_loss("range")
@dataclass(eq=False, repr=False, kw_only=True)
class RangeLoss(_MetricLoss):
    """Range loss: reduces the largest distances in a class, separates the two nearest classes.

    Cross-entropy plus ``weight · (alpha · L_intra + beta · L_inter)``. ``L_intra`` sums, over the
    classes of the batch, the harmonic mean ``k / sum_{j<=k} 1 / D_j`` of the ``k`` largest
    distances between two images of the class. ``L_inter = max(0, margin − D)`` has the smallest
    distance D between two class means of the batch; it is 0 for a batch of one class. Squared
    distances are clamped to at least 1e-12.

    Most batches of a long-tailed data set have no pair of images of a rare class. Draw several
    images with the sampler ``class_balanced`` and its option ``samples_per_class``.

    Args:
        weight: Weight of the term, at least 0. Squared distances between features are large: at 0.1
            a small ResNet learns nothing.
        k: Distances per class, at least 1; 2 in the paper.
        margin: Margin between class means, at least 0, in the unit of ``distance``. The paper does
            not give margin, alpha, beta and weight; tune them to the scale of the features.
        alpha, beta: Weights of the distances within and between classes, at least 0.
        distance: ``"squared"`` Euclidean as in the paper, or ``"euclidean"``.

    References:
        Zhang et al., Range Loss for Deep Face Recognition with Long-tailed Training Data, ICCV
        2017, https://arxiv.org/abs/1611.08976
    """

    weight: NonNegative = 0.0001
    k: Annotated[int, 1] = 2
    margin: NonNegative = 0.1
    alpha: NonNegative = 0.5
    beta: NonNegative = 0.5
    distance: Literal["squared", "euclidean"] = "squared"

    def batch_term(self, features: Tensor, targets: Tensor) -> Tensor:
        """Returns ``alpha · L_intra + beta · L_inter``."""
        classes = [features[targets == label] for label in targets.unique()]
        pairs = [self._distances(images) for images in classes if len(images) > 1]
        largest = [found.topk(min(self.k, len(found))).values for found in pairs]
        zero = features[:0].sum()
        intra = sum((len(top) / top.reciprocal().sum() for top in largest), zero)
        between = self._distances(torch.stack([images.mean(dim=0) for images in classes]))
        inter = (self.margin - between.min()).relu() if len(between) else zero
        return self.alpha * intra + self.beta * inter

    def _distances(self, rows: Tensor) -> Tensor:
        """Returns the distances of all pairs of rows, (n (n - 1) / 2,)."""
        squared = F.pdist(rows).square().clamp_min(NO_DISTANCE)
        return squared if self.distance == "squared" else squared.sqrt()


@register_loss("lifted_structure")
@dataclass(eq=False, repr=False, kw_only=True)
class LiftedStructureLoss(_MetricLoss):
    """Lifted structured embedding: each pair of a class against all negatives of both images.

    Cross-entropy plus ``weight / (2 |P|) · sum_{(i,j) in P} max(0, J_ij)^2`` over the pairs P of
    images of one class, with Euclidean distances D and

        ``J_ij = log sum_{n: y_n != y_i} (e^{neg_margin − D_in} + e^{neg_margin − D_jn})
        + D_ij − pos_margin``.

    The term is 0 in a batch without positive pairs or without negatives. pytorch-metric-learning
    computes it with matrices of positive times negative pairs: 200 MB each for a batch of 256 with
    4 images per class. The note of ``range`` on the sampler applies.

    Args:
        weight: Weight of the term, at least 0.
        neg_margin: Alpha of the paper, which has 1.
        pos_margin: 0 in the paper.
        normalize: Normalise the features to unit length, the default of pytorch-metric-learning but
            not in the paper.

    Raises:
        UsageError: If pytorch-metric-learning is not installed.

    References:
        Oh Song et al., Deep Metric Learning via Lifted Structured Feature Embedding, CVPR 2016,
        https://arxiv.org/abs/1511.06452
    """

    weight: NonNegative = 0.003
    neg_margin: Finite = 1.0
    pos_margin: Finite = 0.0
    normalize: bool = False

    def __post_init__(self, class_counts: ClassCounts | None) -> None:
        super().__post_init__(class_counts)
        try:
            from pytorch_metric_learning import distances, losses
        except ImportError as error:
            raise UsageError(
                "lifted_structure needs pytorch-metric-learning: pip install 'timm_lt[metric]'"
            ) from error
        self.term = losses.LiftedStructureLoss(
            neg_margin=self.neg_margin,
            pos_margin=self.pos_margin,
            distance=distances.LpDistance(normalize_embeddings=self.normalize),
        )

    def batch_term(self, features: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean over the pairs of half their squared hinge."""
        term: Tensor = self.term(features, targets)
        return term


Hinge = Literal["example", "batch"]


class DiscriminativeCentroids(nn.Module):
    """Attracts each feature to the centroid of its class, and repels it from the others.

    ``l_i = ½ ‖x_i − c_y‖² + repulsion · max(0, margin − r_i)``, where
    ``r_i = (1/C) Σ_{j≠y} ‖x_i − c_j‖²``, or its mean over the batch with ``hinge="batch"``, as in
    the authors' code.

    Not available in :func:`timm_lt.create_loss`, since the centroids are parameters;
    :func:`timm_lt.fit_head` trains them with the ``oltr`` head. In the authors' code the gradient
    of the centroids ignores the weight of the loss and divides by (1 + n_y) B.

    Args:
        centroids: Initial centroids, usually the class means.
        repulsion: Weight of the hinge, >= 0.
        margin: >= 0.
        hinge: One hinge per ``"example"`` or one of the ``"batch"``.

    Shape:
        centroids (C, D); features (N, D), targets (N,); returns the losses (N,), float32 at least.

    Raises:
        UsageError: If a number is out of range, or the shapes do not fit together.

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019,
        https://arxiv.org/abs/1904.05160

    >>> loss = DiscriminativeCentroids(torch.tensor([[0.0], [4.0]]), margin=3.0, repulsion=0.5)
    >>> loss(torch.tensor([[2.0]]), torch.tensor([1])).tolist()  # 4 / 2 + 0.5 (3 − 4 / 2)
    [2.5]
    """

    def __init__(
        self,
        centroids: Tensor,
        *,
        repulsion: float = 0.01,
        margin: float = 10.0,
        hinge: Hinge = "example",
    ) -> None:
        super().__init__()
        check_choice("hinge", hinge, get_args(Hinge))
        self.centroids = nn.Parameter(centroids.detach().clone())
        self.repulsion = check_number("repulsion", repulsion, "[0, inf)")
        self.margin = check_number("margin", margin, "[0, inf)")
        self.hinge = hinge

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses (N,) of features (N, D)."""
        num_classes, width = self.centroids.shape
        if features.ndim != 2 or features.shape[1] != width or targets.shape != features.shape[:1]:
            got = f"{tuple(features.shape)} and {tuple(targets.shape)}"
            raise UsageError(f"features must be (N, {width}) and targets (N,), got {got}")
        wide = torch.promote_types(features.dtype, torch.float32)
        # Centred centroids sum to 0, so the sum of all distances needs no product with them.
        middle = self.centroids.to(wide).mean(dim=0)
        x, c = features.to(wide) - middle, self.centroids.to(wide) - middle
        own = (x - c[targets]).square().sum(dim=1)
        every = num_classes * x.square().sum(dim=1) + c.square().sum()
        others = (every - own) / num_classes
        if self.hinge == "batch":
            others = others.mean().expand_as(others)
        return own / 2 + self.repulsion * (self.margin - others).clamp_min(0)
