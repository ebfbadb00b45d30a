"""Data sets made of lists: list, and the published imagenet_lt, places_lt and inat2018."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from timm_lt.data.list_files import ImageList, read_image_list, read_utf8
from timm_lt.data.sources import Paths, Split, find_root, register_dataset
from timm_lt.data.splits import ImageFiles, LabelArray
from timm_lt.utils.checks import Problems, UsageError, check_choice, shown_names, user_errors
from timm_lt.utils.console import log

if TYPE_CHECKING:
    from datasets import Dataset

# Beginning of an absolute path: a slash, or on Windows a drive or a share.
ABSOLUTE = r"^(/|[A-Za-z]:[/\\]|\\\\)"
# Data sets of published lists, each with a file of its name in FACTS.
PUBLISHED = ("imagenet_lt", "places_lt", "inat2018")
FACTS = Path(__file__).parent / "facts"
# Files that are looked up to find the layout of the images.
SAMPLE = 64


def located(path: str | Path, root: str) -> Path:
    """Returns the path of a list in the root, else in the working directory."""
    path = Path(path).expanduser()
    candidates = list(dict.fromkeys([Path(root) / path, Path.cwd() / path]))
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UsageError(f"there is no file {' nor '.join(map(str, candidates))}")
    return found


def joined(root: str, paths: Paths) -> Paths:
    """Returns the files of listed paths; relative ones start at the root.

    Backslashes become slashes unless the first file with a backslash exists.
    """
    listed = paths.arrow
    below = pc.binary_join_element_wise(pa.scalar(root.rstrip("/")), listed, "/")
    files = pc.if_else(pc.match_substring_regex(listed, ABSOLUTE), listed, below)
    first = pc.index(pc.match_substring(files, "\\"), True).as_py()
    if first >= 0 and not Path(files[first].as_py()).is_file():
        files = pc.replace_substring(files, "\\", "/")
    return Paths(files)


def missing_rows(paths: Paths) -> NDArray[np.int64]:
    """Returns the rows of paths where there is no file, ascending.

    Each directory is listed once: faster than a look at every file, above all on a network.
    """
    files_in = cache(_files_in)
    places = (path.rpartition("/") for path in paths)
    missing = [row for row, (folder, _, name) in enumerate(places) if name not in files_in(folder)]
    return np.array(missing, np.int64)


def _files_in(folder: str) -> set[str]:
    absent = FileNotFoundError, NotADirectoryError, ValueError
    # The folder of a file in the root directory is empty.
    with (
        user_errors(f"{folder} cannot be listed"),
        suppress(*absent),
        os.scandir(folder or "/") as entries,
    ):
        return {entry.name for entry in entries if entry.is_file()}
    return set()


def note_repeats(
    problems: Problems, files: Mapping[Split, Paths], labels: Mapping[Split, LabelArray]
) -> None:
    """Notes images that are listed more than once, in one list or in several."""
    counts = Counter(os.path.normpath(path) for paths in files.values() for path in paths)
    repeated = {path: list[str]() for path, number in counts.items() if number > 1}
    if not repeated:
        return
    for split, paths in files.items():
        for path, label in zip(map(os.path.normpath, paths), labels[split].tolist(), strict=True):
            if path in repeated:
                repeated[path].append(f"{split} {label}")
    shown = [f"{path} ({shown_names(lines)})" for path, lines in islice(repeated.items(), 6)]
    problems.add(
        f"{len(repeated):,} images are listed more than once, here with their splits and labels: "
        f"{shown_names(shown)}; keep one line for each"
    )


def _listed_images(
    problems: Problems, root: str, lists: Mapping[Split, ImageList], files: dict[Split, Paths]
) -> ImageFiles:
    """Returns the images of lists, after noting those that are missing or listed twice."""
    for split, paths in files.items():
        with problems.collected(f"{split} list: "):
            rows = missing_rows(paths)
            if len(rows):
                hint = f"; relative paths start at the root {root}" * (len(rows) == len(paths))
                raise UsageError(
                    f"{len(rows):,} of {len(paths):,} files do not exist: "
                    f"{shown_names(paths.take(rows[:6]))}{hint}"
                )
    labels = {split: found.labels for split, found in lists.items()}
    note_repeats(problems, files, labels)
    return ImageFiles(root, problems, files, labels, None)


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
    validation split without a list is held out by the run. To report results on a validation list,
    pass it as ``test``. A list with a split column is given as ``train`` alone.

    Labels are those of the training list or of ``label_names``; class names of other lists are
    matched by name. Categories of a JSON list without an image are removed and named in the log.

    Args:
        root: Folder where relative paths in the lists start. Relative paths of the lists themselves
            are looked up in the root, then in the working directory.
        train: List of training images.
        val: List of validation images.
        test: List of test images.
        label_names: Text file with one class name per line, in the order of the labels.
        test_fraction: Fraction of each class that is held out for the test, in (0, 1).
        min_images: Removes classes with fewer training images, and names them in the log; None
            keeps all. Classes without names are then named by their labels.
        seed: Seed of the choice of the test images, a non-negative integer.

    Raises:
        UsageError: With all problems: a list is missing or has a mistake, files do not exist or are
            damaged, images are listed more than once, a class has no image, class names differ
            only in case.
    """
    folder = find_root(root)
    problems = Problems(f"lists of images in {folder}")
    given: dict[Split, str | Path | None] = {"train": train, "val": val, "test": test}
    lists = _read_lists(problems, given, folder)
    files = {split: joined(folder, found.paths) for split, found in lists.items()}
    images = _listed_images(problems, folder, lists, files)
    with problems.collected():
        if "train" in lists:
            names = None if label_names is None else _read_names(located(label_names, folder))
            images.labels, images.names = _numbered(lists, names)
            stated = [found.num_classes or 0 for found in lists.values() if min_images is None]
            held_out = [split for split in given if split not in lists and given[split] is None]
            images.note_classes(held_out, min_images, max(stated, default=0))
    return images.splits(test_fraction=test_fraction, seed=seed)


