"""The data set list: images that are named by a list for each split."""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from timm_lt.data.list_files import ImageList, Paths, read_image_list, read_utf8
from timm_lt.data.sources import Split, find_root, register_dataset
from timm_lt.data.splits import (
    LabelArray,
    leave_out_small,
    note_alike_names,
    note_classes,
    splits_from_files,
)
from timm_lt.utils.checks import Problems, UsageError, shown_names
from timm_lt.utils.console import log

if TYPE_CHECKING:
    from datasets import Dataset

# Beginning of an absolute path: a slash, or on Windows a drive or a share.
ABSOLUTE = r"^(/|[A-Za-z]:[/\\]|\\\\)"
# Parts of a path that can be spelled in another way.
UNTIDY = r"(^|/)\.{0,2}/|/\.{1,2}$"


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
    """Returns the files that listed paths stand for.

    Relative paths start at the root. Backslashes become slashes unless the first file with a
    backslash exists.
    """
    listed = paths.arrow
    absolute = pc.match_substring_regex(listed, ABSOLUTE)
    start = pa.scalar(root.rstrip("/"), listed.type)
    files = pc.if_else(absolute, listed, pc.binary_join_element_wise(start, listed, "/"))
    first = pc.index(pc.match_substring(files, "\\"), True).as_py()
    if first >= 0 and not Path(files[first].as_py()).is_file():
        files = pc.replace_substring(files, "\\", "/")
    return Paths(files)


def missing_rows(paths: Paths) -> NDArray[np.int64]:
    """Returns the positions of paths where there is no file, ascending.

    Each directory is listed once, which is faster than a look at every file, above all on a
    network.

    Raises:
        UsageError: If a directory cannot be listed.
    """
    files_in = cache(_files_in)
    missing: list[int] = []
    for row, path in enumerate(paths):
        folder, _, name = path.rpartition("/")
        if name not in files_in(folder):
            missing.append(row)
    return np.array(missing, np.int64)


def _files_in(folder: str) -> set[str]:
    try:
        # The folder of a file in the root directory is empty.
        with os.scandir(folder or "/") as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError, ValueError):
        # A zero byte in a name is a ValueError.
        return set()
    except OSError as error:
        raise UsageError(f"{folder} cannot be listed: {error.strerror or error}") from error


def note_missing(problems: Problems, split: str, files: Paths, root: str) -> None:
    """Notes files that do not exist."""
    with problems.collected(f"{split} list: "):
        rows = missing_rows(files)
        if len(rows):
            shown = shown_names(files.take(rows[:6]))
            hint = f"; relative paths start at the root {root}" if len(rows) == len(files) else ""
            problems.add(
                f"{split} list: {len(rows):,} of {len(files):,} files do not exist: {shown}{hint}"
            )


def note_repeats(
    problems: Problems, files: Mapping[Split, Paths], labels: Mapping[Split, LabelArray]
) -> None:
    """Notes images that are listed more than once, in one list or in several."""
    whole = pa.concat_arrays([_tidy(paths).cast(pa.large_string()) for paths in files.values()])
    coded = whole.dictionary_encode()
    codes = coded.indices.to_numpy()
    repeated = np.flatnonzero(np.bincount(codes) > 1)
    if len(repeated) == 0:
        return
    lines = [f"{split} {label}" for split in files for label in labels[split].tolist()]
    shown = []
    for code in repeated[:6].tolist():
        places = [lines[row] for row in np.flatnonzero(codes == code).tolist()]
        shown.append(f"{coded.dictionary[code].as_py()} ({shown_names(places)})")
    problems.add(
        f"{len(repeated):,} images are listed more than once, here with their splits and labels: "
        f"{shown_names(shown)}; keep one line for each"
    )


def _tidy(files: Paths) -> pa.Array:
    """Returns absolute paths with one spelling each, for comparison."""
    untidy = pc.match_substring_regex(pc.utf8_slice_codeunits(files.arrow, 1), UNTIDY)
    if not pc.any(untidy).as_py():
        return files.arrow
    return pa.array([os.path.normpath(path) for path in files], files.arrow.type)


