"""Classifier stage on images: cRT and LWS through the frozen backbone, as in Kang et al."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from timm_lt.checkpoint import is_statistic
from timm_lt.data.images import Images
from timm_lt.heads import (
    CRTHead,
    Head,
    LWSHead,
    check_head_options,
    get_head,
    head_option_names,
    seeded_linear,
    set_head,
)
from timm_lt.heads.linear import BATCH_SIZE, CRT_LENGTH, LWS_LENGTH
from timm_lt.models.networks import unpair
from timm_lt.samplers import check_sampler, create_sampler
from timm_lt.training.loop import RepresentationTrainer, TrainingOptions, share_of_batch
from timm_lt.training.parts import BatchNorm, FrozenParts, cpu_copy
from timm_lt.utils.accelerator import kept_random_state
from timm_lt.utils.checks import UsageError, check_fields, check_integer, unknown_name, user_errors
from timm_lt.utils.console import log, progress
from timm_lt.utils.longtail import check_no_empty_class, class_counts

LENGTHS = {"crt": CRT_LENGTH, "lws": LWS_LENGTH}


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Hyper-parameters of a head that is trained on images.

    Args:
        bn: ``"frozen"`` keeps the backbone in evaluation mode. ``"shift"`` puts it in training
            mode, as in the reference code: batch norm normalises by the statistics of a process's
            batch, its running statistics, which become the head's ``backbone_statistics``, move to
            those of the sampler's classes, and dropout and drop path are active.
        epochs: Passes of N images, >= 1; None takes 10 (crt) or 5 (lws), but at least 1000 or 500
            updates. The last N mod ``batch_size`` images of each pass are dropped.
        steps: Number of updates, >= 1; excludes ``epochs``.
        batch_size: Images per update over all processes, from 1 to N; None takes 512, or as many
            as there are.
        lr: Initial learning rate, > 0.
        weight_decay: >= 0.
        momentum: In [0, 1).
        sampler: One of :func:`timm_lt.list_samplers`, over all draws of the training as one epoch.
        sampler_options: Options of the sampler. The reference code draws 4 images of a class in
            succession: ``{"samples_per_class": 4}``.

    Raises:
        UsageError: If a value is out of range.
    """

    bn: BatchNorm = "frozen"
    epochs: Annotated[int, 1] | None = None
    steps: Annotated[int, 1] | None = None
    batch_size: Annotated[int, 1] | None = None
    lr: Annotated[float, "(0, inf)"] = 0.2
    weight_decay: Annotated[float, "[0, inf)"] = 5e-4
    momentum: Annotated[float, "[0, 1)"] = 0.9
    sampler: str = "class_balanced"
    sampler_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_fields(self)


