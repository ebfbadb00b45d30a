"""Solvers on cached features, read in blocks: minibatch SGD and L-BFGS."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.features import Features
from timm_lt.heads import Head, LWSHead
from timm_lt.heads.linear import BATCH_SIZE
from timm_lt.samplers import create_sampler
from timm_lt.utils.checks import UsageError

# Largest number of elements per block, and smallest number of rows (small products are slow).
ENTRIES, ROWS = 2**22, 64
MAX_ITERATIONS = 100
# Logits of lws are cached up to this size.
MAX_BYTES = 4 * 2**30

Backward = Callable[[Tensor], None]


def row_blocks(values: Tensor, width: int) -> Iterator[Tensor]:
    """Yields features in order, a block at a time, as float32 on the CPU.

    Args:
        values: Features (N, D) of any floating type, maybe memory-mapped.
        width: Output columns per row, used to choose the block size.
    """
    step = max(ENTRIES // max(width, values.shape[1]), ROWS)
    for start in range(0, len(values), step):
        yield values[start : start + step].detach().to("cpu", torch.float32)


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Returns some rows of features as float32 on the CPU."""
    # Several times as fast as fancy indexing.
    return values.detach().index_select(0, rows.to(values.device)).to("cpu", torch.float32)


def cosine_decay(step: int, steps: int) -> float:
    """Returns the factor of the learning rate at an update, from 1 to 0."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def descend(
    name: str,
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]],
    steps: int,
    backward: Callable[[int], None],
    *,
    lr: float,
    decay: Callable[[int, int], float] = cosine_decay,
    after: Callable[[int], None] | None = None,
    fused: bool = True,
    **options: Any,
) -> None:
    """Trains the parameters of a head by SGD with momentum 0.9.

    Args:
        name: Name of the head, for the message.
        parameters: Parameters, or parameter groups.
        steps: Number of updates.
        backward: Sets the gradients of an update, given its number.
        lr: Initial learning rate.
        decay: Factor of the learning rate from the update and the number of updates.
        after: Called after each update with the number of updates so far.
        fused: Option of ``torch.optim.SGD``, whose fused kernels round differently.
        **options: Further options of it.

    Raises:
        UsageError: If the weights do not stay finite.
    """
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, fused=fused, **options)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * decay(step, steps)
        optimizer.zero_grad()
        backward(step)
        optimizer.step()
        if after is not None:
            after(step + 1)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if not all(parameter.isfinite().all() for parameter in trained):
        raise UsageError(
            f"the weights of head {name!r} became infinite or NaN; choose an lr below {lr:g}"
        )


def train_head(
    head: Head,
    features: Features,
    *,
    seed: int,
    steps: int,
    lr: float,
    weight_decay: float = 5e-4,
    batch_size: int = BATCH_SIZE,
    sampler: str = "class_balanced",
    sampler_options: Mapping[str, Any] | None = None,
    loss: nn.Module | None = None,
    backward: Backward | None = None,
    undecayed: Sequence[nn.Parameter] = (),
    **options: Any,
) -> None:
    """Trains the trainable parameters of a head, in place, by SGD on batches of features.

    The settings are those of Kang et al.: momentum 0.9, weight decay 5e-4 on all trained parameters
    (also the scales of lws), batch size 512, cosine learning rate to zero.

    Args:
        head: The head.
        features: Training features, values (N, D).
        seed: Seed of the sampler.
        steps: Number of updates.
        lr: Initial learning rate.
        weight_decay: Weight decay.
        batch_size: Rows per update.
        sampler: One of :func:`timm_lt.list_samplers`; the whole training is one of its epochs.
        sampler_options: Options of the sampler.
        loss: One of ``timm_lt.create_loss``; None is cross-entropy. Its epochs have N rows.
        backward: Sets the gradients for the rows of given indices; None differentiates the loss.
        undecayed: Parameters that are trained without weight decay, of the head or others.
        **options: Options of :func:`descend`.
    """
    free = {id(parameter) for parameter in undecayed}
    decayed = [p for p in head.parameters() if p.requires_grad and id(p) not in free]
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if undecayed:
        groups.append({"params": list(undecayed), "weight_decay": 0.0})
    loss = nn.CrossEntropyLoss() if loss is None else loss
    gradients = backward or _differentiate(head, features, loss)
    draws, rows = steps * batch_size, len(features)
    drawn = create_sampler(
        sampler, features.targets, num_samples=draws, seed=seed, **dict(sampler_options or {})
    )
    batches = drawn.epoch_indices().view(steps, batch_size)
    set_epoch = getattr(loss, "set_epoch", None)

    def update(step: int) -> None:
        epoch, before = step * batch_size // rows, (step - 1) * batch_size // rows
        if set_epoch is not None and epoch > before:
            set_epoch(epoch, epochs_of(draws, rows))
        gradients(batches[step])

    head.train()
    descend(head.kind, groups, steps, update, lr=lr, weight_decay=weight_decay, **options)


def epochs_of(draws: int, rows: int) -> int:
    """Returns the number of epochs of so many draws; the last may be incomplete."""
    return -(-draws // rows)


def _differentiate(head: Head, features: Features, loss: nn.Module) -> Backward:
    """Returns a function that computes the gradients of a loss of the head's logits."""
    more = getattr(loss, "needs_features", False)

    def backward(rows: Tensor) -> None:
        values = take_rows(features.values, rows)
        loss(head(values), features.targets[rows], *([values] if more else [])).backward()

    return backward


