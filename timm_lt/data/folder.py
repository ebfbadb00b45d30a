"""folder: a directory of images per class, with or without directories for the splits.

The image files below a directory, listed without opening one.

A directory of images per class, listed: what it has, and what is wrong with its directories.
"""

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from timm_lt.data.damaged import note_damaged_files
from timm_lt.data.decode import shown_path
from timm_lt.data.sources import SPLIT_WORDS, Split, dataset_from_files, register_dataset
from timm_lt.data.splits import hold_out, path_keys, small_classes
from timm_lt.utils.checks import (
    Problems,
    UsageError,
    check_choice,
    check_integer,
    check_number,
    shown_names,
)
from timm_lt.utils.console import log

if TYPE_CHECKING:
    from datasets import Dataset

# By what files that Pillow decodes are called. Of formats that share a suffix with others (.ps,
# .pdf, .h5, .mpg), or that are made by one program only, none is taken for an image.
IMAGE_SUFFIXES = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "gif", "webp", "avif", "bmp", "dib"),
        *("tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx"),
        *("tga", "qoi", "pcx"),
    )
)
# Images of telephones that Pillow does not decode.
HEIC_SUFFIXES = frozenset(("heic", "heif"))
# Directories and files of systems, network storages and cameras beside the user's own, in lower
# case: thumbnails, recycle bins, settings. All others begin with a dot.
SYSTEM_NAMES = frozenset(
    (
        *("thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db"),
        *("desktop.ini", "picasa.ini", "icon\r"),
        *("$recycle.bin", "recycler", "system volume information", "lost+found", "__macosx"),
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "@sharebin"),
        *("network trash folder", "temporary items"),
    )
)
# Files that cameras and editors put beside an image or a video: previews and settings; and
# a.jpg:Zone.Identifier, where Windows notes that a file was downloaded.
SIDECAR_SUFFIXES = frozenset(
    ("thm", "lrv", "lrf", "aae", "xmp", "ctg", "pp3", "dop", "nksc", "identifier")
)


@dataclass
class Found:
    """What there is below a directory, hidden files left out.

    Attributes:
        images: Files that are called as images are, in the order of torchvision's ``ImageFolder``.
        others: Files that are not.
        broken: What is neither a file nor a directory, such as a link to nothing, and directories
            that cannot be listed or contain themselves, each with the reason.
        unnamed: What has a name that is not in UTF-8.
        directories: That directory and those below it, each with what it is whatever its name.
    """

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    unnamed: list[str] = field(default_factory=list)
    directories: dict[str, tuple[int, int]] = field(default_factory=dict)


def find_images(directory: str) -> Found:
    """Lists the image files in a directory and in those below it; links are followed."""
    found = Found()
    parts: list[tuple[str, list[str]]] = []
    _walk(directory, found, parts, within=frozenset())
    for part, names in sorted(parts):
        found.images += [f"{part}/{name}" for name in sorted(names)]
    return found


def _walk(
    directory: str,
    found: Found,
    parts: list[tuple[str, list[str]]],
    within: frozenset[tuple[int, int]],
) -> None:
    names: list[str] = []
    below: list[str] = []
    for entry in entries_of(directory, found):
        path = f"{directory}/{entry.name}"
        try:
            if entry.is_dir():
                below.append(path)
            elif not entry.is_file():
                found.broken[path] = "neither a file nor a directory"
            elif suffix(entry.name) in IMAGE_SUFFIXES:
                names.append(entry.name)
            else:
                found.others.append(path)
        except OSError as error:
            # Such as links that lead to each other.
            found.broken[path] = error.strerror or str(error)
    parts.append((directory, names))
    found.directories[directory] = _identity(directory)
    within |= {found.directories[directory]}
    for path in sorted(below):
        if _identity(path) in within:
            found.broken[path] = "a link to a directory that it is in"
        else:
            _walk(path, found, parts, within)


def _identity(directory: str) -> tuple[int, int]:
    status = Path(directory).stat()
    return status.st_dev, status.st_ino


