"""Time to build cifar100_lt from local files, as a ratio to decoding their images.

``python benchmarks/cifar_lt.py``: stand-ins of full size, 60,000 images, as parquet and in the
binary version; CPU time in one thread, in turn, median of the ratios.
"""

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from timing import ratio, seconds

from timm_lt.data import create_dataset
from timm_lt.data.cifar import SPECS

CIFAR100 = SPECS["cifar100_lt"]
SIZES = {"train": 500, "test": 100}


def labels_of(part: str) -> np.ndarray:
    """Returns balanced labels that begin like the published ones."""
    first = CIFAR100.batches[0]["first"]
    left = SIZES[part] - np.bincount(first, minlength=100)
    rest = np.repeat(np.arange(100), left)
    return np.concatenate([first, np.random.default_rng(0).permutation(rest)])


def write(root: Path) -> list[bytes]:
    """Writes both layouts and returns the encoded images."""
    rng = np.random.default_rng(0)
    # Coarse noise, enlarged: about 2.3 kB as PNG, like a photograph.
    coarse = rng.integers(0, 256, (500, 16, 16, 3), np.uint8)
    images = coarse.repeat(2, axis=1).repeat(2, axis=2)
    encoded = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        encoded.append(file.getvalue())
    (root / "parquet").mkdir()
    (root / CIFAR100.binary).mkdir()
    for part in SIZES:
        labels = labels_of(part)
        chosen = np.arange(len(labels)) % len(images)
        # Bytes after the end of a PNG make each image unique to parquet and are never read.
        different = [encoded[i] + row.to_bytes(4) for row, i in enumerate(chosen)]
        column = pa.array([{"bytes": content, "path": None} for content in different])
        table = pa.table({"img": column, "fine_label": labels})
        pq.write_table(table, root / "parquet" / f"{part}-00000-of-00001.parquet")
        rows = np.zeros((len(labels), 2 + 3072), np.uint8)
        rows[:, 1] = labels
        rows[:, 2:] = images[chosen].transpose(0, 3, 1, 2).reshape(len(labels), -1)
        rows.tofile(root / CIFAR100.binary / f"{part}.bin")
    return encoded * 120


def decode(encoded: list[bytes]) -> None:
    """Decodes all images."""
    for content in encoded:
        Image.open(io.BytesIO(content)).load()


def main() -> None:
    """Prints both figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        encoded = write(root)
        for layout, place in (("parquet", root / "parquet"), ("binary", root / CIFAR100.binary)):

            def build(place: Path = place) -> None:
                create_dataset("cifar100_lt", root=place)

            share = ratio(build, lambda: decode(encoded), rounds)
            print(f"{layout:8} {seconds(build, 3):5.2f} s, {share:.3f} of decoding 60,000 images")


if __name__ == "__main__":
    main()
