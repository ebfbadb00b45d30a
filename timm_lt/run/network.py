"""The network of a recipe, its images, and the order of classes in weights without class names.

timm numbers class directories in natural order without regard to case (1, 2, 10), torchvision and
timm_lt by code point (1, 10, 2). The same weights are right in only one of the two orders.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import timm.data
import torch
from accelerate import Accelerator
from timm.utils import natural_key
from torch import Tensor, nn

from timm_lt.checkpoint import background_of, find_info
from timm_lt.data import Splits, create_augmentation, list_augmentations
from timm_lt.data.damaged import check_classes_left, verify_images
from timm_lt.data.decode import encoded_images, read_image
from timm_lt.data.images import Images
from timm_lt.data.sources import Split
from timm_lt.heads import HEADS, find_classifiers, set_head
from timm_lt.models.create import (
    FIELDS,
    create_sized_model,
    image_config,
    is_for,
    label_names,
    split_options,
)
from timm_lt.models.repo import LOCAL_DIR
from timm_lt.models.third_party import read_weights
from timm_lt.models.weights_file import classes_of_file, create_from_file
from timm_lt.run.recipe import ClassOrder, ModelRecipe, Recipe, prefixed
from timm_lt.samplers import create_sampler
from timm_lt.training import start_classifier
from timm_lt.utils.accelerator import available_cores
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
HOW = (
    "--class-order timm or --class-order sorted (class_order= in Python, model.class_order in a "
    "recipe)"
)


def create_network(recipe: Recipe, num_classes: int) -> nn.Module:
    """Creates the model of a recipe with its joint classifier, from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    given, size = recipe.model, recipe.data.image_size
    head, ours, theirs = _new_head(given)
    with prefixed("model"):
        if given.checkpoint is None:
            model = create_sized_model(
                given.name, given.pretrained, size, num_classes=num_classes, **theirs
            )
        else:
            model = create_from_file(
                given.name,
                given.checkpoint,
                num_classes=num_classes,
                classifier=False if given.fresh_classifier else None,
                key=given.checkpoint_key,
                image_size=size,
                **theirs,
            )
    if head is not None:
        set_head(model, head, **ours)
    if given.fresh_classifier:
        _draw_classifier(recipe, model)
    return model


def _new_head(given: ModelRecipe) -> tuple[str | None, dict[str, Any], dict[str, Any]]:
    """Returns a new head for the classifier of a finished run, its options, and the model's.

    A head that the run has fitted is loaded with the model instead.
    """
    head = str(given.options.get("head"))
    if not given.name.startswith(LOCAL_DIR) or head not in HEADS or not HEADS[head].own_state:
        return None, {}, given.options
    folder = Path(given.name.removeprefix(LOCAL_DIR))
    info = find_info(folder)
    if info is not None and head in info.heads:
        return None, {}, given.options
    ours, theirs = split_options(head, given.options)
    return head, ours, {key: value for key, value in theirs.items() if key != "head"}


def has_classifier(
    given: ModelRecipe, model: nn.Module, num_classes: int, names: Sequence[str] | None
) -> bool:
    """Returns whether the classifier of a model with weights is one for the classes of the data.

    It has as many, and if both have names of the classes, they are the same in any order.
    """
    if given.checkpoint is not None:
        stored = classes_of_file(given.checkpoint, model, given.checkpoint_key)
    else:
        config = getattr(model, "pretrained_cfg", None) or {}
        stored = config.get("num_classes") if given.pretrained else None
    kept = stored == num_classes and not given.fresh_classifier
    return kept and is_for(model, names) is not False


def start_network(
    recipe: Recipe,
    loss: nn.Module,
    model: nn.Module,
    num_classes: int,
    names: Sequence[str] | None = None,
) -> None:
    """Initializes the classifier as the loss wants it, unless it is a pretrained one.

    Args:
        recipe: The recipe.
        loss: The loss.
        model: The model; it is changed in place.
        num_classes: Number of classes C.
        names: Names of the classes, (C,); a pretrained classifier of other names is drawn anew.
    """
    if has_classifier(recipe.model, model, num_classes, names):
        return
    if recipe.model.pretrained:
        _draw_classifier(recipe, model)
    start_classifier(loss, model, num_classes)


def _draw_classifier(recipe: Recipe, model: nn.Module) -> None:
    # The same bits, whatever was drawn while the model was created.
    torch.manual_seed(recipe.seed)
    for classifier in find_classifiers(model).values():
        classifier.reset_parameters()


