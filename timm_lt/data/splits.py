"""The three splits of a data set, checked before anything is trained on them.

Images held out where a data set lacks a split, and classes that are too small for it.

Which images a split has: what says so from run to run, without looking at a file.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from timm_lt.data.augment import Augmentation
from timm_lt.data.columns import as_rgb, check_random_access
from timm_lt.data.decode import Unreadable, shown_path
from timm_lt.data.images import (
    ImageTensors,
    StoredImages,
    decode_images,
    label_names,
    label_tensor,
    relabelled,
)
from timm_lt.data.sources import SPLIT_WORDS, Split, check_protocol, find_splits
from timm_lt.utils.checks import (
    WHITE,
    Problems,
    UsageError,
    check_integer,
    check_number,
    shown_names,
)
from timm_lt.utils.console import log
from timm_lt.utils.longtail import Labels, SelectionProtocol, check_labels, class_counts

if TYPE_CHECKING:
    from datasets import Dataset


def hold_out(
    labels: Labels,
    fraction: float = 0.2,
    *,
    seed: int = 0,
    keys: Sequence[str | bytes] | None = None,
    purpose: Literal["validation", "test"] = "validation",
    names: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Deals the images of each class out to training and to validation or test.

    Of the ``n`` images of a class, ``fraction * n`` are held out, rounded, but at least one and
    not all: the split is stratified.

    >>> train, val = hold_out([0] * 10 + [1] * 2, 0.2)
    >>> len(train), len(val), (val < 10).sum().item()
    (9, 3, 2)

    Args:
        labels: Integer labels, one per image.
        fraction: In (0, 1).
        seed: A non-negative integer.
        keys: A key for each image, (N,), such as its path. Which images are held out then depends
            on the keys and not on the rows: another image in a class moves at most one other, and
            none of another class. Validation and test are taken from the two ends of one order, so
            that an image that is moved out of one does not move one out of the other. None takes
            the rows.
        purpose: What the images are held out for, for messages.
        names: Class names, (C,), for messages.

    Shape:
        labels (N,); two index tensors, ascending, that together are all images.

    Raises:
        UsageError: If a class has one image only, which cannot be in both; names the classes.
            If there is not one key per image.
    """
    check_number("fraction", fraction, "(0, 1)")
    check_integer("seed", seed, minimum=0)
    # Places among the labels that occur: a wrong label may be too large to count up to.
    present, values, counts = check_labels(labels).unique(return_inverse=True, return_counts=True)
    single = present[counts == 1].tolist()
    if single:
        shown = shown_names(
            [f"{c} ({names[c]})" if names and c < len(names) else c for c in single]
        )
        raise UsageError(
            f"{len(single)} of {len(counts)} classes have one training image, so none can be held "
            f"out for {purpose}: {shown}; give a {purpose} split, or leave these "
            "classes out"
        )
    held = (counts * fraction).round().long().clamp_min(1).minimum(counts - 1)
    if keys is None:
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    elif len(keys) != len(values):
        raise UsageError(f"keys must be one per image: {len(keys)} keys, {len(values)} labels")
    else:
        order = _order_of_keys(keys, seed)
        order = order if purpose == "test" else order.flip(0)
    # By class, in random order within it.
    order = order[values[order].sort(stable=True).indices]
    place = torch.arange(len(values)) - (counts.cumsum(0) - counts)[values[order]]
    chosen = place < held[values[order]]
    return order[~chosen].sort().values, order[chosen].sort().values


def _order_of_keys(keys: Sequence[str | bytes], seed: int) -> Tensor:
    """Returns the images in an order as good as random, in which two keys never change places."""
    start = f"{seed} ".encode()
    words = b"".join(
        [
            blake2b(start + (key.encode() if isinstance(key, str) else key), digest_size=8).digest()
            for key in keys
        ]
    )
    return torch.from_numpy(np.frombuffer(words, "<u8").argsort(kind="stable"))


def small_classes(counts: Mapping[str, int], min_images: int | None) -> set[str]:
    """Returns the classes that have too few training images, and names them in the log.

    Args:
        counts: Training images by the name of the class.
        min_images: How many a class must have; None leaves out no class.

    Raises:
        UsageError: If that is not a positive integer, or no class has as many.
    """
    if min_images is None:
        return set()
    check_integer("min_images", min_images, minimum=1)
    small = {name: number for name, number in counts.items() if number < min_images}
    if small and len(small) == len(counts):
        raise UsageError(f"no class has {min_images} images, as min_images wants")
    if small:
        log.info(
            "min_images %d leaves out %d of %d classes: %s",
            *(min_images, len(small), len(counts)),
            ", ".join(f"{shown_path(name)} ({number})" for name, number in small.items()),
        )
    return set(small)


