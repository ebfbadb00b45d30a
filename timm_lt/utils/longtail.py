"""Labels, class counts, long-tail profiles, shot groups, and the start of scheduled options."""

from collections.abc import Iterable, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from numbers import Integral
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from timm_lt.utils.checks import UsageError, check_choice, check_integer, check_number, shown_names

Labels: TypeAlias = Sequence[int] | NDArray[Any] | Tensor
# Counts in label order, or by label, such as a collections.Counter or pandas' value_counts().
ClassCounts: TypeAlias = Labels | Mapping[Any, int]
Profile = Literal["exponential", "step", "pareto"]
# Selection on validation, or on the test split where a paper did so.
SelectionProtocol = Literal["standard", "paper"]
ShotRule = Literal["fb", "oltr"]

PARETO_POWER = 6
# Least images of a many-shot class, most of a few-shot one, and the bounds of the groups in words.
SHOT_RULES: dict[ShotRule, tuple[int, int, tuple[str, str, str]]] = {
    "fb": (101, 19, ("> 100", "20 to 100", "< 20")),
    "oltr": (100, 20, (">= 100", "21 to 99", "<= 20")),
}


def check_labels(labels: Labels, num_classes: int | None = None, noun: str = "labels") -> Tensor:
    """Checks labels in [0, num_classes), (N,) with N >= 1, and returns them as int64 on the CPU.

    A float label is refused even if its value is whole. The error names the first wrong index.
    """
    values = _as_integers(labels, noun)
    if len(values) == 0:
        raise UsageError(f"{noun} must not be empty")
    if num_classes is not None:
        check_integer("num_classes", num_classes, minimum=1)
    limit = 2**63 if num_classes is None else num_classes
    # Read as unsigned, a negative label is 2^63 or more: one pass, at NumPy's speed.
    unsigned = values.numpy().view(np.uint64)
    if unsigned.max() >= limit:
        index = int((unsigned >= limit).argmax())
        value = int(values[index])
        fault = "is negative" if value < 0 else f"is not below num_classes={num_classes}"
        raise UsageError(f"{noun}[{index}] = {value} {fault}")
    return values


def _as_integers(values: Labels, noun: str) -> Tensor:
    """Converts labels to int64 (N,) on the CPU; the error names the first wrong one."""
    is_dataset = isinstance(values, Dataset) or hasattr(values, "column_names")
    unordered = isinstance(values, Mapping | AbstractSet | ValuesView | str | bytes)
    if is_dataset or unordered or not isinstance(values, Iterable):
        hint = "; pass timm_lt.dataset_labels(dataset)" if is_dataset else ""
        raise UsageError(
            f"{noun} must be a sequence or an array of integers, got a "
            f"{type(values).__name__}{hint}"
        )
    dtype = getattr(values, "dtype", None)
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        values = (values.double() if values.is_floating_point() else values).numpy()
    # Items of a list keep their types: NumPy takes a boolean among integers for 0 or 1.
    array = np.fromiter(values, object) if dtype is None else np.asarray(values)
    if array.ndim != 1:
        raise UsageError(f"{noun} must be one-dimensional, got shape {array.shape}")
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    items = [item.item() if getattr(item, "ndim", None) == 0 else item for item in array]
    for index, item in enumerate(items):
        if not _is_integer(item):
            hint = "" if dtype is None else f": the dtype is {dtype}"
            if isinstance(item, str):
                hint = "; number the classes first, e.g. [names.index(name) for name in labels]"
            raise UsageError(f"{noun}[{index}] = {item!r} is not an integer{hint}")
    return torch.tensor([int(item) for item in items], dtype=torch.int64)


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < 2**63


def class_counts(labels: Labels, num_classes: int | None = None) -> Tensor:
    """Counts the images of every class.

    >>> class_counts([0, 2, 0], num_classes=4)
    tensor([2, 0, 1, 0])

    Args:
        labels: Integer labels, (N,) with N >= 1.
        num_classes: Number of classes C; None takes the largest label plus one.

    Raises:
        UsageError: If a label is not an integer in [0, num_classes).
    """
    values = check_labels(labels, num_classes)
    return torch.bincount(values, minlength=num_classes or 0)


def check_class_counts(
    class_counts: ClassCounts,
    num_classes: int | None = None,
    label_names: Sequence[str] | None = None,
) -> Tensor:
    """Checks class counts (C,), not all 0, and returns them as int64 on the CPU.

    A mapping or a pandas Series has them by label or class name; with ``num_classes`` or
    ``label_names`` it may omit empty classes.
    """
    if hasattr(class_counts, "keys") and getattr(class_counts, "ndim", 1) == 1:
        class_counts = _in_label_order(class_counts, num_classes, list(label_names or ()))
    counts = check_labels(class_counts, noun="class_counts")  # type: ignore[arg-type]
    if num_classes is not None and len(counts) != num_classes:
        raise UsageError(f"class_counts has {len(counts)} classes, expected {num_classes}")
    if counts.max() == 0:
        raise UsageError(f"class_counts must not be all 0 (got {len(counts)} classes)")
    return counts


def _in_label_order(by_label: Any, num_classes: int | None, names: list[str]) -> list[int]:  # noqa: ANN401
    """Returns the counts of a mapping or a pandas Series in label order."""
    keys, counts = list(by_label.keys()), dict(by_label.items())
    by_name = bool(names) and all(isinstance(key, str) for key in keys)
    size = num_classes or len(names) or len(keys)
    labels: dict[Any, None] = dict.fromkeys(names if by_name else range(size))
    unknown = [repr(k) for k in keys if k not in labels or not (by_name or _is_integer(k))]
    missing = [label for label in labels if label not in counts]
    incomplete = bool(missing) and num_classes is None and not names
    if unknown or incomplete or len(counts) < len(keys):
        valid = f"class names ({shown_names(names)})" if by_name else f"the labels 0 to {size - 1}"
        raise UsageError(
            f"the keys of class_counts must be {valid}, each once, with 0 images for an empty "
            f"class; missing: {shown_names(missing) or 'none'}, unknown: "
            f"{shown_names(unknown) or 'none'}; or pass the counts in label order"
        )
    return [counts.get(label, 0) for label in labels]


