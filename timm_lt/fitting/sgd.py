"""Training a head by minibatch SGD on cached features, with the settings of Kang et al."""

import contextlib
import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.features import Features
from timm_lt.fitting.rows import row_blocks, scratch_matrix, take_rows
from timm_lt.heads import Head, LWSHead, limit_norms
from timm_lt.heads.lengths import BATCH_SIZE
from timm_lt.samplers import create_sampler
from timm_lt.utils.checks import UsageError, check_integer, check_number

# How often during training validation is looked at, if it is.
LOOKS = 10

Backward = Callable[[Tensor], None]
# An objective, and what decides between equals.
Score = tuple[float, float]


@dataclass(frozen=True)
class BestStep:
    """The step after which a head was best on validation.

    Attributes:
        step: Number of updates.
        score: Value of the objective then.
        compared: (updates, value) of every look.
    """

    step: int
    score: float
    compared: list[tuple[int, float]]


def check_length(options: dict[str, Any]) -> None:
    """Refuses a length in steps and in epochs at once."""
    if options.get("steps") is not None and options.get("epochs") is not None:
        raise UsageError("steps and epochs both say how long to train: give one of them")


def train_head(
    head: Head,
    features: Features,
    *,
    seed: int,
    steps: int,
    lr: float,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    max_norm: float | None = None,
    batch_size: int = BATCH_SIZE,
    sampler: str = "class_balanced",
    sampler_options: Mapping[str, Any] | None = None,
    loss: nn.Module | None = None,
    decay_bias: bool = True,
    backward: Backward | None = None,
    score: Callable[[], Score] | None = None,
) -> BestStep | None:
    """Trains what is trainable in a head by SGD on batches of features.

    The settings of Kang et al.: momentum 0.9, weight decay 5e-4 on all that is trained (the scales
    of lws too), batch 512, learning rate falling to zero along a cosine. They train 10 epochs of
    ImageNet-LT; on small data an epoch is a handful of steps, so the length is given in steps.

    Args:
        head: The head; trained in place.
        features: Training features, values (N, D).
        seed: Seed of the sampler.
        steps: Number of updates, >= 1.
        lr: Learning rate at the start, > 0.
        weight_decay: >= 0.
        momentum: In [0, 1).
        max_norm: Largest length of a class's weights after an update, > 0; None does not limit it.
        batch_size: Rows per update, >= 1.
        sampler: How rows are drawn, one of :func:`timm_lt.list_samplers`, over all draws of the
            training as one epoch.
        sampler_options: Its options.
        loss: Of the head's logits, one of ``timm_lt.create_loss``; None is cross-entropy. It hears
            of epochs of N rows each.
        decay_bias: The bias decays, too.
        backward: Sets the gradients for some rows, given their indices; None differentiates the
            loss.
        score: Looked at after each tenth of the training; the head keeps the state of the highest
            value, the first such. None keeps the last state.

    Returns:
        Where the score was best, None without one.

    Raises:
        UsageError: If a number is out of range, or the weights do not stay finite.
    """
    check_integer("steps", steps, minimum=1)
    check_integer("batch_size", batch_size, minimum=1)
    check_number("lr", lr, "(0, inf)")
    check_number("weight_decay", weight_decay, "[0, inf)")
    check_number("momentum", momentum, "[0, 1)")
    trained = [p for p in head.parameters() if p.requires_grad]
    free = [p for p in trained if p is head.bias and not decay_bias]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if not any(p is other for other in free)]},
        *([{"params": free, "weight_decay": 0.0}] if free else []),
    ]
    optimizer = torch.optim.SGD(
        groups, lr, momentum=momentum, weight_decay=weight_decay, fused=True
    )
    loss = nn.CrossEntropyLoss() if loss is None else loss
    if backward is None:
        backward = _differentiate(head, features, loss)
    drawn = create_sampler(
        sampler,
        features.targets,
        num_samples=steps * batch_size,
        seed=seed,
        **dict(sampler_options or {}),
    )
    epochs = _Epochs(loss, steps * batch_size, len(features))
    best = None if score is None else _Best(head, score, steps)
    head.train()
    for step, batch in enumerate(drawn.epoch_indices().view(steps, batch_size)):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        epochs.begin(step * batch_size)
        backward(batch)
        optimizer.step()
        if max_norm is not None:
            limit_norms(head, max_norm)
        if best is not None:
            best.after(step + 1)
    if not all(parameter.isfinite().all() for parameter in trained):
        raise UsageError(
            f"head {head.kind!r} did not stay finite while it was trained: take a lower lr than "
            f"{lr:g}"
        )
    return None if best is None else best.restore()


