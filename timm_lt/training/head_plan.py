"""What is checked before a head is trained on images, and how long it is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from timm_lt.checkpoint import is_statistic
from timm_lt.data.images import Images
from timm_lt.heads import Head, check_head_options, get_head, head_option_names
from timm_lt.heads.lengths import BATCH_SIZE, CRT_LENGTH, LWS_LENGTH
from timm_lt.samplers import check_sampler
from timm_lt.training.checks import check_batch_size
from timm_lt.utils.checks import (
    UsageError,
    check_choice,
    check_integer,
    check_number,
    unknown_name,
)
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
