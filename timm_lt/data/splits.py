"""The three splits of a data set, checked before anything is trained on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from datasets import Dataset
from torch import Tensor

from timm_lt.data.augment import Augmentation
from timm_lt.data.columns import as_rgb, check_random_access
from timm_lt.data.holdout import hold_out
from timm_lt.data.identity import image_keys
from timm_lt.data.images import ImageTensors, decode_images, label_names, label_tensor, relabelled
from timm_lt.data.pixels import WHITE
from timm_lt.data.reading import Unreadable
from timm_lt.data.sources import SelectionProtocol, Split, check_protocol, find_splits
from timm_lt.data.stored import StoredImages
from timm_lt.utils.checks import Problems, UsageError, shown_names
from timm_lt.utils.longtail import class_counts

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
                :func:`~timm_lt.data.holdout.hold_out`.
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
            background: See :func:`~timm_lt.data.pixels.check_background`.
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
