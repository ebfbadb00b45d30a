"""A feature cache: its key, kills, damage, two processes, and several views."""

import itertools
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from timm.data import FastCollateMixup, ImageDataset
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

import timm_lt
from timm_lt.data import create_augmentation, create_loader
from timm_lt.data.augment import random_uniforms
from timm_lt.data.images import ImageTensors, StoredImages
from timm_lt.data.loader import InOrder
from timm_lt.data.sources import dataset_from_arrays
from timm_lt.features import cache, extract_features
from timm_lt.features.extract import batch_sampler_of, layers_of, loader_sizes
from timm_lt.heads import get_head
from timm_lt.utils.accelerator import create_accelerator
from timm_lt.utils.checks import UsageError

N, SIDE, C = 11, 32, 4
PIXELS = np.random.default_rng(0).integers(0, 256, (N, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = torch.arange(N) % C
ENDS = {"values.npy", "targets.npy", "json", "lock"}


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield create_accelerator(mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def at_once(monkeypatch):
    """Counts each batch as soon as it is written."""
    monkeypatch.setattr(cache, "SYNC_SECONDS", 0)


def small_model():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=C)
    model._seen = []
    model.conv1.register_forward_hook(lambda _, images, __: model._seen.append(len(images[0])))
    return model


def in_memory(pixels=PIXELS, labels=LABELS, **options):
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return ImageTensors(images, labels, **{"seed": 5} | options)


def stored(pixels=PIXELS, labels=LABELS, rows=None, **options):
    names = [str(label) for label in range(C)]
    rows = dataset_from_arrays(pixels, labels.numpy(), names) if rows is None else rows
    settings = {"size": (SIDE, SIDE), "preprocessing": {"mean": (0.5,) * 3, "std": (0.2,) * 3}}
    return StoredImages(rows, labels, **settings | {"seed": 5} | options)


def tensors(number=N, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(number, 3, SIDE, SIDE, generator=generator), LABELS[:number])


def ran(model, loader, folder, **options):
    """Returns the number of images that the backbone got."""
    model._seen.clear()
    timm_lt.extract_features(model, loader, cache_dir=folder, **options)
    return sum(model._seen)


def fingerprint(loader):
    sizes = loader_sizes(loader)
    return cache.samples_fingerprint(layers_of(loader), batch_sampler_of(loader)[0], sizes[1])


def ends(folder):
    return {path.name.partition(".")[2] for path in folder.iterdir()}


def finished(folder):
    return [path for path in folder.glob("*.json") if json.loads(path.read_text())["complete"]]


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_cache_has_the_bits_of_features_in_memory_in_numpy_files(tmp_path, dtype):
    model, loader = small_model(), DataLoader(tensors(), 4)
    expected = extract_features(model, loader).values.to(getattr(torch, dtype))
    for _ in range(2):
        features = extract_features(model, loader, cache_dir=tmp_path, dtype=dtype)
        assert features.values.equal(expected)
        assert features.targets.equal(LABELS)
        # Writing to the values does not reach the file.
        features.values.zero_()
        assert extract_features(model, loader, dtype=dtype).values.equal(expected)
    assert sum(model._seen) == 4 * N
    (path,) = tmp_path.glob("*.values.npy")
    kept = torch.from_numpy(np.load(path))
    assert (kept.view(torch.bfloat16) if dtype == "bfloat16" else kept).equal(expected)
    assert ends(tmp_path) == ENDS


def test_images_that_cannot_be_read_and_empty_batches_have_no_rows(tmp_path):
    model = small_model()
    loader = DataLoader(in_memory(missing=[0, 1, 2, 3, 9]), 4, collate_fn=tuple)
    features = extract_features(model, loader, cache_dir=tmp_path)
    assert features.targets.tolist() == [int(LABELS[row]) for row in (4, 5, 6, 7, 8, 10)]
    assert features.values.equal(extract_features(model, loader).values)
    nothing = DataLoader(in_memory(missing=range(N)), 4, collate_fn=tuple)
    images, labels = tensors().tensors
    empty = (images[:0], [])
    batches = [empty, (images[:4], labels[:4]), empty, (images[4:], labels[4:])]
    expected = extract_features(model, batches[1::2])
    for options in ({}, {"cache_dir": tmp_path}):
        with pytest.raises(UsageError, match="gave 11 images, 0 of them readable"):
            extract_features(model, nothing, **options)
        features = extract_features(model, batches, **options, key="any")
        assert features.values.equal(expected.values)
        assert features.targets.equal(LABELS)


# The key ------------------------------------------------------------------------------------------


def test_what_changes_the_model_makes_another_file_and_its_classifier_does_not(tmp_path):
    model, loader = small_model(), DataLoader(tensors(), 4)
    assert ran(model, loader, tmp_path) == N
    with torch.no_grad():
        get_head(model).weight.zero_()
        timm_lt.set_head(model, "ncm")
        assert ran(model, loader, tmp_path) == 0
        model.layer2[0].conv1.weight.view(-1)[7] += 1e-3
        assert ran(model, loader, tmp_path) == N
        model.layer2[0].bn1.running_var[1] += 1e-3
        assert ran(model, loader, tmp_path) == N
        # In no tensor.
        model.layer2[0].act1 = torch.nn.GELU()
        assert ran(model, loader, tmp_path) == N
    assert ran(model, loader, tmp_path) == 0
    assert ran(model, loader, tmp_path, dtype="float16") == N
    assert ran(model, loader, tmp_path, compute_dtype="bfloat16") == N
    assert ran(model, loader, tmp_path, views=2) == 2 * N
    assert ran(model, loader, tmp_path, key="mine") == N
    assert ran(model, loader, tmp_path, key="mine") == 0
    assert len(finished(tmp_path)) == 8


@pytest.mark.parametrize(
    ("make", "same", "other"),
    [
        (in_memory, {"augmentation": create_augmentation("crop")}, {"mean": (0.5, 0.5, 0.4)}),
        (
            stored,
            {"augmentation": {"color_jitter": 0.3}, "workers": 1},
            {"preprocessing": {"mean": (0.5,) * 3, "std": (0.2,) * 3, "crop_pct": 0.5}},
        ),
    ],
)
def test_the_images_with_their_transform_are_in_the_key_and_how_they_are_loaded_is_not(
    make, same, other, accelerator
):
    def key(*images, batch_size=4, **options):
        return fingerprint(make(*images, **options).eval_loader(batch_size, accelerator))

    assert key() == key(batch_size=3, seed=6, **same)
    # One value, the order of two images, a label.
    pixels, labels, order = PIXELS.copy(), LABELS.clone(), np.array([1, 0, *range(2, N)])
    pixels[4, 3, 2, 1] ^= 1
    labels[6] = (labels[6] + 1) % C
    changed = [(pixels, LABELS), (PIXELS[order], LABELS[order]), (PIXELS, labels)]
    assert len({key(), key(**other), *(key(*images) for images in changed)}) == 5


def test_files_and_the_order_of_a_subset_are_in_the_key(tmp_path):
    for row in range(4):
        (tmp_path / f"class_{row % 2}").mkdir(exist_ok=True)
        file = tmp_path / f"class_{row % 2}" / f"{row}.png"
        Image.fromarray(PIXELS[row]).save(file)

    def folder(**options):
        options = {"is_training": True, "sampler": InOrder(4), "num_workers": 0} | options
        return fingerprint(create_loader(ImageDataset(str(tmp_path)), SIDE, 2, **options))

    variants = [{}, {"mean": (0.4, 0.5, 0.5)}]
    variants += [{"re_prob": 0.5, "re_mode": "pixel"}, {"re_prob": 0.5, "re_count": 3}]
    before = [folder(**options) for options in variants]
    assert len(set(before)) == 4
    assert before == [folder(**options) for options in variants]
    # Another time of change, of a file that is not read.
    os.utime(file, ns=(1, 1))
    assert folder() != before[0]
    whole, orders = tensors(), ([1, 2, 3], [1, 2, 3], [1, 3, 2], [1, 2, 3])
    layouts = zip(orders, (2, 3, 2, 2), (False, False, False, True), strict=True)
    keys = [fingerprint(DataLoader(Subset(whole, o), n, drop_last=d)) for o, n, d in layouts]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def doubled(batch):
    images, targets = default_collate(batch)
    return 2 * images, targets


def test_samples_that_cannot_be_identified_need_a_key(tmp_path):
    model, batches = small_model(), list(DataLoader(tensors(), 4))
    store = tmp_path / "cache"
    for loader, message in (
        (batches, "the samples of a list without a data set"),
        (DataLoader([*zip(*tensors().tensors, strict=True)], 4), "a list have no fingerprint"),
        (DataLoader(tensors(), 4, collate_fn=doubled), "collate_fn of its own"),
        (DataLoader(tensors(), 4, collate_fn=FastCollateMixup(mixup_alpha=1.0)), "of its own"),
        (DataLoader(tensors(), batch_sampler=[[3, 2, 1], [0, 5]]), "batches .* of its own"),
    ):
        with pytest.raises(UsageError, match=rf"{message}.*pass key="):
            extract_features(model, loader, cache_dir=store)
    assert not store.exists()
    assert ran(model, batches, store, key="a") == N
    assert ran(model, batches, store, key="a") == 0
    features = extract_features(model, loader, cache_dir=store, key="b")
    assert features.targets.equal(LABELS[[3, 2, 1, 0, 5]])


def test_a_loader_that_draws_is_refused(tmp_path):
    for loader in (
        DataLoader(tensors(), 4, shuffle=True),
        create_loader(in_memory(), SIDE, 4, is_training=True, use_prefetcher=False),
        create_loader(in_memory(), SIDE, 4, sampler=timm_lt.create_sampler("reversed", LABELS)),
    ):
        with pytest.raises(UsageError, match=r"in the order of the data set, not as a \w*Sampler"):
            extract_features(small_model(), loader, cache_dir=tmp_path, key="a")


# Kills and faults ---------------------------------------------------------------------------------


# Takes the features of 11 images, two at a time; a moment is an access to a file of the cache.
SCRIPT = """
import json, os, signal, sys
import timm, torch
from torch.utils.data import DataLoader, TensorDataset
from timm_lt.features import cache, extract_features

folder, moment = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = timm.create_model("test_resnet", num_classes=4)
cache.SYNC_SECONDS = 0
read, events = [], 0


class Noting(TensorDataset):
    def __getitem__(self, row):
        read.append(row)
        return super().__getitem__(row)


def note(event, arguments):
    global events
    touched = event in ("open", "os.rename", "os.remove", "os.truncate")
    if touched and str(arguments[0]).startswith(folder):
        events += 1
        if events == moment:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(note)
loader = DataLoader(Noting(torch.randn(11, 3, 32, 32), torch.arange(11) % 4), 2)
extract_features(model, loader, cache_dir=folder, key="a")
print(json.dumps([read, events]))
"""


def bits(folder):
    """The content of a finished cache."""
    return [path.read_bytes() for path in sorted(folder.glob("*.npy"))] if finished(folder) else []


@pytest.mark.exhaustive
def test_after_a_kill_or_a_full_disk_the_rest_is_made_to_the_same_bits(server, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def take(folder, moment=0, **options):
        return server.run(folder, moment, script=tmp_path / "script.py", **options)

    _, events = json.loads(take(tmp_path / "whole").out)
    expected, numbers = bits(tmp_path / "whole"), []
    assert (len(expected), events >= 16) == (2, True)
    for moment in range(1, events + 1, 2):
        folder = tmp_path / str(moment)
        assert take(folder, moment).status == -signal.SIGKILL
        assert bits(folder) in ([], expected)
        read, _ = json.loads(take(folder).out)
        assert bits(folder) == expected
        # Behind the last whole batch: what is skipped is not even read.
        assert read == list(range(N - len(read), N))
        numbers.append(len(read))
    # Before the first batch, behind the last one, and between.
    assert sorted(numbers, reverse=True) == numbers
    assert (numbers[0], numbers[-1], len(set(numbers)) >= 5) == (N, 0, True)
    # Room for six rows of width 96 and a part of the seventh.
    folder = tmp_path / "full"
    assert "cannot be written: File too large; make" in take(folder, limit=128 + 2304 + 100).err
    assert bits(folder) == []
    assert json.loads(take(folder).out)[0] == list(range(6, N))
    assert bits(folder) == expected


# Prints by how many bytes 160 MB of features, in batches of 4 MB, make the largest size grow.
GROWTH = """
import resource, sys
import torch
from torch.utils.data import DataLoader, TensorDataset
from timm_lt.features import extract_features


class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4096, 2)
        self.get_classifier = lambda: self.fc

    def forward(self, images):
        return self.fc(images.flatten(1).repeat(1, 4096))


data = TensorDataset(torch.arange(10000.0).view(-1, 1, 1, 1), torch.ones(10000).long())
loader = DataLoader(data, 250)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
features = extract_features(Wide(), loader, cache_dir=sys.argv[1] or None, key="a")
assert features.values[-1, 7] == 9999
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.exhaustive
def test_the_memory_holds_a_batch_with_a_cache_and_one_copy_without(server, tmp_path):
    (tmp_path / "script.py").write_text(GROWTH)
    grown = [
        int(server.run(folder, script=tmp_path / "script.py").out)
        for folder in (tmp_path / "cache", "")
    ]
    size = 10000 * 4096 * 4
    assert grown[0] < size / 2
    # A second copy would be twice the size; torch itself takes 20 to 60 MB in a new process.
    assert grown[1] < 1.6 * size


def test_a_file_larger_than_the_memory_is_mapped(tmp_path):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    width, path = 2**20, tmp_path / "large.npy"
    rows = 2 * memory // (4 * width)
    try:
        # Without blocks on the disk.
        np.lib.format.open_memmap(path, "w+", np.float32, (rows, width))
    except OSError:
        pytest.skip("no file of this length can be here")
    values = cache._mapped(path, torch.float32)
    assert values.shape == (rows, width)
    assert float(values[-1, -1]) == 0
    path.unlink()


class Broken(DataLoader):
    """Fails after two batches."""

    def __iter__(self):
        yield from itertools.islice(super().__iter__(), 2)
        raise KeyboardInterrupt


@pytest.mark.parametrize("damage", ["none", "batches", "shorter", "missing"])
@pytest.mark.parametrize("end", ["values.npy", "targets.npy", "json"])
def test_an_interrupted_cache_is_continued_if_it_is_whole_and_the_batches_are_the_same(
    tmp_path, at_once, end, damage
):
    with pytest.raises(KeyboardInterrupt):
        extract_features(small_model(), Broken(tensors(), 4), cache_dir=tmp_path)
    (path,) = tmp_path.glob(f"*.{end}")
    if damage == "shorter":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "missing":
        path.unlink()
    model, loader = small_model(), DataLoader(tensors(), 3 if damage == "batches" else 4)
    assert ran(model, loader, tmp_path) == (N - 8 if damage == "none" else N)
    expected = extract_features(model, loader)
    assert extract_features(model, loader, cache_dir=tmp_path).values.equal(expected.values)


@pytest.mark.parametrize(
    ("end", "keep"), [("values.npy", k) for k in (0, 5, 128, -1)] + [("json", 9)]
)
def test_a_damaged_cache_is_made_anew(tmp_path, end, keep, caplog):
    model, loader = small_model(), DataLoader(tensors(), 4)
    expected = extract_features(model, loader, cache_dir=tmp_path).values.clone()
    (path,) = tmp_path.glob(f"*.{end}")
    path.write_bytes(path.read_bytes()[:keep])
    with caplog.at_level("WARNING", "timm_lt"):
        assert ran(model, loader, tmp_path) == N
    assert "is damaged" in caplog.text
    assert extract_features(model, loader, cache_dir=tmp_path).values.equal(expected)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cache_dir .*file cannot be written"):
        extract_features(small_model(), DataLoader(tensors(), 4), cache_dir=tmp_path / "file")


class Ending(DataLoader):
    """Ends before its last batch."""

    def __iter__(self):
        return iter(list(super().__iter__())[:-1])


@pytest.mark.parametrize("cached", [False, True])
def test_a_loader_that_gives_another_number_of_images_is_refused(tmp_path, at_once, cached):
    options = {"cache_dir": tmp_path} if cached else {}
    for _ in range(2):
        with pytest.raises(UsageError, match=r"gave 16 images, .* expected 22"):
            extract_features(small_model(), Ending(tensors(), 4), views=2, **options)
    # The rows are gone: a whole loader begins anew.
    model = small_model()
    assert not cached or ran(model, DataLoader(tensors(), 4), tmp_path, views=2) == 2 * N


def test_a_second_process_waits_and_reads(tmp_path):
    """A thread stands for it: the lock is of the file, not of the process."""
    first, second, started = small_model(), small_model(), threading.Event()

    class Slow(DataLoader):
        def __iter__(self):
            started.set()
            time.sleep(0.3)
            return super().__iter__()

    def take(model, loader):
        return extract_features(model, loader, cache_dir=tmp_path).values

    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(take, first, Slow(tensors(), 4))
        started.wait()
        fast = threads.submit(take, second, DataLoader(tensors(), 4))
        assert slow.result().equal(fast.result())
    assert (sum(first._seen), sum(second._seen)) == (N, 0)


# Views --------------------------------------------------------------------------------------------


AFFINE = {"augmentation": create_augmentation("affine")}
TIMM = {"augmentation": {"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5}}


def views_of(data, accelerator, batch_size=4, **options):
    loader = data.views_loader(batch_size, accelerator)
    return extract_features(small_model(), loader, accelerator=accelerator, **options)


@pytest.mark.parametrize("make", ["in_memory", "stored"])
def test_views_are_those_of_their_draws_whatever_the_batches(make, tmp_path, accelerator):
    data = in_memory(**AFFINE) if make == "in_memory" else stored(**TIMM)
    features = views_of(data, accelerator, views=3)
    assert (len(features), features.num_images) == (3 * N, N)
    assert features.targets.equal(LABELS.repeat(3))
    first, second, third = features.values.split(N)
    assert not first.allclose(second, atol=1e-3)
    assert not second.allclose(third, atol=1e-3)
    torch.testing.assert_close(views_of(data, accelerator, 5, views=3).values, features.values)
    for views in (1, 2, 3):
        found = views_of(data, accelerator, views=views, cache_dir=tmp_path)
        assert found.values.equal(features.first_views(views).values)
    # By hand, image by image.
    loader = data.views_loader(4, accelerator)
    draw = 2 * N + 7
    loader.set_epoch(2)
    image = [images for images, _ in loader][1][3]
    if make == "in_memory":
        uniforms = random_uniforms(5, torch.tensor([draw]), data.augmentation.count)
        expected = data.augmentation(data.images[7:8].float(), uniforms)
        expected = ((expected - data.mean) / data.std)[0]
    else:
        expected = loader.dataset[draw][0]
    torch.testing.assert_close(image, expected)


def test_views_are_continued_in_the_middle(tmp_path, at_once, accelerator):
    class Failing(ImageTensors):
        def __getitems__(self, draws):
            if draws[0] >= N + 8:
                raise KeyboardInterrupt
            return super().__getitems__(draws)

    data, failing, model = in_memory(**AFFINE), in_memory(**AFFINE), small_model()
    failing.__class__ = Failing
    with pytest.raises(KeyboardInterrupt):
        views_of(failing, accelerator, views=3, cache_dir=tmp_path)
    loader = data.views_loader(4, accelerator)
    ran(model, loader, tmp_path, views=3, accelerator=accelerator)
    # Accelerate reads ahead: when the third batch of a view cannot be read, the first is whole.
    assert model._seen == [4, 3, 4, 4, 3]
    features = views_of(data, accelerator, views=3, cache_dir=tmp_path)
    assert features.values.equal(views_of(data, accelerator, views=3).values)
    # Another seed is another augmentation.
    data.seed += 1
    assert ran(model, data.views_loader(4, accelerator), tmp_path, views=3) == 3 * N


class Views:
    """Gives the images of the second view in another order."""

    def set_epoch(self, epoch):
        self.order = torch.arange(N).flip(0) if epoch else torch.arange(N)

    def __iter__(self):
        images, labels = tensors().tensors
        return ((images[rows], labels[rows]) for rows in self.order.split(4))


def test_views_of_other_images_are_refused_and_not_continued(tmp_path, at_once):
    for options in ({}, {"cache_dir": tmp_path, "key": "a"}):
        with pytest.raises(UsageError, match="not 2 views of the same images"):
            extract_features(small_model(), Views(), views=2, **options)
    assert ends(tmp_path) == {"lock"}
