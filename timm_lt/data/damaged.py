"""Images that cannot be read, found before training, and the classes left without them."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from timm_lt.data.decode import (
    DAMAGE,
    Unreadable,
    damage_of,
    describe_huge,
    encoded_images,
    image_name,
    is_remote,
    open_image,
    pillow_errors,
    source_of,
    unreadable_images,
)
from timm_lt.data.sources import Split, dataset_from_files
from timm_lt.utils.checks import Problems, shown_names
from timm_lt.utils.console import log

# Images whose headers are read together.
ROWS = 500


class UnreadableImage(NamedTuple):
    """An image that cannot be read: its row, its name in messages, and the reason."""

    row: int
    name: str
    reason: str


def find_damaged(dataset: Dataset, *, first: int = 0, step: int = 1) -> list[UnreadableImage]:
    """Finds empty files, files that are not images, and JPEG files that are cut off.

    Pillow reads the header of each file. A JPEG that does not end with its marker is decoded to be
    sure. Remote files, and data sets with a transform of their own, are not checked.

    Args:
        dataset: With a column ``image``.
        first: First row to check.
        step: Distance between rows to check, >= 1.
    """
    encoded = encoded_images(dataset)
    if encoded.format["type"] == "custom":
        return []
    rows = range(first, len(dataset), step)
    found = []
    with ThreadPoolExecutor() as threads:
        batches = encoded.select(rows).with_format("arrow").iter(ROWS)
        for number, batch in enumerate(batches):
            images = batch.column("image").to_pylist()
            checked = zip(rows[number * ROWS :], images, threads.map(_damage, images), strict=False)
            found += [
                UnreadableImage(row, image_name(image, row), reason)
                for row, image, reason in checked
                if reason is not None
            ]
    return found


def _damage(encoded: dict[str, Any] | None) -> str | None:
    """Returns the reason why an image cannot be read, if its header or its end shows one."""
    source = source_of(encoded)
    if source is None:
        return "there is no image"
    if is_remote(source):
        return None
    try:
        with pillow_errors(), open_image(source) as image:
            if image.format in ("JPEG", "MPO") and not _has_end_marker(cast(Any, image).fp):
                image.load()
    except DAMAGE as error:
        return damage_of(error)
    return None


def _has_end_marker(file: Any) -> bool:  # noqa: ANN401 - Pillow's type for it is private
    file.seek(-2, os.SEEK_END)
    return bool(file.read(2) == b"\xff\xd9")


def verify_images(
    datasets: Mapping[str, Dataset], accelerator: Accelerator, *, unreadable: Unreadable = "raise"
) -> dict[str, list[int]]:
    """Finds the damaged images of all splits; the processes share the files among them.

    Args:
        datasets: The splits by name.
        accelerator: The accelerator of the run.
        unreadable: With ``"skip"``, the number of damaged images is logged.

    Returns:
        The rows of the damaged images, by split.

    Raises:
        UsageError: If an image is damaged and ``unreadable`` is ``"raise"``; has the number of
            damaged images in every split and names the first five of each.
    """
    ours = [
        (split, damaged)
        for split, data in datasets.items()
        for damaged in find_damaged(
            data, first=accelerator.process_index, step=accelerator.num_processes
        )
    ]
    by_split: dict[str, list[UnreadableImage]] = {split: [] for split in datasets}
    for split, damaged in sorted(gather_object(ours)):
        by_split[split].append(damaged)
    problems = Problems()
    for split, images in by_split.items():
        if images and unreadable == "skip":
            log.info("%d of %d %s images cannot be read", len(images), len(datasets[split]), split)
        else:
            note_damaged(problems, split, images, len(datasets[split]))
    problems.check()
    return {split: [image.row for image in images] for split, images in by_split.items()}


def note_damaged(
    problems: Problems, split: str, damaged: Sequence[UnreadableImage], number: int
) -> None:
    """Adds the damaged images of a split to the problems, if there are any.

    Args:
        problems: The problems.
        split: Name of the split.
        damaged: Result of :func:`find_damaged`.
        number: Number of images of the split.
    """
    if damaged:
        with problems.collected(f"{split} split: "):
            raise unreadable_images({image.name: image.reason for image in damaged}, number)


def note_damaged_files(problems: Problems, files: Mapping[Split, Sequence[str]]) -> None:
    """Adds the damaged files of all splits to the problems; missing files are ignored."""
    for split, paths in files.items():
        dataset = dataset_from_files(list(paths), np.zeros(len(paths), np.int64), None)
        damaged = [image for image in find_damaged(dataset) if Path(paths[image.row]).is_file()]
        note_damaged(problems, split, damaged, len(paths))


def log_exceptional(
    split: str, dataset: Dataset, left_out: int, unreadable: Sequence[int], huge: Sequence[int]
) -> None:
    """Logs the images of a split that were left out, and those that Pillow would warn of.

    Args:
        split: Name of the split.
        dataset: The split.
        left_out: Number of images that could not be read.
        unreadable: Their rows, as far as they are known.
        huge: Rows of images with more pixels than Pillow reads without a warning.
    """
    if left_out:
        shown = shown_names(image_names(dataset, unreadable))
        log.warning(
            "%d of %d %s images cannot be read and were left out%s",
            *(left_out, len(dataset), split, f": {shown}" if shown else ""),
        )
    if huge:
        names = image_names(dataset, huge)
        log.warning("%s", describe_huge(len(huge), len(dataset), names, split))


def image_names(dataset: Dataset, rows: Sequence[int]) -> list[str]:
    """Returns the names of some images of a data set in messages."""
    encoded = encoded_images(dataset)
    if encoded.format["type"] == "custom":
        # The data set's own transform may fail on the image.
        return [f"image {row}" for row in rows]
    return [image_name(encoded[row]["image"], row) for row in rows]


def check_classes_left(
    labels: Mapping[str, Tensor], unreadable: Mapping[str, list[int]], names: list[str] | None
) -> None:
    """Checks that every class keeps an image that can be read, in train and in val.

    Args:
        labels: By split, (N,).
        unreadable: Rows of the images that cannot be read, by split.
        names: Class names, (C,), if known.

    Raises:
        UsageError: If a split, or a class of train or val, has no image left; names all of them.
    """
    problems = Problems()
    for split, rows in unreadable.items():
        readable = torch.ones(len(labels[split]), dtype=torch.bool)
        readable[rows] = False
        left = set(labels[split][readable].tolist())
        lost = [c for c in labels[split].unique().tolist() if c not in left]
        if not left:
            problems.add(f"{split} split: none of the {len(readable)} images can be read")
        elif lost and split != "test":
            # A class without a test image has no accuracy, which the report says.
            shown = shown_names([f"{c} ({names[c]})" if names else c for c in lost])
            problems.add(
                f"{split} split: {len(lost)} classes have no image that can be read: {shown}; "
                "repair some, or remove these classes"
            )
    problems.check()
