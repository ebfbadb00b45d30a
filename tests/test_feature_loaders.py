"""Loaders and models whose features would be wrong without a word: each is refused, or right."""

import multiprocessing
import re
import subprocess
import sys
from collections import UserDict
from dataclasses import dataclass
from multiprocessing.connection import Client
from types import SimpleNamespace
from typing import NamedTuple

import datasets
import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from PIL import Image
from timm.data import FastCollateMixup, ImageDataset
from timm.data.loader import fast_collate
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Sampler, TensorDataset, default_collate

from timm_lt.data import create_loader
from timm_lt.data.loader import InOrder, loaded
from timm_lt.features import cache, extract, extract_features
from timm_lt.features.cache import samples_fingerprint
from timm_lt.utils.accelerator import create_accelerator
from timm_lt.utils.checks import UsageError

N = 11
IMAGES = torch.randn(N, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(N) % 4
DATA = TensorDataset(IMAGES, LABELS)


@pytest.fixture
def accelerators():
    """Makes accelerators of other settings in one process."""

    def make(create=create_accelerator, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        return create(**options)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for row in range(4):
        Image.new("RGB", (32, 32), (9 * row,) * 3).save(tmp_path / "images" / "a" / f"{row}.png")
    return str(tmp_path / "images")


def small_model():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=4)


# The order and the batches ------------------------------------------------------------------------


class Batches(Sampler):
    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def test_batches_of_an_own_sampler_need_a_key(tmp_path):
    for number, batches in enumerate(([[0, 1], [2, 3]], [[3, 2, 1], [0, 5, 6]])):
        loader = DataLoader(DATA, batch_sampler=Batches(*batches))
        with pytest.raises(UsageError, match=r"the order in which .* is not known.*: pass key="):
            extract_features(small_model(), loader, cache_dir=tmp_path)
        features = extract_features(small_model(), loader, cache_dir=tmp_path, key=str(number))
        assert features.targets.tolist() == [int(LABELS[row]) for batch in batches for row in batch]


def test_loaders_that_draw_behind_other_batches_are_refused(tmp_path, folder, accelerators):
    repeated = create_loader(
        ImageDataset(folder),
        32,
        2,
        is_training=True,
        no_aug=True,
        use_multi_epochs_loader=True,
        num_workers=0,
    )
    dispatching = DataLoaderConfiguration(dispatch_batches=True)
    accelerator = accelerators(Accelerator, cpu=True, dataloader_config=dispatching)
    dispatched = accelerator.prepare(DataLoader(DATA, 2, shuffle=True))
    for loader in (repeated, dispatched, DataLoader(DATA, batch_size=None, shuffle=True)):
        with pytest.raises(UsageError, match=r"in the order of the data set, not as a Random"):
            extract_features(small_model(), loader, cache_dir=tmp_path, key="a")
    in_order = accelerator.prepare(DataLoader(DATA, 2))
    with pytest.raises(UsageError, match=r"the order in which .* is not known"):
        extract_features(small_model(), in_order, cache_dir=tmp_path / "b")
    features = extract_features(small_model(), in_order, cache_dir=tmp_path / "b", key="a")
    assert features.targets.equal(LABELS)


def test_a_collate_function_of_its_own_needs_a_key(tmp_path):
    def doubled(batch):
        images, targets = default_collate(batch)
        return 2 * images, targets

    known = samples_fingerprint(DataLoader(DATA, 4))
    assert known == samples_fingerprint(DataLoader(DATA, 4, collate_fn=default_collate))
    samples_fingerprint(DataLoader(DATA, 4, collate_fn=fast_collate))
    for collate in (doubled, FastCollateMixup(mixup_alpha=1.0)):
        with pytest.raises(UsageError, match=r"what collate_fn=.* is not known.* pass key="):
            samples_fingerprint(DataLoader(DATA, 4, collate_fn=collate))
    loader = DataLoader(DATA, 4, collate_fn=doubled)
    features = extract_features(small_model(), loader, cache_dir=tmp_path, key="doubled")
    expected = extract_features(small_model(), [(2 * IMAGES, LABELS)]).values
    torch.testing.assert_close(features.values, expected)


def test_what_the_prefetcher_erases_is_in_the_key(folder):
    def fingerprint(**options):
        options |= {"is_training": True, "sampler": InOrder(4), "num_workers": 0, "re_prob": 0.5}
        return samples_fingerprint(create_loader(ImageDataset(folder), 32, 2, **options))

    variants = [{}, {"re_mode": "pixel"}, {"re_count": 3}]
    assert len({fingerprint(**options) for options in variants}) == len(variants)
    assert fingerprint() == fingerprint()


# How many images ----------------------------------------------------------------------------------


def test_several_processes_need_a_prepared_loader(accelerators):
    two = SimpleNamespace(num_processes=2)
    for loader in (DataLoader(DATA, 4), [(IMAGES, LABELS)], create_loader(DATA, 32, 4)):
        with pytest.raises(UsageError, match=r"runs 2 processes, .* prepare it"):
            extract_features(small_model(), loader, accelerator=two)
    accelerator = accelerators(mixed_precision="no")
    prepared = [accelerator.prepare(DataLoader(DATA, 4))]
    prepared += [create_loader(DATA, 32, 4, accelerator=accelerator, use_prefetcher=False)]
    for loader in prepared:
        # Behind the check, there is no such device.
        with pytest.raises(AttributeError, match="gather_for_metrics"):
            extract_features(small_model(), loader, accelerator=two)


class Ending(DataLoader):
    """Ends before its last batch."""

    whole = False

    def __iter__(self):
        batches = list(super().__iter__())
        return iter(batches if self.whole else batches[:-1])


@pytest.mark.parametrize("cached", [False, True])
def test_a_loader_that_shows_another_number_of_images_is_refused(tmp_path, monkeypatch, cached):
    monkeypatch.setattr(cache, "SYNC_SECONDS", 0)
    options = {"cache_dir": tmp_path} if cached else {}
    loader = Ending(DATA, 4)
    for _ in range(2):
        with pytest.raises(UsageError, match="showed 16 images in all and should have shown 22"):
            extract_features(small_model(), loader, views=2, **options)
    loader.whole = True
    features = extract_features(small_model(), loader, views=2, **options)
    assert features.targets.equal(LABELS.repeat(2))


@pytest.mark.parametrize("cached", [False, True])
def test_a_loader_without_an_image_that_can_be_read_is_refused(tmp_path, cached):
    options = {"cache_dir": tmp_path, "key": "a"} if cached else {}
    with pytest.raises(UsageError, match="the loader has no images that can be read"):
        extract_features(small_model(), [(IMAGES, torch.full((N,), -1))], **options)


# Precision ----------------------------------------------------------------------------------------


def test_the_mixed_precision_of_accelerate_is_off_in_float32(accelerators):
    expected = extract_features(small_model(), DataLoader(DATA, 4)).values
    accelerator = accelerators(Accelerator, cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(small_model())
    forward = model.forward
    assert extract_features(model, DataLoader(DATA, 4)).values.equal(expected)
    assert model.forward == forward
    low = extract_features(model, DataLoader(DATA, 4), compute_dtype="bfloat16").values
    assert 1e-4 < float((low - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)]
)
def test_a_model_computes_in_the_type_of_its_weights(dtype, tolerance):
    expected = extract_features(small_model(), DataLoader(DATA, 4)).values
    model = small_model().to(dtype)
    values = extract_features(model, DataLoader(DATA, 4)).values
    assert values.dtype == torch.float32
    assert float((values - expected).norm() / expected.norm()) < tolerance
    if dtype != torch.bfloat16:
        with pytest.raises(UsageError, match=r"these are torch\.float\d\d: pass compute_dtype"):
            extract_features(model, DataLoader(DATA, 4), compute_dtype="bfloat16")


# Errors -------------------------------------------------------------------------------------------


class Views:
    """Shows the images of the second view in another order, as long as it is broken."""

    broken = True

    def set_epoch(self, epoch):
        self.order = torch.arange(N).flip(0) if self.broken and epoch else torch.arange(N)

    def __iter__(self):
        return ((IMAGES[rows], LABELS[rows]) for rows in self.order.split(4))


def test_views_that_do_not_fit_leave_nothing_to_go_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SYNC_SECONDS", 0)
    loader = Views()
    with pytest.raises(UsageError, match="every view must have the same images"):
        extract_features(small_model(), loader, views=2, cache_dir=tmp_path, key="a")
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock"}
    loader.broken = False
    features = extract_features(small_model(), loader, views=2, cache_dir=tmp_path, key="a")
    assert features.targets.equal(LABELS.repeat(2))


def test_the_model_is_as_it_was_after_an_error_that_is_kept(tmp_path, monkeypatch):
    def full(*_):
        raise UsageError("the disk is full")

    def late():
        yield IMAGES, LABELS
        yield IMAGES, LABELS.double() + 0.5

    monkeypatch.setattr(cache.Writer, "append", full)
    model = small_model().train()
    for loader, options in (
        (DataLoader(DATA, 4), {"cache_dir": tmp_path}),
        (late(), {}),
    ):
        # The frames in which the batches are made live as long as the error.
        with pytest.raises(UsageError, match=r"disk is full|is not an integer") as kept:
            extract_features(model, loader, **options)
        assert kept.value.__traceback__ is not None
        assert model.training
        assert not model.fc._forward_pre_hooks


def test_any_error_of_the_main_process_reaches_the_others(monkeypatch):
    sent = []

    def send(words):
        sent.append(words)
        return words

    main = SimpleNamespace(num_processes=2, is_main_process=True)

    def fail(error):
        raise error

    for error, words in (
        (UsageError("no room"), "no room"),
        (MemoryError("too much"), "the main process failed with MemoryError: too much"),
    ):
        monkeypatch.setattr(extract, "broadcast_object_list", send)
        with pytest.raises(type(error)) as raised:
            extract._on_main(main, fail, error)
        assert raised.value is error
        assert sent.pop() == [None, words]
        # What another process gets of it.
        other = SimpleNamespace(num_processes=2, is_main_process=False)
        monkeypatch.setattr(extract, "broadcast_object_list", lambda _, words=words: [None, words])
        with pytest.raises(UsageError, match=words):
            extract._on_main(other, fail, error)


def failing(kind=LookupError):
    """What torch's loader raises when a worker does, without the seconds that a process takes."""
    try:
        raise kind("no such row")
    except kind:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    wrapped.reraise()
    yield


def test_a_failed_worker_says_what_to_do_where_there_is_no_command_line():
    # A RuntimeError, too, is one of a worker that lives.
    for kind in (LookupError, RuntimeError):
        with pytest.raises(UsageError, match=r"failed: .*no such row; fix it and extract "):
            extract_features(small_model(), failing(kind))
    with pytest.raises(UsageError, match="fix it and go on with --resume"):
        list(loaded(failing()))


@pytest.mark.parametrize(
    ("torchs_words", "words"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Killed. ",
            r"killed by signal 9, often .* too little memory; fewer workers need less\); extract",
        ),
        (
            "DataLoader worker (pid 7) exited unexpectedly with exit code 3.",
            r"died \(DataLoader worker \(pid 7\) exited unexpectedly with exit code 3\); extract",
        ),
    ],
)
def test_the_death_of_a_worker_is_told_as_far_as_it_is_known(torchs_words, words, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda **_: "fork")

    def dying():
        raise RuntimeError(torchs_words)
        yield

    with pytest.raises(UsageError, match=words):
        extract_features(small_model(), dying())