def _read_lists(
    problems: Problems, given: Mapping[Split, str | Path | None], root: str
) -> dict[Split, ImageList]:
    """Reads the list of each split; one with a split column may bring several."""
    read = cache(read_image_list)
    places: dict[Split, Path] = {}
    lists: dict[Split, ImageList] = {}
    for split, path in given.items():
        if path is not None:
            with problems.collected(f"{split} list: "):
                places[split] = located(path, root)
    for split, place in places.items():
        with problems.collected(f"{split} list: "):
            parts = read(place).by_split() or {split: read(place)}
            if split not in parts or (len(parts) > 1 and len({*places.values()}) > 1):
                raise UsageError(
                    f"the split column of {place} has images of {', '.join(parts)}: give a list "
                    "of several splits as the option train alone, or keep one split in it"
                )
            lists |= parts
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
    """Returns the labels of all lists by one list of class names, and the names."""
    names = given or lists["train"].names
    owner = "label_names" if given else "the train list"
    label_of = {name: label for label, name in enumerate(names or ())}
    labels = {split: found.labels for split, found in lists.items()}
    for split, found in lists.items():
        if found.names is None and (given or names is None):
            continue
        used, rows = np.unique(found.labels, return_inverse=True)
        titles = [found.names[label] if found.names else str(label) for label in used.tolist()]
        if unknown := [title for title in titles if title not in label_of]:
            raise UsageError(
                f"{split} list: {len(unknown)} classes are not in {owner}: {shown_names(unknown)}; "
                "the labels of all lists must be class names or all be numbers, unless the option "
                "label_names gives the order of the names"
            )
        labels[split] = np.array([label_of[title] for title in titles])[rows]
    if given is None and names:
        present = np.unique(np.concatenate([*labels.values()]))
        if unused := [name for label, name in enumerate(names) if label not in {*present.tolist()}]:
            log.warning(
                "categories that have no image are left out: %d of %d (%s)",
                *(len(unused), len(names), shown_names(unused)),
            )
        labels = {split: np.searchsorted(present, values) for split, values in labels.items()}
        names = [names[label] for label in present]
    return labels, names


