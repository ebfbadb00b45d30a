"""Cost of all heads together on cached features: ``python benchmarks/heads.py``.

100,000 rows of width 2,048 in 1,000 classes, long-tailed, with 20 validation rows of each class:
the size of ImageNet-LT with a ResNet-50. The features are class means plus noise. Wall time on all
cores (``--threads``), with and without a joint classifier; the project asks for less than five
minutes on two cores.
"""

import argparse
import time

import torch
from torch import nn

from timm_lt.features import Features
from timm_lt.fitting import DEFAULT_HEADS, fit_head
from timm_lt.metrics import shot_accuracy


def make_features(rows: int, classes: int, width: int) -> tuple[Features, Features]:
    """Returns training features with an imbalance factor of 100."""
    generator = torch.Generator().manual_seed(0)
    shares = 100.0 ** (-torch.arange(classes) / (classes - 1))
    counts = (shares / shares.sum() * rows).long().clamp_min(1)
    counts[0] += rows - counts.sum()
    means = torch.randn(classes, width, generator=generator)
    # The overlap of classes is independent of the width.
    spread = 6 * (width / 2048) ** 0.5
    made = []
    for each in (counts, torch.full((classes,), 20)):
        labels = torch.arange(classes).repeat_interleave(each)
        noise = torch.randn(len(labels), width, generator=generator)
        made.append(Features((means[labels] + spread * noise).relu_(), labels))
    return made[0], made[1]


def main() -> None:
    """Prints the seconds of each head and of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train, val = make_features(arguments.rows, arguments.classes, arguments.width)
    counts = train.targets.bincount()
    joint: nn.Linear | None = None
    total = 0.0
    for name in DEFAULT_HEADS:
        started = time.perf_counter()
        head = fit_head(name, train, classifier=joint, val=val)
        seconds = time.perf_counter() - started
        total += seconds
        joint = head if name == "linear" else joint
        with torch.inference_mode():
            preds = torch.cat([head(block).argmax(1) for block in val.values.split(4096)])
        report = shot_accuracy(preds, val.targets, counts)
        print(f"{name:16} {seconds:7.1f} s   validation {100 * report.all:.1f} %", flush=True)
    print(f"{'all':16} {total:7.1f} s on {arguments.threads} threads")


if __name__ == "__main__":
    main()
