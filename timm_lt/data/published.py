"""A list against what is known of the published one, without an image.

What is known of the lists of images that papers report on, beside the lists themselves.

Published lists and the official images, wherever their downloads put them.

imagenet_lt: ImageNet-LT, 1,000 classes with 1,280 to 5 training images.

inat2018: iNaturalist 2018, 8,142 species with 1,000 to 2 training images.

places_lt: Places-LT, 365 classes with 4,980 to 5 training images.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from timm_lt.data.damaged import note_damaged_files
from timm_lt.data.list_files import ImageList, Paths, read_image_list
from timm_lt.data.lists import (
    absolute_root,
    joined,
    located,
    note_missing,
    note_overlaps,
    note_root,
    tidy,
)
from timm_lt.data.sources import Split, dataset_from_files, register_dataset
from timm_lt.utils.checks import Problems, UsageError, check_choice, shown_names

if TYPE_CHECKING:
    from datasets import Dataset

FACTS = Path(__file__).parent / "facts"
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
    content: dict[str, Any] = json.loads((FACTS / f"{name}.json").read_text("utf-8"))
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


def check_image_list(name: str, split: Split, path: str | Path) -> ImageList:
    """Checks that a list is the published one, as far as that is known; needs no image.

    Of the training lists of ImageNet-LT and Places-LT the number of images of every class is known,
    of those of iNaturalist 2018 the totals of the super categories and the smallest and largest
    class; of the other lists that each class has as many. The images themselves are known, by a
    hash, of both Places-LT lists beside the test list and of ImageNet-LT's validation list. In all
    lists the directory of an image must be that of its label; of a test list without directories
    of classes only the labels of a few images are known: one of ImageNet-LT, four of Places-LT.
    No image may be on several lines; within a class, images are told apart by their file names.

    Args:
        name: ``"imagenet_lt"``, ``"places_lt"`` or ``"inat2018"``.
        split: ``"train"``, ``"val"`` or ``"test"``. iNaturalist 2018 has no ``"val"``: its
            validation list is the test split that papers report on.
        path: The list, in a format of :func:`~timm_lt.data.read_image_list`.

    Returns:
        The list.

    Raises:
        UsageError: If it is another list; says in what it differs, and which it is if that is
            known.
    """
    known = published(name)
    check_choice(f"split of {name!r}", split, tuple(known.lists))
    listed = read_image_list(path)
    problems = Problems(f"{path} is not the {split} list of {known.title}")
    note_differences(problems, known, split, listed)
    problems.check()
    return listed


def note_differences(problems: Problems, known: Published, split: Split, listed: ImageList) -> None:
    """Notes in what a list differs from the published one."""
    expected, lines = known.lists[split], len(listed.labels)
    if lines != expected.lines:
        other = _other_list(known, lines)
        problems.add(f"it has {lines:,} images, not {expected.lines:,}{other}")
        if other:
            return
    highest = int(listed.labels.max())
    if highest >= known.num_classes:
        problems.add(f"label {highest} is beyond the {known.num_classes:,} classes")
        return
    before = len(problems.found)
    _note_counts(problems, known, expected, listed.labels)
    _note_directories(problems, known, listed)
    _note_groups(problems, known, expected, listed.paths)
    _note_probes(problems, expected, listed)
    _note_repeats(problems, known, listed)
    if len(problems.found) > before or lines != expected.lines or expected.sha256 is None:
        return
    if pairs_hash(listed) != expected.sha256:
        problems.add("each class has the right number of images, but not all are the same images")


def pairs_hash(listed: ImageList) -> str:
    """Returns the SHA-256 of the sorted lines ``basename label``: equal in every layout."""
    names = listed.paths.parts()[1]
    pairs = sorted(zip(names, listed.labels.tolist(), strict=True))
    return sha256("\n".join(f"{name} {label}" for name, label in pairs).encode()).hexdigest()


def classes_of(known: Published, paths: Paths) -> pa.Array:
    """Returns the class that each path says it is of, null where it says none."""
    import pyarrow.compute as pc

    found = pc.extract_regex(paths.arrow, known.class_pattern)
    # In Places365's second layout, the place of a class is a directory within another.
    return pc.replace_substring(pc.struct_field(found, "name"), "/", "-")


def _other_list(known: Published, lines: int) -> str:
    """Returns which list has that many lines, for messages; nothing if none is known that has."""
    others = dict(known.other_lists)
    for name in NAMES:
        other = published(name)
        others |= {
            one.lines: f"the {split} list of {other.title}" for split, one in other.lists.items()
        }
    others |= {one.lines: f"its own {split} list" for split, one in known.lists.items()}
    return f": it seems to be {others[lines]}" if lines in others else ""


def _note_counts(
    problems: Problems, known: Published, expected: PublishedList, labels: NDArray[np.int64]
) -> None:
    counts = np.bincount(labels, minlength=known.num_classes)
    if expected.class_counts is not None:
        other = np.flatnonzero(counts != expected.class_counts)
        shown = [
            f"class {_named(known, label)} has {counts[label]:,} images, not "
            f"{expected.class_counts[label]:,}"
            for label in other[:6].tolist()
        ]
        if shown:
            problems.add(
                f"{len(other):,} classes have other numbers of images: {'; '.join(shown[:5])}"
            )
        return
    for label, bound, word in (
        (int(counts.argmin()), expected.smallest, "smallest"),
        (int(counts.argmax()), expected.largest, "largest"),
    ):
        if counts[label] != bound:
            problems.add(
                f"the {word} class, {_named(known, label)}, has {counts[label]:,} images, not "
                f"{bound:,}"
            )


def _named(known: Published, label: int) -> str:
    return f"{label} ({known.class_names[label]})" if known.class_names else str(label)


def _note_directories(problems: Problems, known: Published, listed: ImageList) -> None:
    """Notes images that are in the directory of another class."""
    import pyarrow.compute as pc

    found, labels = classes_of(known, listed.paths), listed.labels
    expected = pa.array(known.directories).take(pa.array(labels))
    rows = pc.indices_nonzero(pc.not_equal(found, expected)).to_numpy().astype(np.int64)
    if len(rows) == 0:
        return
    shown = [f"{listed.paths[row]} ({labels[row]})" for row in rows[:6].tolist()]
    in_order = pa.array(sorted(known.directories))
    numbers = pc.fill_null(pc.index_in(found, value_set=in_order), -1).to_numpy()
    hint = ""
    if np.array_equal(numbers[rows], labels[rows]):
        count = len(np.unique(labels[rows]))
        hint = (
            f"; the labels number the directories in sorted order, those of {known.title} differ "
            f"from that in {count} classes"
        )
    problems.add(
        f"{len(rows):,} images are in the directory of another class than their label's: "
        f"{shown_names(shown)}{hint}"
    )


def _note_groups(
    problems: Problems, known: Published, expected: PublishedList, paths: Paths
) -> None:
    """Notes groups of classes with other numbers of images."""
    import pyarrow.compute as pc

    if not expected.group_totals:
        return
    groups = paths.parts(known.depth)[1].arrow
    counted = pc.value_counts(pc.list_element(pc.split_pattern(groups, "/"), 0)).to_pylist()
    counts = {entry["values"]: entry["counts"] for entry in counted}
    names = [*expected.group_totals, *sorted(counts.keys() - expected.group_totals.keys())]
    shown = [
        f"{name} has {counts.get(name, 0):,} images, not {expected.group_totals.get(name, 0):,}"
        for name in names
        if counts.get(name, 0) != expected.group_totals.get(name, 0)
    ]
    if shown:
        problems.add(f"{len(shown)} groups of classes differ: {'; '.join(shown[:5])}")


def _note_probes(problems: Problems, expected: PublishedList, listed: ImageList) -> None:
    """Notes images whose label is known that are not in the list, or have another label."""
    import pyarrow.compute as pc

    names = listed.paths.parts()[1].arrow
    shown = []
    for name, label in expected.probes.items():
        rows = pc.indices_nonzero(pc.equal(names, name)).to_numpy()
        found = np.unique(listed.labels[rows]).tolist()
        if not found:
            shown.append(f"{name} is not in the list")
        elif found != [label]:
            shown.append(f"{name} has label {' and '.join(map(str, found))}, not {label}")
    if shown:
        problems.add(
            f"{len(shown)} of the {len(expected.probes)} images whose label is known differ: "
            f"{'; '.join(shown)}"
        )


def _note_repeats(problems: Problems, known: Published, listed: ImageList) -> None:
    """Notes images that are on several lines: within a class, file names are unique."""
    names = listed.paths.parts()[1].arrow.dictionary_encode()
    codes = names.indices.to_numpy().astype(np.int64)
    images, lines = np.unique(codes * known.num_classes + listed.labels, return_counts=True)
    again = np.flatnonzero(lines > 1)
    if len(again) == 0:
        return
    shown = [
        f"{names.dictionary[code].as_py()} (class {_named(known, label)}, {count} lines)"
        for code, label, count in zip(
            *(part.tolist() for part in np.divmod(images[again[:6]], known.num_classes)),
            lines[again[:6]].tolist(),
            strict=True,
        )
    ]
    problems.add(f"{len(again):,} images are on several lines: {shown_names(shown)}")


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


@register_dataset("imagenet_lt")
def imagenet_lt(
    *,
    root: str | Path,
    train: str | Path | None = None,
    val: str | Path | None = None,
    test: str | Path | None = None,
) -> "dict[Split, Dataset]":
    """Builds ImageNet-LT from ImageNet's images (ILSVRC 2012) and the published lists.

    115,846 training images; 20 a class for validation, out of ImageNet's training images; for
    testing ImageNet's validation images, 50 a class. The training images are in
    ``train/<wnid>/``, those for testing in ``val/<wnid>/`` or in ``val/``, whatever the lists say.
    Classes are called by their wnid.

    The lists are checked: see :func:`~timm_lt.data.check_image_list`. Which images are in the
    training and the test list is not known, only how many of each class. Of a test list that has
    no directories of classes, the label of one image alone is checked beside that.

    Args:
        root: The folder with the images.
        train: The training list; None looks for ``ImageNet_LT_train.txt`` in the root and in its
            usual folders. A relative path is looked for in the root, then in the working directory.
        val: That of validation images, ``ImageNet_LT_val.txt``.
        test: That of test images, ``ImageNet_LT_test.txt``.

    Raises:
        UsageError: For all that is wrong at once: see
            :func:`~timm_lt.data.published.published_splits`.

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019,
        https://arxiv.org/abs/1904.05160
    """
    given: dict[Split, str | Path | None] = {"train": train, "val": val, "test": test}
    return published_splits(published("imagenet_lt"), root, given)


# Their code has no validation split here: the best epoch, and tau, are those of the test split.
@register_dataset("inat2018", selected_on_test="Kang et al., ICLR 2020")
def inat2018(
    *, root: str | Path, train: str | Path | None = None, test: str | Path | None = None
) -> "dict[Split, Dataset]":
    """Builds iNaturalist 2018 from the competition's images and lists.

    437,513 training images, and the official validation images, 3 a class, as the test split that
    papers report on: there is no split for validation, and a run holds out a part of training, or
    selects on the test split as Kang et al. did (``protocol="paper"``).
    The images are in ``train_val2018/<super category>/<class>/``, below the root or as the root.

    The lists are the official JSON files, or the text files of Kang et al. made of them. They are
    checked: see :func:`~timm_lt.data.check_image_list`. Classes have names if the list of training
    images, or that of test images, is JSON.

    Args:
        root: The folder with the images.
        train: The training list; None looks for ``iNaturalist18_train.txt`` and ``train2018.json``
            in the root and in its usual folders. A relative path is looked for in the root, then in
            the working directory.
        test: That of test images, ``iNaturalist18_val.txt`` or ``val2018.json``.

    Raises:
        UsageError: For all that is wrong at once: see
            :func:`~timm_lt.data.published.published_splits`.

    References:
        Van Horn et al., The iNaturalist Species Classification and Detection Dataset, CVPR 2018,
        https://arxiv.org/abs/1707.06642
    """
    return published_splits(published("inat2018"), root, {"train": train, "test": test})


@register_dataset("places_lt")
def places_lt(
    *,
    root: str | Path,
    train: str | Path | None = None,
    val: str | Path | None = None,
    test: str | Path | None = None,
) -> "dict[Split, Dataset]":
    """Builds Places-LT from the images of Places365-Standard and the published lists.

    62,500 training images; 20 a class for validation, out of Places365's training images; for
    testing Places365's validation images, 100 a class. Lists and images may each have either
    layout: ``train/apartment_building-outdoor/`` and ``val/<class>/``, or
    ``data_256/a/apartment_building/outdoor/`` and ``val_256/``; torchvision's
    ``data_256_standard`` and the large images are known too.

    The lists are checked: see :func:`~timm_lt.data.check_image_list`. Which images are in the test
    list is not known, only how many of each class. Five classes have other labels than in
    Places365: a list that numbers them so is refused, a test list without directories of classes
    by the labels of six images, which are all that is checked of it beside that.

    Args:
        root: The folder with the images.
        train: The training list; None looks for ``Places_LT_train.txt`` in the root and in its
            usual folders. A relative path is looked for in the root, then in the working directory.
        val: That of validation images, ``Places_LT_val.txt``.
        test: That of test images, ``Places_LT_test.txt``.

    Raises:
        UsageError: For all that is wrong at once: see
            :func:`~timm_lt.data.published.published_splits`.

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019,
        https://arxiv.org/abs/1904.05160
    """
    given: dict[Split, str | Path | None] = {"train": train, "val": val, "test": test}
    return published_splits(published("places_lt"), root, given)
