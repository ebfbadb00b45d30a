"""The data set folder: a directory of images per class, with or without directories for splits."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from timm_lt.data.decode import shown_path
from timm_lt.data.sources import SPLIT_WORDS, Paths, Split, find_root, register_dataset
from timm_lt.data.splits import ImageFiles
from timm_lt.utils.checks import Problems, check_choice, shown_names
from timm_lt.utils.console import log

if TYPE_CHECKING:
    from datasets import Dataset

OtherFiles = Literal["raise", "skip"]
# Formats that Pillow decodes, without suffixes of other kinds of files (.ps, .pdf, .h5, .mpg).
IMAGE_SUFFIXES = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "gif", "webp", "avif", "bmp", "dib"),
        *("tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx"),
        *("tga", "qoi", "pcx"),
    )
)
# Photos of phones, which Pillow does not decode.
HEIC_SUFFIXES = frozenset(("heic", "heif"))
# Directories and files of operating systems, network storages and photo programs, in lower case;
# others begin with a dot.
SYSTEM_NAMES = frozenset(
    (
        *("thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db"),
        *("desktop.ini", "picasa.ini", "icon\r"),
        *("$recycle.bin", "recycler", "system volume information", "lost+found", "__macosx"),
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "@sharebin"),
        *("network trash folder", "temporary items"),
    )
)
# Sidecars of cameras and editors, and of downloads on Windows (a.jpg:Zone.Identifier).
SIDECAR_SUFFIXES = frozenset(
    ("thm", "lrv", "lrf", "aae", "xmp", "ctg", "pp3", "dop", "nksc", "identifier")
)


@dataclass
class Found:
    """Contents of a directory and of those below it, without hidden files."""

    directories: list[str] = field(default_factory=list)
    # Files with the suffix of an image, in the order of torchvision's ImageFolder.
    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    # Entries that cannot be read, such as links to nothing, with the reason.
    broken: dict[str, str] = field(default_factory=dict)


def find_images(directory: str) -> Found:
    """Lists a directory and those below it; links are followed."""
    found = Found()
    _walk(directory, found, {})
    found.images.sort(key=os.path.split)
    return found


def _walk(directory: str, found: Found, listed: dict[tuple[int, int], str]) -> None:
    found.directories.append(directory)
    status = Path(directory).stat()
    first = listed.setdefault((status.st_dev, status.st_ino), directory)
    if first != directory:
        found.broken[directory] = f"the same directory as {first}, by a link"
        return
    try:
        with os.scandir(directory) as entries:
            visible = [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        found.broken[directory] = error.strerror or str(error)
        return
    for entry in sorted(visible, key=lambda entry: entry.name):
        try:
            # Bytes that are not UTF-8 are surrogates in the name, which cannot be encoded.
            if entry.name.encode(errors="ignore").decode() != entry.name:
                shown = entry.path.encode(errors="backslashreplace").decode()
                found.broken[shown] = "its name is not UTF-8"
            elif entry.is_dir():
                _walk(entry.path, found, listed)
            elif not entry.is_file():
                found.broken[entry.path] = "neither a file nor a directory"
            elif suffix(entry.name) in IMAGE_SUFFIXES:
                found.images.append(entry.path)
            else:
                found.others.append(entry.path)
        except OSError as error:
            # E.g. links that lead to each other.
            found.broken[entry.path] = error.strerror or str(error)


def is_hidden(name: str) -> bool:
    """Tells whether a file or directory belongs to a system, a storage or a camera."""
    is_system = name.startswith(".") or name.lower() in SYSTEM_NAMES
    return is_system or suffix(name) in SIDECAR_SUFFIXES


def visible_files(root: Path, pattern: str) -> list[Path]:
    """Returns the files below a directory that match, sorted, without hidden ones."""
    paths = sorted(root.rglob(pattern))
    return [path for path in paths if not any(map(is_hidden, path.relative_to(root).parts))]


def suffix(path: str) -> str:
    """Returns the suffix of a file name in lower case without its dot."""
    _, dot, end = path.rpartition("/")[2].rpartition(".")
    return end.lower() if dot else ""


def counted_suffixes(paths: Iterable[str]) -> str:
    """Returns the number of files of each suffix: ``"2 .txt, 1 .csv, 1 without suffix"``."""
    counts = Counter(map(suffix, paths))
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0] == "", item[0]))
    return ", ".join(f"{n} .{end}" if end else f"{n} without suffix" for end, n in order)


def list_folder(
    root: str | Path, *, min_images: int | None = None, other_files: OtherFiles = "raise"
) -> ImageFiles:
    """Lists a folder of images with all problems that keep a run from training on it."""
    check_choice("other_files", other_files, get_args(OtherFiles))
    root = find_root(root)
    problems = Problems(f"folder {shown_path(root)}")
    found = find_images(root)
    splits = _split_directories(problems, root, found)
    class_of = {path: _class_of(path, root, splits) for path in [*found.images, *found.others]}
    images = _labelled(problems, root, found, splits, class_of)
    # Files beside the classes, such as a licence, are ignored.
    others = [path for path in found.others if class_of[path]]
    shapes = IMAGE_SUFFIXES | HEIC_SUFFIXES
    loose = [path for path, place in class_of.items() if not place and suffix(path) in shapes]
    if len(images.labels["train"]) == 0:
        if "train" in splits.values():
            problems.add(
                f"no images in directories of classes, {len(loose)} directly in it: make a "
                "directory for each class"
            )
        return images
    held_out = [split for split in get_args(Split) if split not in splits.values()]
    images.note_classes(held_out, min_images)
    for noun, paths, fix in (
        ("images in no class", loose, "move them into one"),
        (
            f"files that are not images by their suffix ({counted_suffixes(others)})",
            others,
            "move them elsewhere (HEIC, which Pillow does not decode: convert to JPEG)",
        ),
        (
            "files and directories that cannot be used",
            [f"{path} ({reason})" for path, reason in found.broken.items()],
            "repair or remove them",
        ),
    ):
        shown = shown_names([shown_path(path.removeprefix(f"{root}/")) for path in paths[:6]])
        if paths and other_files == "skip":
            log.info("%s, left out: %d (%s)", noun, len(paths), shown)
        elif paths:
            problems.add(
                f"{noun}: {len(paths)} ({shown}); {fix}, or leave them out with the data option "
                "other_files=skip"
            )
    return images


def _split_directories(problems: Problems, root: str, found: Found) -> dict[str, Split]:
    """Returns the directories of the splits in the root; {"": "train"} if it has the classes."""
    below = [directory.removeprefix(f"{root}/") for directory in found.directories[1:]]
    names = [name for name in below if "/" not in name]
    # A class may be called train if not all are named like splits.
    if not names or any(name.lower() not in SPLIT_WORDS for name in names):
        return {"": "train"}
    splits = {name: SPLIT_WORDS[name.lower()] for name in names}
    for split, number in Counter(splits.values()).items():
        if number > 1:
            several = [name for name in names if splits[name] == split]
            problems.add(f"{number} directories are for {split}: {' and '.join(several)}")
    if "train" not in splits.values():
        problems.add(f"there is no directory train beside {', '.join(names)}")
    return splits


def _class_of(path: str, root: str, splits: Mapping[str, Split]) -> tuple[Split, str] | None:
    """Returns the split and the class of a file; None if it is in no class."""
    below = path.removeprefix(f"{root}/")
    first, _, rest = ("", "", below) if "" in splits else below.partition("/")
    name, _, file = rest.partition("/")
    return (splits[first], name) if file else None


def _labelled(
    problems: Problems,
    root: str,
    found: Found,
    splits: Mapping[str, Split],
    class_of: Mapping[str, tuple[Split, str] | None],
) -> ImageFiles:
    """Returns the images of the classes with their labels."""
    places = [_class_of(f"{directory}/.", root, splits) for directory in found.directories]
    names = sorted({place[1] for place in places if place})
    label_of = {name: label for label, name in enumerate(names)}
    samples: dict[Split, list[tuple[int, str]]] = {s: [] for s in ("train", *splits.values())}
    own_images = set()
    for path in found.images:
        if place := class_of[path]:
            samples[place[0]].append((label_of[place[1]], path))
            own_images.add(os.path.basename(os.path.dirname(path)))  # noqa: PTH119, PTH120 - faster
    for name in names:
        if name not in own_images and (len(names) == 1 or name.lower() in SPLIT_WORDS):
            problems.add(
                f"{shown_path(name)} has directories and no images of its own, so it is not a "
                "class: make it the root, or move its images up"
            )
    files, labels = {}, {}
    for split, pairs in samples.items():
        pairs.sort(key=itemgetter(0))
        files[split] = Paths(path for _, path in pairs)
        labels[split] = np.array([label for label, _ in pairs], np.int64)
    return ImageFiles(root, problems, files, labels, names)


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
    ``val`` (or ``valid``, ``validation``, ``dev``) and ``test``, sorted by name as in torchvision's
    ``ImageFolder``; a directory within a class belongs to it. Hidden files and those of systems,
    network storages and cameras are ignored, links are followed, and no image is opened.

    A missing test split is held out of each class, the same in every run; a missing validation
    split is held out by the run.

    Args:
        root: The folder.
        test_fraction: Fraction of each class that is held out for the test, in (0, 1).
        min_images: Removes classes with fewer training images, and names them in the log; None
            keeps all.
        other_files: ``"raise"`` refuses files in class directories without an image suffix, entries
            that cannot be read, and images outside class directories; ``"skip"`` ignores them.
        seed: Seed of the choice of the test images, a non-negative integer.

    Raises:
        UsageError: With all problems of the folder: it has no class, a class has no image or too
            few to be held out, class names differ only in case, there are other files; then also
            images that are damaged.
    """
    images = list_folder(root, min_images=min_images, other_files=other_files)
    return images.splits(test_fraction=test_fraction, seed=seed)
