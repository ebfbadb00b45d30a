"""Images and labels of any data set or batch: columns, layout, decoding, and fingerprints."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any, Literal
from warnings import catch_warnings

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from numpy.typing import NDArray
from PIL import Image
from timm.data import AugMixDataset, ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.scheduled_sampler import ScheduledTransformDataset
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import DatasetFolder
from torchvision.transforms.functional import to_pil_image

from timm_lt.data.decode import decode_column, is_remote, read_image
from timm_lt.utils.accelerator import kept_random_state
from timm_lt.utils.checks import WHITE, UsageError, check_background, user_errors
from timm_lt.utils.longtail import check_labels

# Names of columns of labels, compared without case.
LABEL_NAMES = (
    *("label", "labels", "target", "targets", "class", "classes", "class_name", "class_label"),
    *("category", "fine_label", "label_name", "species", "y"),
)
# Keys of images and of labels in a sample or batch that is a mapping; the first present is used.
IMAGE_KEYS = ("pixel_values", "image", "images", "img", "imgs", "input", "inputs", "x", "data")
LABEL_KEYS = ("label", "labels", "target", "targets", "y")
EXPECTED = (
    "expected an image and its label (a batch: images and labels) as a pair, or as a mapping with "
    f"one of the keys {', '.join(IMAGE_KEYS)} and one of {', '.join(LABEL_KEYS)}"
)
ACCEPTED = (
    "a datasets.Dataset with images and labels, torchvision's ImageFolder, timm's ImageDataset, or "
    "any other data set or list of pairs of an image (of PIL, uint8, or the path of a file) and "
    "its label"
)
# Attributes of torchvision's folders and of timm's ImageDataset that change their items.
OPTIONS = "transform", "target_transform", "transforms", "loader", "input_img_mode", "load_bytes"
# Attributes that do not change the features of a module in evaluation.
WITHOUT_EFFECT = ("training", "num_classes")
PLAIN = (
    *(str, int, float, type(None), type, FunctionType, BuiltinFunctionType),
    *(Tensor, torch.dtype, torch.device),
)
KEY = "pass key= with a word that stands for the samples and their transform"
# Rows of a data set that are read together for their fingerprint.
ROWS = 1000


def check_dataset(data: object, *, streams: bool = False) -> None:
    """Checks that a data set has a length and random access, or is a stream of torch if allowed."""
    is_stream = isinstance(data, IterableDataset)
    known = isinstance(data, Dataset | datasets.Dataset | Sequence) and not isinstance(data, str)
    if not known or (is_stream and not streams) or not (is_stream or hasattr(data, "__len__")):
        cure = "pass its attribute dataset" if hasattr(data, "dataset") else f"expected {ACCEPTED}"
        if isinstance(data, datasets.IterableDataset | datasets.DatasetDict):
            cure = "load it without streaming=True, and pass one of its splits"
        raise UsageError(
            f"a {_name(data)} is not a data set with a length and random access; {cure}"
        )


@dataclass
class RGBImage(datasets.Image):  # type: ignore[misc]
    """A column of images that timm_lt decodes to RGB, on the colour ``background`` (#rrggbb)."""

    background: str = WHITE

    def decode_example(self, value: dict[str, Any], **_: object) -> Image.Image:
        """Decodes an image as a run does."""
        return decode_column(value, self)


def as_rgb(
    dataset: datasets.Dataset, *, column: str = "image", background: object = None
) -> datasets.Dataset:
    """Returns a data set whose images are decoded by timm_lt, on a background; None keeps it.

    With None, a data set with a transform of its own is returned unchanged.
    """
    old = dataset.features.get(column)
    if not isinstance(old, datasets.Image) or (background is None and not is_plain(dataset)):
        return dataset
    color = getattr(old, "background", WHITE) if background is None else background
    new = RGBImage(mode=old.mode, background=check_background(color))
    return dataset if old == new else dataset.cast_column(column, new)


def is_plain(rows: datasets.Dataset) -> bool:
    """Tells whether a ``datasets.Dataset`` has no transform of its own."""
    return bool(rows.format["type"] != "custom")


def image_column(rows: datasets.Dataset, column: str | None = None) -> str:
    """Finds the column of images: ``Image``, else a struct of bytes and path, else binary."""
    kinds = rows.features.items()
    images = [name for name, kind in kinds if isinstance(kind, datasets.Image)]
    encoded = [n for n, kind in kinds if isinstance(kind, dict) and set(kind) == {"bytes", "path"}]
    binary = [name for name, kind in kinds if type_name(kind) in ("binary", "large_binary")]
    return _choose("image", rows, column, images + encoded + binary, images, encoded, binary)


def label_column(rows: datasets.Dataset, column: str | None = None) -> str:
    """Finds the column of labels: ``label`` or ``labels`` with integers, else a ``ClassLabel``.

    Otherwise it is a column of integers or texts with a usual name such as ``target`` or ``class``.
    """
    kinds = {name: label_kind(kind) for name, kind in rows.features.items()}
    accepted = [name for name, kind in kinds.items() if kind]
    integers = [name for name in ("label", "labels") if kinds.get(name) in ("names", "integers")]
    classes = [name for name in accepted if kinds[name] == "names"]
    named = [name for name in accepted if name.casefold() in LABEL_NAMES]
    return _choose("label", rows, column, accepted, integers[:1], classes, named)


def _choose(
    noun: str, rows: datasets.Dataset, column: str | None, accepted: list[str], *found: list[str]
) -> str:
    """Returns the named column if it is accepted, or the only one of the first non-empty list."""
    if column in accepted:
        return column
    names = next(filter(None, found), [])
    if column is None and (noun in names or len(names) == 1):
        return noun if noun in names else names[0]
    problem = f"no column {column!r} of {noun}s" if column else f"no column of {noun}s"
    if column is None and names:
        problem = f"several columns could be the {noun}: {', '.join(names)}; name one"
    columns = [f"{name} ({type_name(kind)})" for name, kind in rows.features.items()]
    raise UsageError(f"{problem}; the columns are {', '.join(columns) or 'none'}")


def label_kind(feature: object) -> Literal["names", "integers", "texts"] | None:
    """Returns the kind of labels in a column of this type; None for a type without labels."""
    if isinstance(feature, datasets.ClassLabel):
        return "names"
    kind = type_name(feature)
    if isinstance(feature, datasets.Value) and "int" in kind:
        return "integers"
    return "texts" if kind in ("string", "large_string", "string_view") else None


def type_name(feature: object) -> str:
    """Returns the name of a column's type, for messages."""
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__


def reads_as(data: object, *known: type) -> bool:
    """Tells whether a data set has the items of a known class that it is derived from."""
    methods = ("__getitem__", "__getitems__", "__len__")
    return any(
        isinstance(data, cls)
        and all(getattr(type(data), name, None) is getattr(cls, name, None) for name in methods)
        for cls in known
    )


def flattened(data: Any) -> tuple[list[Any], NDArray[np.int64], NDArray[np.int64]]:  # noqa: ANN401
    """Returns the data sets inside a wrapper, and the data set and row of each item, (N,)."""
    if reads_as(data, Subset):
        parts, part, row = flattened(data.dataset)
        rows = np.array(list(map(int, data.indices)), np.int64)
        return parts, part[rows], row[rows]
    if reads_as(data, ConcatDataset):
        parts, numbers, rows_of = [], [], []
        for inner in data.datasets:
            leaves, part, row = flattened(inner)
            numbers.append(part + len(parts))
            rows_of.append(row)
            parts += leaves
        return parts, np.concatenate(numbers), np.concatenate(rows_of)
    for kind, attribute in WRAPPERS.items():
        if reads_as(data, kind):
            return flattened(getattr(data, attribute))
    return [data], np.zeros(len(data), np.int64), np.arange(len(data))


def folder_samples(data: Any) -> list[tuple[str, Any]] | None:  # noqa: ANN401 - of any class
    """Returns the files and labels of a folder of torchvision or timm; None for others."""
    if reads_as(data, DatasetFolder):
        return list(data.samples)
    # Other readers of timm may read anything.
    if reads_as(data, ImageDataset) and type(data.reader) is ReaderImageFolder:
        return list(data.reader.samples)
    return None


def dataset_fingerprint(data: Any) -> str:  # noqa: ANN401 - of any class
    """Returns a digest of the samples of a data set in their order, and of its transform."""
    if callable(fingerprint := getattr(data, "fingerprint", None)):
        return str(fingerprint())
    if reads_as(data, Subset):
        return digest(dataset_fingerprint(data.dataset), map(int, data.indices))
    if reads_as(data, TensorDataset):
        return digest(*map(tensor_fingerprint, data.tensors))
    samples = folder_samples(data)
    if samples is None:
        raise UsageError(f"the samples of a {_name(data)} have no fingerprint; {KEY}")
    files = [[file_fingerprint(path), int(target)] for path, target in samples]
    return digest(files, described([getattr(data, name, None) for name in OPTIONS]))


def described(thing: object) -> str:
    """Returns a digest of a transform: the values and functions that it consists of."""
    with user_errors(f"{repr(thing)[:80]} cannot be hashed", Exception, cure=KEY):
        return str(Hasher.hash(thing))


def plain_options(module: nn.Module) -> str:
    """Returns a digest of a module's public attributes that are plain values or tensors."""
    options = {
        name: value
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name not in WITHOUT_EFFECT and _is_plain(value)
    }
    return described(options)


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def tensor_fingerprint(tensor: Tensor) -> str:
    """Returns a digest of a tensor's values, type and shape."""
    flat = tensor.detach().cpu().contiguous().flatten()
    content = sha256(flat.view(torch.uint8).numpy().data).hexdigest()
    return digest(content, str(tensor.dtype), list(tensor.shape))


def images_fingerprint(dataset: datasets.Dataset, column: str = "image") -> str:
    """Returns a digest of the stored images of a data set without a transform: bytes, or files."""
    if dataset.format["type"] == "custom":
        raise UsageError(f"a data set with a transform of its own has no fingerprint; {KEY}")
    state = sha256()
    images = dataset.with_format(None).select_columns(column)
    images = images.cast_column(column, datasets.Image(decode=False)).with_format("arrow")
    for rows in images.iter(batch_size=ROWS):
        for image in rows.column(column).to_pylist():
            content = image["bytes"]
            if content is None:
                content = file_fingerprint(image["path"]).encode()
            state.update(len(content).to_bytes(8, "little") + content)
    return digest(state.hexdigest(), repr(dataset.features[column]))


def digest(*parts: object) -> str:
    """Returns a digest of texts, numbers, and lists and mappings of them."""
    return sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()


def file_fingerprint(path: str) -> str:
    """Returns the path, the size and the modification time of a file; the URL of a remote one."""
    if is_remote(path):
        return path
    with user_errors(f"{path} cannot be read"):
        status = Path(path).stat()
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def drawn_item(items: Any, row: int) -> tuple[Any, Any]:  # noqa: ANN401 - of any class
    """Returns image and label of a data set's item."""
    noun = f"item {row} of a {_name(items)}"
    try:
        item = items[row]
    except Exception as error:
        raise UsageError(f"{noun} cannot be drawn ({_name(error)}: {error})") from error
    return image_and_label(item, noun)


def image_and_label(sample: object, noun: str) -> tuple[Any, Any]:
    """Returns the first two entries of a sample or batch, or those under its usual keys."""
    if isinstance(sample, Mapping):
        names = {str(name).lower(): name for name in reversed(list(sample))}
        image, label = (
            next((names[key] for key in keys if key in names), None)
            for keys in (IMAGE_KEYS, LABEL_KEYS)
        )
        if image is not None and label is not None:
            return sample[image], sample[label]
    if isinstance(sample, str) or not isinstance(sample, Sequence) or len(sample) < 2:
        raise UsageError(f"{noun} is a {_kind(sample)}; {EXPECTED}")
    return sample[0], sample[1]


def images_and_labels(batch: object, noun: str) -> tuple[Tensor, Tensor]:
    """Returns images (B, C, H, W), floating point, and labels (B,), integers, of a batch."""
    given, targets = image_and_label(batch, noun)
    images, labels = as_tensor(given), as_tensor(targets)
    is_batch = images is not None and images.ndim == 4 and images.is_floating_point()
    if not is_batch or images is None or labels is None or labels.shape != images.shape[:1]:
        raise UsageError(
            f"the images of {noun} are a {_kind(given)}, its labels a {_kind(targets)}; expected "
            "one integer for each image, and floating-point images of shape (batch, channels, "
            "height, width), normalized for the model, as timm_lt.create_loader yields them"
        )
    if len(labels) and (labels.is_floating_point() or labels.dtype == torch.bool):
        # Names the first label that is not an integer.
        check_labels(labels, noun=f"{noun}: labels")
    return images, labels.long()


def as_tensor(values: object) -> Tensor | None:
    """Returns numbers as a tensor, if possible without a copy; None if they have no one shape."""
    if isinstance(values, Tensor):
        return values
    try:
        if isinstance(values, list | tuple) and any(isinstance(one, Tensor) for one in values):
            return torch.stack([torch.as_tensor(one) for one in values])
        array = np.asarray(values)
        # torch takes no negative strides, and warns of arrays that are read-only.
        with catch_warnings(action="ignore", category=UserWarning):
            return torch.from_numpy(array.copy() if min(array.strides, default=0) < 0 else array)
    except (TypeError, ValueError, RuntimeError):
        return None


def _kind(value: object) -> str:
    """Returns the class of a value with its shape and type, or its keys."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{_name(value)} of shape {tuple(value.shape)}, {value.dtype}"
    keys = f" with the keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""
    return f"{_name(value)}{keys}"


def _name(value: object) -> str:
    return type(value).__name__


def as_image(given: Any) -> Any:  # noqa: ANN401 - of any class
    """Returns uint8 pixels as a PIL image, a path as an encoded image, and all else unchanged."""
    if isinstance(given, str | Path):
        return {"path": str(given), "bytes": None}
    is_pixels = isinstance(given, Tensor | np.ndarray) and str(given.dtype).endswith("uint8")
    # Pixels with another number of channels or dimensions stay as they are.
    with suppress(ValueError, TypeError):
        return to_pil_image(given) if is_pixels else given
    return given


def _is_label(label: object) -> bool:
    """Tells whether a label is an integer, or dense; timm's loader would truncate a fraction."""
    if isinstance(label, Tensor | np.ndarray):
        return label.ndim > 0 or isinstance(label.item(), int)
    return isinstance(label, int | np.integer)


class TransformedItems(Dataset[tuple[Any, Any]]):
    """Pairs of image and label; with ``takes_tensors``, float tensors are not transformed."""

    def __init__(self, items: Any, *, takes_tensors: bool = False) -> None:  # noqa: ANN401
        self.items, self.takes_tensors = items, takes_tensors
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        given, label = drawn_item(self.items, row)
        is_tensor = isinstance(given, Tensor) and given.is_floating_point()
        if self.takes_tensors and is_tensor and _is_label(label):
            return given, label
        image = as_image(given)
        if not (isinstance(image, dict | Image.Image) and _is_label(label)):
            raise UsageError(
                f"item {row} of a {_name(self.items)} has a {_kind(image)} and the label {label!r};"
                " a loader takes images of PIL, paths or uint8, and integer labels. Remove the "
                "data set's own transform, or pass use_prefetcher=False, which leaves "
                "floating-point tensors unchanged"
            )
        image = read_image(image, row, datasets.Image())
        return (self.transform(image) if self.transform else image), label

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the data set, if it has epochs."""
        if hasattr(self.items, "set_epoch"):
            self.items.set_epoch(epoch)

    def fingerprint(self) -> str:
        """Returns a digest of the items in their order and of the transform."""
        return digest(dataset_fingerprint(self.items), described(self.transform))


class ImageRows(TransformedItems):
    """Rows of a ``datasets.Dataset`` as pairs of a transformed image and its label."""

    def __init__(self, rows: datasets.Dataset, *, background: object = None) -> None:
        self._image, self._label = image_column(rows), label_column(rows)
        super().__init__(as_rgb(rows, column=self._image, background=background))
        self._column, self._stored = self.items.features[self._image], self.items
        if is_plain(self.items):
            stored = self.items.with_format(None).select_columns([self._image, self._label])
            self._stored = stored.cast_column(self._image, datasets.Image(decode=False))

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self._stored[index]
        image = read_image(row[self._image], index, self._column)
        return (self.transform(image) if self.transform else image), row[self._label]

    def fingerprint(self) -> str:
        """Returns a digest of the images in their order, the labels and the transform."""
        labels = [int(label) for label in self.items.with_format("numpy")[self._label][:]]
        images = images_fingerprint(self.items, self._image)
        return digest(images, labels, described(self.transform))


# Data sets that have the items of another, and the attribute with that other.
WRAPPERS = {
    ImageRows: "items",
    TransformedItems: "items",
    AugMixDataset: "dataset",
    ScheduledTransformDataset: "dataset",
}


def with_transform(data: Any, *, takes_tensors: bool) -> Any:  # noqa: ANN401 - of any class
    """Returns a data set whose transform timm can set: itself, or :class:`TransformedItems`."""
    known = ImageDataset, AugMixDataset, DatasetFolder
    if isinstance(data, IterableDataset) or reads_as(data, *known) or _uses_transform(data):
        return data
    return TransformedItems(data, takes_tensors=takes_tensors)


def _uses_transform(data: Any) -> bool:  # noqa: ANN401 - of any class
    """Tells whether items of a data set are pairs whose image its attribute ``transform`` made."""
    if not hasattr(data, "transform"):
        return False
    made = object()
    try:
        with kept_random_state():
            probe = copy.copy(data)
            probe.transform = lambda _: made
            item = probe[0]
    except Exception:  # noqa: BLE001 - it is raised again when items are drawn
        return False
    is_pair = isinstance(item, tuple) and len(item) == 2
    return is_pair and item[0] is made and _is_label(item[1])