@dataclass(frozen=True)
class PublishedList:
    """Known facts about a published list and its data set."""

    title: str
    split: Split
    num_classes: int
    # Names of the directories of the classes, (C,); None if those are the labels.
    class_names: list[str] | None
    # Regular expression: the directory of the class in a path as `name`, that above it as `group`.
    class_pattern: str
    # Components at the end of a path that are the same in every layout.
    depth: int
    # Folders below the root where the list is looked for, and its file names.
    folders: Sequence[str]
    files: Sequence[str]
    where: str
    lines: int
    # Paths of an image below the root, by the directory of its class ({name}; {nested} is that of
    # Places365's second layout) and the end of its path ({file}).
    layouts: Sequence[str]
    # The download with the images, and how to unpack it.
    needs: str
    # Images per class, (C,), or of each class.
    class_counts: Sequence[int] | int | None = None
    # Images by the directory above that of the class.
    group_totals: Mapping[str, int] = field(default_factory=dict)
    # Labels of a few images by file name, for lists without directories of classes.
    probes: Mapping[str, int] = field(default_factory=dict)
    # Of the sorted lines "basename label".
    sha256: str | None = None

    @property
    def directories(self) -> list[str]:
        """Name of the directory of each class, (C,)."""
        return self.class_names or [str(label) for label in range(self.num_classes)]


def published(name: str) -> dict[Split, PublishedList]:
    """Returns the known facts about the lists of a data set, by split."""
    check_choice("data set with published lists", name, PUBLISHED)
    content: dict[str, Any] = json.loads((FACTS / f"{name}.json").read_text("utf-8"))
    # Other fields say where the facts come from, for readers of the file.
    shared = {key: content[key] for key in PublishedList.__annotations__ if key in content}
    lists = content["lists"].items()
    return {split: PublishedList(split=split, **shared, **facts) for split, facts in lists}


def check_image_list(name: str, split: Split, path: str | Path) -> ImageList:
    """Checks that a list is the published one, without opening an image.

    Compares what is known of the list: images per class or in all, totals of super categories, a
    hash, and the labels of a few images. The directory of an image must be that of its label, and
    no image may be listed more than once.

    Args:
        name: ``"imagenet_lt"``, ``"places_lt"`` or ``"inat2018"``.
        split: ``"train"``, ``"val"`` or ``"test"``; iNaturalist 2018 has no ``"val"``.
        path: The list, in a format of :func:`~timm_lt.data.read_image_list`.

    Raises:
        UsageError: If it is another list; names the first difference.
    """
    known = published(name)
    check_choice(f"split of {name!r}", split, tuple(known))
    found = _read_published(known[split], Path(path))
    problems = Problems(str(path))
    note_repeats(problems, {split: found.paths}, {split: found.labels})
    problems.check()
    return found


def _read_published(known: PublishedList, path: Path) -> ImageList:
    found = read_image_list(path)
    if difference := find_difference(known, found):
        raise UsageError(
            f"{path} is not the published {known.split} list of {known.title}: {difference}; for a "
            "list of your own use the data set 'list'"
        )
    return found


def find_difference(known: PublishedList, found: ImageList) -> str | None:
    """Returns the first difference of a list from the published one, if there is one."""
    labels, num_classes = found.labels, known.num_classes
    if len(labels) != known.lines:
        return f"it has {len(labels):,} images, not {known.lines:,}"
    if labels.max() >= num_classes:
        return f"label {labels.max()} is not below the number of classes, {num_classes:,}"
    if known.class_counts is not None:
        counts = np.bincount(labels, minlength=num_classes)
        expected = np.broadcast_to(known.class_counts, num_classes)
        for label in np.flatnonzero(counts != expected).tolist():
            name = f"{label} ({known.directories[label]})"
            return f"class {name} has {counts[label]:,} images, not {expected[label]:,}"
    if difference := _difference_of_paths(known, found):
        return difference
    if known.sha256 not in (None, pairs_hash(found)):
        return "the classes have the right numbers of images, but some images are others"
    return None


