"""Solvers on cached features, read in blocks: minibatch SGD, L-BFGS, and SMOTE."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.features import Features
from timm_lt.heads import Head, LWSHead, limit_norms
from timm_lt.heads.linear import BATCH_SIZE
from timm_lt.samplers import create_sampler
from timm_lt.utils.checks import UsageError, check_integer, check_number
from timm_lt.utils.longtail import class_counts

# Largest number of elements per block, and smallest number of rows (small products are slow).
ENTRIES, ROWS = 2**22, 64
# Logits of lws are cached up to this size.
MAX_BYTES = 4 * 2**30


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


# Validations during training, with keep='best'.
LOOKS = 10

Backward = Callable[[Tensor], None]
# The objective, and the tie-breaker.
Score = tuple[float, float]


@dataclass(frozen=True)
class BestStep:
    """Number of updates after which a head was best on validation, and the scores compared."""

    step: int
    score: float
    compared: list[tuple[int, float]]


def check_length(options: dict[str, Any]) -> None:
    """Checks that the length is given in steps or in epochs, not both."""
    if options.get("steps") is not None and options.get("epochs") is not None:
        raise UsageError("steps and epochs exclude each other; give one of them")


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
    """Trains the trainable parameters of a head by SGD on batches of features.

    The settings are those of Kang et al.: momentum 0.9, weight decay 5e-4 on all trained parameters
    (also the scales of lws), batch size 512, cosine learning rate to zero.

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
        sampler: One of :func:`timm_lt.list_samplers`; the whole training is one of its epochs.
        sampler_options: Options of the sampler.
        loss: One of ``timm_lt.create_loss``; None is cross-entropy. Its epochs have N rows.
        decay_bias: Whether weight decay applies to the bias.
        backward: Sets the gradients for the rows of given indices; None differentiates the loss.
        score: Evaluated after each tenth of the training; the head keeps the first best state.
            None keeps the last state.

    Returns:
        The best step, None without a score.

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
            f"the weights of head {head.kind!r} became infinite or NaN; choose an lr below {lr:g}"
        )
    return None if best is None else best.restore()


