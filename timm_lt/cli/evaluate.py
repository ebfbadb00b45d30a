"""``timm-lt evaluate``: the figures of a model on a split, by shot group and class."""

import argparse
import copy
import gc
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from timm_lt.cli.arguments import (
    DATA_HELP,
    MODEL_HELP,
    add_class_order,
    add_data_options,
    add_weights_options,
    data_of_run,
    find_data,
    load_model,
    model_options,
    stored_heads,
)
from timm_lt.cli.common import (
    Commands,
    add_command,
    add_output_options,
    parse_options,
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
from timm_lt.models.label_names import keeps_classifier, shown_as
from timm_lt.report.tables import shot_table
from timm_lt.run.class_order import check_no_order, in_order_of_weights
from timm_lt.run.network import TIMM, create_images, on_background
from timm_lt.run.recipe import DataRecipe, ModelRecipe, Recipe
from timm_lt.training import EVAL_BATCH_SIZE
from timm_lt.utils.accelerator import set_cpu_threads, temporary_accelerator
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import log
from timm_lt.utils.longtail import ShotRule

JOINT = "linear"


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    evaluate = add_command(
        commands,
        "evaluate",
        summary="accuracy of a model by shot group and class",
        description=(
            "Prints the accuracy of a model, with all the heads of its checkpoint or some, by "
            "shot group, with 95 % intervals and the calibration error. Any model does, timm's "
            "own too."
        ),
        examples=[
            "timm-lt evaluate output/birds photos",
            "timm-lt evaluate hf-hub:me/birds photos --head crt tau_norm --json figures.json",
            "timm-lt evaluate resnet50 photos --checkpoint model_best.pth.tar",
        ],
    )
    evaluate.add_argument("model", help=MODEL_HELP)
    evaluate.add_argument("data", help=DATA_HELP)
    evaluate.add_argument(
        "--head", nargs="+", metavar="NAME", help="heads of the checkpoint; all unless given"
    )
    add_weights_options(evaluate, "weights for that architecture")
    add_class_order(evaluate)
    add_data_options(evaluate)
    evaluate.add_argument(
        "--split",
        choices=get_args(Split),
        default="test",
        help="to evaluate on; test unless given, which is held out of a folder without splits",
    )
    evaluate.add_argument(
        "--shot-rule", choices=get_args(ShotRule), default="fb", help="of the shot groups"
    )
    evaluate.add_argument("--per-class", type=Path, metavar="FILE", help="write a CSV of classes")
    evaluate.add_argument("--threads", type=int, help="CPU threads; all unless given")
    evaluate.add_argument(
        "--workers", type=int, help="processes that decode images; by the cores unless given"
    )
    add_output_options(evaluate, quiet="the table")
    evaluate.set_defaults(command=evaluate_model)


def evaluate_model(arguments: argparse.Namespace) -> None:
    """Evaluates a model with one head after the other, on features that are taken once."""
    set_cpu_threads(arguments.threads)
    options = parse_options(arguments.option, "test_fraction=0.3")
    data = DataRecipe(
        **_as_in_the_run(arguments.model, find_data(arguments.data, arguments.root, options)),
        augmentation=TIMM,
        background=arguments.background,
        image_size=arguments.image_size,
        unreadable="skip",
    )
    names = arguments.head or stored_heads(arguments.model) or [JOINT]
    splits = create_splits(
        data.name, root=data.root, val_fraction=data.val_fraction, **data.options
    )
    model, heads = _load(names, splits, arguments)
    recipe = Recipe(data=data, model=ModelRecipe(name=arguments.model))
    splits = _in_order(on_background(recipe, splits, model), model, arguments)
    reports, images = _evaluate(model, heads, splits, data, arguments)
    if arguments.per_class is not None:
        rows = compare_per_class(reports, splits.class_counts, splits.label_names)
        write_per_class(arguments.per_class, rows)
        log.info("wrote %s", arguments.per_class)
    shown = f"{images:,} images of {arguments.split}"
    title = f"{arguments.model} on {data.title}, {shown}, accuracy in percent"
    table = shot_table(
        reports, splits.class_counts, seconds={}, selections={}, title=title, intervals=True
    )
    show_result(arguments, _figures(reports, splits, arguments), table)


def _as_in_the_run(model: str, found: dict[str, Any]) -> dict[str, Any]:
    """Deals data as the run dealt them in whose folder the model lies, if it had the same.

    Otherwise images that a head was fitted on could be among those that are held out now.
    """
    run = data_of_run(model)
    if run is None or run.name != found["name"]:
        return found
    roots = [None if root is None else Path(root).resolve() for root in (run.root, found["root"])]
    parts = [
        {key: of.get(key) for key in ("train", "repo")} for of in (run.options, found["options"])
    ]
    if roots[0] != roots[1] or parts[0] != parts[1]:
        return found
    options = {**run.options, **found["options"]}
    if options != run.options:
        log.warning(
            "the run of %s had other options of the data (%s): it may have been fitted on images "
            "that are held out now",
            *(model, ", ".join(f"{key}={value}" for key, value in run.options.items()) or "none"),
        )
    elif options != found["options"]:
        log.info("data are dealt as in the run: %s", options)
    return {**found, "options": options, "val_fraction": run.val_fraction}


def _load(
    names: Sequence[str], splits: Splits, arguments: argparse.Namespace
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Loads one backbone, and the classifier of each head; never two backbones at a time."""

    def load(name: str) -> nn.Module:
        # A model with a head refers to itself, so that the one before is not gone yet.
        gc.collect()
        head = None if name == JOINT else name
        return load_model(
            arguments.model,
            head=head,
            checkpoint=arguments.checkpoint,
            key=arguments.checkpoint_key,
            image_size=arguments.image_size,
            **model_options(arguments),
        )

    heads: dict[str, nn.Module] = {}
    model: nn.Module | None = None
    for name in reversed(names):
        model = None
        model = load(name)
        _check_classes(model, splits, arguments.model)
        # On the CPU, as the features are.
        heads[name] = copy.deepcopy(get_head(model))
    heads = {name: heads[name] for name in names}
    shared = [name for name in names if not _has_statistics(heads[name])]
    if model is None or (shared and shared[0] != names[0]):
        # The model that was loaded last has the batch-norm statistics of its head.
        model = None
        model = load(shared[0])
    return model, heads


def _has_statistics(classifier: nn.Module) -> bool:
    return isinstance(classifier, Head) and bool(classifier.backbone_statistics)


def _check_classes(model: nn.Module, splits: Splits, name: str) -> None:
    """Checks that a model tells the classes of the data apart."""
    classes = getattr(model, "num_classes", None)
    if classes != splits.num_classes:
        raise UsageError(
            f"{name} tells {classes} classes apart, and the data have {splits.num_classes}: "
            "fit heads for them with timm-lt heads"
        )


def _in_order(splits: Splits, model: nn.Module, arguments: argparse.Namespace) -> Splits:
    """Numbers the classes of the data as the model does; warns where names say others."""
    names, theirs = splits.label_names, splits.label_names or []
    if keeps_classifier(model, names, arguments.model, "timm-lt heads --fresh-classifier"):
        return in_order_of_weights(
            splits,
            model,
            name=arguments.model,
            checkpoint=arguments.checkpoint,
            class_order=arguments.class_order,
            image_size=arguments.image_size,
        )
    check_no_order(arguments.class_order, arguments.model, splits.num_classes)
    own = shown_as(model, theirs) or []
    differing = [pair for pair in zip(own, theirs, strict=False) if pair[0] != pair[1]]
    if differing:
        there, here = differing[0]
        log.warning(
            "class %d is %r in %s and %r in the data: figures are right only if such classes mean "
            "the same",
            *(own.index(there), there, arguments.model, here),
        )
    return splits


def _evaluate(
    model: nn.Module,
    heads: Mapping[str, nn.Module],
    splits: Splits,
    data: DataRecipe,
    arguments: argparse.Namespace,
) -> tuple[dict[str, ShotReport], int]:
    recipe = Recipe(data=data, model=ModelRecipe(name=arguments.model))
    images = create_images(recipe, splits, model, workers=arguments.workers)[arguments.split]
    shared: Features | None = None
    reports = {}
    for name, classifier in heads.items():
        own = _has_statistics(classifier)
        if own or shared is None:
            with head_statistics(model, classifier) if own else nullcontext():
                features = _features(model, images)
            shared = shared if own else features
        else:
            features = shared
        metrics = ShotMetrics(splits.class_counts, arguments.shot_rule)
        with torch.inference_mode():
            for values, targets in zip(
                features.values.split(EVAL_BATCH_SIZE),
                features.targets.split(EVAL_BATCH_SIZE),
                strict=True,
            ):
                metrics.update(classifier(values.float()), targets)
        reports[name] = metrics.compute()
    split, rows = arguments.split, images.unreadable_rows()
    left_out = len(images) - features.num_images
    log_exceptional(split, splits.datasets[split], left_out, rows, images.huge_rows())
    return reports, features.num_images


def _features(model: nn.Module, images: Images) -> Features:
    with temporary_accelerator() as accelerator:
        loader = images.eval_loader(EVAL_BATCH_SIZE, accelerator)
        return extract_features(model.to(accelerator.device), loader, accelerator=accelerator)


def _figures(
    reports: Mapping[str, ShotReport], splits: Splits, arguments: argparse.Namespace
) -> dict[str, object]:
    return {
        "model": arguments.model,
        "data": arguments.data,
        "split": arguments.split,
        "class_counts": splits.class_counts.tolist(),
        "label_names": splits.label_names,
        "heads": {name: report.to_dict() for name, report in reports.items()},
        "intervals": {
            name: confidence_intervals(report, splits.class_counts)
            for name, report in reports.items()
        },
    }
