"""Cost of ``tau_curve``, as a ratio to one product of features and weight plus argmax.

``python benchmarks/tau_curve.py``: one thread, CPU time, interleaved, median of the ratios.
``norm`` and ``prior`` include the best tau. ``sweep`` evaluates 21 taus directly, one product each.
Sweep and reference take the features in the blocks that ``tau_curve`` takes. ``alive`` is the share
of images that are right at some tau, the others are given up early; ``differ`` is the largest
number of images, over the 21 taus, by which curve and sweep differ.
"""

import argparse
import statistics
from typing import NamedTuple

import torch
from timing import seconds
from torch import Tensor, nn

from timm_lt.features import Features
from timm_lt.fitting import tau_curve
from timm_lt.fitting.curves import logit_blocks

SIZES = {1000: 4096, 8142: 1024}  # Images by classes.
TAUS = [step / 10 for step in range(21)]


def long_tailed(num_classes: int, num_images: int, width: int, noise: float) -> tuple:
    """Returns a classifier whose norms fall from 1.5 to 0.5, class counts, and noisy features."""
    weight = torch.nn.functional.normalize(torch.randn(num_classes, width), dim=1)
    weight *= torch.linspace(1.5, 0.5, num_classes)[:, None]
    classifier = nn.Linear(width, num_classes).requires_grad_(False)
    classifier.weight.copy_(weight)
    targets = torch.arange(num_images) % num_classes
    values = weight[targets] + noise * torch.randn(num_images, width)
    counts = torch.logspace(3, 0.5, num_classes).long()
    return classifier, counts, Features(values, targets)


def argmax(values: Tensor, weight: Tensor) -> Tensor:
    """Returns the predictions of one product, block by block."""
    return torch.cat([logits.argmax(1) for logits in logit_blocks(values, weight, None)])


def sweep(classifier: nn.Linear, features: Features) -> list[float]:
    """Returns the accuracy of tau-normalisation at each of 21 taus, evaluated directly."""
    norm = classifier.weight.norm(dim=1, keepdim=True)
    return [
        float(
            (argmax(features.values, classifier.weight / norm**tau) == features.targets)
            .double()
            .mean()
        )
        for tau in TAUS
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.15, 0.35])
    arguments = parser.parse_args()
    print(
        f"{'classes':>7} {'images':>6} {'alive':>6} "
        + " ".join(f"{name:>7}" for name in ("norm", "prior", "sweep", "differ"))
    )
    for num_classes in SIZES:
        for noise in arguments.noise:
            row = measure(num_classes, noise, arguments.rounds, arguments.features)
            print(
                f"{num_classes:7} {SIZES[num_classes]:6} {row.alive:6.2f} {row.norm:7.3f} "
                f"{row.prior:7.3f} {row.sweep:7.3f} {row.differ:7}"
            )


class Row(NamedTuple):
    """Ratios of one problem, the share of images with an interval, and differing accuracies."""

    alive: float
    norm: float
    prior: float
    sweep: float
    differ: int


def measure(num_classes: int, noise: float, rounds: int, width: int = 2048) -> Row:
    """Returns the ratios of one problem."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    classifier, counts, features = long_tailed(num_classes, SIZES[num_classes], width, noise)
    curve = tau_curve(classifier, features)
    swept: list[float] = []
    of_sweep = seconds(lambda: swept.extend(sweep(classifier, features)))
    pairs = zip(TAUS, swept, strict=True)
    differ = round(len(features) * max(abs(curve(tau) - value) for tau, value in pairs))
    calls = {
        "norm": lambda: tau_curve(classifier, features).best_tau,
        "prior": lambda: (
            tau_curve(classifier, features, adjust="prior", class_counts=counts).best_tau
        ),
    }
    ratios = {name: [] for name in (*calls, "sweep")}
    for _ in range(rounds):
        before = seconds(lambda: argmax(features.values, classifier.weight))
        times = {name: seconds(call) for name, call in calls.items()} | {"sweep": of_sweep}
        after = seconds(lambda: argmax(features.values, classifier.weight))
        for name, took in times.items():
            ratios[name].append(2 * took / (before + after))
    alive = float((curve.low <= curve.high).double().mean())
    return Row(alive, *(statistics.median(values) for values in ratios.values()), differ)


if __name__ == "__main__":
    main()
