"""timm_lt: long-tailed image recognition for timm.

One backbone with many classifier heads, chosen when the model is loaded. Importing this package
registers the ``lt_*`` architectures with timm; everything else is imported when it is used.
"""

import importlib
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm_lt.checkpoint import load_head as load_head
    from timm_lt.checkpoint import save_checkpoint as save_checkpoint
    from timm_lt.data import create_dataset as create_dataset
    from timm_lt.data import create_loader as create_loader
    from timm_lt.data import dataset_labels as dataset_labels
    from timm_lt.data import list_datasets as list_datasets
    from timm_lt.data import load_image as load_image
    from timm_lt.data import make_long_tailed as make_long_tailed
    from timm_lt.data import read_image_list as read_image_list
    from timm_lt.features import Features as Features
    from timm_lt.features import extract_features as extract_features
    from timm_lt.fitting import fit_head as fit_head
    from timm_lt.fitting import tau_curve as tau_curve
    from timm_lt.heads import create_head as create_head
    from timm_lt.heads import fold_head as fold_head
    from timm_lt.heads import list_heads as list_heads
    from timm_lt.heads import register_head as register_head
    from timm_lt.heads import set_head as set_head
    from timm_lt.hub import add_head as add_head
    from timm_lt.hub import push_to_hub as push_to_hub
    from timm_lt.losses import create_loss as create_loss
    from timm_lt.losses import list_losses as list_losses
    from timm_lt.losses import register_loss as register_loss
    from timm_lt.metrics import ShotMetrics as ShotMetrics
    from timm_lt.metrics import ShotReport as ShotReport
    from timm_lt.metrics import confidence_intervals as confidence_intervals
    from timm_lt.metrics import evaluate_logits as evaluate_logits
    from timm_lt.metrics import paired_difference as paired_difference
    from timm_lt.metrics import per_class_table as per_class_table
    from timm_lt.metrics import shifted_accuracies as shifted_accuracies
    from timm_lt.metrics import shifted_accuracy as shifted_accuracy
    from timm_lt.metrics import shot_accuracy as shot_accuracy
    from timm_lt.metrics import write_per_class as write_per_class
    from timm_lt.models import create_bilateral as create_bilateral
    from timm_lt.models import create_model as create_model
    from timm_lt.models import list_repo_heads as list_repo_heads
    from timm_lt.run import Rebalanced as Rebalanced
    from timm_lt.run import rebalance as rebalance
    from timm_lt.samplers import create_sampler as create_sampler
    from timm_lt.samplers import list_samplers as list_samplers
    from timm_lt.samplers import register_sampler as register_sampler
    from timm_lt.utils.checks import UsageError as UsageError
    from timm_lt.utils.longtail import class_counts as class_counts

__version__ = "0.1.0"

# The imports above, which tell type checkers the public names, by module.
_EXPORTS = {
    "checkpoint": "load_head save_checkpoint",
    "data": "create_dataset create_loader dataset_labels list_datasets load_image "
    "make_long_tailed read_image_list",
    "features": "Features extract_features",
    "fitting": "fit_head tau_curve",
    "heads": "create_head fold_head list_heads register_head set_head",
    "hub": "add_head push_to_hub",
    "losses": "create_loss list_losses register_loss",
    "metrics": "ShotMetrics ShotReport confidence_intervals evaluate_logits paired_difference "
    "per_class_table shifted_accuracies shifted_accuracy shot_accuracy write_per_class",
    "models": "create_bilateral create_model list_repo_heads",
    "run": "Rebalanced rebalance",
    "samplers": "create_sampler list_samplers register_sampler",
    "utils.checks": "UsageError",
    "utils.longtail": "class_counts",
}
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names.split()}
_PACKAGES = (*(name for name in _EXPORTS if "." not in name), "cli", "report", "training", "utils")


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES, *_MODULES})


def _is_command_line() -> bool:
    """Returns whether ``timm-lt`` or ``python -m timm_lt`` is starting."""
    program = Path(sys.argv[0] if sys.argv else "").stem
    # sys.argv[0] is "-m" until Python has found the module to run, which another package may be.
    is_module = ("-m", __name__) in itertools.pairwise(sys.orig_argv)
    return program == "timm-lt" or (program == "-m" and is_module)


# ``timm-lt --help`` should not wait for torch and timm.
if not _is_command_line():
    importlib.import_module(f"{__name__}.models")
