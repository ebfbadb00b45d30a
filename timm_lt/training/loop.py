"""Representation stage: the backbone with its joint classifier, resumable exactly.

Every epoch is a function of (seed, epoch) and the state at its start: the sampler, the augmentation
and the global random state are seeded from these two. A run that is killed and resumed therefore
ends with the same weights, bit for bit on one CPU process with the same number of threads.
"""

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from rich.progress import Progress
from torch import Tensor, nn

from timm_lt.data.decode import UNREADABLE
from timm_lt.data.images import Batch, Images
from timm_lt.data.loader import NumberedSampler, loaded
from timm_lt.heads import Head, find_classifiers, get_head, get_heads
from timm_lt.metrics import shot_accuracy
from timm_lt.models.networks import takes_pairs
from timm_lt.samplers import ClassSampler
from timm_lt.training.frozen import BatchNorm, FrozenParts
from timm_lt.training.head import check_batch_size, check_images
from timm_lt.training.history import SHOT_GROUPS, EpochRecord, best_record, log_epoch
from timm_lt.training.state import BEST, EMA, TrainingState
from timm_lt.training.update import (
    KAPPA,
    TAU,
    ClipMode,
    Losses,
    Schedule,
    Update,
    cpu_copy,
    create_ema,
    create_mixup,
    create_optimizer,
    means_over_processes,
    mixes,
    run_updates,
    seed_epoch,
    share_buffers,
)
from timm_lt.utils.accelerator import kept_random_state
from timm_lt.utils.checks import UsageError, check_choice, check_integer
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
        max_norm: Largest length of the weights of a class in the classifier, > 0 (MaxNorm): longer
            ones are shortened to it after each update, as in Alshammari et al., Long-Tailed
            Recognition via Weight Balancing, CVPR 2022. None does not limit them.
        mixup: Arguments of ``timm.data.Mixup``; images are mixed if an alpha is above 0. With
            ``remix_kappa``, and ``remix_tau``, by :class:`~timm_lt.training.update.Remix`.
        mixup_off_epoch: Number of epochs after which images are no longer mixed; None is never.
        ema: Arguments of ``timm.utils.ModelEmaV3``; with a ``decay``, the averaged weights are
            validated and kept.
        validate_every: Epochs between two validations, >= 1; the last epoch is always validated.
        keep: Weights to keep: those of the epoch with the ``"best"`` overall accuracy on validation
            (the first of equals), or of the ``"last"`` epoch.
        trained: Paths of the modules to train beside the classifier, e.g. ``["layer4.2"]`` or
            ``["last_block"]``; None trains all. See :class:`~timm_lt.training.frozen.FrozenParts`.
        bn: Batch norm of the frozen modules: ``"frozen"`` keeps them in evaluation mode,
            ``"shift"`` in training mode, so their statistics move.
        seed: Seed of everything random but the sampler and the augmentation.

    Raises:
        UsageError: If a number is out of range, a choice is unknown, or an option has no effect.
    """

    epochs: int
    batch_size: int = 128
    optimizer: Mapping[str, Any] = field(default_factory=lambda: {"opt": "sgd", "lr": 0.1})
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    clip_grad: float | None = None
    clip_mode: ClipMode = "norm"
    max_norm: float | None = None
    mixup: Mapping[str, Any] | None = None
    mixup_off_epoch: int | None = None
    ema: Mapping[str, Any] | None = None
    validate_every: int = 1
    keep: Keep = "best"
    trained: Sequence[str] | None = None
    bn: BatchNorm = "frozen"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "validate_every"):
            check_integer(name, getattr(self, name), minimum=1)
        check_choice("keep", self.keep, get_args(Keep))
        mixup, ema = self.mixup or {}, self.ema or {}
        kappa = mixup.get(KAPPA) is not None
        for name, is_set, needed, is_there in (
            (
                f"clip_mode {self.clip_mode}",
                self.clip_mode != "norm",
                "clip_grad",
                self.clip_grad is not None,
            ),
            (f"mixup.{KAPPA}", kappa, "mixup.mixup_alpha or cutmix_alpha", mixes(mixup)),
            (f"mixup.{TAU}", mixup.get(TAU) is not None, f"mixup.{KAPPA}", kappa),
            (f"ema options {[*ema]}", bool(ema), "ema.decay", ema.get("decay") is not None),
        ):
            if is_set and not is_there:
                raise UsageError(f"{name} has no effect without {needed}")


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
            is unknown; the loss needs another classifier; only some of model, sampler and loss are
            bilateral; an image cannot be read; or the loss is not finite.
    """
    trainer = RepresentationTrainer(
        model,
        train,
        sampler,
        loss,
        options,
        accelerator=accelerator,
        val=val,
        class_counts=class_counts,
    )
    return trainer.run(state)


