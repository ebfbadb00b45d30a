"""Lists as JSON: BBN's annotations, and those of COCO and iNaturalist."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from timm_lt.data.lists.columns import SPLIT_COLUMN, note_unused, read_splits
from timm_lt.utils.checks import UsageError, shown_names
from timm_lt.utils.console import log, one_line

PATH_KEYS = ("fpath", "im_path", "image_path", "path", "file_name", "filename")
LABEL_KEYS = ("category_id", "label", "target")
SURROGATE = re.compile("[\ud800-\udfff]")
Entry = Mapping[str, Any]
Id = int | str
KINDS = {int: "an integer of at most 64 bits", str: "a text in Unicode"}


class Annotations(NamedTuple):
    """What a file of annotations says; see :class:`~timm_lt.data.lists.ImageList`."""

    paths: list[str]
    labels: NDArray[np.int64]
    names: list[str] | None
    num_classes: int | None
    splits: NDArray[np.str_] | None = None


def read_annotations(path: Path) -> Annotations:
    """Reads JSON annotations; see :func:`~timm_lt.data.lists.read_image_list`."""
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}, line {error.lineno}, column {error.colno}: no JSON: {error.msg}"
        ) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}, line {line}: no UTF-8 text: {error.reason}") from error
    except RecursionError as error:
        raise UsageError(f"{path} has lists in lists too deep to be read") from error
    except ValueError as error:
        # Of integers that are too long, the advice is to a programmer.
        reason = str(error).partition(";")[0]
        raise UsageError(f"{path} has a number that cannot be read: {reason}") from error
    if isinstance(content, list):
        content = {"annotations": content}
    if not isinstance(content, dict) or "annotations" not in content:
        found = f"keys {', '.join(content)}" if isinstance(content, dict) else repr(content)[:40]
        raise UsageError(
            f"{path} has no 'annotations', which give the labels, as the test images of a "
            f"competition; found {found}"
        )
    if "images" in content:
        return _of_images(path, content)
    return _of_paths(path, content)


def _of_paths(path: Path, content: Entry) -> Annotations:
    """Reads annotations that have paths and labels, as BBN's."""
    entries = _entries(path, content, "annotations")
    if not entries:
        return Annotations([], np.empty(0, np.int64), None, None)
    path_key = _key(path, entries[0], PATH_KEYS, "annotations")
    label_key = _key(path, entries[0], LABEL_KEYS, "annotations")
    paths = _values(path, entries, path_key, "annotations", str)
    labels = np.array(_values(path, entries, label_key, "annotations", int), np.int64)
    num_classes = content.get("num_classes")
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise UsageError(f"{path}: num_classes is {num_classes!r}, not an integer of 1 or more")
    bad = labels < 0
    if num_classes is not None:
        bad |= labels >= num_classes
    if bad.any():
        row = int(bad.argmax())
        raise UsageError(
            f"{path}: annotations[{row}] ({paths[row]}) has {label_key} {labels[row]}, "
            + ("which is negative" if labels[row] < 0 else f"but num_classes is {num_classes}")
        )
    note_unused(path, _other_keys(entries, path_key, label_key))
    return Annotations(paths, labels, None, num_classes, _splits(path, entries, "annotations"))


def _of_images(path: Path, content: Entry) -> Annotations:
    """Joins annotations with the images and categories that they point to."""
    images = _entries(path, content, "images")
    annotations = _entries(path, content, "annotations")
    image_ids = _unique(path, _ids(path, images, "id", "images"), "images")
    paths = _values(path, images, "file_name", "images", str)
    rows = _positions(path, _ids(path, annotations, "image_id", "annotations"), image_ids, "image")
    categories, names = _categories(path, content, annotations)
    found = _positions(
        path, _ids(path, annotations, "category_id", "annotations"), categories, "category"
    )
    labels = np.full(len(images), -1, np.int64)
    labels[rows] = found
    # Of an image with several annotations, the last stays; the others differ from it or not.
    several = np.flatnonzero(labels[rows] != found)
    if len(several):
        places = list(dict.fromkeys(rows[several].tolist()))
        raise UsageError(
            f"{path}: {len(places)} images have annotations of different categories: "
            f"{shown_names([paths[place] for place in places])}; an image has one class: remove "
            "these images, or all but one category of each"
        )
    note_unused(path, _other_keys(images, "id", "file_name"))
    splits = _splits(path, images, "images")
    kept = np.flatnonzero(labels >= 0)
    if len(kept) < len(images):
        bare = np.flatnonzero(labels < 0)
        shown = shown_names([paths[place] for place in bare[:6]])
        log.warning(
            "%s: %d of %d images have no annotation and are left out: %s",
            *(path, len(bare), len(images), shown),
        )
        paths, labels = [paths[row] for row in kept], labels[kept]
        splits = None if splits is None else splits[kept]
    return Annotations(paths, labels, names, len(categories) if names else None, splits)