def on_background(recipe: Recipe, splits: Splits, model: nn.Module) -> Splits:
    """Returns the splits with the background of the recipe, or of the model's checkpoint."""
    given = recipe.data.background
    with prefixed("data"):
        return splits.on_background(background_of(model) if given == AUTO else given)


def create_images(
    recipe: Recipe, splits: Splits, model: nn.Module, *, workers: int | None
) -> dict[Split, Images]:
    """Creates the images of every split as the model takes them; only train is augmented."""
    data, config = recipe.data, image_config(model)
    size = (data.image_size, data.image_size) if data.image_size else config["input_size"][1:]
    common: dict[str, Any] = {"size": size, "seed": recipe.seed, "unreadable": data.unreadable}
    if data.augmentation == TIMM:
        # Without a number, as many for each training process as it has cores.
        number = torch.get_num_threads() if workers is None else workers
        check_integer("workers", number, minimum=0, maximum=64 * available_cores())
        preprocessing = {key: config[key] for key in FIELDS}
        return {
            split: splits.stored_images(
                split,
                preprocessing=preprocessing,
                augmentation=data.augmentation_options if split == "train" else None,
                workers=number,
                **common,
            )
            for split in get_args(Split)
        }
    if workers:
        raise UsageError("--workers only applies with data.augmentation timm; remove it")
    check_choice("augmentation", data.augmentation, (*list_augmentations(), TIMM))
    augmentation = create_augmentation(data.augmentation, **data.augmentation_options)
    images: dict[Split, Images] = {}
    problems = Problems()
    for split in get_args(Split):
        with problems.collected():
            images[split] = splits.images(
                split,
                mean=config["mean"],
                std=config["std"],
                augmentation=augmentation if split == "train" else None,
                **common,
            )
    problems.check()
    return images


def check_readable(
    recipe: Recipe, splits: Splits, images: Mapping[Split, Images], accelerator: Accelerator
) -> None:
    """Checks that images can be read; or, if those that cannot are skipped, what is left.

    Raises:
        UsageError: If images cannot be read, or a class has no others.
    """
    data = recipe.data
    if data.augmentation != TIMM:
        unreadable = {str(split): found.unreadable_rows() for split, found in images.items()}
    elif data.verify:
        unreadable = verify_images(splits.datasets, accelerator, unreadable=data.unreadable)
    else:
        return
    check_classes_left(splits.labels, unreadable, splits.label_names)


def class_orders(names: Sequence[str]) -> dict[ClassOrder, list[str]]:
    """Returns class names in the orders of timm's and torchvision's folders.

    >>> class_orders(["2", "10", "b", "A"])
    {'timm': ['2', '10', 'A', 'b'], 'sorted': ['10', '2', 'A', 'b']}
    """
    by_code_point = sorted(names)
    try:
        natural = sorted(by_code_point, key=natural_key)
    except ValueError:
        # timm takes superscripts for numbers, which int() refuses.
        natural = by_code_point
    return {"timm": natural, "sorted": by_code_point}


