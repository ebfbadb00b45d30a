"""From a model and images to better rare classes, in one call."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from timm_lt.data import Splits, create_splits
from timm_lt.fitting import AUTO, DEFAULT_HEADS
from timm_lt.heads import Head, get_head, set_head
from timm_lt.metrics import Objective, ShotReport
from timm_lt.recipe import DataRecipe, FeaturesRecipe, ModelRecipe, Recipe, Run, RunOptions
from timm_lt.recipe.classifier import evaluate, extract, fit, fit_joint
from timm_lt.recipe.images import TIMM
from timm_lt.recipe.run import given_run
from timm_lt.recommendation import recommend
from timm_lt.registry import UsageError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Rebalanced:
    """What :func:`rebalance` returns.

    Attributes:
        model: A copy of the model that carries the recommended head, in evaluation mode.
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


def rebalance(
    model: nn.Module,
    dataset: "str | Path | Mapping[str, Dataset]",
    *,
    heads: Sequence[str] | Mapping[str, dict[str, Any]] = DEFAULT_HEADS,
    fresh_classifier: bool = False,
    objective: Objective | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    seed: int = 0,
) -> Rebalanced:
    """Fits every head on a model as it is, and returns it with the best on validation.

    It is what ``timm-lt heads`` does: features of all images are taken once, with the model's own
    preprocessing; nothing but heads is trained. Without a validation or a test split, a part of
    each class is held out.

    Args:
        model: A timm model with one classifier. It stays as it is. If it has another number of
            classes than the data, a linear classifier is fitted first.
        dataset: A folder with a directory of images for each class (or with ``train``, ``val`` and
            ``test`` above them); or the splits by these names, of ``datasets.Dataset`` with the
            columns ``image`` and ``label``.
        heads: Names out of :func:`timm_lt.list_heads`, or options of each by name; two or more.
        fresh_classifier: Fits the linear classifier anew, even if the model has one of as many
            classes, such as one of other data.
        objective: What validation chooses by, see :func:`timm_lt.fit_head`; None is ``"all"``, or
            ``"class_mean"`` where validation is as long-tailed as the training images.
        output: Folder for a decoupled checkpoint with all heads, figures, plots, report and card;
            None writes nothing.
        overwrite: Replaces a run in that folder.
        cache_dir: Folder for the features, for the next call; None keeps them in memory.
        workers: Processes that decode images; None is by the cores.
        seed: Seed of the fits.

    Returns:
        The model with the recommended head, all heads and their figures.

    Raises:
        UsageError: For whatever is wrong with the model, the data or the options.
    """
    options = dict(heads) if isinstance(heads, Mapping) else {name: {} for name in heads}
    if len(options) < 2:
        raise UsageError("there is nothing to choose from: give two heads or more")
    if isinstance(dataset, str | Path):
        root, splits = str(dataset), create_splits("folder", root=str(dataset))
    else:
        root, splits = None, Splits.from_datasets(dataset)
    recipe = Recipe(
        data=DataRecipe(name="folder", root=root, augmentation=TIMM, unreadable="skip"),
        model=ModelRecipe(name=_name(model), pretrained=True, fresh_classifier=fresh_classifier),
        epochs=0,
        features=FeaturesRecipe(cache_dir=None if cache_dir is None else str(cache_dir)),
        heads={**options, AUTO: {}},
        objective=objective,
        seed=seed,
    )
    copied = copy.deepcopy(model).eval()
    joint = not fresh_classifier and get_head(copied).out_features == splits.num_classes
    if not joint:
        reset: Any = copied
        reset.reset_classifier(splits.num_classes)
    folder = None if output is None else Path(output)
    run = given_run(
        recipe,
        splits,
        copied,
        folder=folder,
        options=RunOptions(overwrite=overwrite, workers=workers, quiet=True),
        joint=joint,
    )
    with closing(run):
        return _rebalance(run, folder)


def _rebalance(run: Run, folder: Path | None) -> Rebalanced:
    # It imports timm_lt, whose name this is.
    import train_lt

    features = extract(run)
    if not run.joint:
        fit_joint(run, features)
    run.seconds["heads"] = {}
    heads = fit(run, features, {})
    found = {name: evaluate(run, name, head, features) for name, head in heads.items()}
    reports = {name: evaluation.report for name, evaluation in found.items()}
    if folder is not None:
        train_lt.save(run, heads, found, features)
        digests = {name: evaluation.logits_sha256 for name, evaluation in found.items()}
        train_lt.write_metrics(run, heads, reports, digests)
    record = heads[AUTO].selection
    best = str(record["head"])
    del heads[AUTO], reports[AUTO]
    model = set_head(run.model, copy.deepcopy(heads[best]))
    return Rebalanced(model.eval(), best, heads, reports, recommend(reports, record), folder)


def _name(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    tag = config.get("tag")
    name = config.get("architecture") or type(model).__name__
    return f"{name}.{tag}" if tag else str(name)
