"""GlyphLT-100: counts worked out by hand, bytes that never change, glyphs that can be read."""

import hashlib
import json
from collections import Counter
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from timm_lt.data import create_dataset, glyph_arrays, glyph_lt
from timm_lt.data.glyph_lt import draw_glyphs, glyph_atlas, glyph_names
from timm_lt.utils.checks import UsageError
from tools import render_glyph_atlas

ATLAS = Path(str(resources.files("timm_lt.data"))) / "glyph_atlas"


@pytest.fixture(scope="module")
def splits():
    return {split: glyph_arrays(split) for split in ("train", "val", "test")}


def test_train_counts_are_those_of_cifar100_lt_at_imbalance_factor_100(splits):
    counts = np.bincount(splits["train"][1])
    # 500 * 100^(-c/99): c = 33 gives 500 / 100^(1/3) = 107.7, c = 66 gives 23.2.
    assert [counts[c] for c in (0, 1, 33, 66, 99)] == [500, 477, 107, 23, 5]
    assert counts.sum() == 10_847
    few = (counts < 20).sum()
    many = (counts > 100).sum()
    assert (many, 100 - many - few, few) == (35, 35, 30)


@pytest.mark.parametrize(("split", "per_class"), [("val", 20), ("test", 50)])
def test_evaluation_splits_are_balanced(splits, split, per_class):
    assert_array_equal(np.bincount(splits[split][1]), [per_class] * 100)


