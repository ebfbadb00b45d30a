"""The key of a feature cache: what has an effect is in it, and what is not known is refused."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageFilter
from timm.data import ImageDataset, create_transform
from timm.data.auto_augment import rand_augment_transform
from torch import nn
from torch.utils.data import Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from timm_lt.data.augment import Augmentation, NoAugmentation, create_augmentation
from timm_lt.data.images import ImageTensors, StoredImages
from timm_lt.data.items import dataset_fingerprint, described
from timm_lt.data.sources import dataset_from_arrays
from timm_lt.features.cache import backbone_fingerprint
from timm_lt.utils.checks import UsageError

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
IMAGES, LABELS = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).contiguous(), torch.arange(4) % 2


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=3, **options)


@pytest.mark.parametrize(
    ("one", "other"),
    [({"num_heads": 2}, {"num_heads": 4}), ({"global_pool": "avg"}, {"global_pool": "max"})],
)
def test_what_is_in_no_weight_of_a_model_is_in_its_key(one, other):
    weights, others = (dict(vit(**options).named_parameters()) for options in (one, other))
    shared = weights.keys() & others.keys() - {"head.weight", "head.bias"}
    assert len(shared) > 50
    assert all(weights[name].equal(others[name]) for name in shared)
    keys = [backbone_fingerprint(vit(**options), "head") for options in (one, one, other)]
    assert keys[0] == keys[1] != keys[2]


def test_the_mode_and_the_classes_of_a_model_are_not_in_its_key_but_its_pooling_is():
    model = vit().train()
    key = backbone_fingerprint(model, "head")
    model.blocks[0].eval()
    model.reset_classifier(7)
    assert backbone_fingerprint(model, "head") == key
    model.reset_classifier(7, global_pool="avg")
    assert backbone_fingerprint(model, "head") != key


def test_functions_tensors_and_classes_of_a_model_are_in_its_key():
    class Swish(nn.SiLU):
        pass

    def key(**options):
        part = options.pop("part", nn.SiLU)()
        for name, value in options.items():
            setattr(part, name, value)
        return backbone_fingerprint(nn.Sequential(part), "head")

    tensor = torch.tensor([1.0, 2.0])
    variants = [{"act": torch.relu}, {"act": torch.tanh}, {"mean": tensor}, {"mean": tensor + 1e-6}]
    variants += [{"part": Swish}, {"sizes": [(1, 2)]}, {"sizes": [(2, 1)]}, {}]
    assert len({key(**variant) for variant in variants}) == len(variants)
    assert key(_cache=1) == key() == key(unknown=object())


@pytest.fixture
def folder(tmp_path):
    for row, pixels in enumerate(PIXELS):
        file = tmp_path / f"class_{row % 2}" / f"{row}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(file)
    return str(tmp_path)


def test_a_data_set_with_an_item_of_its_own_needs_a_key(folder):
    def changed(known):
        return type("Changed", (known,), {"__getitem__": lambda data, row: ("image", row)})

    known = TensorDataset(IMAGES, LABELS)
    batches = type("Batches", (Subset,), {"__getitems__": lambda data, rows: rows})
    dataset_fingerprint(Subset(known, [0, 1]))
    dataset_fingerprint(ImageDataset(folder))
    for data in (
        changed(TensorDataset)(IMAGES, LABELS),
        Subset(changed(TensorDataset)(IMAGES, LABELS), [0]),
        changed(ImageDataset)(folder),
        changed(DatasetFolder)(folder, default_loader, (".png",)),
        batches(known, [0, 1]),
        type("NoMethod", (list,), {"fingerprint": "a"})(),
    ):
        with pytest.raises(UsageError, match=r"samples of a \w+ have no fingerprint; pass key="):
            dataset_fingerprint(data)


def open_in_grey(path):
    return Image.open(path).convert("L")


def test_the_loader_of_a_folder_is_in_its_key(folder):
    loaders = default_loader, open_in_grey, lambda path: Image.open(path).convert("1")
    keys = [dataset_fingerprint(DatasetFolder(folder, one, (".png",))) for one in loaders * 2]
    assert keys[:3] == keys[3:]
    assert len(set(keys)) == 3


def test_what_happens_to_unreadable_images_is_in_the_key():
    rows = dataset_from_arrays(PIXELS, LABELS.numpy(), ["a", "b"])
    keys = [
        StoredImages(
            rows, LABELS, size=(32, 32), preprocessing={}, unreadable=unreadable
        ).fingerprint()
        for unreadable in ("raise", "raise", "skip")
    ]
    assert keys[0] == keys[1] != keys[2]
    # In memory, what cannot be read is known from the start.
    assert in_memory(None) != in_memory(None, missing=[1])


def normalize(mean):
    return transforms.Normalize(torch.tensor([mean] * 3), torch.ones(3))


def convolution(seed):
    torch.manual_seed(seed)
    return transforms.Compose([transforms.ToTensor(), nn.Conv2d(3, 3, 1)])


def rand_augment(**options):
    return rand_augment_transform("rand-m9-n1", {"img_mean": (124, 116, 104)} | options)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: normalize(0.50001), lambda: normalize(0.50004)),
        (lambda: convolution(0), lambda: convolution(1)),
        (rand_augment, lambda: rand_augment(img_mean=(0, 0, 0))),
        (rand_augment, lambda: rand_augment(translate_pct=0.1)),
    ],
)
def test_transforms_whose_repr_is_equal_have_other_descriptions(one, other):
    assert repr(one()) == repr(other())
    assert described(one()) == described(one()) != described(other())


def sharpened(image):
    return image.filter(ImageFilter.SHARPEN)


HASHED = {
    "train": lambda: create_transform(24, is_training=True, auto_augment="rand-m9-mstd0.5"),
    "evaluation": lambda: create_transform(24, is_training=False),
    "augmix": lambda: create_transform(24, is_training=True, auto_augment="augmix-m5-w4-d2"),
    "composed": lambda: v2.Compose([v2.ToImage(), v2.RandomResizedCrop(24), {"a", "b", "c"}]),
    "lambda": lambda: transforms.Lambda(lambda image: image.rotate(90)),
    "function": lambda: transforms.Compose([sharpened, functools.partial(sharpened)]),
    "augmentation": lambda: create_augmentation("affine"),
}


def test_descriptions_are_equal_in_every_process():
    """Whatever the seed of Python's hashes; and a function is known by its code."""
    here = {name: described(make()) for name, make in HASHED.items()}
    assert len(set(here.values())) == len(HASHED)
    assert {name: described(make()) for name, make in HASHED.items()} == here
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import test_fingerprint as tests; "
        "print(json.dumps({n: tests.described(make()) for n, make in tests.HASHED.items()}))"
    )
    env = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == here