def test_only_a_lost_connection_is_a_dead_worker(tmp_path):
    def asking(path):
        yield Client(path)

    with pytest.raises(UsageError, match="a data worker died"):
        list(loaded(asking(str(tmp_path / "gone"))))
    # Whatever else goes wrong between processes is told as it is.
    with pytest.raises(OSError, match="too long"):
        list(loaded(asking("x" * 200)))


def test_a_script_without_its_guard_is_told_so(tmp_path):
    (tmp_path / "script.py").write_text(
        "import multiprocessing\n"
        "if multiprocessing.current_process().name == 'MainProcess':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "from torch.utils.data import DataLoader\n"
        "from timm_lt.data.loader import loaded\n"
        "list(loaded(DataLoader([1, 2], num_workers=1)))\n"
    )
    command = [sys.executable, str(tmp_path / "script.py")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    (end,) = re.findall(r"^timm_lt.utils.checks.UsageError: (.*)", run.stderr, re.MULTILINE)
    assert end.startswith("a data worker died (DataLoader worker")
    assert end.endswith("""below `if __name__ == "__main__":`""")
    assert "memory" not in end


# Batches in other layouts -------------------------------------------------------------------------


class Named(NamedTuple):
    label: object
    image: object


class Unnamed(NamedTuple):
    first: object
    second: object


@dataclass
class Record:
    file: object
    img: object
    target: object


FILES = ("a", "b", "c")
LAYOUTS = {
    "three parts": lambda x, y: (x, y, torch.arange(len(y))),
    "list": lambda x, y: [x, y],
    "mapping": lambda x, y: {"label": y, "image": x, "file": FILES},
    "other keys": lambda x, y: UserDict({"targets": y, "pixel_values": x, "image": FILES}),
    "capitals": lambda x, y: {"X": x, "Y": y},
    "named tuple": lambda x, y: Named(y, x),
    "named tuple in order": Unnamed,
    "dataclass": lambda x, y: Record(FILES, x, y),
    "arrays": lambda x, y: (x.numpy(), y.numpy().astype(np.uint8)),
    "read-only arrays": lambda x, y: (np.broadcast_to(x.numpy(), x.shape), y.numpy()[::-1][::-1]),
    "labels in a list": lambda x, y: (x, y.tolist()),
    "labels in a tuple of 0-d tensors": lambda x, y: (x, tuple(y)),
    "labels as NumPy integers": lambda x, y: (x, list(y.numpy())),
    "images in a list": lambda x, y: (list(x), y),
    "images in a list of arrays": lambda x, y: (list(x.numpy()), y),
    "float64": lambda x, y: (x.double(), y.int()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_of_any_layout_give_the_same_features(layout):
    model, parts = small_model(), [(IMAGES[:3], LABELS[:3]), (IMAGES[3:], LABELS[3:])]
    with torch.inference_mode():
        model.eval()
        images = torch.cat([model.forward_head(model.forward_features(x), True) for x, _ in parts])
    features = extract_features(model, [LAYOUTS[layout](x, y) for x, y in parts])
    torch.testing.assert_close(features.values, images)
    assert features.targets.equal(LABELS)


def test_an_empty_batch_has_no_rows(tmp_path):
    empty = (IMAGES[:0], [])
    loader = [empty, (IMAGES[:4], LABELS[:4]), empty, (IMAGES[4:], LABELS[4:])]
    expected = extract_features(small_model(), loader[1::2])
    for options in ({}, {"cache_dir": tmp_path, "key": "any"}):
        features = extract_features(small_model(), loader, **options)
        assert features.values.equal(expected.values)
        assert features.targets.equal(LABELS)


CHANNELS_LAST = r"ResNet fails on .* \(11, 32, 32, 3\), with the channels last: .*permute"


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (
            IMAGES,
            r"batch 0 of the loader is a Tensor of shape \(11, 3, 32, 32\), torch.float32; exp",
        ),
        ([IMAGES], "is a list of length 1"),
        ("images", "is a str; expected an image and its label"),
        (
            {"image": IMAGES, "box": 0},
            "is a dict with the keys image, box; expected .* one of label, ",
        ),
        (
            {"picture": IMAGES, "label": LABELS},
            "with the keys picture, label; expected .* of the keys pixel",
        ),
        (
            (IMAGES[0], LABELS[0]),
            r"images of batch 0 .* shape \(3, 32, 32\), .*; expected floating",
        ),
        ((IMAGES.permute(0, 2, 3, 1), LABELS), CHANNELS_LAST),
        ((IMAGES[:, :1], LABELS), r"fails on images of shape \(11, 1, 32, 32\) \("),
        ((IMAGES.byte(), LABELS), r"torch.uint8; expected .* divided by 255.*create_loader"),
        (
            ([IMAGES[0], IMAGES[1, :, 1:]], [0, 1]),
            r"are a list of length 2, which begins with a Te",
        ),
        ((["a.png", "b.png"], [0, 1]), "images .* are a list of length 2, which begins with a str"),
        (
            (IMAGES, LABELS[1:]),
            "Tensor of shape .10,., .*; expected one integer for each of the 11",
        ),
        ((IMAGES, LABELS[:, None]), r"labels of batch 0 .* \(11, 1\), .*; expected one integer"),
        ((IMAGES, LABELS / 2), r"batch 0 of the loader: labels\[1\] = 0.5 is not an integer"),
        ((IMAGES, LABELS > 1), r"labels\[0\] = False is not an integer"),
        ((IMAGES[:2], ["cat", "dog"]), "labels .* begins with a str; expected one integer"),
        ((IMAGES[:2], None), "labels .* are a NoneType; expected one integer"),
    ],
)
def test_what_is_wrong_with_a_batch_is_said(batch, words):
    with pytest.raises(UsageError, match=words):
        extract_features(small_model(), [batch])


def test_the_batch_is_named():
    with pytest.raises(UsageError, match="batch 1 of the loader is a Tensor"):
        extract_features(small_model(), [(IMAGES, LABELS), IMAGES])


def test_images_of_another_size_than_the_model_is_for():
    vit = timm.create_model("test_vit", num_classes=4, img_size=64, dynamic_img_size=False)
    words = r"VisionTransformer fails on images of shape \(11, 3, 32, 32\) \(.*height.*32"
    with pytest.raises(UsageError, match=words):
        extract_features(vit, [(IMAGES, LABELS)])


@pytest.mark.parametrize("loader", [DATA, IMAGES, 5, datasets.Dataset.from_dict({"label": [0]})])
def test_only_loaders_are_loaders(loader):
    with pytest.raises(UsageError, match=r"is not a loader.* timm_lt.create_loader"):
        extract_features(small_model(), loader)
