"""Throughput of the training loop, as a ratio to that of timm's ``train.py``.

``python benchmarks/train_throughput.py --timm-train PATH/TO/train.py``: both train the same model
on the same folder of images with the same settings, each in a process of its own with one thread,
interleaved. Each run is repeated with more epochs: the difference of the two is what epochs cost,
without start-up. On the CPU it is CPU time, user and system; on a GPU it is wall time. Figures are
medians over rounds; a ratio above 1 says that timm_lt trains more images in the same time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from timm_lt.utils.longtail import long_tailed_counts

CLASSES, LARGEST, IMBALANCE = 10, 600, 50
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 2e-5
NO_SCRIPT = (
    "--timm-train is missing: train.py is in timm's repository, "
    "https://github.com/huggingface/pytorch-image-models, not in its wheel"
)


@dataclass(frozen=True)
class Case:
    """A model and the length of its training.

    Attributes:
        model: Name of a timm model.
        size: Side of the images, in the files and in the batches.
        suffix: Format of the files.
        batch_size: Images per update.
        epochs: Epochs that are timed.
        amp: Whether it is in bfloat16 where autocast allows it, else in float32.
        workers: Processes that decode; 0 decodes in the one that trains.
        device: ``"cpu"`` or ``"cuda"``.
    """

    model: str
    size: int
    suffix: str
    batch_size: int
    epochs: int
    amp: bool = False
    workers: int = 0
    device: str = "cpu"


CASES = {
    "tiny": Case("test_resnet", 32, "png", 32, 12),
    "small": Case("resnet18", 64, "jpg", 64, 1),
    "small, bf16": Case("resnet18", 64, "jpg", 64, 1, amp=True),
}


def make_folder(folder: Path, case: Case) -> int:
    """Writes a folder of smooth images per class; returns their number."""
    generator = np.random.default_rng(0)
    counts = long_tailed_counts(CLASSES, LARGEST, IMBALANCE, "exponential")
    for label, count in enumerate(counts):
        of_class = folder / f"class_{label}"
        of_class.mkdir(parents=True)
        for number in range(count):
            coarse = generator.integers(0, 256, (case.size // 8, case.size // 8, 3), np.uint8)
            image = Image.fromarray(coarse).resize((case.size, case.size), Image.Resampling.BICUBIC)
            image.save(of_class / f"{number:04d}.{case.suffix}")
    return sum(counts)


def timm_command(script: Path, folder: Path, case: Case) -> list[str]:
    """Returns the command line of timm's script; no validation, a checkpoint at the end only."""
    options = {
        "data-dir": folder,
        "val-split": "",
        "val-interval": 10**6,
        "output": folder.parent / "timm",
        "device": case.device,
        "model": case.model,
        "num-classes": CLASSES,
        "img-size": case.size,
        "batch-size": case.batch_size,
        "workers": case.workers,
        "opt": "sgd",
        "lr": LEARNING_RATE,
        "momentum": MOMENTUM,
        "weight-decay": WEIGHT_DECAY,
        "sched": "cosine",
        "warmup-epochs": 0,
        "epochs": case.epochs,
        "smoothing": 0.0,
        "train-interpolation": "bilinear",
        "interpolation": "bilinear",
    }
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    given += ["--mean", *map(str, MEAN), "--std", *map(str, STD)]
    given += ["--sched-on-updates", "--channels-last"]
    given += ["--pin-mem"] if case.device == "cuda" else []
    given += ["--amp", "--amp-dtype", "bfloat16"] if case.amp else []
    return [sys.executable, str(script), *given]


def own_command(folder: Path, case: Case) -> list[str]:
    """Returns the command line that trains with timm_lt's loop."""
    return [sys.executable, __file__, "--train", str(folder), "--case", json.dumps(asdict(case))]


def train(folder: Path, case: Case) -> None:
    """Trains with timm_lt's loop, decoding and augmenting images in the loader."""
    import torch
    from datasets import load_dataset

    from timm_lt import create_loss, create_model, create_sampler
    from timm_lt.data.images import StoredImages, label_tensor
    from timm_lt.training import TrainingOptions, train_representation
    from timm_lt.utils.accelerator import create_accelerator

    torch.manual_seed(0)
    cache = str(folder.parent / "cache")
    dataset = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=cache)
    labels = label_tensor(dataset)
    counts = torch.bincount(labels)
    images = StoredImages(
        dataset,
        labels,
        size=(case.size, case.size),
        preprocessing={"mean": MEAN, "std": STD, "interpolation": "bilinear", "crop_pct": 1.0},
        augmentation={"color_jitter": 0.4},
        workers=case.workers,
    )
    train_representation(
        create_model(case.model, num_classes=CLASSES),
        images,
        create_sampler("instance_balanced", labels),
        create_loss("cross_entropy", class_counts=counts),
        TrainingOptions(
            epochs=case.epochs,
            batch_size=case.batch_size,
            optimizer={
                "opt": "sgd",
                "lr": LEARNING_RATE,
                "momentum": MOMENTUM,
                "weight_decay": WEIGHT_DECAY,
            },
            scheduler={"sched": "cosine"},
            keep="last",
        ),
        accelerator=create_accelerator(mixed_precision="bf16" if case.amp else "no"),
        class_counts=counts,
    )


def cost(command: list[str], case: Case) -> float:
    """Returns the seconds of a command: CPU time, or wall time on a GPU.

    Raises:
        RuntimeError: If it fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if case.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            raise RuntimeError(output.read().decode(errors="replace"))
    return wall if case.device == "cuda" else usage.ru_utime + usage.ru_stime


def compare(script: Path, case: Case, rounds: int) -> tuple[float, float, float]:
    """Returns images per second of both, timm_lt first, and the ratio of the two."""
    seconds: dict[str, list[float]] = {"timm_lt": [], "timm": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        trained = make_folder(folder, case) // case.batch_size * case.batch_size * case.epochs
        short, long = replace(case, epochs=1), replace(case, epochs=1 + case.epochs)
        # Fill the file cache.
        cost(own_command(folder, short), case)
        for number in range(rounds):
            # Alternate the order.
            for name in sorted(seconds, reverse=number % 2 == 0):
                spent = [
                    cost(
                        own_command(folder, length)
                        if name == "timm_lt"
                        else timm_command(script, folder, length),
                        case,
                    )
                    for length in (short, long)
                ]
                seconds[name].append(spent[1] - spent[0])
    ratios = [timm / own for own, timm in zip(*seconds.values(), strict=True)]
    own, timm = (trained / statistics.median(spent) for spent in seconds.values())
    return own, timm, statistics.median(ratios)


def main() -> int:
    """Prints a row per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timm-train", type=Path, help="train.py of timm's repository")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--epochs", type=int, help="that are timed, instead of the case's own")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train, Case(**json.loads(arguments.case)))
        return 0
    if arguments.timm_train is None:
        print(f"error: {NO_SCRIPT}", file=sys.stderr)
        return 2
    unit = "CPU-second" if arguments.device == "cpu" else "second"
    print(f"images per {unit}, {arguments.workers} workers, {arguments.rounds} rounds")
    print(f"{'case':14}{'model':14}{'size':>6}{'timm_lt':>10}{'timm':>10}{'ratio':>8}")
    for name in arguments.cases:
        case = replace(CASES[name], workers=arguments.workers, device=arguments.device)
        case = replace(case, epochs=arguments.epochs or case.epochs)
        own, timm, ratio = compare(arguments.timm_train, case, arguments.rounds)
        print(f"{name:14}{case.model:14}{case.size:6}{own:10.1f}{timm:10.1f}{ratio:8.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