def scale_gradient(head: LWSHead, features: Features) -> Backward:
    """Returns a function that computes the gradient of the cross-entropy in the scales of lws.

    With ``u`` the logits of the frozen classifier, the head's are ``s ∘ u`` (``u`` includes the
    bias) or ``s ∘ u + b``; the gradient is the mean of ``(p − y) ∘ u``. The logits ``u`` are
    computed once, or, if they need more than 4 GiB, for each batch.
    """
    weight, bias = head.weight, head.bias
    inside, outside = (bias, None) if head.scale_bias else (None, bias)
    num_classes = head.out_features

    def compute(values: Tensor) -> Tensor:
        return F.linear(values, weight, inside)

    cached: Tensor | None = None
    if 4 * len(features) * num_classes <= MAX_BYTES:
        with torch.no_grad():
            blocks = row_blocks(features.values, num_classes)
            cached = torch.cat([compute(block) for block in blocks])

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


def class_balanced_shares(counts: Tensor) -> Tensor:
    """Returns weights of rows by their class, (C,), with the expectation of balanced sampling."""
    return (1.0 / (len(counts) * counts.double())).float()


def solve_linear(
    weight: Tensor,
    bias: Tensor | None,
    features: Features,
    *,
    weight_decay: float,
    shares: Tensor,
    offset: Tensor | None = None,
    max_iterations: int = MAX_ITERATIONS,
) -> tuple[Tensor, Tensor | None]:
    """Minimises the cross-entropy of a linear classifier by L-BFGS.

    The objective ``Σ_i share_i ℓ(W x_i + b + offset, y_i) + weight_decay / 2 · ‖W‖²`` is convex, so
    the result is deterministic. Features are read in blocks and may be larger than memory.

    Args:
        weight: Start, (C, D).
        bias: Start, (C,), without weight decay; None for a classifier without bias.
        features: Training features, values (N, D), with rows of every class.
        weight_decay: >= 0; at 0 separable classes have no minimum.
        shares: Weight of a row by its class, (C,); over all rows they add up to 1.
        offset: Added to the logits, (C,), or None. With ``log n_c`` and equal shares the loss is
            balanced softmax (Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition,
            NeurIPS 2020, equation 4, https://arxiv.org/abs/2007.10740).
        max_iterations: Largest number of iterations.

    Returns:
        Weight (C, D) and bias (C,) or None.
    """
    num_classes = len(weight)
    # Scale features to root mean square 1: with tiny features the first steps would be lost in
    # rounding and look like convergence.
    unit = _root_mean_square(features.values) or 1.0
    weight = (weight.detach() * unit).requires_grad_()
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight] if bias is None else [weight, bias],
        max_iter=max_iterations,
        history_size=10,
        # The initial gradient of a class's weights is of the order of 1 / C.
        tolerance_grad=min(1e-5, 1e-3 / num_classes),
        tolerance_change=1e-8,
        line_search_fn="strong_wolfe",
    )

    def objective() -> float:
        optimizer.zero_grad()
        total = 0.0
        start = 0
        for block in row_blocks(features.values, num_classes):
            targets = features.targets[start : start + len(block)]
            start += len(block)
            logits = F.linear(block, weight / unit, bias)
            if offset is not None:
                logits = logits + offset
            losses = F.cross_entropy(logits, targets, reduction="none")
            value = (shares[targets] * losses).sum()
            # Per block, so that the graph holds one block.
            value.backward()
            total += float(value.detach())
        if weight_decay > 0:
            decay = weight_decay / 2 / unit**2 * weight.square().sum()
            decay.backward()
            total += float(decay.detach())
        return total

    optimizer.step(objective)
    return weight.detach() / unit, None if bias is None else bias.detach()


def _root_mean_square(values: Tensor) -> float:
    # In float64, the square of a float32 neither overflows nor underflows.
    total = sum(float(block.double().square().sum()) for block in row_blocks(values, 1))
    return float((total / values.numel()) ** 0.5)