def epochs_of(draws: int, rows: int) -> int:
    """Returns the number of epochs of so many draws; the last may be incomplete."""
    return -(-draws // rows)


class _Best:
    """Keeps the head's state with the highest score."""

    def __init__(self, head: Head, score: Callable[[], Score], steps: int) -> None:
        self.head, self.score = head, score
        self.looks = {max(steps * look // LOOKS, 1) for look in range(1, LOOKS + 1)}
        self.compared: list[tuple[int, float]] = []
        self.best: tuple[Score, int, dict[str, Tensor]] | None = None

    def after(self, step: int) -> None:
        """Scores the head after an update, if it is due."""
        if step not in self.looks:
            return
        self.head.eval()
        score = self.score()
        self.head.train()
        self.compared.append((step, score[0]))
        if self.best is None or score > self.best[0]:
            self.best = score, step, copy.deepcopy(self.head.state_dict())

    def restore(self) -> BestStep:
        """Restores the head's best state."""
        assert self.best is not None
        score, step, state = self.best
        self.head.load_state_dict(state)
        return BestStep(step, score[0], self.compared)


class _Epochs:
    """Calls ``set_epoch`` of a loss that has one."""

    def __init__(self, loss: nn.Module, draws: int, rows: int) -> None:
        self.set_epoch = getattr(loss, "set_epoch", None)
        self.rows, self.number = rows, epochs_of(draws, rows)
        self.last = -1

    def begin(self, drawn: int) -> None:
        """Sets the epoch of the next batch, after so many rows."""
        epoch = drawn // self.rows
        if self.set_epoch is not None and epoch > self.last:
            self.set_epoch(epoch, self.number)
        self.last = epoch


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


SmoteTarget: TypeAlias = int | Literal["largest"]
NEIGHBORS = 5
# Largest number of rows per class.
MAX_ROWS = 10_000_000


def check_smote(target: SmoteTarget | None) -> None:
    """Checks the target number of rows per class, and that imbalanced-learn is installed."""
    if target is None:
        return
    if target != "largest":
        check_integer("smote, rows per class or 'largest',", target, minimum=1, maximum=MAX_ROWS)
    _import_smote()


def _import_smote() -> Any:  # noqa: ANN401
    try:
        from imblearn.over_sampling import SMOTE
    except ImportError as error:
        raise UsageError("smote needs imbalanced-learn: pip install 'timm_lt[smote]'") from error
    return SMOTE


def add_smote_rows(
    features: Features, num_classes: int, target: SmoteTarget, *, seed: int = 0
) -> Features:
    """Appends synthetic rows until each class has ``target`` rows.

    A synthetic row is ``x + u (x' − x)``: ``x'`` is one of the ``k = min(5, n − 1)`` nearest rows
    of the same class with n rows, and ``u`` is uniform in [0, 1]. The row of a class with one row
    is repeated.

    Args:
        features: Values (N, D); the result is in memory.
        num_classes: C.
        target: Smallest number of rows per class afterwards; ``"largest"`` is that of the largest
            class.
        seed: Seed of the draws.

    Raises:
        UsageError: If the target is out of range, or imbalanced-learn is not installed.

    References:
        Chawla et al., SMOTE: Synthetic Minority Over-sampling Technique, JAIR 2002,
        https://arxiv.org/abs/1106.1813
    """
    check_smote(target)
    counts = class_counts(features.targets, num_classes)
    missing = smote_counts(counts, target) - counts
    parts = list(row_blocks(features.values, 1))
    by_class = features.targets.sort(stable=True).indices.split(counts.tolist())
    for label in missing.nonzero().flatten().tolist():
        added = int(missing[label])
        of_class = take_rows(features.values, by_class[label])
        parts.append(_synthetic(of_class, added, seed + label))
    labels = torch.repeat_interleave(torch.arange(num_classes), missing)
    return Features(torch.cat(parts), torch.cat([features.targets.cpu(), labels]))


def smote_counts(counts: Tensor, target: SmoteTarget) -> Tensor:
    """Returns the rows per class (C,) after :func:`add_smote_rows`; an empty class stays so."""
    wanted = int(counts.max()) if target == "largest" else target
    return torch.where(counts == 0, 0, counts.clamp_min(wanted))


def _synthetic(rows: Tensor, number: int, seed: int) -> Tensor:
    """Returns synthetic rows (number, D) between the rows (n, D) of a class."""
    if len(rows) == 1:
        return rows.expand(number, -1)
    smote = _import_smote()(
        sampling_strategy={1: len(rows) + number},
        k_neighbors=min(NEIGHBORS, len(rows) - 1),
        random_state=seed % 2**32,
    )
    # imbalanced-learn needs a second class.
    labels = [1] * len(rows) + [0]
    resampled, _ = smote.fit_resample(torch.cat([rows, rows[:1]]).numpy(), labels)
    return torch.from_numpy(resampled[len(labels) :])


@dataclass(frozen=True)
class Softmax:
    """A weighted cross-entropy: ``Σ_i share_i ℓ(z_i + offset, y_i)``.

    Attributes:
        shares: Weight of each row by its class, (C,); over all rows they add up to 1.
        offset: Added to the logits, (C,), or None.
    """

    shares: Tensor
    offset: Tensor | None = None

    @classmethod
    def class_balanced(cls, counts: Tensor) -> "Softmax":
        """Equal weight per class, ``1 / (C n_c)``: the expectation of class-balanced sampling."""
        return cls((1.0 / (len(counts) * counts.double())).float())

    @classmethod
    def instance_balanced(cls, counts: Tensor) -> "Softmax":
        """Equal weight per row."""
        return cls(torch.full((len(counts),), 1.0 / int(counts.sum())))

    @classmethod
    def balanced_softmax(cls, counts: Tensor) -> "Softmax":
        """Equal weight per row, with ``log n_c`` added to the logits.

        References:
            Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020,
            equation 4, https://arxiv.org/abs/2007.10740
        """
        return cls(cls.instance_balanced(counts).shares, counts.float().log())


def solve_linear(
    weight: Tensor,
    bias: Tensor | None,
    features: Features,
    *,
    weight_decay: float,
    max_iterations: int,
    loss: Softmax | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Minimises the cross-entropy of a linear classifier by L-BFGS.

    The objective ``Σ_i share_i ℓ(W x_i + b, y_i) + weight_decay / 2 · ‖W‖²`` is convex, so the
    result is deterministic. Features are read in blocks and may be larger than memory.

    Args:
        weight: Start, (C, D).
        bias: Start, (C,), without weight decay; None for a classifier without bias.
        features: Training features, values (N, D), with rows of every class.
        weight_decay: >= 0; at 0 separable classes have no minimum.
        max_iterations: Largest number of iterations.
        loss: Weights of the rows; None is class-balanced.

    Returns:
        Weight (C, D) and bias (C,) or None.
    """
    num_classes = len(weight)
    if loss is None:
        loss = Softmax.class_balanced(class_counts(features.targets, num_classes))
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
            if loss.offset is not None:
                logits = logits + loss.offset
            losses = F.cross_entropy(logits, targets, reduction="none")
            value = (loss.shares[targets] * losses).sum()
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
