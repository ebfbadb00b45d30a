"""Damaged files are found without decoding, and no file that can be decoded is."""

import io
import os
import threading

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from timm_lt.data import decode as verification
from timm_lt.data.decode import (
    DAMAGE,
    check_classes_left,
    find_damaged,
    reason_of_file,
    verify_images,
)
from timm_lt.data.sources import dataset_from_files
from timm_lt.utils.accelerator import create_accelerator
from timm_lt.utils.checks import UsageError

# Pillow says so of a directory that is cut off, and of a format that it will drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Truncated File Read"),
    pytest.mark.filterwarnings("ignore:IM image format is deprecated"),
]

Image.init()
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"]
# Formats that are looked at beyond their header.
CHECKED = ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"]
# Pillow only passes these on, to programs or handlers that are not there.
NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "PALM", "PDF", "WMF"}


def noise(mode="RGB", size=(48, 40), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return image.convert("L").convert(mode) if mode in ("I;16", "I") else image.convert(mode)


def encoded(form, image=None, **options):
    buffer = io.BytesIO()
    (image or noise()).copy().save(buffer, form, **options)
    return buffer.getvalue()


def decodes(content):
    """The naive way: Pillow decodes all of it."""
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
    for form in sorted(set(Image.SAVE) - NO_IMAGES):
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
    assert {form for form in CHECKED if f"{form} L" in names} == set(CHECKED)
    assert [names[row] for row in found(contents)] == []


@pytest.mark.parametrize("form", CHECKED)
def test_what_is_cut_off_is_found_and_nothing_that_decodes(form):
    whole = encoded(form)
    contents = [whole[:length] for length in range(0, len(whole) + 1, max(len(whole) // 60, 1))]
    contents += [whole[:-1], whole[:-2], whole[:-9], whole]
    damaged = [row for row, content in enumerate(contents) if not decodes(content)]
    assert len(damaged) > 40
    assert set(found(contents)) == set(damaged)


TAILS = {
    "padding": bytes(1000),
    "padding beyond the window": bytes(2**17),
    "text": b"\n" * 3,
    "a telephone's": b"\x00\x00\x01\x0aImage_UTC_Data1418878000\x00" * 40 + b"SEFT",
    "another image": encoded("JPEG", seed) if (seed := noise(seed=1)) else b"",
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("form", CHECKED)
def test_bytes_after_the_image_are_no_damage(form, tail):
    content = encoded(form) + TAILS[tail]
    assert decodes(content)
    assert found([content]) == []


def test_images_of_several_frames_and_scans_are_whole_until_they_are_cut():
    files = [
        encoded(form, save_all=True, append_images=[noise(seed=1), noise(seed=2)])
        for form in ("GIF", "WEBP", "PNG", "MPO", "TIFF")
    ]
    files += [encoded("JPEG", progressive=True), encoded("JPEG", exif=bytes(60000))]
    assert found(files) == []
    assert found([content[: len(content) // 5] for content in files]) == [
        row for row, content in enumerate(files) if not decodes(content[: len(content) // 5])
    ]


def test_the_end_of_a_preview_is_not_that_of_the_image():
    preview = b"Exif\0\0" + encoded("JPEG", noise(size=(16, 16)))
    whole = encoded("JPEG", exif=preview)
    assert whole.count(b"\xff\xd9") == 2
    assert found([whole, whole[:-300]]) == [1]


@pytest.mark.parametrize("form", sorted(set(CHECKED) - {"WEBP"}))
def test_images_of_too_many_pixels_are_found(form, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 40 // 2 - 1)
    assert found([encoded(form), encoded(form, noise(size=(8, 6)))]) == [0]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xd8\xff\xd9",
        b"\x89PNG\r\n\x1a\n" + verification.END_OF_PNG,
        b"GIF89a\0;",
        b"BM" + (60).to_bytes(4, "little") + bytes(54),
    ],
    ids=["JPEG", "PNG", "GIF", "BMP"],
)
def test_two_ends_make_no_image(content):
    assert found([content]) == [0]


def test_files_are_opened_once_and_read_at_both_ends(tmp_path, monkeypatch):
    contents = [encoded("JPEG", noise(size=(400, 300), seed=seed)) for seed in range(3)]
    contents[1] += bytes(100)
    files = [tmp_path / f"{number}.jpg" for number in range(3)]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    opened, number = [], []
    real = os.open, os.read
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append(path) or real[0](path, flags))

    def read(descriptor, length):
        content = real[1](descriptor, length)
        number.append(len(content))
        return content

    monkeypatch.setattr(os, "read", read)
    dataset = dataset_from_files([str(file) for file in files], np.zeros(3, np.int64), ["a"])
    assert find_damaged(dataset) == []
    assert sorted(opened) == sorted(map(str, files))
    assert len(contents[0]) > 50_000
    assert sum(number) < 4 * 512 + 2**16 + 200


def test_reasons_are_told(tmp_path):
    pipe, text, locked = tmp_path / "pipe.jpg", tmp_path / "text.jpg", tmp_path / "locked.jpg"
    os.mkfifo(pipe)
    text.write_text("no image")
    assert reason_of_file(str(pipe)) == "0 bytes"
    assert (
        reason_of_file(str(text)) == "it is not an image, or has a format that Pillow does not read"
    )
    assert reason_of_file(str(tmp_path / "none.jpg")) == "No such file or directory"
    assert reason_of_file(str(tmp_path)) == "Is a directory"
    locked.write_bytes(encoded("JPEG")[:-100])
    assert "truncated" in reason_of_file(str(locked))


def test_rows_of_a_selection_and_of_a_part_are_its_own(tmp_path):
    good = encoded("PNG")
    dataset = dataset_of([good, b"", good, good[:-30], good, b"text"])
    assert [d.row for d in find_damaged(dataset.select([5, 0, 2, 3]))] == [0, 3]
    assert [d.row for d in find_damaged(dataset, first=1, step=2)] == [1, 3, 5]
    assert [d.row for d in find_damaged(dataset, first=0, step=2)] == []
    # A data set of several chunks, of files and bytes, and one that decodes for itself.
    file = tmp_path / "cut.png"
    file.write_bytes(good[:-30])
    files = dataset_from_files([str(file), "hf://far/away.png"], np.zeros(2, np.int64), None)
    both = datasets.concatenate_datasets([dataset.cast(files.features), files])
    assert [damage.name for damage in find_damaged(both)][3:] == [f"image 6 ({file})"]
    assert len(find_damaged(both)) == 4
    assert find_damaged(dataset.with_transform(lambda batch: batch)) == []


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield create_accelerator(mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_all_splits_are_reported_together(accelerator, caplog):
    good = encoded("PNG")
    splits = {
        "train": dataset_of([b""] * 7 + [good]),
        "val": dataset_of([good]),
        "test": dataset_of([good, good[:-30]]),
    }
    with pytest.raises(UsageError) as caught:
        verify_images(splits, accelerator)
    train, test = caught.value.problems
    assert train.startswith("train split: 7 of 8 images cannot be decoded: image 0: 0 bytes, ")
    assert "image 4: 0 bytes, ...; repair them, or train without" in train
    assert test.startswith("test split: image 1 cannot be decoded: ")
    assert "--data.unreadable skip" in test
    with caplog.at_level("INFO", "timm_lt"):
        verify_images(splits, accelerator, unreadable="skip")
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
    with pytest.raises(UsageError) as caught:
        check_classes_left(
            labels, {"train": [0, 1, 4], "val": [0], "test": [0, 1]}, ["a", "b", "c"]
        )
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "train split: 2 classes have no image that can be read: 0 (a), 2 (c)",
        "val split: 1 classes have no image that can be read: 0 (a)",
        "test split: none of the 2 images can be read",
    ]


def test_an_interrupt_does_not_wait_for_the_rest():
    started, go_on = [], threading.Event()

    def work(item):
        started.append(item)
        return item if item == 0 else go_on.wait(10)

    results = verification.in_threads(work, range(1000), rows=1)
    assert next(results) == 0
    threading.Timer(0.1, go_on.set).start()
    results.close()
    assert len(started) < 100


def test_values_that_cannot_be_read_are_found_before_training():
    ramp = np.linspace(0, 1, 2000, dtype=np.float32).reshape(40, 50)
    deep = [ramp, ramp - 0.5, np.where(ramp > 0.5, np.float32("nan"), ramp), ramp * 1e6]
    deep += [(ramp * 1e4).astype(np.int32), (ramp * 1e6).astype(np.int32)]
    assert found([encoded("TIFF", Image.fromarray(values)) for values in deep]) == [1, 2, 3, 5]
