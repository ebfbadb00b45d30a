"""Data sets by name, the means to make a long-tailed one, and images ready for training."""

import importlib
from typing import TYPE_CHECKING, Any

from timm_lt.data.decode import load_image as load_image
from timm_lt.data.given import dataset_labels as dataset_labels
from timm_lt.data.loader import Loader as Loader
from timm_lt.data.loader import create_loader as create_loader
from timm_lt.data.sources import create_dataset as create_dataset
from timm_lt.data.sources import list_datasets as list_datasets
from timm_lt.data.sources import register_dataset as register_dataset
from timm_lt.data.splits import Splits as Splits
from timm_lt.data.splits import create_splits as create_splits
from timm_lt.data.splits import hold_out as hold_out

if TYPE_CHECKING:
    from timm_lt.data.augment import create_augmentation as create_augmentation
    from timm_lt.data.augment import list_augmentations as list_augmentations
    from timm_lt.data.augment import register_augmentation as register_augmentation
    from timm_lt.data.builtin import glyph_arrays as glyph_arrays
    from timm_lt.data.cifar import cifar_manifest as cifar_manifest
    from timm_lt.data.inspection import Inspection as Inspection
    from timm_lt.data.inspection import inspect_splits as inspect_splits
    from timm_lt.data.list_files import ImageList as ImageList
    from timm_lt.data.list_files import read_image_list as read_image_list
    from timm_lt.data.lists import check_image_list as check_image_list
    from timm_lt.data.long_tailed import make_long_tailed as make_long_tailed
    from timm_lt.data.long_tailed import subset_manifest as subset_manifest

# Names that few runs need; their modules are imported when they are used.
_EXPORTS = {
    "augment": ("create_augmentation", "list_augmentations", "register_augmentation"),
    "builtin": ("glyph_arrays",),
    "cifar": ("cifar_manifest",),
    "inspection": ("Inspection", "inspect_splits"),
    "list_files": ("ImageList", "read_image_list"),
    "lists": ("check_image_list",),
    "long_tailed": ("make_long_tailed", "subset_manifest"),
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    for module, names in _EXPORTS.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for names in _EXPORTS.values() for name in names)})
