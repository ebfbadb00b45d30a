"""Data sets by name, the means to make a long-tailed one, and images ready for training."""

from timm_lt.data import builtin as builtin  # importing a source registers it
from timm_lt.data import cifar as cifar
from timm_lt.data import folder as folder
from timm_lt.data import hub as hub
from timm_lt.data import lists as lists
from timm_lt.data.augment import create_augmentation as create_augmentation
from timm_lt.data.augment import list_augmentations as list_augmentations
from timm_lt.data.augment import register_augmentation as register_augmentation
from timm_lt.data.builtin import glyph_arrays as glyph_arrays
from timm_lt.data.cifar import cifar_manifest as cifar_manifest
from timm_lt.data.decode import load_image as load_image
from timm_lt.data.given import dataset_labels as dataset_labels
from timm_lt.data.inspection import Inspection as Inspection
from timm_lt.data.inspection import inspect_splits as inspect_splits
from timm_lt.data.list_files import ImageList as ImageList
from timm_lt.data.list_files import read_image_list as read_image_list
from timm_lt.data.lists import check_image_list as check_image_list
from timm_lt.data.loader import Loader as Loader
from timm_lt.data.loader import create_loader as create_loader
from timm_lt.data.long_tailed import make_long_tailed as make_long_tailed
from timm_lt.data.long_tailed import subset_manifest as subset_manifest
from timm_lt.data.sources import create_dataset as create_dataset
from timm_lt.data.sources import list_datasets as list_datasets
from timm_lt.data.sources import register_dataset as register_dataset
from timm_lt.data.splits import Splits as Splits
from timm_lt.data.splits import create_splits as create_splits
from timm_lt.data.splits import hold_out as hold_out
