"""Damaged files are found before training, and no file that Pillow can decode is."""

import io

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from timm_lt.data.damaged import check_classes_left, find_damaged, verify_images
from timm_lt.data.decode import DAMAGE
from timm_lt.data.sources import dataset_from_files
from timm_lt.utils.accelerator import create_accelerator
from timm_lt.utils.checks import UsageError

# Pillow's words about a format that it will drop.
pytestmark = pytest.mark.filterwarnings("ignore:IM image format is deprecated")

Image.init()
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"]
# Pillow only passes these on, to programs or handlers that are not there.
NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "PALM", "PDF", "WMF"}


def noise(mode="RGB", size=(48, 40), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return image.convert("L").convert(mode) if mode in ("I;16", "I") else image.convert(mode)


def encoded(form, image=None, **options):
    buffer = io.BytesIO()
    (image or noise()).copy().save(buffer, form, **options)
    return buffer.getvalue()


def decodes(content):
    """Whether Pillow decodes all of it."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except DAMAGE:
        return False
    return True


def dataset_of(contents):
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    images = [{"bytes": content, "path": None} for content in contents]
    return datasets.Dataset.from_dict({"image": images, "label": [0] * len(images)}, columns)


def found(contents):
    return [damage.row for damage in find_damaged(dataset_of(contents))]


def every_file():
    """A file in every format and mode that Pillow writes and reads back."""
    for form in sorted(set(Image.SAVE) - NOT_IMAGES):
        for mode in MODES:
            try:
                content = encoded(form, noise(mode))
            except (OSError, ValueError, KeyError):
                continue
            if decodes(content):
                yield f"{form} {mode}", content


def test_no_file_that_pillow_writes_is_damaged():
    names, contents = zip(*every_file(), strict=True)
    assert len(names) > 50
    assert [names[row] for row in found(contents)] == []


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": bytes(60000)}])
def test_a_jpeg_that_is_cut_off_is_found(options):
    whole = encoded("JPEG", **options)
    contents = [whole[:length] for length in range(0, len(whole), max(len(whole) // 60, 1))]
    contents += [whole[:-1], whole[:-2], whole[:-9], whole]
    damaged = [row for row, content in enumerate(contents) if not decodes(content)]
    assert len(damaged) > 40
    assert found(contents) == damaged
    # A preview in the header has an end of its own.
    preview = encoded("JPEG", exif=b"Exif\0\0" + encoded("JPEG", noise(size=(16, 16))))
    assert found([preview, preview[:-300]]) == [1]


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "TIFF", "GIF"])
@pytest.mark.parametrize("tail", [bytes(2**17), b"\n" * 3, encoded("JPEG", noise(seed=1))])
def test_bytes_after_the_image_are_not_damage(form, tail):
    assert found([encoded(form) + tail]) == []


@pytest.mark.parametrize("form", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_images_of_too_many_pixels_are_found(form, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 40 // 2 - 1)
    assert found([encoded(form), encoded(form, noise(size=(8, 6)))]) == [0]


def test_reasons_name_files_and_rows_are_those_of_the_data_set(tmp_path):
    good = encoded("JPEG")
    dataset = dataset_of([good, b"", good, good[:-300], good, b"text"])
    assert [d.row for d in find_damaged(dataset.select([5, 0, 2, 3]))] == [0, 3]
    assert [d.row for d in find_damaged(dataset, first=1, step=2)] == [1, 3, 5]
    assert find_damaged(dataset, first=0, step=2) == []
    (tmp_path / "cut.jpg").write_bytes(good[:-300])
    (tmp_path / "directory").mkdir()
    names = [str(tmp_path / name) for name in ("cut.jpg", "none.jpg", "directory")]
    paths = [*names, "hf://far/away.png"]
    files = dataset_from_files(paths, np.zeros(4, np.int64), None)
    both = datasets.concatenate_datasets([dataset.cast(files.features), files])
    damaged = {image.name: image.reason for image in find_damaged(both)}
    assert damaged["image 1"] == "0 bytes"
    assert damaged["image 5"].startswith("it is not an image")
    assert "truncated" in damaged[f"image 6 ({names[0]})"]
    assert damaged[f"image 7 ({names[1]})"] == "No such file or directory"
    assert damaged[f"image 8 ({names[2]})"] == "Is a directory"
    assert len(damaged) == 6
    assert find_damaged(dataset.with_transform(lambda batch: batch)) == []


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield create_accelerator(mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_all_splits_are_reported_together(accelerator, caplog):
    good = encoded("JPEG")
    splits = {
        "train": dataset_of([b""] * 7 + [good]),
        "val": dataset_of([good]),
        "test": dataset_of([good, good[:-300]]),
    }
    with pytest.raises(UsageError) as caught:
        verify_images(splits, accelerator)
    train, test = caught.value.problems
    assert train.startswith("train split: 7 of 8 images cannot be decoded: image 0: 0 bytes, ")
    assert "image 4: 0 bytes, ...; repair them, or train without" in train
    assert test.startswith("test split: image 1 cannot be decoded: ")
    assert "--data.unreadable skip" in test
    with caplog.at_level("INFO", "timm_lt"):
        rows = verify_images(splits, accelerator, unreadable="skip")
    assert rows == {"train": list(range(7)), "val": [], "test": [1]}
    assert [record.getMessage() for record in caplog.records] == [
        "7 of 8 train images cannot be read",
        "1 of 2 test images cannot be read",
    ]


def test_a_class_without_a_readable_image_is_named():
    labels = {
        "train": torch.tensor([0, 0, 1, 1, 2]),
        "val": torch.tensor([0, 1, 1]),
        "test": torch.tensor([0, 1]),
    }
    check_classes_left(labels, {"train": [0, 2], "val": [1], "test": [1]}, None)
    unreadable = {"train": [0, 1, 4], "val": [0], "test": [0, 1]}
    with pytest.raises(UsageError) as caught:
        check_classes_left(labels, unreadable, ["a", "b", "c"])
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "train split: 2 classes have no image that can be read: 0 (a), 2 (c)",
        "val split: 1 classes have no image that can be read: 0 (a)",
        "test split: none of the 2 images can be read",
    ]