def leave_out_small(
    labels: Mapping[Split, NDArray[np.int64]], names: Sequence[str] | None, min_images: int | None
) -> tuple[dict[Split, NDArray[np.int64]], dict[Split, NDArray[np.int64]], list[str] | None]:
    """Leaves out the classes that have too few training images, and numbers the others anew.

    Args:
        labels: By split, which must include ``"train"``.
        names: Class names, (C,), if known.
        min_images: How many a class must have; None leaves out no class.

    Returns:
        The rows that stay, by split; their labels; and the names of the classes that stay. Classes
        without names are named by their labels if those change.

    Raises:
        UsageError: As :func:`small_classes`.
    """
    present, numbers = np.unique(labels["train"], return_counts=True)
    counts = dict(zip(present.tolist(), numbers.tolist(), strict=True))
    classes = np.unique(np.concatenate([*labels.values()])) if names is None else range(len(names))
    titles = {int(c): str(c) if names is None else names[c] for c in classes}
    small = small_classes({titles[c]: counts.get(c, 0) for c in titles}, min_images)
    kept = np.array([c for c, title in titles.items() if title not in small], np.int64)
    has_gaps = kept[-1] + 1 > len(kept)
    if min_images is None or not (small or has_gaps):
        rows = {split: np.arange(len(values)) for split, values in labels.items()}
        return rows, dict(labels), None if names is None else list(names)
    rows = {split: np.flatnonzero(np.isin(values, kept)) for split, values in labels.items()}
    anew = {split: np.searchsorted(kept, labels[split][rows[split]]) for split in labels}
    return rows, anew, [titles[c] for c in kept.tolist()]


# Bytes at the end of an image that tell it from others of the same length.
END = 512


def image_keys(dataset: "Dataset", root: str | Path | None = None) -> list[str | bytes] | None:
    """Returns a key for each image that depends on no other image, to hold images out by.

    An image file is known by its path, as :func:`path_keys` returns it, and an image that is stored
    in the data set by the length and the end of its bytes.

    Args:
        dataset: With a column ``image``.
        root: Folder of the files, if it is known.

    Returns:
        The keys, (N,); None if the images are stored in another way.
    """
    stored = _stored(dataset)
    if stored is None:
        return None
    paths, lengths, ends = stored
    return [
        key if length is None else end + length.to_bytes(8, "little")
        for key, length, end in zip(
            path_keys([path or "" for path in paths.to_pylist()], root),
            lengths.to_pylist(),
            ends.to_pylist(),
            strict=True,
        )
    ]


def path_keys(paths: Sequence[str], root: str | Path | None = None) -> list[str]:
    """Returns the paths of image files below the root, without the directory of their split.

    They stay the same when the data are moved or other images are added.

    >>> path_keys(["/photos/cat/1.jpg", "/photos/train/cat/2.jpg"], "/photos")
    ['cat/1.jpg', 'cat/2.jpg']
    >>> path_keys(["/photos/cat/1.jpg"])
    ['cat/1.jpg']

    Args:
        paths: The files.
        root: Their folder; files elsewhere keep their absolute paths. Without it, the name of a
            file and that of its directory are the key.
    """
    # Windows separates by backslashes.
    paths = [path.replace(os.sep, "/") for path in paths]
    if root is None:
        return ["/".join(path.split("/")[-2:]) for path in paths]
    start = os.path.abspath(Path(root).expanduser())  # noqa: PTH100 - links stay as they are
    start = f"{start.replace(os.sep, '/').rstrip('/')}/"
    return [_without_split(path.removeprefix(start)) for path in paths]


def _without_split(path: str) -> str:
    first, _, rest = path.partition("/")
    return rest if "/" in rest and first.lower() in SPLIT_WORDS else path


