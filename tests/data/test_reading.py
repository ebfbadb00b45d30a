"""Images of every kind become RGB, in memory and when they are drawn; none stays open."""

import gc
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from timm_lt.data.decode import shown_path
from timm_lt.data.images import StoredImages, decode_images
from timm_lt.data.sources import dataset_from_files
from timm_lt.utils.checks import UsageError

LEVELS = np.array([[0, 255, 256], [25600, 32768, 65535]], np.uint16)
# The upper byte.
EIGHT_BITS = [[0, 0, 1], [100, 128, 255]]


def transparent(path):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([1, 2, 3, 4, 5, 6])
    image.save(path, transparency=b"\x00\x80")


def sixteen_bits_of_two_bytes(path):
    path.write_bytes(b"P5 3 2 65535\n" + LEVELS.astype(">u2").tobytes())


def moving(path):
    frames = [Image.new("RGB", (3, 2), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def big_endian(path):
    header = struct.pack(">2sHI", b"MM", 42, 8)
    fields = [(256, 3), (257, 2), (258, 16), (259, 1), (262, 1), (273, 200), (277, 1), (278, 2)]
    fields += [(279, 12)]
    entries = b"".join(
        struct.pack(">HHI", tag, 4, 1) + struct.pack(">I", value) for tag, value in fields
    )
    content = header + struct.pack(">H", len(fields)) + entries + bytes(4)
    path.write_bytes(content.ljust(200, b"\0") + LEVELS.astype(">u2").tobytes())


# How a file is written, and what a pixel row, or all pixels, are then.
KINDS = {
    "grey.jpg": (lambda path: Image.new("L", (3, 2), 77).save(path), (77, 77, 77)),
    "grey.png": (lambda path: Image.new("L", (3, 2), 77).save(path), (77, 77, 77)),
    "one bit.png": (lambda path: Image.new("1", (3, 2), 1).save(path), (255, 255, 255)),
    "one pixel.png": (lambda path: Image.new("RGB", (1, 1), "red").save(path), (255, 0, 0)),
    "grey alpha.png": (lambda path: Image.new("LA", (3, 2), (9, 0)).save(path), (255,) * 3),
    "alpha.png": (lambda path: Image.new("RGBA", (3, 2), (9, 8, 7, 0)).save(path), (255,) * 3),
    "palette.gif": (lambda path: Image.new("P", (3, 2), 0).save(path), (0, 0, 0)),
    "transparent.png": (transparent, (129, 130, 130)),
    "cmyk.tif": (lambda path: Image.new("CMYK", (3, 2), (0, 255, 255, 0)).save(path), (255, 0, 0)),
    "16 bit.png": (lambda path: Image.fromarray(LEVELS).save(path), EIGHT_BITS),
    "16 bit.tif": (lambda path: Image.fromarray(LEVELS).save(path), EIGHT_BITS),
    "16 bit.pgm": (sixteen_bits_of_two_bytes, EIGHT_BITS),
    "16 bit big endian.tif": (big_endian, EIGHT_BITS),
    "moving.gif": (moving, (255, 0, 0)),
    "moving.webp": (moving, None),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_is_read_as_rgb(tmp_path, name):
    write, pixels = KINDS[name]
    path = tmp_path / name
    write(path)
    dataset = dataset_from_files([str(path)], np.zeros(1, np.int64), ["a"])
    with Image.open(path) as image:
        height, width = image.height, image.width
    in_memory = decode_images(dataset)[0].permute(1, 2, 0).numpy()
    drawn, label = StoredImages(
        dataset, torch.zeros(1, dtype=torch.int64), size=(2, 3), preprocessing={}
    )[0]
    assert in_memory.shape == (height, width, 3)
    assert (drawn.mode, label) == ("RGB", 0)
    assert (np.asarray(drawn) == in_memory).all()
    if pixels is not None:
        expected = np.array(pixels)
        expected = expected if expected.ndim == 1 else expected[:, :, None]
        assert (in_memory == expected).all()
    # A file that is open yet would warn here.
    del drawn
    gc.collect()


def test_a_cmyk_jpeg_is_read_as_rgb(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path)
    dataset = dataset_from_files([str(path)], np.zeros(1, np.int64), ["a"])
    red, green, blue = decode_images(dataset)[0, :, 8, 8].tolist()
    assert red > 250
    assert max(green, blue) < 5


def test_all_images_that_cannot_be_decoded_are_named(tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(9)]
    Image.new("RGB", (2, 2)).save(paths[3])
    Image.effect_noise((99, 99), 50).save(paths[5])
    for number in (0, 1, 6, 7, 8):
        (tmp_path / f"{number}.png").write_bytes(b"no image" if number else b"")
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:-300])
    (tmp_path / "4.png").mkdir()
    dataset = dataset_from_files(paths, np.zeros(9, np.int64), ["a"])
    with pytest.raises(UsageError) as caught:
        decode_images(dataset)
    no_image = "it is not an image, or has a format that Pillow does not read"
    reasons = ["0 bytes", no_image, "No such file or directory"]
    shown = ", ".join(f"image {n} ({paths[n]}): {reason}" for n, reason in enumerate(reasons))
    assert str(caught.value).startswith(f"8 of 9 images cannot be decoded: {shown}, image 4 (")
    assert "Is a directory, image 5" in str(caught.value)
    assert str(caught.value).endswith(
        ", ...; repair them, or train without such images with --data.unreadable skip"
    )
    missing = []
    decode_images(dataset, missing=missing)
    assert missing == [0, 1, 2, 4, 5, 6, 7, 8]
    with pytest.raises(UsageError, match="none of the 2 images can be read"):
        decode_images(dataset.select([0, 2]), missing=[])


@pytest.mark.filterwarnings("ignore:.*orrupt EXIF data")
def test_odd_exif_data_turn_no_image_and_stop_nothing(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    # Orientation 6 with a text where a number should be; 6 alone; data that are cut off.
    entry = struct.pack("<HHII", 0x0112, 3, 1, 6)
    odd = struct.pack("<HHII", 0x011A, 3, 1, 70000) + struct.pack("<HHI4s", 0x0213, 7, 4, b"ab\0c")
    for path, count, entries in zip(paths, (3, 1, 9), (entry + odd, entry, b""), strict=True):
        exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + bytes(4)
        Image.fromarray(pixels).save(path, exif=exif)
    with Image.open(paths[0]) as image, pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    for path, expected in zip(paths, (np.rot90(pixels, -1),) * 2 + (pixels,), strict=True):
        dataset = dataset_from_files([path], np.zeros(1, np.int64), ["a"])
        assert (decode_images(dataset)[0].permute(1, 2, 0).numpy() == expected).all()


@pytest.mark.parametrize("kind", [RuntimeError, struct.error, KeyError, MemoryError])
def test_whatever_pillow_raises_is_damage_but_for_want_of_memory(tmp_path, monkeypatch, kind):
    path = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(path)
    dataset = dataset_from_files([str(path)], np.zeros(1, np.int64), ["a"])

    def load(image):
        raise kind("Failed to decode image")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError if kind is MemoryError else UsageError, match="Failed to dec"):
        decode_images(dataset)


def test_paths_are_shown_on_one_line():
    assert shown_path("a\nb\udce9") == r"'a\nb\udce9'"