class RepresentationTrainer:
    """The parts of :func:`train_representation`, built and checked before anything is trained.

    Args and errors are those of the function.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Images,
        sampler: ClassSampler,
        loss: nn.Module,
        options: TrainingOptions,
        *,
        accelerator: Accelerator,
        val: Images | None = None,
        class_counts: ClassCounts | None = None,
    ) -> None:
        self.options, self.accelerator, self.loss = options, accelerator, loss
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        if self.sharded and (options.ema or options.max_norm or options.trained is not None):
            raise UsageError("ema, max_norm and trained do not work under FSDP: remove them")
        check_images(train)
        _check_loss(loss, model, sampler, options.epochs)
        unit = getattr(sampler, "unit", 1)
        batch = check_batch_size(options.batch_size, len(sampler), accelerator, unit)
        self.frozen = FrozenParts(model, options.trained, options.bn)
        self.frozen.try_batch(model, train.size, batch)
        width = getattr(model, "num_classes", 0)
        self.class_counts = (
            torch.bincount(train.labels, minlength=width)
            if class_counts is None
            else check_class_counts(class_counts, width or None)
        )
        mixup = create_mixup(options.mixup, self.class_counts, batch)
        self.ema = create_ema(options.ema, model)
        if self.ema is not None:
            self.ema.to(accelerator.device).to(memory_format=torch.channels_last)
        # Gradients of an update that was cut short would be added to those of the first.
        model.zero_grad()
        self.updates = len(sampler) // options.batch_size
        optimizer = create_optimizer(model, options.optimizer)
        self.schedule = Schedule(
            optimizer, options.scheduler, epochs=options.epochs, updates_per_epoch=self.updates
        )
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
        self.update = Update(
            self.model,
            self.optimizer,
            loss.to(accelerator.device),
            accelerator,
            mixup=mixup,
            ema=self.ema,
            clip_grad=options.clip_grad,
            clip_mode=options.clip_mode,
            max_norm=options.max_norm,
        )

    @kept_random_state()
    def run(self, state: TrainingState | None = None) -> Training:
        """Trains, and saves to a state after each epoch.

        Raises:
            UsageError: If an image cannot be read, the loss is not finite, or the state is that of
                another run or cannot be written.
        """
        if state is not None and len(state.accelerator._models) > 1:
            raise UsageError("an accelerator saves one run: make a new one for each")
        epochs, mixup = self.options.epochs, self.update.mixup
        off = epochs if self.options.mixup_off_epoch is None else self.options.mixup_off_epoch
        keeps_best = self.options.keep == "best"
        history = [] if state is None else self._resumed(state)
        best = self._saved_best(state, history) if keeps_best else None
        with (
            progress("training", epochs * self.updates, unit="updates") as bar,
            means_over_processes(self.loss),
            closing(self.update),
        ):
            advance(bar, len(history) * self.updates)
            for epoch in range(len(history), epochs):
                if mixup is not None:
                    mixup.mixup_enabled = epoch < off
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

    def _resumed(self, state: TrainingState) -> list[EpochRecord]:
        """Loads the last state, if there is one, and returns its history."""
        history = state.load()
        if history:
            if self.ema is not None:
                self.ema.module.load_state_dict(state.load_weights(EMA, history[-1].epoch))
            self.schedule.replay(history)
            log.info("resumed after epoch %d", history[-1].epoch)
        return history

    def _saved_best(
        self, state: TrainingState | None, history: list[EpochRecord]
    ) -> dict[str, Tensor] | None:
        if state is None or best_record(history) is None:
            return None
        return state.load_weights(BEST, history[-1].epoch)

    def _epoch(self, epoch: int, bar: Progress) -> EpochRecord:
        """Trains for one epoch, 0-based."""
        started = time.perf_counter()
        epochs, accelerator = self.options.epochs, self.accelerator
        if (set_epoch := getattr(self.loss, "set_epoch", None)) is not None:
            set_epoch(epoch, epochs)
        seed_epoch(self.options.seed, epoch, accelerator.process_index)
        self.loader.set_epoch(epoch)
        self.model.train()
        self.frozen.set_mode()
        kept = f"; the state after epoch {epoch} is kept" if epoch else ""
        advice = (
            "start again, in another folder or with --overwrite, with a lower learning rate "
            f"(optimizer.lr), clipped gradients (clip_grad) or mixed_precision no{kept}"
        )
        steps = accelerator.gradient_accumulation_steps
        losses = Losses(f"epoch {epoch + 1}", advice, steps, accelerator)
        first = epoch * self.updates
        loss = run_updates(
            self.loader, self.update, self.schedule, losses, first=first, skips=self.skips, bar=bar
        )
        averaged = [] if self.ema is None else self.ema.module.buffers()
        share_buffers([*self.model.buffers(), *averaged], accelerator)
        trained = time.perf_counter() - started
        validated = (epoch + 1) % self.options.validate_every == 0 or epoch + 1 == epochs
        record = EpochRecord(
            epoch=epoch + 1,
            loss=loss,
            lr=self.optimizer.param_groups[0]["lr"],
            images_per_second=self.updates * self.options.batch_size / trained,
            val=self._validate() if validated else {},
            seconds=time.perf_counter() - started,
        )
        self.schedule.after_epoch(record)
        return record

    def _validate(self) -> dict[str, float | None]:
        if self.val_loader is None:
            return {}
        model = self.model if self.ema is None else self.ema.module
        return validate(model, self.val_loader, self.accelerator, self.class_counts)

    def _weights(self) -> dict[str, Tensor]:
        """Returns a copy of the present weights, averaged if there is an average, on the CPU."""
        if self.ema is not None:
            return cpu_copy(self.ema.module.state_dict())
        if self.sharded:
            return cpu_copy(self.accelerator.get_state_dict(self.model))
        raw = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return cpu_copy(raw.state_dict())

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
    """Returns the accuracy over all images and per shot group; every image counts once.

    Args:
        model: Model; it is left in evaluation mode.
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
    report = shot_accuracy(torch.cat(preds)[readable], labels[readable], counts)
    return {name: getattr(report, name) for name in ("all", *SHOT_GROUPS)}


