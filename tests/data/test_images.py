"""Images in memory: decoding, normalisation, labels and batches."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, Value
from datasets import Features as Columns
from PIL import Image as Pillow

from timm_lt.data import images as images_module
from timm_lt.data.augment import create_augmentation
from timm_lt.data.images import ImageTensors, batches, decode_images, label_names, label_tensor
from timm_lt.data.sources import dataset_from_arrays
from timm_lt.samplers import create_sampler
from timm_lt.utils.checks import UsageError


def arrays(n=7, height=6, width=8):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def tensors(**options):
    images = torch.from_numpy(arrays()).permute(0, 3, 1, 2).contiguous()
    return ImageTensors(images, torch.arange(7) % 3, **options)


def dataset_of(pictures, labels=None):
    """A data set of PIL pictures of any mode and size."""
    files = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        files.append({"bytes": buffer.getvalue(), "path": None})
    labels = [0] * len(files) if labels is None else labels
    return Dataset.from_dict(
        {"image": files, "label": labels}, Columns({"image": Image(), "label": Value("int64")})
    )


def test_decoding_gives_the_pixels_back():
    dataset = dataset_from_arrays(arrays(), np.zeros(7, np.int64), ["a"])
    decoded = decode_images(dataset)
    assert decoded.dtype == torch.uint8
    assert decoded.is_contiguous()
    assert (decoded.permute(0, 2, 3, 1).numpy() == arrays()).all()


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 77, [77, 77, 77]),
        ("RGBA", (9, 8, 7, 128), [132, 131, 131]),
        ("P", 0, [0, 0, 0]),
        ("1", 1, [255, 255, 255]),
    ],
)
def test_every_mode_becomes_rgb(mode, color, expected):
    picture = Pillow.new(mode, (3, 2), color)
    decoded = decode_images(dataset_of([picture]))
    assert decoded[0, :, 0, 0].tolist() == expected
    assert decoded.shape == (1, 3, 2, 3)


def test_images_are_resized_as_pillow_does():
    pictures = [Pillow.fromarray(a) for a in (arrays()[0], arrays(1, 12, 10)[0])]
    decoded = decode_images(dataset_of(pictures))
    assert decoded.shape == (2, 3, 6, 8)
    expected = np.asarray(pictures[1].resize((8, 6), Pillow.Resampling.BILINEAR))
    assert (decoded[1].permute(1, 2, 0).numpy() == expected).all()
    small = decode_images(dataset_of(pictures), size=(4, 5))
    expected = np.asarray(pictures[0].resize((5, 4), Pillow.Resampling.BILINEAR))
    assert (small[0].permute(1, 2, 0).numpy() == expected).all()


def test_an_image_that_cannot_be_decoded_is_named():
    good = dataset_of([Pillow.new("RGB", (2, 2))])[0:1]
    columns = Columns({"image": Image(decode=False), "label": Value("int64")})
    buffer = io.BytesIO()
    good["image"][0].save(buffer, "PNG")
    files = [{"bytes": content, "path": None} for content in (buffer.getvalue(), b"no image")]
    dataset = Dataset.from_dict({"image": files, "label": [0, 0]}, columns)
    with pytest.raises(UsageError, match="image 1 cannot be decoded"):
        decode_images(dataset.cast_column("image", Image()))


def test_empty_and_too_large_data_sets_are_refused(monkeypatch):
    dataset = dataset_from_arrays(arrays(), np.zeros(7, np.int64), ["a"])
    with pytest.raises(UsageError, match="no images"):
        decode_images(dataset.select([]))
    monkeypatch.setattr(images_module, "MAX_BYTES", 7 * 6 * 8 * 3)
    assert len(decode_images(dataset)) == 7
    with pytest.raises(UsageError, match=r"7 images of 7x8 need more than .* GiB .* smaller"):
        decode_images(dataset, size=(7, 8))


def test_labels_and_names_of_a_data_set():
    dataset = dataset_from_arrays(arrays(), np.arange(7) % 3, ["a", "b", "c"])
    assert label_tensor(dataset).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert label_tensor(dataset).dtype == torch.int64
    assert label_names(dataset) == ["a", "b", "c"]
    plain = dataset.cast_column("label", Value("int32"))
    assert label_names(plain) is None
    assert label_tensor(plain).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_labels_of_selected_rows_are_those_of_the_rows():
    dataset = dataset_from_arrays(arrays(), np.arange(7) % 3, ["a", "b", "c"])
    assert label_tensor(dataset.select([5, 0])).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0.0, 1.5], "labels.1. = 1.5 is not an integer"), (["cat", "dog"], "is not an integer")],
)
def test_labels_that_are_no_integers_are_refused(labels, message):
    with pytest.raises(UsageError, match=message):
        label_tensor(Dataset.from_dict({"label": labels}))


def test_a_batch_is_normalised_as_by_hand():
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.25, 0.5)
    images, targets = tensors(mean=mean, std=std).__getitems__([4, 0])
    assert images.dtype == torch.float32
    for row, index in enumerate([4, 0]):
        for c in range(3):
            expected = (arrays()[index, :, :, c] / 255 - mean[c]) / std[c]
            np.testing.assert_allclose(images[row, c].numpy(), expected, atol=1e-5)
    assert targets.tolist() == [1, 0]


def test_one_item_is_its_row_of_a_batch():
    data = tensors(augmentation=create_augmentation("crop", padding=2))
    images, targets = data.__getitems__([3, 5])
    assert data[5][0].equal(images[1])
    assert data[5][1] == targets[1]
    assert len(data) == 7
    # Any integer is a draw; going through the data set ends all the same.
    assert not data[7 + 5][0].equal(images[1])
    assert [int(target) for _, target in data] == data.labels.tolist()


def test_draw_and_seed_choose_the_augmentation():
    one, two = (tensors(augmentation=create_augmentation("affine"), seed=s) for s in (0, 1))
    rows = list(range(7))
    first, targets = one.__getitems__(rows)
    assert not first.equal(two.__getitems__(rows)[0])
    # Draws 21 to 27 are the same images again.
    later, later_targets = one.__getitems__([21 + row for row in rows])
    assert later_targets.equal(targets)
    for row in rows:
        assert not first[row].equal(later[row])
    assert first.equal(one.__getitems__(rows)[0])


def test_without_augmentation_shares_the_memory_and_leaves_the_original():
    data = tensors(augmentation=create_augmentation("affine"))
    plain = data.without_augmentation()
    rows = [0, 1, 2]
    assert plain.__getitems__(rows)[0].equal(tensors().__getitems__(rows)[0])
    assert plain.images.data_ptr() == data.images.data_ptr()
    assert not data.__getitems__(rows)[0].equal(plain.__getitems__(rows)[0])


def test_batches_are_whole_and_in_order():
    data = tensors()
    loader = batches(data, 3)
    found = list(loader)
    assert [len(images) for images, _ in found] == [3, 3, 1]
    expected = data.__getitems__(list(range(7)))
    assert torch.cat([images for images, _ in found]).equal(expected[0])
    assert torch.cat([targets for _, targets in found]).equal(expected[1])
    assert [len(images) for images, _ in batches(data, 3, drop_last=True)] == [3, 3]


def test_batches_follow_a_sampler():
    data = tensors()
    sampler = create_sampler("class_balanced", data.labels, num_samples=10, seed=1)
    targets = torch.cat([targets for _, targets in batches(data, 4, sampler)])
    assert targets.tolist() == [int(data.labels[i]) for i in sampler.epoch_indices()]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2), "uint8 .* got .2, 3, 4, 4. torch.float32"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3), "and 3 labels"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2), "got .2, 1, 4, 4."),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2), "got .2, 4, 4."),
    ],
)
def test_images_of_another_shape_or_type_are_refused(images, labels, message):
    with pytest.raises(UsageError, match=message):
        ImageTensors(images, labels)
