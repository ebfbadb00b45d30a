"""The fit of the OLTR head: memory, selector and cosine classifier on cached features."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.fitting.base import FitData, TrainedFit, register_fit
from timm_lt.fitting.closed_form import class_means
from timm_lt.fitting.solvers import take_rows, train_head
from timm_lt.heads import OLTRHead, seeded_linear
from timm_lt.heads.linear import OLTR_BATCH_SIZE, OLTR_LENGTH
from timm_lt.heads.metric import Squash
from timm_lt.losses import DiscriminativeCentroids
from timm_lt.losses.metric import Hinge
from timm_lt.utils.checks import UsageError

Centroids = Literal["learned", "means"]
# Settings of the authors' code: rows of a class in succession, and divisions of the learning rate
# by ten, one at each third of the training.
SAMPLES_PER_CLASS, DROPS = 4, 3


@register_fit("oltr")
@dataclass(frozen=True, kw_only=True)
class OLTRFit(TrainedFit):
    """Trains the head by class-balanced SGD on the cross-entropy and the loss of the centroids.

    The settings are those of the authors' second stage: batches of 128, 4 rows of a class in
    succession, momentum 0.9, a learning rate that drops to a tenth at each third. The memory's
    coefficients start from the joint classifier, if there is one. On frozen features the loss of
    the centroids moves nothing but them, and its minimum is near the class means, from which they
    start.

    Args:
        scale: Option of the head, like ``reach`` and ``squash``.
        centroids: ``"learned"`` by :class:`timm_lt.losses.DiscriminativeCentroids`, without weight
            decay; or fixed at the class ``"means"``.
        loss_weight: Weight of that loss beside the cross-entropy, >= 0.
        hinge: Option of that loss.
        steps: Updates, 128 rows each; None goes by epochs.
        epochs: None is 2, but at least 150 updates; the paper, whose backbone learns too, has 60
            on ImageNet-LT.
        weight_decay: On everything but the centroids.
    """

    length = OLTR_LENGTH
    batch_size = OLTR_BATCH_SIZE

    scale: float = 16.0
    reach: float = 1.0
    squash: Squash = "squared"
    centroids: Centroids = "learned"
    loss_weight: float = 0.01
    hinge: Hinge = "example"
    lr: float = 0.1
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.centroids == "means" and (self.loss_weight, self.hinge) != (0.01, "example"):
            raise UsageError(
                "loss_weight and hinge of head 'oltr' have no effect with centroids 'means'"
            )

    def _fit(self, data: FitData) -> OLTRHead:
        head, features = self.start(data), data.features
        loss = DiscriminativeCentroids(head.centroids, hinge=self.hinge)
        loss.requires_grad_(self.centroids == "learned")

        def backward(rows: Tensor) -> None:
            with torch.no_grad():
                head.centroids.copy_(loss.centroids)
            values, targets = take_rows(features.values, rows), features.targets[rows]
            # head(values) would take weights that are no longer finite for unfitted ones.
            logits = F.linear(head.transform(values), *head.effective())
            objective: Tensor = F.cross_entropy(logits, targets)
            if self.centroids == "learned":
                objective = objective + self.loss_weight * loss(values, targets).mean()
            objective.backward()

        train_head(
            head,
            features,
            seed=data.seed,
            steps=self.updates(features.num_images),
            lr=self.lr,
            weight_decay=self.weight_decay,
            batch_size=OLTR_BATCH_SIZE,
            sampler_options={"samples_per_class": SAMPLES_PER_CLASS},
            backward=backward,
            # The gradient of the centroids is so small that a decay would draw them to zero.
            undecayed=[p for p in loss.parameters() if p.requires_grad],
            decay=lambda step, steps: 0.1 ** (DROPS * step // steps),
            fused=False,
        )
        with torch.no_grad():
            head.centroids.copy_(loss.centroids)
        return head

    def start(self, data: FitData) -> OLTRHead:
        """Returns the head before its training."""
        features, num_classes = data.features, data.num_classes
        width = features.num_features
        generator = torch.Generator().manual_seed(data.seed)
        seeds = torch.randint(2**31, (3,), generator=generator).tolist()
        with_bias = data.classifier is None or data.classifier.bias is not None
        start = seeded_linear(width, num_classes, bias=with_bias, seed=seeds[0])
        memory: nn.Linear = data.classifier or seeded_linear(width, num_classes, seed=seeds[1])
        selector = seeded_linear(width, width, seed=seeds[2])
        head = OLTRHead.from_classifier(
            start, scale=self.scale, reach=self.reach, squash=self.squash
        )
        means = class_means(features.values, features.targets, num_classes)["raw"]
        with torch.no_grad():
            head.centroids.copy_(means)
            head.memory_weight.copy_(memory.weight)
            head.memory_bias.copy_(torch.zeros(()) if memory.bias is None else memory.bias)
            head.selector_weight.copy_(selector.weight)
            head.selector_bias.copy_(selector.bias)
        return head
