"""What a look at a data set finds, against naive loops over its images."""

import io
import itertools
import statistics

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from timm_lt.data import create_dataset, inspect_splits
from timm_lt.data.columns import as_rgb
from timm_lt.data.inspection import DuplicateImage as Copy
from timm_lt.data.inspection import find_duplicates
from timm_lt.utils.console import pillow_warnings_ignored

NAMES = ["a", "b", "c"]
SPLITS = ["train", "val", "test"]


def png(color, size=(4, 3), mode="RGB"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (color, 2 * color % 256, 7)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def split_of(files, labels, names=NAMES):
    columns = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    images = [{"bytes": file, "path": None} for file in files]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, columns)


@pytest.fixture
def three_splits():
    train = [png(n) for n in range(12)] + [png(3), png(3), b"", png(50, (9, 2), "L"), b"xy"]
    labels = [0] * 8 + [1] * 4 + [0, 1, 2, 2, 2]
    return {
        "train": split_of(train, labels),
        "val": split_of([png(100), png(101), png(3)], [0, 1, 2]),
        "test": split_of([png(3), png(200), png(100), png(201)], [0, 1, 0, 2]),
    }


def test_counts_and_imbalance(three_splits):
    found = inspect_splits(three_splits, name="three", shot_rule="oltr")
    assert found.class_counts == {"train": [9, 5, 3], "val": [1, 1, 1], "test": [2, 1, 1]}
    assert (found.num_classes, found.label_names, found.val_source) == (3, NAMES, "val")
    assert found.imbalance_factor == 3
    assert found.imbalance_ratio == pytest.approx((1 + 9 / 5 + 3) / 3)
    assert found.shots == {
        "many_shot": {"classes": 0, "rule": ">= 100", "images": 0},
        "medium_shot": {"classes": 0, "rule": "21 to 99", "images": 0},
        "few_shot": {"classes": 3, "rule": "<= 20", "images": 17},
    }


@pytest.mark.parametrize("large", [3_000_000, 2**63 - 1])
def test_labels_far_apart_are_counted_by_name(large):
    train = split_of([png(n) for n in range(6)], [0] * 6)
    train = train.remove_columns("label").add_column("label", [0, 0, 7, 7, large, large])
    found = inspect_splits({"train": train, "test": train})
    assert found.label_names == ["0", "7", str(large)]
    assert found.class_counts == {"train": [2, 2, 2], "test": [2, 2, 2]}
    assert any(f"of {large + 1:,} classes have no image" in problem for problem in found.problems)


def test_what_is_damaged_and_how_large_the_others_are(three_splits):
    seen = []
    found = inspect_splits(three_splits, on_image=lambda: seen.append(1))
    assert len(seen) == 24
    assert [(one.row, one.reason[:9]) for one in found.unreadable["train"]] == [
        (14, "0 bytes"),
        (16, "it is not"),
    ]
    assert found.unreadable["val"] == found.unreadable["test"] == []
    assert found.sizes.modes == {"RGB": 21, "L": 1}
    assert found.sizes.formats == {"PNG": 22}
    assert (found.sizes.width, found.sizes.height) == ((4, 4, 9), (2, 3, 3))
    assert found.sizes.most_frequent == [(4, 3, 21), (9, 2, 1)]
    (problem,) = found.problems
    assert problem.startswith("train split: 2 of 17 images cannot be decoded: image 14: 0 bytes, ")


def test_transparency_levels_and_images_of_one_colour_are_counted(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 4), dtype=np.uint8)
    # Black on black, which is one colour.
    icon = np.zeros((9, 9, 4), np.uint8)
    icon[3:6, 3:6, 3] = 255
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    pictures = [Image.fromarray(noise), Image.fromarray(noise[..., :3]), Image.fromarray(icon)]
    pictures += [deep, deep.convert("I"), Image.fromarray(noise[..., 0] / np.float32(255))]
    pictures += [Image.new("RGB", (20, 20), "red")]
    files = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG" if picture.mode in ("RGB", "RGBA") else "TIFF")
        files.append(buffer.getvalue())
    split = split_of(files * 3, [0, 1, 2] * 7)
    for background, one_color in (("white", 1), ("black", 2)):
        shown = as_rgb(split, background=background)
        with pillow_warnings_ignored():
            sizes = inspect_splits({"train": shown, "val": shown, "test": shown}).sizes
        # Three splits, three times each.
        assert (sizes.transparent, sizes.deep, sizes.huge) == (2 * 9, 3 * 9, 9)
        assert sizes.one_color == one_color * 9


