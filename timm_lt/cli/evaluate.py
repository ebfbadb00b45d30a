"""``timm-lt evaluate``: the figures of a model on a split, by shot group and class."""

import argparse
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from timm_lt.checkpoint import RECIPE, load_head
from timm_lt.cli import inputs
from timm_lt.cli.common import Commands, add_command, add_output_options, show_result
from timm_lt.data import Splits
from timm_lt.data.sources import Split
from timm_lt.heads import get_head
from timm_lt.metrics import compare_per_class, confidence_intervals, write_per_class
from timm_lt.models.create import shown_as
from timm_lt.models.repo import ModelSource
from timm_lt.report.tables import JOINT, shot_table
from timm_lt.run.execution import evaluate, extract, extract_own
from timm_lt.run.network import create_images, match_data
from timm_lt.run.parse import load_recipe
from timm_lt.run.recipe import DataRecipe, Recipe
from timm_lt.run.setup import Run, load_splits
from timm_lt.utils.accelerator import set_cpu_threads, temporary_accelerator
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import log
from timm_lt.utils.longtail import ShotRule


def add_evaluate(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = add_command(commands, "evaluate", evaluate_model)
    add = parser.add_argument
    add("model", help=inputs.MODEL_HELP)
    add("data", help=inputs.DATA_HELP)
    add("--head", nargs="+", metavar="NAME", help="heads of the checkpoint; all by default")
    inputs.add_weights_options(parser, "weights for that architecture")
    inputs.add_data_options(parser)
    split = "split to evaluate on; by default test, which is held out of a folder without splits"
    add("--split", choices=get_args(Split), default="test", help=split)
    add("--shot-rule", choices=get_args(ShotRule), default="fb", help="rule of the shot groups")
    add("--per-class", type=Path, metavar="FILE", help="write a CSV of classes")
    inputs.add_compute_options(parser)
    add_output_options(parser, quiet="the table")


def evaluate_model(arguments: argparse.Namespace) -> None:
    """Prints the accuracy of a model by shot group, with all heads of its checkpoint or some.

    With 95 % intervals and the calibration error. Takes any timm model.

    Examples:
        timm-lt evaluate output/birds photos
        timm-lt evaluate hf-hub:me/birds photos --head crt tau_norm --json figures.json
        timm-lt evaluate resnet50 photos --checkpoint model_best.pth.tar
    """
    set_cpu_threads(arguments.threads)
    source, split = ModelSource.find(arguments.model), arguments.split
    recipe = Recipe(
        data=_same_split(inputs.data_recipe(arguments), source.folder),
        model=inputs.model_recipe(arguments, source.name),
        epochs=0,
        shot_rule=arguments.shot_rule,
    )
    splits = load_splits(recipe)
    model, heads = _load(recipe, source, arguments.head)
    if getattr(model, "num_classes", None) != splits.num_classes:
        raise UsageError(
            f"{arguments.model} has {model.num_classes} classes, and the data have "
            f"{splits.num_classes}; fit heads for them with timm-lt heads"
        )
    splits, kept = match_data(recipe, splits, model, kept=True)
    if not kept:
        _log_other_names(splits, model, arguments.model)
    with temporary_accelerator() as accelerator:
        model.to(accelerator.device)
        run = Run("evaluate", recipe, None, accelerator, splits, model, kept, heads=heads)
        images = create_images(recipe, splits, model, workers=arguments.workers)
        run.images = {split: images[split]}
        extract(run)
        extract_own(run, heads, [split])
        evaluate(run, split)
    reports, counts, names = run.reports, splits.class_counts, splits.label_names
    if arguments.per_class is not None:
        write_per_class(arguments.per_class, compare_per_class(reports, counts, names))
        log.info("wrote %s", arguments.per_class)
    figures = {
        "model": arguments.model,
        "data": arguments.data,
        "split": split,
        "class_counts": counts.tolist(),
        "label_names": names,
        "heads": {name: report.to_dict() for name, report in reports.items()},
        "intervals": {name: confidence_intervals(r, counts) for name, r in reports.items()},
    }
    shown = f"{run.features[split].num_images:,} images of {split}"
    title = f"{arguments.model} on {recipe.data.title}, {shown}, accuracy in percent"
    table = shot_table(reports, counts, seconds={}, selections={}, title=title, intervals=True)
    show_result(arguments, figures, table)


def _same_split(data: DataRecipe, folder: Path | None) -> DataRecipe:
    """Reuses the splits of the model's run on the same data: heads have seen the other images."""

    def source(own: DataRecipe) -> tuple[object, ...]:
        root = own.root and Path(own.root).resolve()
        return own.name, root, own.options.get("train"), own.options.get("repo")

    if folder is None or not (folder / RECIPE).is_file():
        return data
    run = load_recipe(folder / RECIPE).data
    if source(run) != source(data):
        return data
    options = {**run.options, **data.options}
    if options != run.options:
        log.warning(
            "the run of this model had other options of the data (%s); it may have been fitted on "
            "images that are held out now",
            ", ".join(f"{key}={value}" for key, value in run.options.items()) or "none",
        )
    return replace(data, options=options, val_fraction=run.val_fraction)


def _load(
    recipe: Recipe, source: ModelSource, names: list[str] | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a model with its joint classifier once, and the heads for it."""
    given, size = recipe.model, recipe.data.image_size
    model = inputs.load_model(given, size)
    info = None if given.checkpoint else source.read_info()
    heads: dict[str, Any] = {}
    for name in names or (info and [*info.heads]) or [JOINT]:
        if info is not None and name in info.heads:
            if source.repo is not None:
                source.repo.download(weights=False, head=name)
            heads[name] = load_head(info.folder, name, get_head(model))
        elif name == JOINT:
            heads[name] = copy.deepcopy(get_head(model))
        else:
            # Refuses an unknown head, and one that has to be fitted.
            heads[name] = get_head(inputs.load_model(given, size, head=name))
    return model, heads


def _log_other_names(splits: Splits, model: nn.Module, name: str) -> None:
    """Warns of the first class with other names in a model and in the data."""
    theirs = splits.label_names or []
    for label, (own, their) in enumerate(zip(shown_as(model, theirs) or [], theirs, strict=False)):
        if own != their:
            log.warning(
                "class %d is %r in %s and %r in the data; check that they mean the same",
                *(label, own, name, their),
            )
            return
