"""The loop of the representation stage.

Every epoch is a function of (seed, epoch) and the state at its start: the sampler, the augmentation
and the global random state are seeded from these two. A run that is killed and resumed therefore
ends with the same weights, bit for bit on one CPU process with the same number of threads.

What the loops over images share: a pass over the batches, the seeds, the buffers.

Accuracy on validation while training goes on.
"""

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from rich.progress import Progress
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from timm_lt.data.decode import UNREADABLE
from timm_lt.data.images import Batch, Images
from timm_lt.data.loader import NumberedSampler, loaded
from timm_lt.metrics import shot_accuracy
from timm_lt.samplers import ClassSampler
from timm_lt.training.checks import (
    check_batch_size,
    check_classifier,
    check_optimization,
    check_pairs,
)
from timm_lt.training.frozen import FrozenParts, check_statistics, check_trained
from timm_lt.training.head import BatchNorm
from timm_lt.training.history import SHOT_GROUPS, EpochRecord, best_record, log_epoch
from timm_lt.training.state import BEST, EMA, TrainingState
from timm_lt.training.update import (
    ClipMode,
    Losses,
    Schedule,
    Update,
    check_update,
    check_weights,
    cpu_copy,
    create_ema,
    create_mixup,
    run_updates,
    seed_epoch,
    share_buffers,
    taken_together,
)
from timm_lt.utils.accelerator import kept_random_state
from timm_lt.utils.checks import UsageError, check_choice, check_integer
from timm_lt.utils.console import advance, log, progress
from timm_lt.utils.longtail import ClassCounts, check_class_counts

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


Keep = Literal["best", "last"]


@dataclass(frozen=True)
class Training:
    """What the representation stage leaves.

    Attributes:
        model: The trained model, not wrapped for several processes.
        history: One record per epoch, including those of a resumed run.
        kept: The epoch whose weights the model has, 1-based.
    """

    model: nn.Module
    history: list[EpochRecord]
    kept: int


