"""digits_lt: scikit-learn's real handwritten digits with a long tail, the two-second smoke test."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from timm_lt.utils.checks import UsageError, check_integer

from .long_tailed import make_long_tailed
from .sources import Split, dataset_from_arrays, register_dataset

if TYPE_CHECKING:
    from datasets import Dataset

EVALUATION_IMAGES = {"test": 30, "val": 20}  # per class; the digit 8 has 174 images in all
TRAIN_IMAGES = 120
IMBALANCE_FACTOR = 24.0  # 120 ... 5: one class is many-shot, five medium, four few
SIZE = 32


@register_dataset("digits_lt")
def digits_lt(split: Split, *, seed: int = 0) -> "Dataset":
    """Builds a split of digits_lt: train 120 to 5 images per class, val 20 and test 30.

    The splits are disjoint. The digits are 8 x 8 in 17 grey levels; here they are 32 x 32 RGB,
    enlarged bilinearly.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        seed: Of the choice of images, a non-negative integer.

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
    """Deals the images of each class out: to test, then val, then the pool that train is cut from.

    Shape:
        ``labels (N,)``; returns three disjoint index arrays, class by class.
    """
    rng = np.random.default_rng(seed)
    sizes = [*EVALUATION_IMAGES.values(), TRAIN_IMAGES]
    dealt = []
    for label in range(10):
        indices = rng.permutation(np.flatnonzero(labels == label))
        dealt.append(np.split(indices[: sum(sizes)], np.cumsum(sizes)[:-1]))
    names = [*EVALUATION_IMAGES, "train"]
    return {
        name: np.concatenate([parts[place] for parts in dealt]) for place, name in enumerate(names)
    }


def enlarge(digit: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Enlarges a digit.

    Shape:
        ``digit (8, 8)`` in [0, 16]; returns ``(32, 32, 3)``.
    """
    grey = Image.fromarray((digit * (255 / 16)).astype(np.uint8))
    enlarged = np.asarray(grey.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    return np.repeat(enlarged[:, :, None], 3, axis=2)
