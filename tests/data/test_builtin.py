"""glyph_lt and digits_lt: counts by hand, bytes that never change, images of their own classes."""

import hashlib
import json
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.datasets import load_digits

from timm_lt.data import builtin, create_dataset, glyph_arrays
from timm_lt.data.builtin import draw_glyphs, enlarge, glyph_atlas, glyph_names, split_digits
from timm_lt.utils.checks import UsageError
from tools import render_glyph_atlas

ATLAS = Path(str(resources.files("timm_lt.data"))) / "glyph_atlas"
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def splits():
    return {split: glyph_arrays(split) for split in SPLITS}


def test_glyph_counts_are_those_of_cifar100_lt_at_imbalance_factor_100(splits):
    counts = np.bincount(splits["train"][1])
    # 500 * 100^(-c/99): c = 33 gives 500 / 100^(1/3) = 107.7, c = 66 gives 23.2.
    assert [counts[c] for c in (0, 1, 33, 66, 99)] == [500, 477, 107, 23, 5]
    assert counts.sum() == 10_847
    many, few = (counts > 100).sum(), (counts < 20).sum()
    assert (many, 100 - many - few, few) == (35, 35, 30)
    for split, per_class in (("val", 20), ("test", 50)):
        assert_array_equal(np.bincount(splits[split][1]), [per_class] * 100)


def test_glyphs_are_those_that_results_were_published_on(splits):
    """A change here invalidates every number quoted for GlyphLT-100; ulps of a platform do not."""
    images, labels = splits["test"]
    assert (images.shape, images.dtype, labels.dtype) == ((5000, 32, 32, 3), np.uint8, np.int64)
    assert labels[:8].tolist() == [40, 90, 31, 2, 82, 38, 1, 97]
    sample = images[[0, 1, 4999], 8:24:5, 16].astype(int).sum((1, 2))
    assert_allclose(sample, [1777, 1034, 1921], atol=6)
    # Pixels over random colours and noise: each channel has mean about 1/2 and every level occurs.
    assert (images.mean((0, 1, 2)) / 255).tolist() == pytest.approx([0.5] * 3, abs=0.03)
    assert len(np.unique(images)) == 256


def test_no_image_occurs_twice_in_or_between_splits_and_seeds(splits):
    images = [image.tobytes() for data in splits.values() for image in data[0]]
    images += [image.tobytes() for image in glyph_arrays("val", seed=1)[0]]
    assert len(set(images)) == len(images) == 10_847 + 2_000 + 5_000 + 2_000


def test_the_data_set_is_the_same_for_any_number_of_threads(splits):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        dataset = create_dataset("glyph_lt", split="val")
    finally:
        torch.set_num_threads(threads)
    assert dataset.features["label"].names == glyph_names()
    assert dataset[:]["label"] == splits["val"][1].tolist()
    images = np.stack([np.asarray(image) for image in dataset[:]["image"]])
    assert_array_equal(images, splits["val"][0])


def test_clean_glyphs_are_recognised_by_the_nearest_atlas_entry(monkeypatch):
    """Class c must show glyph c: without distractors, colour and noise, in a mild pose."""
    labels = np.repeat(np.arange(100), 4)
    monkeypatch.setattr(
        builtin, "draw_poses", lambda rng, number, scale: np.tile(np.eye(2), (number, 1, 1))
    )
    centre = np.zeros((len(labels), 2))
    coverage = draw_glyphs(np.random.default_rng(0), labels, scale=(1, 1), centre=centre)
    sheet = glyph_atlas().reshape(1600, 48, 48)
    reduced = np.stack([np.asarray(Image.fromarray(cell).resize((32, 32))) for cell in sheet])
    images, sheet = coverage.reshape(len(labels), -1), reduced.reshape(1600, -1)
    # The images' own squares do not change which entry is nearest.
    nearest = ((sheet**2).sum(1) - 2 * images @ sheet.T).argmin(1) // 16
    assert (nearest == labels).mean() > 0.9  # the elastic field remains; chance is 0.01


def test_the_atlas_has_another_glyph_in_every_class_ink_in_every_cell_and_its_licences():
    atlas = glyph_atlas()
    assert atlas.shape == (100, 16, 48, 48)
    assert atlas.max((2, 3)).min() > 0.9
    rows = atlas.any(3).argmax(2), atlas[:, :, ::-1].any(3).argmax(2)
    columns = atlas.any(2).argmax(2), atlas[:, :, :, ::-1].any(2).argmax(2)
    height, width = (48 - first - last for first, last in (rows, columns))
    assert_array_equal(np.maximum(height, width), np.full((100, 16), 40))
    for face in range(16):
        assert len({cell.tobytes() for cell in atlas[:, face]}) == 100
    assert sum(file.stat().st_size for file in ATLAS.iterdir()) < 800_000
    assert "Bitstream Vera Fonts Copyright" in (ATLAS / "LICENSE_DEJAVU").read_text("utf-8")
    assert "STIX" in (ATLAS / "LICENSE_STIX").read_text("utf-8")


def test_the_script_reproduces_the_packaged_atlas(tmp_path):
    about = json.loads((ATLAS / "classes.json").read_text("utf-8"))
    fonts = render_glyph_atlas.font_folder()
    contents = {face: (fonts / face).read_bytes() for face in render_glyph_atlas.FACES}
    digests = {face: hashlib.sha256(content).hexdigest() for face, content in contents.items()}
    rendered = digests, render_glyph_atlas.rasteriser()
    if rendered != (about["faces"], about["rendered_with"]):
        pytest.skip("the atlas was rendered from other fonts, or with another rasteriser")
    assert render_glyph_atlas.main([str(tmp_path)]) == 0
    for name in ("atlas.png", "classes.json", "LICENSE_DEJAVU", "LICENSE_STIX", "README.md"):
        assert (tmp_path / name).read_bytes() == (ATLAS / name).read_bytes(), name


def test_wrong_seeds_and_splits_are_refused():
    with pytest.raises(UsageError, match=r"seed must be an integer >= 0"):
        glyph_arrays("val", seed=-1)
    with pytest.raises(UsageError, match=r"'trian' \(did you mean 'train'\?\).*train, val, test"):
        glyph_arrays("trian")
    with pytest.raises(UsageError, match=r"seed must be an integer from 0"):
        create_dataset("digits_lt", seed=-1)


def test_digits_have_all_three_shot_groups_and_no_digit_twice():
    # int(120 * 24^(-c / 9)), by hand with 24^(1/9) = 1.42347
    counts = {"train": [120, 84, 59, 41, 29, 20, 14, 10, 7, 5], "val": [20] * 10, "test": [30] * 10}
    for split, expected in counts.items():
        labels = create_dataset("digits_lt", split=split)["label"][:]
        assert_array_equal(np.bincount(labels), expected)
    target = load_digits().target
    everything, other = (
        np.concatenate(list(split_digits(target, seed).values())) for seed in (0, 1)
    )
    assert len(set(everything.tolist())) == len(everything) == 10 * (120 + 20 + 30)
    assert everything.tolist() != other.tolist()


def test_images_are_scikit_learns_digits_of_that_class():
    digits = load_digits()
    pairs = zip(map(enlarge, digits.images), digits.target, strict=True)
    known = {image.tobytes(): label for image, label in pairs}
    for split in SPLITS:
        for row in create_dataset("digits_lt", split=split):
            assert row["image"].size == (32, 32)
            assert known[np.asarray(row["image"]).tobytes()] == row["label"]


def test_without_scikit_learn_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r'pip install "timm_lt\[digits\]"'):
        create_dataset("digits_lt")
