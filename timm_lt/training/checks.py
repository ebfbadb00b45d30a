"""What is checked before training starts, so that no hour is lost to a typing error."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from timm_lt.data.images import Images
from timm_lt.heads import Head, find_classifiers, get_head, get_heads
from timm_lt.models.networks import takes_pairs
from timm_lt.samplers import ClassSampler
from timm_lt.training.update import SCHEDULERS, Schedule
from timm_lt.utils.checks import UsageError, check_choice, check_integer, check_number

LOOKAHEAD = "lookahead_"


def check_batch_size(
    batch_size: int, num_images: int, num_processes: int, accumulation_steps: int = 1
) -> None:
    """Checks that an epoch has a batch and that processes and accumulation can share one.

    Raises:
        UsageError: If not.
    """
    check_integer("batch_size", batch_size, minimum=1)
    if batch_size > num_images:
        raise UsageError(
            f"batch_size {batch_size} exceeds the {num_images} images of an epoch: make it smaller"
        )
    if batch_size % num_processes:
        raise UsageError(
            f"batch_size {batch_size} counts images over all processes and must be a multiple of "
            f"their number, {num_processes}"
        )
    if batch_size % (num_processes * accumulation_steps):
        raise UsageError(
            f"batch_size {batch_size} counts images per update: with accumulation_steps "
            f"{accumulation_steps} on {num_processes} processes it must be a multiple of "
            f"{num_processes * accumulation_steps}"
        )


def check_optimization(
    optimizer: Mapping[str, Any], scheduler: Mapping[str, Any], epochs: int
) -> None:
    """Checks what :func:`train_representation` will hand to timm, by creating both for nothing.

    Args:
        optimizer: Arguments of ``timm.optim.create_optimizer_v2``.
        scheduler: Arguments of ``timm.scheduler.create_scheduler_v2``.
        epochs: Number of epochs.

    Raises:
        UsageError: If a name or an argument is unknown, or a value is out of its range.
    """
    check_integer("epochs", epochs, minimum=1)
    known = tuple(str(name) for name in list_optimizers())
    check_choice("optimizer", str(optimizer["opt"]).removeprefix(LOOKAHEAD), known)
    check_number("optimizer.lr", optimizer["lr"], "(0, inf)")
    check_number("optimizer.weight_decay", optimizer.get("weight_decay", 0.0), "[0, inf)")
    check_number("optimizer.momentum", optimizer.get("momentum", 0.9), "[0, 1)")
    check_choice("scheduler", scheduler.get("sched", "cosine"), SCHEDULERS)
    check_number("scheduler.warmup_epochs", scheduler.get("warmup_epochs", 0), f"[0, {epochs}]")
    check_number("optimizer.options.layer_decay", optimizer.get("layer_decay") or 1.0, "(0, 1]")
    # Of one layer, timm would warn that a decay by layers has no effect.
    alone = {key: value for key, value in optimizer.items() if key != "layer_decay"}
    try:
        dummy = create_optimizer_v2(nn.Linear(1, 1), **alone)
    except (TypeError, ValueError, AssertionError, ImportError, IndexError, RuntimeError) as error:
        raise UsageError(f"optimizer: {error}") from error
    Schedule(dummy, scheduler, epochs=epochs, updates_per_epoch=1)


def check_schedule(loss: nn.Module, epochs: int) -> None:
    """Checks that what a loss does in some epochs only fits into training.

    Raises:
        UsageError: If not.
    """
    set_epoch = getattr(loss, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(0, epochs)


def check_pairs(model: nn.Module, sampler: ClassSampler, loss: nn.Module, *, batch: int) -> None:
    """Checks that a bilateral network, sampler and loss come together, and that pairs stay so.

    Args:
        model: What is trained, with its head.
        sampler: Order of the training images.
        loss: What is minimised.
        batch: Images that a process takes at once.

    Raises:
        UsageError: If only some of the three are bilateral, a batch has half a pair, or the head
            is not linear, for then mixed logits are not those of mixed features.
    """
    bilateral = {
        "model": takes_pairs(model),
        "sampler": getattr(sampler, "unit", 1) > 1,
        "loss": getattr(loss, "takes_pairs", False),
    }
    if not any(bilateral.values()):
        return
    if not all(bilateral.values()):
        there = ", ".join(name for name, is_one in bilateral.items() if is_one)
        missing = ", ".join(name for name, is_one in bilateral.items() if not is_one)
        raise UsageError(
            f"bilateral: {there}; not bilateral: {missing}; BBN is trained with all three: a model "
            "lt_bbn_* (or from create_bilateral), sampler bilateral and loss bilateral"
        )
    if batch % 2:
        raise UsageError(
            f"each batch of a process holds pairs of images, and {batch} is odd: batch_size counts "
            "the images of both streams, so make it a multiple of 2 x processes x "
            "accumulation_steps"
        )
    head = get_head(model)
    if isinstance(head, Head) and head.kind != "linear":
        raise UsageError(
            f"a bilateral network is trained with a linear classifier, not with a {head.kind!r} "
            "head: leave head= out of model.options"
        )


def check_classifier(loss: nn.Module, model: nn.Module) -> None:
    """Checks that a loss takes the logits of a model's classifier, where it is particular.

    Raises:
        UsageError: If not.
    """
    check = getattr(loss, "check_classifier", None)
    # What is no model of timm has a classifier that only its owner knows.
    if check is not None and hasattr(model, "get_classifier"):
        for classifier in get_heads(model).values():
            check(classifier)


def start_classifier(loss: nn.Module, model: nn.Module, num_classes: int) -> None:
    """Gives a fresh classifier the bias that a loss wants it to start with, if it wants one."""
    initial_bias = getattr(loss, "initial_bias", None)
    value = None if initial_bias is None else initial_bias(num_classes)
    if value is None:
        return
    for classifier in find_classifiers(model).values():
        if classifier.bias is not None:
            nn.init.constant_(classifier.bias, value)


def check_model(model: nn.Module, images: Images) -> None:
    """Checks that heads can be put on a model and that it takes images of this size.

    It may be trained with a head that can be folded afterwards, such as ``cosine``: the joint
    classifier of what is trained is linear.

    Raises:
        UsageError: If not.
    """
    classifier = get_head(model)
    if isinstance(classifier, Head):
        try:
            classifier.fold()
        except UsageError as error:
            raise UsageError(
                f"the representation stage cannot train a {classifier.kind!r} head: leave head= "
                f"out of model.options ({error})"
            ) from error
    try:
        with torch.inference_mode():
            weight = next(model.parameters())
            model.eval()(weight.new_zeros(1, 3, *images.size))
    except (RuntimeError, AssertionError) as error:
        size = (3, *images.size)
        raise UsageError(f"the model does not take images of size {size}: {error}") from error
