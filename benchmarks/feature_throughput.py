"""Images per second of ``extract_features`` in bfloat16, as a ratio to eager inference in float32.

``python benchmarks/feature_throughput.py``: both take the features of the same images with the same
model and one thread, interleaved. The other side is what people write: ``model.eval()`` and a loop
over the loader under ``torch.inference_mode()``, with the weights as timm creates them. Figures are
medians over rounds; a ratio above 1 says that ``extract_features`` is faster. Beside it stands how
far the features are from those in float32: the norm of the difference over the norm, for the median
image and for the worst. Weights are random, with batch-norm statistics of structured images; the
packaged checkpoint, which is trained, is measured for its error too.

A CPU without avx512_bf16 emulates bfloat16: there is nothing to measure, and the script says so.
"""

import argparse
import copy
import statistics
import sys
import time
from dataclasses import dataclass

import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from timm_lt import create_dataset, extract_features
from timm_lt.data.images import decode_images, label_tensor
from timm_lt.utils.accelerator import native_precision

PACKAGED = "lt_test_resnet.glyph_lt"


@dataclass(frozen=True)
class Case:
    """A case to measure.

    Attributes:
        model: Name of a timm model.
        size: Side of the images.
        images: Their number.
        batch_size: Images per batch.
    """

    model: str
    size: int
    images: int
    batch_size: int = 32


CASES = (Case("resnet50", 224, 64), Case("resnext50_32x4d", 128, 128), Case("resnet18", 128, 256))


@dataclass(frozen=True)
class Row:
    """The result of a case.

    Attributes:
        case: The case.
        bfloat16: Images per second of ``extract_features``.
        float32: Images per second of the eager loop.
        ratio: Median over rounds of the first by the second.
        median_error: Relative error of the features of the median image.
        largest_error: Relative error of those of the worst image.
    """

    case: Case
    bfloat16: float
    float32: float
    ratio: float
    median_error: float
    largest_error: float


def structured_images(number: int, size: int) -> Tensor:
    """Returns random images (N, 3, size, size), smooth at several scales like photographs."""
    images = torch.zeros(number, 3, size, size)
    for side in (4, 8, 16, 32):
        coarse = torch.randn(number, 3, side, side)
        images += 0.5 * nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    return images


def calibrated_model(name: str, size: int) -> nn.Module:
    """Returns a random model with random batch-norm weights and statistics of images."""
    model = timm.create_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | BatchNormAct2d):
            # timm initialises the last norm of each block to 0.
            nn.init.normal_(module.weight, 1 if module.weight.any() else 0.5, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    model.train()
    with torch.no_grad():
        for _ in range(6):
            model(structured_images(8, size))
    return model.eval()


def eager(model: nn.Module, loader: DataLoader) -> Tensor:
    """Returns features of eager float32 inference."""
    values = []
    with torch.inference_mode():
        for images, _ in loader:
            values.append(model.forward_head(model.forward_features(images), pre_logits=True))
    return torch.cat(values)


def relative_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Returns the norm of the difference over the norm, (N,)."""
    return (found - expected).norm(dim=1) / expected.norm(dim=1)


def measure(case: Case, rounds: int) -> Row:
    """Times both, alternating the order."""
    torch.manual_seed(0)
    model = calibrated_model(case.model, case.size)
    # A copy, so that neither changes the memory layout of the other.
    peer = copy.deepcopy(model)
    data = TensorDataset(structured_images(case.images, case.size), torch.zeros(case.images).long())
    loader = DataLoader(data, case.batch_size)
    sides = {
        "bfloat16": lambda: extract_features(model, loader, compute_dtype="bfloat16").values,
        "float32": lambda: eager(peer, loader),
    }
    found = {name: take() for name, take in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sorted(sides, reverse=number % 2 == 0):
            started = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - started)
    ratios = [slow / fast for fast, slow in zip(*seconds.values(), strict=True)]
    errors = relative_errors(found["bfloat16"], found["float32"])
    speeds = [case.images / statistics.median(spent) for spent in seconds.values()]
    ratio = statistics.median(ratios)
    return Row(case, *speeds, ratio, float(errors.median()), float(errors.max()))


def packaged_errors() -> tuple[float, float]:
    """Returns the median and the largest relative error of the packaged checkpoint's features."""
    model = timm.create_model(PACKAGED, pretrained=True)
    rows = create_dataset("glyph_lt", split="val")
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    images = (decode_images(rows) / 255 - mean) / std
    loader = DataLoader(TensorDataset(images, label_tensor(rows)), 128)
    low = extract_features(model, loader, compute_dtype="bfloat16").values
    errors = relative_errors(low, extract_features(model, loader).values)
    return float(errors.median()), float(errors.max())


def rows(rounds: int = 5) -> list[Row]:
    """Returns a row per case, or none without native bfloat16."""
    if native_precision() != "bf16":
        return []
    torch.set_num_threads(1)
    return [measure(case, rounds) for case in CASES]


def main() -> int:
    """Prints a row per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if native_precision() != "bf16":
        print("skipped: this processor has no avx512_bf16, so it only emulates bfloat16")
        return 0
    print(f"images per second, one thread, {arguments.rounds} rounds; error of the median and the")
    print("worst image, percent")
    print(f"{'model':16}{'size':>5}{'batch':>6}{'bf16':>8}{'fp32':>8}{'ratio':>7}{'error':>14}")
    for row in rows(arguments.rounds):
        case, errors = row.case, f"{100 * row.median_error:.2f} / {100 * row.largest_error:.2f}"
        print(f"{case.model:16}{case.size:5}{case.batch_size:6}", end="")
        print(f"{row.bfloat16:8.1f}{row.float32:8.1f}{row.ratio:7.2f}{errors:>14}")
    median, largest = packaged_errors()
    print(f"{PACKAGED}: error {100 * median:.2f} / {100 * largest:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
