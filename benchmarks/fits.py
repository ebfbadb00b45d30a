"""Cost of the fits on cached features, as a ratio to the minimum arithmetic.

``python benchmarks/fits.py``: one thread, CPU time, in turn, median of the ratios. Features are
random, of the width of a ResNeXt-50, in a mapped file.

- ``crt``: an epoch of SGD in batches of 512, to the two products of each batch with the weight.
- ``lws``: an epoch on cached logits, to computing the logits of the epoch.
- ``ncm``: the class means in all three feature spaces from one pass, to a bare read of the file,
  block by block into memory; the mean of all features is known, as that of a cache is. ``sum`` is
  the same to a sum over the mapped file, the least that touches every value.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from timing import Ratio, ratio
from torch import nn

from timm_lt import Features
from timm_lt.fitting.closed_form import class_means
from timm_lt.fitting.solvers import scale_gradient, train_head
from timm_lt.heads import CRTHead, LWSHead
from timm_lt.heads.linear import BATCH_SIZE

WIDTH = 2048
SPACES = ("raw", "l2", "centered_l2")
BLOCK = 2**24  # bytes of a bare read


def features_in_a_file(path: Path, num_images: int, num_classes: int) -> Features:
    """Writes random features and returns them memory-mapped."""
    with path.open("wb") as file:
        for start in range(0, num_images, 4096):
            block = torch.randn(min(4096, num_images - start), WIDTH).relu_()
            file.write(block.numpy().tobytes())
    values = torch.from_file(str(path), size=num_images * WIDTH).view(-1, WIDTH)
    return Features(values, torch.randperm(num_images) % num_classes)


def crt_ratio(features: Features, num_classes: int, rounds: int) -> float:
    """Returns the cost of an epoch of crt relative to its products."""
    head = CRTHead.from_classifier(nn.Linear(WIDTH, num_classes))
    steps = len(features) // BATCH_SIZE
    batch = features.values[:BATCH_SIZE].clone()
    gradient = torch.randn(BATCH_SIZE, num_classes)
    weight = head.weight.detach()

    def products() -> None:
        for _ in range(steps):
            F.linear(batch, weight)
            gradient.t() @ batch

    def epoch() -> None:
        train_head(head, features, seed=0, steps=steps, lr=0.01)

    return ratio(epoch, products, rounds)


def lws_ratio(features: Features, num_classes: int, rounds: int) -> float:
    """Returns the cost of an epoch of lws relative to its logits."""
    head = LWSHead.from_classifier(nn.Linear(WIDTH, num_classes))
    with torch.no_grad():
        head.scale.fill_(1.0)
    steps = len(features) // BATCH_SIZE
    batch = features.values[:BATCH_SIZE].clone()
    backward = scale_gradient(head, features)

    def logits() -> None:
        for _ in range(steps):
            F.linear(batch, head.weight, head.bias)

    def epoch() -> None:
        train_head(head, features, seed=0, steps=steps, lr=0.01, backward=backward)

    return ratio(epoch, logits, rounds)


def ncm_ratios(
    features: Features, path: Path, num_classes: int, rounds: int
) -> tuple[float, float]:
    """Returns the cost of the class means relative to a bare read and to a sum."""
    mean = features.feature_mean
    buffer = bytearray(BLOCK)

    def means() -> None:
        class_means(features.values, features.targets, num_classes, SPACES, mean)

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def add_up() -> None:
        for block in features.values.split(BLOCK // (4 * WIDTH)):
            block.sum()

    return ratio(means, read, rounds), ratio(means, add_up, rounds)


# Images of ImageNet-LT by classes, and half of iNaturalist 2018.
SIZES = {1000: 115_846, 8142: 218_756}
TRAINED = 20_480  # images of an epoch of training: its cost is per batch


def rows(rounds: int = 5) -> Iterator[Ratio]:
    """Yields the ratios at both sizes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for num_classes, num_images in SIZES.items():
        with TemporaryDirectory() as folder:
            path = Path(folder) / "values"
            features = features_in_a_file(path, num_images, num_classes)
            size = f"{num_classes} classes"
            to_read, to_sum = ncm_ratios(features, path, num_classes, rounds)
            yield Ratio("class means in all spaces", size, "a bare read", to_read, "<= 5")
            yield Ratio("class means in all spaces", size, "a sum", to_sum, "-")
            features = Features(features.values[:TRAINED], features.targets[:TRAINED])
            crt = crt_ratio(features, num_classes, rounds)
            yield Ratio("an epoch of crt", size, "its two products", crt, "<= 1.3")
            lws = 1 / lws_ratio(features, num_classes, rounds)
            yield Ratio("the logits of an epoch", size, "an epoch of lws", lws, ">= 15")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{'what':28} {'of':14} {'to':18} {'ratio':>6}  bound")
    for row in rows(arguments.rounds):
        print(f"{row.what:28} {row.size:14} {row.to:18} {row.ratio:6.2f}  {row.bound}")


if __name__ == "__main__":
    main()
