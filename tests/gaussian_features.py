"""Features of four Gaussian classes with a long tail, a joint classifier, and textbook SGD."""

import math

import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from timm_lt.features import Features
from timm_lt.fitting import fit_head

COUNTS = torch.tensor([120, 40, 15, 5])
C, D = len(COUNTS), 6
# What makes the fits by SGD quick.
QUICK = {
    "lws": {"steps": 100},
    "cosine": {"steps": 60},
    # Two base classes and two novel ones; of six features none is to spare.
    "fslwf": {"base": 40, "steps": 60, "episodes": 60, "dropout": 0.0},
    "oltr": {"steps": 60},
}


def gaussians(counts, seed):
    """Classes are Gaussians around fixed means, rows shuffled."""
    means = 1.3 * torch.randn(C, D, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    targets = torch.repeat_interleave(torch.arange(C), counts)
    targets = targets[torch.randperm(len(targets), generator=g)]
    return Features(means[targets] + 1.2 * torch.randn(len(targets), D, generator=g), targets)


TRAIN = gaussians(COUNTS, 1)
VAL = gaussians(torch.full((C,), 20), 2)
TEST = gaussians(torch.full((C,), 100), 3)


def sklearn_classifier(features=TRAIN, c=1.0, **options):
    """A joint classifier that none of our code made."""
    model = LogisticRegression(C=c, tol=1e-10, max_iter=10_000, **options)
    model.fit(features.values.double().numpy(), features.targets.numpy())
    linear = nn.Linear(D, C)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(model.coef_))
        linear.bias.copy_(torch.from_numpy(model.intercept_))
    return linear


JOINT = sklearn_classifier()


def fit(name, /, *, train=TRAIN, **options):
    given = {"classifier": JOINT, "class_counts": COUNTS, "val": VAL, **QUICK.get(name, {})}
    return fit_head(name, train, **{**given, **options})


def accuracy(head, features=TEST):
    with torch.inference_mode():
        return (head(features.values).argmax(1) == features.targets).double().mean().item()


def few_shot(head):
    return accuracy(head, Features(TEST.values[TEST.targets == 3], TEST.targets[TEST.targets == 3]))


def tensors(head):
    return dict(head.state_dict())


def start_of_a_linear_layer(seed):
    """Returns weight and bias as PyTorch documents their default, in float64, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    bound = D**-0.5
    shapes = ((C, D), (C,))
    drawn = [(torch.rand(shape, generator=generator) * 2 - 1) * bound for shape in shapes]
    return [value.double().requires_grad_() for value in drawn]


def naive_sgd(parameters, loss, rows, lr, weight_decay, momentum=0.9):
    """Textbook SGD with momentum and a cosine, in float64."""
    velocity = [torch.zeros_like(p) for p in parameters]
    for step, batch in enumerate(rows):
        gradients = torch.autograd.grad(loss(batch), parameters)
        now = lr * 0.5 * (1 + math.cos(math.pi * step / len(rows)))
        with torch.no_grad():
            for p, v, g in zip(parameters, velocity, gradients, strict=True):
                v.mul_(momentum).add_(g + weight_decay * p)
                p.sub_(now * v)
