"""Published lists and the official images, wherever their downloads put them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from timm_lt.data.lists import ImageList, Paths, read_image_list
from timm_lt.data.lists.checks import (
    absolute_root,
    joined,
    located,
    note_missing,
    note_overlaps,
    note_root,
    tidy,
)
from timm_lt.data.published_lists.check import note_differences
from timm_lt.data.published_lists.facts import Published
from timm_lt.data.readable import note_damaged_files
from timm_lt.data.sources import Split, dataset_from_files
from timm_lt.utils.checks import Problems, UsageError

if TYPE_CHECKING:
    from datasets import Dataset

# Files that are asked for to find out which layout the images have.
SAMPLE = 64
# Entries of the root that a message describes.
SHOWN = 8


def published_splits(
    known: Published, root: str | Path, given: Mapping[Split, str | Path | None]
) -> "dict[Split, Dataset]":
    """Builds the splits of a data set that published lists define.

    Args:
        known: What is known of the lists.
        root: The folder with the images.
        given: The lists by split; None looks for the list in the root and its usual folders.

    Raises:
        UsageError: For all that is wrong at once: a list is missing or is not the published one, or
            the images are not there; says which download is meant, and what was found. Then also
            images that are damaged.
    """
    folder = absolute_root(root)
    problems = Problems(f"{known.title} in {folder}")
    is_there = note_root(problems, folder, f": it is the one with {known.title}'s images")
    read = {split: _read(problems, known, split, folder, given[split]) for split in known.lists}
    lists = {split: listed for split, listed in read.items() if listed is not None}
    files = _on_disk(problems, known, lists, folder) if is_there else {}
    note_overlaps(problems, {split: tidy(paths) for split, paths in files.items()})
    if problems.found:
        note_damaged_files(problems, files)
    problems.check()
    named = [listed.names for listed in lists.values() if listed.names]
    names = known.class_names or (named[0] if named else None)
    return {
        split: dataset_from_files(files[split].arrow, listed.labels, names)
        for split, listed in lists.items()
    }


def _read(
    problems: Problems, known: Published, split: Split, root: str, given: str | Path | None
) -> ImageList | None:
    """Reads a list; notes in what it differs from the published one, and returns None then."""
    with problems.collected(f"{split} list: "):
        path = _find(known, split, root) if given is None else located(given, root)
        listed = read_image_list(path)
        differences = Problems(str(path))
        note_differences(differences, known, split, listed)
        if differences.found:
            what = "; ".join(differences.found)
            raise UsageError(
                f"{path} is not the published list: {what}; for a list of your own there is the "
                "data set 'list'"
            )
        return listed
    return None


def _find(known: Published, split: Split, root: str) -> Path:
    """Returns where a list is that the user does not name."""
    names = known.lists[split].files
    places = [Path(root) / folder / name for folder in known.folders for name in names]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        folders = ", ".join(f"{folder}/" for folder in known.folders if folder)
        raise UsageError(
            f"there is no {' nor '.join(names)} in the root nor in its folders {folders}: put it "
            f"there, or name it with the option {split!r}; it is published {known.where}"
        )
    return found


def _on_disk(
    problems: Problems, known: Published, lists: Mapping[Split, ImageList], root: str
) -> dict[Split, Paths]:
    """Returns the files of the splits; paths are as listed, or in a layout that the disk has."""
    files: dict[Split, Paths] = {}
    hint: str | None = None
    for split, listed in lists.items():
        layout, hits = _best_layout(known, split, listed, root)
        if hits:
            files[split] = _laid_out(known, layout, listed, root)
            note_missing(problems, split, files[split], root)
            continue
        hint = _other_root(known, lists, root) if hint is None else hint
        problems.add(
            f"the images of the {split} split are not there, e.g. {listed.paths[0]}: {known.title} "
            f"needs {known.lists[split].needs}; found in {root}: {contents(root)}{hint}"
        )
    return files


def _best_layout(
    known: Published, split: Split, listed: ImageList, root: str
) -> tuple[str | None, int]:
    """Returns the layout in which most images of a sample are there, and how many are."""
    rows = np.unique(np.linspace(0, len(listed.labels) - 1, SAMPLE).astype(np.int64))
    sample = ImageList(listed.paths.take(rows), listed.labels[rows])
    hits = {
        layout: sum(map(os.path.isfile, _laid_out(known, layout, sample, root)))
        for layout in (None, *known.lists[split].layouts)
    }
    best = max(hits, key=lambda layout: hits[layout])
    return best, hits[best]


def _other_root(known: Published, lists: Mapping[Split, ImageList], root: str) -> str:
    """Names the folder of the root that has the images of all lists, for messages, if one has."""
    for path in sorted(path for path in Path(root).iterdir() if path.is_dir())[:SHOWN]:
        if all(_best_layout(known, split, one, str(path))[1] for split, one in lists.items()):
            return f"; they are in {path}: give that as root"
    return ""


def _laid_out(known: Published, layout: str | None, listed: ImageList, root: str) -> Paths:
    """Returns the files of a list in a layout; None leaves the paths as they are."""
    import pyarrow.compute as pc

    if layout is None:
        return joined(root, listed.paths)
    classes = known.directories
    fields = {
        "name": classes,
        "nested": [f"{name[0]}/{name.replace('-', '/')}" for name in classes],
    }
    # Each class's directory is made once, and each path out of it and the end of the path.
    directories = [
        os.path.dirname(layout).format(  # noqa: PTH120 - a pattern
            **{key: names[label] for key, names in fields.items()}
        )
        for label in range(known.num_classes)
    ]
    starts = pa.array([f"{root}/{directory}".rstrip("/") for directory in directories])
    ends = listed.paths.parts(known.depth)[1].arrow
    start = starts.cast(ends.type).take(pa.array(listed.labels))
    return Paths(pc.binary_join_element_wise(start, ends, "/"))


def contents(root: str) -> str:
    """Describes what is in a folder, for messages.

    Returns:
        Such as ``"train/ with 1,000 folders, val/ with 50,000 files"``.
    """
    with os.scandir(root) as entries:
        found = sorted(entries, key=lambda entry: (not entry.is_dir(), entry.name))
    described = [_described(entry) for entry in found[:SHOWN]]
    more = f" and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
    return ", ".join(described) + more if described else "nothing"


def _described(entry: "os.DirEntry[str]") -> str:
    if not entry.is_dir():
        return entry.name
    try:
        with os.scandir(entry.path) as inside:
            kinds = [(below.is_dir(), below.name.endswith(".tar")) for below in inside]
    except OSError as error:
        return f"{entry.name}/, which cannot be listed ({error.strerror})"
    folders, archives = (sum(values) for values in zip(*kinds, strict=True)) if kinds else (0, 0)
    files = len(kinds) - folders - archives
    counts = {"folders": folders, "tar files to be unpacked": archives, "files": files}
    shown = " and ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    return f"{entry.name}/ with {shown or 'nothing'}"
