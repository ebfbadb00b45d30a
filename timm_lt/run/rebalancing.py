"""From a model and images to better rare classes, in one call."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from accelerate.utils import extract_model_from_parallel
from torch import nn

from timm_lt.checkpoint import BACKGROUND, GIVEN_DATA, GIVEN_MODEL
from timm_lt.data import Splits, create_splits
from timm_lt.data.given import folder_of, given_splits
from timm_lt.data.sources import checked_source
from timm_lt.fitting import AUTO, DEFAULT_HEADS
from timm_lt.heads import Head, get_head, set_head
from timm_lt.metrics import Objective, ShotReport
from timm_lt.models.label_names import is_for, keeps_classifier
from timm_lt.report.tables import JOINT, recommend
from timm_lt.run.execution import save
from timm_lt.run.folder import REPORT, check_places, check_run_folder
from timm_lt.run.network import TIMM, in_order_of_weights, on_background
from timm_lt.run.recipe import (
    ClassOrder,
    DataRecipe,
    FeaturesRecipe,
    ModelRecipe,
    Recipe,
    RunOptions,
)
from timm_lt.run.setup import Run, complete_run
from timm_lt.run.stages import evaluate, extract, fit, train
from timm_lt.utils.accelerator import temporary_accelerator, torch_defaults, unwrapped
from timm_lt.utils.checks import UsageError, check_mapping
from timm_lt.utils.console import pillow_warnings_ignored

if TYPE_CHECKING:
    import datasets
    from torch.utils.data import Dataset

    # Columns of images and labels, or pairs of an image and its label.
    Images: TypeAlias = datasets.Dataset | Dataset[Any] | Sequence[tuple[Any, int]]

FOLDER = "folder"


@dataclass(frozen=True, repr=False)
class Rebalanced:
    """What :func:`rebalance` returns.

    Attributes:
        model: A copy of the model that carries the recommended head, in evaluation mode and on the
            same device.
        head: Name of that head.
        heads: All fitted heads by name.
        reports: Test figures by head, fractions.
        recommendation: Which head to take, in words.
        folder: Decoupled checkpoint with all heads, if one was to be written.
    """

    model: nn.Module
    head: str
    heads: dict[str, Head]
    reports: dict[str, ShotReport]
    recommendation: str
    folder: Path | None

    @property
    def report(self) -> Path | None:
        """The file ``report.html`` in that folder."""
        return None if self.folder is None else self.folder / REPORT

    def __repr__(self) -> str:
        place = None if self.folder is None else str(self.folder)
        return f"Rebalanced(head={self.head!r}, heads={[*self.heads]}, folder={place!r})"


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
    """Fits every head on a model as it is, and returns it with the best on validation.

    It is what ``timm-lt heads`` does: features of all images are taken once, with the model's own
    preprocessing; nothing but heads is trained. Without a validation or a test split, a fifth of
    each class is held out for it: files by their paths, the same in every call.

    Args:
        model: A timm model with one classifier, which may be wrapped in DistributedDataParallel,
            DataParallel or torch.compile. It stays as it is. If it has another number of
            classes than the data, or other names of them, a linear classifier is fitted first.
        dataset: A folder with a directory of images for each class (or with ``train``, ``val`` and
            ``test`` above them). Or a data set: a ``datasets.Dataset`` with a column of images and
            one ``label``; torchvision's ``ImageFolder`` or timm's ``ImageDataset``, whose files
            are opened when they are drawn; or any pairs of an image (of PIL, uint8 pixels as a
            tensor or array, or the path of a file) and its label. Or data sets by the names
            ``train``, ``val`` and ``test``. A transform of a folder's data set is not used, for the
            model's own is; another data set must not have one that normalizes.
        options: Options of the data source ``folder``, e.g. ``{"other_files": "skip"}``; for a
            folder only.
        heads: Names out of :func:`timm_lt.list_heads`, or options of each by name. ``linear`` is
            always among them, for the others are compared with it.
        class_order: How the classes are numbered in a model without class names, ``"timm"``
            (folders 1, 2, 10) or ``"sorted"`` (1, 10, 2), as torchvision; None finds it out on
            training images where the two differ. Classes of the results have the model's order.
        fresh_classifier: Fits the linear classifier anew, even if the model has one of as many
            classes, such as one of other data.
        objective: What validation chooses by, see :func:`timm_lt.fit_head`; None is ``"all"``, or
            ``"class_mean"`` where validation is as long-tailed as the training images.
        output: Folder for a decoupled checkpoint with all heads, figures, plots, report and card,
            which say that the weights are those of a model given in Python; None writes nothing.
        overwrite: Replaces a run in that folder.
        cache_dir: Folder for the features, for the next call; None keeps them in memory.
        background: Colour behind transparent pixels: a name such as ``"black"``, ``"#rrggbb"``, or
            ``[red, green, blue]``; ``"auto"`` is that of the checkpoint that the model was loaded
            from, or white.
        workers: Processes that decode images; None is by the cores.
        seed: Seed of the fits.

    Returns:
        The model with the recommended head, all heads and their figures; with ``output`` also
        where the report is.

    Raises:
        UsageError: For whatever is wrong with the model, the data or the options.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model must be a model of timm, got {model!r}: make one with "
            "timm_lt.create_model(NAME, pretrained=True)"
        )
    model = unwrapped(model)
    to_fit = _to_fit(heads)
    data, splits = _find_data(dataset, check_mapping("options", options), background)
    recipe = Recipe(
        data=data,
        model=ModelRecipe(
            name=_architecture(model),
            checkpoint=GIVEN_MODEL,
            class_order=class_order,
            fresh_classifier=fresh_classifier,
        ),
        epochs=0,
        features=FeaturesRecipe(cache_dir=None if cache_dir is None else str(cache_dir)),
        heads=to_fit,
        objective=objective,
        seed=seed,
    )
    folder = None if output is None else Path(output)
    check_places(recipe, folder)
    if folder is not None:
        check_run_folder(folder, recipe.to_yaml(), resume=False, overwrite=overwrite)
    copied: Any = _plain_copy(model)
    # A model without a classifier is refused here.
    joint = get_head(model).out_features == splits.num_classes and not fresh_classifier
    names, splits = splits.label_names, on_background(recipe, splits, copied)
    # The architecture's tag says nothing about weights given in Python, unless names agree.
    known = model if is_for(model, names) else copied
    joint = joint and keeps_classifier(known, names, "the model", "fresh_classifier=True")
    weights = ModelRecipe("the model", class_order=class_order)
    splits = in_order_of_weights(splits, known, kept=joint, given=weights)
    if not joint:
        copied.reset_classifier(splits.num_classes)
    with temporary_accelerator() as accelerator:
        name = "rebalanced" if folder is None else folder.name
        copied.to(accelerator.device)
        run = Run(name, recipe, folder, accelerator, splits, copied, joint)
        complete_run(run, RunOptions(overwrite=overwrite, workers=workers))
        with closing(run):
            for stage in (train, extract, fit, evaluate, save):
                stage(run)
    reports = {name: found.report for name, found in run.evaluations.items() if name != AUTO}
    record = run.heads.pop(AUTO).selection
    best = str(record["head"])
    balanced = set_head(run.model, copy.deepcopy(run.heads[best]))
    balanced.__dict__[BACKGROUND] = run.splits.background
    balanced.eval().to(next(model.parameters()).device)
    return Rebalanced(balanced, best, run.heads, reports, recommend(reports, record), folder)


