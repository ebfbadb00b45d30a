"""list: images that are named by a list for each split, of any format that is read.

Which of many files are there, asked directory by directory.

What is checked of images that lists name, of all splits together.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from timm_lt.data.damaged import note_damaged_files
from timm_lt.data.list_files import ImageList, Paths, read_image_list
from timm_lt.data.sources import Split, dataset_from_files, register_dataset
from timm_lt.data.splits import hold_out, image_keys, leave_out_small
from timm_lt.utils.checks import Problems, UsageError, check_integer, check_number, shown_names
from timm_lt.utils.console import log

if TYPE_CHECKING:
    from datasets import Dataset


def missing_rows(paths: Paths) -> NDArray[np.int64]:
    """Returns the rows of paths where there is no file, ascending.

    Each directory is listed once: asking for file after file takes twice as long on a local disk,
    and far longer where each question is a round trip in a network.

    Raises:
        UsageError: If a directory may not be listed.
    """
    folders, names = paths.parts()
    groups = folders.arrow.dictionary_encode()
    codes = groups.indices.to_numpy()
    order = codes.argsort(kind="stable")
    of_folder = np.split(order, np.cumsum(np.bincount(codes, minlength=len(groups.dictionary))))
    missing: list[int] = []
    for folder, rows in zip(groups.dictionary.to_pylist(), of_folder, strict=False):
        entries = _entries(folder)
        for row, name in zip(rows.tolist(), names.take(rows), strict=True):
            if name not in entries or not entries[name].is_file():
                missing.append(row)
    return np.array(sorted(missing), np.int64)


def _entries(folder: str) -> dict[str, "os.DirEntry[str]"]:
    """Returns what is in a directory, by name; nothing if there is no such directory."""
    try:
        # The folder of a file in the root directory is empty.
        with os.scandir(folder or "/") as entries:
            return {entry.name: entry for entry in entries}
    except (FileNotFoundError, NotADirectoryError, ValueError):
        # A zero byte in a name is a ValueError.
        return {}
    except OSError as error:
        raise UsageError(f"{folder} cannot be listed: {error.strerror or error}") from error


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

    Without a list for it, the test split is a part of each class of training, the same in every
    run. Without one for validation there is none: a run holds out a part of what is left. Give the
    validation list as ``test`` where results are reported on it.

    A list with a column ``split`` is given as ``train`` alone, or for each split, which then takes
    its images of it.

    Classes are numbered as the training list numbers them, or are named by ``label_names``; where
    lists have names, those of the other splits are matched by name. Categories of a JSON list that
    have no image in any split are left out, and counted in the log. A path with backslashes, as
    Windows has them, is that with slashes if there is no such file.

    Args:
        root: The folder that relative paths in the lists start at.
        train: The list of training images. A relative path is looked for in the root, then in the
            working directory; so are those of the other lists.
        val: That of validation images.
        test: That of test images.
        label_names: A text file with the class names, one on each line, in the order of the labels.
        test_fraction: Part of the training images that is the test split if it has no list, in
            (0, 1).
        min_images: Classes with fewer training images are left out, and named in the log; None
            leaves out none. Classes without names are then named by their labels.
        seed: Of the choice of the test images, a non-negative integer.

    Raises:
        UsageError: For all that is wrong at once: a list or the root is missing, a list is at fault
            (its first fault is named), names files that are not there or one image on two lines,
            two lists share images, a class has no image, or class names differ in case only; then
            also images that are damaged.
    """
    check_number("test_fraction", test_fraction, "(0, 1)")
    check_integer("seed", seed, minimum=0)
    folder = absolute_root(root)
    problems = Problems(f"lists of images in {folder}")
    is_there = note_root(problems, folder)
    given: dict[Split, str | Path | None] = {"train": train, "val": val, "test": test}
    if min_images is not None:
        check_integer("min_images", min_images, minimum=1)
    lists = _read_lists(problems, given, folder)
    files = {split: joined(folder, found.paths) for split, found in lists.items()}
    files = {split: with_slashes(paths) for split, paths in files.items()}
    if is_there:
        for split, paths in files.items():
            note_missing(problems, split, paths, folder)
    note_overlaps(problems, {split: tidy(paths) for split, paths in files.items()})
    for split, paths in files.items():
        note_repeats(problems, split, tidy(paths), lists[split].labels)
    names = None
    labels = {split: found.labels for split, found in lists.items()}
    with problems.collected():
        names = None if label_names is None else _read_names(located(label_names, folder))
    if "train" in lists:
        rows, labels, names = _classes(problems, lists, names, min_images)
        files = {split: paths.take(rows[split]) for split, paths in files.items() if split in rows}
        # Without small classes there are as many as are left, whatever the lists say.
        said = [found.num_classes or 0 for found in lists.values()] if min_images is None else []
        missing = sum(path is None and split not in lists for split, path in given.items())
        _note_classes(problems, labels, names, said, missing)
    if problems.found and is_there:
        note_damaged_files(problems, files)
    problems.check()
    return _datasets(files, labels, names, root=folder, test_fraction=test_fraction, seed=seed)


