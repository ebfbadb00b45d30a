"""cifar10_lt and cifar100_lt: the long-tailed subsets of CIFAR that most papers report on."""

import json
import warnings
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from timm_lt.data.hub import hub
from timm_lt.data.images import label_names, label_tensor, relabelled
from timm_lt.data.long_tailed import long_tailed_indices, manifest_differences, subset_manifest
from timm_lt.data.sources import Split, dataset_from_arrays, register_dataset
from timm_lt.utils.checks import Problems, UsageError, check_choice, shown_names, user_errors
from timm_lt.utils.files import read_json
from timm_lt.utils.longtail import Profile

if TYPE_CHECKING:
    from datasets import Dataset

CifarName = Literal["cifar10_lt", "cifar100_lt"]
# Papers whose code selects the epoch on the test split.
BEST_TEST_EPOCH = "Cao et al., NeurIPS 2019, and Zhou et al., CVPR 2020"
ORDER = "torchvision's: the training files one after the other, data_batch_1 to 5 for CIFAR-10"
PIXELS = 3 * 32 * 32
# Class name in the Hub's copy of CIFAR-100 -> official one.
MISSPELT = {"cra": "crab"}


@dataclass(frozen=True)
class CifarSpec:
    """CIFAR-10 or CIFAR-100 as published."""

    name: str
    # Copy on the Hub, and its column of labels.
    repo: str
    label: str
    # Class names, (C,).
    names: list[str]
    # First labels ("first") and images per class ("counts") of each training file.
    batches: list[dict[str, list[int]]]
    test_per_class: int
    # Folders of the Python and of the binary version, and the files of the latter.
    python: str
    binary: str
    binary_train: list[str]
    binary_test: str
    # Bytes before the pixels of an image in a binary file; the last one is the label.
    label_bytes: int

    @property
    def per_class(self) -> dict[Split, int]:
        """Images per class by split."""
        train = sum(batch["counts"][0] for batch in self.batches)
        return {"train": train, "test": self.test_per_class}


_FACTS = json.loads((resources.files("timm_lt.data") / "facts/cifar.json").read_text("utf-8"))
SPECS: dict[str, CifarSpec] = {name: CifarSpec(**facts) for name, facts in _FACTS.items()}


