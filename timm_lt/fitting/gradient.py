"""Fits by gradients on cached features: cRT, learnable weight scaling and the cosine classifier."""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.features import Features
from timm_lt.fitting.base import FitData, register_fit, select
from timm_lt.heads import CosineHead, CRTHead, Head, LWSHead, seeded_linear
from timm_lt.longtail import class_counts
from timm_lt.registry import UsageError, check_choice, check_integer, check_number
from timm_lt.samplers import create_sampler

Solver = Literal["lbfgs", "sgd"]
# From strong to weak: each solution is a good start for the next.
WEIGHT_DECAYS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)


def train_head(
    head: Head,
    features: Features,
    *,
    seed: int,
    steps: int,
    lr: float,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    batch_size: int = 512,
) -> Head:
    """Trains what is trainable in a head by SGD on class-balanced batches of features.

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
        batch_size: Rows per update, >= 1.

    Returns:
        The same head.
    """
    check_integer("steps", steps, minimum=1)
    check_integer("batch_size", batch_size, minimum=1)
    check_number("lr", lr, "(0, inf)")
    check_number("weight_decay", weight_decay, "[0, inf)")
    check_number("momentum", momentum, "[0, 1)")
    trained = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr, momentum=momentum, weight_decay=weight_decay)
    sampler = create_sampler(
        "class_balanced", features.targets, num_samples=steps * batch_size, seed=seed
    )
    rows = sampler.epoch_indices().view(steps, batch_size)
    head.train()
    for step, batch in enumerate(rows):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        F.cross_entropy(head(features.values[batch]), features.targets[batch]).backward()
        optimizer.step()
    return head


def solve_class_balanced(
    weight: Tensor,
    bias: Tensor | None,
    features: Features,
    *,
    weight_decay: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor | None]:
    """Minimises the class-balanced cross-entropy of a linear classifier by L-BFGS.

    The objective is ``Σ_i ℓ(W x_i + b, y_i) / (C n_{y_i}) + weight_decay / 2 · ‖W‖²``, the
    expectation of what class-balanced sampling minimises, with ``n_c`` the rows of class c. It is
    convex, so nothing is random.

    Args:
        weight: Start, (C, D).
        bias: Start, (C,), never decayed; None for a classifier without one.
        features: Training features, values (N, D), with rows of every class.
        weight_decay: >= 0; at 0, where separable classes have no minimum, the limit ends it.
        max_iterations: Limit on the iterations.

    Returns:
        Weight (C, D) and bias (C,) or None.
    """
    # In units in which features have root mean square 1: with tiny features the first steps would
    # be lost in rounding, and taken for convergence.
    unit = float(features.values.square().mean().sqrt()) or 1.0
    weight = (weight.detach() * unit).requires_grad_()
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    num_classes = len(weight)
    counts = class_counts(features.targets, num_classes)
    share = (1.0 / (num_classes * counts)).float()[features.targets]
    optimizer = torch.optim.LBFGS(
        [weight] if bias is None else [weight, bias],
        max_iter=max_iterations,
        history_size=10,
        # The gradient at a class's weight starts at the order of 1 / C.
        tolerance_grad=min(1e-5, 1e-3 / num_classes),
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def objective() -> float:
        optimizer.zero_grad()
        logits = F.linear(features.values, weight / unit, bias)
        losses = F.cross_entropy(logits, features.targets, reduction="none")
        loss = (share * losses).sum() + weight_decay / 2 * (weight / unit).square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(objective)
    return weight.detach() / unit, None if bias is None else bias.detach()


def _check_solver_options(options: dict[str, Any]) -> None:
    """Refuses an option of the solver that was not chosen, which would have no effect."""
    solver = options.get("solver", "lbfgs")
    for key in ("steps", "lr") if solver == "lbfgs" else ("max_iterations",):
        if key in options:
            raise UsageError(f"{key} of head 'crt' has no effect with solver {solver!r}")


@register_fit("crt", _check_solver_options)
def fit_crt(
    data: FitData,
    *,
    solver: Solver = "lbfgs",
    weight_decay: float | None = None,
    max_iterations: int = 100,
    steps: int = 1000,
    lr: float = 0.2,
) -> CRTHead:
    """Re-trains the classifier from scratch on class-balanced data.

    Args:
        data: The fit's data.
        solver: ``"lbfgs"`` solves the expected problem; ``"sgd"`` follows Kang et al.
        weight_decay: Given, or selected on validation (lbfgs), or 5e-4 (sgd).
        max_iterations: Iterations of lbfgs per weight decay.
        steps: Updates of sgd.
        lr: Learning rate of sgd at the start.
    """
    check_choice("solver of head 'crt'", solver, get_args(Solver))
    check_integer("max_iterations", max_iterations, minimum=1)
    # With a bias unless the joint classifier, whose place the head takes, has none.
    with_bias = data.classifier is None or data.classifier.bias is not None
    linear = seeded_linear(
        data.features.num_features, data.num_classes, bias=with_bias, seed=data.seed
    )
    if solver == "sgd":
        head = CRTHead.from_classifier(linear)
        decay = 5e-4 if weight_decay is None else weight_decay
        train_head(head, data.features, seed=data.seed, steps=steps, lr=lr, weight_decay=decay)
        return head
    if weight_decay is not None:
        check_number("weight_decay", weight_decay, "[0, inf)")
    decays = WEIGHT_DECAYS if weight_decay is None else (weight_decay,)
    weight = torch.zeros_like(linear.weight)
    bias = torch.zeros_like(linear.bias) if with_bias else None
    candidates = []
    for decay in decays:
        weight, bias = solve_class_balanced(
            weight,
            bias,
            data.features,
            weight_decay=decay,
            max_iterations=max_iterations,
        )
        with torch.no_grad():
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        candidates.append((decay, CRTHead.from_classifier(linear)))
    if weight_decay is not None:
        return candidates[0][1]
    return select(candidates, data, data.need_val("crt", "weight_decay"), "weight_decay")


@register_fit("lws")
def fit_lws(
    data: FitData,
    *,
    scale_bias: bool = True,
    steps: int = 500,
    lr: float = 0.2,
    weight_decay: float = 5e-4,
) -> LWSHead:
    """Learns one factor per class, from 1, by class-balanced SGD; see :func:`train_head`."""
    head = LWSHead.from_classifier(data.need_classifier("lws"), scale_bias=scale_bias)
    with torch.no_grad():
        head.scale.fill_(1.0)
    train_head(head, data.features, seed=data.seed, steps=steps, lr=lr, weight_decay=weight_decay)
    return head


@register_fit("cosine")
def fit_cosine(
    data: FitData,
    *,
    scale: float = 16.0,
    learn_scale: bool = False,
    steps: int = 1000,
    lr: float = 0.2,
) -> CosineHead:
    """Trains a cosine classifier by class-balanced SGD, from the joint classifier's directions."""
    linear = data.new_linear()
    if data.classifier is None:
        nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(data.seed))
    head = CosineHead.from_classifier(linear, scale=scale, learn_scale=learn_scale)
    train_head(head, data.features, seed=data.seed, steps=steps, lr=lr)
    return head
