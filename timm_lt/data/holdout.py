"""Images held out where a data set lacks a split, and classes that are too small for it."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_lt.data.reading import shown_path
from timm_lt.data.sources import Split
from timm_lt.utils.checks import UsageError, check_integer, check_number, shown_names
from timm_lt.utils.console import log
from timm_lt.utils.longtail import Labels, check_labels


def hold_out(
    labels: Labels,
    fraction: float = 0.2,
    *,
    seed: int = 0,
    keys: Sequence[str | bytes] | None = None,
    purpose: Literal["validation", "test"] = "validation",
    names: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Deals the images of each class out to training and to validation or test.

    Of the ``n`` images of a class, ``fraction * n`` are held out, rounded, but at least one and
    not all: the split is stratified.

    >>> train, val = hold_out([0] * 10 + [1] * 2, 0.2)
    >>> len(train), len(val), (val < 10).sum().item()
    (9, 3, 2)

    Args:
        labels: Integer labels, one per image.
        fraction: In (0, 1).
        seed: A non-negative integer.
        keys: A key for each image, (N,), such as its path. Which images are held out then depends
            on the keys and not on the rows: another image in a class moves at most one other, and
            none of another class. Validation and test are taken from the two ends of one order, so
            that an image that is moved out of one does not move one out of the other. None takes
            the rows.
        purpose: What the images are held out for, for messages.
        names: Class names, (C,), for messages.

    Shape:
        labels (N,); two index tensors, ascending, that together are all images.

    Raises:
        UsageError: If a class has one image only, which cannot be in both; names the classes.
            If there is not one key per image.
    """
    check_number("fraction", fraction, "(0, 1)")
    check_integer("seed", seed, minimum=0)
    # Places among the labels that occur: a wrong label may be too large to count up to.
    present, values, counts = check_labels(labels).unique(return_inverse=True, return_counts=True)
    single = present[counts == 1].tolist()
    if single:
        shown = shown_names(
            [f"{c} ({names[c]})" if names and c < len(names) else c for c in single]
        )
        raise UsageError(
            f"{len(single)} of {len(counts)} classes have one training image, so none can be held "
            f"out for {purpose}: {shown}; give a {purpose} split, or leave these "
            "classes out"
        )
    held = (counts * fraction).round().long().clamp_min(1).minimum(counts - 1)
    if keys is None:
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    elif len(keys) != len(values):
        raise UsageError(f"keys must be one per image: {len(keys)} keys, {len(values)} labels")
    else:
        order = _order_of_keys(keys, seed)
        order = order if purpose == "test" else order.flip(0)
    # By class, in random order within it.
    order = order[values[order].sort(stable=True).indices]
    place = torch.arange(len(values)) - (counts.cumsum(0) - counts)[values[order]]
    chosen = place < held[values[order]]
    return order[~chosen].sort().values, order[chosen].sort().values


def _order_of_keys(keys: Sequence[str | bytes], seed: int) -> Tensor:
    """Returns the images in an order as good as random, in which two keys never change places."""
    start = f"{seed} ".encode()
    words = b"".join(
        [
            blake2b(start + (key.encode() if isinstance(key, str) else key), digest_size=8).digest()
            for key in keys
        ]
    )
    return torch.from_numpy(np.frombuffer(words, "<u8").argsort(kind="stable"))


def small_classes(counts: Mapping[str, int], min_images: int | None) -> set[str]:
    """Returns the classes that have too few training images, and names them in the log.

    Args:
        counts: Training images by the name of the class.
        min_images: How many a class must have; None leaves out no class.

    Raises:
        UsageError: If that is not a positive integer, or no class has as many.
    """
    if min_images is None:
        return set()
    check_integer("min_images", min_images, minimum=1)
    small = {name: number for name, number in counts.items() if number < min_images}
    if small and len(small) == len(counts):
        raise UsageError(f"no class has {min_images} images, as min_images wants")
    if small:
        log.info(
            "min_images %d leaves out %d of %d classes: %s",
            *(min_images, len(small), len(counts)),
            ", ".join(f"{shown_path(name)} ({number})" for name, number in small.items()),
        )
    return set(small)


def leave_out_small(
    labels: Mapping[Split, NDArray[np.int64]], names: Sequence[str] | None, min_images: int | None
) -> tuple[dict[Split, NDArray[np.int64]], dict[Split, NDArray[np.int64]], list[str] | None]:
    """Leaves out the classes that have too few training images, and numbers the others anew.

    Args:
        labels: By split, which must include ``"train"``.
        names: Class names, (C,), if known.
        min_images: How many a class must have; None leaves out no class.

    Returns:
        The rows that stay, by split; their labels; and the names of the classes that stay. Classes
        without names are named by their labels if those change.

    Raises:
        UsageError: As :func:`small_classes`.
    """
    present, numbers = np.unique(labels["train"], return_counts=True)
    counts = dict(zip(present.tolist(), numbers.tolist(), strict=True))
    classes = np.unique(np.concatenate([*labels.values()])) if names is None else range(len(names))
    titles = {int(c): str(c) if names is None else names[c] for c in classes}
    small = small_classes({titles[c]: counts.get(c, 0) for c in titles}, min_images)
    kept = np.array([c for c, title in titles.items() if title not in small], np.int64)
    has_gaps = kept[-1] + 1 > len(kept)
    if min_images is None or not (small or has_gaps):
        rows = {split: np.arange(len(values)) for split, values in labels.items()}
        return rows, dict(labels), None if names is None else list(names)
    rows = {split: np.flatnonzero(np.isin(values, kept)) for split, values in labels.items()}
    anew = {split: np.searchsorted(kept, labels[split][rows[split]]) for split in labels}
    return rows, anew, [titles[c] for c in kept.tolist()]
