"""The order of classes in weights that come without class names.

timm numbers the directories of classes in natural order without regard to case (1, 2, 10), and
torchvision and timm_lt by code point (1, 10, 2). The same weights are right in one of the two.
"""

from collections.abc import Mapping, Sequence
from typing import get_args

import timm.data
import torch
from timm.utils import natural_key
from torch import Tensor, nn

from timm_lt.data import Splits
from timm_lt.data.decode import encoded_images, read_image
from timm_lt.models.create import image_config
from timm_lt.models.label_names import keeps_classifier, label_names
from timm_lt.models.third_party import read_weights
from timm_lt.run.network import has_classifier
from timm_lt.run.recipe import ClassOrder, Recipe
from timm_lt.utils.checks import UsageError, check_choice, shown_names
from timm_lt.utils.console import log

# Images that the order is found out on, and those of a batch.
NUM_IMAGES, BATCH_SIZE = 256, 32
# Two-sided 2 % point of the normal distribution, and the smallest difference of two accuracies.
MIN_Z, MIN_DIFFERENCE = 2.326, 0.2
WORDS: dict[ClassOrder, str] = {"timm": "timm's natural order", "sorted": "sorted order"}
HOW = (
    "--class-order timm or --class-order sorted (class_order= in Python, model.class_order in a "
    "recipe)"
)


def class_orders(names: Sequence[str]) -> dict[ClassOrder, list[str]]:
    """Returns class names as timm's ``ReaderImageFolder`` and torchvision's ``ImageFolder`` do.

    >>> class_orders(["2", "10", "b", "A"])
    {'timm': ['2', '10', 'A', 'b'], 'sorted': ['10', '2', 'A', 'b']}
    """
    by_code_point = sorted(names)
    try:
        natural = sorted(by_code_point, key=natural_key)
    except ValueError:
        # Of superscripts, which timm takes for numbers and cannot read.
        natural = by_code_point
    return {"timm": natural, "sorted": by_code_point}


def order_classes(recipe: Recipe, splits: Splits, model: nn.Module) -> Splits:
    """Numbers the classes of the data as the classifier that a recipe keeps does.

    Args:
        recipe: What to run.
        splits: The data.
        model: The model of the recipe.

    Raises:
        UsageError: As :func:`in_order_of_weights`; or if an order is asked for and no classifier is
            kept.
    """
    given = recipe.model
    cure = "model.fresh_classifier (--fresh-classifier)"
    if not (
        (given.pretrained or given.checkpoint)
        and has_classifier(recipe, model, splits)
        and keeps_classifier(model, splits.label_names, given.checkpoint or given.name, cure)
    ):
        check_no_order(given.class_order, given.name, splits.num_classes)
        return splits
    return in_order_of_weights(
        splits,
        model,
        name=given.name,
        checkpoint=given.checkpoint,
        class_order=given.class_order,
        image_size=recipe.data.image_size,
        trained=recipe.epochs > 0,
    )


def check_no_order(class_order: str | None, name: str, num_classes: int) -> None:
    """Checks that no order is asked for where no classifier with its weights is kept.

    Raises:
        UsageError: If one is.
    """
    if class_order is not None:
        raise UsageError(
            f"class order {class_order} only applies to a classifier that is kept, and {name} has "
            f"none for these {num_classes} classes; remove it"
        )


