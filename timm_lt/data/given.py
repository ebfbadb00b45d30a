"""Data sets that are given as objects: a Hugging Face one, torchvision's, timm's, or pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from timm_lt.data.columns import check_random_access, image_column, label_column
from timm_lt.data.images import MAX_BYTES
from timm_lt.data.pixels import to_rgb, with_alpha
from timm_lt.data.reading import turned_upright
from timm_lt.data.sources import SPLIT_WORDS, dataset_from_files
from timm_lt.longtail import check_labels
from timm_lt.registry import UsageError, unknown_name

ACCEPTED = (
    "give a folder of images; a datasets.Dataset with images and labels; torchvision's "
    "ImageFolder, timm's ImageDataset, or any other data set or list of pairs of an image (of PIL, "
    "or the path of a file) and its label; or a mapping of train, val and test to such data sets"
)
# Modes that neither PNG nor TIFF has.
UNSTORABLE = ("HSV", "I;16N")
# Rows of a table that are made together.
ROWS = 1000


def given_splits(data: object) -> dict[str, datasets.Dataset]:
    """Returns what somebody has as splits with the columns ``image`` and ``label``.

    Files stay files, which are opened when they are drawn: those of torchvision's ``ImageFolder``,
    of timm's ``ImageDataset`` and of whatever else lists them as ``samples``. Of these a transform
    is not used. Images of other data sets are read here, and kept in memory as PNG.

    >>> from PIL import Image
    >>> pairs = [(Image.new("RGB", (4, 4)), 0), ("bee.jpg", 1)]
    >>> given_splits({"train": pairs, "validation": pairs})["val"]["label"][:]
    [0, 1]

    Args:
        data: A ``datasets.Dataset``, or pairs of an image (of PIL, or the path of a file) and its
            label, which are the training images; or a mapping to such data sets of ``train``,
            ``val`` and ``test``, or what directories of splits are called beside.

    Raises:
        UsageError: If it is none of these; the message says what is. Also if images are tensors, or
            do not fit in memory, or a label is no integer from 0 on, below the number of classes.
    """
    if not isinstance(data, Mapping):
        return {"train": _as_dataset(data)}
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
    if isinstance(data, datasets.Dataset):
        columns = {image_column(data): "image", label_column(data): "label"}
        return data.rename_columns({old: new for old, new in columns.items() if old != new})
    if isinstance(data, Subset):
        return _as_dataset(data.dataset).select([int(row) for row in data.indices])
    is_known = isinstance(data, Dataset | Sequence) and hasattr(data, "__len__")
    if not is_known or isinstance(data, str | IterableDataset):
        raise UsageError(f"a {type(data).__name__} is no data set of images: {ACCEPTED}")
    pairs = cast("Sequence[tuple[object, object]]", data)
    if len(pairs) == 0:
        raise UsageError(f"the {type(data).__name__} has no images")
    names = _class_names(data)
    samples = _samples(data)
    if samples is None:
        return _from_pairs(pairs, names)
    labels = [label for _, label in samples]
    transform = getattr(data, "target_transform", None)
    if transform is not None:
        labels = [transform(label) for label in labels]
    return dataset_from_files(
        [str(path) for path, _ in samples], _checked(labels, names).numpy(), names
    )


def _checked(labels: list[Any], names: list[str] | None) -> Tensor:
    return check_labels(labels, None if names is None else len(names))


def _samples(data: object) -> list[tuple[str | Path, Any]] | None:
    """Returns the files of a data set, or of its reader, and their labels, if it lists them."""
    for owner in (data, getattr(data, "reader", None)):
        samples = getattr(owner, "samples", None)
        if isinstance(samples, Sequence) and all(
            isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[0], str | Path)
            for pair in samples
        ):
            return list(samples)
    return None


def _class_names(data: object) -> list[str] | None:
    """Returns the names of the classes by label, if a data set knows one of each."""
    if getattr(data, "target_transform", None) is not None:
        return None
    names = getattr(data, "classes", None)
    if names is None:
        places = getattr(getattr(data, "reader", None), "class_to_idx", None) or {}
        if sorted(places.values()) != list(range(len(places))):
            return None
        names = sorted(places, key=places.__getitem__)
    known = isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
    return list(names) if known and 0 < len(names) == len(set(names)) else None


def _from_pairs(
    pairs: Sequence[tuple[object, object]], names: list[str] | None
) -> datasets.Dataset:
    column, size = datasets.Image(mode="RGB"), 0
    label_type = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"image": column, "label": label_type})
    images: list[dict[str, Any]] = []
    labels: list[object] = []
    for row in range(len(pairs)):
        image, label = _checked_pair(pairs, row)
        images.append(column.encode_example(image))
        labels.append(label.item() if isinstance(label, Tensor) else label)
        size += len(images[-1]["bytes"] or b"")
        if size > MAX_BYTES:
            raise UsageError(
                f"the images of a {type(pairs).__name__} need more than {MAX_BYTES / 2**30:.0f} "
                "GiB of memory: give the paths of their files in place of images"
            )
    checked = _checked(labels, names).tolist()
    parts = [
        {"image": images[start : start + ROWS], "label": checked[start : start + ROWS]}
        for start in range(0, len(images), ROWS)
    ]
    return datasets.concatenate_datasets([datasets.Dataset.from_dict(p, features) for p in parts])


def _checked_pair(
    pairs: Sequence[tuple[object, object]], row: int
) -> tuple[str | Image.Image, object]:
    """Returns an image, as it can be encoded without loss, or its file, and its label."""
    kind, pair = type(pairs).__name__, pairs[row]
    if not (isinstance(pair, Sequence) and len(pair) == 2 and not isinstance(pair, str)):
        raise UsageError(f"item {row} of a {kind} is no pair of an image and its label: {ACCEPTED}")
    image, label = pair
    if isinstance(image, Tensor):
        raise UsageError(
            f"image {row} of a {kind} is a tensor: leave out its transform, for a model takes "
            "images as its own preprocessing makes them"
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
