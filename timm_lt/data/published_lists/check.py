"""A list against what is known of the published one, without an image."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from timm_lt.data.lists import ImageList, Paths, read_image_list
from timm_lt.data.published_lists.facts import NAMES, Published, PublishedList, published
from timm_lt.data.sources import Split
from timm_lt.utils.checks import Problems, check_choice, shown_names


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