@kept_random_state()
def train_representation(
    model: nn.Module,
    train: Images,
    sampler: ClassSampler,
    loss: nn.Module,
    *,
    accelerator: Accelerator,
    epochs: int,
    batch_size: int = 128,
    optimizer: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    clip_grad: float | None = None,
    clip_mode: ClipMode = "norm",
    max_norm: float | None = None,
    mixup: Mapping[str, Any] | None = None,
    mixup_off_epoch: int | None = None,
    ema: Mapping[str, Any] | None = None,
    val: Images | None = None,
    validate_every: int = 1,
    keep: Keep = "best",
    class_counts: ClassCounts | None = None,
    trained: Sequence[str] | None = None,
    bn: BatchNorm = "frozen",
    state: TrainingState | None = None,
    seed: int = 0,
) -> Training:
    """Trains a model, on all its parameters or on those of some modules.

    The global random states of Python, NumPy and torch are seeded at every epoch and stay so.

    Args:
        model: A timm model with its joint classifier; it is changed in place, except under FSDP.
        train: Training images.
        sampler: Order of the training images; it defines the length of an epoch.
        loss: Maps (logits (B, C), targets (B,)) to a scalar; with mixup, targets are (B, C). One
            with ``needs_features`` takes the classifier's input (B, D) behind them, and its
            ``set_epoch(epoch, epochs)``, if it has one, is called before each epoch.
        accelerator: From :func:`create_accelerator`, which also says over how many batches the
            gradient of an update is summed.
        epochs: Number of epochs, >= 1.
        batch_size: Images per update over all processes; a last batch that is not full is left
            out.
        optimizer: Arguments of ``timm.optim.create_optimizer_v2``, e.g. ``{"opt": "sgd", "lr":
            .1}``.
        scheduler: Arguments of ``timm.scheduler.create_scheduler_v2``; it steps at every update,
            the one called plateau after every validation.
        clip_grad: Threshold of the gradient, > 0; None does not clip.
        clip_mode: Of what: ``"norm"`` of all gradients, each ``"value"``, or ``"agc"``, the norm of
            each unit relative to that of its weights.
        max_norm: Largest length of a class's weights in the classifier, > 0 (MaxNorm): after each
            update, longer ones are shortened to it, as in Alshammari et al., Long-Tailed
            Recognition via Weight Balancing, CVPR 2022. None leaves them.
        mixup: Arguments of ``timm.data.Mixup``; without an alpha above 0, images are not mixed.
            With ``remix_kappa``, and ``remix_tau``, they are by
            :class:`~timm_lt.training.update.Remix`.
        mixup_off_epoch: Number of epochs after which images are no longer mixed; None is never.
        ema: Arguments of ``timm.utils.ModelEmaV3``; with a ``decay``, the averaged weights are what
            is validated and what goes on.
        val: Validation images.
        validate_every: Epochs from one validation to the next, >= 1; the last is always validated.
        keep: Whose weights go on: those of the ``"best"`` overall accuracy on validation (the first
            such epoch) or of the ``"last"`` epoch. Without ``val`` they are the last.
        class_counts: Training images per class (C,), for the shot groups of validation; None counts
            the labels.
        trained: Paths of the modules that are trained, e.g. ``["layer4.2"]`` or ``["last_block"]``,
            and the classifier always is; None trains all. See
            :class:`~timm_lt.training.frozen.FrozenParts`.
        bn: What the modules that are frozen then do: ``"frozen"`` has them in evaluation mode,
            ``"shift"`` in training mode, so that their batch-norm statistics move.
        state: Where to save after each epoch, and to go on from.
        seed: Seed of everything random beside the sampler and the augmentation.

    Raises:
        UsageError: If the batch size does not fit the data or the processes, an option or a module
            is unknown, the loss is for another classifier, an image cannot be read, the loss is not
            finite, or of model, sampler and loss some are bilateral and some not.
    """
    if not hasattr(train, "train_loader"):
        raise UsageError(
            f"train is a {type(train).__name__}, not ImageTensors or StoredImages of timm_lt.data"
        )
    if state is not None and state.accelerator._models:
        raise UsageError("an accelerator saves one run: make a new one for each")
    check_choice("keep", keep, get_args(Keep))
    check_trained(model, trained, bn)
    check_classifier(loss, model)
    parts = accelerator.num_processes * accelerator.gradient_accumulation_steps
    check_statistics(model, train.size, batch=batch_size // parts, trained=trained, bn=bn)
    check_integer("validate_every", validate_every, minimum=1)
    loop = _Loop(
        model,
        train,
        sampler,
        accelerator,
        epochs=epochs,
        batch_size=batch_size,
        optimizer={"opt": "sgd", "lr": 0.1} if optimizer is None else optimizer,
        scheduler=dict(scheduler or {}),
        ema=ema,
        val=val,
        class_counts=class_counts,
        frozen=None if trained is None else FrozenParts(model, trained, bn),
        seed=seed,
    )
    batch = loop.batch_size // accelerator.num_processes
    check_update(
        loss,
        batch=batch,
        mixup=mixup,
        ema=ema,
        clip_grad=clip_grad,
        clip_mode=clip_mode,
        max_norm=max_norm,
    )
    if max_norm is not None and loop.sharded:
        raise UsageError("max_norm does not work under FSDP: leave it out")
    check_pairs(model, sampler, loss, batch=batch)
    mixing = create_mixup(mixup, loop.class_counts, batch)
    update = Update(
        loop.model,
        loop.optimizer,
        loss.to(accelerator.device),
        accelerator,
        mixup=mixing,
        ema=loop.ema,
        clip_grad=clip_grad,
        clip_mode=clip_mode,
        max_norm=max_norm,
    )
    best: dict[str, Tensor] | None = None
    set_epoch = getattr(loss, "set_epoch", None)
    history = loop.resume(state)
    if state is not None and history and keep == "best":
        best = loop.saved_best(state, history)
    with (
        progress("training", epochs * loop.updates, unit="updates") as bar,
        taken_together(loss),
        closing(update),
    ):
        advance(bar, len(history) * loop.updates)
        for epoch in range(len(history), epochs):
            if mixing is not None and mixup_off_epoch is not None:
                mixing.mixup_enabled = epoch < mixup_off_epoch
            if set_epoch is not None:
                set_epoch(epoch, epochs)
            validated = (epoch + 1) % validate_every == 0 or epoch + 1 == epochs
            history.append(loop.epoch(epoch, update, bar, validated=validated))
            log_epoch(history, epochs, accelerator)
            improved = keep == "best" and best_record(history) is history[-1]
            if improved:
                best = loop.weights()
            if state is not None:
                averaged = None if loop.ema is None else cpu_copy(loop.ema.module.state_dict())
                state.save(history, ema=averaged, best=best if improved else None)
    chosen = best_record(history) if keep == "best" else None
    weights = loop.weights() if best is None else best
    return Training(loop.finish(weights), history, (chosen or history[-1]).epoch)


class _Loop:
    """What is prepared once and used in every epoch."""

    def __init__(
        self,
        model: nn.Module,
        train: Images,
        sampler: ClassSampler,
        accelerator: Accelerator,
        *,
        epochs: int,
        batch_size: int,
        optimizer: Mapping[str, Any],
        scheduler: dict[str, Any],
        ema: Mapping[str, Any] | None,
        val: Images | None,
        class_counts: ClassCounts | None,
        frozen: FrozenParts | None,
        seed: int,
    ) -> None:
        steps = accelerator.gradient_accumulation_steps
        check_batch_size(batch_size, len(sampler), accelerator.num_processes, steps)
        check_optimization(optimizer, scheduler, epochs)
        self.accelerator, self.seed, self.frozen = accelerator, seed, frozen
        self.skips = train.unreadable == "skip"
        width = getattr(model, "num_classes", 0)
        counted = torch.bincount(train.labels, minlength=width)
        self.class_counts = (
            counted if class_counts is None else check_class_counts(class_counts, width or None)
        )
        self.updates = len(sampler) // batch_size
        self.batch_size, self.batches_per_update = batch_size // steps, steps
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        # Wrapped by FSDP, a model cannot be unwrapped again.
        self._unwrapped = copy.deepcopy(model) if self.sharded else None
        if self.sharded and frozen is not None:
            raise UsageError("parts of a model are not trained under FSDP: leave trained out")
        self.ema = create_ema(ema, model)
        if self.ema is not None:
            if self.sharded:
                raise UsageError("ema.decay does not work under FSDP: leave it out")
            self.ema.to(accelerator.device).to(memory_format=torch.channels_last)
        # Of an update that was cut short, or of its owner: the first update would add to them.
        model.zero_grad()
        raw_optimizer = create_optimizer_v2(model, **optimizer)
        self.schedule = Schedule(
            raw_optimizer, scheduler, epochs=epochs, updates_per_epoch=self.updates
        )
        if self.schedule.plateau and val is None:
            raise UsageError("scheduler plateau needs a validation split")
        draws = NumberedSampler(sampler, len(train), self.updates * batch_size)
        self.loader = train.train_loader(self.batch_size, draws, accelerator)
        self.val_loader = None if val is None else val.eval_loader(EVAL_BATCH_SIZE, accelerator)
        if not self.sharded:
            # FSDP takes contiguous parameters only.
            model.to(memory_format=torch.channels_last)
        self.model, self.optimizer = accelerator.prepare(model, raw_optimizer)

    def resume(self, state: TrainingState | None) -> list[EpochRecord]:
        """Loads the last state, if there is one, and returns its history."""
        history = [] if state is None else state.load()
        if state is None or not history:
            return []
        if self.ema is not None:
            self.ema.module.load_state_dict(state.load_weights(EMA, history[-1].epoch))
        self.schedule.replay(history)
        log.info("resumed after epoch %d", history[-1].epoch)
        return history

    def saved_best(
        self, state: TrainingState, history: list[EpochRecord]
    ) -> dict[str, Tensor] | None:
        """Returns the best weights so far, if an epoch was validated."""
        found = best_record(history) is not None
        return state.load_weights(BEST, history[-1].epoch) if found else None

    def epoch(self, epoch: int, update: Update, bar: Progress, *, validated: bool) -> EpochRecord:
        """Trains for one epoch, 0-based."""
        started = time.perf_counter()
        seed_epoch(self.seed, epoch, self.accelerator.process_index)
        self.loader.set_epoch(epoch)
        self.model.train()
        if self.frozen is not None:
            self.frozen.set_mode()
        losses = Losses(epoch + 1, self.batches_per_update, self.accelerator)
        loss = run_updates(
            self.loader,
            update,
            self.schedule,
            losses,
            first=epoch * self.updates,
            batches_per_update=self.batches_per_update,
            skips=self.skips,
            bar=bar,
        )
        check_weights(self.model, epoch + 1, self.accelerator)
        averaged = [] if self.ema is None else self.ema.module.buffers()
        share_buffers([*self.model.buffers(), *averaged], self.accelerator)
        trained = time.perf_counter() - started
        record = EpochRecord(
            epoch=epoch + 1,
            loss=loss,
            lr=self.optimizer.param_groups[0]["lr"],
            images_per_second=self.updates * self.batch_size * self.batches_per_update / trained,
            val=self._validate() if validated else {},
            seconds=time.perf_counter() - started,
        )
        self.schedule.after_epoch(record)
        return record

    def weights(self) -> dict[str, Tensor]:
        """Returns a copy of the weights that would go on now, on the CPU."""
        if self.ema is not None:
            return cpu_copy(self.ema.module.state_dict())
        if self.sharded:
            return cpu_copy(self.accelerator.get_state_dict(self.model))
        raw = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return cpu_copy(raw.state_dict())

    def finish(self, weights: dict[str, Tensor]) -> nn.Module:
        """Returns the model, unwrapped, with these weights."""
        if self._unwrapped is not None:
            # Only the main process has them.
            weights = broadcast_object_list([weights])[0]
            model = self._unwrapped.to(self.accelerator.device)
        else:
            model = self.accelerator.unwrap_model(
                self.model, keep_fp32_wrapper=False, keep_torch_compile=False
            )
        model.load_state_dict(weights)
        if self.frozen is not None:
            self.frozen.thaw()
        return model

    def _validate(self) -> dict[str, float | None]:
        if self.val_loader is None:
            return {}
        model = self.model if self.ema is None else self.ema.module
        return validate(model, self.val_loader, self.accelerator, self.class_counts)
