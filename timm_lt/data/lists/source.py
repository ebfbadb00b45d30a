"""list: images that are named by a list for each split, of any format that is read."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from timm_lt.data.holdout import hold_out
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
)
from timm_lt.data.lists.paths import Paths
from timm_lt.data.lists.reader import ImageList, read_image_list
from timm_lt.data.readable import note_damaged_files
from timm_lt.data.sources import Split, dataset_from_files, register_dataset
from timm_lt.registry import Problems, UsageError, check_integer, check_number, shown_names

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
    seed: int = 0,
) -> "dict[Split, Dataset]":
    """Builds the splits that lists name; see :func:`~timm_lt.data.read_image_list`.

    Without a list for it, the test split is a part of each class of training, the same in every
    run. Without one for validation there is none: a run holds out a part of what is left. Give the
    validation list as ``test`` where results are reported on it.

    Classes are numbered as the training list numbers them, or are named by ``label_names``; where
    lists have names, those of the other splits are matched by name.

    Args:
        root: The folder that relative paths in the lists start at.
        train: The list of training images. A relative path is looked for in the root, then in the
            working directory; so are those of the other lists.
        val: That of validation images.
        test: That of test images.
        label_names: A text file with the class names, one on each line, in the order of the labels.
        test_fraction: Part of the training images that is the test split if it has no list, in
            (0, 1).
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
    lists: dict[Split, ImageList] = {}
    for split, path in given.items():
        if path is not None:
            with problems.collected(f"{split} list: "):
                lists[split] = read_image_list(located(path, folder))
    files = {split: joined(folder, found.paths) for split, found in lists.items()}
    if is_there:
        for split, paths in files.items():
            note_missing(problems, split, paths, folder)
    note_overlaps(problems, {split: tidy(paths) for split, paths in files.items()})
    for split, paths in files.items():
        note_repeats(problems, split, tidy(paths), lists[split].labels)
    names, labels = None, {split: found.labels for split, found in lists.items()}
    with problems.collected():
        names = None if label_names is None else _read_names(located(label_names, folder))
    if "train" in lists:
        names, labels = _numbered(problems, lists, names)
        _note_classes(problems, lists, labels, names, held_out=given)
    if problems.found and is_there:
        note_damaged_files(problems, files)
    problems.check()
    return _datasets(files, labels, names, root=folder, test_fraction=test_fraction, seed=seed)


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


def _numbered(
    problems: Problems, lists: Mapping[Split, ImageList], names: list[str] | None
) -> tuple[list[str] | None, dict[Split, Labels]]:
    """Returns the class names, and the labels of all lists in their order."""
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
    return names, labels


def _note_classes(
    problems: Problems,
    lists: Mapping[Split, ImageList],
    labels: Mapping[Split, Labels],
    names: list[str] | None,
    held_out: Mapping[Split, object],
) -> None:
    """Notes what is wrong with the classes."""
    if names:
        note_alike(problems, names)
    if "train" in labels:
        said = [found.num_classes or 0 for found in lists.values()]
        highest = {split: int(values.max()) for split, values in labels.items()}
        num_classes = len(names) if names else max(highest["train"] + 1, *said)
        for split, label in highest.items():
            if label >= num_classes and not names:
                problems.add(
                    f"{split} list: label {label} is beyond the {num_classes:,} classes of the "
                    "train list"
                )
        missing = sum(path is None for path in held_out.values())
        note_gaps(problems, labels, num_classes, names, missing)


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
