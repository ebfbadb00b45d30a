"""Long-tailed data sets that need no download: glyph_lt is generated, digits_lt scikit-learn's."""

import json
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from timm_lt.utils.checks import UsageError, check_choice, check_integer
from timm_lt.utils.longtail import long_tailed_counts

from .long_tailed import make_long_tailed
from .sources import Split, dataset_from_arrays, register_dataset

if TYPE_CHECKING:
    from datasets import Dataset

Floats = NDArray[np.float32]

NUM_CLASSES = 100
NUM_FACES = 16
CELL = 48  # side of a glyph in the atlas
SIZE = 32  # side of an image
SPLITS = {"train": 0, "val": 1, "test": 2}  # second part of the seed
EVALUATION_IMAGES = {"val": 20, "test": 50}  # per class
DIGITS = {"test": 30, "val": 20, "train": 120}  # per class; the digit 8 has 174 images in all
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# x and y of the pixel centres, (32, 32) each, from -1 to 1 over the image.
PIXELS = np.meshgrid(*[((np.arange(SIZE) * 2 + 1) / SIZE - 1).astype(np.float32)] * 2)
CHUNK = 256  # images drawn together, for the CPU cache; the images depend on it


@register_dataset("glyph_lt")
def glyph_lt(split: Split, *, seed: int = 0) -> "Dataset":
    """Builds a split of GlyphLT-100: train 500 to 5 images per class, val 20 and test 50.

    Class c has ``int(500 * 100^(-c / 99))`` training images, as in CIFAR-100-LT at imbalance factor
    100.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        seed: Seed of the generated images, a non-negative integer.
    """
    images, labels = glyph_arrays(split, seed)
    return dataset_from_arrays(images, labels, glyph_names())


def glyph_names() -> list[str]:
    """Returns the class names, (C,), by descending frequency."""
    text = (resources.files("timm_lt.data") / "glyph_atlas" / "classes.json").read_text("utf-8")
    return [entry["name"] for entry in json.loads(text)["classes"]]


@lru_cache(maxsize=1)
def glyph_atlas() -> Floats:
    """Returns the ink of each pixel in [0, 1]: class, face, row, column (100, 16, 48, 48)."""
    with (resources.files("timm_lt.data") / "glyph_atlas" / "atlas.png").open("rb") as file:
        sheet = np.asarray(Image.open(file), np.float32) / np.float32(255)
    cells = sheet.reshape(NUM_CLASSES, CELL, NUM_FACES, CELL).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(cells)


def glyph_arrays(split: Split, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Generates the images (N, 32, 32, 3) and labels (N,) of a split of glyph_lt.

    The same arguments give the same bytes for any number of threads.

    Raises:
        UsageError: If there is no such split or the seed is not a non-negative integer.
    """
    check_choice("split of glyph_lt", split, tuple(SPLITS))
    check_integer("seed", seed, minimum=0)
    counts: int | list[int] = EVALUATION_IMAGES.get(split, 0)
    if split == "train":
        counts = long_tailed_counts(NUM_CLASSES, 500, 100.0, "exponential")
    rng = np.random.default_rng([seed, SPLITS[split]])
    labels = rng.permutation(np.repeat(np.arange(NUM_CLASSES), counts))
    images = np.empty((len(labels), SIZE, SIZE, 3), np.uint8)
    with torch.no_grad():
        for start in range(0, len(labels), CHUNK):
            chunk = draw_images(rng, labels[start : start + CHUNK])
            images[start : start + CHUNK] = chunk.transpose(0, 2, 3, 1)
    return images, labels.astype(np.int64)


def draw_images(rng: np.random.Generator, labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Draws images (N, 3, 32, 32) of the glyphs of labels (N,).

    Two background colours, two distractors at the border, the glyph, an occluding bar, blur, noise.
    """
    number = len(labels)
    first, second, ink = draw_colours(rng, number)
    mixture = smooth_noise(rng, 0.5, number, 1, 5) + np.float32(0.5)
    image = first + (second - first) * mixture
    for _ in range(2):
        image = add_distractor(rng, image)
    centre = rng.uniform(-0.22, 0.22, (number, 2))
    image += (ink - image) * draw_glyphs(rng, labels, scale=(0.73, 1.17), centre=centre)
    image += (draw_colours(rng, number)[0] - image) * draw_bars(rng, number)
    image = blur(image, per_image(rng, 0.0, 1.0, number))
    deviation = per_image(rng, 0.0, 0.10, number)
    image += rng.standard_normal(image.shape, np.float32) * deviation
    image *= np.float32(255)
    image += np.float32(0.5)
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def add_distractor(rng: np.random.Generator, image: Floats) -> Floats:
    """Draws another glyph across the border of three in four images (N, 3, 32, 32)."""
    number = len(image)
    others = rng.integers(NUM_CLASSES, size=number)
    present = (rng.random((number, 1, 1, 1)) < 0.75).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi, number)
    radius = rng.uniform(0.95, 1.25, number)
    border = np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]
    alpha = draw_glyphs(rng, others, scale=(0.5, 0.9), centre=border) * present
    return np.asarray(image + (draw_colours(rng, number)[2] - image) * alpha)


