"""The data sets imagenet_lt, places_lt and inat2018: published lists on official images."""

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
import pyarrow.compute as pc
from numpy.typing import NDArray

from timm_lt.data.list_files import ImageList, Paths, read_image_list
from timm_lt.data.lists import joined, located, note_missing, note_repeats
from timm_lt.data.sources import Split, find_root, register_dataset
from timm_lt.data.splits import splits_from_files
from timm_lt.utils.checks import Problems, UsageError, check_choice, shown_names

if TYPE_CHECKING:
    from datasets import Dataset

FACTS = Path(__file__).parent / "facts"
# The data sets, each with a file of its name in FACTS.
NAMES = ("imagenet_lt", "places_lt", "inat2018")
# Files that are looked for to find the layout of the images.
SAMPLE = 64


@dataclass(frozen=True)
class PublishedList:
    """Known facts about a published list.

    Attributes:
        files: Names under which it is published.
        lines: Number of images N.
        layouts: Places of an image below the root: ``{name}`` is the directory of its class,
            ``{nested}`` the same in Places365's second layout, ``{file}`` the end of its path.
        needs: The download with the images, and how to unpack it.
        class_counts: Images per class, (C,), if known.
        group_totals: Images by the directory above that of the class, if known.
        probes: Labels of a few images by file name, for lists without directories of classes.
        sha256: SHA-256 of the sorted lines ``basename label``, joined by newlines, if known.
    """

    files: tuple[str, ...]
    lines: int
    layouts: tuple[str, ...]
    needs: str
    class_counts: NDArray[np.int64] | None = None
    group_totals: Mapping[str, int] = field(default_factory=dict)
    probes: Mapping[str, int] = field(default_factory=dict)
    sha256: str | None = None


@dataclass(frozen=True)
class Published:
    """Known facts about a data set that published lists define.

    Attributes:
        title: Its name in papers.
        num_classes: Number of classes C.
        class_names: Names of the directories of the classes, (C,); None if those are the labels.
        class_pattern: Regular expression with the class in a path as group ``name``, and the
            directory above it as ``group``.
        depth: Number of components at the end of a path that are the same in every layout.
        lists: The lists by split.
        folders: Folders below the root where the lists are looked for.
        where: Where the lists are published.
    """

    title: str
    num_classes: int
    class_names: list[str] | None
    class_pattern: str
    depth: int
    lists: Mapping[Split, PublishedList]
    folders: tuple[str, ...]
    where: str

    @property
    def directories(self) -> list[str]:
        """Name of the directory of each class, (C,)."""
        return self.class_names or [str(label) for label in range(self.num_classes)]


@lru_cache
def published(name: str) -> Published:
    """Returns the known facts about a data set.

    Raises:
        UsageError: If there are none; lists the data sets.
    """
    check_choice("data set with published lists", name, NAMES)
    content: dict[str, Any] = json.loads((FACTS / f"{name}.json").read_text("utf-8"))
    lists = content.pop("lists")
    for split, facts in lists.items():
        each = facts.pop("images_per_class", None)
        counts = facts.pop("class_counts", each and [each] * content["num_classes"])
        class_counts = None if counts is None else np.array(counts, np.int64)
        lists[split] = PublishedList(**facts, class_counts=class_counts)
    # Other fields say where the facts come from, for readers of the file.
    fields = {key: content[key] for key in Published.__annotations__ if key in content}
    return Published(**fields, lists=lists)


def check_image_list(name: str, split: Split, path: str | Path) -> ImageList:
    """Checks that a list is the published one, as far as that is known, without any image.

    The images themselves are known, by a hash, of both Places-LT lists beside the test list and of
    ImageNet-LT's validation list. Of the others the number of images of every class is known, or
    for the training list of iNaturalist 2018 the totals of the super categories. In all lists the
    directory of an image must be that of its label; of a test list without directories of classes
    only the labels of a few images are known. No image may be listed more than once.

    Args:
        name: ``"imagenet_lt"``, ``"places_lt"`` or ``"inat2018"``.
        split: ``"train"``, ``"val"`` or ``"test"``. iNaturalist 2018 has no ``"val"``: its
            validation list is the test split that papers report on.
        path: The list, in a format of :func:`~timm_lt.data.read_image_list`.

    Returns:
        The list.

    Raises:
        UsageError: If it is another list; names the first known difference.
    """
    known = published(name)
    check_choice(f"split of {name!r}", split, tuple(known.lists))
    listed = _read(known, split, Path(path))
    problems = Problems(str(path))
    note_repeats(problems, {split: listed.paths}, {split: listed.labels})
    problems.check()
    return listed


def _read(known: Published, split: Split, path: Path) -> ImageList:
    listed = read_image_list(path)
    if difference := find_difference(known, split, listed):
        raise UsageError(
            f"{path} is not the published {split} list of {known.title}: {difference}; for a list "
            "of your own use the data set 'list'"
        )
    return listed