def test_a_transform_that_cannot_be_hashed_needs_a_key():
    class Refuses:
        def __reduce__(self):
            raise TypeError("no pickle")

    with pytest.raises(UsageError, match=r"cannot be hashed: no pickle; pass key="):
        described(transforms.Compose([Refuses()]))


def bright(factor, place):
    """An augmentation whose effect is in one of three places."""
    augmentation = Augmentation()
    if place == "buffer":
        augmentation.register_buffer("factor", torch.tensor(factor))
    elif place == "private":
        augmentation._factor = factor
    else:
        augmentation.factor = np.append(np.ones(5000), factor)
    return augmentation


def in_memory(augmentation, **options):
    return ImageTensors(IMAGES, LABELS, augmentation=augmentation, **options).fingerprint()


@pytest.mark.parametrize("place", ["buffer", "private", "array"])
def test_an_augmentation_is_known_by_all_that_it_holds(place):
    one, same, other = (in_memory(bright(factor, place)) for factor in (1.0, 1.0, 0.5))
    assert one == same != other
    assert one != in_memory(None)


def test_no_augmentation_has_no_seed_in_its_key():
    crop = create_augmentation("crop")
    assert in_memory(crop) != in_memory(crop, seed=1)
    assert in_memory(None, seed=1) == in_memory(NoAugmentation())
