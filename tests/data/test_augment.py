"""Augmentation: a function of (seed, epoch, image) alone, and geometrically what it says."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import affine

from timm_lt.data.augment import create_augmentation, list_augmentations, random_uniforms
from timm_lt.utils.checks import UsageError

ZERO = {"rotation": 0.0, "scale": 0.0, "aspect": 0.0, "shear": 0.0, "shift": 0.0}
# The uniform number that a symmetric range maps to its middle, and nearly to its end.
MIDDLE, END = 0.5, 1 - 2**-24


def smooth_images(n=6, height=24, width=24, seed=0):
    """Images without high frequencies, on which interpolations differ little."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 6, 6, generator=g) * 255
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)


def uniforms_for(n, **places):
    """All numbers in the middle but those named, in the order that the class docstring has."""
    order = ["rotation", "scale", "aspect", "shear", "shift_x", "shift_y"]
    uniforms = torch.full((n, 6), MIDDLE)
    for name, value in places.items():
        uniforms[:, order.index(name)] = value
    return uniforms


# Random numbers ----------------------------------------------------------------------------------


def test_the_numbers_are_splitmix64_by_hand():
    """The reference algorithm in Python integers, on the state that the docstring describes."""
    mask = 2**64 - 1
    key = int(np.random.SeedSequence(3).generate_state(1, np.uint64)[0])
    expected = []
    for draw in (0, 7):
        row = []
        for place in range(4):
            z = ((draw * 4 + place) * 0x9E3779B97F4A7C15 + key) & mask
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            row.append(((z ^ (z >> 31)) >> 40) / 2**24)
        expected.append(row)
    assert random_uniforms(3, torch.tensor([0, 7]), 4).tolist() == expected


def test_a_draw_has_its_numbers_whatever_else_is_in_the_batch():
    whole = random_uniforms(1, torch.arange(50), 6)
    some = torch.tensor([40, 3, 3, 17])
    assert random_uniforms(1, some, 6).equal(whole[some])
    assert len(whole.unique()) == whole.numel()


# Every augmentation ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_augmentations())
def test_an_image_comes_out_the_same_in_every_batch_and_order(name):
    augmentation = create_augmentation(name)
    images = smooth_images(12)
    rows = torch.arange(12)

    def augment(rows):
        return augmentation(images[rows], random_uniforms(0, rows, augmentation.count))

    whole = augment(rows)
    assert whole.shape == images.shape
    shuffled = torch.tensor([7, 0, 11, 3])
    assert augment(shuffled).equal(whole[shuffled])
    assert torch.cat([augment(rows[i : i + 1]) for i in range(12)]).equal(whole)
    assert name == "none" or not whole.allclose(images)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("afine", {}, "did you mean 'affine'"),
        ("crop", {"padding": 0}, "padding must be an integer >= 1"),
        ("crop", {"border": "mirror"}, "unknown border 'mirror'.*reflect, zero"),
        ("crop", {"hflip": 1.5}, r"hflip must be a number in \[0, 1\]"),
        ("affine", {"rotation": 4.0}, r"rotation must be a number in \[0, 3.1416\]"),
        ("affine", {"shift": -1}, r"shift must be a number in \[0, inf\)"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_augmentation(name, **options)


# Crop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 9)])
@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"padding": 1}, "reflect"),
        ({"padding": 3}, "reflect"),
        ({"padding": 4, "border": "zero", "hflip": 0.5}, "constant"),
    ],
)
def test_crop_is_a_slice_of_the_padded_image_or_its_mirror_image(options, mode, height, width):
    images, padding = torch.rand(200, 3, height, width) + 0.1, options["padding"]
    augmentation = create_augmentation("crop", **options)
    uniforms = random_uniforms(0, torch.arange(200), augmentation.count)
    out = augmentation(images, uniforms).numpy()
    pad = (padding, padding)
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), pad, pad], mode=mode)
    tops, mirrored = set(), 0
    for i, (u, v, *w) in enumerate(uniforms.tolist()):
        top, left = int(u * (2 * padding + 1)), int(v * (2 * padding + 1))
        crop, is_mirrored = padded[i, :, top : top + height, left : left + width], w and w[0] < 0.5
        assert (out[i] == (crop[:, :, ::-1] if is_mirrored else crop)).all()
        tops.add(top)
        mirrored += bool(is_mirrored)
    assert len(tops) == 2 * padding + 1
    assert 70 < mirrored < 130 or "hflip" not in options
    with pytest.raises(UsageError, match=f"padding must be an integer from 1 to {height - 1}, got"):
        create_augmentation("crop", padding=height)(images, uniforms)


