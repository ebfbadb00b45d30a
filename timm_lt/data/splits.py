"""Splits of a data set: hold-out, small classes, identity of images, checks before training."""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from timm_lt.data.decode import Unreadable, note_damaged_files, shown_path
from timm_lt.data.images import (
    ImageTensors,
    StoredImages,
    decode_images,
    label_names,
    label_tensor,
    relabelled,
)
from timm_lt.data.items import as_rgb, check_dataset
from timm_lt.data.sources import (
    SPLIT_WORDS,
    Paths,
    Split,
    check_protocol,
    dataset_from_files,
    find_splits,
)
from timm_lt.utils.checks import (
    WHITE,
    Problems,
    UsageError,
    check_integer,
    check_number,
    shown_names,
    user_errors,
)
from timm_lt.utils.console import log
from timm_lt.utils.longtail import Labels, SelectionProtocol, check_labels, class_counts

ValSource = Literal["val", "train", "test"]
LabelArray = NDArray[np.int64]
# Bytes at the end of an encoded image that tell it from others of the same length.
END = 512


def hold_out(
    labels: Labels,
    fraction: float = 0.2,
    *,
    seed: int = 0,
    keys: Sequence[str | bytes] | None = None,
    purpose: Literal["validation", "test"] = "validation",
    names: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Splits the images of each class into training images and held-out images.

    Of the ``n`` images of a class, ``fraction * n`` are held out, rounded, but at least one and
    not all: the split is stratified.

    >>> train, val = hold_out([0] * 10 + [1] * 2, 0.2)
    >>> len(train), len(val), (val < 10).sum().item()
    (9, 3, 2)

    Args:
        labels: Integer labels, one per image.
        fraction: Part of each class, in (0, 1).
        seed: A non-negative integer.
        keys: A key for each image, (N,), such as its path. The split then depends on the keys and
            not on the rows: another image in a class moves at most one other, and none of another
            class. Validation and test are taken from the two ends of one order.
        purpose: The split that is held out.
        names: Class names, (C,), for messages.

    Shape:
        labels (N,); two index tensors, ascending, that together contain all images.

    Raises:
        UsageError: If a class has only one image, which cannot be in both splits, or there is not
            one key per image.
    """
    check_number(f"{purpose} fraction", fraction, "(0, 1)")
    check_integer("seed", seed, minimum=0)
    # Count only labels that occur: a wrong label may be too large to count up to.
    present, values, counts = check_labels(labels).unique(return_inverse=True, return_counts=True)
    single = present[counts == 1].numpy()
    if len(single):
        raise UsageError(
            f"{len(single)} of {len(counts)} classes have only one image, which cannot be held out "
            f"for {purpose}: {_class_titles(single, names)}; give a {purpose} split, add images, "
            "or leave these classes out"
        )
    held = (counts * fraction).round().long().clamp_min(1).minimum(counts - 1)
    if keys is None:
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    elif len(keys) != len(values):
        raise UsageError(f"keys must be one per image: {len(keys)} keys, {len(values)} labels")
    else:
        # A pseudo-random order of the images in which two keys never change places.
        encoded = (key.encode() if isinstance(key, str) else key for key in keys)
        words = [blake2b(f"{seed} ".encode() + key, digest_size=8).digest() for key in encoded]
        order = torch.from_numpy(np.frombuffer(b"".join(words), "<u8").argsort(kind="stable"))
        order = order if purpose == "test" else order.flip(0)
    # By class, in random order within it.
    order = order[values[order].sort(stable=True).indices]
    rank = torch.arange(len(values)) - (counts.cumsum(0) - counts)[values[order]]
    chosen = rank < held[values[order]]
    return order[~chosen].sort().values, order[chosen].sort().values


def hold_out_split(
    datasets: Mapping[Any, Dataset],
    split: Literal["val", "test"],
    fraction: float,
    *,
    root: str | Path | None = None,
    seed: int = 0,
) -> dict[Any, Dataset]:
    """Returns the splits of a data set; a missing validation or test split is held out of train."""
    if split in datasets:
        return dict(datasets)
    whole = datasets["train"]
    train, held = hold_out(
        label_tensor(whole),
        fraction,
        seed=seed,
        keys=image_keys(whole, root),
        purpose="test" if split == "test" else "validation",
        names=label_names(whole),
    )
    # As arrays: datasets fingerprints a list by pickling its numbers.
    return {**datasets, "train": whole.select(train.numpy()), split: whole.select(held.numpy())}


def leave_out_small(
    labels: Mapping[Split, LabelArray], names: Sequence[str] | None, min_images: int
) -> tuple[dict[Split, LabelArray], dict[Split, LabelArray], list[str]]:
    """Leaves out the classes with fewer than ``min_images`` training images, and logs them.

    Returns the remaining rows, their labels, and the class names, or the old labels as such.
    """
    check_integer("min_images", min_images, minimum=1)
    counts = Counter(labels["train"].tolist())
    present = np.unique(np.concatenate([*labels.values()])).tolist()
    titles = {c: str(c) for c in present} if names is None else dict(enumerate(names))
    small = {c: counts[c] for c in titles if counts[c] < min_images}
    kept = np.array([c for c in titles if c not in small], np.int64)
    if len(kept) == 0:
        raise UsageError(f"no class has {min_images} images, as min_images requires")
    if small:
        shown = ", ".join(f"{shown_path(titles[c])} ({count})" for c, count in small.items())
        number = f"{len(small)} of {len(titles)} classes"
        log.info("min_images %d leaves out %s: %s", min_images, number, shown)
    rows = {split: np.flatnonzero(np.isin(values, kept)) for split, values in labels.items()}
    renumbered = {split: np.searchsorted(kept, labels[split][rows[split]]) for split in labels}
    return rows, renumbered, [titles[c] for c in kept.tolist()]


def note_classes(
    problems: Problems,
    labels: Mapping[Split, LabelArray],
    num_classes: int,
    names: Sequence[str] | None,
    held_out: Sequence[Split] = (),
) -> None:
    """Notes the classes that keep a run from training; ``held_out`` splits are part of train."""
    for split, values in labels.items():
        with problems.collected(f"{split} split: "):
            check_labels(values, num_classes)
    present, counts = np.unique(labels["train"], return_counts=True)
    # The first gaps lie among so many labels, however large a wrong label is.
    start = np.arange(min(num_classes, len(present) + 6))
    empty = num_classes - len(present[present < num_classes])
    needed = 1 + len(held_out)
    few = present[counts < needed]
    without_val = np.setdiff1d(present, labels.get("val", present))
    purposes = ", ".join(("train", *held_out))
    for split, number, classes, fault, minimum in (
        ("train", empty, np.setdiff1d(start, present), "no image", 1),
        ("train", len(few), few, f"fewer than {needed} images, one each for {purposes}", needed),
        ("val", len(without_val), without_val, "no image", 0),
    ):
        if number:
            hint = f", e.g. with the data option min_images={minimum}" if minimum else ""
            problems.add(
                f"{split} split: {number:,} of {num_classes:,} classes have {fault}: "
                f"{_class_titles(classes, names)}; add images, or leave these classes out{hint}"
            )


def _class_titles(classes: LabelArray, names: Sequence[str] | None) -> str:
    first = classes[:6].tolist()
    return shown_names([shown_path(names[c]) if names and c < len(names) else c for c in first])


@dataclass
class ImageFiles:
    """Image files below a root with labels, and all problems that keep a run from training."""

    root: str
    problems: Problems
    files: dict[Split, Paths]
    labels: dict[Split, LabelArray]
    names: list[str] | None

    def note_classes(
        self, held_out: Sequence[Split], min_images: int | None = None, num_classes: int = 0
    ) -> None:
        """Leaves out classes below ``min_images``, and notes problems of the others."""
        if min_images is not None:
            rows, self.labels, self.names = leave_out_small(self.labels, self.names, min_images)
            self.files = {split: paths.take(rows[split]) for split, paths in self.files.items()}
        # Directories and words of lists; a ClassLabel may have both "a" and "A".
        alike = defaultdict(list)
        for name in self.names or ():
            folded = unicodedata.normalize("NFC", " ".join(name.split())).casefold()
            alike[folded].append(repr(name))
        same = [" and ".join(group) for group in alike.values() if len(group) > 1]
        if same:
            self.problems.add(
                f"{len(same)} class names differ only in case, blanks or composed letters: "
                f"{shown_names(same)}; rename these classes or merge them"
            )
        number = len(self.names or ()) or max(num_classes, int(self.labels["train"].max()) + 1)
        note_classes(self.problems, self.labels, number, self.names, held_out)

    def splits(self, *, test_fraction: float = 0.2, seed: int = 0) -> dict[Any, Dataset]:
        """Returns the splits, or raises all problems, to which damaged files are then added."""
        if self.problems.found:
            note_damaged_files(self.problems, self.files)
        self.problems.check()
        datasets = {
            split: dataset_from_files(self.files[split], self.labels[split], self.names)
            for split in get_args(Split)
            if split in self.files
        }
        return hold_out_split(datasets, "test", test_fraction, root=self.root, seed=seed)


def image_keys(dataset: Dataset, root: str | Path | None = None) -> list[str | bytes] | None:
    """Returns the path of each image, or the end of its bytes and their number; else None."""
    column = dataset.data.column("image")
    if not pa.types.is_struct(column.type):
        return None
    content = pc.struct_field(column, "bytes")
    lengths, ends = pc.binary_length(content), pc.binary_slice(content, -END)
    parts = [pc.struct_field(column, "path"), lengths, ends]
    # After the bytes are cut, as a selection would copy them.
    if dataset._indices is not None:
        parts = [part.take(dataset._indices.column(0)) for part in parts]
    paths, *stored = (part.to_pylist() for part in parts)
    return [
        key if length is None else end + length.to_bytes(8, "little")
        for key, length, end in zip(path_keys(paths, root), *stored, strict=True)
    ]


def path_keys(paths: Sequence[str | None], root: str | Path | None = None) -> list[str]:
    """Returns the paths of image files below the root, without the directory of their split."""
    # Windows separates by backslashes.
    files = [(path or "").replace(os.sep, "/") for path in paths]
    if root is None:
        return ["/".join(path.split("/")[-2:]) for path in files]
    start = os.path.abspath(Path(root).expanduser())  # noqa: PTH100 - resolve() follows links
    start = f"{start.replace(os.sep, '/').rstrip('/')}/"
    below = [path.removeprefix(start) for path in files]
    parts = [path.partition("/") for path in below]
    return [
        rest if "/" in rest and first.lower() in SPLIT_WORDS else path
        for path, (first, _, rest) in zip(below, parts, strict=True)
    ]


def split_digests(
    datasets: Mapping[str, Dataset], labels: Mapping[str, Tensor], root: str | Path | None = None
) -> dict[str, dict[str, Any]]:
    """Returns the number of images of each split, and a digest of their labels and keys."""
    digests = {}
    for split, values in labels.items():
        state = sha256(values.numpy().astype("<i8").tobytes())
        for key in image_keys(datasets[split], root) or ():
            state.update((key.encode() if isinstance(key, str) else key) + b"\0")
        digests[split] = {"images": len(values), "sha256": state.hexdigest()}
    return digests


@dataclass(frozen=True)
class Splits:
    """Train, validation and test split with their labels and classes.

    Attributes:
        datasets: The splits by name, each with the columns ``image`` and ``label``.
        labels: Their labels, (N,) int64, by name.
        class_counts: Training images per class, (C,).
        label_names: Class names, (C,), if known.
        val_source: Split with the validation images: ``"val"``, ``"train"`` or ``"test"``.
    """

    datasets: Mapping[str, Dataset]
    labels: Mapping[str, Tensor]
    class_counts: Tensor
    label_names: list[str] | None
    val_source: ValSource = "val"

    @classmethod
    def from_datasets(
        cls,
        datasets: Mapping[str, Dataset],
        *,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        protocol: SelectionProtocol = "standard",
        root: str | Path | None = None,
    ) -> "Splits":
        """Checks the splits of a data set, and holds out those that are missing.

        Args:
            datasets: The splits by name. Without ``"test"`` or ``"val"``, a part of ``"train"`` is
                held out: the same images in every run.
            val_fraction: Part of each class for validation, in (0, 1); see :func:`hold_out`.
            test_fraction: Part of each class for the test, in (0, 1).
            protocol: With ``"paper"``, validation is the test split, and nothing is held out.
            root: Folder of the image files, if known; the split depends on their paths below it.

        Raises:
            UsageError: With all problems: a split is a stream or has no images, a class has too few
                images, a label is out of range, or the splits name their classes differently.
        """
        for dataset in datasets.values():
            check_dataset(dataset)
        found: dict[Any, Dataset] = {split: as_rgb(data) for split, data in datasets.items()}
        held_out: list[Split] = [split for split in ("val", "test") if split not in found]
        val_source: ValSource = "train" if "val" in held_out else "val"
        if protocol == "paper":
            held_out, val_source = [], "test"
            found |= {"val": found["test"]} if "test" in found else {}
        problems = Problems()
        names = label_names(found["train"]) if "train" in found else None
        labels: dict[Split, LabelArray] = {}
        for split in get_args(Split):
            if not len(found.get(split, ())):
                if split not in held_out:
                    problems.add(f"the {split} split has no images")
                continue
            with problems.collected(f"{split} split: "):
                labels[split] = label_tensor(found[split]).numpy()
                own = label_names(found[split])
                if own and names and own != names:
                    pairs = enumerate(zip_longest(own, names))
                    label, (name, other) = next(pair for pair in pairs if len({*pair[1]}) > 1)
                    raise UsageError(f"label {label} is class {name!r}, not {other!r} as in train")
        if "train" not in labels:
            problems.check()
        num_classes = len(names) if names else int(labels["train"].max()) + 1
        note_classes(problems, labels, num_classes, names, held_out)
        problems.check()
        # Test first: its images do not depend on whether there is a validation split.
        found = hold_out_split(found, "test", test_fraction, root=root)
        found = hold_out_split(found, "val", val_fraction, root=root)
        tensors = {split: label_tensor(found[split]) for split in get_args(Split)}
        counts = class_counts(tensors["train"], num_classes)
        return cls(found, tensors, counts, names, val_source)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_counts)

    def in_order(self, names: list[str]) -> "Splits":
        """Returns the same images with the classes in the order of their names (C,)."""
        assert self.label_names is not None
        label_of = {name: label for label, name in enumerate(names)}
        new_labels = torch.tensor([label_of[name] for name in self.label_names])
        labels = {split: new_labels[values] for split, values in self.labels.items()}
        datasets = {
            split: relabelled(self.datasets[split], values.numpy(), names)
            for split, values in labels.items()
        }
        counts = self.class_counts[new_labels.argsort()]
        return Splits(datasets, labels, counts, names, self.val_source)

    @property
    def background(self) -> str:
        """Colour behind transparent pixels, ``#rrggbb``."""
        return str(getattr(self.datasets["train"].features["image"], "background", WHITE))

    def on_background(self, background: object) -> "Splits":
        """Returns the splits with transparent pixels composited onto another colour."""
        rows = {name: as_rgb(part, background=background) for name, part in self.datasets.items()}
        return replace(self, datasets=rows)

    def images(
        self,
        split: Split,
        *,
        size: tuple[int, int] | None,
        unreadable: Unreadable = "raise",
        **options: Any,
    ) -> ImageTensors:
        """Decodes a split into memory; the options are those of :class:`ImageTensors`."""
        missing: list[int] | None = None if unreadable == "raise" else []
        with user_errors(f"{split} split", UsageError):
            images = decode_images(self.datasets[split], size, missing=missing)
        return ImageTensors(images, self.labels[split], missing=missing or (), **options)

    def stored_images(self, split: Split, **options: Any) -> StoredImages:
        """Returns a split that is decoded image by image; see :class:`StoredImages`."""
        name = f"{split} split"
        return StoredImages(self.datasets[split], self.labels[split], name=name, **options)


def create_splits(
    name: str,
    *,
    root: str | None = None,
    val_fraction: float = 0.2,
    protocol: SelectionProtocol = "standard",
    **options: Any,
) -> Splits:
    """Creates the three splits of a registered data set.

    Args:
        name: A name from :func:`timm_lt.list_datasets`.
        root: The folder with the files, for data sets that read files.
        val_fraction: Part of the training images for a missing validation split.
        protocol: ``"standard"``; or ``"paper"``, under which validation is the test split, for a
            data set where a paper selected so.
        options: The data set's own options.

    Raises:
        UsageError: If the data set cannot be created under this protocol, or not be trained on.
    """
    check_protocol(name, protocol)
    datasets = find_splits(name, root=root, **options)
    return Splits.from_datasets(datasets, val_fraction=val_fraction, protocol=protocol, root=root)