def test_duplicates_are_counted_within_and_across(three_splits):
    twins = inspect_splits(three_splits).duplicates
    # png(3) is in train three times, once of class b, and in val as class c.
    assert twins.within == {"train": 2, "val": 0, "test": 0}
    assert twins.across == {"train, val": 1, "train, test": 1, "val, test": 2}
    assert twins.conflicts == 2
    assert twins.pairs["train"] == [
        (Copy("train", "image 3", 0), Copy("train", "image 12", 0)),
        (Copy("train", "image 3", 0), Copy("train", "image 13", 1)),
    ]
    assert twins.pairs["train, test"] == [(Copy("train", "image 3", 0), Copy("test", "image 0", 0))]


def test_quick_decodes_nothing_and_compares_nothing(three_splits):
    found = inspect_splits(three_splits, quick=True, on_image=pytest.fail)
    assert (found.duplicates, found.sizes) == (None, None)
    assert [one.row for one in found.unreadable["train"]] == [14, 16]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("xyz"), st.sampled_from(SPLITS), st.integers(0, 1)), max_size=12
    )
)
def test_counts_of_duplicates_are_those_of_a_naive_loop(images):
    images.sort(key=lambda image: SPLITS.index(image[1]))
    given = [(c, Copy(split, str(n), label)) for n, (c, split, label) in enumerate(images)]
    found = find_duplicates(given, SPLITS)
    for split in SPLITS:
        contents = [content for content, twin in given if twin.split == split]
        assert found.within[split] == len(contents) - len(set(contents))
    for one, other in itertools.combinations(SPLITS, 2):
        there = {content for content, twin in given if twin.split == one}
        repeated = [twin for content, twin in given if twin.split == other and content in there]
        assert found.across[f"{one}, {other}"] == len(repeated)
    conflicts = 0
    for number, (content, twin) in enumerate(given):
        earlier = [other for same, other in given[:number] if same == content]
        conflicts += bool(earlier) and earlier[0].label != twin.label
    assert found.conflicts == conflicts


def test_sizes_are_those_of_a_naive_loop():
    generator = np.random.default_rng(0)
    shapes = [tuple(map(int, generator.integers(1, 9, 2))) for _ in range(40)]
    train = split_of([png(n, size) for n, size in enumerate(shapes)], [n % 2 for n in range(40)])
    sizes = inspect_splits({"train": train, "test": train}).sizes
    widths, heights = zip(*shapes, strict=True)
    expected = (min(widths), statistics.median_low(widths), max(widths))
    assert sizes.width == expected
    assert sizes.height == (min(heights), statistics.median_low(heights), max(heights))
    most = max(shapes.count(size) for size in shapes)
    assert sizes.most_frequent[0][2] == 2 * most
    assert len(sizes.most_frequent) == 5


def test_a_split_is_held_out_for_validation_as_a_run_does():
    found = inspect_splits(
        {split: create_dataset("digits_lt", split=split) for split in ("train", "test")}, quick=True
    )
    assert list(found.class_counts) == ["train", "val", "test"]
    assert found.val_source == "train"
    assert found.problems == []


def test_whatever_can_be_is_inspected_of_splits_that_cannot_be_trained_on():
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    images = [{"bytes": png(n), "path": None} for n in range(4)]
    bad = datasets.Dataset.from_dict({"image": images, "label": [0, 0, -1, 3]}, columns)
    good = datasets.Dataset.from_dict({"image": images, "label": [0, 0, 2, 3]}, columns)
    found = inspect_splits({"train": good, "val": bad})
    assert found.class_counts == {"train": [2, 0, 1, 1]}
    assert found.imbalance_factor == 2
    assert any("fewer than 2 images" in problem for problem in found.problems)
    assert any("labels[2] = -1 is negative" in problem for problem in found.problems)
    none = inspect_splits({"test": bad}, quick=True)
    assert (none.class_counts, none.imbalance_factor, none.num_classes) == ({}, None, 0)
