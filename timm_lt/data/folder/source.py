"""folder: a directory of images per class, with or without directories for the splits."""

import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from timm_lt.data.folder.directories import ImageFolder, read_folder
from timm_lt.data.folder.files import HEIC_SUFFIXES, counted_suffixes, suffix
from timm_lt.data.holdout import hold_out, small_classes
from timm_lt.data.identity import path_keys
from timm_lt.data.readable import note_damaged_files
from timm_lt.data.sources import Split, dataset_from_files, register_dataset
from timm_lt.utils.checks import check_choice, check_integer, check_number, shown_names
from timm_lt.utils.console import log

if TYPE_CHECKING:
    from datasets import Dataset

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
