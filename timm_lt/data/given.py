"""Data sets that are given as objects: a Hugging Face one, torchvision's, timm's, or pairs."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from warnings import catch_warnings

import datasets
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import default_loader, pil_loader

from timm_lt.data.columns import check_random_access, image_column, label_column
from timm_lt.data.decode import to_rgb, turned_upright, with_alpha
from timm_lt.data.fingerprint import reads_as
from timm_lt.data.images import MAX_BYTES
from timm_lt.data.items import as_image, drawn_item
from timm_lt.data.labels import is_plain, subset_rows
from timm_lt.data.list_files import note_unused
from timm_lt.data.sources import SPLIT_WORDS, dataset_from_files
from timm_lt.utils.accelerator import kept_random_state
from timm_lt.utils.checks import UsageError, unknown_name
from timm_lt.utils.longtail import check_labels

ACCEPTED = (
    "give a folder of images; a datasets.Dataset with images and labels; torchvision's "
    "ImageFolder, timm's ImageDataset, or any other data set or list of pairs of an image (of PIL, "
    "uint8, or the path of a file) and its label; or a mapping of train, val and test to such data "
    "sets"
)
# Modes that neither PNG nor TIFF has.
UNSTORABLE = ("HSV", "I;16N")
# How torchvision's folders and timm's read a file where nothing else is asked for: whole, in RGB.
LOADERS = (default_loader, pil_loader)
MODES = ("RGB", "", None)
# Rows of a table that are made together.
ROWS = 1000


def given_splits(data: object) -> dict[str, datasets.Dataset]:
    """Returns what somebody has as splits with the columns ``image`` and ``label``.

    Files stay files, which are opened when they are drawn: those of torchvision's ``ImageFolder``
    and of timm's ``ImageDataset`` of a folder, also as a ``Subset`` or ``ConcatDataset``. Of these
    a transform is not used. Of every other data set, such as one with a ``__getitem__`` or
    ``loader=`` of its own, the items count: they are drawn here, and their images are kept in
    memory as PNG.

    >>> from PIL import Image
    >>> pairs = [(Image.new("RGB", (4, 4)), 0), ("bee.jpg", 1)]
    >>> given_splits({"train": pairs, "validation": pairs})["val"]["label"][:]
    [0, 1]

    Args:
        data: A ``datasets.Dataset``, or items of an image (of PIL, uint8 pixels as a tensor or
            array, or the path of a file) and its label (tuples, or mappings with keys such as
            ``"image"`` and ``"label"``), which are the training images; or a mapping to such data
            sets of ``train``, ``val`` and ``test``, or what directories of splits are called
            beside.

    Raises:
        UsageError: If it is none of these; the message says what is. Also if images are tensors, or
            do not fit in memory, or a label is no integer from 0 on, below the number of classes.
    """
    found = _each_as_dataset(data) if isinstance(data, Mapping) else {"train": _as_dataset(data)}
    columns = dict.fromkeys(name for rows in found.values() for name in rows.column_names)
    note_unused("the data set", [name for name in columns if name not in ("image", "label")])
    return found


def _each_as_dataset(data: Mapping[Any, object]) -> dict[str, datasets.Dataset]:
    found: dict[str, datasets.Dataset] = {}
    for name, part in data.items():
        split = SPLIT_WORDS.get(str(name).lower())
        if split is None:
            raise unknown_name("split", name, ["train", "val", "test"])
        if split in found:
            raise UsageError(f"two splits are for {split}: {', '.join(map(str, data))}")
        try:
            found[split] = _as_dataset(part)
        except UsageError as error:
            raise UsageError(f"{name} split: {error}") from error
    return found


def _as_dataset(data: object) -> datasets.Dataset:
    check_random_access(data)
    if isinstance(data, datasets.Dataset) and is_plain(data):
        columns = {image_column(data): "image", label_column(data): "label"}
        plain = data.with_format(None)
        return plain.rename_columns({old: new for old, new in columns.items() if old != new})
    is_known = isinstance(data, Dataset | datasets.Dataset | Sequence) and hasattr(data, "__len__")
    if not is_known or isinstance(data, str | IterableDataset):
        raise UsageError(f"a {type(data).__name__} is no data set of images: {ACCEPTED}")
    items = cast("Sequence[object]", data)
    if len(items) == 0:
        raise UsageError(f"the {type(data).__name__} has no images")
    names = _class_names(data)
    files = _files(data)
    if files is None:
        # Some data sets of torchvision open files that they leave to the garbage collector.
        with kept_random_state(), catch_warnings(action="ignore", category=ResourceWarning):
            return _with_names(_from_items(items, names), data)
    paths, labels = zip(*files, strict=True)
    return dataset_from_files(paths, _checked(labels, names).numpy(), names)


def _with_names(found: datasets.Dataset, data: object) -> datasets.Dataset:
    """Gives labels their names, if a way of its own in a data set has left them as they are."""
    feature, stored = None, None
    if isinstance(data, datasets.Dataset):
        feature = data.features.get("label", data.features.get("labels"))
        if isinstance(feature, datasets.ClassLabel):
            stored = data.with_format(None)[label_column(data)][:]
    elif isinstance(data, DatasetFolder):
        feature, stored = datasets.ClassLabel(names=data.classes), data.targets
    return found.cast_column("label", feature) if stored == found["label"][:] else found


def _checked(labels: Sequence[Any], names: list[str] | None) -> Tensor:
    return check_labels(labels, None if names is None else len(names))


def _files(data: object) -> list[tuple[str, Any]] | None:
    """Returns the files of a data set and their labels, if its items are nothing else."""
    if isinstance(data, Subset) and reads_as(data, Subset):
        whole = _files(data.dataset)
        return None if whole is None else [whole[row] for row in subset_rows(data)]
    if isinstance(data, ConcatDataset) and reads_as(data, ConcatDataset):
        parts = [_files(part) for part in data.datasets]
        known = [part for part in parts if part is not None]
        return list(itertools.chain(*known)) if len(known) == len(parts) else None
    if isinstance(data, DatasetFolder) and reads_as(data, DatasetFolder):
        if data.loader not in LOADERS:
            return None
        samples = data.samples
    elif isinstance(data, ImageDataset) and reads_as(data, ImageDataset):
        if type(data.reader) is not ReaderImageFolder or data.input_img_mode not in MODES:
            return None
        samples = data.reader.samples
    else:
        return None
    transform = data.target_transform or (lambda label: label)
    return [(str(path), transform(label)) for path, label in samples]


def _class_names(data: object) -> list[str] | None:
    """Returns the names of the classes by label, if a data set has one of each."""
    if isinstance(data, Subset) and reads_as(data, Subset):
        return _class_names(data.dataset)
    if isinstance(data, ConcatDataset) and reads_as(data, ConcatDataset):
        first, *others = [_class_names(part) for part in data.datasets]
        return first if all(names == first for names in others) else None
    folders = DatasetFolder, ImageDataset
    renumbered = isinstance(data, folders) and not reads_as(data, *folders)
    if renumbered or getattr(data, "target_transform", None) is not None:
        return None
    names = getattr(data, "classes", None)
    if names is None:
        places = getattr(getattr(data, "reader", None), "class_to_idx", None) or {}
        if sorted(places.values()) != list(range(len(places))):
            return None
        names = sorted(places, key=places.__getitem__)
    known = isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
    return list(names) if known and 0 < len(names) == len(set(names)) else None


def _from_items(items: Sequence[object], names: list[str] | None) -> datasets.Dataset:
    column, size = datasets.Image(mode="RGB"), 0
    label_type = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"image": column, "label": label_type})
    images: list[dict[str, Any]] = []
    labels: list[object] = []
    for row in range(len(items)):
        image, label = _checked_item(items, row)
        images.append(column.encode_example(image))
        labels.append(label)
        size += len(images[-1]["bytes"] or b"")
        if size > MAX_BYTES:
            raise UsageError(
                f"the images of a {type(items).__name__} need more than {MAX_BYTES / 2**30:.0f} "
                "GiB of memory: give the paths of their files in place of images"
            )
    checked = _checked(labels, names).tolist()
    parts = [
        {"image": images[start : start + ROWS], "label": checked[start : start + ROWS]}
        for start in range(0, len(images), ROWS)
    ]
    return datasets.concatenate_datasets([datasets.Dataset.from_dict(p, features) for p in parts])


def _checked_item(items: Sequence[object], row: int) -> tuple[str | Image.Image, object]:
    """Returns an image, as it can be encoded without loss, or its file, and its label."""
    kind = type(items).__name__
    image, label = drawn_item(items, row)
    image = as_image(image)
    if isinstance(image, Tensor):
        raise UsageError(
            f"image {row} of a {kind} is a tensor: remove its transform, for the model's own "
            "preprocessing makes tensors of images"
        )
    if isinstance(image, str | Path):
        return str(image), label
    if not isinstance(image, Image.Image):
        raise UsageError(f"image {row} of a {kind} is a {type(image).__name__}: {ACCEPTED}")
    if getattr(image, "filename", "") and getattr(image, "tile", None):
        # Nothing has been read of its file, so that it is the image as it is.
        return image, label
    # A copy has lost the format of its file, which may be one that loses something.
    image = turned_upright(image).copy()
    if image.has_transparency_data:
        return with_alpha(image), label
    return image if image.mode not in UNSTORABLE else to_rgb(image), label


def folder_of(data: object) -> str | None:
    """Returns the folder of the training images of data that :func:`given_splits` takes.

    Args:
        data: The data.

    Returns:
        The attribute ``root`` of a data set of torchvision, or of the reader of one of timm.
    """
    if isinstance(data, Mapping):
        data = next(
            (p for n, p in data.items() if SPLIT_WORDS.get(str(n).lower()) == "train"), None
        )
    while isinstance(data, Subset):
        data = data.dataset
    root = getattr(getattr(data, "reader", data), "root", None)
    return str(root) if isinstance(root, str | Path) else None
