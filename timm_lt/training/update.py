"""One update of the weights: mixing, loss, gradients, limits, and their moving average.

How the images of a batch are mixed with each other: timm's mixup and cutmix, and remix.

The learning rate, update by update.
"""

import inspect
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast
from rich.progress import Progress
from timm.data import Mixup
from timm.models import model_parameters
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.optim import Optimizer

from timm_lt.data.decode import without_unreadable
from timm_lt.data.images import Batch
from timm_lt.data.loader import loaded
from timm_lt.features.extract import FeatureTap
from timm_lt.heads import get_heads, limit_norms
from timm_lt.training.history import EpochRecord
from timm_lt.utils.checks import UsageError, check_choice, check_number, unknown_name
from timm_lt.utils.console import advance
from timm_lt.utils.longtail import ClassCounts, check_class_counts

KAPPA, TAU = "remix_kappa", "remix_tau"


class Remix:
    """Mixup whose labels go to the rarer class where the counts of the two differ much.

    An image ``λ x_i + (1 − λ) x_j`` of classes with n_i and n_j images has the label ``λ_y y_i + (1
    − λ_y) y_j``, where::

        λ_y = 0  if n_i / n_j >= κ and λ < τ
              1  if n_i / n_j <= 1 / κ and 1 − λ < τ
              λ  otherwise

    so an image of which the frequent class has a part below τ belongs to the rare one alone.

    Args:
        mixup: timm's, of mixup, cutmix or both, without label smoothing.
        class_counts: Training images per class, (C,), each >= 1.
        kappa: κ, >= 1; 3 in the paper.
        tau: τ, in [0, 1]; 0.5 in the paper, and 0 is mixup.

    References:
        Chou, Chang, Pan, Wei, Juan. Remix: Rebalanced mixup. ECCV 2020 Workshops,
        https://arxiv.org/abs/2007.03943
    """

    def __init__(
        self, mixup: Mixup, class_counts: ClassCounts, *, kappa: float = 3.0, tau: float = 0.5
    ) -> None:
        self.mixup = mixup
        self.class_counts = check_class_counts(class_counts)
        self.kappa = check_number(f"mixup.{KAPPA}", kappa, "[1, inf)")
        self.tau = check_number(f"mixup.{TAU}", tau, "[0, 1]")

    @property
    def mixup_enabled(self) -> bool:
        """Whether images are mixed."""
        return self.mixup.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self.mixup.mixup_enabled = enabled

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes images (B, 3, H, W), in place, and labels (B,) to targets (B, C)."""
        images, soft = self.mixup(images, targets)
        # timm mixes an image with that at the same place from the end.
        own, other = targets[:, None], targets.flip(0)[:, None]
        share = soft.gather(1, own)
        counts = self.class_counts.to(targets.device, share.dtype)
        ratio = counts[own] / counts[other]
        share = torch.where((ratio >= self.kappa) & (share < self.tau), 0.0, share)
        share = torch.where((ratio <= 1 / self.kappa) & (1 - share < self.tau), 1.0, share)
        mixed = torch.zeros_like(soft).scatter_(1, own, share)
        return images, mixed.scatter_add_(1, other, 1 - share)


Mixing = Mixup | Remix


def create_mixup(
    options: Mapping[str, Any] | None, class_counts: Tensor, batch: int
) -> Mixing | None:
    """Creates timm's mixup and cutmix, or remix; None if neither has an alpha.

    Args:
        options: Arguments of ``timm.data.Mixup``, of which label smoothing is the loss's; and
            ``remix_kappa`` and ``remix_tau``, κ and τ of :class:`Remix`, which a κ chooses.
        class_counts: Training images per class, (C,); targets become (B, C).
        batch: Images that are mixed with each other.

    Raises:
        UsageError: If an option is unknown, out of range or without effect, or the batch is odd.
    """
    given = dict(options or {})
    kappa, tau = given.pop(KAPPA, None), given.pop(TAU, None)
    check_names("mixup", Mixup, given)
    for name in ("label_smoothing", "num_classes"):
        if name in given:
            raise UsageError(f"mixup.{name} is not set here: smoothing is an option of the loss")
    for name, interval in {
        "mixup_alpha": "[0, inf)",
        "cutmix_alpha": "[0, inf)",
        "prob": "[0, 1]",
        "switch_prob": "[0, 1]",
    }.items():
        check_number(f"mixup.{name}", given.get(name, 0.0), interval)
    check_choice("mixup.mode", given.get("mode", "batch"), ("batch", "pair", "elem"))
    mixup_alpha = given.setdefault("mixup_alpha", 0.0)
    mixes = bool(mixup_alpha or given.get("cutmix_alpha") or given.get("cutmix_minmax"))
    for name, value, needs in (
        (KAPPA, kappa, None if mixes else "mixup_alpha or cutmix_alpha"),
        (TAU, tau, KAPPA if kappa is None else None),
    ):
        if value is not None and needs is not None:
            raise UsageError(f"mixup.{name} has no effect without mixup.{needs}")
    if not mixes:
        return None
    if batch % 2:
        raise UsageError(f"mixup needs an even number of images in a process's batch, not {batch}")
    mixup = Mixup(label_smoothing=0.0, num_classes=len(class_counts), **given)
    if kappa is None:
        return mixup
    return Remix(mixup, class_counts, kappa=kappa, **({} if tau is None else {"tau": tau}))


def check_names(owner: str, part: type, options: Mapping[str, Any]) -> None:
    """Checks that the constructor of a class of timm takes some options."""
    names = list(inspect.signature(part).parameters)
    for name in options:
        if name not in names:
            raise unknown_name(f"option of {owner}:", name, names)


ClipMode = Literal["norm", "value", "agc"]
# Batches after which losses are looked at: it waits for the device.
LOOK_EVERY = 50


def create_ema(options: Mapping[str, Any] | None, model: nn.Module) -> ModelEmaV3 | None:
    """Creates timm's moving average of all weights; None without options or without a decay.

    Args:
        options: Arguments of ``timm.utils.ModelEmaV3``.
        model: The model before it is prepared.

    Raises:
        UsageError: If an option is unknown or the decay is out of range.
    """
    given = dict(options or {})
    check_names("ema", ModelEmaV3, given)
    if given.get("decay") is None:
        if given:
            raise UsageError(f"ema option {next(iter(given))} has no effect without ema.decay")
        return None
    check_number("ema.decay", given["decay"], "[0, 1)")
    return ModelEmaV3(model, **given)


def check_update(
    loss: nn.Module,
    *,
    batch: int,
    mixup: Mapping[str, Any] | None = None,
    ema: Mapping[str, Any] | None = None,
    clip_grad: float | None = None,
    clip_mode: str = "norm",
    max_norm: float | None = None,
) -> None:
    """Checks what an update is made of; see :func:`train_representation` for the arguments.

    Args:
        loss: What is minimised.
        batch: Images that a process takes at once.
        mixup: As there.
        ema: As there.
        clip_grad: As there.
        clip_mode: As there.
        max_norm: As there.

    Raises:
        UsageError: If an option is unknown or out of range, or the loss takes no mixed targets.
    """
    check_choice("clip_mode", clip_mode, get_args(ClipMode))
    if clip_grad is not None:
        check_number("clip_grad", clip_grad, "(0, inf)")
    elif clip_mode != "norm":
        raise UsageError(f"clip_mode {clip_mode} has no effect without clip_grad")
    if max_norm is not None:
        check_number("max_norm", max_norm, "(0, inf)")
    create_ema(ema, nn.Linear(1, 1))
    mixed = create_mixup(mixup, torch.ones(1, dtype=torch.int64), batch=batch) is not None
    if mixed and not getattr(loss, "takes_soft_targets", False):
        raise UsageError(f"{type(loss).__name__} takes no soft targets, which mixup makes")


class Update:
    """Computes gradients batch by batch and moves the weights when enough have been summed.

    Args:
        model: The prepared model.
        optimizer: The prepared optimiser.
        loss: Maps (logits, targets) to a scalar, or (logits, targets, features) if it has
            ``needs_features``.
        accelerator: Knows how many batches make an update.
        mixup: Mixes the images of a batch, or None.
        ema: Follows the weights, or None.
        clip_grad: Threshold of the gradient, or None.
        clip_mode: What the threshold is of: the norm of all, each value, or the norm of each unit
            relative to its weights (adaptive gradient clipping).
        max_norm: Largest length of a class's weights, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        loss: nn.Module,
        accelerator: Accelerator,
        *,
        mixup: Mixing | None = None,
        ema: ModelEmaV3 | None = None,
        clip_grad: float | None = None,
        clip_mode: ClipMode = "norm",
        max_norm: float | None = None,
    ) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.accelerator, self.mixup, self.ema = accelerator, mixup, ema
        self.clip_grad, self.clip_mode, self.max_norm = clip_grad, clip_mode, max_norm
        self._second_order = getattr(optimizer.optimizer, "is_second_order", False)
        self._raw = accelerator.unwrap_model(model, keep_torch_compile=False)
        self._limited = [] if max_norm is None else [*get_heads(self._raw).values()]
        self._tap = FeatureTap(self._raw) if getattr(loss, "needs_features", False) else None

    def __call__(self, images: Tensor, targets: Tensor, step: int) -> Tensor:
        """Takes one batch; returns its loss. ``step`` counts updates from the beginning."""
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        images = images.to(memory_format=torch.channels_last)
        with self.accelerator.accumulate(self.model):
            logits = self.model(images)
            features = () if self._tap is None else (self._tap.take(),)
            value: Tensor = self.loss(logits, targets, *features)
            options = {"create_graph": True} if self._second_order else {}
            self.accelerator.backward(value, **options)
            if self.accelerator.sync_gradients and self.clip_grad is not None:
                self._clip(self.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.accelerator.sync_gradients and self.max_norm is not None:
                for classifier in self._limited:
                    limit_norms(classifier, self.max_norm)
            if self.accelerator.sync_gradients and self.ema is not None:
                self.ema.update(self._raw, step=step)
        return value.detach()

    def close(self) -> None:
        """Leaves nothing of it on the model."""
        if self._tap is not None:
            self._tap.remove()

    def _clip(self, threshold: float) -> None:
        if self.clip_mode == "norm":
            self.accelerator.clip_grad_norm_(self.model.parameters(), threshold)
        elif self.clip_mode == "value":
            self.accelerator.clip_grad_value_(self.model.parameters(), threshold)
        else:
            self.accelerator.unscale_gradients()
            # As Brock et al. (2021) have it, the classifier is left alone.
            adaptive_clip_grad(model_parameters(self._raw, exclude_head=True), threshold)


@contextmanager
def taken_together(loss: nn.Module) -> Iterator[None]:
    """Lets the parts of a loss that take means over all processes do so in the block."""
    parts = [module for module in loss.modules() if hasattr(module, "across_processes")]
    try:
        for part in parts:
            part.across_processes = True  # type: ignore[assignment]
        yield
    finally:
        for part in parts:
            part.across_processes = False  # type: ignore[assignment]


class Losses:
    """The losses of an epoch, on the device until somebody looks.

    Args:
        epoch: 1-based, for the message.
        per_update: Batches per update.
        accelerator: Gathers from all processes, so that all of them stop.
        head: Name of the head that is trained by itself, for the message.
    """

    def __init__(
        self, epoch: int, per_update: int, accelerator: Accelerator, *, head: str | None = None
    ) -> None:
        self._epoch, self._per_update, self._accelerator = epoch, per_update, accelerator
        self._head = head
        self._values: list[Tensor] = []
        self._looked_at: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        """Takes the loss of the next batch.

        Raises:
            UsageError: If a loss is not finite.
        """
        self._values.append(value)
        if len(self._values) == LOOK_EVERY:
            self._look()

    def mean(self) -> float:
        """Returns the mean over the epoch and all processes."""
        self._look()
        return float(torch.cat(self._looked_at).mean())

    def _look(self) -> None:
        if not self._values:
            return
        values = self._accelerator.reduce(torch.stack(self._values), "mean").double().cpu()
        first = sum(map(len, self._looked_at))
        self._looked_at.append(values)
        self._values = []
        wrong = torch.nonzero(~values.isfinite()).flatten()
        if len(wrong):
            update = (first + int(wrong[0])) // self._per_update + 1
            value = float(values[wrong[0]])
            if self._head is not None:
                raise UsageError(
                    f"the loss of head {self._head!r} became {value} in update {update}: lower its "
                    "lr, or take mixed_precision no"
                )
            raise UsageError(
                f"the loss became {value} in epoch {self._epoch}, update {update}: "
                f"{_advice(self._epoch)}"
            )


def check_weights(model: nn.Module, epoch: int, accelerator: Accelerator) -> None:
    """Checks the weights after the last update of an epoch, whose effect no loss has shown yet.

    Raises:
        UsageError: On every process, if one of them has a weight that is not finite.
    """
    tensors = [*model.parameters(), *model.buffers()]
    # Under FSDP a process has a part of each.
    parts = [t.to_local() if hasattr(t, "to_local") else t.detach() for t in tensors]
    broken = torch.stack([~part.isfinite().all() for part in parts]).any().float()
    if accelerator.reduce(broken, "sum") > 0:
        raise UsageError(
            f"weights are no longer finite after the last update of epoch {epoch}: {_advice(epoch)}"
        )


def _advice(epoch: int) -> str:
    """Returns what to do about numbers that are not finite in an epoch, 1-based."""
    kept = f"; the state after epoch {epoch - 1} is kept" if epoch > 1 else ""
    return (
        "start again, in another folder or with --overwrite, with a lower learning rate "
        f"(optimizer.lr), clipped gradients (clip_grad) or mixed_precision no{kept}"
    )


def cpu_copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a copy of weights on the CPU."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }


STEPPED_PER_UPDATE = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")
PLATEAU = "plateau"
SCHEDULERS = (*STEPPED_PER_UPDATE, PLATEAU)


class Schedule:
    """timm's scheduler over a number of epochs; plateau has a warm-up by updates, as the others.

    Args:
        optimizer: Whose learning rate it sets.
        options: Arguments of ``timm.scheduler.create_scheduler_v2``.
        epochs: Length of the whole, with cooldown, warm-up and cycles.
        updates_per_epoch: At least 1.

    Raises:
        UsageError: If an option is unknown, or the schedule cannot have that length.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        options: Mapping[str, Any],
        *,
        epochs: int,
        updates_per_epoch: int,
    ) -> None:
        self.plateau = options.get("sched") == PLATEAU
        given = dict(options)
        if self.plateau:
            self._warmup = given.pop("warmup_epochs", 0)
            self._warmup_lr = given.pop("warmup_lr", 1e-5)
        given |= {"step_on_epochs": self.plateau, "updates_per_epoch": updates_per_epoch}
        self._updates = updates_per_epoch
        self._optimizer = optimizer
        try:
            self._scheduler = _create(optimizer, given, epochs)
        except UsageError:
            raise
        except (TypeError, ValueError, AssertionError, IndexError) as error:
            raise UsageError(f"scheduler: {error}") from error

    def before_update(self, step: int) -> None:
        """Sets the learning rate of an update, counted from the beginning of training."""
        if not self.plateau:
            self._scheduler.step_update(step)
            return
        last = self._warmup * self._updates
        for group, base in self._bases():
            if step < last:
                group["lr"] = self._warmup_lr + (base - self._warmup_lr) * step / last
            elif step == last:
                group["lr"] = base

    def after_epoch(self, record: EpochRecord) -> None:
        """Tells the scheduler called plateau how well an epoch did."""
        if self.plateau and record.val and record.epoch > self._warmup:
            self._scheduler.step(record.epoch, record.score)

    def replay(self, history: Sequence[EpochRecord]) -> None:
        """Brings a new schedule to where an interrupted one was, if it depends on more than t."""
        if not self.plateau:
            return
        for group, base in self._bases():
            group["lr"] = base
        for record in history:
            self.after_epoch(record)

    def _bases(self) -> list[tuple[dict[str, Any], float]]:
        groups = self._optimizer.param_groups
        return [(group, group["initial_lr"] * group.get("lr_scale", 1.0)) for group in groups]


def _create(optimizer: Optimizer, options: dict[str, Any], epochs: int) -> Any:  # noqa: ANN401
    """Creates the scheduler whose length, with all that timm adds to it, is ``epochs``."""
    with warnings.catch_warnings():
        # Of plateau, whose state timm does not save; here it is replayed.
        warnings.simplefilter("ignore", FutureWarning)
        for main in range(epochs, 0, -1):
            scheduler, total = create_scheduler_v2(optimizer, num_epochs=main, **options)
            if total == epochs:
                return scheduler
    raise UsageError(
        f"scheduler.options {options} make the schedule longer than {epochs} epochs: raise epochs, "
        "or shorten cooldown, warm-up or cycles"
    )


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
