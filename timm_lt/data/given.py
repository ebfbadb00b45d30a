"""Data sets passed as objects: a Hugging Face one, torchvision's, timm's, or pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import datasets
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Subset
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import default_loader, pil_loader

from timm_lt.data.columns import image_column, label_column
from timm_lt.data.decode import read_image, upright, with_alpha
from timm_lt.data.fingerprint import reads_as
from timm_lt.data.images import MAX_BYTES
from timm_lt.data.items import ACCEPTED, as_image, check_dataset, drawn_item, flattened, is_plain
from timm_lt.data.list_files import note_unused
from timm_lt.data.sources import SPLIT_WORDS, dataset_from_files
from timm_lt.utils.accelerator import kept_random_state
from timm_lt.utils.checks import Problems, UsageError, unknown_name
from timm_lt.utils.longtail import check_labels

# Loaders of torchvision's folders, and modes of timm's, that read a whole file in RGB.
LOADERS = (default_loader, pil_loader)
MODES = ("RGB", "", None)
# Rows of a table that are made together.
ROWS = 1000


def given_splits(data: object) -> dict[str, datasets.Dataset]:
    """Returns a data set of any kind as splits with the columns ``image`` and ``label``.

    Files stay files, which are opened when they are drawn: those of torchvision's ``ImageFolder``
    and of timm's ``ImageDataset`` of a folder, also in a ``Subset`` or ``ConcatDataset``. Their
    transforms are not used. Every other data set, such as one with a ``__getitem__`` or ``loader=``
    of its own, has its items drawn here, and their images are kept in memory as PNG.

    >>> from PIL import Image
    >>> pairs = [(Image.new("RGB", (4, 4)), 0), ("bee.jpg", 1)]
    >>> given_splits({"train": pairs, "validation": pairs})["val"]["label"][:]
    [0, 1]

    Args:
        data: The training images: a ``datasets.Dataset``, or items of an image (of PIL, uint8
            pixels as a tensor or array, or the path of a file) and its label (tuples, or mappings
            with keys such as ``"image"`` and ``"label"``). Or a mapping of ``train``, ``val`` and
            ``test``, or other usual names of splits, to such data sets.

    Raises:
        UsageError: If it is none of these, images are tensors or do not fit in memory, or a label
            is not an integer from 0 to the number of classes.
    """
    if not isinstance(data, Mapping):
        data = {"train": data}
    splits: dict[str, datasets.Dataset] = {}
    problems = Problems()
    for name, part in data.items():
        split = SPLIT_WORDS.get(str(name).lower())
        if split is None or split in splits:
            raise unknown_name("split (each at most once):", name, ["train", "val", "test"])
        with problems.collected(f"{name} split: "):
            splits[split] = _as_dataset(part)
    problems.check()
    columns = dict.fromkeys(name for rows in splits.values() for name in rows.column_names)
    note_unused("the data set", [name for name in columns if name not in ("image", "label")])
    return splits


def _as_dataset(data: Any) -> datasets.Dataset:  # noqa: ANN401 - of any class
    check_dataset(data)
    if isinstance(data, datasets.Dataset) and is_plain(data):
        columns = {image_column(data): "image", label_column(data): "label"}
        plain = data.with_format(None)
        return plain.rename_columns({old: new for old, new in columns.items() if old != new})
    parts, part_of, row_of = flattened(data)
    files, names = [_files(part) for part in parts], [_class_names(part) for part in parts]
    shared = names[0] if all(other == names[0] for other in names) else None
    if None in files:
        # Some data sets of torchvision open files that they leave to the garbage collector.
        with kept_random_state(), catch_warnings(action="ignore", category=ResourceWarning):
            return _with_names(_from_items(data, shared), data)
    rows = zip(part_of.tolist(), row_of.tolist(), strict=True)
    samples: list[Any] = [files[part][row] for part, row in rows]
    labels = [label for _, label in samples]
    checked = check_labels(labels, None if shared is None else len(shared))
    return dataset_from_files([path for path, _ in samples], checked.numpy(), shared)


def _files(data: object) -> list[tuple[str, Any]] | None:
    """Returns the files of a data set and their labels, if its items are nothing else."""
    if isinstance(data, DatasetFolder) and reads_as(data, DatasetFolder):
        samples = data.samples if data.loader in LOADERS else None
    elif isinstance(data, ImageDataset) and reads_as(data, ImageDataset):
        is_folder = type(data.reader) is ReaderImageFolder and data.input_img_mode in MODES
        samples = data.reader.samples if is_folder else None
    else:
        return None
    transform = data.target_transform or (lambda label: label)
    return samples and [(str(path), transform(label)) for path, label in samples]


def _class_names(data: object) -> list[str] | None:
    """Returns the names of the classes by label, if a data set has one of each."""
    folders = DatasetFolder, ImageDataset
    renumbered = isinstance(data, folders) and not reads_as(data, *folders)
    if renumbered or getattr(data, "target_transform", None) is not None:
        return None
    names = getattr(data, "classes", None)
    if names is None:
        numbers = getattr(getattr(data, "reader", None), "class_to_idx", None) or {}
        if sorted(numbers.values()) != list(range(len(numbers))):
            return None
        names = sorted(numbers, key=numbers.__getitem__)
    known = isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
    return list(names) if known and 0 < len(names) == len(set(names)) else None


def _with_names(found: datasets.Dataset, data: object) -> datasets.Dataset:
    """Names the labels of items, if they are those that the data set keeps with names."""
    feature, stored = None, None
    if isinstance(data, datasets.Dataset):
        column = label_column(data)
        feature = data.features[column]
        if isinstance(feature, datasets.ClassLabel):
            stored = data.with_format(None)[column][:]
    elif isinstance(data, DatasetFolder):
        feature, stored = datasets.ClassLabel(names=data.classes), data.targets
    return found.cast_column("label", feature) if stored == found["label"][:] else found


def _from_items(items: Any, names: list[str] | None) -> datasets.Dataset:  # noqa: ANN401
    column, size = datasets.Image(mode="RGB"), 0
    label_type = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"image": column, "label": label_type})
    images: list[dict[str, Any]] = []
    labels: list[Any] = []
    for row in range(len(items)):
        image, label = drawn_item(items, row)
        images.append(_encoded(image, row, type(items).__name__))
        labels.append(label)
        size += len(images[-1]["bytes"] or b"")
        if size > MAX_BYTES:
            raise UsageError(
                f"the images of a {type(items).__name__} need more than {MAX_BYTES / 2**30:.0f} "
                "GiB of memory; pass the paths of their files instead of images"
            )
    checked = check_labels(labels, None if names is None else len(names)).tolist()
    parts = [
        {"image": images[start : start + ROWS], "label": checked[start : start + ROWS]}
        for start in range(0, len(images), ROWS)
    ]
    return datasets.concatenate_datasets([datasets.Dataset.from_dict(p, features) for p in parts])


def _encoded(given: object, row: int, kind: str) -> dict[str, Any]:
    """Returns an image without loss: its file if that is known, else PNG."""
    image = as_image(given)
    if not isinstance(image, dict | Image.Image):
        raise UsageError(
            f"image {row} of a {kind} is a {type(image).__name__}; remove a transform that makes "
            f"tensors, because the model's own preprocessing does so. Expected {ACCEPTED}"
        )
    if isinstance(image, dict):
        return image
    column = datasets.Image()
    # Of a file that is opened but not read, the path is stored.
    if not (getattr(image, "filename", "") and getattr(image, "tile", None)):
        image.load()
        has_alpha = image.has_transparency_data
        pixels = with_alpha(image) if has_alpha else read_image(image, row, column)
        # A copy has no format, which could be one that loses something.
        image = upright(pixels, image).copy()
    encoded: dict[str, Any] = column.encode_example(image)
    return encoded


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
