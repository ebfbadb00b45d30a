"""The classifier stage on images: cRT and LWS through the frozen backbone, as Kang et al. train.

What is checked before a head is trained on images, and how long it is trained.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from timm_lt.checkpoint import is_statistic
from timm_lt.data.images import Images
from timm_lt.data.loader import NumberedSampler
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
from timm_lt.training.checks import check_batch_size
from timm_lt.training.update import (
    Losses,
    Schedule,
    Update,
    cpu_copy,
    run_updates,
    seed_epoch,
    share_buffers,
)
from timm_lt.utils.accelerator import kept_random_state
from timm_lt.utils.checks import (
    UsageError,
    check_choice,
    check_integer,
    check_number,
    unknown_name,
)
from timm_lt.utils.console import log, progress
from timm_lt.utils.longtail import check_no_empty_class, class_counts

BatchNorm = Literal["frozen", "shift"]
LENGTHS = {"crt": CRT_LENGTH, "lws": LWS_LENGTH}
RANGES = {"lr": "(0, inf)", "weight_decay": "[0, inf)", "momentum": "[0, 1)"}
COUNTS = ("epochs", "steps", "batch_size")
OPTIONS = ("bn", *COUNTS, *RANGES, "sampler", "sampler_options")


@dataclass(frozen=True)
class HeadPlan:
    """How a head is trained on images.

    Attributes:
        bn: What batch norm does, ``"frozen"`` or ``"shift"``.
        batch_size: Images per update, over all processes.
        updates: Number of updates.
    """

    bn: BatchNorm
    batch_size: int
    updates: int


def check_image_options(name: str, options: Mapping[str, Any]) -> None:
    """Checks the options of :func:`train_head_on_images`, names and values, without data.

    Args:
        name: Name of the head.
        options: Options by name, without the accelerator and the seed.

    Raises:
        UsageError: If there is no such head or option, a value is out of range, or two options
            exclude each other.
    """
    known = [*OPTIONS, *head_option_names(name)]
    if name not in LENGTHS:
        raise UsageError(
            f"head {name!r} is not trained on images; {' and '.join(LENGTHS)} are, the others are "
            "fitted on features"
        )
    for key in options:
        if key not in known:
            raise unknown_name(f"option of head {name!r} on images:", key, known)
    check_head_options(name, {key: options[key] for key in options if key not in OPTIONS})
    owner = f"of head {name!r}"
    check_choice(f"bn {owner}:", options.get("bn", "frozen"), get_args(BatchNorm))
    for key, value in options.items():
        if key in RANGES:
            check_number(f"{key} {owner}", value, RANGES[key])
        if key in COUNTS and value is not None:
            check_integer(f"{key} {owner}", value, minimum=1)
    if options.get("epochs") is not None and options.get("steps") is not None:
        raise UsageError(f"epochs and steps {owner} exclude each other: leave one out")
    check_sampler(owner, options.get("sampler", "class_balanced"), options.get("sampler_options"))


def plan_head_on_images(
    name: str, model: nn.Module, train: Images, accelerator: Accelerator, **options: Any
) -> HeadPlan:
    """Checks all that :func:`train_head_on_images` is given, and says what it will do.

    Args:
        name: As there.
        model: As there; it need not be trained yet.
        train: As there.
        accelerator: As there.
        **options: As there, without the seed.

    Raises:
        UsageError: As there, but for the loss.
    """
    check_image_options(name, options)
    if not hasattr(train, "train_loader"):
        raise UsageError(
            f"train is a {type(train).__name__}, not ImageTensors or StoredImages of timm_lt.data"
        )
    bn = options.get("bn", "frozen")
    classifier = _check_model(name, model, bn)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UsageError(
            f"head {name!r} cannot be trained on images under FSDP: leave out stage, to fit it on "
            "features"
        )
    check_no_empty_class(class_counts(train.labels, classifier.out_features))
    number, steps = len(train), accelerator.gradient_accumulation_steps
    batch_size = options.get("batch_size")
    if batch_size is None:
        parts = accelerator.num_processes * steps
        batch_size = max(min(BATCH_SIZE, number) // parts, 1) * parts
    check_batch_size(batch_size, number, accelerator.num_processes, steps)
    if bn == "shift":
        _check_shared(name, batch_size, accelerator)
    updates = LENGTHS[name].updates(
        number, batch_size=batch_size, epochs=options.get("epochs"), steps=options.get("steps")
    )
    return HeadPlan(bn, batch_size, updates)


def _check_shared(name: str, batch_size: int, accelerator: Accelerator) -> None:
    """Refuses batches of one image, which have no variance to normalise by."""
    processes, steps = accelerator.num_processes, accelerator.gradient_accumulation_steps
    if batch_size // (processes * steps) < 2:
        raise UsageError(
            f"bn shift of head {name!r} needs 2 images or more in each batch, and batch_size "
            f"{batch_size} leaves 1: take {2 * processes * steps} or more, or bn frozen"
        )


def _check_model(name: str, model: nn.Module, bn: BatchNorm) -> nn.Linear:
    classifier = get_head(model)
    if isinstance(classifier, Head) and classifier.kind != "linear":
        raise UsageError(
            f"head {name!r} is trained on a model with its joint classifier, and this one carries "
            f"a {classifier.kind!r} head: create it without head="
        )
    if bn == "shift" and not any(map(is_statistic, model.state_dict())):
        raise UsageError(
            f"bn shift of head {name!r} has no effect, since {type(model).__name__} has no "
            "batch-norm statistics: leave it out"
        )
    return classifier


@kept_random_state()
def train_head_on_images(
    name: str,
    model: nn.Module,
    train: Images,
    *,
    accelerator: Accelerator,
    bn: BatchNorm = "frozen",
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float = 0.2,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    sampler: str = "class_balanced",
    sampler_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> Head:
    """Trains a head on augmented images, through a backbone whose weights are frozen.

    The reference way: ``crt`` starts from a fresh classifier, ``lws`` from the joint one with
    scales of 1; SGD with plain momentum minimises the cross-entropy on class-balanced batches; all
    that is trained decays, the bias and the scales too; the learning rate falls to zero along a
    cosine, update by update. :func:`timm_lt.fit_head` with ``solver="sgd"`` does the same on
    features that were taken once.

    With ``bn="frozen"`` the backbone is in evaluation mode. With ``bn="shift"`` it is in training
    mode, as in the reference code: batch norm normalises by the statistics of a process's batch,
    and its running statistics move to those of the sampler's classes; dropout and drop path, which
    the paper's networks lack, are active. These statistics are the head's ``backbone_statistics``.

    What is random is a function of the seed, so on one CPU process a second call gives the same
    bits; the random states of Python, NumPy and torch are afterwards what they were. A call that is
    interrupted starts again; there is no state to resume from.

    Args:
        name: ``"crt"`` or ``"lws"``.
        model: A timm model with its joint classifier (C, D). It stays as it is; a copy is trained.
        train: Training images with their augmentation, an image of every class.
        accelerator: From :func:`timm_lt.utils.accelerator.create_accelerator`.
        bn: What batch norm does, ``"frozen"`` or ``"shift"``.
        epochs: Passes of N images, >= 1; None takes 10 (crt) or 5 (lws), but at least 1000 or 500
            updates. The last N mod ``batch_size`` images of each pass are left out.
        steps: Number of updates, >= 1, in place of ``epochs``.
        batch_size: Images per update over all processes, from 1 to N; None takes 512, or as many as
            there are.
        lr: Learning rate at the start, > 0.
        weight_decay: >= 0.
        momentum: In [0, 1).
        sampler: One of :func:`timm_lt.list_samplers`, over all draws of the training as one epoch.
        sampler_options: Its options. The reference code draws 4 images of a class in succession:
            ``{"samples_per_class": 4}``.
        seed: Seed of the fresh classifier, the sampler and dropout; the augmentation has that of
            ``train``.
        **options: Options of the head.

    Returns:
        The head in evaluation mode, float32 on the CPU; the same on every process.

    Raises:
        UsageError: If the head is another, an option is unknown, out of range or without effect,
            the model carries a head already, a class has no image, or the loss is not finite.

    References:
        Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR
        2020, sections 4.1 and 4.2, https://arxiv.org/abs/1910.09217
    """
    plan = plan_head_on_images(
        name,
        model,
        train,
        accelerator,
        bn=bn,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        sampler=sampler,
        sampler_options=sampler_options,
        **options,
    )
    check_integer("seed", seed, minimum=0)
    frozen, head = _frozen_copy(name, model, bn, seed, options)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr, momentum=momentum, weight_decay=weight_decay)
    draws = create_sampler(
        sampler,
        train.labels,
        num_samples=plan.updates * plan.batch_size,
        seed=seed,
        num_classes=head.out_features,
        **dict(sampler_options or {}),
    )
    seed_epoch(seed, 0, accelerator.process_index)
    with _forgotten(accelerator):
        numbered = NumberedSampler(draws, len(train), len(draws))
        _train(name, frozen, optimizer, train, numbered, plan, accelerator)
    share_buffers(frozen.buffers(), accelerator)
    return _finished(name, frozen, head, bn)


def _train(
    name: str,
    frozen: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Images,
    draws: NumberedSampler,
    plan: HeadPlan,
    accelerator: Accelerator,
) -> None:
    """Makes the updates."""
    schedule = Schedule(optimizer, {"sched": "cosine"}, epochs=1, updates_per_epoch=plan.updates)
    parts = accelerator.gradient_accumulation_steps
    loader = train.train_loader(plan.batch_size // parts, draws, accelerator)
    prepared, moved = accelerator.prepare(frozen, optimizer)
    update = Update(
        prepared,
        moved,
        nn.CrossEntropyLoss(),
        accelerator,
    )
    loader.set_epoch(0)
    with progress(f"training {name} on images", plan.updates, unit="updates") as bar:
        loss = run_updates(
            loader,
            update,
            schedule,
            Losses(1, parts, accelerator, head=name),
            first=0,
            batches_per_update=parts,
            skips=train.unreadable == "skip",
            bar=bar,
        )
    log.info("trained %s on images: %d updates, mean loss %.3f", name, plan.updates, loss)


def _finished(name: str, frozen: nn.Module, head: Head, bn: BatchNorm) -> Head:
    """Takes the head off the trained copy, with the statistics that belong to it."""
    state = frozen.state_dict()
    if bn == "shift":
        head.backbone_statistics = cpu_copy({k: v for k, v in state.items() if is_statistic(k)})
    # No loss has shown the effect of the last update.
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UsageError(
            f"head {name!r} is no longer finite after its last update: lower its lr, or take "
            "mixed_precision no"
        )
    # On features it takes vectors, whatever the classifier whose place it had.
    head.spatial = False
    return head.to("cpu", torch.float32).eval()


def _frozen_copy(
    name: str, model: nn.Module, bn: BatchNorm, seed: int, options: Mapping[str, Any]
) -> tuple[nn.Module, Head]:
    """Returns a copy of the model that carries the head, and the head: all that asks for gradients.

    Nothing before it does, so autograd keeps nothing of the backbone, as under ``no_grad``.
    """
    joint = get_head(model)
    head: Head
    if name == "crt":
        fresh = seeded_linear(
            joint.in_features, joint.out_features, bias=joint.bias is not None, seed=seed
        )
        head = CRTHead.from_classifier(fresh)
    else:
        head = LWSHead.from_classifier(joint, **options)
        with torch.no_grad():
            head.scale.fill_(1.0)
    frozen = copy.deepcopy(model).requires_grad_(False)
    # Of a bilateral network: images come one by one here, also with batch norm in training mode.
    unpair(frozen)
    # Before the optimiser is made: it may move the head to another device or type.
    set_head(frozen, head)
    frozen.to(memory_format=torch.channels_last)
    frozen.train(bn == "shift")
    head.train()
    return frozen, head


@contextmanager
def _forgotten(accelerator: Accelerator) -> Iterator[None]:
    """Makes the accelerator forget what is prepared in the block: it would keep every copy.

    It goes on counting the batches of its caller's update where it was.
    """
    prepared = (accelerator._models, accelerator._optimizers, accelerator._dataloaders)
    before, step = [len(parts) for parts in prepared], accelerator.step
    try:
        yield
    finally:
        for parts, number in zip(prepared, before, strict=True):
            del parts[number:]
        accelerator.step = step
