"""The network of a recipe, its images, and the order of classes in weights without class names.

timm numbers class directories in natural order without regard to case (1, 2, 10), torchvision and
timm_lt by code point (1, 10, 2). The same weights are right in only one of the two orders.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import torch
from timm.utils import natural_key
from torch import Tensor, nn

from timm_lt.checkpoint import GIVEN_MODEL, background_of, find_info
from timm_lt.data import Splits, create_augmentation, list_augmentations
from timm_lt.data.images import Images, StoredImages
from timm_lt.data.sources import Split
from timm_lt.features import extract_features
from timm_lt.heads import HEADS, find_classifiers, get_head, set_head
from timm_lt.models.create import (
    FIELDS,
    create_sized_model,
    image_config,
    keeps_classifier,
    label_names,
    split_options,
)
from timm_lt.models.repo import LOCAL_DIR
from timm_lt.models.weights_file import classes_of_file, create_from_file, read_weights
from timm_lt.run.recipe import ClassOrder, ModelRecipe, Recipe, prefixed
from timm_lt.samplers import create_sampler
from timm_lt.training import start_classifier
from timm_lt.utils.accelerator import available_cores, temporary_accelerator
from timm_lt.utils.checks import Problems, UsageError, check_choice, check_integer, shown_names
from timm_lt.utils.console import log

AUTO = "auto"
# The augmentation that is timm's: images are decoded when they are drawn.
TIMM = "timm"
# Number of images, and of those in a batch, that determine the order of classes.
NUM_IMAGES, BATCH_SIZE = 256, 32
# Two-sided 2 % point of the normal distribution, and the smallest difference of two accuracies.
MIN_Z, MIN_DIFFERENCE = 2.326, 0.2
WORDS: dict[ClassOrder, str] = {"timm": "timm's natural order", "sorted": "sorted order"}
# Options in messages: of the command line, of a recipe, and in Python.
ORDER = "--class-order timm or --class-order sorted (in recipes and Python class_order)"
FRESH = "timm-lt heads --fresh-classifier (in recipes and Python fresh_classifier)"


def create_network(recipe: Recipe, num_classes: int) -> nn.Module:
    """Creates the model of a recipe with its joint classifier, from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    given, size = recipe.model, recipe.data.image_size
    head, ours, theirs = _new_head(given)
    with prefixed("model"):
        options = dict(num_classes=num_classes, **theirs)
        if given.checkpoint is None:
            model = create_sized_model(given.name, given.pretrained, size, **options)
        else:
            options |= {"classifier": False if given.fresh_classifier else None}
            options |= {"key": given.checkpoint_key, "image_size": size}
            model = create_from_file(given.name, given.checkpoint, **options)
    if head is not None:
        set_head(model, head, **ours)
    if given.fresh_classifier:
        _draw_classifier(recipe, model)
    return model


def _new_head(given: ModelRecipe) -> tuple[str | None, dict[str, Any], dict[str, Any]]:
    """Returns a head that a finished run has not fitted, its options, and those of the model."""
    head, folder = str(given.options.get("head")), Path(given.name.removeprefix(LOCAL_DIR))
    is_new = given.name.startswith(LOCAL_DIR) and head in HEADS and HEADS[head].own_state
    info = find_info(folder) if is_new else None
    if not is_new or (info is not None and head in info.heads):
        return None, {}, given.options
    ours, theirs = split_options(head, given.options)
    return head, ours, {key: value for key, value in theirs.items() if key != "head"}


def start_network(recipe: Recipe, loss: nn.Module, model: nn.Module, num_classes: int) -> None:
    """Initializes a classifier that is not for the classes of the data, as the loss wants it."""
    if recipe.model.pretrained:
        _draw_classifier(recipe, model)
    start_classifier(loss, model, num_classes)