@register_dataset("list")
def listed(
    *,
    root: str | Path,
    train: str | Path,
    val: str | Path | None = None,
    test: str | Path | None = None,
    label_names: str | Path | None = None,
    test_fraction: float = 0.2,
    min_images: int | None = None,
    seed: int = 0,
) -> "dict[Split, Dataset]":
    """Builds the splits that lists name; see :func:`~timm_lt.data.read_image_list`.

    A test split without a list is held out of each class of training, the same in every run. A
    validation split without a list is held out by the run. Give the validation list as ``test``
    where results are reported on it.

    A list with a split column is given as ``train`` alone, or for each split, which then takes its
    own images.

    Classes are numbered as in the training list, or as in ``label_names``; the class names of the
    other lists are matched by name. Categories of a JSON list that have no image in any split are
    left out and counted in the log. A path with backslashes, as on Windows, is read with slashes if
    there is no such file.

    Args:
        root: The folder that relative paths in the lists start at.
        train: The list of training images. A relative path is looked for in the root, then in the
            working directory; so are those of the other lists.
        val: The list of validation images.
        test: The list of test images.
        label_names: A text file with one class name per line, in the order of the labels.
        test_fraction: Part of each class that is held out for the test, in (0, 1).
        min_images: Leaves out classes with fewer training images, and names them in the log; None
            keeps all. Classes without names are then named by their labels.
        seed: Seed of the choice of the test images, a non-negative integer.

    Raises:
        UsageError: For everything that is wrong at once: a list is missing or has a mistake (its
            first one is named), files do not exist, images are listed more than once, a class has
            no image, class names differ only in case; then also for images that are damaged.
    """
    folder = find_root(root)
    problems = Problems(f"lists of images in {folder}")
    given: dict[Split, str | Path | None] = {"train": train, "val": val, "test": test}
    lists = _read_lists(problems, given, folder)
    files = {split: joined(folder, found.paths) for split, found in lists.items()}
    for split, paths in files.items():
        note_missing(problems, split, paths, folder)
    labels: Mapping[Split, LabelArray] = {split: found.labels for split, found in lists.items()}
    if files:
        note_repeats(problems, files, labels)
    names: list[str] | None = None
    with problems.collected():
        if "train" in lists:
            if label_names is not None:
                names = _read_names(located(label_names, folder))
            labels, names = _numbered(lists, names)
            rows, labels, names = leave_out_small(labels, names, min_images)
            files = {split: files[split].take(rows[split]) for split in rows}
            stated = [found.num_classes or 0 for found in lists.values() if min_images is None]
            num_classes = len(names) if names else max([int(labels["train"].max()) + 1, *stated])
            held_out = [split for split in given if split not in lists and given[split] is None]
            note_alike_names(problems, names or ())
            note_classes(problems, labels, num_classes, names, held_out)
    return splits_from_files(
        problems,
        files,
        labels,
        names,
        root=folder,
        test_fraction=test_fraction,
        seed=seed,
    )


def _read_lists(
    problems: Problems, given: Mapping[Split, str | Path | None], root: str
) -> dict[Split, ImageList]:
    """Reads the list of each split; that of train may bring other splits in a split column."""
    lists: dict[Split, ImageList] = {}
    divided: Path | None = None
    for split, path in given.items():
        if path is None:
            continue
        with problems.collected(f"{split} list: "):
            place = located(path, root)
            if place == divided and split in lists:
                continue
            found = read_image_list(place)
            parts = found.by_split() or {split: found}
            if split in lists or split not in parts or (len(parts) > 1 and split != "train"):
                owner, splits = (divided, lists) if split in lists else (place, parts)
                raise UsageError(
                    f"the split column of {owner} has images of {', '.join(splits)}: give a list "
                    "of several splits as the option train alone, or leave one split in it"
                )
            lists |= parts
            divided = place if len(parts) > 1 else divided
    return lists


def _read_names(path: Path) -> list[str]:
    """Reads class names, one on each line."""
    names = [name.strip() for name in read_utf8(path).rstrip().split("\n")]
    if "" in names:
        raise UsageError(f"label names {path}: line {names.index('') + 1} is empty")
    return names


def _numbered(
    lists: Mapping[Split, ImageList], given: list[str] | None
) -> tuple[dict[Split, LabelArray], list[str] | None]:
    """Returns the labels of all lists as positions in one list of class names, and the names."""
    names = given or lists["train"].names
    labels: dict[Split, LabelArray] = {}
    for split, found in lists.items():
        if given is None and (found.names is None) != (names is None):
            raise UsageError(
                f"the labels of the train list and of the {split} list must both be class names or "
                "both be numbers; otherwise give the order of the names with label_names"
            )
        labels[split] = found.labels
        if found.names is not None and names is not None:
            places = {name: label for label, name in enumerate(names)}
            used = [found.names[label] for label in np.unique(found.labels).tolist()]
            if unknown := [name for name in used if name not in places]:
                owner = "label_names" if given else "the train list"
                raise UsageError(
                    f"{split} list: {len(unknown)} classes are not in {owner}: "
                    f"{shown_names(unknown)}"
                )
            order = np.array([places.get(name, -1) for name in found.names], np.int64)
            labels[split] = order[found.labels]
    if given is None and names:
        present = np.unique(np.concatenate([*labels.values()]))
        unused = [names[label] for label in np.setdiff1d(np.arange(len(names)), present)]
        if unused:
            log.warning(
                "categories that have no image are left out: %d of %d (%s)",
                *(len(unused), len(names), shown_names(unused)),
            )
        labels = {split: np.searchsorted(present, values) for split, values in labels.items()}
        names = [names[label] for label in present]
    return labels, names