def per_image(rng: np.random.Generator, low: float, high: float, number: int) -> Floats:
    """Draws one uniform value per image, (N, 1, 1, 1)."""
    return rng.uniform(low, high, (number, 1, 1, 1)).astype(np.float32)


def draw_colours(rng: np.random.Generator, number: int) -> tuple[Floats, Floats, Floats]:
    """Draws two related background colours and an ink of another luma, (N, 3, 1, 1) each."""
    first = rng.uniform(0, 1, (number, 3))
    second = np.clip(first + rng.uniform(-0.25, 0.25, (number, 3)), 0, 1)
    luma = (first + second) @ LUMA / 2
    contrast = rng.uniform(0.28, 0.78, number)
    fits = (luma + contrast <= 1) & (luma - contrast >= 0)
    upwards = np.where(fits, rng.random(number) < 0.5, luma < 0.5)
    target = np.clip(luma + np.where(upwards, contrast, -contrast), 0, 1)
    tint = rng.uniform(-0.3, 0.3, (number, 3))
    ink = np.clip(target[:, None] + tint - (tint @ LUMA)[:, None], 0, 1)
    first, second, ink = np.stack([first, second, ink]).astype(np.float32)[..., None, None]
    return first, second, ink


def smooth_noise(
    rng: np.random.Generator, amplitude: float, number: int, channels: int, knots: int
) -> Floats:
    """Draws coarse noise within ``amplitude`` of 0 and interpolates it to (N, channels, 32, 32)."""
    coarse = rng.uniform(-amplitude, amplitude, (number, channels, knots, knots))
    grid = torch.from_numpy(coarse.astype(np.float32))
    return np.asarray(F.interpolate(grid, size=SIZE, mode="bilinear", align_corners=True))


def draw_glyphs(
    rng: np.random.Generator,
    labels: NDArray[np.int64],
    *,
    scale: tuple[float, float],
    centre: NDArray[np.float64],
) -> Floats:
    """Draws the coverage of pixels, (N, 1, 32, 32), by glyphs in a random face, pose and weight.

    At ``scale`` 1, a glyph has 27 pixels; centres (N, 2) range from -1 to 1 over the image.
    """
    number = len(labels)
    glyphs = glyph_atlas()[labels, rng.integers(NUM_FACES, size=number)]
    inverse = np.linalg.inv(draw_poses(rng, number, scale)).astype(np.float32)
    elastic = smooth_noise(rng, 0.13, number, 2, 5)
    x, y = PIXELS
    shift = centre.astype(np.float32)[:, :, None, None]
    dx, dy = x - shift[:, 0], y - shift[:, 1]
    m = inverse[:, :, :, None, None]
    grid = [m[:, i, 0] * dx + m[:, i, 1] * dy + elastic[:, i] for i in range(2)]
    sampled = F.grid_sample(
        torch.from_numpy(glyphs[:, None]),
        torch.from_numpy(np.stack(grid, axis=-1)),
        align_corners=False,
    )
    threshold = per_image(rng, 0.3, 0.7, number)
    coverage = (sampled.numpy() - threshold) / np.float32(0.4) + np.float32(0.5)
    return np.asarray(np.clip(coverage, 0, 1))


