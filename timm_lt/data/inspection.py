"""Inspection of a data set before training: class counts, duplicates, unreadable images, sizes."""

import errno
import hashlib
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple, get_args

import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from torch import Tensor

from timm_lt.data.decode import (
    ImageError,
    UnreadableImage,
    damage_explained,
    decode_column,
    encoded_images,
    find_damaged,
    image_name,
    is_huge,
    is_remote,
    loses_levels,
    note_damaged,
    open_image,
    source_of,
)
from timm_lt.data.images import label_names, label_tensor
from timm_lt.data.sources import Split
from timm_lt.data.splits import Splits
from timm_lt.utils.checks import Problems
from timm_lt.utils.longtail import ShotRule, describe_shots, shot_groups

# Pairs of duplicates and image sizes that are listed.
SHOWN = 5
# Gaps between labels above which only labels that occur are classes.
GAPS = 1000
# Images per batch of decoding.
ROWS = 256
MISSING = os.strerror(errno.ENOENT)


class DuplicateImage(NamedTuple):
    """One of several images with the same content."""

    split: str
    name: str
    label: int


@dataclass(frozen=True)
class Duplicates:
    """Numbers of images with the same content as others.

    Attributes:
        within: By split, images that repeat an earlier one of the split.
        across: By two splits, images of the second that the first has too.
        conflicts: Images that repeat an earlier one, of any split, under another label.
        pairs: The first five pairs of each of these, by ``"train"``, ``"train, test"`` and
            ``"conflicts"``.
    """

    within: dict[str, int]
    across: dict[str, int]
    conflicts: int
    pairs: dict[str, list[tuple[DuplicateImage, DuplicateImage]]]


def find_duplicates(
    images: Iterable[tuple[Hashable, DuplicateImage]], splits: Sequence[str]
) -> Duplicates:
    """Counts images with the same content, given a digest of each, split by split."""
    across = [f"{one}, {other}" for one, other in itertools.combinations(splits, 2)]
    pairs: dict[str, list[tuple[DuplicateImage, DuplicateImage]]] = {
        key: [] for key in (*splits, *across, "conflicts")
    }
    # The first image of each content in each split.
    firsts: dict[Hashable, dict[str, DuplicateImage]] = defaultdict(dict)
    for content, image in images:
        for split, earlier in firsts[content].items():
            key = split if split == image.split else f"{split}, {image.split}"
            pairs[key].append((earlier, image))
        first = next(iter(firsts[content].values()), image)
        if image.label != first.label:
            pairs["conflicts"].append((first, image))
        firsts[content].setdefault(image.split, image)
    return Duplicates(
        within={split: len(pairs[split]) for split in splits},
        across={key: len(pairs[key]) for key in across},
        conflicts=len(pairs["conflicts"]),
        pairs={key: found[:SHOWN] for key, found in pairs.items() if found},
    )


@dataclass(frozen=True)
class Sizes:
    """Sizes of the images that can be read, upright by their EXIF orientation, in pixels.

    Attributes:
        width: Smallest, median and largest width.
        height: The same of the heights.
        most_frequent: The most frequent sizes: width, height and number of images.
        modes: Images of each of Pillow's modes, the most frequent first.
        formats: Images of each format.
        transparent: Images with an alpha channel or a transparent colour.
        deep: Images with more than 8 bits per channel, of which 8 are kept.
        one_color: Images of a single colour after decoding.
        huge: Images that Pillow warns of for their size.
    """

    width: tuple[int, int, int]
    height: tuple[int, int, int]
    most_frequent: list[tuple[int, int, int]]
    modes: dict[str, int]
    formats: dict[str, int]
    transparent: int = 0
    deep: int = 0
    one_color: int = 0
    huge: int = 0


