"""Images of every kind become the same RGB pixels through every door; damaged ones are found."""

import gc
import io
import struct
import warnings
import zlib
from functools import partial

import datasets
import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageFile, ImageOps
from torchvision.datasets import ImageFolder

import timm_lt
from timm_lt.checkpoint import background_of, read_checkpoint
from timm_lt.cli.predict import ImageFiles, predict_files
from timm_lt.data.decode import (
    ImageError,
    check_classes_left,
    damage_explained,
    encoded_images,
    find_damaged,
    read_image,
    to_rgb,
    verify_images,
)
from timm_lt.data.given import given_splits
from timm_lt.data.images import StoredImages, decode_images
from timm_lt.data.items import ImageRows, as_rgb
from timm_lt.data.sources import dataset_from_files, dataset_from_images
from timm_lt.utils.accelerator import create_accelerator
from timm_lt.utils.checks import UsageError, check_background

RAMP = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
SIXTEEN = (RAMP * 65535).astype(np.uint16)
ALPHA = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
COLORS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
LONG = 4


def tiff(values, *, bits, sample_format=1, photometric=1, order="<"):
    """A TIFF of one strip, by hand: of int16, uint32 and 12 bits Pillow writes none."""
    content = values if isinstance(values, bytes) else values.tobytes()
    height, width = RAMP.shape
    fields = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 200)]
    fields += [(277, 1), (278, height), (279, len(content)), (339, sample_format)]
    header = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(fields))
    entries = b"".join(struct.pack(f"{order}HHII", tag, LONG, 1, value) for tag, value in fields)
    return (header + entries + bytes(4)).ljust(200, b"\0") + content


