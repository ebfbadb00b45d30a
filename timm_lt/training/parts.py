"""Parts of the training on images: mixup, optimiser, learning rates, losses and seeds."""

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.data import Mixup
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.optim import Optimizer

from timm_lt.training.state import EpochRecord
from timm_lt.utils.checks import UsageError, check_choice, check_number, user_errors
from timm_lt.utils.longtail import ClassCounts, check_class_counts

ClipMode = Literal["norm", "value", "agc"]
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
# Batches between two checks of the losses, each of which waits for the device.
CHECK_EVERY = 50
T = TypeVar("T")


def create_part(owner: str, create: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Calls a factory of timm with the options of a user; ``owner`` names the part in messages."""
    for name, value in options.items():
        interval = RANGES.get(f"{owner}.{name}")
        if interval is not None and value is not None:
            check_number(f"{owner}.{name}", value, interval)
    refusals = (TypeError, ValueError, AssertionError, ImportError, LookupError, RuntimeError)
    with user_errors(owner, UsageError, *refusals):
        return create(*arguments, **options)


class Remix(Mixup):
    """Mixup whose labels go to the rarer class where the class counts differ much.

    An image ``λ x_i + (1 − λ) x_j`` of classes with n_i and n_j images has the label ``λ_y y_i + (1
    − λ_y) y_j``, where::

        λ_y = 0  if n_i / n_j >= κ and λ < τ
              1  if n_i / n_j <= 1 / κ and 1 − λ < τ
              λ  otherwise

    so an image in which the frequent class has a share below τ belongs to the rare one alone.

    Args:
        counts: Training images per class, (C,), each >= 1.
        remix_kappa: κ, >= 1; 3 in the paper.
        remix_tau: τ, in [0, 1]; 0.5 in the paper, and 0 is mixup.
        **options: Arguments of ``timm.data.Mixup``: mixup, cutmix or both, without label smoothing.

    References:
        Chou, Chang, Pan, Wei, Juan. Remix: Rebalanced mixup. ECCV 2020 Workshops,
        https://arxiv.org/abs/2007.03943
    """

    def __init__(
        self,
        counts: ClassCounts,
        *,
        remix_kappa: float = 3.0,
        remix_tau: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self.class_counts = check_class_counts(counts)
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


def create_mixup(
    options: Mapping[str, Any] | None, class_counts: Tensor, batch: int
) -> Mixup | None:
    """Creates mixup, cutmix or remix for batches of ``batch`` images; None without an alpha."""
    given = {name: value for name, value in (options or {}).items() if value is not None}
    check_choice("mixup.mode", given.get("mode", "batch"), ("batch", "pair", "elem"))
    sizes = {"label_smoothing": 0.0, "num_classes": len(class_counts)}
    is_remix = not given.keys().isdisjoint(("remix_kappa", "remix_tau"))
    create: Callable[..., Mixup] = partial(Remix, class_counts) if is_remix else Mixup
    # Created also if it does not mix, to find wrong options.
    mixup = create_part("mixup", create, **sizes, **{"mixup_alpha": 0.0} | given)
    if not any(given.get(name) for name in ("mixup_alpha", "cutmix_alpha", "cutmix_minmax")):
        if is_remix:
            raise UsageError("mixup.remix_* has no effect without mixup_alpha or cutmix_alpha")
        return None
    if batch % 2:
        raise UsageError(f"mixup needs an even number of images in a process's batch, not {batch}")
    return mixup


def create_optimizer(model: nn.Module, options: Mapping[str, Any]) -> Optimizer:
    """Creates an optimiser from arguments of ``timm.optim.create_optimizer_v2``."""
    names = tuple(map(str, list_optimizers()))
    check_choice("optimizer", str(options["opt"]).removeprefix("lookahead_"), names)
    return create_part("optimizer", create_optimizer_v2, model, **options)


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
    """Losses of an epoch, kept on the device between two checks that they are finite."""

    def __init__(self, accelerator: Accelerator, owner: str, advice: str) -> None:
        self._accelerator, self._message = accelerator, f"of {owner}: {advice}"
        self._values: list[Tensor] = []
        self._seen: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        """Adds the loss of the next batch; UsageError if a loss is not finite."""
        self._values.append(value)
        if len(self._values) == CHECK_EVERY:
            self._flush()

    def finish(self, model: nn.Module) -> float:
        """Returns the mean over all batches and processes; checks the weights too."""
        self._flush()
        tensors = [*model.parameters(), *model.buffers()]
        # Under FSDP each process has a part of each tensor.
        parts = [t.to_local() if hasattr(t, "to_local") else t.detach() for t in tensors]
        broken = torch.stack([~part.isfinite().all() for part in parts]).any().float()
        if self._accelerator.reduce(broken, "sum") > 0:
            raise UsageError(f"weights are no longer finite after the last update {self._message}")
        return float(torch.cat(self._seen).mean())

    def _flush(self) -> None:
        if not self._values:
            return
        values = self._accelerator.reduce(torch.stack(self._values), "mean").double().cpu()
        wrong = torch.nonzero(~values.isfinite()).flatten().tolist()
        if wrong:
            batch = sum(map(len, self._seen)) + wrong[0]
            update = batch // self._accelerator.gradient_accumulation_steps + 1
            value = float(values[wrong[0]])
            raise UsageError(f"the loss became {value} in update {update} {self._message}")
        self._seen.append(values)
        self._values = []


class Schedule:
    """timm's scheduler over epochs with cooldown, warm-up (update by update) and cycles."""

    def __init__(
        self, optimizer: Optimizer, options: Mapping[str, Any], epochs: int, updates_per_epoch: int
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
        self._updates, self._optimizer = updates_per_epoch, optimizer
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
        if self.plateau:
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
    """Seeds Python, NumPy and torch from the run's seed, the epoch and the process."""
    words = np.random.SeedSequence([seed, epoch, process]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))
    np.random.seed(int(words[0] & np.uint64(0xFFFFFFFF)))  # noqa: NPY002
    random.seed(int(words[0]))
