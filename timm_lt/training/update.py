"""One update of the weights: mixing, loss, gradients, limits, and their moving average."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.models import model_parameters
from timm.utils import ModelEmaV3
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

from timm_lt.features.tap import FeatureTap
from timm_lt.heads import get_heads, limit_norms
from timm_lt.training.mixing import Mixing, check_names, create_mixup
from timm_lt.utils.checks import UsageError, check_choice, check_number

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