def in_order_of_weights(
    splits: Splits,
    model: nn.Module,
    *,
    name: str,
    checkpoint: str | None = None,
    class_order: str | None = None,
    image_size: int | None = None,
    trained: bool = False,
) -> Splits:
    """Numbers the classes of the data as a classifier with its weights does.

    Names that come with the weights decide, if they are those of the data. Otherwise it is the
    order that is asked for; or, where timm's and torchvision's differ, the one in which the model
    is right about clearly more training images. If neither is clear, it is timm's for data in that
    order and for a file that names its architecture, as those of timm's ``train.py`` do, and is
    asked for otherwise.

    Args:
        splits: The data.
        model: A model with a classifier for as many classes.
        name: What it is called in messages.
        checkpoint: The file that the weights are from, if they are from one.
        class_order: ``"timm"`` or ``"sorted"``; None finds it out.
        image_size: Side of the images in pixels; None is the model's.
        trained: Whether the classifier is trained further: the order of the data stays then if
            that of the weights is not clear.

    Raises:
        UsageError: If the order is not to be found out, or is asked for where there is none to
            choose.
    """
    names = splits.label_names
    own = label_names(model)
    if class_order is not None:
        check_choice("class order", class_order, get_args(ClassOrder))
        if own or not names:
            owner = f"the weights of {name} have" if own else "the data lack"
            raise UsageError(
                f"class order {class_order}: {owner} class names, and there is nothing to choose; "
                "remove it"
            )
    if not names:
        return splits
    if own:
        return splits.in_order(own) if sorted(own) == sorted(names) else splits
    orders = class_orders(names)
    if class_order is not None:
        return splits.in_order(orders["timm" if class_order == "timm" else "sorted"])
    if orders["timm"] == orders["sorted"] or names not in orders.values():
        return splits
    name = checkpoint or name
    log.info("finding out in which order the weights of %s have the classes", name)
    taken, seen = _found_out(splits, model, orders, image_size)
    seen = f"of {seen}"
    if taken is not None:
        say = log.info if orders[taken] == names else log.warning
        say("classes are numbered as in the weights, in %s: %s", WORDS[taken], seen)
    elif trained:
        log.info("the order of the classes in the weights of %s is not clear: %s", name, seen)
        return splits
    elif names == orders["timm"] or _is_of_timm(checkpoint):
        taken = "timm"
        log.warning(
            "classes are numbered in %s, as timm's train.py does, for images do not tell the order "
            "of the weights: %s; if it is wrong, say --class-order sorted (class_order= in Python)",
            *(WORDS[taken], seen),
        )
    else:
        raise UsageError(
            f"it is not clear in which order the weights of {name} have the classes: {seen}; say "
            f"{HOW}, or fit a new classifier (--fresh-classifier, in Python fresh_classifier=True)"
        )
    return splits.in_order(orders[taken])


def _is_of_timm(checkpoint: str | None) -> bool:
    """Returns whether a file of weights names its architecture."""
    return checkpoint is not None and read_weights(checkpoint).architecture is not None


def _found_out(
    splits: Splits,
    model: nn.Module,
    orders: Mapping[ClassOrder, list[str]],
    image_size: int | None,
) -> tuple[ClassOrder | None, str]:
    """Returns the order in which the model is right about more training images, and the numbers."""
    assert splits.label_names is not None
    labels = splits.labels["train"]
    places = {}
    for order, found in orders.items():
        place = {name: label for label, name in enumerate(found)}
        places[order] = torch.tensor([place[name] for name in splits.label_names])
    rows = _sample(labels, places["timm"] != places["sorted"])
    rows, preds = _predictions(model, splits, rows, image_size)
    hits = {order: preds == place[labels[rows]] for order, place in places.items()}
    seen = " and ".join(
        f"{int(right.sum())} are right in {WORDS[order]} ({shown_names(orders[order])})"
        for order, right in hits.items()
    )
    return _better(hits, labels[rows]), f"{len(rows)} training images, {seen}"


def _sample(labels: Tensor, moved: Tensor) -> Tensor:
    """Returns rows of images of the classes that the orders number differently, alike of each."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order[moved[labels[order]]]
    order = order[labels[order].sort(stable=True).indices]
    _, counts = labels[order].unique_consecutive(return_counts=True)
    # Which image of its class each one is: first the first of each class, then the second.
    turn = torch.cat([torch.arange(int(count)) for count in counts])
    classes = torch.repeat_interleave(
        torch.randperm(len(counts), generator=torch.Generator().manual_seed(0)), counts
    )
    return order[(turn * len(counts) + classes).argsort()[:NUM_IMAGES]].sort().values


def _predictions(
    model: nn.Module, splits: Splits, rows: Tensor, image_size: int | None
) -> tuple[Tensor, Tensor]:
    """Returns the rows whose images can be read, and the label that the model gives each."""
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


def _better(hits: dict[ClassOrder, Tensor], labels: Tensor) -> ClassOrder | None:
    """Returns the order in which more images are right, every class counting the same; or None.

    No image is right in both orders. A model that always answers the same is as good in one as in
    the other, however many images its class has.
    """
    if len(labels) == 0:
        return None
    _, place, counts = labels.unique(return_inverse=True, return_counts=True)
    shares = (hits["timm"].double() - hits["sorted"].double()) / counts[place]
    difference = float(shares.sum() / len(counts))
    spread = float(shares.square().sum().sqrt() / len(counts))
    if abs(difference) < MIN_DIFFERENCE or abs(difference) < MIN_Z * spread:
        return None
    return "timm" if difference > 0 else "sorted"
