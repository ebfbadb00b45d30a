"""The representation stage: training the backbone with its joint classifier, resumable exactly.

Every epoch is a function of (seed, epoch) and the state at its start: the sampler, the augmentation
and the global random state are seeded from these two. A run that is killed and resumed therefore
ends with the same weights, bit for bit on one CPU process with the same number of threads.
"""

import math
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from timm_lt.console import advance, log, progress
from timm_lt.data.images import ImageTensors, batches
from timm_lt.files import read_json, write_json
from timm_lt.heads import Head, get_head
from timm_lt.metrics import shot_accuracy
from timm_lt.registry import UsageError, check_choice, check_integer, check_number
from timm_lt.samplers import ClassSampler

HISTORY = "history.json"
# What reading a file that is not what accelerate wrote may raise.
DAMAGE = (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError)
SHOT_GROUPS = ("many_shot", "medium_shot", "few_shot")
EVAL_BATCH_SIZE = 256
SCHEDULERS = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch of training did.

    Attributes:
        epoch: 1-based.
        loss: Mean training loss over the epoch's updates.
        lr: Learning rate at its end.
        images_per_second: Training images per second, over all processes.
        seconds: Wall time of the epoch with its validation.
        val: Accuracy on validation, ``all`` and per shot group, fractions; empty without a
            validation split.
    """

    epoch: int
    loss: float
    lr: float
    images_per_second: float
    seconds: float
    val: dict[str, float | None]


class TrainingState:
    """The folder in which a run keeps what it needs to go on: one sub-folder per saved epoch.

    A sub-folder is written under another name and renamed when it is whole, so a kill at any moment
    leaves at least the last one.

    Args:
        folder: Where the state lies.
        accelerator: Saves and loads model, optimiser and scaler.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder = folder
        self.accelerator = accelerator

    def saved_epochs(self) -> list[int]:
        """Returns the epochs after which a whole state was saved, ascending."""
        names = [path.name for path in self.folder.glob("epoch_*")]
        return sorted(int(name[6:]) for name in names if re.fullmatch(r"epoch_\d+", name))

    def save(self, history: list[EpochRecord]) -> None:
        """Saves the state after the last epoch of the history and drops older ones."""
        epoch = history[-1].epoch
        partial = self.folder / f".partial_{epoch:04d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_json(partial / HISTORY, {"epochs": [asdict(record) for record in history]})
            for path in partial.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            partial.rename(self.folder / f"epoch_{epoch:04d}")
            for old in self.saved_epochs()[:-1]:
                shutil.rmtree(self.folder / f"epoch_{old:04d}")
        self.accelerator.wait_for_everyone()

    def load(self) -> list[EpochRecord]:
        """Loads the last saved state and returns its history; without one, nothing happens."""
        saved = self.saved_epochs()
        if not saved:
            return []
        folder = self.folder / f"epoch_{saved[-1]:04d}"
        try:
            history = [EpochRecord(**record) for record in read_json(folder / HISTORY)["epochs"]]
            self.accelerator.load_state(str(folder))
        except DAMAGE as error:
            raise UsageError(
                f"the training state {folder} is damaged ({error}); start again with --overwrite"
            ) from error
        return history


def train_representation(
    model: nn.Module,
    train: ImageTensors,
    sampler: ClassSampler,
    loss: nn.Module,
    *,
    accelerator: Accelerator,
    epochs: int,
    batch_size: int = 128,
    optimizer: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    val: ImageTensors | None = None,
    class_counts: Tensor | None = None,
    state: TrainingState | None = None,
    seed: int = 0,
) -> list[EpochRecord]:
    """Trains a model on all its parameters; the model is changed in place.

    Args:
        model: A timm model with its joint classifier.
        train: Training images.
        sampler: Order of the training images; it defines the length of an epoch.
        loss: Maps (logits (B, C), targets (B,)) to a scalar.
        accelerator: From :func:`create_accelerator`.
        epochs: Number of epochs, >= 1.
        batch_size: Images per update over all processes; a last batch that is not full is left
            out.
        optimizer: Arguments of ``timm.optim.create_optimizer_v2``, e.g. ``{"opt": "sgd", "lr":
            .1}``.
        scheduler: Arguments of ``timm.scheduler.create_scheduler_v2``; it steps at every update.
        val: Validation images, looked at after every epoch; nothing depends on them.
        class_counts: Training images per class (C,), for the shot groups of validation.
        state: Where to save after each epoch, and to go on from.
        seed: Seed of everything random beside the sampler and the augmentation.

    Returns:
        One record per epoch, including those of a resumed run.

    Raises:
        UsageError: If the batch size does not fit the data or the processes, or the loss is not
            finite.
    """
    check_batch_size(batch_size, len(sampler), accelerator.num_processes)
    arguments = {"opt": "sgd", "lr": 0.1, **(optimizer or {})}
    check_optimization(arguments, scheduler or {}, epochs)
    raw_optimizer = create_optimizer_v2(model, **arguments)
    updates = len(sampler) // batch_size
    schedule, _ = create_scheduler_v2(
        raw_optimizer,
        num_epochs=epochs,
        step_on_epochs=False,
        updates_per_epoch=updates,
        **dict(scheduler or {}),
    )
    loader = batches(train, batch_size, sampler, drop_last=True)
    model.to(memory_format=torch.channels_last)
    prepared, prepared_optimizer, loader = accelerator.prepare(model, raw_optimizer, loader)
    history = state.load() if state is not None else []
    if history:
        log.info("resumed after epoch %d of %d", history[-1].epoch, epochs)
    with progress("training", epochs * updates, unit="updates") as bar:
        advance(bar, len(history) * updates)
        for epoch in range(len(history), epochs):
            started = time.perf_counter()
            _seed_epoch(seed, epoch, accelerator.process_index)
            train.set_epoch(epoch)
            loader.set_epoch(epoch)
            prepared.train()
            losses = []
            for step, (images, targets) in enumerate(loader):
                schedule.step_update(epoch * updates + step)
                value = loss(prepared(images.to(memory_format=torch.channels_last)), targets)
                prepared_optimizer.zero_grad()
                accelerator.backward(value)
                prepared_optimizer.step()
                losses.append(value.detach())
                advance(bar)
            trained = time.perf_counter() - started
            record = EpochRecord(
                epoch=epoch + 1,
                loss=_mean_loss(losses, epoch, accelerator),
                lr=raw_optimizer.param_groups[0]["lr"],
                images_per_second=updates * batch_size / trained,
                val={} if val is None else _validate(prepared, val, accelerator, class_counts),
                seconds=time.perf_counter() - started,
            )
            history.append(record)
            _report_epoch(record, epochs, accelerator)
            if state is not None:
                state.save(history)
    return history