def find_difference(known: Published, split: Split, listed: ImageList) -> str | None:
    """Returns the first known difference of a list from the published one, if there is one."""
    expected, labels = known.lists[split], listed.labels
    if len(labels) != expected.lines:
        return f"it has {len(labels):,} images, not {expected.lines:,}"
    if labels.max() >= known.num_classes:
        return f"label {labels.max()} is not below the number of classes, {known.num_classes:,}"
    if expected.class_counts is not None:
        counts = np.bincount(labels, minlength=known.num_classes)
        for label in np.flatnonzero(counts != expected.class_counts).tolist():
            name = f"{label} ({known.class_names[label]})" if known.class_names else label
            return (
                f"class {name} has {counts[label]:,} images, not {expected.class_counts[label]:,}"
            )
    found = _difference_of_directories(known, expected, listed)
    if found is None and expected.sha256 not in (None, pairs_hash(listed)):
        return "the classes have the right numbers of images, but some images are others"
    return found


def _difference_of_directories(
    known: Published, expected: PublishedList, listed: ImageList
) -> str | None:
    """Returns the first image or group of classes that the directories or probes show to differ."""
    found = pc.extract_regex(listed.paths.arrow, known.class_pattern)
    # In Places365's second layout, a class may be a directory within another.
    names = pc.replace_substring(pc.struct_field(found, "name"), "/", "-")
    right = pa.array(known.directories).take(pa.array(listed.labels))
    wrong = pc.indices_nonzero(pc.not_equal(names, right)).to_pylist()
    if wrong:
        return (
            f"{len(wrong):,} images are in the directory of another class than their label's, e.g. "
            f"{listed.paths[wrong[0]]}, whose label {listed.labels[wrong[0]]} is "
            f"{right[wrong[0]].as_py()}"
        )
    if expected.group_totals:
        groups = pc.value_counts(pc.struct_field(found, "group")).to_pylist()
        totals = {group["values"]: group["counts"] for group in groups}
        for group in [*expected.group_totals, *totals]:
            if totals.get(group, 0) != (wanted := expected.group_totals.get(group, 0)):
                return f"{group} has {totals.get(group, 0):,} images, not {wanted:,}"
    files = _ends(listed.paths, 1)
    for name, label in expected.probes.items():
        rows = pc.indices_nonzero(pc.equal(files, name)).to_numpy()
        if listed.labels[rows].tolist() != [label]:
            return f"{name} has label {shown_names(listed.labels[rows]) or None}, not {label}"
    return None


def _ends(paths: Paths, depth: int) -> pa.Array:
    """Returns the last components of paths."""
    pattern = rf"(?P<end>[^/]+(?:/[^/]+){{{depth - 1}}})$"
    return pc.struct_field(pc.extract_regex(paths.arrow, pattern), "end")


def pairs_hash(listed: ImageList) -> str:
    """Returns the SHA-256 of the sorted lines ``basename label``: equal in every layout."""
    pairs = sorted(zip(_ends(listed.paths, 1).to_pylist(), listed.labels.tolist(), strict=True))
    return sha256("\n".join(f"{name} {label}" for name, label in pairs).encode()).hexdigest()


def published_splits(
    known: Published, root: str | Path, given: Mapping[Split, str | Path | None]
) -> "dict[Split, Dataset]":
    """Builds the splits of a data set that published lists define.

    Args:
        known: The facts about the lists.
        root: The folder with the images.
        given: The lists by split; None looks for the list in the root and its usual folders.

    Raises:
        UsageError: For everything that is wrong at once: a list is missing or is not the published
            one, or the images do not exist; names the download. Then also for images that are
            damaged.
    """
    folder = find_root(root)
    problems = Problems(f"{known.title} in {folder}")
    lists: dict[Split, ImageList] = {}
    files: dict[Split, Paths] = {}
    for split, path in given.items():
        with problems.collected(f"{split} list: "):
            place = _find(known, split, folder) if path is None else located(path, folder)
            lists[split] = _read(known, split, place)
    for split, listed in lists.items():
        layout = _layout(known, split, listed, folder)
        if layout is None:
            entries = sorted(entry.name for entry in Path(folder).iterdir())
            problems.add(
                f"the images of the {split} split do not exist, e.g. {listed.paths[0]}: "
                f"{known.title} needs {known.lists[split].needs}; {folder} contains "
                f"{shown_names(entries, 8) or 'nothing'}"
            )
            continue
        files[split] = _laid_out(known, layout, listed, folder)
        note_missing(problems, split, files[split], folder)
    labels = {split: listed.labels for split, listed in lists.items()}
    if files:
        note_repeats(problems, files, labels)
    names = known.class_names or next((one.names for one in lists.values() if one.names), None)
    return splits_from_files(problems, files, labels, names, root=folder)


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