def in_order_of_weights(
    splits: Splits,
    model: nn.Module,
    *,
    kept: bool = True,
    given: ModelRecipe,
    image_size: int | None = None,
    trained: bool = False,
) -> Splits:
    """Numbers the classes of the data as a classifier with its weights does.

    If names come with the weights, they decide. Otherwise it is the order that is asked for; or,
    where timm's and torchvision's differ, the one in which the model is right about clearly more
    training images. If neither is clear, it is timm's for data in that order and for a file that
    names its architecture, as those of timm's ``train.py`` do; else the user is asked.

    Args:
        splits: The data.
        model: A model with a classifier for as many classes.
        kept: Whether that classifier is kept; a new one has the order of the data.
        given: Name of the model, file of its weights, and ``class_order``.
        image_size: Side of the images in pixels; None is the model's.
        trained: Whether the classifier is trained further: if the order of the weights is not
            clear, the order of the data stays.

    Raises:
        UsageError: If the order cannot be determined, or is asked for without a choice.
    """
    name, names, own = given.checkpoint or given.name, splits.label_names, label_names(model)
    if given.class_order is not None:
        check_choice("class order", given.class_order, get_args(ClassOrder))
        if kept and names and not own:
            return splits.in_order(class_orders(names)[given.class_order])
        reason = f"{name} has none for these classes" if not kept else "the data lack class names"
        reason = f"the weights of {name} have class names" if kept and own else reason
        raise UsageError(
            f"class order {given.class_order} only applies to a classifier that is kept and has no "
            f"class names, and {reason}; remove it"
        )
    if not names or not kept:
        return splits
    if own:
        return splits.in_order(own) if sorted(own) == sorted(names) else splits
    orders = class_orders(names)
    if orders["timm"] == orders["sorted"] or names not in orders.values():
        return splits
    log.info("determining the order of the classes in the weights of %s", name)
    found, seen = _order_by_images(splits, model, orders, image_size)
    if found is not None:
        say = log.info if orders[found] == names else log.warning
        say("classes are numbered as in the weights, in %s: of %s", WORDS[found], seen)
        return splits.in_order(orders[found])
    if trained:
        log.info("the order of the classes in the weights of %s is not clear: of %s", name, seen)
        return splits
    from_timm = given.checkpoint and read_weights(given.checkpoint).architecture is not None
    if names == orders["timm"] or from_timm:
        log.warning(
            "classes are numbered in %s, as timm's train.py does, since images do not tell the "
            "order of the weights: of %s; if it is wrong, say --class-order sorted (class_order= "
            "in Python)",
            *(WORDS["timm"], seen),
        )
        return splits.in_order(orders["timm"])
    raise UsageError(
        f"it is not clear in which order the weights of {name} have the classes: of {seen}; say "
        f"{HOW}, or fit a new classifier (--fresh-classifier, in Python fresh_classifier=True)"
    )


def _order_by_images(
    splits: Splits,
    model: nn.Module,
    orders: Mapping[ClassOrder, list[str]],
    image_size: int | None,
) -> tuple[ClassOrder | None, str]:
    """Returns the order in which clearly more training images are right, if any, and the numbers.

    Each class counts the same, and no image is right in both orders. A model that always gives the
    same answer is as good in one as in the other.
    """
    labels, names = splits.labels["train"], splits.label_names or []
    index = {}
    for order, found in orders.items():
        place = {name: label for label, name in enumerate(found)}
        index[order] = torch.tensor([place[name] for name in names])
    rows = (index["timm"] != index["sorted"])[labels].nonzero().flatten()
    if len(rows) > NUM_IMAGES:
        classes = labels[rows].unique(return_inverse=True)[1]
        drawn = create_sampler("class_balanced", classes, num_samples=NUM_IMAGES)
        rows = rows[torch.tensor(list(drawn)).unique()]
    rows, preds = _predictions(model, splits, rows, image_size)
    labels = labels[rows]
    hits = {order: preds == labels_there[labels] for order, labels_there in index.items()}
    seen = " and ".join(
        f"{int(right.sum())} are right in {WORDS[order]} ({shown_names(orders[order])})"
        for order, right in hits.items()
    )
    seen = f"{len(rows)} training images, {seen}"
    _, classes, counts = labels.unique(return_inverse=True, return_counts=True)
    shares = (hits["timm"].double() - hits["sorted"].double()) / counts[classes]
    difference = float(shares.sum()) / max(len(counts), 1)
    spread = float(shares.square().sum().sqrt()) / max(len(counts), 1)
    if abs(difference) < max(MIN_DIFFERENCE, MIN_Z * spread):
        return None, seen
    return "timm" if difference > 0 else "sorted", seen


def _predictions(
    model: nn.Module, splits: Splits, rows: Tensor, image_size: int | None
) -> tuple[Tensor, Tensor]:
    """Returns the rows whose images can be read, and the label that the model predicts for each."""
    config = image_config(model)
    if image_size is not None:
        config["input_size"] = (3, image_size, image_size)
    transform = timm.data.create_transform(**config)
    device, was_training = next(model.parameters()).device, model.training
    dataset = splits.datasets["train"]
    encoded, column = encoded_images(dataset), dataset.features["image"]
    kept: list[int] = []
    preds: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    model.eval()
    with torch.inference_mode():
        for part in rows.split(BATCH_SIZE):
            images = []
            for row in part.tolist():
                try:
                    image = read_image(encoded[row]["image"], row, column)
                except UsageError:
                    continue
                images.append(transform(image))
                kept.append(row)
            if images:
                preds.append(model(torch.stack(images).to(device)).argmax(dim=1).cpu())
    model.train(was_training)
    return torch.tensor(kept, dtype=torch.int64), torch.cat(preds)
