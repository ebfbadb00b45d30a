"""What the losses are made of, each stable at any logits."""

import torch
from torch import Tensor
from torch.nn import functional as F


def mean_over_labels(per_class: Tensor, targets: Tensor) -> Tensor:
    """Returns the values (N,) of labels, or their mean under distributions, out of (N, C)."""
    if targets.ndim == 1:
        return per_class.gather(1, targets[:, None]).squeeze(1)
    return (targets * per_class).sum(1)


def one_hot(targets: Tensor, like: Tensor) -> Tensor:
    """Returns targets as distributions (N, C), in the type of logits (N, C)."""
    if targets.ndim == 2:
        return targets
    return torch.zeros_like(like).scatter(1, targets[:, None], 1.0)


def log_complement(log_p: Tensor) -> Tensor:
    """Returns ``log(1 - p_j)`` (N, C) of the logarithms of probabilities (N, C)."""
    top = log_p.argmax(1, keepdim=True)
    # 1 - p loses its digits where p is near 1, so there the others are summed.
    lowest = torch.finfo(log_p.dtype).min / 2
    others = log_p.scatter(1, top, lowest).logsumexp(1, keepdim=True)
    return torch.log1p(-log_p.exp().scatter(1, top, 0.0)).scatter(1, top, others)


def softmax_focal(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Returns ``-(1 - p_y)^gamma log p_y`` (N,), p the softmax."""
    log_p = F.log_softmax(logits, 1)
    # A power of 1 - p would have an infinite slope at 0 for gamma < 1.
    return mean_over_labels(-log_p * torch.exp(gamma * log_complement(log_p)), targets)


def sigmoid_focal(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Returns the sum over the classes (N,) of ``-(1 - p_t)^gamma log p_t``.

    ``p_t`` is sigmoid(z_j) for the label and 1 - sigmoid(z_j) for the other classes.
    """
    # -log(1 - sigmoid), so that its negative is the logarithm of a base of a power.
    positive, negative = F.softplus(-logits), F.softplus(logits)
    if gamma > 0:
        positive, negative = (
            positive * torch.exp(-gamma * negative),
            negative * torch.exp(-gamma * positive),
        )
    targets = one_hot(targets, logits)
    return (targets * positive + (1 - targets) * negative).sum(1)
