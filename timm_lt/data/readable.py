"""Damaged images of all splits together, and what is left without them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from timm_lt.data.reading import Unreadable, describe_huge, image_names, unreadable_images
from timm_lt.data.sources import Split, dataset_from_files
from timm_lt.data.verification import Damage, find_damaged
from timm_lt.utils.checks import Problems, shown_names
from timm_lt.utils.console import log

if TYPE_CHECKING:
    from datasets import Dataset


def verify_images(
    datasets: "Mapping[str, Dataset]", accelerator: Accelerator, *, unreadable: Unreadable = "raise"
) -> dict[str, list[int]]:
    """Looks for damaged images in all splits, of which each process takes its part.

    Args:
        datasets: The splits by name.
        accelerator: Of the run.
        unreadable: With ``"skip"``, how many were found is logged.

    Returns:
        The rows of those images, by split.

    Raises:
        UsageError: If an image cannot be read, unless such images are to be skipped; counts those
            of every split and names the first five, each with the reason.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    ours = [
        (split, damage)
        for split, dataset in datasets.items()
        for damage in find_damaged(dataset, first=rank, step=processes)
    ]
    found: Iterable[tuple[str, Damage]] = gather_object(ours)
    by_split: dict[str, list[Damage]] = {}
    for split, damage in sorted(found, key=lambda pair: pair[1].row):
        by_split.setdefault(split, []).append(damage)
    problems = Problems()
    for split, dataset in datasets.items():
        damaged = by_split.get(split, [])
        if not damaged:
            continue
        if unreadable == "skip":
            log.info("%d of %d %s images cannot be read", len(damaged), len(dataset), split)
            continue
        note_damaged(problems, split, damaged, len(dataset))
    problems.check()
    return {split: [one.row for one in by_split.get(split, [])] for split in datasets}


def note_damaged(problems: Problems, split: str, damaged: Sequence[Damage], number: int) -> None:
    """Notes the images of a split that cannot be read.

    Args:
        problems: Takes the note.
        split: Name of the split.
        damaged: Of :func:`~timm_lt.data.verification.find_damaged`; may be empty.
        number: How many images the split has.
    """
    if damaged:
        with problems.collected(f"{split} split: "):
            raise unreadable_images({one.name: one.reason for one in damaged}, number)


def note_damaged_files(problems: Problems, files: Mapping[Split, Sequence[str]]) -> None:
    """Notes damaged files by split, of data that have to be mended anyway.

    Files that are not there are passed.
    """
    for split, paths in files.items():
        dataset = dataset_from_files(list(paths), np.zeros(len(paths), np.int64), None)
        damaged = [one for one in find_damaged(dataset) if Path(paths[one.row]).is_file()]
        note_damaged(problems, split, damaged, len(paths))


def log_exceptional(
    split: str, dataset: "Dataset", left_out: int, unreadable: Sequence[int], huge: Sequence[int]
) -> None:
    """Logs the images of a split that were left out, and those that Pillow would warn of.

    Args:
        split: Name of the split.
        dataset: The split.
        left_out: How many images could not be read.
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


def check_classes_left(
    labels: Mapping[str, Tensor], unreadable: Mapping[str, list[int]], names: list[str] | None
) -> None:
    """Checks that enough is left of the splits without the images that cannot be read.

    Args:
        labels: By split, (N,).
        unreadable: Rows of those images, by split.
        names: Class names, (C,), if known.

    Raises:
        UsageError: If a class that a split has loses all its images, in train or val, or a split
            does; names all such splits and classes.
    """
    problems = Problems()
    for split, rows in unreadable.items():
        there = torch.ones(len(labels[split]), dtype=torch.bool)
        there[rows] = False
        if not there.any():
            problems.add(f"{split} split: none of the {len(there)} images can be read")
            continue
        left = set(labels[split][there].tolist())
        lost = [c for c in labels[split].unique().tolist() if c not in left]
        # A class without a test image has no accuracy; the report says so.
        if lost and split != "test":
            shown = shown_names([f"{c} ({names[c]})" if names else c for c in lost])
            problems.add(
                f"{split} split: {len(lost)} classes have no image that can be read: {shown}; "
                "repair some, or leave these classes out"
            )
    problems.check()