def _draw_classifier(recipe: Recipe, model: nn.Module) -> None:
    # The same bits, whatever was drawn while the model was created.
    torch.manual_seed(recipe.seed)
    for classifier in find_classifiers(model).values():
        classifier.reset_parameters()


def create_images(
    recipe: Recipe, splits: Splits, model: nn.Module, *, workers: int | None
) -> dict[Split, Images]:
    """Creates the images of every split as the model takes them; only train is augmented."""
    data, config = recipe.data, image_config(model)
    create: Callable[..., Images] = splits.images
    augmentation: object
    common = {"size": _size(recipe, model), "seed": recipe.seed, "unreadable": data.unreadable}
    if data.augmentation == TIMM:
        # Without a number, as many for each training process as it has cores.
        number = torch.get_num_threads() if workers is None else workers
        check_integer("workers", number, minimum=0, maximum=64 * available_cores())
        create, augmentation = splits.stored_images, data.augmentation_options
        common |= {"workers": number, "preprocessing": {key: config[key] for key in FIELDS}}
    elif workers:
        raise UsageError("--workers only applies with data.augmentation timm; remove it")
    else:
        check_choice("augmentation", data.augmentation, (*list_augmentations(), TIMM))
        augmentation = create_augmentation(data.augmentation, **data.augmentation_options)
        common |= {"mean": config["mean"], "std": config["std"]}
    images: dict[Split, Images] = {}
    problems = Problems()
    for split in get_args(Split):
        own = augmentation if split == "train" else None
        with problems.collected():
            images[split] = create(split, augmentation=own, **common)
    problems.check()
    return images


def _size(recipe: Recipe, model: nn.Module) -> Any:  # noqa: ANN401
    size = recipe.data.image_size
    return image_config(model)["input_size"][1:] if size is None else (size, size)


def has_classifier(given: ModelRecipe, model: nn.Module, num_classes: int) -> bool:
    """Returns whether the classifier of a model has weights for as many classes, and is kept."""
    if given.checkpoint is not None:
        stored = classes_of_file(given.checkpoint, model, given.checkpoint_key)
    else:
        config = getattr(model, "pretrained_cfg", None) or {}
        stored = config.get("num_classes") if given.pretrained else None
    return stored == num_classes and not given.fresh_classifier


def match_data(
    recipe: Recipe, splits: Splits, model: nn.Module, *, kept: bool, named: nn.Module | None = None
) -> tuple[Splits, bool]:
    """Fits the background and the class order of the data to a model.

    Class names in the weights (of ``named`` if given) decide the order, then the recipe, then
    training images. Also returns whether a classifier that is kept is for these classes.
    """
    given, background = recipe.model, recipe.data.background
    weights, named = given.checkpoint or given.name, named or model
    with prefixed("data"):
        splits = splits.on_background(background_of(model) if background == AUTO else background)
    names, own = splits.label_names, label_names(named)
    kept = kept and keeps_classifier(named, names, weights, FRESH)
    orders, order = class_orders(names or ()), names
    if given.class_order is not None:
        check_choice("class order", given.class_order, get_args(ClassOrder))
        if own or not (kept and names):
            raise UsageError(
                f"class order {given.class_order} only applies to a classifier that is kept and "
                "has no class names, and to data that have; remove it"
            )
        order = orders[given.class_order]
    elif kept and names and own:
        order = own if sorted(own) == sorted(names) else names
    elif kept and names in orders.values() and orders["timm"] != orders["sorted"]:
        order = _order_of_weights(recipe, splits, model, orders)
    return splits if order in (names, None) else splits.in_order(order or []), kept


def class_orders(names: Sequence[str]) -> dict[ClassOrder, list[str]]:
    """Returns class names in the orders of timm's and torchvision's folders.

    >>> class_orders(["2", "10", "b", "A"])
    {'timm': ['2', '10', 'A', 'b'], 'sorted': ['10', '2', 'A', 'b']}
    """
    by_code_point = natural = sorted(names)
    # timm takes superscripts for numbers, which int() refuses.
    with suppress(ValueError):
        natural = sorted(by_code_point, key=natural_key)
    return {"timm": natural, "sorted": by_code_point}