@dataclass(frozen=True)
class Inspection:
    """Figures of a data set.

    Attributes:
        name: Name of the data set.
        class_counts: Images of each class, (C,), by split. With more than 1,000 gaps between the
            labels, only those that occur are classes, named by their labels.
        label_names: Class names, (C,), if known.
        val_source: Source of validation, ``"val"`` or ``"train"``; None if there is none.
        shot_rule: The rule of the shot groups.
        shots: Number of classes, training images and rule of each group.
        imbalance_factor: Training images of the largest over those of the smallest non-empty class;
            None without training images.
        imbalance_ratio: Mean over the non-empty classes of the largest class over the class: the
            MeanIR of Charte et al.
        sizes: None if the images were not decoded, or none can be read.
        duplicates: None if the contents were not compared.
        unreadable: Images that cannot be read, by split.
        problems: Problems that would keep a run from training.

    References:
        Charte et al., Addressing imbalance in multilabel classification, Neurocomputing 163, 2015,
        https://doi.org/10.1016/j.neucom.2014.08.091
    """

    name: str
    class_counts: dict[str, list[int]]
    label_names: list[str] | None = None
    val_source: str | None = None
    shot_rule: ShotRule = "fb"
    shots: dict[str, dict[str, Any]] = field(default_factory=dict)
    imbalance_factor: float | None = None
    imbalance_ratio: float | None = None
    sizes: Sizes | None = None
    duplicates: Duplicates | None = None
    unreadable: dict[str, list[UnreadableImage]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return max((len(counts) for counts in self.class_counts.values()), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, ready for JSON."""
        return asdict(self)


def inspect_splits(
    datasets: Mapping[str, Dataset],
    *,
    name: str = "data set",
    quick: bool = False,
    shot_rule: ShotRule = "fb",
    problems: Sequence[str] = (),
    on_image: Callable[[], None] = lambda: None,
) -> Inspection:
    """Inspects all splits of a data set: class counts, duplicates, unreadable images, sizes.

    A missing validation split is held out as in a run.

    Args:
        datasets: The splits by name.
        name: Name of the data set.
        quick: Decode no image and compare no contents.
        shot_rule: Rule of the shot groups.
        problems: Known problems. With any, no validation split is held out.
        on_image: Called for each decoded image.

    Returns:
        The figures, with all problems that would keep a run from training.
    """
    wrong = Problems()
    wrong.found += problems
    names, val_source = None, "val" if "val" in datasets else None
    if not problems:
        with wrong.collected():
            splits = Splits.from_datasets(datasets)
            datasets, names, val_source = splits.datasets, splits.label_names, splits.val_source
    labels: dict[str, Tensor] = {}
    for split, dataset in datasets.items():
        names = names or label_names(dataset)
        # The problems have the reason why a split has no labels.
        with Problems().collected():
            labels[split] = label_tensor(dataset)
    datasets = {split: datasets[split] for split in get_args(Split) if split in labels}
    if quick:
        damaged = {split: find_damaged(data) for split, data in datasets.items()}
        found: dict[str, Any] = {"unreadable": damaged}
    else:
        found = _inspect_images(datasets, labels, on_image)
    for split, images in found["unreadable"].items():
        # Known problems have missing files, with better advice.
        noted = [image for image in images if not problems or image.reason != MISSING]
        note_damaged(wrong, split, noted, len(datasets[split]))
    names, counts = _class_counts(names, labels)
    return Inspection(
        name,
        {split: counts[split].tolist() for split in datasets},
        label_names=names,
        val_source=val_source,
        shot_rule=shot_rule,
        problems=wrong.found,
        **_imbalance(counts.get("train"), shot_rule),
        **found,
    )


def _class_counts(
    names: list[str] | None, labels: Mapping[str, Tensor]
) -> tuple[list[str] | None, dict[str, Tensor]]:
    """Returns class names and counts; labels far apart are numbered anew."""
    if not labels:
        return names, {}
    present = torch.cat(list(labels.values())).unique()
    number = max(int(present[-1]) + 1, len(names or ()))
    if number > len(present) + len(names or ()) + GAPS:
        labels = {split: torch.searchsorted(present, of) for split, of in labels.items()}
        known, number = names or [], len(present)
        names = [known[c] if c < len(known) else str(c) for c in present.tolist()]
    return names, {split: torch.bincount(of, minlength=number) for split, of in labels.items()}


def _imbalance(counts: Tensor | None, rule: ShotRule) -> dict[str, Any]:
    """Returns the figures of the tail of the training images."""
    if counts is None or not counts.any():
        return {}
    shots: dict[str, dict[str, Any]] = describe_shots(counts, rule)
    for group, mask in shot_groups(counts, rule).items():
        shots[group]["images"] = int(counts[mask].sum())
    present = counts[counts > 0].double()
    return {
        "shots": shots,
        "imbalance_factor": float(present.max() / present.min()),
        "imbalance_ratio": float((present.max() / present).mean()),
    }


class ImageStats(NamedTuple):
    """Properties of an image, or the reason why it cannot be read."""

    name: str
    digest: bytes | None = None
    reason: str = ""
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    format: str = ""
    traits: tuple[str, ...] = ()


def _inspect_images(
    datasets: Mapping[str, Dataset], labels: Mapping[str, Tensor], on_image: Callable[[], None]
) -> dict[str, Any]:
    """Decodes every image and compares their contents."""
    unreadable: dict[str, list[UnreadableImage]] = {split: [] for split in datasets}
    copies: list[tuple[bytes, DuplicateImage]] = []
    decoded: list[ImageStats] = []
    for split, dataset in datasets.items():
        pairs = zip(_image_stats(dataset), labels[split].tolist(), strict=True)
        for row, (image, label) in enumerate(pairs):
            on_image()
            if image.digest:
                copies.append((image.digest, DuplicateImage(split, image.name, label)))
            if image.reason:
                unreadable[split].append(UnreadableImage(row, image.name, image.reason))
            elif image.mode:
                decoded.append(image)
    duplicates = find_duplicates(copies, list(datasets))
    return {"unreadable": unreadable, "duplicates": duplicates, "sizes": _sizes(decoded)}


def _image_stats(dataset: Dataset) -> Iterator[ImageStats]:
    look = partial(_stats, column=dataset.features["image"])
    encoded = encoded_images(dataset.with_format(None)).with_format("arrow")
    rows = itertools.count()
    with ThreadPoolExecutor() as threads:
        for batch in encoded.iter(ROWS):
            yield from threads.map(look, batch.column("image").to_pylist(), rows)


def _stats(encoded: dict[str, Any] | None, row: int, column: ImageColumn) -> ImageStats:
    source, digest, name = source_of(encoded), None, image_name(encoded or {"path": None}, row)
    if source is None or is_remote(source):
        return ImageStats(name, reason="" if source else "there is no image")
    try:
        with damage_explained():
            content = Path(source).read_bytes() if isinstance(source, str) else source
            digest = hashlib.sha256(content).digest()
            with open_image(content) as image:
                traits = {
                    "transparent": image.has_transparency_data,
                    "deep": loses_levels(image),
                    "huge": is_huge(image.size),
                }
                kind = image.mode, image.format or ""
        decoded = decode_column({"bytes": content, "path": None}, column)
    except ImageError as error:
        return ImageStats(name, digest, str(error))
    extremes: Any = decoded.getextrema()
    traits["one_color"] = all(low == high for low, high in extremes)
    present = tuple(trait for trait, value in traits.items() if value)
    return ImageStats(name, digest, "", decoded.size, *kind, present)


def _sizes(images: Sequence[ImageStats]) -> Sizes | None:
    if not images:
        return None
    sizes = Counter(image.size for image in images)
    widths, heights = zip(*sizes.elements(), strict=True)
    return Sizes(
        width=(min(widths), median_low(widths), max(widths)),
        height=(min(heights), median_low(heights), max(heights)),
        most_frequent=[(*size, number) for size, number in sizes.most_common(SHOWN)],
        modes=dict(Counter(image.mode for image in images).most_common()),
        formats=dict(Counter(image.format for image in images).most_common()),
        **Counter(trait for image in images for trait in image.traits),
    )
