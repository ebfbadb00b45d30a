"""list: images that are named by a list for each split, of any format that is read."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from timm_lt.data.holdout import hold_out, leave_out_small
from timm_lt.data.identity import image_keys
from timm_lt.data.lists.checks import (
    absolute_root,
    joined,
    located,
    note_alike,
    note_gaps,
    note_missing,
    note_overlaps,
    note_repeats,
    note_root,
    tidy,
    with_slashes,
)
from timm_lt.data.lists.paths import Paths
from timm_lt.data.lists.reader import ImageList, read_image_list
from timm_lt.data.readable import note_damaged_files
from timm_lt.data.sources import Split, dataset_from_files, register_dataset
from timm_lt.utils.checks import Problems, UsageError, check_integer, check_number, shown_names
from timm_lt.utils.console import log

if TYPE_CHECKING:
    from datasets import Dataset

Labels = NDArray[np.int64]


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
