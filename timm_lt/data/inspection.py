"""A look at a data set before training: its classes, its files, and what is wrong with them.

Images with the same content, within a split and across splits.
"""

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from timm_lt.data.decode import (
    DAMAGE,
    Damage,
    StoredFiles,
    damage_of,
    decode_column,
    find_damaged,
    in_threads,
    is_flat,
    is_huge,
    is_remote,
    loses_levels,
    open_image,
    pillow_errors,
    unreadable_images,
)
from timm_lt.data.images import label_names, label_tensor
from timm_lt.data.splits import Splits
from timm_lt.utils.checks import Problems
from timm_lt.utils.longtail import ShotRule, describe_shots, shot_groups

if TYPE_CHECKING:
    from datasets import Dataset
    from datasets import Image as ImageColumn

# Pairs that are listed of many.
SHOWN = 5


class Twin(NamedTuple):
    """One of several images with the same content.

    Attributes:
        split: The split that has it.
        name: What it is called in messages.
        label: Its class.
    """

    split: str
    name: str
    label: int


@dataclass(frozen=True)
class Duplicates:
    """How many images are the same as others.

    Attributes:
        within: By split, images that repeat an earlier one of the split.
        across: By two splits, images of the second that the first has too.
        conflicts: Images that repeat an earlier one, of any split, under another label.
        pairs: The first five pairs of each of these, by ``"train"``, ``"train, test"`` and
            ``"conflicts"``.
    """

    within: dict[str, int] = field(default_factory=dict)
    across: dict[str, int] = field(default_factory=dict)
    conflicts: int = 0
    pairs: dict[str, list[tuple[Twin, Twin]]] = field(default_factory=dict)


def find_duplicates(images: Iterable[tuple[Hashable, Twin]], splits: Iterable[str]) -> Duplicates:
    """Counts images with the same content.

    >>> images = [("x", Twin("train", "a", 0)), ("x", Twin("test", "b", 1))]
    >>> found = find_duplicates(images, ["train", "test"])
    >>> found.within, found.across, found.conflicts
    ({'train': 0, 'test': 0}, {'train, test': 1}, 1)

    Args:
        images: What stands for the content of each, such as a digest, and the image; split by
            split.
        splits: Names of the splits in their order.
    """
    same: dict[Hashable, list[Twin]] = {}
    for content, twin in images:
        same.setdefault(content, []).append(twin)
    pairs: dict[str, list[tuple[Twin, Twin]]] = {}
    for twins in same.values():
        if len(twins) > 1:
            for key, pair in _pairs(twins):
                pairs.setdefault(key, []).append(pair)
    names = list(splits)
    number = {key: len(found) for key, found in pairs.items()}
    return Duplicates(
        within={split: number.get(split, 0) for split in names},
        across={key: number.get(key, 0) for key in map(", ".join, combinations(names, 2))},
        conflicts=number.get("conflicts", 0),
        pairs={key: found[:SHOWN] for key, found in pairs.items()},
    )


def _pairs(twins: list[Twin]) -> Iterable[tuple[str, tuple[Twin, Twin]]]:
    """Yields the pairs of images with the same content, by what they count for."""
    first_of: Mapping[str, Twin] = {twin.split: twin for twin in reversed(twins)}
    for place, twin in enumerate(twins):
        for split, first in first_of.items():
            if split == twin.split and first is not twin:
                yield split, (first, twin)
        earlier = dict.fromkeys(other.split for other in twins[:place] if other.split != twin.split)
        for split in earlier:
            yield f"{split}, {twin.split}", (first_of[split], twin)
        if place and twin.label != twins[0].label:
            yield "conflicts", (twins[0], twin)


# Labels without an image that are counted as classes, next to those that occur.
GAPS = 1000
NOT_THERE = os.strerror(errno.ENOENT)
# Images that a thread decodes in a row, and sizes that are listed.
ROWS, SHOWN_SIZES = 32, 5


