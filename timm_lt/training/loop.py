"""Representation stage: the backbone with its joint classifier, resumable exactly.

Every epoch is a function of (seed, epoch) and the state at its start: the sampler, the augmentation
and the global random state are seeded from these two. A run that is killed and resumed therefore
ends with the same weights, bit for bit on one CPU process with the same number of threads.
"""

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from rich.progress import Progress
from timm.models import model_parameters
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from timm_lt.data.decode import UNREADABLE, without_unreadable
from timm_lt.data.images import Batch, Images
from timm_lt.data.loader import NumberedSampler, loaded
from timm_lt.features.extract import FeatureTap
from timm_lt.heads import get_heads, limit_norms
from timm_lt.metrics import shot_accuracy
from timm_lt.samplers import ClassSampler
from timm_lt.training.parts import (
    BatchNorm,
    ClipMode,
    FrozenParts,
    Losses,
    Schedule,
    check_loss,
    cpu_copy,
    create_mixup,
    create_optimizer,
    create_part,
    means_over_processes,
    seed_epoch,
    share_buffers,
)
from timm_lt.training.state import (
    BEST,
    EMA,
    SHOT_GROUPS,
    EpochRecord,
    TrainingState,
    best_record,
    log_epoch,
)
from timm_lt.utils.accelerator import kept_random_state
from timm_lt.utils.checks import UsageError, check_fields
from timm_lt.utils.console import advance, log, progress
from timm_lt.utils.longtail import ClassCounts, check_class_counts