def png(rows, *, depth, color, extra):
    """A PNG with any chunk, by hand."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + zlib.crc32(name + body).to_bytes(4)

    header = struct.pack(">IIBBBBB", 8, 8, depth, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = chunk(b"IHDR", header), extra(chunk), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image, form, **options):
    buffer, image = io.BytesIO(), Image.fromarray(image) if hasattr(image, "dtype") else image
    image.save(buffer, form, **options)
    return buffer.getvalue()


def twelve_bits(values):
    """Two values in three bytes, as TIFF packs them."""
    bits = "".join(f"{value:012b}" for value in values.flatten())
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


ALMOST = RAMP * np.float32(1.001) - np.float32(0.0005)
LEVELS_12 = (RAMP * 4095).astype(np.uint16)
DEEP = {
    "uint16.png": (saved(SIXTEEN, "PNG"), SIXTEEN // 256),
    "uint16.tif": (saved(SIXTEEN, "TIFF"), SIXTEEN // 256),
    "big endian.tif": (tiff(SIXTEEN.astype(">u2"), bits=16, order=">"), SIXTEEN // 256),
    "white is zero.tif": (tiff(65535 - SIXTEEN, bits=16, photometric=0), SIXTEEN // 256),
    "12 bits.tif": (tiff(twelve_bits(LEVELS_12), bits=12), LEVELS_12 // 16),
    "int16.tif": (tiff((SIXTEEN // 2).astype("<i2"), bits=16, sample_format=2), SIXTEEN // 512),
    # Of the type, not of the values.
    "dark int16.tif": (tiff(np.full((8, 8), 255, "<i2"), bits=16, sample_format=2), 0 * SIXTEEN),
    "int32.tif": (saved(SIXTEEN.astype(np.int32), "TIFF"), SIXTEEN // 256),
    "uint32.tif": (tiff(SIXTEEN.astype("<u4"), bits=32), SIXTEEN // 256),
    "8 bits in int32.tif": (saved((RAMP * 255).astype(np.int32), "TIFF"), np.floor(RAMP * 255)),
    "float.tif": (saved(RAMP, "TIFF"), np.rint(RAMP * 255)),
    # The rest after interpolation.
    "almost.tif": (saved(ALMOST, "TIFF"), np.rint(ALMOST.astype(np.float64) * 255)),
    "fractions of levels.tif": (saved(RAMP * np.float32(254.5), "TIFF"), np.rint(RAMP * 254.5)),
    "deep levels as floats.tif": (saved(SIXTEEN.astype(np.float32), "TIFF"), SIXTEEN // 256),
    "uint16.pgm": (saved(SIXTEEN, "PPM"), SIXTEEN // 256),
    "dark.pgm": (b"P5 8 8 65535\n" + np.full((8, 8), 255, ">u2").tobytes(), 0 * SIXTEEN),
}


def files_of(tmp_path, contents):
    paths = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        paths.append(str(tmp_path / name))
    return dataset_from_files(paths, np.zeros(len(paths), np.int64), ["a"]), paths


@pytest.mark.parametrize("name", DEEP)
def test_grey_levels_are_scaled_by_the_range_of_their_type(tmp_path, name):
    content, expected = DEEP[name]
    dataset, _ = files_of(tmp_path, {name: content})
    found = decode_images(dataset)[0]
    np.testing.assert_array_equal(found.numpy(), np.stack([expected] * 3))


def transparent(path):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([1, 2, 3, 4, 5, 6])
    image.save(path, transparency=b"\x00\x80")


def moving(path):
    frames = [Image.new("RGB", (3, 2), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)


def plain(mode, color, size=(3, 2)):
    return lambda path: Image.new(mode, size, color).save(path)


# How a file is written, and its pixels in RGB.
KINDS = {
    "grey.jpg": (plain("L", 77), (77, 77, 77)),
    "one bit.png": (plain("1", 1), (255, 255, 255)),
    "one pixel.png": (plain("RGB", "red", (1, 1)), (255, 0, 0)),
    "palette.gif": (plain("P", 0), (0, 0, 0)),
    "transparent.png": (transparent, (129, 130, 130)),
    "cmyk.tif": (plain("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    "cmyk.jpg": (plain("CMYK", (0, 255, 255, 0), (16, 16)), (255, 0, 0)),
    "moving.gif": (moving, (255, 0, 0)),
    "moving.webp": (moving, (255, 0, 0)),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_is_read_as_rgb_and_its_file_closed(tmp_path, name):
    write, pixels = KINDS[name]
    write(tmp_path / name)
    dataset, _ = files_of(tmp_path, {name: (tmp_path / name).read_bytes()})
    found = decode_images(dataset)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, np.broadcast_to(pixels, found.shape), atol=1)
    # A file that is still open would warn here.
    gc.collect()


NO_NUMBER = r"(nan to nan|0 to inf)"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (RAMP - np.float32(0.5), r"-0\.5 to 0\.5"),
        (RAMP * np.float32(1.3), r"0 to 1\.3"),
        (np.where(RAMP > 0.5, np.float32("nan"), RAMP), NO_NUMBER),
        (np.where(RAMP > 0.5, np.float32("inf"), RAMP), NO_NUMBER),
        ((RAMP * 70000).astype(np.int32), "0 to 70000"),
        ((RAMP * 100).astype(np.int32) - 50, "-50 to 50"),
    ],
)
def test_values_in_no_known_range_are_an_error_of_their_file(tmp_path, values, reason):
    contents = {"good.tif": saved(RAMP, "TIFF"), "bad.tif": saved(values, "TIFF")}
    dataset, paths = files_of(tmp_path, contents)
    message = rf"bad\.tif\)? cannot be decoded: its values go from {reason}, .* with 8 or 16 bits"
    with pytest.raises(UsageError, match=message):
        decode_images(dataset)
    with pytest.raises(UsageError, match=message):
        timm_lt.load_image(paths[1])
    missing = []
    decode_images(dataset, missing=missing)
    assert missing == [1]


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


def on_background(pixels, alpha, background):
    alpha = alpha.astype(np.float64)[..., None] / 255
    return np.rint(alpha * pixels + (1 - alpha) * np.array(background))


def palette():
    image = Image.new("P", (8, 8))
    image.putpalette(COLORS.reshape(-1).tolist())
    image.putdata(list(range(64)))
    return image


GREY = COLORS[..., 0]
GREYS = np.dstack([GREY] * 3)
RGBA = Image.fromarray(np.dstack([COLORS, ALPHA]), "RGBA")
LA = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
COUNT = np.arange(64, dtype=np.uint8).reshape(8, 8)
FOUR = COUNT % 16
PACKED = [bytes(a * 16 + b for a, b in row.reshape(4, 2).tolist()) for row in FOUR]
WIDE = COLORS.astype(">u2") * 257


def key(*levels):
    """A chunk with a transparent colour."""
    return lambda chunk: chunk(b"tRNS", struct.pack(f">{len(levels)}H", *map(int, levels)))


def opaque(values):
    """Alpha of an image whose transparent colour is that of one pixel."""
    return np.where((values[2, 3] == values).reshape(8, 8, -1).all(-1), 0, 255)


def rows_of(values):
    return [row.astype(">u2").tobytes() for row in values]


COLOR_KEY, GREY_KEY = tuple(map(int, COLORS[2, 3])), int(GREY[2, 3])
# How a file is written; its colours, and its alpha.
TRANSPARENT = {
    "rgba.png": (saved(RGBA, "PNG"), COLORS, ALPHA),
    "rgba.tif": (saved(RGBA, "TIFF"), COLORS, ALPHA),
    "rgba.webp": (saved(RGBA, "WEBP", lossless=True, exact=True), COLORS, ALPHA),
    "la.png": (saved(LA, "PNG"), GREYS, ALPHA),
    "palette.png": (saved(palette(), "PNG", transparency=ALPHA.tobytes()), COLORS, ALPHA),
    "palette.gif": (saved(palette(), "GIF", transparency=19), COLORS, opaque(COUNT)),
    "rgb key.png": (saved(COLORS, "PNG", transparency=COLOR_KEY), COLORS, opaque(COLORS)),
    "grey key.png": (saved(GREY, "PNG", transparency=GREY_KEY), GREYS, opaque(GREY)),
    "4 bits key.png": (
        png(PACKED, depth=4, color=0, extra=key(FOUR[2, 3])),
        np.dstack([FOUR * 17] * 3),
        opaque(FOUR),
    ),
    "16 bits key.png": (
        png(rows_of(SIXTEEN), depth=16, color=0, extra=key(SIXTEEN[2, 3])),
        np.dstack([SIXTEEN // 256] * 3),
        opaque(SIXTEEN),
    ),
    "16 bits rgb key.png": (
        png(rows_of(WIDE), depth=16, color=2, extra=key(*WIDE[2, 3])),
        COLORS,
        opaque(COLORS),
    ),
}


@pytest.mark.parametrize("background", ["white", "black", [10, 200, 30]])
@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_pixels_are_blended_with_the_background(tmp_path, name, background):
    content, colors, alpha = TRANSPARENT[name]
    (tmp_path / name).write_bytes(content)
    color = {"white": [255] * 3, "black": [0] * 3}.get(str(background), background)
    found = np.asarray(timm_lt.load_image(tmp_path / name, background=background), np.float64)
    np.testing.assert_allclose(found, on_background(colors, alpha, color), atol=1)


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA"])
def test_premultiplied_and_palette_alpha_in_memory(mode):
    image = LA.convert("La") if mode == "La" else RGBA.convert("RGBa")
    colors, alpha = (GREYS, ALPHA) if mode == "La" else (COLORS, ALPHA)
    if mode == "PA":
        image = palette()
        image.putalpha(Image.fromarray(ALPHA))
        assert image.mode == "PA"
    found = np.asarray(to_rgb(image, "#0000ff"), np.float64)
    np.testing.assert_allclose(found, on_background(colors, alpha, (0, 0, 255)), atol=2)
    (split,) = given_splits([(image, 0)]).values()
    kept = decode_images(as_rgb(split, background="blue"))[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(kept, found, atol=1)


def doors(tmp_path, content, background):
    """The same file through every door, as arrays of RGB."""
    path = tmp_path / "a" / "x.png"
    path.parent.mkdir()
    path.write_bytes(content)
    plain = datasets.Dataset.from_dict({"image": [str(path)], "label": [0]})
    plain = plain.cast_column("image", datasets.Image())
    files = as_rgb(
        dataset_from_files([str(path)], np.zeros(1, np.int64), ["a"]), background=background
    )
    load = partial(timm_lt.load_image, background=background)
    raw = {"mean": (0,) * 3, "std": (1,) * 3, "crop_pct": 1.0}
    loader = timm_lt.create_loader(plain, 8, 1, background=background, **raw)
    with Image.open(path) as image:
        image.load()
        (given,) = given_splits([(image, 0)]).values()
    return {
        "load_image": load(path),
        "ImageFolder": ImageFolder(tmp_path, loader=load)[0][0],
        "column": files[0]["image"],
        "read_image": read_image(encoded_images(files)[0]["image"], 0, files.features["image"]),
        "StoredImages": StoredImages(files, torch.zeros(1).long(), size=(8, 8), preprocessing={})[
            0
        ][0],
        "ImageTensors": decode_images(files)[0].permute(1, 2, 0),
        "create_loader": torch.round(next(iter(loader))[0][0].permute(1, 2, 0) * 255),
        "given": as_rgb(given, background=background)[0]["image"],
    }


@pytest.mark.parametrize("name", ["uint16.png", "rgba.png", "palette.png", "16 bits key.png"])
def test_every_door_shows_the_same_pixels(tmp_path, name):
    content = TRANSPARENT[name][0] if name in TRANSPARENT else DEEP[name][0]
    shown = doors(tmp_path, content, "#102030")
    for door, pixels in shown.items():
        np.testing.assert_array_equal(pixels, shown["load_image"], err_msg=door)
    assert len(np.unique(shown["column"])) > 30


def test_a_background_is_a_colour_and_for_data_sets_that_are_decoded_here(tmp_path):
    for background in ("blurple", "#12", [1, 2], [1, 2, 256], "#11223344", 5, None):
        with pytest.raises(UsageError, match="is not a valid colour; expected a name such as 'whi"):
            check_background(background)
    (tmp_path / "a").mkdir()
    RGBA.save(tmp_path / "a" / "x.png")
    with pytest.raises(UsageError, match=r"background only applies to a datasets\.Dataset that"):
        timm_lt.create_loader(ImageFolder(tmp_path), 8, 1, background="black")


def test_another_background_is_another_fingerprint():
    pairs = given_splits([(RGBA, 0)])["train"]
    keys = [ImageRows(pairs, background=b).fingerprint() for b in ("white", "#ffffff", "black")]
    assert keys[0] == keys[1] != keys[2]


def test_the_background_is_recorded_and_predict_takes_it(tmp_path):
    RGBA.resize((40, 40)).save(tmp_path / "x.png")
    model = timm_lt.create_model("test_resnet", num_classes=2).eval()
    options = {"heads": {}, "class_counts": [3, 2], "background": "black"}
    folder = timm_lt.save_checkpoint(tmp_path / "black", model, **options)
    # A model that was loaded is saved with its own.
    loaded = timm_lt.create_model(f"local-dir:{folder}").eval()
    again = timm_lt.save_checkpoint(tmp_path / "again", loaded, heads={}, class_counts=None)
    assert read_checkpoint(again).background == background_of(loaded) == "#000000"
    files = ImageFiles([str(tmp_path / "x.png")], loaded, background_of(loaded), {})
    (row,) = predict_files(loaded, files, names=None, top=1, workers=0)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
    for color, is_right in (("black", True), ("white", False)):
        canvas = Image.new("RGBA", (40, 40), color)
        canvas.alpha_composite(Image.open(tmp_path / "x.png").convert("RGBA"))
        with torch.inference_mode():
            expected = model(transform(canvas.convert("RGB"))[None]).softmax(1).max().item()
        assert (row["classes"][0]["probability"] == pytest.approx(expected, abs=1e-6)) == is_right


def test_pillow_does_not_warn_in_a_data_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    dataset, _ = files_of(tmp_path, {f"{k}.png": saved(GREY, "PNG") for k in range(4)})
    images = StoredImages(dataset, torch.zeros(4).long(), size=(8, 8), preprocessing={})
    loader = torch.utils.data.DataLoader(images, 2, num_workers=1, collate_fn=len)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(loader) == [2, 2]
    assert loader.dataset.huge_rows() == [0, 1, 2, 3]


# Damaged images are found before training, and no file that Pillow can decode is -----------------

Image.init()
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"]
# Pillow only passes these on, to programs or handlers that are not there.
NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "PALM", "PDF", "WMF"}


def noise(mode="RGB", size=(48, 40), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return image.convert("L").convert(mode) if mode in ("I;16", "I") else image.convert(mode)


def encoded(form, image=None, **options):
    return saved((image or noise()).copy(), form, **options)


def decodes(content):
    """Whether Pillow decodes all of it."""
    try:
        with damage_explained(), Image.open(io.BytesIO(content)) as image:
            image.load()
    except ImageError:
        return False
    return True


def dataset_of(contents):
    images = [{"bytes": content, "path": None} for content in contents]
    return dataset_from_images(images, np.zeros(len(images), np.int64), None)


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


# Pillow's words about a format that it will drop.
@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
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
    assert [d.row for d in find_damaged(dataset, range(1, 6, 2))] == [1, 3, 5]
    (tmp_path / "cut.jpg").write_bytes(good[:-300])
    (tmp_path / "directory").mkdir()
    names = [str(tmp_path / name) for name in ("cut.jpg", "none.jpg", "directory")]
    paths = [*names, "hf://far/away.png"]
    files = dataset_from_files(paths, np.zeros(4, np.int64), None)
    both = datasets.concatenate_datasets([dataset, files])
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
    contents = {"train": [b""] * 7 + [good], "val": [good], "test": [good, good[:-300]]}
    splits = {split: dataset_of(files) for split, files in contents.items()}
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
    labels = {"train": [0, 0, 1, 1, 2], "val": [0, 1, 1], "test": [0, 1]}
    labels = {split: torch.tensor(values) for split, values in labels.items()}
    check_classes_left(labels, {"train": [0, 2], "val": [1], "test": [1]}, None)
    unreadable = {"train": [0, 1, 4], "val": [0], "test": [0, 1]}
    with pytest.raises(UsageError) as caught:
        check_classes_left(labels, unreadable, ["a", "b", "c"])
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "train split: 2 classes have no image that can be read: 0 (a), 2 (c)",
        "val split: 1 classes have no image that can be read: 0 (a)",
        "test split: none of the 2 images can be read",
    ]