def _read_lists(
    problems: Problems, given: Mapping[Split, str | Path | None], folder: str
) -> dict[Split, ImageList]:
    """Reads the list of each split; one with a column of splits may be that of several."""
    lists: dict[Split, ImageList] = {}
    divided: Path | None = None
    for split, path in given.items():
        if path is None:
            continue
        with problems.collected(f"{split} list: "):
            place = located(path, folder)
            if place == divided and split in lists:
                continue
            if split in lists:
                raise UsageError(
                    f"{divided} has {split} images too, in its column split: remove these rows, or "
                    f"the option {split}"
                )
            parts = _parts(read_image_list(place), split, place)
            lists |= parts
            divided = place if len(parts) > 1 else divided
    return lists


def _parts(found: ImageList, split: Split, place: Path) -> dict[Split, ImageList]:
    """Returns the list of a split, and of others if it is the one for training and has them."""
    if found.splits is None:
        return {split: found}
    parts = found.by_split()
    others = [other for other in parts if other != split]
    if split not in parts:
        raise UsageError(
            f"the column split of {place} has no images of {split}, only of {', '.join(parts)}"
        )
    if split != "train" and others:
        raise UsageError(
            f"the column split of {place} has images of {', '.join(parts)}: give it as the option "
            f"train alone, or leave only images of {split} in it"
        )
    return parts


def _read_names(path: Path) -> list[str]:
    """Reads class names, one on each line."""
    try:
        names = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"label names {path} cannot be read: {error}") from error
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    if "" in names:
        raise UsageError(f"label names {path}: line {names.index('') + 1} is empty")
    if not names:
        raise UsageError(f"label names {path} is empty")
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise UsageError(f"label names {path}: {len(twice)} occur twice: {shown_names(twice)}")
    return names


def _classes(
    problems: Problems,
    lists: Mapping[Split, ImageList],
    given_names: list[str] | None,
    min_images: int | None,
) -> tuple[dict[Split, Labels], dict[Split, Labels], list[str] | None]:
    """Returns the rows of the lists that stay, their labels, and the class names."""
    labels, names = _numbered(problems, lists, given_names)
    rows = {split: np.arange(len(found.labels)) for split, found in lists.items()}
    if labels.keys() == lists.keys():
        with problems.collected():
            if given_names is None and names:
                labels, names = _with_images(labels, names)
            rows, labels, names = leave_out_small(labels, names, min_images)
    return rows, labels, names


def _numbered(
    problems: Problems, lists: Mapping[Split, ImageList], names: list[str] | None
) -> tuple[dict[Split, Labels], list[str] | None]:
    """Returns the labels of all lists, and the class names in their order."""
    owner = "label_names"
    if names is None:
        names, owner = lists["train"].names, "train"
    labels: dict[Split, Labels] = {}
    for split, found in lists.items():
        if found.names is None:
            if owner == "train" and names:
                problems.add(
                    f"{split} list: it has numbers and the train list has class names; give their "
                    "order with label_names"
                )
                continue
            labels[split] = found.labels
            highest = int(found.labels.max())
            if names and highest >= len(names):
                problems.add(
                    f"{split} list: label {highest} is beyond the {len(names)} class names of "
                    "label_names"
                )
            continue
        if names is None:
            problems.add(
                f"{split} list: it has class names and the train list has numbers; give their "
                "order with label_names"
            )
            continue
        places = {name: label for label, name in enumerate(names)}
        used = [found.names[label] for label in np.unique(found.labels).tolist()]
        unknown = [name for name in used if name not in places]
        if unknown:
            problems.add(
                f"{split} list: {len(unknown)} classes are not in {owner}: {shown_names(unknown)}"
            )
            continue
        ranks = np.array([places.get(name, -1) for name in found.names], np.int64)
        labels[split] = ranks[found.labels]
    return labels, names


def _with_images(
    labels: Mapping[Split, Labels], names: list[str]
) -> tuple[dict[Split, Labels], list[str]]:
    """Leaves out the classes that have no image in any split."""
    used = np.unique(np.concatenate([*labels.values()]))
    if len(used) < len(names):
        unused = [names[c] for c in np.setdiff1d(np.arange(len(names)), used)]
        log.warning(
            "categories that have no image are left out: %d of %d (%s)",
            *(len(unused), len(names), shown_names(unused)),
        )
    anew = {split: np.searchsorted(used, values) for split, values in labels.items()}
    return anew, [names[c] for c in used]


def _note_classes(
    problems: Problems,
    labels: Mapping[Split, Labels],
    names: list[str] | None,
    said: list[int],
    held_out: int,
) -> None:
    """Notes what is wrong with the classes."""
    if names:
        note_alike(problems, names)
    if "train" in labels:
        highest = {split: int(values.max()) for split, values in labels.items() if len(values)}
        num_classes = len(names) if names else max([highest["train"] + 1, *said])
        for split, label in highest.items():
            if label >= num_classes and not names:
                problems.add(
                    f"{split} list: label {label} is beyond the {num_classes:,} classes of the "
                    "train list"
                )
        note_gaps(problems, labels, num_classes, names, held_out)


def _datasets(
    files: Mapping[Split, Paths],
    labels: Mapping[Split, Labels],
    names: list[str] | None,
    *,
    root: str,
    test_fraction: float,
    seed: int,
) -> "dict[Split, Dataset]":
    datasets = {
        split: dataset_from_files(paths.arrow, labels[split], names)
        for split, paths in files.items()
    }
    if "test" not in datasets:
        whole = datasets["train"]
        keys = image_keys(whole, root)
        train, test = hold_out(
            labels["train"], test_fraction, seed=seed, keys=keys, purpose="test", names=names
        )
        datasets["train"] = whole.select(train.tolist())
        datasets["test"] = whole.select(test.tolist())
    return datasets