def split_digests(
    datasets: Mapping[str, "Dataset"],
    labels: Mapping[str, Tensor],
    root: str | Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Returns for each split its number of images and a digest of which they are, in order.

    The digest is of the labels and the keys of the images; no file is looked at.
    """
    digests = {}
    for split, values in labels.items():
        state = sha256(values.numpy().astype("<i8").tobytes())
        for key in image_keys(datasets[split], root) or ():
            state.update(key.encode() if isinstance(key, str) else key)
            state.update(b"\0")
        digests[split] = {"images": len(values), "sha256": state.hexdigest()}
    return digests


def _stored(
    dataset: "Dataset",
) -> "tuple[pa.ChunkedArray, pa.ChunkedArray, pa.ChunkedArray] | None":
    """Returns the paths of the images, and the lengths and ends of the bytes that are stored."""
    column = dataset.data.column("image")
    if not pa.types.is_struct(column.type):
        return None
    paths = pc.struct_field(column, "path")
    content = pc.struct_field(column, "bytes")
    lengths, ends = pc.binary_length(content), pc.binary_slice(content, -END)
    # Before a selection, which would copy the bytes.
    if dataset._indices is not None:
        rows = dataset._indices.column(0)
        paths, lengths, ends = paths.take(rows), lengths.take(rows), ends.take(rows)
    return paths, lengths, ends


ValSource = Literal["val", "train", "test"]
HeldOut = Literal["test", "val"]


@dataclass(frozen=True)
class Splits:
    """Train, validation and test split with what is known of their classes.

    Attributes:
        datasets: The splits by name, each with the columns ``image`` and ``label``.
        labels: Their labels, (N,) int64, by name.
        class_counts: Training images per class, (C,).
        label_names: Class names, (C,), if known.
        val_source: The split from which validation comes: its own, ``"val"``, a part of
            ``"train"``, or ``"test"`` itself.
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
        """Checks three data sets and counts their classes.

        Args:
            datasets: The splits by name. Without ``"test"``, a part of ``"train"`` is held out for
                it, and without ``"val"`` a part of what is left: the same ones whatever the seed of
                a run, and image files by their paths.
            val_fraction: The part for validation, of each class, in (0, 1); see
                :func:`~timm_lt.data.splits.hold_out`.
            test_fraction: The part for the test, of each class, in (0, 1).
            protocol: With ``"paper"``, validation is the test split, whatever else there is, and
                nothing is held out.
            root: Folder of the image files, if it is known: which ones are held out depends on
                their paths below it.

        Raises:
            UsageError: If a split is a stream or empty, none is for training, a class has too few
                images to be held out, a label is negative or beyond the classes, the splits name
                their classes differently, or a class has no training or no validation image; the
                message names split and class, of all such problems.
        """
        for dataset in datasets.values():
            check_random_access(dataset)
        datasets = {split: as_rgb(dataset) for split, dataset in datasets.items()}
        problems = Problems()
        val_source: ValSource = "val"
        if protocol == "paper" and "test" in datasets:
            datasets, val_source = {**datasets, "val": datasets["test"]}, "test"
        elif len(datasets.get("train", ())) and protocol == "standard":
            val_source = "val" if "val" in datasets else "train"
            with problems.collected("train split: "):
                datasets = _held_out(datasets, {"test": test_fraction, "val": val_fraction}, root)
        labels: dict[str, Tensor] = {}
        for split in get_args(Split):
            if split not in datasets and problems.found:
                # Why it could not be held out is among the problems.
                continue
            if split not in datasets or len(datasets[split]) == 0:
                problems.add(f"the {split} split has no images")
                continue
            with problems.collected(f"{split} split: "):
                labels[split] = label_tensor(datasets[split])
        problems.check()
        names = label_names(datasets["train"])
        num_classes = len(names) if names else int(labels["train"].max()) + 1
        with problems.collected("train split: "):
            _check_every_class(labels["train"], num_classes, names)
        if names is None and num_classes > len(labels["train"]):
            # A wrong label may be larger than can be counted up to.
            problems.check()
        counts = {}
        for split, values in labels.items():
            with problems.collected(f"{split} split: "):
                _check_same_names(label_names(datasets[split]), names)
                counts[split] = class_counts(values, num_classes)
                # A class without a test image has no accuracy; the report says so.
                if split == "val":
                    _check_every_class(values, num_classes, names)
        problems.check()
        return cls(datasets, labels, counts["train"], names, val_source)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_counts)

    def in_order(self, names: list[str]) -> "Splits":
        """Returns the same images with the classes in another order.

        Args:
            names: The class names in that order, (C,).
        """
        if names == self.label_names:
            return self
        assert self.label_names is not None
        place = {name: label for label, name in enumerate(names)}
        places = torch.tensor([place[name] for name in self.label_names])
        labels = {split: places[values] for split, values in self.labels.items()}
        datasets = {
            split: relabelled(self.datasets[split], values.numpy(), names)
            for split, values in labels.items()
        }
        counts = self.class_counts[places.argsort()]
        return Splits(datasets, labels, counts, names, self.val_source)

    @property
    def background(self) -> str:
        """Colour behind transparent pixels, ``#rrggbb``."""
        return str(getattr(self.datasets["train"].features["image"], "background", WHITE))

    def on_background(self, background: object) -> "Splits":
        """Returns the splits with transparent pixels composited onto another colour.

        Args:
            background: See :func:`~timm_lt.utils.checks.check_background`.
        """
        datasets = {
            split: as_rgb(dataset, background=background)
            for split, dataset in self.datasets.items()
        }
        return replace(self, datasets=datasets)

    def images(
        self,
        split: Split,
        *,
        size: tuple[int, int] | None,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
        seed: int = 0,
        unreadable: Unreadable = "raise",
    ) -> ImageTensors:
        """Decodes a split into memory; see :class:`~timm_lt.data.images.ImageTensors`.

        Raises:
            UsageError: If an image cannot be read, unless such images are to be skipped.
        """
        missing: list[int] | None = None if unreadable == "raise" else []
        try:
            images = decode_images(self.datasets[split], size, missing=missing)
        except UsageError as error:
            raise UsageError(f"{split} split: {error}") from error
        return ImageTensors(
            images,
            self.labels[split],
            mean=mean,
            std=std,
            augmentation=augmentation,
            seed=seed,
            missing=missing or (),
        )

    def stored_images(self, split: Split, **options: Any) -> StoredImages:
        """Returns a split that is decoded image by image; see :class:`StoredImages`."""
        name = f"{split} split"
        return StoredImages(self.datasets[split], self.labels[split], name=name, **options)