EVAL_BATCH_SIZE = 256
Keep = Literal["best", "last"]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Hyper-parameters of the representation stage.

    Args:
        epochs: Number of epochs, >= 1.
        batch_size: Images per update over all processes; the last batch of an epoch is dropped
            unless it is full.
        optimizer: Arguments of ``timm.optim.create_optimizer_v2``.
        scheduler: Arguments of ``timm.scheduler.create_scheduler_v2``. The scheduler steps at every
            update; ``plateau`` steps after every validation.
        clip_grad: Threshold of the gradient, > 0; None does not clip.
        clip_mode: The threshold applies to the ``"norm"`` of all gradients, to each ``"value"``,
            or (``"agc"``) to the norm of each unit relative to that of its weights.
        max_norm: Largest norm of a class's weights in the classifier after each update, > 0
            (MaxNorm), as in Alshammari et al., Long-Tailed Recognition via Weight Balancing, CVPR
            2022. None does not limit them.
        mixup: Arguments of ``timm.data.Mixup``; images are mixed if an alpha is above 0. With
            ``remix_kappa``, and ``remix_tau``, by :class:`~timm_lt.training.parts.Remix`.
        mixup_off_epoch: Epochs after which images are no longer mixed; None is never.
        ema: Arguments of ``timm.utils.ModelEmaV3``; with a ``decay``, the averaged weights are
            validated and kept.
        validate_every: Epochs between two validations, >= 1; the last epoch is always validated.
        keep: Weights to keep: of the ``"last"`` epoch, or of that with the ``"best"`` overall
            accuracy on validation (the first of equals).
        trained: Paths of the modules to train beside the classifier, e.g. ``["layer4.2"]`` or
            ``["last_block"]``; None trains all. See :class:`~timm_lt.training.parts.FrozenParts`.
        bn: Batch norm of the frozen modules: ``"frozen"`` keeps them in evaluation mode,
            ``"shift"`` in training mode, so their statistics move.
        seed: Seed of everything random but the sampler and the augmentation.

    Raises:
        UsageError: If a number is out of range, a choice is unknown, or an option has no effect.
    """

    epochs: Annotated[int, 1]
    batch_size: Annotated[int, 1] = 128
    optimizer: Mapping[str, Any] = field(default_factory=lambda: {"opt": "sgd", "lr": 0.1})
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    clip_grad: Annotated[float, "(0, inf)"] | None = None
    clip_mode: ClipMode = "norm"
    max_norm: Annotated[float, "(0, inf)"] | None = None
    mixup: Mapping[str, Any] | None = None
    mixup_off_epoch: int | None = None
    ema: Mapping[str, Any] | None = None
    validate_every: Annotated[int, 1] = 1
    keep: Keep = "best"
    trained: Sequence[str] | None = None
    bn: BatchNorm = "frozen"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.clip_mode != "norm" and self.clip_grad is None:
            raise UsageError(f"clip_mode {self.clip_mode} has no effect without clip_grad")
        if self.ema and self.ema.get("decay") is None:
            raise UsageError(f"ema options {[*self.ema]} has no effect without ema.decay")


@dataclass(frozen=True)
class Training:
    """Result of the representation stage.

    Attributes:
        model: The trained model, not wrapped for several processes.
        history: One record per epoch, including those before a restart.
        kept: The epoch whose weights the model has, 1-based.
    """

    model: nn.Module
    history: list[EpochRecord]
    kept: int


def train_representation(
    model: nn.Module,
    train: Images,
    sampler: ClassSampler,
    loss: nn.Module,
    options: TrainingOptions,
    *,
    accelerator: Accelerator,
    val: Images | None = None,
    class_counts: ClassCounts | None = None,
    state: TrainingState | None = None,
) -> Training:
    """Trains a model, on all its parameters or on those of some modules.

    Args:
        model: A timm model with its joint classifier; it is changed in place, except under FSDP.
        train: Training images.
        sampler: Order of the training images; it defines the length of an epoch.
        loss: Maps (logits (B, C), targets (B,)) to a scalar; with mixup, targets are (B, C). If it
            has ``needs_features``, it also takes the classifier's input (B, D). If it has
            ``set_epoch(epoch, epochs)``, that is called before each epoch.
        options: Hyper-parameters.
        accelerator: From :func:`~timm_lt.utils.accelerator.create_accelerator`, which also sets the
            number of batches over which the gradient of an update is summed.
        val: Validation images; without them the weights of the last epoch are kept.
        class_counts: Training images per class (C,), for the shot groups of validation; None counts
            the labels.
        state: Folder to save to after each epoch, and to continue from.

    Returns:
        The model with its history. The random states of Python, NumPy and torch are restored.

    Raises:
        UsageError: If the batch size does not fit the data or the processes; an option or a module
            is unknown; model, sampler and loss do not fit each other; an image cannot be read; or
            the loss is not finite.
    """
    trainer = RepresentationTrainer(
        model, train, sampler, loss, options, accelerator, val, class_counts
    )
    return trainer.run(state)


class RepresentationTrainer:
    """The parts of :func:`train_representation`, built and checked before anything is trained."""

    def __init__(
        self,
        model: nn.Module,
        train: Images,
        sampler: ClassSampler,
        loss: nn.Module,
        options: TrainingOptions,
        accelerator: Accelerator,
        val: Images | None = None,
        class_counts: ClassCounts | None = None,
    ) -> None:
        self.options, self.accelerator = options, accelerator
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        if self.sharded and (options.ema or options.max_norm or options.trained is not None):
            raise UsageError("ema, max_norm and trained do not work under FSDP: remove them")
        check_loss(loss, model, sampler, options.epochs)
        unit = getattr(sampler, "unit", 1)
        batch = share_of_batch(options.batch_size, len(sampler), accelerator, unit)
        self.frozen = FrozenParts(model, options.trained, options.bn)
        self.frozen.try_batch(model, train.size, batch)
        width = getattr(model, "num_classes", 0)
        counted = torch.bincount(train.labels, minlength=width)
        self.class_counts = check_class_counts(
            counted if class_counts is None else class_counts, width or None
        )
        self.mixup = create_mixup(options.mixup, self.class_counts, batch)
        if self.mixup is not None and not getattr(loss, "takes_soft_targets", False):
            raise UsageError(f"{type(loss).__name__} takes no soft targets, which mixup makes")
        self.ema: ModelEmaV3 | None = None
        if options.ema:
            self.ema = create_part("ema", ModelEmaV3, model, **options.ema)
            self.ema.to(accelerator.device).to(memory_format=torch.channels_last)
        # Gradients of an update that was cut short would be added to those of the first.
        model.zero_grad()
        self.updates = len(sampler) // options.batch_size
        optimizer = create_optimizer(model, options.optimizer)
        self.schedule = Schedule(optimizer, options.scheduler, options.epochs, self.updates)
        if self.schedule.plateau and val is None:
            raise UsageError("scheduler plateau needs a validation split")
        draws = NumberedSampler(sampler, len(train), self.updates * options.batch_size)
        self.loader = train.train_loader(batch * accelerator.num_processes, draws, accelerator)
        self.skips = train.unreadable == "skip"
        self.val_loader = None if val is None else val.eval_loader(EVAL_BATCH_SIZE, accelerator)
        # FSDP takes contiguous parameters only, and does not unwrap a model.
        self._unwrapped = copy.deepcopy(model) if self.sharded else None
        if not self.sharded:
            model.to(memory_format=torch.channels_last)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.loss = loss.to(accelerator.device)
        # timm's name for optimisers that need the graph of the gradient.
        second_order = getattr(self.optimizer.optimizer, "is_second_order", False)
        self._backward_options = {"create_graph": True} if second_order else {}
        self._raw = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._tap = FeatureTap(self._raw) if getattr(loss, "needs_features", False) else None

    @kept_random_state()
    def run(self, state: TrainingState | None = None) -> Training:
        """Trains, and saves to a state after each epoch; see :func:`train_representation`."""
        if state is not None and len(state.accelerator._models) > 1:
            raise UsageError("an accelerator saves one run: make a new one for each")
        epochs, keeps_best = self.options.epochs, self.options.keep == "best"
        history, best = ([], None) if state is None else self._resume(state)
        with ExitStack() as stack:
            bar = stack.enter_context(progress("training", epochs * self.updates, unit="updates"))
            stack.enter_context(means_over_processes(self.loss))
            if self._tap is not None:
                stack.callback(self._tap.hook.remove)
            advance(bar, len(history) * self.updates)
            for epoch in range(len(history), epochs):
                history.append(self._epoch(epoch, bar))
                log_epoch(history, epochs, self.accelerator)
                improved = keeps_best and best_record(history) is history[-1]
                if improved:
                    best = self._weights()
                if state is not None:
                    ema = None if self.ema is None else cpu_copy(self.ema.module.state_dict())
                    state.save(history, ema=ema, best=best if improved else None)
        chosen = best_record(history) if keeps_best else None
        model = self._finished(self._weights() if best is None else best)
        return Training(model, history, (chosen or history[-1]).epoch)

    def _resume(self, state: TrainingState) -> tuple[list[EpochRecord], dict[str, Tensor] | None]:
        """Loads the last state, if there is one; returns its history and the best weights."""
        history = state.load()
        if not history:
            return history, None
        epoch = history[-1].epoch
        if self.ema is not None:
            self.ema.module.load_state_dict(state.load_weights(EMA, epoch))
        self.schedule.replay(history)
        log.info("resumed after epoch %d", epoch)
        has_best = self.options.keep == "best" and best_record(history) is not None
        return history, state.load_weights(BEST, epoch) if has_best else None

    def _epoch(self, epoch: int, bar: Progress) -> EpochRecord:
        """Trains for one epoch, 0-based, and validates."""
        started, options = time.perf_counter(), self.options
        kept = f"; the state after epoch {epoch} is kept" if epoch else ""
        advice = (
            "start again, in another folder or with --overwrite, with a lower learning rate "
            f"(optimizer.lr), clipped gradients (clip_grad) or mixed_precision no{kept}"
        )
        loss = self.train_epoch(epoch, bar, f"epoch {epoch + 1}", advice)
        trained = time.perf_counter() - started
        due = (epoch + 1) % options.validate_every == 0 or epoch + 1 == options.epochs
        val: dict[str, float | None] = {}
        if due and self.val_loader is not None:
            model = self.model if self.ema is None else self.ema.module
            val = validate(model, self.val_loader, self.accelerator, self.class_counts)
        record = EpochRecord(
            epoch=epoch + 1,
            loss=loss,
            lr=self.optimizer.param_groups[0]["lr"],
            images_per_second=self.updates * options.batch_size / trained,
            val=val,
            seconds=time.perf_counter() - started,
        )
        self.schedule.after_epoch(record)
        return record

    def train_epoch(self, epoch: int, bar: Progress, owner: str, advice: str) -> float:
        """Trains for one epoch, 0-based; returns the mean loss. Errors have owner and advice."""
        options, accelerator = self.options, self.accelerator
        if (set_epoch := getattr(self.loss, "set_epoch", None)) is not None:
            set_epoch(epoch, options.epochs)
        if self.mixup is not None:
            off = options.mixup_off_epoch
            self.mixup.mixup_enabled = off is None or epoch < off
        seed_epoch(options.seed, epoch, accelerator.process_index)
        self.loader.set_epoch(epoch)
        self.model.train()
        self.frozen.set_mode()
        losses = Losses(accelerator, owner, advice)
        steps = accelerator.gradient_accumulation_steps
        # After an epoch that was cut short, accelerate still counts the batches of its last update.
        accelerator.step = 0
        for number, batch in enumerate(loaded(self.loader)):
            step = epoch * self.updates + number // steps
            if number % steps == 0:
                self.schedule.before_update(step)
            images, targets = without_unreadable(*batch) if self.skips else batch
            losses.add(self._take(images, targets, step))
            if (number + 1) % steps == 0:
                advance(bar)
        loss = losses.finish(self.model)
        averaged = [] if self.ema is None else self.ema.module.buffers()
        share_buffers([*self.model.buffers(), *averaged], accelerator)
        return loss

    def _take(self, images: Tensor, targets: Tensor, step: int) -> Tensor:
        """Takes one batch, moves the weights at the last of an update, and returns the loss."""
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        images = images.to(memory_format=torch.channels_last)
        accelerator, options = self.accelerator, self.options
        with accelerator.accumulate(self.model):
            logits = self.model(images)
            features = () if self._tap is None else (self._tap.take(),)
            value: Tensor = self.loss(logits, targets, *features)
            accelerator.backward(value, **self._backward_options)
            moves = accelerator.sync_gradients
            if moves and options.clip_grad is not None:
                self._clip(options.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if moves and options.max_norm is not None:
                for classifier in get_heads(self._raw).values():
                    limit_norms(classifier, options.max_norm)
            if moves and self.ema is not None:
                self.ema.update(self._raw, step=step)
        return value.detach()

    def _clip(self, threshold: float) -> None:
        mode = self.options.clip_mode
        if mode == "norm":
            # Also under FSDP, where each process has a part of each gradient.
            self.accelerator.clip_grad_norm_(self.model.parameters(), threshold)
            return
        self.accelerator.unscale_gradients()
        # agc leaves the classifier alone, as in Brock et al. (2021).
        parameters = model_parameters(self._raw, exclude_head=mode == "agc")
        dispatch_clip_grad(parameters, threshold, mode)

    def _weights(self) -> dict[str, Tensor]:
        """Returns a copy of the present weights, averaged if there is an average, on the CPU."""
        if self.ema is not None:
            return cpu_copy(self.ema.module.state_dict())
        if self.sharded:
            return cpu_copy(self.accelerator.get_state_dict(self.model))
        return cpu_copy(self._raw.state_dict())

    def _finished(self, weights: dict[str, Tensor]) -> nn.Module:
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
        self.frozen.thaw()
        return model


def validate(
    model: nn.Module, loader: Iterable[Batch], accelerator: Accelerator, counts: Tensor
) -> dict[str, float | None]:
    """Returns the accuracy over all images and per shot group; leaves the model in eval mode."""
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
    report = shot_accuracy(torch.cat(preds)[readable], labels[readable], counts)
    return {name: getattr(report, name) for name in ("all", *SHOT_GROUPS)}


def share_of_batch(batch_size: int, draws: int, accelerator: Accelerator, unit: int = 1) -> int:
    """Returns the images per process and batch; ``unit`` images stay together, 2 for BBN."""
    processes, steps = accelerator.num_processes, accelerator.gradient_accumulation_steps
    parts = processes * steps * unit
    if batch_size % parts or not 1 <= batch_size <= draws:
        raise UsageError(
            f"batch_size {batch_size} counts the images of an update over {processes} processes "
            f"with accumulation_steps {steps}: it must be a multiple of {parts} and at most "
            f"{draws}, the images of an epoch"
        )
    return int(batch_size // (processes * steps))