def start_classifier(loss: nn.Module, model: nn.Module, num_classes: int) -> None:
    """Gives a fresh classifier the bias that the loss starts with, if it has one."""
    initial_bias = getattr(loss, "initial_bias", None)
    value = None if initial_bias is None else initial_bias(num_classes)
    if value is not None:
        for classifier in find_classifiers(model).values():
            if classifier.bias is not None:
                nn.init.constant_(classifier.bias, value)


def check_model(model: nn.Module, images: Images) -> None:
    """Checks that a model takes images of this size, and that its head can be folded.

    A model may be trained with a head such as ``cosine``; its joint classifier is then folded into
    a linear one.

    Raises:
        UsageError: If not.
    """
    classifier, size = get_head(model), (3, *images.size)
    try:
        if isinstance(classifier, Head):
            classifier.fold()
        with torch.inference_mode():
            model.eval()(next(model.parameters()).new_zeros(1, *size))
    except UsageError as error:
        raise UsageError(
            f"the model cannot be trained with this head; remove head= ({error})"
        ) from error
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the model does not take images of size {size}: {error}") from error


def _check_loss(loss: nn.Module, model: nn.Module, sampler: ClassSampler, epochs: int) -> None:
    """Checks that a loss fits the model, the sampler and the number of epochs."""
    if (set_epoch := getattr(loss, "set_epoch", None)) is not None:
        set_epoch(0, epochs)
    check_classifier = getattr(loss, "check_classifier", None)
    # Only timm's models tell which module is the classifier.
    if check_classifier is not None and hasattr(model, "get_classifier"):
        for classifier in get_heads(model).values():
            check_classifier(classifier)
    bilateral = {
        "model": takes_pairs(model),
        "sampler": getattr(sampler, "unit", 1) > 1,
        "loss": getattr(loss, "takes_pairs", False),
    }
    if not any(bilateral.values()):
        return
    # Mixed logits are those of mixed features for a linear classifier only.
    bilateral["linear classifier"] = getattr(get_head(model), "kind", "linear") == "linear"
    missing = ", ".join(name for name, is_one in bilateral.items() if not is_one)
    if missing:
        raise UsageError(
            f"not bilateral: {missing}; BBN is trained with all of: a model lt_bbn_* (or from "
            "create_bilateral) with a linear classifier, sampler bilateral and loss bilateral"
        )