def _to_fit(heads: str | Sequence[str] | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the options of the heads by name, the joint classifier first."""
    if isinstance(heads, str):
        heads = [heads]
    if not isinstance(heads, Mapping | Sequence):
        raise UsageError(f"heads must be names of heads, or options by name, got {heads!r}")
    named = heads if isinstance(heads, Mapping) else dict.fromkeys(heads)
    found = {name: check_mapping(f"head {name!r}", given) for name, given in named.items()}
    chosen = found.pop(AUTO, {})
    found = {JOINT: {}, **found}
    if len(found) < 2:
        raise UsageError(f"there is nothing to choose from: give a head beside {JOINT}")
    return {**found, AUTO: chosen}


def _find_data(
    dataset: object, options: dict[str, Any], background: str | list[int]
) -> tuple[DataRecipe, Splits]:
    """Returns what the recipe says of the data, and their splits."""
    how: dict[str, Any] = {"augmentation": TIMM, "background": background, "unreadable": "skip"}
    if not isinstance(dataset, str | Path):
        if options:
            raise UsageError(
                f"options ({', '.join(options)}) are for a folder: give data sets as they are to be"
            )
        datasets = given_splits(dataset)
        return DataRecipe(GIVEN_DATA, **how), Splits.from_datasets(
            datasets, root=folder_of(dataset)
        )
    root = str(dataset)
    if "root" in options:
        raise UsageError("options: root is the folder itself; leave it out")
    # Before create_splits, which has arguments of its own.
    checked_source(FOLDER, root, {**options})
    splits = create_splits(FOLDER, root=root, **options)
    return DataRecipe(FOLDER, root, options, **how), splits


def _architecture(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


def _plain_copy(model: nn.Module) -> nn.Module:
    """Returns a copy in full precision, without the origin of its weights: they may be any."""
    copied: nn.Module = copy.deepcopy(model)
    # The forward that accelerate wrapped in its mixed precision.
    copied = extract_model_from_parallel(copied, keep_fp32_wrapper=False)
    config = {**(getattr(model, "pretrained_cfg", None) or {})}
    for key in ("tag", "license", "origin_url"):
        config.pop(key, None)
    copied.__dict__["pretrained_cfg"] = copied.__dict__["default_cfg"] = config
    return copied.eval()