def draw_poses(
    rng: np.random.Generator, number: int, scale: tuple[float, float]
) -> NDArray[np.float64]:
    """Draws the linear part of poses, (N, 2, 2): rotation after shear after stretching."""
    angle = rng.uniform(-0.30, 0.30, number)
    size = rng.uniform(*scale, number)
    aspect = np.exp(rng.uniform(-0.18, 0.18, number))
    shear = rng.uniform(-0.25, 0.25, number)
    zero, one = np.zeros(number), np.ones(number)

    def matrix(*entries: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack(entries, -1).reshape(number, 2, 2)

    rotate = matrix(np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle))
    stretch = matrix(size * aspect, zero, zero, size / aspect)
    return np.asarray(rotate @ matrix(one, shear, zero, one) @ stretch)


def draw_bars(rng: np.random.Generator, number: int) -> Floats:
    """Draws the coverage of pixels by a bar in half of the images, (N, 1, 32, 32)."""
    x, y = PIXELS
    angle = rng.uniform(0, np.pi, (number, 1, 1, 1))
    cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    distance = np.abs(x * cosine + y * sine - per_image(rng, -0.5, 0.5, number))
    half_width = per_image(rng, 0.05, 0.15, number)
    coverage = np.clip((half_width - distance) * np.float32(SIZE / 2) + np.float32(0.5), 0, 1)
    return np.asarray(coverage * (rng.random((number, 1, 1, 1)) < 0.5).astype(np.float32))


def blur(image: Floats, amount: Floats) -> Floats:
    """Blends images with their 1-2-1 blur, by an amount (N, 1, 1, 1) in [0, 1]."""
    smooth = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    smooth = smooth[:, :, :-2] + 2 * smooth[:, :, 1:-1] + smooth[:, :, 2:]
    smooth = smooth[:, :, :, :-2] + 2 * smooth[:, :, :, 1:-1] + smooth[:, :, :, 2:]
    return np.asarray(image + (smooth * np.float32(1 / 16) - image) * amount)


@register_dataset("digits_lt")
def digits_lt(split: Split, *, seed: int = 0) -> "Dataset":
    """Builds a split of digits_lt: train 120 to 5 images per class, val 20 and test 30.

    The digits of 8 x 8 pixels are enlarged to 32 x 32 RGB. One class is many-shot, five are
    medium-shot and four few-shot.

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
    chosen = split_digits(digits.target, seed)[split]
    images = np.stack([enlarge(digits.images[index]) for index in chosen])
    names = [f"digit_{digit}" for digit in range(10)]
    dataset = dataset_from_arrays(images, digits.target[chosen].astype(np.int64), names)
    if split == "train":
        return make_long_tailed(dataset, imbalance_factor=24.0, seed=seed)
    return dataset


def split_digits(labels: NDArray[np.int64], seed: int) -> dict[str, NDArray[np.int64]]:
    """Returns the indices of test, val and the pool of train, disjoint, class by class."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum([*DIGITS.values()])
    parts = []
    for label in range(10):
        indices = rng.permutation(np.flatnonzero(labels == label))
        parts.append(np.split(indices[: ends[-1]], ends[:-1]))
    return dict(zip(DIGITS, map(np.concatenate, zip(*parts, strict=True)), strict=True))


def enlarge(digit: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Enlarges a digit (8, 8) in [0, 16] bilinearly to (32, 32, 3)."""
    grey = Image.fromarray((digit * (255 / 16)).astype(np.uint8))
    return np.asarray(grey.resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB"))
