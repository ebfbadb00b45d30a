"""What is known of the lists of images that papers report on, beside the lists themselves."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from timm_lt.data.sources import Split
from timm_lt.utils.checks import check_choice

FOLDER = Path(__file__).parent
# The data sets, each with a file of its name.
NAMES = ("imagenet_lt", "places_lt", "inat2018")


@dataclass(frozen=True)
class PublishedList:
    """What is known of a list.

    Attributes:
        files: Names under which it is published.
        lines: Number of images N.
        layouts: Where an image may be below the root; ``{name}`` is its class, ``{nested}`` the
            same as Places365's second layout writes it, ``{file}`` the end of its path.
        needs: The download with the images, and how to unpack it.
        class_counts: Images per class, (C,), if known.
        smallest: Images of the smallest class.
        largest: Images of the largest class.
        group_totals: Images by the directory above that of the class.
        probes: Labels of a few images by basename; a flat list says the class of no other.
        sha256: Of the sorted lines ``basename label``, joined by newlines, if known.
    """

    files: tuple[str, ...]
    lines: int
    layouts: tuple[str, ...]
    needs: str
    class_counts: NDArray[np.int64] | None = None
    smallest: int = 0
    largest: int = 2**62
    group_totals: Mapping[str, int] = field(default_factory=dict)
    probes: Mapping[str, int] = field(default_factory=dict)
    sha256: str | None = None


@dataclass(frozen=True)
class Published:
    """What is known of a data set that is defined by published lists.

    Attributes:
        title: What papers call it.
        num_classes: C.
        class_names: (C,), as directories are called; None if they are called by the label.
        class_pattern: A regular expression that finds the class in a path, as group ``name``.
        depth: How many components the end of a path has that no layout changes.
        lists: By split.
        folders: Where below the root the lists are looked for.
        other_lists: What has another number of lines.
        where: Where the lists are published, for messages.
        source: Whose lists they are.
        verified: How what is known became known.
    """

    title: str
    num_classes: int
    class_names: list[str] | None
    class_pattern: str
    depth: int
    lists: Mapping[Split, PublishedList]
    folders: tuple[str, ...]
    other_lists: Mapping[int, str]
    where: str = ""
    source: str = ""
    verified: str = ""

    @property
    def directories(self) -> list[str]:
        """What the directory of each class is called, (C,)."""
        return self.class_names or [str(label) for label in range(self.num_classes)]


@lru_cache
def published(name: str) -> Published:
    """Returns what is known of a data set.

    Raises:
        UsageError: If nothing is; lists the data sets.
    """
    check_choice("data set with published lists", name, NAMES)
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    number = content["num_classes"]
    content["lists"] = {split: _list(known, number) for split, known in content["lists"].items()}
    content["other_lists"] = {int(lines): what for lines, what in content["other_lists"].items()}
    content["folders"] = tuple(content["folders"])
    return Published(**content)


def _list(content: dict[str, Any], num_classes: int) -> PublishedList:
    each = content.pop("images_per_class", None)
    counts = content.pop("class_counts", None if each is None else [each] * num_classes)
    if counts is not None:
        content["class_counts"] = np.array(counts, np.int64)
    for key in ("files", "layouts"):
        content[key] = tuple(content[key])
    return PublishedList(**content)
