"""The data set folder: a directory of images per class, with or without directories for splits."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from timm_lt.data.decode import shown_path
from timm_lt.data.sources import SPLIT_WORDS, Split, find_root, register_dataset
from timm_lt.data.splits import (
    LabelArray,
    leave_out_small,
    note_alike_names,
    note_classes,
    splits_from_files,
)
from timm_lt.utils.checks import Problems, check_choice, shown_names
from timm_lt.utils.console import log

if TYPE_CHECKING:
    from datasets import Dataset

OtherFiles = Literal["raise", "skip"]
SKIP = "or leave them out with the data option other_files=skip"
# Formats that Pillow decodes, without those that share a suffix with other kinds of files (.ps,
# .pdf, .h5, .mpg).
IMAGE_SUFFIXES = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "gif", "webp", "avif", "bmp", "dib"),
        *("tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx"),
        *("tga", "qoi", "pcx"),
    )
)
# Photos of phones, which Pillow does not decode.
HEIC_SUFFIXES = frozenset(("heic", "heif"))
# Directories and files of operating systems, network storages and photo programs, in lower case:
# thumbnails, recycle bins, settings. Others begin with a dot.
SYSTEM_NAMES = frozenset(
    (
        *("thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db"),
        *("desktop.ini", "picasa.ini", "icon\r"),
        *("$recycle.bin", "recycler", "system volume information", "lost+found", "__macosx"),
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "@sharebin"),
        *("network trash folder", "temporary items"),
    )
)
# Sidecars of cameras and editors: previews and settings. a.jpg:Zone.Identifier is where Windows
# notes that a file was downloaded.
SIDECAR_SUFFIXES = frozenset(
    ("thm", "lrv", "lrf", "aae", "xmp", "ctg", "pp3", "dop", "nksc", "identifier")
)


@dataclass
class Found:
    """Contents of a directory and of those below it, without hidden files.

    Attributes:
        images: Image files by their suffix, in the order of torchvision's ``ImageFolder``.
        others: Files with other suffixes.
        loose: Images beside the directories of classes.
        broken: Entries that cannot be used, with the reason: links to nothing or to a directory
            that was listed already, directories that cannot be listed, names that are not UTF-8.
    """

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)


def find_images(directory: str, listed: dict[tuple[int, int], str] | None = None) -> Found:
    """Lists the image files in a directory and in those below it; links are followed.

    Args:
        directory: The directory.
        listed: Directories that were listed already, by device and inode; completed in place.
    """
    found = Found()
    _walk(directory, found, {} if listed is None else listed)
    found.images.sort(key=os.path.split)
    return found


def _walk(directory: str, found: Found, listed: dict[tuple[int, int], str]) -> None:
    status = Path(directory).stat()
    first = listed.setdefault((status.st_dev, status.st_ino), directory)
    if first != directory:
        found.broken[directory] = f"the same directory as {first}, by a link"
        return
    for entry in _entries(directory, found):
        try:
            if entry.is_dir():
                _walk(entry.path, found, listed)
            elif not entry.is_file():
                found.broken[entry.path] = "neither a file nor a directory"
            elif suffix(entry.name) in IMAGE_SUFFIXES:
                found.images.append(entry.path)
            else:
                found.others.append(entry.path)
        except OSError as error:
            # For example, links that lead to each other.
            found.broken[entry.path] = error.strerror or str(error)


def _entries(directory: str, found: Found) -> list["os.DirEntry[str]"]:
    """Returns the entries of a directory that are not hidden, sorted by name."""
    try:
        with os.scandir(directory) as entries:
            visible = sorted(
                (entry for entry in entries if not is_hidden(entry.name)), key=lambda e: e.name
            )
    except OSError as error:
        found.broken[directory] = error.strerror or str(error)
        return []
    # Bytes that are not UTF-8 are surrogates in the name, which cannot be encoded.
    unnamed = [e for e in visible if e.name.encode(errors="ignore").decode() != e.name]
    for entry in unnamed:
        shown = entry.path.encode(errors="backslashreplace").decode()
        found.broken[shown] = "its name is not UTF-8"
    return [entry for entry in visible if entry not in unnamed]


def is_hidden(name: str) -> bool:
    """Tells whether a file or directory belongs to a system, a storage or a camera.

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
    counts = Counter(map(suffix, paths))
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0] == "", item[0]))
    return ", ".join(f"{n} .{end}" if end else f"{n} without suffix" for end, n in order)


@dataclass
class ImageFolder:
    """Images of a folder, and the problems of its directories.

    Attributes:
        root: The folder, absolute.
        files: Image files by split; without directories for splits, all are ``"train"``.
        labels: Their labels.
        names: Class names, sorted, (C,).
        problems: Whatever keeps a run from training.
    """

    root: str
    files: dict[Split, list[str]]
    labels: dict[Split, LabelArray]
    names: list[str]
    problems: Problems


def list_folder(
    root: str | Path, *, min_images: int | None = None, other_files: OtherFiles = "raise"
) -> ImageFolder:
    """Lists a folder of images, and collects whatever keeps a run from training on it.

    Args:
        root: The folder.
        min_images: See :func:`folder`.
        other_files: See :func:`folder`.

    Raises:
        UsageError: If it does not exist or is not a folder, or an option is out of range.
    """
    check_choice("other_files", other_files, get_args(OtherFiles))
    root = find_root(root)
    problems = Problems(f"folder {shown_path(root)}")
    found = Found()
    splits = _split_directories(problems, root, _directories(root, found))
    images = ImageFolder(root, *_read_splits(root, splits, found), problems)
    if not images.files["train"]:
        if "train" in splits:
            problems.add(
                f"no images in directories of classes, {len(found.loose)} directly in it: make a "
                "directory for each class"
            )
        return images
    rows, images.labels, left = leave_out_small(images.labels, images.names, min_images)
    images.files = {s: [images.files[s][row] for row in rows[s].tolist()] for s in rows}
    images.names = left or []
    held_out = [split for split in get_args(Split) if split not in splits]
    note_alike_names(problems, images.names)
    note_classes(problems, images.labels, len(images.names), images.names, held_out)
    depth = splits["train"].count("/") + 2
    if len(images.names) == 1 and min(path.count("/") for path in images.files["train"]) > depth:
        problems.add(
            f"the only class, {shown_path(images.names[0])}, has directories and no images of its "
            "own: is it the root?"
        )
    _note_other_files(problems, root, found, other_files)
    return images