def cifar_lt(
    name: CifarName,
    *,
    root: str | Path | None = None,
    imbalance_factor: float = 100.0,
    profile: Profile = "exponential",
    seed: int = 0,
    manifest: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> "dict[Split, Dataset]":
    """Builds CIFAR-10-LT, or CIFAR-100-LT over the 100 fine classes.

    Train has all 5,000 or 500 training images of the first class and fewer of each later one, test
    all 10,000 test images. A run holds validation images out of train, or selects on the test split
    as papers did (``protocol="paper"``). With seed 0 the subset is that of LDAM-DRW: the rows of
    every copy are first brought into the official order.

    Args:
        name: ``"cifar10_lt"`` or ``"cifar100_lt"``.
        root: Folder of a local copy: the Python version (``cifar-10-batches-py``,
            ``cifar-100-python``), the binary version (``cifar-10-batches-bin``,
            ``cifar-100-binary``) or the parquet files of the Hub. None loads the copy on the Hub.
        imbalance_factor: Largest class over smallest class, from 1 to the images of a class.
        profile: ``"exponential"``, ``"step"`` or ``"pareto"``.
        seed: Seed of the choice of images, a non-negative integer below 2^32.
        manifest: JSON file of :func:`cifar_manifest` that the subset must agree with.
        cache_dir: Cache of the ``datasets`` library for the Hub's copy.

    Raises:
        UsageError: If there is no copy, it is not CIFAR as published, or an option is out of range.

    References:
        Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009,
        https://www.cs.toronto.edu/~kriz/cifar.html
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS
        2019, https://arxiv.org/abs/1906.07413
    """
    options = {"imbalance_factor": imbalance_factor, "profile": profile, "seed": seed}
    copy = _read(SPECS[name], root, cache_dir)
    found, rows = _subset(name, copy["train"], options)
    if manifest is not None:
        path = Path(manifest).expanduser()
        problems = Problems(f"the subset differs from {path}")
        problems.found += manifest_differences(found, read_json(path))
        problems.check()
    return {"train": copy["train"].select(rows), "test": copy["test"]}


for _name in get_args(CifarName):
    register_dataset(_name, selected_on_test=BEST_TEST_EPOCH)(partial(cifar_lt, _name))


def cifar_manifest(
    name: CifarName,
    *,
    root: str | Path | None = None,
    imbalance_factor: float = 100.0,
    profile: Profile = "exponential",
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Describes the training images of ``cifar10_lt`` or ``cifar100_lt``, ready for JSON.

    The arguments are those of :func:`cifar_lt`. Indices count in the official order, whatever the
    order of the copy: with the same ``indices_sha256`` and ``all_labels_sha256``, images are the
    same.

    Returns:
        The result of :func:`~timm_lt.data.subset_manifest`, and the options.
    """
    check_choice("data set", name, get_args(CifarName))
    options = {"imbalance_factor": imbalance_factor, "profile": profile, "seed": seed}
    return _subset(name, _read(SPECS[name], root, cache_dir)["train"], options)[0]


def _subset(
    name: CifarName, train: "Dataset", options: dict[str, Any]
) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """Returns the manifest of the subset, and its rows in the copy."""
    spec, stored = SPECS[name], label_tensor(train).numpy()
    order, number = official_rows(spec, stored), len(spec.names)
    labels = stored[order]
    chosen = long_tailed_indices(labels, num_classes=number, **options)
    entries = {"data": name, **options, "order": ORDER}
    return subset_manifest(labels, chosen, num_classes=number, **entries), order[chosen]


def official_rows(spec: CifarSpec, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the row of each image of the official order, (N,), given the labels as stored, (N,).

    The official order is torchvision's, ``data_batch_1`` to 5; the Hub's CIFAR-10 has the order 4,
    3, 2, 5, 1. A file is recognised by its first labels and its images per class.
    """
    blocks = np.arange(len(labels)).reshape(len(spec.batches), -1)
    counts = [np.bincount(labels[rows], minlength=len(spec.names)).tolist() for rows in blocks]
    order = [
        rows
        for batch in spec.batches
        for rows, count in zip(blocks, counts, strict=True)
        if count == batch["counts"]
        and labels[rows[: len(batch["first"])]].tolist() == batch["first"]
    ]
    if len(order) != len(blocks):
        raise UsageError(
            f"unknown order of the training images of {spec.name}: {len(order)} of {len(blocks)} "
            "blocks are official files; use the official files, or data set 'hub' with "
            "make_long_tailed"
        )
    return np.concatenate(order)


def _read(
    spec: CifarSpec, root: str | Path | None, cache_dir: str | Path | None
) -> "dict[Split, Dataset]":
    """Reads the training and test images of a copy, in the order of the copy."""
    name = f"{root or spec.repo} is not {spec.name} as published"
    expected = (
        f"expected the folder {spec.python} (other files than the official ones can run code and "
        f"are not read) or {spec.binary} of the unpacked archives, or the parquet files of "
        f"{spec.repo}"
    )
    with user_errors(name, OSError, RuntimeError, ValueError, UsageError, cure=expected):
        folder = None if root is None else Path(root).expanduser()
        copy = _read_any(spec, folder, cache_dir)
        for split, number in spec.per_class.items():
            names = label_names(copy[split])
            counts = np.bincount(label_tensor(copy[split]), minlength=len(spec.names)).tolist()
            found = dict(zip(names or [], counts, strict=False))
            if found != dict.fromkeys(spec.names, number) or names != spec.names:
                wrong = [f"{n} of {title}" for title, n in found.items() if n != number]
                raise ValueError(
                    f"{split} needs {number} images of {shown_names(spec.names)}, found "
                    f"{shown_names(wrong or list(found))}"
                )
    return copy


def _read_any(
    spec: CifarSpec, root: Path | None, cache_dir: str | Path | None
) -> "dict[Split, Dataset]":
    """Reads the version in a folder, or the copy on the Hub."""
    for name, read in ((spec.python, _read_python), (spec.binary, _read_binary)):
        if root is not None and (folder := root if root.name == name else root / name).is_dir():
            return read(spec, folder)
    source: dict[str, Any] = {"repo": spec.repo} if root is None else {"root": root}
    copy = hub(**source, label=spec.label, train="train", test="test", cache_dir=cache_dir)
    for split, rows in copy.items():
        names = [MISSPELT.get(name, name) for name in label_names(rows) or spec.names]
        copy[split] = relabelled(rows, label_tensor(rows).numpy(), names)
    return copy


def _read_python(spec: CifarSpec, folder: Path) -> "dict[Split, Dataset]":
    """Reads the Python version by torchvision, which unpickles no file with another MD5."""
    from torchvision import datasets as torchvision

    loader: Any = getattr(torchvision, spec.name.replace("-", ""))
    parts: dict[Split, Dataset] = {}
    for split in spec.per_class:
        # NumPy warns of the old description of the arrays.
        with warnings.catch_warnings(action="ignore"):
            found = loader(folder.parent, train=split == "train", download=False)
        parts[split] = dataset_from_arrays(found.data, np.array(found.targets), spec.names)
    return parts


def _read_binary(spec: CifarSpec, folder: Path) -> "dict[Split, Dataset]":
    files: dict[Split, list[str]] = {"train": spec.binary_train, "test": [spec.binary_test]}
    parts: dict[Split, Dataset] = {}
    for split, names in files.items():
        content = np.concatenate([np.fromfile(folder / name, np.uint8) for name in names])
        rows = content.reshape(-1, spec.label_bytes + PIXELS)
        images = rows[:, spec.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = rows[:, spec.label_bytes - 1].astype(np.int64)
        parts[split] = dataset_from_arrays(images, labels, spec.names)
    return parts
