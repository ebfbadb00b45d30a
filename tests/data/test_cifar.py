"""CIFAR-LT from stand-ins in every layout: the subset is that of LDAM-DRW in any stored order."""

import dataclasses
import hashlib
import json
import pickle  # noqa: TID251

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from huggingface_hub import constants

from timm_lt.data import Splits, cifar_manifest
from timm_lt.data.cifar import SPECS, official_rows
from timm_lt.data.long_tailed import long_tailed_indices
from timm_lt.data.sources import dataset_from_arrays, find_splits
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import long_tailed_counts

HUB_ORDER = [3, 2, 1, 4, 0]  # of the members of the archive: data_batch_4, 3, 2, 5, 1
CIFAR10, CIFAR100 = SPECS.values()
BOTH = list(SPECS.items())
SIZES = {
    "cifar10_lt": {10: 20431, 50: 13996, 100: 12406, 200: 11203},
    "cifar100_lt": {10: 19573, 50: 12608, 100: 10847, 200: 9502},
}


def labels_of(batch, seed):
    """Labels that begin as those of a published file, and are as many of each class."""
    first, counts = batch["first"], batch["counts"]
    rest = np.array(counts) - np.bincount(first, minlength=len(counts))
    rest = np.repeat(np.arange(len(rest)), rest)
    return np.concatenate([first, np.random.default_rng(seed).permutation(rest)])


