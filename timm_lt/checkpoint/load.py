"""Loading heads from a checkpoint folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_lt.checkpoint.format import (
    STATISTICS,
    CheckpointInfo,
    HeadEntry,
    is_statistic,
    read_checkpoint,
)
from timm_lt.checkpoint.weights import open_weights
from timm_lt.heads import HEADS, Head, as_joint, get_heads, head_option_names
from timm_lt.utils.checks import UsageError, unknown_name
from timm_lt.utils.longtail import check_class_counts


def load_head(folder: str | Path, name: str, classifier: nn.Module, **options: Any) -> Head:
    """Loads a head of a checkpoint whose model has one classifier.

    Every checkpoint has the heads that need nothing but the joint classifier (``linear``,
    ``tau_norm``, ``logit_adjusted``).

    Args:
        folder: Folder of the checkpoint.
        name: Name of the head in the checkpoint.
        classifier: The joint classifier (C, D) of the checkpoint, as returned by
            ``model.get_classifier()``, or a head that keeps its weight.
        **options: Options of the head; the stored ones are the defaults.

    Returns:
        The head. Batch-norm statistics in its file become its ``backbone_statistics``, which
        :func:`timm_lt.set_head` copies into the model.

    Raises:
        UsageError: If there is no such head, an option is wrong or fixed by the fit, or the file of
            the head is missing, altered, or has other shapes; nothing is loaded then.
    """
    return _load_heads(read_checkpoint(folder), name, {"": as_joint(classifier)}, options)[""]


def load_heads(folder: str | Path, name: str, model: nn.Module, **options: Any) -> dict[str, Head]:
    """Loads a head for each joint classifier of a model, by path; the model is unchanged."""
    return _load_heads(read_checkpoint(folder), name, get_heads(model), options)


def find_entry(info: CheckpointInfo | None, name: str, source: str) -> HeadEntry:
    """Returns the entry of a head; every checkpoint has the heads without own tensors.

    A plain timm checkpoint has no ``info``; ``source`` is the name of the checkpoint in messages.
    """
    heads = {} if info is None else info.heads
    if name in heads:
        return heads[name]
    free = [key for key in HEADS if not HEADS[key].own_state and key not in heads]
    if name not in free:
        raise unknown_name(f"head of {source}:", name, [*heads, *free])
    return HeadEntry(name, name, {}, None, None, False, {}, {})


def from_joint(
    cls: type[Head], joint: nn.Linear, options: dict[str, Any], counts: list[int] | None
) -> Head:
    """Makes a head from the joint classifier (C, D), its options and the class counts (C,)."""
    if "class_counts" in head_option_names(cls.kind):
        options = {"class_counts": counts, **options}
    return cls.from_classifier(joint, **options)


def own_tensors(heads: Mapping[str, Head]) -> dict[str, Tensor]:
    """Returns the tensors that the file of a head has, for one head per classifier, by path."""
    return {
        f"{path}.{key}" if len(heads) > 1 else key: getattr(head, key)
        for path, head in heads.items()
        for key in head.own_state
        if getattr(head, key) is not None
    }


def _load_heads(
    info: CheckpointInfo, name: str, classifiers: dict[str, nn.Linear], options: dict[str, Any]
) -> dict[str, Head]:
    entry = find_entry(info, name, str(info.folder))
    cls, heads = HEADS[entry.kind], {}
    if options.get("class_counts") is not None:
        counts = check_class_counts(options["class_counts"], info.num_classes, info.label_names)
        options = {**options, "class_counts": counts}
    for path, joint in classifiers.items():
        is_replaced = isinstance(joint, Head) and (
            "weight" in joint.own_state or joint.backbone_statistics is not None
        )
        if is_replaced or joint.out_features != info.num_classes:
            raise UsageError(
                f"head {name!r} of {info.folder} starts from the joint classifier of "
                f"{info.num_classes} classes, but the model has {joint}; create the model again"
            )
        stored = from_joint(cls, joint, entry.options, info.class_counts).options()
        for key in cls.fixed_options:
            if options.get(key, stored[key]) != stored[key]:
                raise UsageError(
                    f"head {name!r} was fitted with {key}={stored[key]!r}, which cannot change "
                    "afterwards; fit it again with timm_lt.fit_head"
                )
        head = from_joint(cls, joint, {**entry.options, **options}, info.class_counts)
        # The recorded selection does not apply to a value that the caller chose.
        head.selection = dict(entry.selection) if head.options() == stored else {}
        heads[path] = head
    if entry.file is not None:
        _load_tensors(heads, entry, info.folder / entry.file)
    for head in heads.values():
        head.check_fitted()
    return heads


def _load_tensors(heads: dict[str, Head], entry: HeadEntry, path: Path) -> None:
    with open_weights(path, entry.sha256) as file:
        # Copies: the file may be replaced while the heads are in use.
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    statistics = {
        key.removeprefix(STATISTICS): tensors.pop(key)
        for key in list(tensors)
        if entry.backbone_statistics and key.startswith(STATISTICS) and is_statistic(key)
    }
    own = own_tensors(heads)
    wanted, found = ({k: tuple(v.shape) for k, v in part.items()} for part in (own, tensors))
    if wanted != found or bool(statistics) != entry.backbone_statistics:
        more = " and batch-norm statistics" if entry.backbone_statistics else ""
        raise UsageError(
            f"head file {path} has {found} and {len(statistics)} batch-norm statistics; a "
            f"{entry.kind!r} head here needs {wanted}{more}"
        )
    for name, value in {**tensors, **statistics}.items():
        # All NaN means not fitted, which the head itself refuses.
        if not value.isfinite().all() and not value.isnan().all():
            raise UsageError(f"{name} in head file {path} has values that are not finite")
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(tensors[name])
    for head in heads.values():
        head.backbone_statistics = statistics or None
