"""What the loops over images share: a pass over the batches, the seeds, the buffers."""

import random
from collections.abc import Iterable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from rich.progress import Progress
from torch import Tensor

from timm_lt.data.images import Batch
from timm_lt.data.reading import loaded, without_unreadable
from timm_lt.training.schedule import Schedule
from timm_lt.training.update import Losses, Update
from timm_lt.utils.console import advance


def run_updates(
    batches: Iterable[Batch],
    update: Update,
    schedule: Schedule,
    losses: Losses,
    *,
    first: int,
    batches_per_update: int,
    skips: bool,
    bar: Progress,
) -> float:
    """Makes the updates of one pass over the training images.

    Args:
        batches: From a training loader, whole updates.
        update: Takes each batch.
        schedule: Sets the learning rate before each update.
        losses: Takes the loss of each batch.
        first: Updates that were made before.
        batches_per_update: At least 1.
        skips: Images that cannot be read are left out.
        bar: Advances by one for each update.

    Returns:
        The mean loss over the batches of all processes.

    Raises:
        UsageError: If an image cannot be read, or a loss is not finite.
    """
    # After a pass that was cut short, accelerate still counts the batches of its last update.
    update.accelerator.step = 0
    for number, batch in enumerate(loaded(batches)):
        step = first + number // batches_per_update
        if number % batches_per_update == 0:
            schedule.before_update(step)
        images, targets = without_unreadable(*batch) if skips else batch
        losses.add(update(images, targets, step))
        if (number + 1) % batches_per_update == 0:
            advance(bar)
    return losses.mean()


def share_buffers(buffers: Iterable[Tensor], accelerator: Accelerator) -> None:
    """Gives every process the main one's buffers, such as the statistics of batch norm."""
    if accelerator.num_processes == 1:
        return
    with torch.no_grad():
        for buffer in buffers:
            buffer.copy_(broadcast(buffer))


def seed_epoch(seed: int, epoch: int, process: int) -> None:
    """Seeds Python, NumPy and torch as a function of the run's seed, the epoch and the process."""
    # For dropout, mixup and the like; each process has its own images, so its own numbers.
    words = np.random.SeedSequence([seed, epoch, process]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))
    np.random.seed(int(words[0] & np.uint64(0xFFFFFFFF)))  # noqa: NPY002
    random.seed(int(words[0]))
