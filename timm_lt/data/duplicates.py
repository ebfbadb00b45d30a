"""Images with the same content, within a split and across splits."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

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
