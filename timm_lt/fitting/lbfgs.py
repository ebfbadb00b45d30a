"""The best linear classifier of cached features: a convex problem, solved by L-BFGS."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_lt.features import Features
from timm_lt.fitting.rows import row_blocks
from timm_lt.utils.longtail import class_counts


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
        """Every class has the same weight: ``share = 1 / (C n_c)``.

        It is the expectation of what class-balanced sampling minimises. ``counts`` (C,).
        """
        return cls((1.0 / (len(counts) * counts.double())).float())

    @classmethod
    def instance_balanced(cls, counts: Tensor) -> "Softmax":
        """Every row has the same weight. ``counts`` (C,)."""
        return cls(torch.full((len(counts),), 1.0 / int(counts.sum())))

    @classmethod
    def balanced_softmax(cls, counts: Tensor) -> "Softmax":
        """Every row has the same weight, and ``log n_c`` is added to the logits.

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

    The objective is ``Σ_i share_i ℓ(W x_i + b, y_i) + weight_decay / 2 · ‖W‖²``. It is convex, so
    nothing is random. An evaluation is two products per block of rows: features may lie in a mapped
    file that is larger than memory.

    Args:
        weight: Start, (C, D).
        bias: Start, (C,), never decayed; None for a classifier without one.
        features: Training features, values (N, D), with rows of every class.
        weight_decay: >= 0; at 0, where separable classes have no minimum, the limit ends it.
        max_iterations: Limit on the iterations.
        loss: The weights of the rows; None is class-balanced.

    Returns:
        Weight (C, D) and bias (C,) or None.
    """
    num_classes = len(weight)
    if loss is None:
        loss = Softmax.class_balanced(class_counts(features.targets, num_classes))
    # In units in which features have root mean square 1: with tiny features the first steps would
    # be lost in rounding, and taken for convergence.
    unit = _root_mean_square(features.values) or 1.0
    weight = (weight.detach() * unit).requires_grad_()
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight] if bias is None else [weight, bias],
        max_iter=max_iterations,
        history_size=10,
        # The gradient at a class's weight starts at the order of 1 / C.
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
            # Block by block, or the graph would hold all of them.
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
    # In float64 the square of a float32 is finite, and not 0.
    total = sum(float(block.double().square().sum()) for block in row_blocks(values, 1))
    return float((total / values.numel()) ** 0.5)