def _mean_loss(losses: list[Tensor], epoch: int, accelerator: Accelerator) -> float:
    loss = float(accelerator.reduce(torch.stack(losses).mean(), "mean"))
    if not math.isfinite(loss):
        raise UsageError(
            f"the loss became {loss} in epoch {epoch + 1}: lower the learning rate (optimizer.lr) "
            "or use mixed_precision=no"
        )
    return loss


def check_batch_size(batch_size: int, num_images: int, num_processes: int) -> None:
    """Checks that an epoch has a batch and that the processes can share one.

    Raises:
        UsageError: If not.
    """
    check_integer("batch_size", batch_size, minimum=1)
    if batch_size > num_images:
        raise UsageError(f"batch_size {batch_size} exceeds the {num_images} images of an epoch")
    if batch_size % num_processes:
        raise UsageError(
            f"batch_size {batch_size} counts images over all processes and must be a multiple of "
            f"their number, {num_processes}"
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
    check_choice("optimizer", optimizer["opt"], tuple(str(name) for name in list_optimizers()))
    check_number("optimizer.lr", optimizer["lr"], "(0, inf)")
    check_number("optimizer.weight_decay", optimizer.get("weight_decay", 0.0), "[0, inf)")
    check_number("optimizer.momentum", optimizer.get("momentum", 0.9), "[0, 1)")
    check_choice("scheduler", scheduler.get("sched", "cosine"), SCHEDULERS)
    check_number("scheduler.warmup_epochs", scheduler.get("warmup_epochs", 0), f"[0, {epochs}]")
    try:
        dummy = create_optimizer_v2([nn.Parameter(torch.zeros(1))], **optimizer)
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer: {error}") from error
    try:
        _, total = create_scheduler_v2(
            dummy, num_epochs=epochs, step_on_epochs=False, updates_per_epoch=1, **scheduler
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"scheduler: {error}") from error
    if total != epochs:
        raise UsageError(f"this scheduler takes {total} epochs; give epochs: {total}, or lower it")


def check_model(model: nn.Module, images: ImageTensors) -> None:
    """Checks that heads can be put on a model and that it takes images of this size.

    Raises:
        UsageError: If not.
    """
    classifier = get_head(model)
    if isinstance(classifier, Head) and classifier.kind != "linear":
        raise UsageError(
            "the representation stage trains the joint classifier: leave head= out of model.options"
        )
    try:
        with torch.inference_mode():
            model.eval()(images[0][0][None])
    except (RuntimeError, AssertionError) as error:
        size = tuple(images.images.shape[1:])
        raise UsageError(f"the model does not take images of size {size}: {error}") from error


def _seed_epoch(seed: int, epoch: int, process: int) -> None:
    # For dropout and the like in the model; each process has its own images, so its own numbers.
    words = np.random.SeedSequence([seed, epoch, process]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))


def _validate(
    model: nn.Module, val: ImageTensors, accelerator: Accelerator, class_counts: Tensor | None
) -> dict[str, float | None]:
    loader = accelerator.prepare_data_loader(batches(val, EVAL_BATCH_SIZE))
    model.eval()
    preds, targets = [], []
    with torch.inference_mode():
        for images, labels in loader:
            logits = model(images.to(memory_format=torch.channels_last))
            both = accelerator.gather_for_metrics((logits.argmax(1), labels))
            preds.append(both[0].cpu())
            targets.append(both[1].cpu())
    labels = torch.cat(targets)
    counts = torch.bincount(labels) if class_counts is None else class_counts
    report = shot_accuracy(torch.cat(preds), labels, counts)
    return {name: getattr(report, name) for name in ("all", *SHOT_GROUPS)}


def _report_epoch(record: EpochRecord, epochs: int, accelerator: Accelerator) -> None:
    line = f"epoch {record.epoch:3d}/{epochs}  loss {record.loss:.3f}  lr {record.lr:.4f}"
    if record.val:
        groups = [record.val[name] for name in SHOT_GROUPS]
        shown = " / ".join("-" if a is None else f"{100 * a:.1f}" for a in groups)
        line += f"  val {100 * (record.val['all'] or 0):.1f} % ({shown})"
    log.info("%s  %s images/s", line, f"{record.images_per_second:,.0f}")
    values = {"loss": record.loss, "lr": record.lr, "images_per_second": record.images_per_second}
    values |= {f"val/{name}": value for name, value in record.val.items() if value is not None}
    accelerator.log(values, step=record.epoch)


def representation_seconds(history: list[EpochRecord]) -> float:
    """Returns the wall time of training, over all its sessions."""
    return sum(record.seconds for record in history)
