"""Features of four Gaussian classes with a long tail, a joint classifier, and textbook SGD."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from timm_lt.features import Features
from timm_lt.fitting import fit_head
from timm_lt.samplers import create_sampler

COUNTS = torch.tensor([120, 40, 15, 5])
C, D = len(COUNTS), 6
# Short trainings.
QUICK = {
    "lws": {"steps": 100},
    "cosine": {"steps": 60},
    # Two base classes and two novel ones; dropout would need more than six features.
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
    """A joint classifier made by scikit-learn."""
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


def objective_by_hand(preds, targets, objective):
    """An objective from its definition; the shot groups are 120 | 40 | 15, 5 images."""
    recalls = [float((preds[targets == c] == c).mean()) for c in range(C)]
    groups = [recalls[0], recalls[1], (recalls[2] + recalls[3]) / 2]
    return {
        "all": float((preds == targets).mean()),
        "class_mean": float(np.mean(recalls)),
        "few_shot": groups[2],
        "harmonic_mean": 3 / sum(1 / g for g in groups) if all(groups) else 0.0,
        "worst_class": min(recalls),
    }[objective]


def start_of_a_linear_layer(seed):
    """Returns weight and bias as PyTorch documents their default, in float64, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    bound = D**-0.5
    shapes = ((C, D), (C,))
    drawn = [(torch.rand(shape, generator=generator) * 2 - 1) * bound for shape in shapes]
    return [value.double().requires_grad_() for value in drawn]


def draw_rows(steps, seed, sampler="class_balanced", batch_size=512, **options):
    draws = create_sampler(
        sampler, TRAIN.targets, num_samples=steps * batch_size, seed=seed, **options
    )
    return torch.tensor(list(draws)).view(steps, batch_size)