def test_arrays_are_rgb_bytes_and_fill_the_range(splits):
    images, labels = splits["test"]
    assert images.shape == (5000, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    # Pixels over random colours and noise: each channel has mean about 1/2 and every level occurs.
    assert (images.mean((0, 1, 2)) / 255).tolist() == pytest.approx([0.5] * 3, abs=0.03)
    assert len(np.unique(images)) == 256


def test_data_are_those_that_results_were_published_on(splits):
    """A change here invalidates every number quoted for GlyphLT-100; ulps of a platform do not."""
    images, labels = splits["test"]
    assert labels[:8].tolist() == [40, 90, 31, 2, 82, 38, 1, 97]
    sample = images[[0, 1, 4999], 8:24:5, 16].astype(int).sum((1, 2))
    assert_allclose(sample, [1777, 1034, 1921], atol=6)


def test_no_image_occurs_twice_in_or_between_splits_and_seeds(splits):
    images = [image.tobytes() for data in splits.values() for image in data[0]]
    images += [image.tobytes() for image in glyph_arrays("val", seed=1)[0]]
    assert len(set(images)) == len(images) == 10_847 + 2_000 + 5_000 + 2_000


def test_bytes_do_not_depend_on_the_number_of_threads(splits):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        images, labels = glyph_arrays("val")
    finally:
        torch.set_num_threads(threads)
    assert_array_equal(images, splits["val"][0])
    assert_array_equal(labels, splits["val"][1])


def test_dataset_decodes_to_the_generated_arrays(splits):
    images, labels = splits["val"]
    dataset = create_dataset("glyph_lt", split="val")
    assert dataset.features["label"].names == glyph_names()
    assert dataset[:]["label"] == labels.tolist()
    assert dataset[7]["image"].mode == "RGB"
    assert_array_equal(np.stack([np.asarray(image) for image in dataset[:]["image"]]), images)


def test_clean_glyphs_are_recognised_by_the_nearest_atlas_entry(monkeypatch):
    """Class c must show glyph c: without distractors, colour and noise, in a mild pose."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(100), 4)
    monkeypatch.setattr(
        glyph_lt, "draw_poses", lambda rng, number, scale: np.tile(np.eye(2), (number, 1, 1))
    )
    coverage = draw_glyphs(rng, labels, scale=(1, 1), centre=np.zeros((len(labels), 2)))[:, 0]
    sheet = glyph_atlas().reshape(1600, 48, 48)
    reduced = np.stack([np.asarray(Image.fromarray(cell).resize((32, 32))) for cell in sheet])
    images, sheet = coverage.reshape(len(labels), -1), reduced.reshape(1600, -1)
    # The images' own squares do not change which entry is nearest.
    distance = (sheet**2).sum(1) - 2 * images @ sheet.T
    nearest = distance.argmin(1) // 16
    assert (nearest == labels).mean() > 0.9  # the elastic field remains; chance is 0.01


def test_atlas_is_small_and_has_its_licences():
    assert sum(file.stat().st_size for file in ATLAS.iterdir()) < 800_000
    assert "Bitstream Vera Fonts Copyright" in (ATLAS / "LICENSE_DEJAVU").read_text("utf-8")
    assert "STIX" in (ATLAS / "LICENSE_STIX").read_text("utf-8")


def test_atlas_has_a_different_glyph_in_every_class_and_ink_in_every_cell():
    atlas = glyph_atlas()
    assert atlas.shape == (100, 16, 48, 48)
    assert atlas.max((2, 3)).min() > 0.9
    rows = atlas.any(3).argmax(2), atlas[:, :, ::-1].any(3).argmax(2)
    columns = atlas.any(2).argmax(2), atlas[:, :, :, ::-1].any(2).argmax(2)
    height, width = (48 - first - last for first, last in (rows, columns))
    assert_array_equal(np.maximum(height, width), np.full((100, 16), 40))
    for face in range(16):
        assert len({cell.tobytes() for cell in atlas[:, face]}) == 100


def test_class_names_are_distinct_and_say_the_code_point():
    classes = json.loads((ATLAS / "classes.json").read_text("utf-8"))["classes"]
    names = glyph_names()
    assert len(set(names)) == 100
    assert all(name.isascii() and name.islower() and name.isidentifier() for name in names)
    by_char = {entry["char"]: entry for entry in classes}
    assert by_char["A"] == {"name": "latin_capital_a", "char": "A", "code_point": "U+0041"}
    assert by_char["€"] == {"name": "euro_sign", "char": "€", "code_point": "U+20AC"}
    scripts = Counter(name.split("_")[0] for name in names)
    assert scripts["digit"] == 10
    assert min(scripts["latin"], scripts["greek"], scripts["cyrillic"]) >= 10


@pytest.mark.parametrize(
    "char",
    [
        *"Oocsvxz!",
        "\N{GREEK CAPITAL LETTER ALPHA}",
        "\N{CYRILLIC SMALL LETTER ER}",
        "\N{LATIN SMALL LETTER E WITH ACUTE}",
    ],
)
def test_lookalikes_accents_and_punctuation_are_no_classes(char):
    classes = json.loads((ATLAS / "classes.json").read_text("utf-8"))["classes"]
    assert char not in {entry["char"] for entry in classes}


def test_script_reproduces_the_packaged_atlas(tmp_path):
    about = json.loads((ATLAS / "classes.json").read_text("utf-8"))
    fonts = render_glyph_atlas.font_folder()
    digests = {
        face: hashlib.sha256((fonts / face).read_bytes()).hexdigest()
        for face in render_glyph_atlas.FACES
    }
    if digests != about["faces"]:
        pytest.skip("matplotlib bundles other font files than the atlas was rendered from")
    if render_glyph_atlas.rasteriser() != about["rendered_with"]:
        pytest.skip("Pillow has another rasteriser or compressor than the atlas was rendered with")
    assert render_glyph_atlas.main([str(tmp_path)]) == 0
    for name in ("atlas.png", "classes.json", "LICENSE_DEJAVU", "LICENSE_STIX", "README.md"):
        assert (tmp_path / name).read_bytes() == (ATLAS / name).read_bytes(), name


def test_wrong_seed_and_split_are_refused():
    with pytest.raises(UsageError, match=r"seed must be an integer >= 0"):
        glyph_arrays("val", seed=-1)
    with pytest.raises(UsageError, match=r"'trian' \(did you mean 'train'\?\).*train, val, test"):
        glyph_arrays("trian")
