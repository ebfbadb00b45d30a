"""From a model and images to better rare classes, in one call."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from accelerate.utils import broadcast_object_list, extract_model_from_parallel
from torch import nn

from timm_lt.checkpoint import BACKGROUND, GIVEN_DATA, GIVEN_MODEL
from timm_lt.data import Splits, create_splits
from timm_lt.data.given import folder_of, given_splits
from timm_lt.data.sources import checked_source
from timm_lt.fitting import AUTO, DEFAULT_HEADS
from timm_lt.heads import Head, get_head, set_head
from timm_lt.metrics import Objective, ShotReport
from timm_lt.models.create import is_for
from timm_lt.report.tables import JOINT, recommend
from timm_lt.run.execution import run_stages
from timm_lt.run.folder import REPORT, check_run_folder
from timm_lt.run.network import TIMM, match_data
from timm_lt.run.recipe import (
    ClassOrder,
    DataRecipe,
    FeaturesRecipe,
    ModelRecipe,
    Recipe,
    RunOptions,
    prefixed,
)
from timm_lt.run.setup import Run, complete_run
from timm_lt.utils.accelerator import temporary_accelerator, torch_defaults, unwrapped
from timm_lt.utils.checks import UsageError, check_mapping
from timm_lt.utils.console import pillow_warnings_ignored

if TYPE_CHECKING:
    import datasets
    from torch.utils.data import Dataset

    # Columns of images and labels, or pairs of an image and its label.
    Images: TypeAlias = datasets.Dataset | Dataset[Any] | Sequence[tuple[Any, int]]


@dataclass(frozen=True)
class Rebalanced:
    """Result of :func:`rebalance`.

    Attributes:
        model: A copy of the model with the recommended head, in evaluation mode and on the same
            device.
        head: Name of that head.
        heads: All fitted heads by name.
        reports: Test figures by head, fractions.
        recommendation: Which head to take, in words.
        folder: Decoupled checkpoint with all heads, if one was written.
    """

    model: nn.Module = field(repr=False)
    head: str
    heads: dict[str, Head] = field(repr=False)
    reports: dict[str, ShotReport] = field(repr=False)
    recommendation: str = field(repr=False)
    folder: Path | None

    @property
    def report(self) -> Path | None:
        """The file ``report.html`` in that folder."""
        return None if self.folder is None else self.folder / REPORT


@pillow_warnings_ignored()
@torch_defaults()
def rebalance(
    model: nn.Module,
    dataset: "str | Path | Images | Mapping[str, Images]",
    *,
    options: Mapping[str, Any] | None = None,
    heads: str | Sequence[str] | Mapping[str, Mapping[str, Any] | None] = DEFAULT_HEADS,
    class_order: ClassOrder | None = None,
    fresh_classifier: bool = False,
    objective: Objective | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    cache_dir: str | Path | None = None,
    background: str | list[int] = "auto",
    workers: int | None = None,
    seed: int = 0,
) -> Rebalanced:
    """Fits all heads on a model, and returns it with the one that is best on validation.

    Like ``timm-lt heads``, it extracts the features of all images once, with the model's own
    preprocessing, and trains nothing but heads. If there is no validation or test split, a fifth of
    each class is held out for it: files by their paths, the same in every call.

    Args:
        model: A timm model with one classifier, which may be wrapped in DistributedDataParallel,
            DataParallel or torch.compile. It is not changed. If its number of classes or their
            names are not those of the data, a linear classifier is fitted first.
        dataset: A folder with a directory of images per class, or with ``train``, ``val`` and
            ``test`` above them. Or a ``datasets.Dataset`` with columns of images and ``label``,
            torchvision's ``ImageFolder``, timm's ``ImageDataset``, or any pairs of an image (of
            PIL, uint8 pixels, or a path) and its label. Or such data sets by the names ``train``,
            ``val`` and ``test``. The transform of a folder's data set is not applied, since the
            model's own is; other data sets must not normalize.
        options: Options of the data source ``folder``, e.g. ``{"other_files": "skip"}``.
        heads: Names out of :func:`timm_lt.list_heads`, or options of each by name. ``linear``, with
            which the others are compared, is always included.
        class_order: Order of the classes in a model without class names, ``"timm"`` (folders 1, 2,
            10) or ``"sorted"`` (1, 10, 2), as in torchvision; None determines it on training
            images. Results have the classes in the model's order.
        fresh_classifier: Fit a new linear classifier, even if the model has one of as many classes.
        objective: Objective on validation, see :func:`timm_lt.fit_head`; None is ``"all"``, or
            ``"class_mean"`` if validation is as long-tailed as the training images.
        output: Folder for a decoupled checkpoint with figures, plots, report and card, or None.
        overwrite: Replace a run in that folder.
        cache_dir: Folder for the features, for the next call; None keeps them in memory.
        background: Colour behind transparent pixels: a name such as ``"black"``, ``"#rrggbb"``, or
            ``[red, green, blue]``; ``"auto"`` takes that of the model's checkpoint, or white.
        workers: Worker processes that decode images; None is by the cores.
        seed: Seed of the fits.

    Raises:
        UsageError: For any mistake in the model, the data or the options.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model must be a model of timm, got {model!r}: make one with "
            "timm_lt.create_model(NAME, pretrained=True)"
        )
    model = unwrapped(model)
    to_fit = _to_fit(heads)
    data, splits = _find_data(dataset, check_mapping("options", options), background)
    config = getattr(model, "pretrained_cfg", None) or {}
    architecture = str(config.get("architecture") or type(model).__name__)
    order: dict[str, Any] = {"class_order": class_order, "fresh_classifier": fresh_classifier}
    recipe = Recipe(
        data=data,
        model=ModelRecipe(architecture, checkpoint=GIVEN_MODEL, **order),
        epochs=0,
        features=FeaturesRecipe(cache_dir=None if cache_dir is None else str(cache_dir)),
        heads=to_fit,
        objective=objective,
        seed=seed,
    )
    folder = None if output is None else Path(output)
    check_run_folder(folder, recipe, overwrite=overwrite)
    copied: Any = _plain_copy(model)
    # A model without a classifier is refused here.
    kept = get_head(model).out_features == splits.num_classes and not fresh_classifier
    # The architecture's tag says nothing about weights given in Python, unless names agree.
    named = model if is_for(model, splits.label_names) else copied
    splits, joint = match_data(recipe, splits, copied, kept=kept, named=named)
    if not joint:
        copied.reset_classifier(splits.num_classes)
    with temporary_accelerator() as accelerator:
        name = "rebalanced" if folder is None else folder.name
        copied.to(accelerator.device)
        run = Run(name, recipe, folder, accelerator, splits, copied, joint)
        complete_run(run, RunOptions(overwrite=overwrite, workers=workers))
        with closing(run):
            run_stages(run)
        # The main process alone has fitted and evaluated heads.
        run.heads, run.evaluations = broadcast_object_list([run.heads, run.evaluations])
    reports = {name: report for name, report in run.reports.items() if name != AUTO}
    record = run.heads.pop(AUTO).selection
    best = str(record["head"])
    balanced = set_head(run.model, copy.deepcopy(run.heads[best]))
    balanced.__dict__[BACKGROUND] = run.splits.background
    balanced.eval().to(next(model.parameters()).device)
    return Rebalanced(balanced, best, run.heads, reports, recommend(reports, record), folder)