def _layout(known: Published, split: Split, listed: ImageList, root: str) -> str | None:
    """Returns the layout in which most images of a sample exist, if any does; "" is as listed."""
    rows = np.unique(np.linspace(0, len(listed.labels) - 1, SAMPLE).astype(np.int64))
    sample = listed.select(rows)
    hits = {
        layout: sum(map(os.path.isfile, _laid_out(known, layout, sample, root)))
        for layout in ("", *known.lists[split].layouts)
    }
    best = max(hits, key=lambda layout: hits[layout])
    return best if hits[best] else None


def _laid_out(known: Published, layout: str, listed: ImageList, root: str) -> Paths:
    """Returns the files of a list in a layout."""
    if not layout:
        return joined(root, listed.paths)
    parent = layout.rpartition("/")[0]
    directories = [
        f"{root}/" + parent.format(name=name, nested=f"{name[0]}/{name.replace('-', '/')}")
        for name in known.directories
    ]
    starts = pc.utf8_rtrim(pa.array(directories), "/").take(pa.array(listed.labels))
    ends = _ends(listed.paths, known.depth)
    return Paths(pc.binary_join_element_wise(starts.cast(ends.type), ends, "/"))


@register_dataset("imagenet_lt")
def imagenet_lt(
    *,
    root: str | Path,
    train: str | Path | None = None,
    val: str | Path | None = None,
    test: str | Path | None = None,
) -> "dict[Split, Dataset]":
    """Builds ImageNet-LT from ImageNet's images (ILSVRC 2012) and the published lists.

    115,846 training images of 1,000 classes, 1,280 to 5 each; 20 a class for validation, out of
    ImageNet's training images; ImageNet's validation images, 50 a class, for the test. Training
    images are in ``train/<wnid>/``, test images in ``val/<wnid>/`` or in ``val/``, whatever the
    lists say. The lists are checked: see :func:`~timm_lt.data.check_image_list`.

    Args:
        root: The folder with the images.
        train: The training list; None looks for ``ImageNet_LT_train.txt`` in the root and in its
            usual folders. A relative path is looked for in the root, then in the working directory.
        val: The list of validation images, ``ImageNet_LT_val.txt``.
        test: The list of test images, ``ImageNet_LT_test.txt``.

    Raises:
        UsageError: As :func:`published_splits`.

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019,
        https://arxiv.org/abs/1904.05160
    """
    given: dict[Split, str | Path | None] = {"train": train, "val": val, "test": test}
    return published_splits(published("imagenet_lt"), root, given)


# Their code has no validation split here: the best epoch and tau are those of the test split.
@register_dataset("inat2018", selected_on_test="Kang et al., ICLR 2020")
def inat2018(
    *, root: str | Path, train: str | Path | None = None, test: str | Path | None = None
) -> "dict[Split, Dataset]":
    """Builds iNaturalist 2018 from the competition's images and lists.

    437,513 training images of 8,142 species, 1,000 to 2 each; the official validation images, 3 a
    class, are the test split that papers report on. There is no validation split: a run holds out
    a part of training, or selects on the test split as Kang et al. did (``protocol="paper"``).
    Images are in ``train_val2018/<super category>/<class>/``, below the root or as the root. The
    lists are checked: see :func:`~timm_lt.data.check_image_list`. Classes have names if a list is
    JSON.

    Args:
        root: The folder with the images.
        train: The training list, the official JSON file or the text file of Kang et al.; None looks
            for ``iNaturalist18_train.txt`` and ``train2018.json`` in the root and in its usual
            folders. A relative path is looked for in the root, then in the working directory.
        test: The list of test images, ``iNaturalist18_val.txt`` or ``val2018.json``.

    Raises:
        UsageError: As :func:`published_splits`.

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

    62,500 training images of 365 classes, 4,980 to 5 each; 20 a class for validation, out of
    Places365's training images; Places365's validation images, 100 a class, for the test. Lists and
    images may each have either layout of Places365: ``train/<class>/`` and ``val/<class>/``, or
    ``data_256/<letter>/<class>/`` and ``val_256/``. Five classes have other labels than in
    Places365; a list with those of Places365 is refused. The lists are checked: see
    :func:`~timm_lt.data.check_image_list`.

    Args:
        root: The folder with the images.
        train: The training list; None looks for ``Places_LT_train.txt`` in the root and in its
            usual folders. A relative path is looked for in the root, then in the working directory.
        val: The list of validation images, ``Places_LT_val.txt``.
        test: The list of test images, ``Places_LT_test.txt``.

    Raises:
        UsageError: As :func:`published_splits`.

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019,
        https://arxiv.org/abs/1904.05160
    """
    given: dict[Split, str | Path | None] = {"train": train, "val": val, "test": test}
    return published_splits(published("places_lt"), root, given)
