"""Accuracy on validation while training goes on."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from timm_lt.data.images import Batch
from timm_lt.data.reading import UNREADABLE, loaded
from timm_lt.metrics import shot_accuracy
from timm_lt.training.history import SHOT_GROUPS

EVAL_BATCH_SIZE = 256


def validate(
    model: nn.Module, loader: Iterable[Batch], accelerator: Accelerator, counts: Tensor
) -> dict[str, float | None]:
    """Returns the accuracy over all images and per shot group; every image counts once.

    Args:
        model: Left in evaluation mode.
        loader: Prepared by the accelerator.
        accelerator: Gathers from all processes.
        counts: Training images per class (C,).
    """
    model.eval()
    preds, targets = [], []
    with torch.inference_mode(), accelerator.autocast():
        for images, labels in loaded(loader):
            logits = model(images.to(memory_format=torch.channels_last))
            both = accelerator.gather_for_metrics((logits.argmax(1), labels))
            preds.append(both[0].cpu())
            targets.append(both[1].cpu())
    labels = torch.cat(targets)
    readable = labels != UNREADABLE
    labels = labels[readable]
    report = shot_accuracy(torch.cat(preds)[readable], labels, counts)
    return {name: getattr(report, name) for name in ("all", *SHOT_GROUPS)}