def epochs_of(draws: int, rows: int) -> int:
    """Returns how many passes over the rows so many draws are, the last maybe cut short."""
    return -(-draws // rows)


class _Best:
    """Keeps the state of a head that scores highest."""

    def __init__(self, head: Head, score: Callable[[], Score], steps: int) -> None:
        self.head, self.score = head, score
        self.looks = {max(steps * look // LOOKS, 1) for look in range(1, LOOKS + 1)}
        self.compared: list[tuple[int, float]] = []
        self.best: tuple[Score, int, dict[str, Tensor]] | None = None

    def after(self, step: int) -> None:
        """Looks at the head after some updates, if it is time."""
        if step not in self.looks:
            return
        self.head.eval()
        score = self.score()
        self.head.train()
        self.compared.append((step, score[0]))
        if self.best is None or score > self.best[0]:
            self.best = score, step, copy.deepcopy(self.head.state_dict())

    def restore(self) -> BestStep:
        """Gives the head its best state."""
        assert self.best is not None
        score, step, state = self.best
        self.head.load_state_dict(state)
        return BestStep(step, score[0], self.compared)


class _Epochs:
    """Tells a loss that has a schedule which pass over the rows begins."""

    def __init__(self, loss: nn.Module, draws: int, rows: int) -> None:
        self.set_epoch = getattr(loss, "set_epoch", None)
        self.rows, self.number = rows, epochs_of(draws, rows)
        self.last = -1

    def begin(self, drawn: int) -> None:
        """Hears how many rows were drawn before the batch that begins."""
        epoch = drawn // self.rows
        if self.set_epoch is not None and epoch > self.last:
            self.set_epoch(epoch, self.number)
        self.last = epoch


def _differentiate(head: Head, features: Features, loss: nn.Module) -> Backward:
    """Returns the derivative of the loss of a head's logits."""
    more = getattr(loss, "needs_features", False)

    def backward(rows: Tensor) -> None:
        values = take_rows(features.values, rows)
        loss(head(values), features.targets[rows], *([values] if more else [])).backward()

    return backward


def scale_gradient(head: LWSHead, features: Features) -> Backward:
    """Returns the derivative of the mean cross-entropy in the scales of an lws head.

    With ``u`` the logits of the frozen classifier, those of the head are ``s ∘ u`` (and ``u`` has
    the bias) or ``s ∘ u + b``; the gradient is the mean of ``(p − y) ∘ u``. The logits ``u`` of all
    rows are computed once; more than 4 GiB of them go to a temporary file, and only where there is
    no room for it are they computed when they are drawn.
    """
    weight, bias = head.weight, head.bias
    inside, outside = (bias, None) if head.scale_bias else (None, bias)
    num_classes = head.out_features

    def compute(values: Tensor) -> Tensor:
        return F.linear(values, weight, inside)

    cached: Tensor | None = None
    with contextlib.suppress(OSError), torch.no_grad():
        cached = scratch_matrix(len(features), num_classes)
        start = 0
        for block in row_blocks(features.values, num_classes):
            cached[start : start + len(block)] = compute(block)
            start += len(block)

    @torch.no_grad()
    def backward(rows: Tensor) -> None:
        frozen = (
            compute(take_rows(features.values, rows)) if cached is None else take_rows(cached, rows)
        )
        logits = frozen * head.scale
        if outside is not None:
            logits += outside
        wrong = logits.softmax(1)
        wrong[torch.arange(len(rows)), features.targets[rows]] -= 1
        head.scale.grad = wrong.mul_(frozen).mean(0)

    return backward