def check_no_empty_class(class_counts: ClassCounts) -> None:
    """Checks that every class has at least one training image; names the first that have none."""
    counts = check_class_counts(class_counts)
    empty: list[int] = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise UsageError(
            f"{len(empty)} of {len(counts)} classes have no training image: {shown_names(empty)}"
        )


def long_tailed_counts(
    num_classes: int, max_count: int, imbalance_factor: float, profile: Profile = "exponential"
) -> list[int]:
    """Returns the images per class of a long-tailed data set, most frequent class first.

    With ``r`` the imbalance factor, ``x = i / (C - 1)`` the relative rank of class ``i``:

    - exponential: ``n_i = int(n_max * r^-x)``;
    - step: ``n_max`` for the first ``C // 2`` classes, ``int(n_max / r)`` for the others;
    - pareto: ``n_i = int(n_max * (1 + x * (r^(1/6) - 1))^-6)``, the density of a Pareto law of
      power 6 cut so that it ends at ``n_max / r``: a steeper head, a flatter tail.

    At imbalance factor 1, or with a single class, every class has ``n_max``. The Pareto profile
    does not give the counts of ImageNet-LT, which look like draws from the law.

    >>> long_tailed_counts(5, 500, 100)
    [500, 158, 50, 15, 5]

    References:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS
        2019, https://arxiv.org/abs/1906.07413 (exponential, step).
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019,
        https://arxiv.org/abs/1904.05160 (Pareto, power 6).
    """
    check_integer("num_classes", num_classes, minimum=1)
    check_integer("max_count", max_count, minimum=1)
    check_choice("profile", profile, get_args(Profile))
    # A larger factor would leave the rarest class empty.
    noun = "imbalance_factor (largest class / smallest class; LDAM-DRW writes the inverse)"
    check_number(noun, imbalance_factor, f"[1, {max_count}]")
    r = imbalance_factor
    # arange / (C - 1) would be 0 / 0 for one class.
    x = np.arange(num_classes) / max(num_classes - 1, 1)
    if profile == "exponential":
        share = r**-x
    elif profile == "step":
        # A single class is a head class: some class must have max_count.
        head = max(num_classes // 2, 1)
        share = np.where(np.arange(num_classes) < head, 1.0, 1 / r)
    else:
        share = (1 + x * (r ** (1 / PARETO_POWER) - 1)) ** -PARETO_POWER
    # int() of a product that should be whole but came out one rounding error short loses an image.
    counts: list[int] = (max_count * share * (1 + 1e-12)).astype(np.int64).tolist()
    return counts


def shot_groups(class_counts: ClassCounts, rule: ShotRule = "fb") -> dict[str, Tensor]:
    """Splits the classes into many-, medium- and few-shot groups by their training images.

    ``fb`` (Kang et al., ICLR 2020, https://arxiv.org/abs/1910.09217): many > 100, medium 20 to 100,
    few < 20. ``oltr`` (Liu et al., CVPR 2019, https://arxiv.org/abs/1904.05160): many >= 100,
    medium 21 to 99, few <= 20. An empty class is few-shot. The masks are boolean, (C,).
    """
    check_choice("shot rule", rule, get_args(ShotRule))
    counts = check_class_counts(class_counts)
    many_min, few_max, _ = SHOT_RULES[rule]
    many, few = counts >= many_min, counts <= few_max
    return {"many_shot": many, "medium_shot": ~(many | few), "few_shot": few}


def shot_rule_texts(rule: ShotRule = "fb") -> dict[str, str]:
    """Returns the bounds of each shot group in words."""
    return dict(zip(("many_shot", "medium_shot", "few_shot"), SHOT_RULES[rule][2], strict=True))


def describe_shots(
    class_counts: ClassCounts, rule: ShotRule = "fb"
) -> dict[str, dict[str, int | str]]:
    """Returns the number of classes and the bounds of each shot group, JSON-ready."""
    groups = shot_groups(class_counts, rule)
    texts = shot_rule_texts(rule)
    return {name: {"classes": int(groups[name].sum()), "rule": texts[name]} for name in groups}


def epoch_not_set(loss: object) -> UsageError:
    """Returns the error for a scheduled loss that is used before ``set_epoch``."""
    return UsageError(
        f"{type(loss).__name__} depends on the epoch: call loss.set_epoch(epoch, epochs) before "
        "each epoch, also before the first"
    )


def check_start(start: float) -> None:
    """Checks a start: a 0-based epoch, or a fraction of the epochs in (0, 1)."""
    if isinstance(start, float):
        check_number("start, an epoch (an integer) or a fraction of the epochs,", start, "(0, 1)")
    else:
        check_integer("start", start, minimum=0)


def first_epoch(start: float, epochs: int | None) -> int:
    """Converts a start to a 0-based epoch: 0.8 is 160 of 200 and 3 of 4."""
    check_start(start)
    if epochs is None:
        if isinstance(start, float):
            raise UsageError(f"start {start} is a fraction of the epochs: give epochs, too")
        return start
    # 0.29 * 100 is 28.999...
    epoch = int(start * epochs + 1e-9) if isinstance(start, float) else start
    if epoch >= epochs:
        raise UsageError(
            f"start {start} is not within the {epochs} epochs (0 to {epochs - 1}); choose an "
            "earlier epoch, or a fraction such as 0.8"
        )
    return epoch
