"""Augmentations of batches of small images, each a function of (seed, draw) alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.samplers.streams import keyed
from timm_lt.utils.checks import Registry, check_fields, check_integer

AUGMENTATIONS: Registry[Callable[..., "Augmentation"]] = Registry("augmentation")
A = TypeVar("A", bound="type[Augmentation]")
Border = Literal["reflect", "zero"]


def register_augmentation(name: str) -> Callable[[A], A]:
    """Returns a class decorator that registers an augmentation under a name."""
    return cast("Callable[[A], A]", AUGMENTATIONS.register(name))


def list_augmentations() -> list[str]:
    """Returns the names of the augmentations."""
    return list(AUGMENTATIONS)


def create_augmentation(name: str, **options: Any) -> "Augmentation":
    """Creates an augmentation.

    Raises:
        UsageError: For an unknown name or option, or a value out of its range.
    """
    return AUGMENTATIONS.create(name, **options)


def random_uniforms(seed: int, draws: Tensor, count: int) -> Tensor:
    """Returns uniform numbers in [0, 1), (B, count), a function of (seed, draw, column) alone.

    The finaliser of SplitMix64 over the draws (B,) of a sampler; see Steele, Lea and Flood, Fast
    Splittable Pseudorandom Number Generators, OOPSLA 2014, https://doi.org/10.1145/2660193.2660195.
    """
    key = np.random.SeedSequence(seed).generate_state(1, np.uint64).astype(np.uint64)
    first = draws.numpy().astype(np.uint64) * np.uint64(count)
    bits = keyed(key, first[:, None] + np.arange(count, dtype=np.uint64))
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) / np.float32(2**24))


@dataclass(eq=False, repr=False, kw_only=True)
class Augmentation(nn.Module):
    """Base of all augmentations, which does not change the images.

    Attributes:
        count: Random numbers per image.

    Shape:
        - images: (B, 3, H, W) float
        - uniforms: (B, count) in [0, 1), a function of seed and draw
        - output: (B, 3, H, W)
    """

    count = 0

    def __post_init__(self) -> None:
        super().__init__()
        check_fields(self)

    def forward(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Returns the augmented images."""
        return images


@register_augmentation("none")
class NoAugmentation(Augmentation):
    """Does not change the images."""


@register_augmentation("crop")
@dataclass(eq=False, repr=False, kw_only=True)
class RandomCrop(Augmentation):
    """Pads, crops at a random position, and flips.

    With ``padding`` 4, ``border`` zero and ``hflip`` 0.5 it is the usual augmentation of CIFAR.

    Args:
        padding: Pixels on each side, >= 1 and below the image's size.
        border: ``"reflect"`` about the outermost pixels, or ``"zero"``, which is black.
        hflip: Probability of a horizontal flip, in [0, 1].
    """

    padding: Annotated[int, 1] = 3
    border: Border = "reflect"
    hflip: Annotated[float, "[0, 1]"] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        # Without flips, crops are those of earlier versions.
        self.count = 3 if self.hflip else 2

    def forward(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Returns the cropped images."""
        batch, _, height, width = images.shape
        check_integer("padding", self.padding, minimum=1, maximum=min(height, width) - 1)
        mode = "reflect" if self.border == "reflect" else "constant"
        padded = F.pad(images, (self.padding,) * 4, mode=mode)
        uniforms = uniforms.to(images.device)
        top, left = (uniforms[:, :2] * (2 * self.padding + 1)).long().unbind(1)
        rows = top[:, None] + torch.arange(height, device=images.device)
        columns = left[:, None] + torch.arange(width, device=images.device)
        if self.hflip:
            mirrored = uniforms[:, 2:] < self.hflip
            columns = torch.where(mirrored, columns.flip(1), columns)
        image = torch.arange(batch, device=images.device)[:, None, None]
        cropped = padded[image, :, rows[:, :, None], columns[:, None, :]]
        return cropped.permute(0, 3, 1, 2)


@register_augmentation("affine")
@dataclass(eq=False, repr=False, kw_only=True)
class RandomAffine(Augmentation):
    """Rotates, scales, stretches, shears and shifts, with the border reflected.

    Each range is symmetric; scale and aspect are drawn on a logarithmic scale.

    Args:
        rotation: Largest angle, radians, in [0, pi].
        scale: Largest |log scale|, in [0, 2].
        aspect: Largest |log of the factor| by which the width grows and the height shrinks, in
            [0, 2].
        shear: Largest shear, in [0, 2].
        shift: Largest shift along each axis, pixels, >= 0.
    """

    count = 6

    rotation: Annotated[float, "[0, 3.1416]"] = 0.25
    scale: Annotated[float, "[0, 2]"] = 0.15
    aspect: Annotated[float, "[0, 2]"] = 0.12
    shear: Annotated[float, "[0, 2]"] = 0.15
    shift: Annotated[float, "[0, inf)"] = 3.0

    def forward(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Returns the transformed images, bilinear."""
        angle, scale, aspect, shear, shift_x, shift_y = (2 * uniforms - 1).unbind(1)
        cos, sin = torch.cos(angle * self.rotation), torch.sin(angle * self.rotation)
        # The grid maps output pixels to input pixels, hence the inverse scale.
        zoom = torch.exp(-scale * self.scale)
        stretch = torch.exp(aspect * self.aspect)
        slant = shear * self.shear
        height, width = images.shape[-2:]
        # Grid coordinates run from -1 to 1 along both axes: a pixel is wider on the shorter one.
        tall, wide = height / width, width / height
        rows = [
            zoom * stretch * cos,
            zoom * (slant * cos - sin) / stretch * tall,
            shift_x * (2 * self.shift / width),
            zoom * stretch * sin * wide,
            zoom * (slant * sin + cos) / stretch,
            shift_y * (2 * self.shift / height),
        ]
        theta = torch.stack(rows, dim=1).view(-1, 2, 3)
        grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