def _order_of_weights(
    recipe: Recipe, splits: Splits, model: nn.Module, orders: Mapping[ClassOrder, list[str]]
) -> list[str]:
    """Returns the classes in the order in which clearly more training images are right."""
    given, names = recipe.model, splits.label_names or []
    weights = given.checkpoint or given.name
    log.info("determining the order of the classes in the weights of %s", weights)
    labels, hits = _hits(recipe, splits, model, orders)
    seen = f"of {len(labels)} training images, " + " and ".join(
        f"{int(right.sum())} are right in {WORDS[order]} ({shown_names(orders[order])})"
        for order, right in hits.items()
    )
    if order := _clearly_better(labels, hits):
        say = log.info if orders[order] == names else log.warning
        say("classes are numbered as in the weights, in %s: %s", WORDS[order], seen)
        return orders[order]
    if recipe.epochs:
        # The classifier is trained further.
        log.info("the order of the classes in the weights of %s is not clear: %s", weights, seen)
        return names
    # Files of timm's train.py name their architecture.
    is_file = given.checkpoint not in (None, GIVEN_MODEL)
    if names == orders["timm"] or (is_file and read_weights(weights).architecture is not None):
        log.warning(
            "classes are numbered in %s, as timm's train.py does, since images do not tell the "
            "order of the weights: %s; if it is wrong, choose %s",
            *(WORDS["timm"], seen, ORDER),
        )
        return orders["timm"]
    raise UsageError(
        f"it is not clear in which order the weights of {weights} have the classes: {seen}; choose "
        f"{ORDER}, or fit a new classifier with {FRESH}"
    )


def _clearly_better(labels: Tensor, hits: Mapping[ClassOrder, Tensor]) -> ClassOrder | None:
    """Returns the order in which clearly more images (N,) are right; classes count the same."""
    _, classes, counts = labels.unique(return_inverse=True, return_counts=True)
    shares = (hits["timm"].double() - hits["sorted"].double()) / counts[classes] / len(counts)
    difference, spread = float(shares.sum()), float(shares.square().sum().sqrt())
    if abs(difference) < max(MIN_DIFFERENCE, MIN_Z * spread):
        return None
    return "timm" if difference > 0 else "sorted"


def _hits(
    recipe: Recipe, splits: Splits, model: nn.Module, orders: Mapping[ClassOrder, list[str]]
) -> tuple[Tensor, dict[ClassOrder, Tensor]]:
    """Returns labels of images whose classes differ in the orders, and by order what is right."""
    index = {}
    for order, found in orders.items():
        label_of = {name: label for label, name in enumerate(found)}
        index[order] = torch.tensor([label_of[name] for name in splits.label_names or []])
    labels = splits.labels["train"]
    rows = (index["timm"] != index["sorted"])[labels].nonzero().flatten()
    if len(rows) > NUM_IMAGES:
        classes = labels[rows].unique(return_inverse=True)[1]
        drawn = create_sampler("class_balanced", classes, num_samples=NUM_IMAGES)
        rows = rows[torch.tensor(list(drawn)).unique()]
    config = image_config(model)
    images = StoredImages(
        splits.datasets["train"].select(rows.numpy()),
        labels[rows],
        size=_size(recipe, model),
        preprocessing={key: config[key] for key in FIELDS},
        unreadable="skip",
    )
    with temporary_accelerator() as accelerator:
        loader = images.eval_loader(BATCH_SIZE, accelerator)
        model.to(accelerator.device)
        features = extract_features(model, loader, accelerator=accelerator)
        with torch.inference_mode():
            preds = get_head(model)(features.values.to(accelerator.device)).argmax(dim=1).cpu()
    return features.targets, {order: preds == of[features.targets] for order, of in index.items()}
