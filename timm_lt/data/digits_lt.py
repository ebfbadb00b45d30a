"""digits_lt: scikit-learn's handwritten digits with a long tail, a smoke test of two seconds."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from timm_lt.utils.checks import UsageError, check_integer

from .long_tailed import make_long_tailed
from .sources import Split, dataset_from_arrays, register_dataset

if TYPE_CHECKING:
    from datasets import Dataset

SIZES = {"test": 30, "val": 20, "train": 120}  # per class; the digit 8 has 174 images in all
IMBALANCE_FACTOR = 24.0  # 120 ... 5: one class is many-shot, five medium, four few
SIZE = 32


@register_dataset("digits_lt")
def digits_lt(split: Split, *, seed: int = 0) -> "Dataset":
    """Builds a split of digits_lt: train 120 to 5 images per class, val 20 and test 30.

    The splits are disjoint. The digits of 8 x 8 pixels are enlarged to 32 x 32 RGB.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        seed: Seed of the choice of images, a non-negative integer.

    Raises:
        UsageError: If scikit-learn is not installed or the seed is out of range.

    References:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
        Repository, 1998, https://doi.org/10.24432/C50P49
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(
            'data set "digits_lt" needs scikit-learn: pip install "timm_lt[digits]"'
        ) from error
    check_integer("seed", seed, minimum=0, maximum=2**32 - 1)
    digits = load_digits()
    names = [f"digit_{digit}" for digit in range(10)]
    chosen = split_indices(digits.target, seed)[split]
    images = np.stack([enlarge(digits.images[index]) for index in chosen])
    dataset = dataset_from_arrays(images, digits.target[chosen].astype(np.int64), names)
    if split == "train":
        return make_long_tailed(dataset, imbalance_factor=IMBALANCE_FACTOR, seed=seed)
    return dataset


def split_indices(labels: NDArray[np.int64], seed: int) -> dict[str, NDArray[np.int64]]:
    """Splits the images of each class into test, val and the pool of train; returns indices."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum([*SIZES.values()])
    parts = []
    for label in range(10):
        indices = rng.permutation(np.flatnonzero(labels == label))
        parts.append(np.split(indices[: ends[-1]], ends[:-1]))
    return {
        name: np.concatenate(p) for name, p in zip(SIZES, zip(*parts, strict=True), strict=True)
    }


def enlarge(digit: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Enlarges a digit (8, 8) in [0, 16] bilinearly to (32, 32, 3)."""
    grey = Image.fromarray((digit * (255 / 16)).astype(np.uint8))
    enlarged = np.asarray(grey.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    return np.repeat(enlarged[:, :, None], 3, axis=2)