@dataclass(frozen=True)
class Sizes:
    """How large the images that can be read are, turned as their EXIF data say, in pixels.

    Attributes:
        width: Smallest, median and largest width.
        height: The same of the heights.
        most_frequent: The most frequent sizes, width, height and number of images.
        modes: Images of each of Pillow's modes, the most frequent first.
        formats: Images of each format.
        transparent: Images with an alpha channel or a transparent colour.
        deep: Images with more than 8 bits per channel, of which 8 are kept.
        one_color: Images that have one colour only once they are decoded.
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
    """What is known of a data set.

    Attributes:
        name: What it is called.
        class_counts: Images of each class, (C,), by split. Of labels with more than 1,000 gaps,
            only those that occur are classes, and their names are the labels.
        label_names: Class names, (C,), if known.
        val_source: Where validation comes from, ``"val"`` or ``"train"``; None if there is none.
        shot_rule: The rule of the shot groups.
        shots: Number of classes, training images and rule of each group.
        imbalance_factor: Training images of the largest class over those of the smallest that has
            any; None without training images.
        imbalance_ratio: Mean over the classes of the largest class over the class, of those with
            training images: the MeanIR of Charte et al.
        sizes: Of the images that can be read; None if they were not decoded, or none can.
        duplicates: None if contents were not compared.
        unreadable: Images that cannot be read, by split.
        is_quick: Whether no image was decoded: then only what a look at both ends of the files
            shows is unreadable.
        problems: What would keep a run from training on it.

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
    unreadable: dict[str, list[Damage]] = field(default_factory=dict)
    is_quick: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return max((len(counts) for counts in self.class_counts.values()), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it, ready for JSON."""
        return asdict(self)


class Seen(NamedTuple):
    """What is known of one image.

    Attributes:
        digest: Of its bytes, if others are as long.
        kind: Its format and mode, if it can be read.
        size: Width and height, if it can be read.
        reason: Why it cannot be read.
        traits: Which of transparent, deep, one_color and huge it is; see :class:`Sizes`.
    """

    digest: bytes | None = None
    kind: tuple[str, str] | None = None
    size: tuple[int, int] | None = None
    reason: str | None = None
    traits: tuple[str, ...] = ()


def inspect_splits(
    datasets: "Mapping[str, Dataset]",
    *,
    name: str = "data set",
    quick: bool = False,
    shot_rule: ShotRule = "fb",
    problems: Sequence[str] = (),
    on_image: Callable[[], None] = lambda: None,
) -> Inspection:
    """Looks at all splits of a data set: class counts, duplicates, damaged images, image sizes.

    Without a split for validation, one is held out as a run does.

    Args:
        datasets: The splits by name.
        name: What the data set is called.
        quick: Decode no image and compare no contents.
        shot_rule: Of the shot groups.
        problems: What is known to be wrong with it. Then no validation split is held out.
        on_image: Called for each image that has been decoded.

    Returns:
        What was found; whatever would keep a run from training is among its problems.
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
        # Why others are left out is among the problems.
        with Problems().collected():
            labels[split] = label_tensor(dataset)
    datasets = {split: datasets[split] for split in ("train", "val", "test") if split in labels}
    names, counted = _few_gaps(names, labels)
    counts = _class_counts(counted, names)
    found = _look_quickly(datasets) if quick else _look(datasets, labels, on_image)
    # Files that are not there are among the known problems, with better advice.
    known = {NOT_THERE} if problems else set()
    for split, damaged in found["unreadable"].items():
        reasons = {one.name: one.reason for one in damaged if one.reason not in known}
        if reasons:
            with wrong.collected(f"{split} split: "):
                raise unreadable_images(reasons, len(datasets[split]))
    return Inspection(
        name,
        {split: counts[split].tolist() for split in datasets},
        label_names=names,
        val_source=val_source,
        shot_rule=shot_rule,
        is_quick=quick,
        problems=wrong.found,
        **_imbalance(counts.get("train"), shot_rule),
        **found,
    )


def _few_gaps(
    names: list[str] | None, labels: Mapping[str, Tensor]
) -> tuple[list[str] | None, Mapping[str, Tensor]]:
    """Numbers the labels that occur, if there are far larger ones: named by what they were."""
    if not labels:
        return names, labels
    present = torch.cat(list(labels.values())).unique()
    known = names or []
    if int(present[-1]) < len(present) + len(known) + GAPS:
        return names, labels
    named = [known[c] if c < len(known) else str(c) for c in present.tolist()]
    return named, {split: torch.searchsorted(present, of) for split, of in labels.items()}


def _class_counts(labels: Mapping[str, Tensor], names: list[str] | None) -> dict[str, Tensor]:
    highest = max((int(values.max()) for values in labels.values()), default=-1)
    number = max(highest + 1, len(names or ()))
    return {split: torch.bincount(values, minlength=number) for split, values in labels.items()}


def _imbalance(counts: Tensor | None, rule: ShotRule) -> dict[str, Any]:
    """Returns what the training images say of the length of the tail."""
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


def _look_quickly(datasets: "Mapping[str, Dataset]") -> dict[str, Any]:
    return {"unreadable": {split: find_damaged(dataset) for split, dataset in datasets.items()}}


def _look(
    datasets: "Mapping[str, Dataset]", labels: Mapping[str, Tensor], on_image: Callable[[], None]
) -> dict[str, Any]:
    """Decodes every image, and compares the contents of those of the same length."""
    stored = {split: StoredFiles(data, range(len(data))) for split, data in datasets.items()}
    lengths = {
        split: list(in_threads(_length(files), range(len(files.rows))))
        for split, files in stored.items()
    }
    often = Counter(length for of_split in lengths.values() for length in of_split if length)
    unreadable: dict[str, list[Damage]] = {}
    contents: list[tuple[bytes, Twin]] = []
    sizes: Counter[tuple[int, int]] = Counter()
    kinds: Counter[tuple[str, str]] = Counter()
    traits: Counter[str] = Counter()
    for split, files in stored.items():
        unreadable[split] = []
        compared = [length is not None and often[length] > 1 for length in lengths[split]]
        look = _seen(files, datasets[split].features["image"], compared)
        for row, seen in enumerate(in_threads(look, range(len(files.rows)), ROWS)):
            on_image()
            if seen.reason is not None:
                unreadable[split].append(Damage(row, files.name(row), seen.reason))
            if seen.digest is not None:
                twin = Twin(split, files.name(row), int(labels[split][row]))
                contents.append((seen.digest, twin))
            if seen.size is not None and seen.kind is not None:
                sizes[seen.size] += 1
                kinds[seen.kind] += 1
                traits.update(seen.traits)
    return {
        "unreadable": unreadable,
        "duplicates": find_duplicates(contents, datasets),
        "sizes": _sizes(sizes, kinds, traits),
    }


def _length(files: StoredFiles) -> Callable[[int], int | None]:
    def length(number: int) -> int | None:
        path = files.paths[number]
        if files.in_memory[number]:
            return len(files.view(number))
        try:
            return None if path is None or is_remote(path) else Path(path).stat().st_size
        except OSError:
            return None

    return length


def _seen(files: StoredFiles, column: "ImageColumn", compared: list[bool]) -> Callable[[int], Seen]:
    def seen(number: int) -> Seen:
        digest, path = None, files.paths[number]
        try:
            if files.in_memory[number]:
                content = bytes(files.view(number))
            elif path is None:
                return Seen(reason="there is no image")
            elif is_remote(path):
                return Seen()
            else:
                content = Path(path).read_bytes()
            if compared[number]:
                digest = hashlib.sha256(content).digest()
            with pillow_errors(), open_image(content) as image:
                kind = (image.format or "", image.mode)
                traits = {
                    "transparent": image.has_transparency_data,
                    "deep": loses_levels(image),
                    "huge": is_huge(image.size),
                }
            decoded = decode_column({"bytes": content, "path": None}, column)
        except DAMAGE as error:
            return Seen(digest, reason=damage_of(error))
        traits["one_color"] = is_flat(decoded)
        return Seen(digest, kind, decoded.size, traits=tuple(t for t in traits if traits[t]))

    return seen


def _sizes(
    sizes: Counter[tuple[int, int]],
    kinds: Counter[tuple[str, str]],
    traits: Mapping[str, int],
) -> Sizes | None:
    if not sizes:
        return None
    widths, heights, modes, formats = Counter[int](), Counter[int](), Counter[str](), Counter[str]()
    for (width, height), number in sizes.items():
        widths[width] += number
        heights[height] += number
    for (form, mode), number in kinds.items():
        formats[form] += number
        modes[mode] += number
    return Sizes(
        width=_spread(widths),
        height=_spread(heights),
        most_frequent=[(*size, number) for size, number in sizes.most_common(SHOWN_SIZES)],
        modes=dict(modes.most_common()),
        formats=dict(formats.most_common()),
        **traits,
    )


def _spread(lengths: Counter[int]) -> tuple[int, int, int]:
    return min(lengths), median_low(list(lengths.elements())), max(lengths)
