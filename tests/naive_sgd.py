"""Textbook SGD with momentum 0.9, as an oracle."""

import math

import torch


def cosine(step, steps):
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def naive_sgd(
    parameters, loss, batches, lr, decays=0.0, *, rate=cosine, nesterov=False, after=None
):
    """Minimises ``loss(batch)`` over the batches; ``decays`` are those of the parameters."""
    velocity = [torch.zeros_like(p) for p in parameters]
    decays = decays if isinstance(decays, list) else [decays] * len(parameters)
    for step, batch in enumerate(batches):
        gradients = torch.autograd.grad(loss(batch), parameters)
        now = lr * rate(step, len(batches))
        with torch.no_grad():
            for p, v, g, decay in zip(parameters, velocity, gradients, decays, strict=True):
                decayed = g + decay * p
                v.mul_(0.9).add_(decayed)
                p.sub_(now * (decayed + 0.9 * v if nesterov else v))
            if after is not None:
                after()
