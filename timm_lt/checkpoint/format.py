"""What a checkpoint folder says of itself: the ``timm_lt`` block of its config."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_lt.files import read_json
from timm_lt.heads import HEADS
from timm_lt.registry import UsageError, unknown_name

FORMAT_VERSION = 1


CONFIG = "config.json"


WEIGHTS = "model.safetensors"


METRICS = "metrics.json"


# Before the keys of batch-norm statistics in a head's file.
STATISTICS = "backbone."


# Arguments of timm.create_model that are none of the architecture's.
RESERVED = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "checkpoint_path",
    "cache_dir",
    "model_name",
    "head",
}


HEAD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class TimmBase:
    """Which of timm's own models a registered ``lt_*`` model is: what plain timm must build.

    Attributes:
        architecture: timm's name.
        model_args: Arguments beside it.
    """

    architecture: str
    model_args: dict[str, Any]


@dataclass(frozen=True)
class HeadEntry:
    """One head of a checkpoint, as ``config.json`` describes it.

    Attributes:
        name: Name in the checkpoint.
        kind: Registered head.
        options: Options of the head.
        file: Path of its tensors relative to the folder; None if it needs none.
        sha256: Digest of that file.
        backbone_statistics: The file also has the backbone's batch-norm statistics.
        metrics: Its figures on the test split, fractions.
        selection: How its options were chosen.
    """

    name: str
    kind: str
    options: dict[str, Any]
    file: str | None
    sha256: str | None
    backbone_statistics: bool
    metrics: dict[str, Any]
    selection: dict[str, Any]


@dataclass(frozen=True)
class CheckpointInfo:
    """The ``timm_lt`` block of a checkpoint.

    Attributes:
        folder: Where the checkpoint lies.
        num_classes: Number of classes C.
        class_counts: Training images per class, (C,); None if they are not known.
        label_names: Class names, (C,), or None.
        heads: The heads by name.
    """

    folder: Path
    num_classes: int
    class_counts: list[int] | None
    label_names: list[str] | None
    heads: dict[str, HeadEntry]


def is_statistic(key: str) -> bool:
    """Returns whether a key of a model's state dict is one of batch norm's statistics."""
    return key.endswith((".running_mean", ".running_var", ".num_batches_tracked"))


def check_head_name(where: str, name: str) -> None:
    """Raises UsageError for a name of a head that could not be the name of its file."""
    if not HEAD_NAME.fullmatch(name):
        raise UsageError(f"{where} may have ASCII letters, digits, '_', '-' and '.' only")


def read_checkpoint(folder: str | Path) -> CheckpointInfo:
    """Reads what a checkpoint folder says of itself, without its weights.

    Raises:
        UsageError: If the folder has no readable ``timm_lt`` block; the message names the field.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"checkpoint folder {folder} does not exist")
    config = read_json(folder / CONFIG)
    _check_model_args(folder / CONFIG, config.get("model_args", {}))
    block = config.get("timm_lt")
    where = f"{folder / CONFIG}: timm_lt"
    if not isinstance(block, dict):
        raise UsageError(f"{where}: missing; this is a plain timm checkpoint without heads")
    if block.get("version") != FORMAT_VERSION:
        raise UsageError(
            f"{where}.version is {block.get('version')!r}, this timm_lt reads {FORMAT_VERSION}"
        )
    counts, names = block.get("class_counts"), block.get("label_names")
    whole = (
        isinstance(counts, list)
        and counts
        and all(type(n) is int and 0 <= n < 2**63 for n in counts)
    )
    if not (counts is None or whole):
        raise UsageError(f"{where}.class_counts must be null or a list of integers >= 0")
    num_classes = config.get("num_classes") if counts is None else len(counts)
    if type(num_classes) is not int or num_classes < 1:
        raise UsageError(f"{folder / CONFIG}: num_classes must be an integer >= 1")
    named = isinstance(names, list) and len(names) == num_classes
    if not (names is None or (named and all(isinstance(name, str) for name in names))):
        raise UsageError(f"{where}.label_names must be null or {num_classes} strings")
    heads = block.get("heads")
    if not isinstance(heads, dict):
        raise UsageError(f"{where}.heads must be an object")
    entries = {key: _read_entry(f"{where}.heads.{key}", key, value) for key, value in heads.items()}
    return CheckpointInfo(folder, num_classes, counts, names, entries)


def _check_model_args(path: Path, arguments: object) -> None:
    """Refuses arguments by which a folder would say where weights come from."""
    if not isinstance(arguments, dict):
        raise UsageError(f"{path}: model_args must be an object")
    reserved = sorted(RESERVED & set(arguments))
    if reserved:
        raise UsageError(f"{path}: model_args must not have {', '.join(reserved)}")


def _read_entry(where: str, name: str, entry: object) -> HeadEntry:
    check_head_name(where, name)
    if not isinstance(entry, dict):
        raise UsageError(f"{where} must be an object")
    kind, file, digest = (entry.get(key) for key in ("kind", "file", "sha256"))
    if not isinstance(kind, str) or kind not in HEADS:
        raise unknown_name(f"head at {where}.kind:", kind, list(HEADS))
    statistics = entry.get("backbone_statistics", False)
    if not isinstance(statistics, bool):
        raise UsageError(f"{where}.backbone_statistics must be true or false, got {statistics!r}")
    for key in ("options", "metrics", "selection"):
        if not isinstance(entry.get(key, {}), dict):
            raise UsageError(f"{where}.{key} must be an object")
    if file is not None and file != f"heads/{name}.safetensors":
        raise UsageError(f"{where}.file must be 'heads/{name}.safetensors' or null, got {file!r}")
    if (file is None) == bool(HEADS[kind].own_state or statistics):
        needs = "needs a file" if file is None else "has no file of its own"
        raise UsageError(f"{where}.file is {file!r}, but a {kind!r} head {needs}")
    if file is not None and not isinstance(digest, str):
        raise UsageError(f"{where}.sha256 must be a string")
    return HeadEntry(
        name,
        kind,
        entry.get("options", {}),
        file,
        digest,
        statistics,
        entry.get("metrics", {}),
        entry.get("selection", {}),
    )
