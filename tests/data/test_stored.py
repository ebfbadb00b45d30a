"""Images that are decoded when they are drawn, against timm's transforms by hand."""

import io
import random

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from timm.data import create_transform
from timm.data.loader import fast_collate

from timm_lt import create_sampler
from timm_lt.data.images import StoredImages
from timm_lt.data.loader import NumberedSampler
from timm_lt.utils.accelerator import create_accelerator
from timm_lt.utils.checks import UsageError

N, SIDE = 12, 24
LABELS = torch.arange(N) % 3
PREPROCESSING = {
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
    "crop_pct": 0.8,
}
RANDOM = {"auto_augment": "rand-m9-mstd0.5", "scale": (0.3, 1.0), "color_jitter": 0.3}


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def rows(files=None):
    files = [{"bytes": png(row), "path": None} for row in range(N)] if files is None else files
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": files, "label": LABELS[: len(files)]}, columns)


def stored(dataset=None, **options):
    dataset = rows() if dataset is None else dataset
    settings = {"size": (SIDE, SIDE), "preprocessing": PREPROCESSING, "seed": 1}
    return StoredImages(dataset, LABELS[: len(dataset)], **settings | options)


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield create_accelerator(mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)


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
    for workers, batch_size in ((0, 6), (1, 4), (2, 3)):
        data = stored(augmentation=RANDOM, workers=workers)
        images, again = epoch(data, accelerator, batch_size=batch_size)
        assert again.equal(targets)
        assert images.equal(first)
    # Of 24 draws of 12 images, no two look the same, nor do those of another epoch or seed.
    assert len(first.flatten(1).unique(dim=0)) == 24
    later, _ = epoch(stored(augmentation=RANDOM), accelerator, number=1)
    other, _ = epoch(stored(augmentation=RANDOM, seed=2), accelerator)
    assert len(torch.cat([first, later, other]).flatten(1).unique(dim=0)) == 3 * 24


def test_batches_are_those_of_timms_collate_function(accelerator):
    sampler = NumberedSampler(create_sampler("class_balanced", LABELS, num_samples=8), N, 8)
    kept = list(stored(augmentation=RANDOM).train_loader(4, sampler, accelerator))
    options = RANDOM | {"collate_fn": fast_collate}
    moved = list(stored(augmentation=options).train_loader(4, sampler, accelerator))
    for (images, targets), (expected, labels) in zip(kept, moved, strict=True):
        assert images.equal(expected)
        assert targets.equal(labels)
        assert targets.dtype == labels.dtype
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert expected.is_contiguous()


def test_a_batch_is_its_draws_one_by_one():
    data = stored()
    data.transform = create_transform((3, SIDE, SIDE), is_training=True, **RANDOM)
    draws = [3, 3 + 5 * N, 0, 2**40 * N + 7]
    images, targets = zip(*data.__getitems__(draws), strict=True)
    assert list(targets) == [LABELS[draw % N] for draw in draws]
    for image, draw in zip(images, draws, strict=True):
        assert image.equal(data[draw][0])


@pytest.mark.parametrize("by_path", [False, True])
@pytest.mark.parametrize("mode", [None, "RGB", "L"])
def test_images_are_decoded_as_datasets_does(tmp_path, mode, by_path):
    files = []
    turned = Image.Exif()
    turned[Image.ExifTags.Base.Orientation] = 6
    saved = [
        ("RGB", {}),
        ("L", {}),
        ("RGBA", {}),
        ("P", {}),
        ("CMYK", {}),
        ("RGB", {"exif": turned}),
    ]
    for number, (stored_mode, options) in enumerate(saved):
        image = Image.open(io.BytesIO(png(number))).convert(stored_mode)
        path = tmp_path / f"{number}.{'jpg' if stored_mode == 'CMYK' else 'png'}"
        image.save(path, **options)
        content = None if by_path else path.read_bytes()
        files.append({"bytes": content, "path": str(path) if by_path else None})
    columns = datasets.Features({"image": datasets.Image(mode), "label": datasets.Value("int64")})
    labels = torch.zeros(len(files), dtype=torch.int64)
    dataset = datasets.Dataset.from_dict({"image": files, "label": labels}, columns)
    sizes = set()
    for row, image in enumerate(StoredImages(dataset, labels, size=(8, 8), preprocessing={})):
        assert np.array_equal(image[0], dataset[row]["image"].convert("RGB"))
        sizes.add(image[0].size)
    assert sizes == {(40, 30), (30, 40)}


def test_augmenting_leaves_the_random_state_alone(accelerator):
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    data = stored(augmentation=RANDOM)
    data.transform = create_transform((3, SIDE, SIDE), is_training=True, **RANDOM)
    for draw in range(30):
        data[draw]
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.get_rng_state().equal(states[2])


# Pillow leaves the file open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_unreadable_image_is_named_by_row_and_file(tmp_path):
    file = tmp_path / "cut off.png"
    file.write_bytes(png(0)[:-200])
    data = stored(rows([{"bytes": png(1), "path": None}, {"bytes": None, "path": str(file)}]))
    with pytest.raises(UsageError, match=r"image 1 \(.*cut off\.png\) cannot be decoded: .*skip"):
        data[1]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [b"", b"no image", png(3)[:-200]])
def test_unreadable_images_are_skipped_and_counted(accelerator, workers, damage):
    files = [{"bytes": png(row), "path": None} for row in range(N)]
    files[5]["bytes"] = damage
    data = stored(rows(files), workers=workers, unreadable="skip")
    assert data.unreadable_rows() == []
    targets = torch.cat([targets for _, targets in data.eval_loader(5, accelerator)])
    expected = LABELS.clone()
    expected[5] = -1
    assert targets.equal(expected)
    assert data.unreadable_rows() == [5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto_augmet": "rand-m9"}, "'auto_augmet' .did you mean 'auto_augment'"),
        ({"auto_augment": "rind-m9"}, "no augmentation .*rind-m9.*Unknown AutoAugment"),
        ({"sampler": None}, "'sampler' is set elsewhere"),
        ({"interpolation": "cubical"}, "no augmentation .*cubical"),
    ],
)
def test_wrong_augmentation_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        stored(augmentation=options)
