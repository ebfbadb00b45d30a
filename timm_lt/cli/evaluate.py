"""``timm-lt evaluate``: the figures of a model on a split, by shot group and class."""

import argparse
import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from timm_lt.checkpoint import RECIPE, load_head
from timm_lt.cli.arguments import (
    DATA_HELP,
    MODEL_HELP,
    add_compute_options,
    add_data_options,
    add_weights_options,
    data_recipe,
    load_model,
    model_recipe,
)
from timm_lt.cli.common import (
    Commands,
    add_command,
    add_output_options,
    show_result,
)
from timm_lt.data import Splits, create_splits
from timm_lt.data.damaged import log_exceptional
from timm_lt.data.images import Images
from timm_lt.data.sources import Split
from timm_lt.features import Features, extract_features
from timm_lt.heads import Head, get_head, head_statistics
from timm_lt.metrics import (
    ShotMetrics,
    ShotReport,
    compare_per_class,
    confidence_intervals,
    write_per_class,
)
from timm_lt.models.create import keeps_classifier, shown_as
from timm_lt.models.repo import ModelSource
from timm_lt.report.tables import JOINT, shot_table
from timm_lt.run.network import create_images, in_order_of_weights, on_background
from timm_lt.run.parse import load_recipe
from timm_lt.run.recipe import DataRecipe, Recipe
from timm_lt.training import EVAL_BATCH_SIZE
from timm_lt.utils.accelerator import set_cpu_threads, temporary_accelerator
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import log
from timm_lt.utils.longtail import ShotRule


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    evaluate = add_command(
        commands,
        "evaluate",
        description=(
            "Prints the accuracy of a model, with all heads of its checkpoint or some, by shot "
            "group, with 95 % intervals and the calibration error. Takes any timm model."
        ),
        examples=[
            "timm-lt evaluate output/birds photos",
            "timm-lt evaluate hf-hub:me/birds photos --head crt tau_norm --json figures.json",
            "timm-lt evaluate resnet50 photos --checkpoint model_best.pth.tar",
        ],
    )
    add = evaluate.add_argument
    add("model", help=MODEL_HELP)
    add("data", help=DATA_HELP)
    add("--head", nargs="+", metavar="NAME", help="heads of the checkpoint; all by default")
    add_weights_options(evaluate, "weights for that architecture")
    add_data_options(evaluate)
    add(
        "--split",
        choices=get_args(Split),
        default="test",
        help="split to evaluate on; by default test, which is held out of a folder without splits",
    )
    add("--shot-rule", choices=get_args(ShotRule), default="fb", help="rule of the shot groups")
    add("--per-class", type=Path, metavar="FILE", help="write a CSV of classes")
    add_compute_options(evaluate)
    add_output_options(evaluate, quiet="the table")
    evaluate.set_defaults(command=evaluate_model)


def evaluate_model(arguments: argparse.Namespace) -> None:
    """Evaluates a model with one head after the other, on features that are extracted once."""
    set_cpu_threads(arguments.threads)
    source = ModelSource.find(arguments.model)
    data = _same_split(data_recipe(arguments), source.folder)
    recipe = Recipe(data=data, model=model_recipe(arguments, source.name), epochs=0)
    splits = create_splits(
        data.name, root=data.root, val_fraction=data.val_fraction, **data.options
    )
    model, heads = _load(recipe, source, arguments.head)
    if getattr(model, "num_classes", None) != splits.num_classes:
        raise UsageError(
            f"{arguments.model} has {model.num_classes} classes, and the data have "
            f"{splits.num_classes}; fit heads for them with timm-lt heads"
        )
    splits = _in_order(on_background(recipe, splits, model), model, recipe, arguments.model)
    images = create_images(recipe, splits, model, workers=arguments.workers)[arguments.split]
    reports = _evaluate(model, heads, images, splits.class_counts, arguments.shot_rule)
    rows = images.unreadable_rows()
    log_exceptional(
        arguments.split, splits.datasets[arguments.split], len(rows), rows, images.huge_rows()
    )
    if arguments.per_class is not None:
        per_class = compare_per_class(reports, splits.class_counts, splits.label_names)
        write_per_class(arguments.per_class, per_class)
        log.info("wrote %s", arguments.per_class)
    shown = f"{len(images) - len(rows):,} images of {arguments.split}"
    title = f"{arguments.model} on {data.title}, {shown}, accuracy in percent"
    table = shot_table(
        reports, splits.class_counts, seconds={}, selections={}, title=title, intervals=True
    )
    show_result(arguments, _figures(reports, splits, arguments), table)


