"""A directory of images per class, listed: what it has, and what is wrong with its directories."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from timm_lt.data.folder.files import (
    HEIC_SUFFIXES,
    IMAGE_SUFFIXES,
    Found,
    entries_of,
    find_images,
    suffix,
)
from timm_lt.data.reading import shown_path
from timm_lt.data.sources import SPLIT_WORDS, Split
from timm_lt.utils.checks import Problems, UsageError, shown_names


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