def _to_fit(heads: str | Sequence[str] | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the options of the heads by name, the joint classifier first and auto last."""
    with prefixed("heads"):
        named = [heads] if isinstance(heads, str) else heads
        named = named if isinstance(named, Mapping) else dict.fromkeys(named)
    options = {name: check_mapping(f"head {name!r}", given) for name, given in named.items()}
    if not options.keys() - {JOINT, AUTO}:
        raise UsageError(f"there is nothing to choose from: give a head besides {JOINT}")
    return {JOINT: {}, **options, AUTO: options.pop(AUTO, {})}


def _find_data(
    dataset: object, options: dict[str, Any], background: str | list[int]
) -> tuple[DataRecipe, Splits]:
    """Returns the data's part of the recipe, and their splits."""
    how: dict[str, Any] = {"augmentation": TIMM, "background": background, "unreadable": "skip"}
    if isinstance(dataset, str | Path):
        root = str(dataset)
        with prefixed("options"):
            # create_splits has arguments of its own, which are not options of the folder.
            checked_source("folder", None, dict(root=root, **options))
        splits = create_splits("folder", root=root, **options)
        return DataRecipe("folder", root, options, **how), splits
    if options:
        raise UsageError(
            f"options ({', '.join(options)}) only apply when `dataset` is a folder; apply them to "
            "the data set yourself"
        )
    splits = Splits.from_datasets(given_splits(dataset), root=folder_of(dataset))
    return DataRecipe(GIVEN_DATA, **how), splits


def _plain_copy(model: nn.Module) -> nn.Module:
    """Returns a copy in full precision, without the origin of its weights, which may be any."""
    copied: nn.Module = copy.deepcopy(model)
    # Remove the forward that accelerate wrapped in its mixed precision.
    copied = extract_model_from_parallel(copied, keep_fp32_wrapper=False)
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    for key in ("tag", "license", "origin_url"):
        config.pop(key, None)
    copied.__dict__["pretrained_cfg"] = copied.__dict__["default_cfg"] = config
    return copied.eval()
