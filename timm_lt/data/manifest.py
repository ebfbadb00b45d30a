"""Manifests: which images a subset has, in numbers and hashes that two people can compare."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from timm_lt.utils.checks import Problems, UsageError, shown_names
from timm_lt.utils.files import read_json, sha256
from timm_lt.utils.longtail import Labels, check_labels, class_counts

COMPARED = ("num_images", "class_counts", "indices_sha256", "labels_sha256", "all_labels_sha256")


def subset_manifest(
    labels: Labels, indices: Labels, *, num_classes: int | None = None, **description: Any
) -> dict[str, Any]:
    """Describes a subset, ready for JSON.

    >>> subset_manifest([1, 0, 1], [2, 1], seed=0)["class_counts"]
    [1, 1]

    A hash is the SHA-256 of integers as 8 bytes each, little-endian.

    Args:
        labels: The labels of the whole data set, (N,).
        indices: The rows of the subset, in their order.
        num_classes: Number of classes; None takes the largest label plus one.
        description: What else the manifest says, e.g. how the subset was made.

    Returns:
        The description, ``num_images``, ``class_counts`` (C,), ``indices_sha256``,
        ``labels_sha256`` of the subset, ``all_labels_sha256`` of the whole, and ``indices``.

    Raises:
        UsageError: If an index is not of an image.
    """
    everything = check_labels(labels)
    rows = check_labels(indices, len(everything), noun="indices")
    chosen = everything[rows]
    total = num_classes or int(everything.max()) + 1
    return {
        **description,
        "num_images": len(rows),
        "class_counts": class_counts(chosen, total).tolist(),
        "indices_sha256": _digest(rows),
        "labels_sha256": _digest(chosen),
        "all_labels_sha256": _digest(everything),
        "indices": rows.tolist(),
    }


def check_manifest(found: Mapping[str, Any], path: str | Path) -> None:
    """Checks that a subset is the one of a manifest.

    Args:
        found: The manifest of the subset.
        path: JSON file of the manifest that it should have. What that leaves out is not compared.

    Raises:
        UsageError: If the file is no manifest, or something differs; says what.
    """
    expected = read_json(Path(path))
    if not set(COMPARED) & set(expected):
        raise UsageError(f"{path} is no manifest: it has none of {', '.join(COMPARED)}")
    problems = Problems(f"the subset is not that of {path}")
    for name in COMPARED:
        if name in expected and expected[name] != found[name]:
            problems.add(f"{name} is {_brief(found[name])}, there {_brief(expected[name])}")
    if not problems.found and expected.get("indices", found["indices"]) != found["indices"]:
        problems.add("its indices are others, though their hash is the same")
    problems.check()


def _digest(values: Labels) -> str:
    return sha256(np.asarray(values, "<i8").tobytes())


def _brief(value: object) -> str:
    return f"[{shown_names(value)}]" if isinstance(value, list) else str(value)
