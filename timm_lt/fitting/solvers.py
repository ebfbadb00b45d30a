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
    """Yields blocks of features (N, D) as float32 on the CPU; ``width`` is their outputs' width."""
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
    """Trains the parameters of head ``name`` by SGD with momentum 0.9.

    ``backward`` takes the number of an update, and ``after`` that of the updates so far.
    """
    # Fused kernels round differently.
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

    The settings are those of Kang et al. The whole training is one epoch of the sampler; an epoch
    of the loss has N rows. ``backward`` takes row indices and replaces the loss; ``undecayed`` may
    also be parameters outside the head; ``options`` are those of :func:`descend`.
    """
    free = {id(parameter) for parameter in undecayed}
    decayed = [p for p in head.parameters() if p.requires_grad and id(p) not in free]
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if undecayed:
        groups.append({"params": list(undecayed), "weight_decay": 0.0})
    gradients = backward or _differentiate(head, features, loss or nn.CrossEntropyLoss())
    draws, rows = steps * batch_size, len(features)
    drawn = create_sampler(
        sampler, features.targets, num_samples=draws, seed=seed, **dict(sampler_options or {})
    )
    batches = drawn.epoch_indices().view(steps, batch_size)
    set_epoch = getattr(loss, "set_epoch", None)

    def update(step: int) -> None:
        epoch, before = step * batch_size // rows, (step - 1) * batch_size // rows
        if set_epoch is not None and epoch > before:
            set_epoch(epoch, math.ceil(draws / rows))
        gradients(batches[step])

    head.train()
    descend(head.kind, groups, steps, update, lr=lr, weight_decay=weight_decay, **options)


def _differentiate(head: Head, features: Features, loss: nn.Module) -> Backward:
    """Returns a function that computes the gradients of a loss of the head's logits."""
    more = getattr(loss, "needs_features", False)

    def backward(rows: Tensor) -> None:
        values = take_rows(features.values, rows)
        loss(head(values), features.targets[rows], *([values] if more else [])).backward()

    return backward


def scale_gradient(head: LWSHead, features: Features) -> Backward:
    """Returns a function that computes the gradient of the cross-entropy in the scales of lws.

    It is the mean of ``(p − y) ∘ u``, where ``u`` are the logits of the frozen classifier; they are
    computed once, or, if they need more than 4 GiB, for each batch.
    """
    weight, bias = head.weight, head.bias
    inside, outside = (bias, None) if head.scale_bias else (None, bias)
    cached: Tensor | None = None
    if 4 * len(features) * head.out_features <= MAX_BYTES:
        with torch.no_grad():
            blocks = row_blocks(features.values, head.out_features)
            cached = torch.cat([F.linear(block, weight, inside) for block in blocks])

    @torch.no_grad()
    def backward(rows: Tensor) -> None:
        if cached is None:
            frozen = F.linear(take_rows(features.values, rows), weight, inside)
        else:
            frozen = take_rows(cached, rows)
        logits = frozen * head.scale
        if outside is not None:
            logits += outside
        wrong = logits.softmax(1)
        wrong[torch.arange(len(rows)), features.targets[rows]] -= 1
        head.scale.grad = wrong.mul_(frozen).mean(0)

    return backward


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
    """Minimises the cross-entropy of a linear classifier by L-BFGS, from a weight and a bias.

    The objective ``Σ_i share_i ℓ(W x_i + b + offset, y_i) + weight_decay / 2 · ‖W‖²`` is convex, so
    the result is deterministic. ``shares`` (C,) are the weights of a row by its class, which add up
    to 1 over all rows. With ``offset`` (C,) ``log n_c`` and equal shares the loss is balanced
    softmax (Ren et al., NeurIPS 2020, equation 4, https://arxiv.org/abs/2007.10740).
    """
    values, num_classes = features.values, len(weight)
    # Scale features to root mean square 1: with tiny features the first steps would be lost in
    # rounding and look like convergence. In float64 no square overflows or underflows.
    squares = sum(float(block.double().square().sum()) for block in row_blocks(values, 1))
    unit = float((squares / values.numel()) ** 0.5) or 1.0
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
        for block in row_blocks(values, num_classes):
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