def _difference_of_paths(known: PublishedList, found: ImageList) -> str | None:
    """Returns the first image or group of classes that directories or probes show to differ."""
    parts = pc.extract_regex(found.paths.arrow, known.class_pattern)
    # In Places365's second layout, a class may be a directory within another.
    names = pc.replace_substring(pc.struct_field(parts, "name"), "/", "-")
    right = pa.array(known.directories).take(pa.array(found.labels))
    wrong = pc.indices_nonzero(pc.not_equal(names, right)).to_pylist()
    if wrong:
        return (
            f"{len(wrong):,} images are in the directory of another class than their label's, e.g. "
            f"{found.paths[wrong[0]]}, whose label {found.labels[wrong[0]]} is {right[wrong[0]]}"
        )
    if known.group_totals:
        groups = pc.value_counts(pc.struct_field(parts, "group")).to_pylist()
        totals = {group["values"]: group["counts"] for group in groups}
        for group in [*known.group_totals, *totals]:
            if totals.get(group, 0) != (wanted := known.group_totals.get(group, 0)):
                return f"{group} has {totals.get(group, 0):,} images, not {wanted:,}"
    files = _ends(found.paths, 1)
    for name, label in known.probes.items():
        rows = pc.indices_nonzero(pc.equal(files, name)).to_numpy()
        if found.labels[rows].tolist() != [label]:
            return f"{name} has label {shown_names(found.labels[rows]) or None}, not {label}"
    return None


def _ends(paths: Paths, depth: int) -> pa.ChunkedArray:
    """Returns the last components of paths."""
    pattern = rf"(?P<end>[^/]+(?:/[^/]+){{{depth - 1}}})$"
    return pc.struct_field(pc.extract_regex(paths.arrow, pattern), "end")


def pairs_hash(found: ImageList) -> str:
    """Returns the SHA-256 of the sorted lines ``basename label``: equal in every layout."""
    pairs = sorted(zip(_ends(found.paths, 1).to_pylist(), found.labels.tolist(), strict=True))
    return sha256("\n".join(f"{name} {label}" for name, label in pairs).encode()).hexdigest()


def published_splits(
    known: Mapping[Split, PublishedList], root: str | Path, *given: str | Path | None
) -> "dict[Split, Dataset]":
    """Builds the splits of published lists; a list that is None is looked for below the root."""
    folder = find_root(root)
    problems = Problems(f"{known['train'].title} in {folder}")
    lists: dict[Split, ImageList] = {}
    files: dict[Split, Paths] = {}
    for split, path in zip(known, given, strict=True):
        with problems.collected(f"{split} list: "):
            place = located(path, folder) if path else _find_list(known[split], folder)
            lists[split] = _read_published(known[split], place)
    for split, found in lists.items():
        if paths := _find_images(known[split], found, folder):
            files[split] = paths
            continue
        entries = sorted(entry.name for entry in Path(folder).iterdir())
        problems.add(
            f"the images of the {split} split do not exist, e.g. {found.paths[0]}: "
            f"{known[split].title} needs {known[split].needs}; {folder} contains "
            f"{shown_names(entries, 8) or 'nothing'}"
        )
    images = _listed_images(problems, folder, lists, files)
    named = (found.names for found in lists.values() if found.names)
    images.names = known["train"].class_names or next(named, None)
    return images.splits()


def _find_list(known: PublishedList, root: str) -> Path:
    """Returns the path of a list that the user does not name."""
    for folder, name in product(known.folders, known.files):
        if (path := Path(root) / folder / name).is_file():
            return path
    folders = ", ".join(f"{folder}/" for folder in known.folders if folder)
    raise UsageError(
        f"there is no {' nor '.join(known.files)} in the root nor in its folders {folders}: put it "
        f"there, or name it with the option {known.split!r}; it is published {known.where}"
    )


