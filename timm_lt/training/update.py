"""One update of the weights: mixed images, loss, gradients and learning rate."""

import inspect
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NoReturn, TypeVar, get_args

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast
from rich.progress import Progress
from timm.data import Mixup
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, list_optimizers
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

ClipMode = Literal["norm", "value", "agc"]
KAPPA, TAU = "remix_kappa", "remix_tau"
PLATEAU = "plateau"
SCHEDULERS = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", PLATEAU)
# Values that timm takes without complaint, or refuses only in the middle of training.
RANGES = {
    "optimizer.lr": "(0, inf)",
    "optimizer.weight_decay": "[0, inf)",
    "optimizer.momentum": "[0, 1)",
    "optimizer.layer_decay": "(0, 1]",
    "mixup.mixup_alpha": "[0, inf)",
    "mixup.cutmix_alpha": "[0, inf)",
    "mixup.prob": "[0, 1]",
    "mixup.switch_prob": "[0, 1]",
    "ema.decay": "[0, 1)",
}
# Batches between two looks at the losses, each of which waits for the device.
LOOK_EVERY = 50
T = TypeVar("T")


def create_part(owner: str, create: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Calls a factory of timm with the options of a user.

    Args:
        owner: Name of the part, for the message.
        create: Class or function.
        *arguments: Other arguments.
        **options: Options of the user.

    Raises:
        UsageError: If an option is unknown or out of range, or the factory refuses it.
    """
    parameters = inspect.signature(create).parameters
    for name, value in options.items():
        if name not in parameters and "kwargs" not in parameters:
            raise unknown_name(f"option of {owner}:", name, list(parameters))
        interval = RANGES.get(f"{owner}.{name}")
        if interval is not None and value is not None:
            check_number(f"{owner}.{name}", value, interval)
    try:
        return create(*arguments, **options)
    except (TypeError, ValueError, AssertionError, ImportError, LookupError, RuntimeError) as error:
        raise UsageError(f"{owner}: {error}") from error


class Remix(Mixup):
    """Mixup whose labels go to the rarer class where the class counts differ much.

    An image ``λ x_i + (1 − λ) x_j`` of classes with n_i and n_j images has the label ``λ_y y_i + (1
    − λ_y) y_j``, where::

        λ_y = 0  if n_i / n_j >= κ and λ < τ
              1  if n_i / n_j <= 1 / κ and 1 − λ < τ
              λ  otherwise

    so an image in which the frequent class has a share below τ belongs to the rare one alone.

    Args:
        class_counts: Training images per class, (C,), each >= 1.
        remix_kappa: κ, >= 1; 3 in the paper.
        remix_tau: τ, in [0, 1]; 0.5 in the paper, and 0 is mixup.
        **options: Arguments of ``timm.data.Mixup``: mixup, cutmix or both, without label smoothing.

    References:
        Chou, Chang, Pan, Wei, Juan. Remix: Rebalanced mixup. ECCV 2020 Workshops,
        https://arxiv.org/abs/2007.03943
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        remix_kappa: float = 3.0,
        remix_tau: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self.class_counts = check_class_counts(class_counts)
        self.kappa = check_number("mixup.remix_kappa", remix_kappa, "[1, inf)")
        self.tau = check_number("mixup.remix_tau", remix_tau, "[0, 1]")

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes images (B, 3, H, W), in place, and labels (B,) to targets (B, C)."""
        images, soft = super().__call__(images, targets)  # type: ignore[no-untyped-call]
        # timm mixes image i from the beginning with image i from the end.
        own, other = targets[:, None], targets.flip(0)[:, None]
        share = soft.gather(1, own)
        counts = self.class_counts.to(targets.device, share.dtype)
        ratio = counts[own] / counts[other]
        share = torch.where((ratio >= self.kappa) & (share < self.tau), 0.0, share)
        share = torch.where((ratio <= 1 / self.kappa) & (1 - share < self.tau), 1.0, share)
        mixed = torch.zeros_like(soft).scatter_(1, own, share)
        return images, mixed.scatter_add_(1, other, 1 - share)


def mixes(options: Mapping[str, Any]) -> bool:
    """Returns whether options of ``timm.data.Mixup`` mix any images."""
    return any(options.get(name) for name in ("mixup_alpha", "cutmix_alpha", "cutmix_minmax"))


def create_mixup(
    options: Mapping[str, Any] | None, class_counts: Tensor, batch: int
) -> Mixup | None:
    """Creates timm's mixup and cutmix, or remix; None without an alpha.

    Args:
        options: Arguments of ``timm.data.Mixup``, except label smoothing, which is an option of the
            loss; ``remix_kappa``, κ, chooses :class:`Remix`, and ``remix_tau`` is its τ.
        class_counts: Training images per class, (C,); targets become (B, C).
        batch: Images that are mixed with each other.

    Raises:
        UsageError: If an option is unknown or out of range, or the batch is odd.
    """
    given = {name: value for name, value in (options or {}).items() if value is not None}
    check_choice("mixup.mode", given.get("mode", "batch"), ("batch", "pair", "elem"))
    given = {"mixup_alpha": 0.0} | given
    remix = {name: given.pop(name) for name in (KAPPA, TAU) if name in given}
    sizes = {"label_smoothing": 0.0, "num_classes": len(class_counts)}
    # Created also if it does not mix, to find wrong options.
    mixup = create_part("mixup", Mixup, **sizes, **given)
    if not mixes(given):
        return None
    if batch % 2:
        raise UsageError(f"mixup needs an even number of images in a process's batch, not {batch}")
    return Remix(class_counts, **remix, **sizes, **given) if KAPPA in remix else mixup


def create_ema(options: Mapping[str, Any] | None, model: nn.Module) -> ModelEmaV3 | None:
    """Creates timm's moving average of all weights; None without options.

    Args:
        options: Arguments of ``timm.utils.ModelEmaV3``.
        model: The model before it is prepared.

    Raises:
        UsageError: If an option is unknown or out of range.
    """
    return create_part("ema", ModelEmaV3, model, **options) if options else None


def create_optimizer(model: nn.Module, options: Mapping[str, Any]) -> Optimizer:
    """Creates an optimiser of timm.

    Args:
        model: The model before it is prepared.
        options: Arguments of ``timm.optim.create_optimizer_v2``.

    Raises:
        UsageError: If the optimiser or an option is unknown, or a value is out of range.
    """
    names = tuple(map(str, list_optimizers()))
    check_choice("optimizer", str(options["opt"]).removeprefix("lookahead_"), names)
    return create_part("optimizer", create_optimizer_v2, model, **options)


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
        clip_grad: Threshold of the gradient, > 0, or None.
        clip_mode: The threshold applies to the ``"norm"`` of all gradients, to each ``"value"``,
            or (``"agc"``) to the norm of each unit relative to that of its weights.
        max_norm: Largest length of the weights of a class, > 0, or None.

    Raises:
        UsageError: If a value is out of range, or the loss does not take mixed targets.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        loss: nn.Module,
        accelerator: Accelerator,
        *,
        mixup: Mixup | None = None,
        ema: ModelEmaV3 | None = None,
        clip_grad: float | None = None,
        clip_mode: ClipMode = "norm",
        max_norm: float | None = None,
    ) -> None:
        check_choice("clip_mode", clip_mode, get_args(ClipMode))
        for name, limit in {"clip_grad": clip_grad, "max_norm": max_norm}.items():
            if limit is not None:
                check_number(name, limit, "(0, inf)")
        if mixup is not None and not getattr(loss, "takes_soft_targets", False):
            raise UsageError(f"{type(loss).__name__} takes no soft targets, which mixup makes")
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.accelerator, self.mixup, self.ema = accelerator, mixup, ema
        self.clip_grad, self.clip_mode, self.max_norm = clip_grad, clip_mode, max_norm
        self._second_order = getattr(optimizer.optimizer, "is_second_order", False)
        self._raw = accelerator.unwrap_model(model, keep_torch_compile=False)
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
                for classifier in get_heads(self._raw).values():
                    limit_norms(classifier, self.max_norm)
            if self.accelerator.sync_gradients and self.ema is not None:
                self.ema.update(self._raw, step=step)
        return value.detach()

    def close(self) -> None:
        """Removes the hook from the model."""
        if self._tap is not None:
            self._tap.remove()

    def _clip(self, threshold: float) -> None:
        if self.clip_mode == "norm":
            self.accelerator.clip_grad_norm_(self.model.parameters(), threshold)
        elif self.clip_mode == "value":
            self.accelerator.clip_grad_value_(self.model.parameters(), threshold)
        else:
            self.accelerator.unscale_gradients()
            # Without the classifier, as in Brock et al. (2021).
            adaptive_clip_grad(model_parameters(self._raw, exclude_head=True), threshold)


@contextmanager
def means_over_processes(loss: nn.Module) -> Iterator[None]:
    """Lets the parts of a loss that have ``across_processes`` take means over all processes."""
    parts = [module for module in loss.modules() if hasattr(module, "across_processes")]
    try:
        for part in parts:
            part.across_processes = True  # type: ignore[assignment]
        yield
    finally:
        for part in parts:
            part.across_processes = False  # type: ignore[assignment]


class Losses:
    """Losses of a pass over the training images, kept on the device between two looks.

    Args:
        owner: Epoch or head that is trained, for the message.
        advice: Remedies for numbers that are not finite, for the message.
        per_update: Batches per update.
        accelerator: Gathers from all processes, so that all of them stop.
    """

    def __init__(self, owner: str, advice: str, per_update: int, accelerator: Accelerator) -> None:
        self._owner, self._advice, self._per_update = owner, advice, per_update
        self._accelerator = accelerator
        self._values: list[Tensor] = []
        self._seen: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        """Adds the loss of the next batch.

        Raises:
            UsageError: If a loss is not finite.
        """
        self._values.append(value)
        if len(self._values) == LOOK_EVERY:
            self._look()

    def finish(self, model: nn.Module) -> float:
        """Returns the mean over all batches and processes.

        Also checks the weights after the last update, whose effect no loss has shown yet.

        Raises:
            UsageError: On every process, if a loss or a weight of one of them is not finite.
        """
        self._look()
        tensors = [*model.parameters(), *model.buffers()]
        # Under FSDP each process has a part of each tensor.
        parts = [t.to_local() if hasattr(t, "to_local") else t.detach() for t in tensors]
        broken = torch.stack([~part.isfinite().all() for part in parts]).any().float()
        if self._accelerator.reduce(broken, "sum") > 0:
            self._stop("weights are no longer finite after the last update")
        return float(torch.cat(self._seen).mean())

    def _look(self) -> None:
        if not self._values:
            return
        values = self._accelerator.reduce(torch.stack(self._values), "mean").double().cpu()
        first = sum(map(len, self._seen))
        self._seen.append(values)
        self._values = []
        wrong = torch.nonzero(~values.isfinite()).flatten()
        if len(wrong):
            update = (first + int(wrong[0])) // self._per_update + 1
            self._stop(f"the loss became {float(values[wrong[0]])} in update {update}")

    def _stop(self, problem: str) -> NoReturn:
        raise UsageError(f"{problem} of {self._owner}: {self._advice}")


class Schedule:
    """timm's scheduler over a number of epochs; plateau also has a warm-up update by update.

    Args:
        optimizer: Optimiser whose learning rate it sets.
        options: Arguments of ``timm.scheduler.create_scheduler_v2``.
        epochs: Total length, including cooldown, warm-up and cycles.
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
        given = dict(options)
        check_choice("scheduler", given.get("sched", "cosine"), SCHEDULERS)
        self._warmup = given.get("warmup_epochs", 0)
        check_number("scheduler.warmup_epochs", self._warmup, f"[0, {epochs}]")
        self.plateau = given.get("sched") == PLATEAU
        if self.plateau:
            given.pop("warmup_epochs", None)
            self._warmup_lr = given.pop("warmup_lr", 1e-5)
        given |= {"step_on_epochs": self.plateau, "updates_per_epoch": updates_per_epoch}
        self._updates = updates_per_epoch
        self._optimizer = optimizer
        self._scheduler = _scheduler_of_length(optimizer, given, epochs)

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
        """Passes the accuracy of an epoch to plateau."""
        if self.plateau and record.val and record.epoch > self._warmup:
            self._scheduler.step(record.epoch, record.score)

    def replay(self, history: Sequence[EpochRecord]) -> None:
        """Brings plateau, whose state depends on the accuracies, to the end of a history."""
        if not self.plateau:
            return
        for group, base in self._bases():
            group["lr"] = base
        for record in history:
            self.after_epoch(record)

    def _bases(self) -> list[tuple[dict[str, Any], float]]:
        groups = self._optimizer.param_groups
        return [(group, group["initial_lr"] * group.get("lr_scale", 1.0)) for group in groups]


def _scheduler_of_length(optimizer: Optimizer, options: dict[str, Any], epochs: int) -> Any:  # noqa: ANN401
    """Creates the scheduler whose length, with everything that timm adds to it, is ``epochs``."""
    with warnings.catch_warnings():
        # timm warns that it does not save the state of plateau, which is replayed here.
        warnings.simplefilter("ignore", FutureWarning)
        for main in range(epochs, 0, -1):
            scheduler, total = create_part(
                "scheduler", create_scheduler_v2, optimizer, num_epochs=main, **options
            )
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
    skips: bool,
    bar: Progress,
) -> float:
    """Makes the updates of one pass over the training images.

    Args:
        batches: Batches of a training loader, whole updates.
        update: Takes each batch.
        schedule: Sets the learning rate before each update.
        losses: Collects the loss of each batch.
        first: Number of earlier updates.
        skips: Whether images that cannot be read are left out.
        bar: Advances by one for each update.

    Returns:
        The mean loss over the batches of all processes.

    Raises:
        UsageError: If an image cannot be read, or a loss or a weight is not finite.
    """
    steps = update.accelerator.gradient_accumulation_steps
    # After a pass that was cut short, accelerate still counts the batches of its last update.
    update.accelerator.step = 0
    for number, batch in enumerate(loaded(batches)):
        step = first + number // steps
        if number % steps == 0:
            schedule.before_update(step)
        images, targets = without_unreadable(*batch) if skips else batch
        losses.add(update(images, targets, step))
        if (number + 1) % steps == 0:
            advance(bar)
    return losses.finish(update.model)


def cpu_copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a copy of weights on the CPU."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }


def share_buffers(buffers: Iterable[Tensor], accelerator: Accelerator) -> None:
    """Gives every process the main one's buffers, such as the statistics of batch norm."""
    if accelerator.num_processes > 1:
        with torch.no_grad():
            for buffer in buffers:
                buffer.copy_(broadcast(buffer))


def seed_epoch(seed: int, epoch: int, process: int) -> None:
    """Seeds Python, NumPy and torch as a function of the run's seed, the epoch and the process.

    Dropout, mixup and the like draw from them; each process has its own images.
    """
    words = np.random.SeedSequence([seed, epoch, process]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))
    np.random.seed(int(words[0] & np.uint64(0xFFFFFFFF)))  # noqa: NPY002
    random.seed(int(words[0]))