class HeadTrainer:
    """The training of a head on images, checked before the model need be trained."""

    def __init__(
        self, name: str, model: nn.Module, train: Images, accelerator: Accelerator, **options: Any
    ) -> None:
        self.name, self.images, self.accelerator = name, train, accelerator
        own = [field.name for field in fields(HeadOptions)]
        known = [*own, *head_option_names(name)]
        if name not in LENGTHS:
            raise UsageError(
                f"head {name!r} is not trained on images; {' and '.join(LENGTHS)} are, the others "
                "are fitted on features"
            )
        for key in options.keys() - known:
            raise unknown_name(f"option of head {name!r} on images:", key, known)
        self.head_options = {key: value for key, value in options.items() if key not in own}
        with user_errors(f"head {name!r} on images", UsageError):
            check_head_options(name, self.head_options)
            given = HeadOptions(**{key: options[key] for key in own if key in options})
        check_sampler(f"of head {name!r}", given.sampler, given.sampler_options)
        classifier = get_head(model)
        if isinstance(classifier, Head) and classifier.kind != "linear":
            raise UsageError(
                f"head {name!r} is trained on a model with its joint classifier, and this one "
                f"carries a {classifier.kind!r} head: create it without head="
            )
        if accelerator.distributed_type == DistributedType.FSDP:
            raise UsageError(f"head {name!r} cannot be trained on images under FSDP: remove stage")
        number = len(train)
        parts = accelerator.num_processes * accelerator.gradient_accumulation_steps
        largest = max(min(BATCH_SIZE, number) // parts, 1) * parts
        self.batch_size = given.batch_size or largest
        share = share_of_batch(self.batch_size, number, accelerator)
        check_no_empty_class(class_counts(train.labels, classifier.out_features))
        # They refuse batch norm that has no statistics, or too small a batch to compute them.
        frozen = FrozenParts(model, [], given.bn)
        try:
            frozen.try_batch(model, train.size, share)
        finally:
            frozen.thaw()
        self.options = given
        self.updates = LENGTHS[name].updates(
            number, batch_size=self.batch_size, epochs=given.epochs, steps=given.steps
        )

    def summary(self) -> dict[str, Any]:
        """Returns the entry of ``metrics.json``."""
        sizes = {"batch_size": self.batch_size, "updates": self.updates}
        return {"stage": "images", "bn": self.options.bn, **sizes}

    @kept_random_state()
    def run(self, model: nn.Module, seed: int = 0) -> Head:
        """Trains the head on a copy of the model; see :func:`train_head_on_images`."""
        check_integer("seed", seed, minimum=0)
        network, head = self._frozen_copy(model, seed)
        given, train = self.options, self.images
        draws = create_sampler(
            given.sampler,
            train.labels,
            num_samples=self.updates * self.batch_size,
            seed=seed,
            num_classes=head.out_features,
            **dict(given.sampler_options or {}),
        )
        optimizer = {"opt": "momentum", "lr": given.lr, "weight_decay": given.weight_decay}
        optimizer |= {"momentum": given.momentum, "filter_bias_and_bn": False}
        # The whole training is one epoch of the loop.
        part: dict[str, Any] = {"trained": [], "bn": given.bn, "seed": seed}
        options = TrainingOptions(epochs=1, batch_size=self.batch_size, optimizer=optimizer, **part)
        loss = nn.CrossEntropyLoss()
        with _forgotten(self.accelerator):
            trainer = RepresentationTrainer(network, train, draws, loss, options, self.accelerator)
            if given.bn == "frozen":
                # Also the modules that contain the head: the paper's networks have no dropout.
                trainer.frozen.evaluated = [m for m in network.modules() if m is not head]
            with progress(f"training {self.name} on images", self.updates, unit="updates") as bar:
                advice = "lower its lr, or take mixed_precision no"
                mean = trainer.train_epoch(0, bar, f"head {self.name!r}", advice)
        log.info("trained %s on images: %d updates, mean loss %.3f", self.name, self.updates, mean)
        if given.bn == "shift":
            state = {key: value for key, value in network.state_dict().items() if is_statistic(key)}
            head.backbone_statistics = cpu_copy(state)
        # On features it takes vectors, even if it replaced a convolution.
        head.spatial = False
        return head.to("cpu", torch.float32).eval()

    def _frozen_copy(self, model: nn.Module, seed: int) -> tuple[nn.Module, Head]:
        """Returns a copy of the model that carries the head, which alone has gradients."""
        joint = get_head(model)
        head: Head
        if self.name == "crt":
            size, bias = (joint.in_features, joint.out_features), joint.bias is not None
            head = CRTHead.from_classifier(seeded_linear(*size, bias=bias, seed=seed))
        else:
            head = LWSHead.from_classifier(joint, **self.head_options)
            with torch.no_grad():
                head.scale.fill_(1.0)
        network = copy.deepcopy(model).requires_grad_(False)
        # Images come one by one here, so a bilateral network does not take pairs.
        unpair(network)
        # Before the optimiser is made, since this may move the head to another device or type.
        set_head(network, head)
        return network, head


@kept_random_state()
def train_head_on_images(
    name: str,
    model: nn.Module,
    train: Images,
    *,
    accelerator: Accelerator,
    seed: int = 0,
    **options: Any,
) -> Head:
    """Trains a head on augmented images, through a backbone whose weights are frozen.

    This is the way of the paper: ``crt`` starts from a fresh classifier, ``lws`` from the joint one
    with scales of 1; SGD with plain momentum minimises the cross-entropy on class-balanced batches;
    everything that is trained decays, the bias and the scales too; the learning rate falls to zero
    along a cosine, update by update. :func:`timm_lt.fit_head` with ``solver="sgd"`` does the same
    on features.

    On one CPU process a second call gives the same bits; the random states of Python, NumPy and
    torch are restored.

    Args:
        name: ``"crt"`` or ``"lws"``.
        model: A timm model with its joint classifier (C, D). It is not changed: a copy is trained.
        train: Training images with their augmentation, at least one of every class.
        accelerator: From :func:`timm_lt.utils.accelerator.create_accelerator`.
        seed: Seed of the fresh classifier, the sampler and dropout; the augmentation has that of
            ``train``.
        **options: Those of :class:`HeadOptions` and of the head.

    Returns:
        The head in evaluation mode, float32 on the CPU; the same on every process.

    Raises:
        UsageError: If the head is another, an option is unknown, out of range or without effect,
            the model already carries a head, a class has no image, or the loss is not finite.

    References:
        Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR
        2020, sections 4.1 and 4.2, https://arxiv.org/abs/1910.09217
    """
    return HeadTrainer(name, model, train, accelerator, **options).run(model, seed)


@contextmanager
def _forgotten(accelerator: Accelerator) -> Iterator[None]:
    """Restores the accelerator's lists of prepared parts, and its count of batches, afterwards."""
    prepared = (accelerator._models, accelerator._optimizers, accelerator._dataloaders)
    before, step = [len(parts) for parts in prepared], accelerator.step
    try:
        yield
    finally:
        for parts, number in zip(prepared, before, strict=True):
            del parts[number:]
        accelerator.step = step