def _held_out(
    datasets: Mapping[str, Dataset], fractions: Mapping[HeldOut, float], root: str | Path | None
) -> dict[str, Dataset]:
    """Returns the splits with those that are missing, each taken out of what is left of train."""
    found, names = dict(datasets), label_names(datasets["train"])
    missing = {split: part for split, part in fractions.items() if split not in datasets}
    if len(missing) > 1:
        _check_enough(label_tensor(datasets["train"]), names, 1 + len(missing))
    # The images of the test are the same, whether there is a split for validation or not.
    for split, fraction in missing.items():
        whole = found["train"]
        train, held = hold_out(
            label_tensor(whole),
            fraction,
            keys=image_keys(whole, root),
            purpose="test" if split == "test" else "validation",
            names=names,
        )
        # Of an array, the fingerprint is that of its bytes; a list would be pickled as numbers.
        found["train"], found[split] = whole.select(train.numpy()), whole.select(held.numpy())
    return found


def _check_enough(labels: Tensor, names: list[str] | None, needed: int) -> None:
    """Checks that each class that occurs has an image for every split that is made of it."""
    present, counts = labels.unique(return_counts=True)
    few = present[counts < needed].tolist()
    if few:
        shown = shown_names([f"{c} ({names[c]})" if names and c < len(names) else c for c in few])
        raise UsageError(
            f"{len(few)} of {len(counts)} classes have fewer than {needed} images, one each for "
            f"train, val, test: {shown}; give splits for val and test, or leave these classes out"
        )


def _check_same_names(found: list[str] | None, expected: list[str] | None) -> None:
    if found and expected and found != expected:
        differing = zip_longest(found, expected)
        label, (here, there) = next(
            (i, pair) for i, pair in enumerate(differing) if len({*pair}) > 1
        )
        raise UsageError(f"label {label} is class {here!r}, in the train split it is {there!r}")


def _check_every_class(labels: Tensor, num_classes: int, names: list[str] | None) -> None:
    present = labels.unique()
    present = present[present < num_classes]
    if len(present) < num_classes:
        # Among so many labels there are the first six gaps, however large a wrong label is.
        first = torch.arange(min(num_classes, len(present) + 6))
        empty = first[~torch.isin(first, present)].tolist()
        shown = shown_names([f"{c} ({names[c]})" if names else c for c in empty])
        raise UsageError(
            f"{num_classes - len(present)} of {num_classes} classes have no image: {shown}"
        )


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
        name: A name out of :func:`timm_lt.list_datasets`.
        root: The folder with the files, for data sets that read files.
        val_fraction: Part of the training images that is held out for validation where the data set
            has no split for it.
        protocol: ``"standard"``; or ``"paper"``, under which validation is the test split and
            nothing is held out: for a data set where a paper selected so, to compare with it.
        options: The data set's own options.

    Raises:
        UsageError: As :func:`~timm_lt.data.sources.create_dataset`,
            :func:`~timm_lt.data.sources.check_protocol` and :meth:`Splits.from_datasets`.
    """
    check_protocol(name, protocol)
    datasets = find_splits(name, root=root, **options)
    return Splits.from_datasets(datasets, val_fraction=val_fraction, protocol=protocol, root=root)