def _same_split(data: DataRecipe, folder: Path | None) -> DataRecipe:
    """Reuses the splits of the run that produced the model, if it used the same data.

    Otherwise images that a head was fitted on could be among those that are held out now.
    """
    if folder is None or not (folder / RECIPE).is_file():
        return data
    run = load_recipe(folder / RECIPE).data
    sources = [
        (own.name, own.root and Path(own.root).resolve(), *map(own.options.get, ("train", "repo")))
        for own in (run, data)
    ]
    if sources[0] != sources[1]:
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
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Loads a model with its joint classifier once, and the heads for it."""
    given, size = recipe.model, recipe.data.image_size
    model = load_model(given, size)
    info = None if given.checkpoint else source.read_info()
    heads: dict[str, nn.Module] = {}
    for name in names or (info and [*info.heads]) or [JOINT]:
        if info is not None and name in info.heads:
            if source.repo is not None:
                source.repo.download(weights=False, head=name)
            heads[name] = load_head(info.folder, name, get_head(model))
        elif name == JOINT:
            heads[name] = copy.deepcopy(get_head(model))
        else:
            # Refuses an unknown head, and one that has to be fitted.
            heads[name] = get_head(load_model(given, size, head=name))
    return model, heads


def _in_order(splits: Splits, model: nn.Module, recipe: Recipe, name: str) -> Splits:
    """Numbers the classes of the data as the model does, or warns if their names differ."""
    theirs, cure = splits.label_names or [], "timm-lt heads --fresh-classifier"
    kept = keeps_classifier(model, splits.label_names, name, cure)
    size = recipe.data.image_size
    splits = in_order_of_weights(splits, model, kept=kept, given=recipe.model, image_size=size)
    own = [] if kept else shown_as(model, theirs) or []
    differing = [
        label for label, pair in enumerate(zip(own, theirs, strict=False)) if len({*pair}) > 1
    ]
    if differing:
        label = differing[0]
        log.warning(
            "class %d is %r in %s and %r in the data; figures are right only if such classes mean "
            "the same",
            *(label, own[label], name, theirs[label]),
        )
    return splits


def _evaluate(
    model: nn.Module,
    heads: Mapping[str, nn.Module],
    images: Images,
    class_counts: Tensor,
    rule: ShotRule,
) -> dict[str, ShotReport]:
    shared: Features | None = None
    reports = {}
    for name, head in heads.items():
        if isinstance(head, Head) and head.backbone_statistics:
            with head_statistics(model, head):
                features = _features(model, images)
        else:
            shared = features = _features(model, images) if shared is None else shared
        metrics = ShotMetrics(class_counts, rule)
        parts = (tensor.split(EVAL_BATCH_SIZE) for tensor in (features.values, features.targets))
        with torch.inference_mode():
            for values, targets in zip(*parts, strict=True):
                metrics.update(head(values.float()), targets)
        reports[name] = metrics.compute()
    return reports


def _features(model: nn.Module, images: Images) -> Features:
    with temporary_accelerator() as accelerator:
        loader = images.eval_loader(EVAL_BATCH_SIZE, accelerator)
        return extract_features(model.to(accelerator.device), loader, accelerator=accelerator)


def _figures(
    reports: Mapping[str, ShotReport], splits: Splits, arguments: argparse.Namespace
) -> dict[str, object]:
    counts = splits.class_counts
    return {
        "model": arguments.model,
        "data": arguments.data,
        "split": arguments.split,
        "class_counts": counts.tolist(),
        "label_names": splits.label_names,
        "heads": {name: report.to_dict() for name, report in reports.items()},
        "intervals": {name: confidence_intervals(r, counts) for name, r in reports.items()},
    }
