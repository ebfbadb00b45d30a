"""What is checked of images that lists name, of all splits together."""

import os
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from timm_lt.data.lists.paths import Paths
from timm_lt.data.lists.presence import missing_rows
from timm_lt.data.sources import Split
from timm_lt.utils.checks import Problems, UsageError, shown_names

Labels = NDArray[np.int64]
# How an absolute path begins: with a slash, or on Windows with a drive or a share.
ABSOLUTE = r"^(/|[A-Za-z]:[/\\]|\\\\)"
# What makes two spellings of one path possible.
UNTIDY = r"(^|/)\.{0,2}/|/\.{1,2}$"


def absolute_root(root: str | Path) -> str:
    """Returns the absolute path of the folder that relative paths start at."""
    return os.path.abspath(Path(root).expanduser())  # noqa: PTH100 - links stay as they are


def note_root(problems: Problems, root: str, what: str = "") -> bool:
    """Notes that the root is missing or no folder; returns whether it is there.

    Args:
        problems: Takes the problem.
        root: The absolute path.
        what: What is to be in it, for the message.
    """
    if Path(root).is_dir():
        return True
    found = "is no folder" if Path(root).exists() else "does not exist"
    problems.add(f"root {root} {found}{what}")
    return False


def located(path: str | Path, root: str) -> Path:
    """Returns where a file is that the user names: in the root, or in the working directory.

    Raises:
        UsageError: If it is in neither.
    """
    path = Path(path).expanduser()
    places = list(dict.fromkeys([Path(root) / path, Path.cwd() / path]))
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UsageError(f"there is no file {' nor '.join(map(str, places))}")
    return found


def joined(root: str, paths: Paths) -> Paths:
    """Returns the files that paths stand for: relative ones start at the root."""
    import pyarrow.compute as pc

    listed = paths.arrow
    absolute = pc.match_substring_regex(listed, ABSOLUTE)
    start = pa.scalar(root.rstrip("/"), listed.type)
    return Paths(pc.if_else(absolute, listed, pc.binary_join_element_wise(start, listed, "/")))


def with_slashes(files: Paths) -> Paths:
    """Returns files with slashes in place of backslashes, unless the first such file is there."""
    import pyarrow.compute as pc

    first = pc.index(pc.match_substring(files.arrow, "\\"), True).as_py()
    if first < 0 or Path(files[first]).is_file():
        return files
    return Paths(pc.replace_substring(files.arrow, "\\", "/"))


def tidy(files: Paths) -> Paths:
    """Returns absolute paths in one spelling each, to be compared."""
    import pyarrow.compute as pc

    if not pc.any(
        pc.match_substring_regex(pc.utf8_slice_codeunits(files.arrow, 1), UNTIDY)
    ).as_py():
        return files
    return Paths([os.path.normpath(path) for path in files])


def note_missing(problems: Problems, split: str, files: Paths, root: str) -> None:
    """Notes files that are not there."""
    with problems.collected(f"{split} list: "):
        rows = missing_rows(files)
        if len(rows):
            shown = shown_names(list(files.take(rows[:6])))
            hint = f"; relative paths start at the root {root}" if len(rows) == len(files) else ""
            problems.add(
                f"{split} list: {len(rows):,} of {len(files):,} files are not there: {shown}{hint}"
            )


def note_repeats(problems: Problems, split: str, files: Paths, labels: Labels) -> None:
    """Notes images that are in one list several times, with different labels or with the same."""
    coded = files.arrow.dictionary_encode()
    if len(coded.dictionary) == len(files):
        return
    codes = coded.indices.to_numpy()
    first = np.empty(len(coded.dictionary), np.int64)
    first[codes[::-1]] = labels[::-1]
    rows = np.flatnonzero(labels != first[codes])
    # One line for each image, however often it is repeated.
    rows = rows[np.sort(np.unique(codes[rows], return_index=True)[1])]
    if len(rows):
        shown = [f"{files[row]} ({first[codes[row]]}, {labels[row]})" for row in rows[:6].tolist()]
        problems.add(
            f"{split} list: {len(rows):,} images have different labels on different lines: "
            f"{shown_names(shown)}"
        )
    numbers = np.bincount(codes)
    numbers[codes[rows]] = 1
    again = np.flatnonzero(numbers > 1)
    if len(again):
        # Held out by lines, such an image could be in two splits.
        shown = [f"{coded.dictionary[i].as_py()} ({numbers[i]} lines)" for i in again[:6].tolist()]
        problems.add(
            f"{split} list: {len(again):,} images are on several lines: {shown_names(shown)}; "
            "leave each on one"
        )


def note_overlaps(problems: Problems, files: Mapping[Split, Paths]) -> None:
    """Notes images that are in two lists."""
    import pyarrow.compute as pc

    arrays = {split: paths.arrow.cast(pa.large_string()) for split, paths in files.items()}
    for one, other in combinations(arrays, 2):
        both = pc.unique(arrays[other].filter(pc.is_in(arrays[other], value_set=arrays[one])))
        if len(both):
            problems.add(
                f"{len(both):,} images are in both the {one} list and the {other} list: "
                f"{shown_names(both[:6].to_pylist())}"
            )


def note_gaps(
    problems: Problems,
    labels: Mapping[Split, Labels],
    num_classes: int,
    names: Sequence[str] | None,
    held_out: int,
) -> None:
    """Notes classes that have too few images.

    Args:
        problems: Takes the notes.
        labels: By split.
        num_classes: C; the labels are below.
        names: Class names, (C,), if known.
        held_out: Splits that are made of training images.
    """
    present, counts = np.unique(labels["train"], return_counts=True)
    if len(present) < num_classes:
        # Among so many labels there are the first six gaps, however large a wrong label is.
        start = np.arange(min(num_classes, len(present) + 6))
        problems.add(
            f"train list: {num_classes - len(present):,} of {num_classes:,} classes have no image: "
            f"{_shown_classes(np.setdiff1d(start, present), names)}; labels must be 0 to C - 1, or "
            "leave these classes out with the data option min_images=1"
        )
    few = present[counts <= held_out]
    if len(few):
        problems.add(
            f"train list: {len(few)} of {num_classes} classes have fewer than {held_out + 1} "
            f"images, one for each split: {_shown_classes(few, names)}; give lists for val and "
            f"test, or leave these classes out with the data option min_images={held_out + 1}"
        )
    if "val" in labels:
        lacking = np.setdiff1d(present, labels["val"])
        if len(lacking):
            problems.add(
                f"val list: {len(lacking)} of {num_classes} classes have no image: "
                f"{_shown_classes(lacking, names)}"
            )


def _shown_classes(classes: Labels, names: Sequence[str] | None) -> str:
    known = len(names) if names else 0
    return shown_names(
        [f"{c} ({names[c]})" if names and c < known else str(c) for c in classes[:6].tolist()]
    )


def note_alike(problems: Problems, names: Sequence[str]) -> None:
    """Notes class names that differ in case, blanks or composed letters only."""
    alike: dict[str, list[str]] = {}
    for name in names:
        key = unicodedata.normalize("NFC", " ".join(name.split())).casefold()
        alike.setdefault(key, []).append(name)
    same = [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
    if same:
        problems.add(
            f"{len(same)} class names differ in nothing but case or blanks: {shown_names(same)}"
        )
