"""Images in memory: decoding, normalisation, labels and batches; images that are stored."""

import io
import random

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, Image, Value
from datasets import Features as Columns
from PIL import Image as Pillow
from timm.data import create_transform

from timm_lt.data import images as images_module
from timm_lt.data.augment import create_augmentation
from timm_lt.data.images import ImageTensors, StoredImages, decode_images, label_names, label_tensor
from timm_lt.data.loader import NumberedSampler
from timm_lt.data.sources import dataset_from_arrays
from timm_lt.samplers import create_sampler
from timm_lt.utils.accelerator import create_accelerator
from timm_lt.utils.checks import UsageError

ARRAYS = np.random.default_rng(0).integers(0, 256, (7, 6, 8, 3), dtype=np.uint8)
ROWS = list(range(7))


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield create_accelerator(mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)


def tensors(**options):
    images = torch.from_numpy(ARRAYS).permute(0, 3, 1, 2).contiguous()
    return ImageTensors(images, torch.arange(7) % 3, **options)


def test_decoding_gives_the_pixels_back_or_resizes_them_as_pillow_does(monkeypatch):
    dataset = dataset_from_arrays(ARRAYS, np.zeros(7, np.int64), ["a"])
    monkeypatch.setattr(images_module, "MAX_BYTES", 7 * 6 * 8 * 3)
    decoded = decode_images(dataset)
    assert decoded.dtype == torch.uint8
    assert decoded.is_contiguous()
    assert (decoded.permute(0, 2, 3, 1).numpy() == ARRAYS).all()
    small = decode_images(dataset, size=(4, 5))
    assert small.shape == (7, 3, 4, 5)
    for row, pixels in enumerate(ARRAYS):
        expected = Pillow.fromarray(pixels).resize((5, 4), Pillow.Resampling.BILINEAR)
        assert (small[row].permute(1, 2, 0).numpy() == np.asarray(expected)).all()
    with pytest.raises(UsageError, match=r"7 images of 7x8 need more than .* GiB .* smaller"):
        decode_images(dataset, size=(7, 8))


def test_labels_and_names_of_a_data_set():
    dataset = dataset_from_arrays(ARRAYS, np.arange(7) % 3, ["a", "b", "c"])
    plain = dataset.cast_column("label", Value("int32"))
    for rows, names in ((dataset, ["a", "b", "c"]), (plain, None)):
        assert label_tensor(rows).equal(torch.arange(7) % 3)
        assert label_names(rows) == names
    assert label_tensor(dataset.select([5, 0])).tolist() == [2, 0]
    for labels in ([0.0, 1.5], ["cat", "dog"]):
        with pytest.raises(UsageError, match="is not an integer"):
            label_tensor(Dataset.from_dict({"label": labels}))


def test_a_batch_is_normalised_as_by_hand_and_an_item_is_its_row():
    mean, std = np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.25, 0.5])
    data = tensors(mean=mean.tolist(), std=std.tolist())
    images, targets = data.__getitems__([4, 0])
    assert images.dtype == torch.float32
    expected = (ARRAYS[[4, 0]] / 255 - mean) / std
    np.testing.assert_allclose(images.permute(0, 2, 3, 1), expected, atol=1e-5)
    assert targets.tolist() == [1, 0]
    assert data[4][0].equal(images[0])
    # Any integer is a draw; iterating over the data set ends all the same.
    assert [int(target) for _, target in data] == data.labels.tolist()


def test_draw_and_seed_choose_the_augmentation():
    one, two = (tensors(augmentation=create_augmentation("affine"), seed=s) for s in (0, 1))
    first, targets = one.__getitems__(ROWS)
    assert not first.equal(two.__getitems__(ROWS)[0])
    # Draws 21 to 27 are the same images again.
    later, later_targets = one.__getitems__([21 + row for row in ROWS])
    assert later_targets.equal(targets)
    for row in ROWS:
        assert not first[row].equal(later[row])
        assert one[row][0].equal(first[row])
    assert first.equal(one.__getitems__(ROWS)[0])


def test_loaders_of_images_in_memory(accelerator):
    data = tensors(augmentation=create_augmentation("affine"))
    images, targets = zip(*data.eval_loader(3, accelerator), strict=True)
    assert [len(batch) for batch in images] == [3, 3, 1]
    expected = tensors().__getitems__(ROWS)
    assert torch.cat(images).equal(expected[0])
    assert torch.cat(targets).equal(expected[1])
    views = data.views_loader(3, accelerator)
    views.set_epoch(2)
    shown = torch.cat([images for images, _ in views])
    assert shown.equal(data.__getitems__([14 + row for row in ROWS])[0])
    sampler = NumberedSampler(create_sampler("instance_balanced", data.labels), 7, 7)
    drawn, _ = zip(*data.train_loader(3, sampler, accelerator), strict=True)
    assert [len(batch) for batch in drawn] == [3, 3]
    assert torch.cat(drawn).equal(data.__getitems__(list(sampler)[:6])[0])


# Images that are decoded when they are drawn, against timm's transforms by hand ------------------