def _other_keys(entries: list[Entry], *used: str) -> list[str]:
    keys = {key for entry in entries for key in entry}
    return sorted(keys - {*used, SPLIT_COLUMN})


def _splits(path: Path, entries: list[Entry], where: str) -> NDArray[np.str_] | None:
    if not any(SPLIT_COLUMN in entry for entry in entries):
        return None
    return read_splits(path, _values(path, entries, SPLIT_COLUMN, where, str))


def _categories(
    path: Path, content: Entry, annotations: list[Entry]
) -> tuple[dict[Any, int], list[str] | None]:
    """Returns the label of each category id, and the names by label.

    Without categories, the ids in the annotations are the labels themselves.
    """
    if "categories" not in content:
        ids = _ids(path, annotations, "category_id", "annotations")
        for number in ids:
            if not isinstance(number, int) or number < 0:
                raise UsageError(
                    f"{path}: category_id {number!r} is not a non-negative integer, and there are "
                    "no categories that name it"
                )
        return {number: int(number) for number in ids}, None
    entries = _entries(path, content, "categories")
    ids = _ids(path, entries, "id", "categories")
    _unique(path, ids, "categories")
    names = dict(zip(ids, _values(path, entries, "name", "categories", str), strict=True))
    if len({*names.values()}) < len(names):
        first: dict[str, Id] = {}
        twice = [name for number, name in names.items() if first.setdefault(name, number) != number]
        raise UsageError(f"{path}: several categories are named {shown_names(twice)}")
    ids = sorted(ids, key=lambda number: (isinstance(number, str), number))
    return {number: label for label, number in enumerate(ids)}, [names[number] for number in ids]


def _entries(path: Path, content: Entry, key: str) -> list[Entry]:
    entries = content[key]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f"{path}: {key!r} must be a list of objects")
    return entries


def _key(path: Path, entry: Entry, keys: Iterable[str], where: str) -> str:
    for key in keys:
        if key in entry:
            return key
    raise UsageError(
        f"{path}: {where} have none of {', '.join(keys)}; the first has {', '.join(entry)}"
    )


def _values(path: Path, entries: list[Entry], key: str, where: str, *kinds: type) -> list[Any]:
    """Returns a value of every entry."""
    values = [entry.get(key) for entry in entries]
    for row, value in enumerate(values):
        if not _fits(value, kinds):
            raise UsageError(
                f"{path}: {where}[{row}] has {key} {one_line(repr(value))}, not "
                f"{' or '.join(KINDS[kind] for kind in kinds)}"
            )
    return values


def _fits(value: object, kinds: tuple[type, ...]) -> bool:
    """Returns whether a value is an int64, or a text in UTF-8: without lone surrogates."""
    if type(value) not in kinds:
        return False
    if isinstance(value, str):
        return value.isascii() or not SURROGATE.search(value)
    return isinstance(value, int) and value.bit_length() < 64


def _ids(path: Path, entries: list[Entry], key: str, where: str) -> list[Id]:
    return _values(path, entries, key, where, int, str)


def _unique(path: Path, ids: list[Id], where: str) -> dict[Id, int]:
    """Returns the place of each id."""
    places = {number: place for place, number in enumerate(ids)}
    if len(places) < len(ids):
        twice = [number for place, number in enumerate(ids) if places[number] != place]
        raise UsageError(f"{path}: {where} have an id more than once: {shown_names(twice)}")
    return places


def _positions(path: Path, ids: list[Id], places: Mapping[Id, int], noun: str) -> NDArray[np.int64]:
    """Returns the place of what each annotation points to."""
    found = np.array([places.get(number, -1) for number in ids], np.int64)
    unknown = np.flatnonzero(found < 0)
    if len(unknown):
        shown = shown_names([repr(wrong) for wrong in dict.fromkeys(ids[row] for row in unknown)])
        raise UsageError(
            f"{path}: {len(unknown)} annotations have values of {noun}_id that are the id of no "
            f"{noun}: {shown}"
        )
    return found