def _directories(directory: str, found: Found) -> list[str]:
    """Returns the names of the directories in one, and notes the images directly in it."""
    names = []
    for entry in _entries(directory, found):
        if entry.is_dir():
            names.append(entry.name)
        elif suffix(entry.name) in IMAGE_SUFFIXES | HEIC_SUFFIXES:
            # Other files beside the classes, such as a licence, do no harm.
            found.loose.append(entry.path)
    return names


def _split_directories(problems: Problems, root: str, names: Sequence[str]) -> dict[Split, str]:
    """Returns the directories of the splits; the root is that of train if it has classes."""
    words = {name: SPLIT_WORDS[name.lower()] for name in names if name.lower() in SPLIT_WORDS}
    others = [name for name in names if name not in words]
    if others or not words:
        for name in (name for name, split in words.items() if split == "train"):
            # A class may be called train, too: then images lie in it.
            found = Found()
            if _directories(f"{root}/{name}", found) and not found.loose:
                problems.add(
                    f"directories of classes lie beside {name}, which has classes of its own: "
                    f"{shown_names(others)}; move them into it, or elsewhere"
                )
                return {"train": f"{root}/{name}"}
        return {"train": root}
    splits: dict[Split, str] = {}
    for name, split in words.items():
        if split in splits:
            both = f"{splits[split].removeprefix(f'{root}/')} and {name}"
            problems.add(f"two directories are for {split}: {both}")
        splits.setdefault(split, f"{root}/{name}")
    if "train" not in splits:
        problems.add(f"there is no directory train beside {', '.join(words)}")
    return splits


def _read_splits(
    root: str, splits: Mapping[Split, str], found: Found
) -> tuple[dict[Split, list[str]], dict[Split, LabelArray], list[str]]:
    """Returns the files and labels of each split, and the class names."""
    listed: dict[tuple[int, int], str] = {}
    classes: dict[Split, dict[str, list[str]]] = {}
    for split, directory in splits.items():
        # The root was listed already.
        names = _directories(directory, Found() if directory == root else found)
        below = {name: find_images(f"{directory}/{name}", listed) for name in names}
        classes[split] = {name: images.images for name, images in below.items()}
        for images in below.values():
            found.others += images.others
            found.broken |= images.broken
    names = sorted({name for of_split in classes.values() for name in of_split})
    files: dict[Split, list[str]] = {"train": []}
    labels: dict[Split, LabelArray] = {"train": np.empty(0, np.int64)}
    for split, of_split in classes.items():
        parts = [of_split.get(name, []) for name in names]
        files[split] = [path for paths in parts for path in paths]
        labels[split] = np.repeat(np.arange(len(names)), [len(paths) for paths in parts])
    return files, labels, names


def _note_other_files(problems: Problems, root: str, found: Found, other_files: OtherFiles) -> None:
    """Notes or logs what is not an image in a class."""
    unusable = [f"{path} ({reason})" for path, reason in found.broken.items()]
    for what, paths, fix in (
        ("images in no class", found.loose, "move them into one"),
        (
            f"files that are not images by their suffix ({counted_suffixes(found.others)})",
            found.others,
            "move them elsewhere (HEIC, which Pillow does not decode: convert to JPEG)",
        ),
        ("files and directories that cannot be used", unusable, "repair or remove them"),
    ):
        if not paths:
            continue
        inside = [path.removeprefix(f"{root}/") for path in paths[:6]]
        shown = shown_names([shown_path(path) for path in inside])
        if other_files == "skip":
            log.info("%s, left out: %d (%s)", what, len(paths), shown)
        else:
            problems.add(f"{what}: {len(paths)} ({shown}); {fix}, {SKIP}")


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

    The classes are directories of the root, or of its directories ``train`` and, optionally,
    ``val`` (or ``valid``, ``validation``, ``dev``) and ``test``. They are sorted by name, as
    torchvision's ``ImageFolder`` does; a directory within a class belongs to it. Hidden files and
    those of systems, network storages and cameras are ignored, links are followed, and no image is
    opened.

    A test split that is missing is held out of each class, the same in every run. A validation
    split that is missing is held out by the run.

    Args:
        root: The folder.
        test_fraction: Part of each class that is held out for the test, in (0, 1).
        min_images: Leaves out classes with fewer training images, and names them in the log; None
            keeps all.
        other_files: ``"skip"`` leaves out files in class directories that are not images by their
            suffix, entries that cannot be used, and images outside the class directories;
            ``"raise"`` refuses them.
        seed: Seed of the choice of the test images, a non-negative integer.

    Raises:
        UsageError: For everything that is wrong with the folder at once: it has no class, a class
            has no image or too few to be held out, class names differ only in case, there are
            other files; then also for images that are damaged.
    """
    found = list_folder(root, min_images=min_images, other_files=other_files)
    return splits_from_files(
        found.problems,
        found.files,
        found.labels,
        found.names,
        root=found.root,
        test_fraction=test_fraction,
        seed=seed,
    )