def parquet(path, facts, labels, rows):
    """Writes a table of the Hub's layout, whose images are the numbers of their rows."""
    images = [{"bytes": str(row).encode(), "path": None} for row in rows]
    # The Hub's copy has a class misspelt.
    names = [{"crab": "cra"}.get(name, name) for name in facts.names]
    kinds = {"img": datasets.Image(), facts.label: datasets.ClassLabel(names=names)}
    schema = datasets.Features(kinds).arrow_schema
    table = pa.table({"img": images, facts.label: labels}).cast(schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


@pytest.fixture(autouse=True)
def _prepared(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def hub_copies(tmp_path_factory):
    """Root and official labels of both, as large as they are, in the order of the Hub."""
    copies = {}
    for name, facts in BOTH:
        root = tmp_path_factory.mktemp(name) / "snapshot"
        batches = [labels_of(batch, seed) for seed, batch in enumerate(facts.batches)]
        rows = np.arange(50_000).reshape(len(batches), -1)
        stored = HUB_ORDER if name == "cifar10_lt" else [0]
        labels, index = (np.concatenate([parts[i] for i in stored]) for parts in (batches, rows))
        parquet(root / "plain_text/train-00000-of-00001.parquet", facts, labels, index)
        test = np.repeat(np.arange(len(facts.names)), facts.test_per_class)
        parquet(root / "plain_text/test-00000-of-00001.parquet", facts, test, range(10_000))
        copies[name] = root, np.concatenate(batches)
    return copies


@pytest.mark.parametrize(
    ("name", "factor", "profile"),
    [
        ("cifar10_lt", 100, "exponential"),
        ("cifar10_lt", 10, "step"),
        ("cifar100_lt", 100, "exponential"),
        ("cifar100_lt", 200, "exponential"),
    ],
)
def test_the_subset_of_a_copy_in_the_order_of_the_hub_is_that_of_ldam_drw(
    hub_copies, name, factor, profile
):
    (root, labels), facts = hub_copies[name], SPECS[name]
    found = find_splits(name, root=root, imbalance_factor=factor, profile=profile)
    # test_long_tailed compares this with LDAM-DRW's procedure.
    expected = long_tailed_indices(labels, imbalance_factor=factor, profile=profile).tolist()
    # The images are the numbers of their rows.
    encoded = found["train"].cast_column("image", datasets.Image(decode=False))["image"]
    assert [int(image["bytes"]) for image in encoded] == expected
    assert found["train"]["label"][:] == labels[expected].tolist()
    assert found["train"].features["label"].names == list(facts.names)
    assert len(found["test"]) == 10_000
    assert list(found) == ["train", "test"]
    if profile == "exponential":
        assert len(expected) == SIZES[name][factor]
    largest = facts.per_class["train"]
    for factor, size in SIZES[name].items():
        assert sum(long_tailed_counts(len(facts.names), largest, factor, "exponential")) == size


def test_the_order_of_the_files_is_recognised_or_refused(hub_copies):
    _, labels = hub_copies["cifar10_lt"]
    blocks = np.arange(50_000).reshape(5, -1)
    for order in ([0, 1, 2, 3, 4], HUB_ORDER, [4, 0, 3, 1, 2]):
        rows = np.concatenate([blocks[i] for i in order])
        assert (rows[official_rows(CIFAR10, labels[rows])] == np.arange(50_000)).all()
    with pytest.raises(UsageError, match=r"unknown order .* CIFAR-10: 0 of 5 blocks are official"):
        official_rows(CIFAR10, np.sort(labels))
    # Two labels of the first file are exchanged with two of the second: the counts differ.
    labels = labels.copy()
    labels[np.flatnonzero(labels[:10_000] == 0)[-2:]] = 1
    labels[10_000 + np.flatnonzero(labels[10_000:20_000] == 1)[-2:]] = 0
    with pytest.raises(UsageError, match="3 of 5 blocks are official files"):
        official_rows(CIFAR10, labels)


# Local copies in the other layouts, of ten training images a class and two test images.


@pytest.fixture
def small(monkeypatch):
    """Makes both data sets small, and gives their images and labels in the official order."""
    made = {}
    rng = np.random.default_rng(0)
    for name, facts in BOTH:
        classes = np.arange(len(facts.names))
        labels = {"train": rng.permutation(np.repeat(classes, 10)), "test": np.repeat(classes, 2)}
        parts = np.split(labels["train"], len(facts.batches))
        counts = [np.bincount(part, minlength=len(classes)).tolist() for part in parts]
        pairs = zip(parts, counts, strict=True)
        batches = [{"first": part[:5].tolist(), "counts": number} for part, number in pairs]
        changed = dataclasses.replace(facts, batches=batches, test_per_class=2)
        monkeypatch.setitem(SPECS, name, changed)
        made[name] = {
            split: (rng.integers(0, 256, (len(values), 32, 32, 3), np.uint8), values)
            for split, values in labels.items()
        }
    return made


def pixels(images):
    """As CIFAR stores them: all of red, then green, then blue."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_binary(folder, name, parts):
    facts = SPECS[name]
    folder.mkdir(parents=True)
    for part, (images, labels) in parts.items():
        mine = {"train": facts.binary_train, "test": [facts.binary_test]}[part]
        rows = np.zeros((len(labels), facts.label_bytes + 3072), np.uint8)
        rows[:, facts.label_bytes - 1], rows[:, facts.label_bytes :] = labels, pixels(images)
        for file, content in zip(mine, np.split(rows, len(mine)), strict=True):
            (folder / file).write_bytes(content.tobytes())


def write_python(folder, name, parts, monkeypatch):
    """Writes pickles, and lets torchvision expect their MD5."""
    facts = SPECS[name]
    loader = getattr(torchvision.datasets, facts.name.replace("-", ""))
    folder.mkdir(parents=True)
    key = {"cifar10_lt": "labels", "cifar100_lt": "fine_labels"}[name]

    def dump(file, content):
        path = folder / file
        path.write_bytes(pickle.dumps(content))
        return file, hashlib.md5(path.read_bytes()).hexdigest()

    for part, names in (("train", loader.train_list), ("test", loader.test_list)):
        images, labels = (np.split(array, len(names)) for array in parts[part])
        written = [
            list(dump(file, {"data": pixels(images[i]), key: labels[i].tolist()}))
            for i, (file, _) in enumerate(names)
        ]
        monkeypatch.setattr(loader, f"{part}_list", written)
    meta = dict(loader.meta)
    meta["filename"], meta["md5"] = dump(meta["filename"], {meta["key"]: list(facts.names)})
    monkeypatch.setattr(loader, "meta", meta)


def write_parquet(root, name, parts):
    facts = SPECS[name]
    root.mkdir(parents=True, exist_ok=True)
    for part, (images, labels) in parts.items():
        encoded = dataset_from_arrays(images, labels, facts.names).data.column("image")
        # Without names, as some tools write it; those of the Hub are checked elsewhere.
        table = pa.table({"img": encoded, facts.label: labels})
        pq.write_table(table, root / f"{part}-00000-of-00001.parquet")


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("layout", ["binary", "python", "parquet"])
@pytest.mark.parametrize("name", SPECS)
def test_every_layout_gives_the_same_images(small, name, layout, within, tmp_path, monkeypatch):
    parts, facts = small[name], SPECS[name]
    folder = tmp_path / {"binary": facts.binary, "python": facts.python}.get(layout, "data")
    if layout == "python":
        write_python(folder, name, parts, monkeypatch)
    else:
        {"binary": write_binary, "parquet": write_parquet}[layout](folder, name, parts)
    found = find_splits(name, root=folder if within else tmp_path, imbalance_factor=5)
    images, labels = parts["train"]
    chosen = long_tailed_indices(labels, imbalance_factor=5)
    assert found["train"]["label"][:] == labels[chosen].tolist()
    shown = np.stack([np.asarray(image) for image in found["train"]["image"]])
    assert (shown == images[chosen]).all()
    assert (np.stack([np.asarray(i) for i in found["test"]["image"]]) == parts["test"][0]).all()
    splits = Splits.from_datasets(found)
    assert splits.val_source == "train"
    assert splits.label_names == list(facts.names)


@pytest.mark.parametrize("name", SPECS)
def test_a_pickle_that_is_not_the_published_one_is_never_opened(small, name, tmp_path, monkeypatch):
    facts = SPECS[name]
    folder = tmp_path / facts.python
    write_python(folder, name, small[name], monkeypatch)
    opened = tmp_path / "opened"

    class Bomb:
        def __reduce__(self):
            return opened.touch, ()

    victim = sorted(folder.glob("test*"))[0]
    victim.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UsageError, match=r"not found or corrupted.*can run code and are not read"):
        find_splits(name, root=tmp_path)
    assert not opened.exists()
    victim.unlink()
    with pytest.raises(UsageError, match=r"is not CIFAR-10.* as published: .*not found"):
        find_splits(name, root=tmp_path)


def test_a_binary_copy_that_is_cut_off_or_incomplete(small, tmp_path):
    write_binary(tmp_path / "cifar-10-batches-bin", "cifar10_lt", small["cifar10_lt"])
    file = tmp_path / "cifar-10-batches-bin/data_batch_3.bin"
    whole = file.read_bytes()
    for length, fault in (
        (-1, "is not CIFAR-10 as published: .*3073"),
        (-3073, "train needs 10 images of airplane, .*, found 9 of "),
        (None, r"No such file .*data_batch_3\.bin"),
    ):
        file.write_bytes(whole[:length])
        if length is None:
            file.unlink()
        with pytest.raises(UsageError, match=fault):
            find_splits("cifar10_lt", root=tmp_path)


def test_a_folder_without_a_copy_or_with_another_data_set_is_refused(hub_copies, small, tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").touch()
    message = "no parquet or arrow file.*expected the folder cifar-10-batches-py .*uoft-cs"
    with pytest.raises(UsageError, match=message):
        find_splits("cifar10_lt", root=tmp_path)
    with pytest.raises(UsageError, match="no column 'fine_label' of labels"):
        find_splits("cifar100_lt", root=hub_copies["cifar10_lt"][0])
    facts = dataclasses.replace(CIFAR10, names=CIFAR10.names[::-1])
    for split in ("train", "test"):
        parquet(tmp_path / f"{split}.parquet", facts, [0], [0])
    with pytest.raises(
        UsageError, match=r"as published: train needs 10 images of airplane, .* truck"
    ):
        find_splits("cifar10_lt", root=tmp_path)
    test_only = small["cifar10_lt"]["test"]
    write_parquet(tmp_path / "b", "cifar10_lt", {"train": test_only, "test": test_only})
    with pytest.raises(UsageError, match=r"train needs 10 images of airplane, .* found 2"):
        find_splits("cifar10_lt", root=tmp_path / "b")


def test_the_copy_of_the_hub_is_taken_without_a_root(small, loopback_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, parts in small.items():
        facts = SPECS[name]
        order = np.arange(len(parts["train"][1])).reshape(len(facts.batches), -1)[::-1].ravel()
        stored = parts | {"train": tuple(array[order] for array in parts["train"])}
        write_parquet(tmp_path / name, name, stored)
        files = {f"data/{f.name}": f.read_bytes() for f in (tmp_path / name).glob("*.parquet")}
        loopback_hub.create(f"datasets/{facts.repo}", files)
        options = {"imbalance_factor": 5, "cache_dir": tmp_path / "prepared"}
        found = find_splits(name, **options)["train"]
        images, labels = parts["train"]
        chosen = long_tailed_indices(labels, imbalance_factor=5)
        assert (np.stack([np.asarray(i) for i in found["image"]]) == images[chosen]).all()


# Manifests.


def test_a_manifest_says_which_images_and_is_checked(hub_copies, tmp_path, monkeypatch):
    root, labels = hub_copies["cifar10_lt"]
    # A tilde is the home directory.
    monkeypatch.setenv("HOME", str(root.parent))
    manifest = cifar_manifest("cifar10_lt", root=f"~/{root.name}", imbalance_factor=50)
    chosen = long_tailed_indices(labels, imbalance_factor=50).astype("<i8")
    assert manifest["indices"] == chosen.tolist()
    assert manifest["indices_sha256"] == hashlib.sha256(chosen.tobytes()).hexdigest()
    content = labels[chosen].astype("<i8").tobytes()
    assert manifest["labels_sha256"] == hashlib.sha256(content).hexdigest()
    assert (manifest["num_images"], manifest["seed"]) == (13996, 0)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest))
    monkeypatch.setenv("HOME", str(tmp_path))
    found = find_splits("cifar10_lt", root=root, imbalance_factor=50, manifest="~/manifest.json")
    assert len(found["train"]) == 13996
    for options, fault in (
        ({"imbalance_factor": 50, "seed": 1}, r"differs from .*manifest\.json: indices_sha256 is"),
        ({}, "num_images is 12406, not 13996"),
    ):
        with pytest.raises(UsageError, match=fault):
            find_splits("cifar10_lt", root=root, manifest=path, **options)
    path.write_text("{}")
    with pytest.raises(UsageError, match="not a manifest: it has none of num_images"):
        find_splits("cifar10_lt", root=root, manifest=path)