# Affine ------------------------------------------------------------------------------------------

sizes = pytest.mark.parametrize(("height", "width"), [(24, 24), (16, 24)])


@sizes
def test_affine_is_the_identity_in_the_middle_and_shifts_by_whole_pixels(height, width):
    images = smooth_images(height=height, width=width)
    middle = create_augmentation("affine")(images, uniforms_for(len(images)))
    torch.testing.assert_close(middle, images, atol=1e-2, rtol=0)
    augmentation = create_augmentation("affine", **{**ZERO, "shift": 3.0})
    for place, axis in (("shift_y", 2), ("shift_x", 3)):
        out = augmentation(images, uniforms_for(len(images), **{place: END})).numpy()
        pad = [(0, 3) if dimension == axis else (0, 0) for dimension in range(4)]
        # Reflected about the edge of the last pixel, which numpy calls symmetric.
        padded = np.pad(images.numpy(), pad, mode="symmetric")
        expected = np.take(padded, np.arange(3, 3 + images.shape[axis]), axis)
        np.testing.assert_allclose(out, expected, atol=0.05)


@pytest.mark.parametrize("angle", [0.25, 1.0])
@pytest.mark.parametrize(("height", "width"), [(24, 24), (16, 24), (24, 16)])
def test_rotation_is_that_of_torchvision_in_pixels(angle, height, width):
    """In pixels: an image that is not square keeps its right angles."""
    images = smooth_images(height=height, width=width)
    augmentation = create_augmentation("affine", **{**ZERO, "rotation": angle})
    out = augmentation(images, uniforms_for(len(images), rotation=END))
    rest = {"translate": [0, 0], "scale": 1.0, "shear": [0.0]}
    rest["interpolation"] = InterpolationMode.BILINEAR
    expected = affine(images, angle=-math.degrees(angle), **rest)
    # torchvision fills the corners with zeros: compare what comes from inside.
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inside = torch.hypot(y - (height - 1) / 2, x - (width - 1) / 2) < min(height, width) / 2 - 1
    torch.testing.assert_close(out[:, :, inside], expected[:, :, inside], atol=0.1, rtol=0)
    assert (out - images)[:, :, inside].abs().max() > 10


def naive_bilinear(image, source):
    """Samples an image (H, W) at source(y, x) in pixel coordinates from the centre, by a loop."""
    height, width = image.shape
    out = np.full((height, width), np.nan)
    for i in range(height):
        for j in range(width):
            y, x = source(i - (height - 1) / 2, j - (width - 1) / 2)
            y, x = y + (height - 1) / 2, x + (width - 1) / 2
            if 0 <= y <= height - 1.001 and 0 <= x <= width - 1.001:
                a, b = int(y), int(x)
                u, v = y - a, x - b
                rows = (1 - v) * image[a : a + 2, b] + v * image[a : a + 2, b + 1]
                out[i, j] = (1 - u) * rows[0] + u * rows[1]
    return out


@pytest.mark.parametrize(
    ("options", "place", "source"),
    [
        ({"scale": 0.3}, "scale", lambda y, x: (y / math.exp(0.3), x / math.exp(0.3))),
        ({"aspect": 0.2}, "aspect", lambda y, x: (y / math.exp(0.2), x * math.exp(0.2))),
        ({"shear": 0.5}, "shear", lambda y, x: (y, x + 0.5 * y)),
    ],
)
@sizes
def test_scale_aspect_and_shear_are_the_explicit_loop(options, place, source, height, width):
    images = smooth_images(1, height=height, width=width)
    augmentation = create_augmentation("affine", **{**ZERO, **options})
    out = augmentation(images, uniforms_for(1, **{place: END}))
    expected = naive_bilinear(images[0, 0].double().numpy(), source)
    known = ~np.isnan(expected)
    assert known.mean() > 0.4
    np.testing.assert_allclose(out[0, 0].numpy()[known], expected[known], atol=0.1)
