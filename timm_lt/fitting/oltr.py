"""The fit of the OLTR head: memory, selector and cosine classifier on cached features."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.features import Features
from timm_lt.fitting.base import FitData, register_fit
from timm_lt.fitting.closed_form import class_means
from timm_lt.fitting.sgd import check_length, take_rows
from timm_lt.heads import OLTRHead, seeded_linear
from timm_lt.heads.linear import OLTR_BATCH_SIZE, OLTR_LENGTH
from timm_lt.heads.metric import Squash
from timm_lt.losses import DiscriminativeCentroids
from timm_lt.losses.metric import Hinge
from timm_lt.samplers import create_sampler
from timm_lt.utils.checks import UsageError, check_choice, check_number

Centroids = Literal["learned", "means"]
# As in the authors' code: images of a class in succession, and drops of the learning rate to a
# tenth, at each third of the training.
SAMPLES_PER_CLASS, DROPS, MOMENTUM = 4, 3, 0.9


def _check_oltr_options(options: dict[str, Any]) -> None:
    check_length(options)
    if options.get("loss_weight") is not None:
        check_number("loss_weight of head 'oltr'", options["loss_weight"], "[0, inf)")
    if options.get("centroids", "learned") == "means":
        for key in ("loss_weight", "hinge"):
            if key in options:
                raise UsageError(f"{key} of head 'oltr' has no effect with centroids 'means'")


@register_fit("oltr", _check_oltr_options)
def fit_oltr(
    data: FitData,
    *,
    scale: float = 16.0,
    reach: float = 1.0,
    squash: Squash = "squared",
    centroids: Centroids = "learned",
    loss_weight: float = 0.01,
    hinge: Hinge = "example",
    steps: int | None = None,
    epochs: int | None = None,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
) -> OLTRHead:
    """Trains the head by class-balanced SGD on the cross-entropy and the loss of the centroids.

    The settings of the authors' second stage: batches of 128, 4 rows of a class in succession,
    momentum 0.9, a learning rate that drops to a tenth at each third. The memory's coefficients
    start from the joint classifier, if there is one. On frozen features the loss of the centroids
    moves nothing but them, and its minimum is near the class means, from which they start.

    Args:
        data: The fit's data.
        scale: As of the head.
        reach: As of the head.
        squash: As of the head.
        centroids: ``"learned"`` by :class:`timm_lt.losses.DiscriminativeCentroids`, without weight
            decay; or kept as the class ``"means"``.
        loss_weight: Weight of that loss beside the cross-entropy, >= 0.
        hinge: As of that loss.
        steps: Updates, of 128 rows; None goes by epochs.
        epochs: None takes 2, but at least 150 updates; the paper, whose backbone learns too, has
            60 on ImageNet-LT.
        lr: Learning rate at the start.
        weight_decay: On all that is trained but the centroids.
    """
    check_choice("centroids of head 'oltr'", centroids, get_args(Centroids))
    head = _start(data, scale=scale, reach=reach, squash=squash)
    length = OLTR_LENGTH.updates(
        data.features.num_images, batch_size=OLTR_BATCH_SIZE, epochs=epochs, steps=steps
    )
    loss = DiscriminativeCentroids(head.centroids, hinge=hinge)
    loss.requires_grad_(centroids == "learned")
    _train(
        head,
        loss,
        data.features,
        seed=data.seed,
        steps=length,
        lr=lr,
        weight_decay=weight_decay,
        loss_weight=loss_weight,
    )
    return head


def _start(data: FitData, **options: Any) -> OLTRHead:
    """Returns the head before its training: everything is there."""
    features, num_classes = data.features, data.num_classes
    width = features.num_features
    generator = torch.Generator().manual_seed(data.seed)
    seeds = torch.randint(2**31, (3,), generator=generator).tolist()
    with_bias = data.classifier is None or data.classifier.bias is not None
    start = seeded_linear(width, num_classes, bias=with_bias, seed=seeds[0])
    memory: nn.Linear = data.classifier or seeded_linear(width, num_classes, seed=seeds[1])
    selector = seeded_linear(width, width, seed=seeds[2])
    head = OLTRHead.from_classifier(start, **options)
    means = class_means(features.values, features.targets, num_classes)["raw"]
    with torch.no_grad():
        head.centroids.copy_(means)
        head.memory_weight.copy_(memory.weight)
        if memory.bias is None:
            head.memory_bias.zero_()
        else:
            head.memory_bias.copy_(memory.bias)
        head.selector_weight.copy_(selector.weight)
        head.selector_bias.copy_(selector.bias)
    return head


def _train(
    head: OLTRHead,
    loss: DiscriminativeCentroids,
    features: Features,
    *,
    seed: int,
    steps: int,
    lr: float,
    weight_decay: float,
    loss_weight: float,
) -> None:
    """Trains the head, and the centroids of the loss if they ask for gradients."""
    moved = [p for p in loss.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in head.parameters() if p.requires_grad]},
        # Their gradient is so small that a decay would draw them to zero.
        *([{"params": moved, "weight_decay": 0.0}] if moved else []),
    ]
    optimizer = torch.optim.SGD(groups, lr, momentum=MOMENTUM, weight_decay=weight_decay)
    drawn = create_sampler(
        "class_balanced",
        features.targets,
        num_samples=steps * OLTR_BATCH_SIZE,
        seed=seed,
        samples_per_class=SAMPLES_PER_CLASS,
    )
    head.train()
    for step, rows in enumerate(drawn.epoch_indices().view(steps, OLTR_BATCH_SIZE)):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.1 ** (DROPS * step // steps)
        values, targets = take_rows(features.values, rows), features.targets[rows]
        # Not head(values), which would take weights that are no longer finite for unfitted ones.
        logits = F.linear(head.transform(values), *head.effective())
        objective: Tensor = F.cross_entropy(logits, targets)
        if moved:
            objective = objective + loss_weight * loss(values, targets).mean()
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        with torch.no_grad():
            head.centroids.copy_(loss.centroids)
    if not all(value.isfinite().all() for value in head.state_dict().values()):
        raise UsageError(
            f"head 'oltr' did not stay finite while it was trained: take a lower lr than {lr:g}"
        )