def entries_of(directory: str, found: Found) -> Iterator["os.DirEntry[str]"]:
    """Yields what is in a directory and not hidden, in no order; notes what has no right name."""
    try:
        with os.scandir(directory) as entries:
            visible = [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        found.broken[directory] = error.strerror or str(error)
        return
    # All names are checked at once.
    if _is_utf8("".join(entry.name for entry in visible)):
        yield from visible
        return
    for entry in visible:
        if _is_utf8(entry.name):
            yield entry
        else:
            found.unnamed.append(f"{directory}/{entry.name}")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_hidden(name: str) -> bool:
    """Returns whether a file or directory belongs to a system, a storage or a camera.

    >>> is_hidden("@eaDir"), is_hidden("._1.jpg"), is_hidden("IMG_1.XMP"), is_hidden("1.jpg")
    (True, True, True, False)
    """
    is_system = name.startswith(".") or name.lower() in SYSTEM_NAMES
    return is_system or suffix(name) in SIDECAR_SUFFIXES


def visible_files(root: Path, pattern: str) -> list[Path]:
    """Returns the files below a directory whose names match, sorted, without hidden ones."""
    return [
        path
        for path in sorted(root.rglob(pattern))
        if not any(map(is_hidden, path.relative_to(root).parts))
    ]


def suffix(path: str) -> str:
    """Returns the suffix of a file name in lower case without its dot.

    >>> suffix("a/b.JPG"), suffix("a.b/c")
    ('jpg', '')
    """
    name = path.rpartition("/")[2]
    _, dot, end = name.rpartition(".")
    return end.lower() if dot else ""


def counted_suffixes(paths: Iterable[str]) -> str:
    """Returns how many files there are of each suffix, the most frequent first.

    >>> counted_suffixes(["a.txt", "b.csv", "c.txt", "d"])
    '2 .txt, 1 .csv, 1 without suffix'
    """
    counts: dict[str, int] = {}
    for path in paths:
        counts[suffix(path)] = counts.get(suffix(path), 0) + 1
    words = sorted(counts.items(), key=lambda item: (-item[1], item[0] == "", item[0]))
    return ", ".join(f"{n} .{end}" if end else f"{n} without suffix" for end, n in words)


@dataclass
class ImageFolder:
    """What a folder of images has.

    Attributes:
        root: The folder, absolute.
        images: Image files by class and split; without directories for splits all are ``"train"``.
        has_splits: Whether it has directories for splits.
        loose: Images that lie in no class.
        found: What else there is in class directories.
        problems: What is wrong with its directories.
    """

    root: str
    images: dict[Split, dict[str, list[str]]] = field(default_factory=dict)
    has_splits: bool = False
    loose: list[str] = field(default_factory=list)
    found: Found = field(default_factory=Found)
    problems: Problems = field(default_factory=Problems)

    def shown(self, paths: Iterable[str]) -> str:
        """Returns the first of many files or directories, as seen from the root."""
        inside = [path.removeprefix(f"{self.root}/") for path in paths]
        return shown_names([shown_path(path) for path in inside])

    @property
    def names(self) -> list[str]:
        """Names of the classes that training has, sorted."""
        return sorted(self.images.get("train", {}))

    def files(self, split: Split) -> tuple[list[str], NDArray[np.int64]]:
        """Returns the images of a split by class, of those that training has, and their labels."""
        of_class = [self.images[split].get(name, []) for name in self.names]
        labels = np.repeat(np.arange(len(of_class)), [len(paths) for paths in of_class])
        return [path for paths in of_class for path in paths], labels


def read_folder(root: str | Path) -> ImageFolder:
    """Lists a folder of images, and notes what is wrong with its directories.

    Raises:
        UsageError: If it is missing, or no folder.
    """
    path = Path(os.path.abspath(Path(root).expanduser()))  # noqa: PTH100 - links stay as they are
    if not path.exists():
        raise UsageError(f"root {shown_path(str(path))} does not exist")
    if not path.is_dir():
        raise UsageError(
            f"root {shown_path(str(path))} is a file: it must be the folder with the classes"
        )
    images = ImageFolder(str(path), problems=Problems(f"folder {shown_path(str(path))}"))
    directories, loose = _directories(images, images.root)
    images.loose += loose
    words = {name: SPLIT_WORDS[name.lower()] for name in directories if name.lower() in SPLIT_WORDS}
    images.has_splits = _has_splits(images, directories, words)
    if not images.has_splits:
        if directories:
            images.images["train"] = _read_classes(images, images.root, directories)
        return images
    for name, split in sorted(words.items()):
        if split in images.images:
            both = [f"{images.root}/{other}" for other in words if words[other] == split]
            images.problems.add(f"two directories are for {split}: {images.shown(both)}")
            continue
        directory = f"{images.root}/{name}"
        classes, loose = _directories(images, directory)
        images.loose += loose
        images.images[split] = _read_classes(images, directory, classes)
    if "train" not in images.images:
        images.problems.add(
            f"there is no directory train beside {', '.join(sorted(words))}: it has the classes "
            "to train on"
        )
    return images


def _directories(images: ImageFolder, directory: str) -> tuple[list[str], list[str]]:
    """Returns the names of the directories in one, and the images that lie in it."""
    names, loose = [], []
    for entry in entries_of(directory, images.found):
        if entry.is_dir():
            names.append(entry.name)
        elif suffix(entry.name) in IMAGE_SUFFIXES | HEIC_SUFFIXES:
            # Other files beside the classes, such as a licence, do no harm.
            loose.append(f"{directory}/{entry.name}")
    return sorted(names), sorted(loose)


def _has_splits(images: ImageFolder, directories: list[str], words: Mapping[str, Split]) -> bool:
    """Tells whether the directories are those of splits and not of classes."""
    if not words or len(words) == len(directories):
        return bool(words)
    for name, split in words.items():
        if split == "train":
            # A class may be called train, or test: its images lie in it.
            classes, loose = _directories(images, f"{images.root}/{name}")
            if classes and not loose:
                others = [name for name in directories if name not in words]
                images.problems.add(
                    f"directories of classes lie beside {name}, which has classes of its own: "
                    f"{images.shown(others)}; move them into it, or elsewhere"
                )
                return True
    return False


def _read_classes(images: ImageFolder, directory: str, names: list[str]) -> dict[str, list[str]]:
    classes = {}
    for name in names:
        found = find_images(f"{directory}/{name}")
        classes[name] = found.images
        images.found.others += found.others
        images.found.broken |= found.broken
        images.found.unnamed += found.unnamed
        images.found.directories |= found.directories
    return classes


OtherFiles = Literal["raise", "skip"]
ORDER = get_args(Split)

SKIP = "or leave them out with the data option other_files=skip"


@register_dataset("folder")
def folder(
    *,
    root: str | Path,
    test_fraction: float = 0.2,
    min_images: int | None = None,
    other_files: OtherFiles = "raise",
    seed: int = 0,
) -> "dict[Split, Dataset]":
    """Builds the splits of a folder with a directory of images for each class.

    Either the classes are directories of the root, or the root has a directory ``train`` with the
    classes and perhaps one ``val`` (or ``valid``, ``validation``, ``dev``) and ``test``. Classes
    are sorted by name as torchvision's ``ImageFolder`` does; a directory within a class belongs to
    it. Hidden files, and those of systems, network storages and cameras, are passed over, links
    are followed, no image is opened.

    Without a directory for it, the test split is a part of each class, the same in every run.
    Without one for validation there is none: a run holds out a part of what is left.

    Args:
        root: The folder.
        test_fraction: That part, in (0, 1).
        min_images: Classes with fewer training images are left out, and named in the log; None
            leaves out none.
        other_files: What happens if class directories have files that are no images by their
            suffix, or an image lies in no class: ``"skip"`` leaves them out.
        seed: Of the choice of the test images, a non-negative integer.

    Raises:
        UsageError: For all that is wrong with the folder at once: it is missing or has no class, a
            class has no image or too few to be held out, names differ in case only, the splits
            differ in their classes, there are other files; then also images that are damaged.
    """
    check_number("test_fraction", test_fraction, "(0, 1)")
    check_integer("seed", seed, minimum=0)
    images = list_folder(root, min_images=min_images, other_files=other_files)
    if images.problems.found:
        note_damaged_files(images.problems, {s: images.files(s)[0] for s in images.images})
    images.problems.check()
    files = {split: images.files(split) for split in images.images}
    if "test" not in files:
        paths, labels = files["train"]
        keys = path_keys(paths, images.root)
        train, test = hold_out(
            labels, test_fraction, seed=seed, keys=keys, purpose="test", names=images.names
        )
        files["train"] = [paths[row] for row in train.tolist()], labels[train.numpy()]
        files["test"] = [paths[row] for row in test.tolist()], labels[test.numpy()]
    return {
        split: dataset_from_files(paths, labels, images.names)
        for split, (paths, labels) in sorted(files.items(), key=lambda item: ORDER.index(item[0]))
    }


def list_folder(
    root: str | Path, *, min_images: int | None = None, other_files: OtherFiles = "raise"
) -> ImageFolder:
    """Lists a folder of images, and notes all that would keep a run from training on it.

    Args:
        root: The folder.
        min_images: As of :func:`folder`.
        other_files: As of :func:`folder`.

    Raises:
        UsageError: If it is missing, or no folder, or an option is wrong.
    """
    check_choice("other_files", other_files, get_args(OtherFiles))
    if min_images is not None:
        check_integer("min_images", min_images, minimum=1)
    images = read_folder(root)
    leave_out_small(images, min_images)
    check_folder(images, other_files)
    return images


def leave_out_small(images: ImageFolder, min_images: int | None) -> None:
    """Leaves out the classes with fewer training images, in every split."""
    train = images.images.get("train", {})
    with images.problems.collected():
        small = small_classes({name: len(train[name]) for name in sorted(train)}, min_images)
        for classes in images.images.values():
            for name in small:
                classes.pop(name, None)


def check_folder(images: ImageFolder, other_files: OtherFiles = "raise") -> None:
    """Notes what of a folder's classes and files keeps a run from training on it."""
    _check_repeated(images)
    if not any(images.images.values()):
        straight = f", {len(images.loose)} straight in it" if images.loose else ""
        images.problems.add(
            f"no images in directories of classes{straight}: make a directory for each class"
        )
    else:
        _check_numbers(images)
        _check_names(images)
        _check_same_classes(images)
        _check_loose(images, other_files)
    _check_files(images, other_files)


def _check_repeated(images: ImageFolder) -> None:
    """Checks that no directory is there twice, by a link: its images could be in two splits."""
    first: dict[tuple[int, int], str] = {}
    repeated: dict[str, str] = {}
    for path, identity in sorted(images.found.directories.items()):
        known = first.setdefault(identity, path)
        if known != path:
            repeated[path] = known
    # Of a directory with others in it, that alone is named.
    top = [path for path in repeated if path.rpartition("/")[0] not in repeated]
    if top:
        shown = [f"{images.shown([path])} is {images.shown([repeated[path]])}" for path in top]
        images.problems.add(
            f"directories that are there twice, by links: {len(top)} ({shown_names(shown)}); "
            "remove the links"
        )


def _check_loose(images: ImageFolder, other_files: OtherFiles) -> None:
    if not images.loose:
        return
    number, shown = len(images.loose), images.shown(images.loose)
    if other_files == "skip":
        log.info("images in no class, left out: %d (%s)", number, shown)
    else:
        images.problems.add(f"images in no class: {number} ({shown}); move them into one, {SKIP}")


def _check_files(images: ImageFolder, other_files: OtherFiles) -> None:
    found, add = images.found, images.problems.add
    if found.unnamed:
        # Of names that are no text, the bytes are shown.
        shown = shown_names([ascii(Path(path).name) for path in sorted(found.unnamed)])
        add(f"names that are not in UTF-8: {len(found.unnamed)} ({shown}); rename them")
    heic = [path for path in found.others if suffix(path) in HEIC_SUFFIXES]
    if other_files == "skip":
        if found.others:
            log.info(
                "files that are no images, left out: %d (%s)",
                len(found.others),
                counted_suffixes(found.others),
            )
        for path, reason in found.broken.items():
            log.info("left out: %s is %s", images.shown([path]), reason)
        return
    others = [path for path in found.others if suffix(path) not in HEIC_SUFFIXES]
    if heic:
        add(
            f"HEIC files, which Pillow does not decode: {len(heic)} ({images.shown(heic)}); "
            f"convert them to JPEG, {SKIP}"
        )
    if others:
        add(
            f"files that are no images by their suffix: {len(others)} "
            f"({images.shown(others)}: {counted_suffixes(others)}); move them away, {SKIP}"
        )
    if found.broken:
        shown = shown_names(
            [f"{images.shown([path])}: {reason}" for path, reason in found.broken.items()]
        )
        add(f"what cannot be read: {len(found.broken)} ({shown}); mend or remove it, {SKIP}")


def _check_numbers(images: ImageFolder) -> None:
    """Checks that every class has an image for each split that is made of it."""
    train = images.images.get("train", {})
    empty = [name for name in sorted(train) if not train[name]]
    if train and len(empty) == len(train):
        images.problems.add(
            f"none of the {len(train)} classes has an image: {images.shown(empty)}; is it the "
            "right folder?"
        )
        return
    if empty:
        images.problems.add(
            f"{len(empty)} of {len(train)} classes have no image: {images.shown(empty)}; remove "
            "their directories, or leave them out with the data option min_images=1"
        )
    splits = [split for split in get_args(Split) if split == "train" or split not in images.images]
    needed = len(splits)
    few = {name: len(train[name]) for name in sorted(train) if 0 < len(train[name]) < needed}
    if few:
        shown = shown_names([f"{images.shown([name])} ({number})" for name, number in few.items()])
        others = len(few) + len(empty) < len(train)
        leave = f"leave them out with the data option min_images={needed}, or " if others else ""
        images.problems.add(
            f"{len(few)} of {len(train)} classes have fewer than {needed} images, one each for "
            f"{', '.join(splits)}: {shown}; {leave}add images"
        )
    if len(train) == 1:
        ((name, paths),) = train.items()
        inside = {path[len(images.root) :].count("/") for path in paths}
        if inside and min(inside) > 2 + images.has_splits:
            images.problems.add(
                f"the only class, {images.shown([name])}, has directories and no image of its own: "
                "is it the root?"
            )


def _check_names(images: ImageFolder) -> None:
    """Checks that no two classes are called the same but for case, blanks or composed letters."""
    alike: dict[str, list[str]] = {}
    for name in sorted({name for classes in images.images.values() for name in classes}):
        key = unicodedata.normalize("NFC", " ".join(name.split())).casefold()
        alike.setdefault(key, []).append(name)
    same = [" and ".join(map(repr, names)) for names in alike.values() if len(names) > 1]
    if same:
        images.problems.add(
            f"names of classes that differ only in case, blanks or composed letters: {len(same)} "
            f"({shown_names(same)}); make one class of them, or rename them"
        )


def _check_same_classes(images: ImageFolder) -> None:
    train = images.images.get("train")
    if train is None:
        return
    for split in ("val", "test"):
        classes = images.images.get(split)
        if classes is None:
            continue
        unknown = sorted(set(classes) - set(train))
        if unknown:
            images.problems.add(
                f"classes of {split} that train lacks: {len(unknown)} ({images.shown(unknown)})"
            )
        # A class without a test image has no accuracy; the report says so.
        missing = sorted(name for name in train if not classes.get(name))
        if missing and split == "val":
            images.problems.add(
                f"classes of train without an image in val: {len(missing)} "
                f"({images.shown(missing)})"
            )