def _find_images(known: PublishedList, found: ImageList, root: str) -> Paths | None:
    """Returns the files of a list in the layout of most files of a sample, if any exists."""
    sample = found.select(np.linspace(0, len(found.labels) - 1, SAMPLE).astype(np.int64))
    hits = {
        layout: sum(map(os.path.isfile, _laid_out(known, layout, sample, root)))
        for layout in ("", *known.layouts)
    }
    best = max(hits, key=lambda layout: hits[layout])
    return _laid_out(known, best, found, root) if hits[best] else None


def _laid_out(known: PublishedList, layout: str, found: ImageList, root: str) -> Paths:
    """Returns the files of a list in a layout; an empty layout is that of the list."""
    if not layout:
        return joined(root, found.paths)
    parent = layout.rpartition("/")[0]
    directories = [
        f"{root}/" + parent.format(name=name, nested=f"{name[0]}/{name.replace('-', '/')}")
        for name in known.directories
    ]
    starts = pc.utf8_rtrim(pa.array(directories), "/").take(pa.array(found.labels))
    return Paths(pc.binary_join_element_wise(starts, _ends(found.paths, known.depth), "/"))


@register_dataset("imagenet_lt")
def imagenet_lt(
    *,
    root: str | Path,
    train: str | Path | None = None,
    val: str | Path | None = None,
    test: str | Path | None = None,
) -> "dict[Split, Dataset]":
    """Builds ImageNet-LT from ImageNet's images (ILSVRC 2012) and the published lists.

    115,846 training images of 1,000 classes, 1,280 to 5 each. Validation has 20 of ImageNet's
    training images per class, the test split has ImageNet's validation images, 50 per class. The
    lists are checked: see :func:`~timm_lt.data.check_image_list`.

    Args:
        root: Folder with the images, ``train/<wnid>/`` and ``val/<wnid>/`` or ``val/``.
        train: The training list, ``ImageNet_LT_train.txt``. None looks for it in the root and in
            its usual folders; a relative path starts at the root or the working directory.
        val: List of validation images, ``ImageNet_LT_val.txt``.
        test: List of test images, ``ImageNet_LT_test.txt``.

    Raises:
        UsageError: With all problems: a list is missing or is not the published one; images do not
            exist, are listed twice, or are damaged.

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019,
        https://arxiv.org/abs/1904.05160
    """
    return published_splits(published("imagenet_lt"), root, train, val, test)


@register_dataset("places_lt")
def places_lt(
    *,
    root: str | Path,
    train: str | Path | None = None,
    val: str | Path | None = None,
    test: str | Path | None = None,
) -> "dict[Split, Dataset]":
    """Builds Places-LT from Places365-Standard; the arguments are those of :func:`imagenet_lt`.

    62,500 training images of 365 classes, 4,980 to 5 each; 20 of Places365's training images per
    class for validation; its validation images, 100 per class, for the test. Five classes have
    other labels than in Places365, whose lists are refused.
    """
    return published_splits(published("places_lt"), root, train, val, test)


# Their code has no validation split here: the best epoch and tau are those of the test split.
@register_dataset("inat2018", selected_on_test="Kang et al., ICLR 2020")
def inat2018(
    *, root: str | Path, train: str | Path | None = None, test: str | Path | None = None
) -> "dict[Split, Dataset]":
    """Builds iNaturalist 2018; the arguments are those of :func:`imagenet_lt`.

    437,513 training images of 8,142 species, 1,000 to 2 each. The test split that papers report on
    has the official validation images, 3 per class. There is no validation split: a run holds out
    a part of training, or selects on the test split as Kang et al. did (``protocol="paper"``).

    References:
        Van Horn et al., The iNaturalist Species Classification and Detection Dataset, CVPR 2018,
        https://arxiv.org/abs/1707.06642
    """
    return published_splits(published("inat2018"), root, train, test)