N, SIDE = 12, 24
LABELS = torch.arange(N) % 3
PREPROCESSING = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
PREPROCESSING |= {"interpolation": "bicubic", "crop_pct": 0.8}
RANDOM = {"auto_augment": "rand-m9-mstd0.5", "scale": (0.3, 1.0), "color_jitter": 0.3}


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Pillow.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def rows(files=None, mode=None):
    files = files or [{"bytes": png(row), "path": None} for row in range(N)]
    columns = Columns({"image": Image(mode), "label": Value("int64")})
    return Dataset.from_dict({"image": files, "label": LABELS[: len(files)]}, columns)


def stored(dataset=None, **options):
    dataset = rows() if dataset is None else dataset
    settings = {"size": (SIDE, SIDE), "preprocessing": PREPROCESSING, "seed": 1}
    return StoredImages(dataset, LABELS[: len(dataset)], **settings | options)


def epoch(data, accelerator, number=0, batch_size=4):
    sampler = create_sampler("class_balanced", data.labels, num_samples=24, seed=2)
    loader = data.train_loader(batch_size, NumberedSampler(sampler, N, 24), accelerator)
    loader.set_epoch(number)
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_is_timms_transform(accelerator, workers):
    data = stored(augmentation=RANDOM, workers=workers)
    images, targets = zip(*data.eval_loader(5, accelerator), strict=True)
    assert [len(part) for part in images] == [5, 5, 2]
    assert torch.cat(targets).equal(LABELS)
    transform = create_transform((3, SIDE, SIDE), is_training=False, **PREPROCESSING)
    expected = torch.stack([transform(row["image"]) for row in rows()])
    torch.testing.assert_close(torch.cat(images), expected, atol=1e-5, rtol=1e-5)


def test_a_draw_is_augmented_the_same_in_every_batch_and_worker(accelerator):
    first, targets = epoch(stored(augmentation=RANDOM), accelerator)
    for workers, batch_size in ((0, 6), (2, 3)):
        data = stored(augmentation=RANDOM, workers=workers)
        images, again = epoch(data, accelerator, batch_size=batch_size)
        assert again.equal(targets)
        assert images.equal(first)
    # Of 24 draws of 12 images, no two look the same, nor do those of another epoch or seed.
    later, _ = epoch(stored(augmentation=RANDOM), accelerator, number=1)
    other, _ = epoch(stored(augmentation=RANDOM, seed=2), accelerator)
    assert len(torch.cat([first, later, other]).flatten(1).unique(dim=0)) == 3 * 24


def test_a_batch_is_its_draws_one_by_one_and_leaves_the_random_state_alone():
    data = stored()
    data.transform = create_transform((3, SIDE, SIDE), is_training=True, **RANDOM)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    draws = [3, 3 + 5 * N, 0, 2**40 * N + 7]
    images, targets = zip(*data.__getitems__(draws), strict=True)
    assert list(targets) == [LABELS[draw % N] for draw in draws]
    for image, draw in zip(images, draws, strict=True):
        assert image.equal(data[draw][0])
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.get_rng_state().equal(states[2])


@pytest.mark.parametrize("by_path", [False, True])
@pytest.mark.parametrize("mode", [None, "RGB", "L"])
def test_images_are_decoded_as_datasets_does(tmp_path, mode, by_path):
    turned = Pillow.Exif()
    turned[Pillow.ExifTags.Base.Orientation] = 6
    files = []
    for number, kind in enumerate(("RGB", "L", "RGBA", "P", "CMYK", "RGB")):
        path = tmp_path / f"{number}.{'jpg' if kind == 'CMYK' else 'png'}"
        image = Pillow.open(io.BytesIO(png(number))).convert(kind)
        image.save(path, **{"exif": turned} if number == 5 else {})
        file = {"bytes": None, "path": str(path)}
        files.append(file if by_path else {"bytes": path.read_bytes(), "path": None})
    dataset = rows(files, mode)
    found = [image for image, _ in stored(dataset)]
    assert {image.size for image in found} == {(40, 30), (30, 40)}
    for row, image in enumerate(found):
        assert np.array_equal(image, dataset[row]["image"].convert("RGB"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [b"", png(3)[:-200]])
def test_unreadable_images_are_skipped_and_counted(accelerator, workers, damage):
    files = [{"bytes": png(row), "path": None} for row in range(N)]
    files[5]["bytes"] = damage
    data = stored(rows(files), workers=workers, unreadable="skip")
    assert data.unreadable_rows() == []
    targets = torch.cat([targets for _, targets in data.eval_loader(5, accelerator)])
    assert targets.equal(LABELS.where(torch.arange(N) != 5, -1))
    assert data.unreadable_rows() == [5]
    with pytest.raises(UsageError, match=r"the split: image 5 cannot be decoded: .* --data.unread"):
        stored(rows(files), name="the split")[5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto_augmet": "rand-m9"}, "'auto_augmet' .did you mean 'auto_augment'"),
        ({"auto_augment": "rind-m9"}, "augmentation .*rind-m9.* is not valid: .*Unknown"),
        ({"sampler": None}, "'sampler' is set automatically; remove it"),
    ],
)
def test_wrong_augmentation_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        stored(augmentation=options)
