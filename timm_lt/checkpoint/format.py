"""What a checkpoint folder says of itself: the ``timm_lt`` block of its config.

A folder may come from anybody. Names in it are looked up and never imported, no path in it is
followed but those of its own files, and every field is checked before it is used.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from torch import nn

from timm_lt.heads import HEADS, check_head_options
from timm_lt.utils.checks import WHITE, UsageError, unknown_name
from timm_lt.utils.files import read_json
from timm_lt.utils.longtail import SelectionProtocol, ShotRule

FORMAT_VERSION = 1
# Attribute of a model from a checkpoint: colour behind transparent pixels of its training images.
BACKGROUND = "_background"
BLOCK = "timm_lt"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
METRICS = "metrics.json"
RECIPE = "recipe.yaml"
CARD = "README.md"
PLOTS = "plots"
# What a recipe has for a model and data that were given as objects: it cannot run with them again.
GIVEN_MODEL = "a model given in Python"
GIVEN_DATA = "data given in Python"
# Bytes of a config or another text of a checkpoint: names and counts of 30,000 classes fit.
TEXT_LIMIT = 4 * 2**20
# Before the keys of batch-norm statistics in a head's file.
STATISTICS = "backbone."
COLOR = re.compile(r"#[0-9a-f]{6}")
DIGEST = re.compile(r"[0-9a-f]{64}")
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
# By these a configuration would say where weights come from, or which of them to drop.
SOURCES = ("file", "url", "state_dict", "hf_hub_id", "hf_hub_filename", "custom_load")
HEAD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class TimmBase:
    """Which of timm's own models a registered ``lt_*`` model is: what plain timm must build.

    Of a model that was made bilateral it is which of ours, since timm has none.

    Attributes:
        architecture: The name in timm's registry.
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
    """What a checkpoint says of itself; None stands for what is not known.

    Attributes:
        folder: Where the checkpoint lies.
        architecture: timm's name of the backbone.
        num_classes: Number of classes C.
        weights_sha256: Digest of the file with backbone and joint classifier.
        class_counts: Training images per class, (C,).
        label_names: Class names, (C,).
        dataset: Name of the training data.
        shot_rule: Rule of the shot groups in the heads' metrics.
        protocol: ``"paper"`` if hyper-parameters and the epoch were selected on the test split.
        seed: Seed of the run.
        background: Colour behind transparent pixels, ``#rrggbb``.
        heads: The heads by name.
    """

    folder: Path
    architecture: str
    num_classes: int
    weights_sha256: str
    class_counts: list[int] | None
    label_names: list[str] | None
    dataset: str | None
    shot_rule: ShotRule | None
    protocol: SelectionProtocol | None
    seed: int | None
    background: str
    heads: dict[str, HeadEntry]


def background_of(model: nn.Module) -> str:
    """Returns the colour behind transparent pixels that a model's checkpoint records, or white."""
    return str(getattr(model, BACKGROUND, WHITE))


def is_statistic(key: str) -> bool:
    """Returns whether a key of a model's state dict is one of batch norm's statistics."""
    return key.endswith((".running_mean", ".running_var", ".num_batches_tracked"))


def check_head_name(where: str, name: str, kind: str | None = None) -> None:
    """Raises UsageError for a name that could not be that of the head's file, or is another kind's.

    Args:
        where: What has the name, for the message.
        name: The name.
        kind: The registered head that has it, if that is known.
    """
    if not HEAD_NAME.fullmatch(name):
        raise UsageError(
            f"{where} may have ASCII letters, digits, '_', '-' and '.' only, up to 100"
        )
    if kind is not None and name in HEADS and kind != name:
        raise UsageError(f"{where} is a {kind!r} head, but {name!r} is the name of another kind")


def read_checkpoint(folder: str | Path) -> CheckpointInfo:
    """Reads what a checkpoint folder says of itself, without its weights.

    Raises:
        UsageError: If the folder has no readable ``timm_lt`` block; the message names the field.
    """
    folder = Path(folder)
    return parse_checkpoint(folder, read_config(folder))


def parse_checkpoint(folder: Path, config: dict[str, Any]) -> CheckpointInfo:
    """Reads what a checkpoint says of itself from its config.

    Args:
        folder: Where the checkpoint lies, or will lie.
        config: The config, after :func:`check_config`.

    Raises:
        UsageError: If a field is not as it should be; the message names it.
    """
    block, where = config.get(BLOCK), f"{folder / CONFIG}: {BLOCK}"
    if not isinstance(block, dict):
        raise UsageError(f"{where}: missing; this is a plain timm checkpoint without heads")
    if block.get("version") != FORMAT_VERSION:
        raise UsageError(
            f"{where}.version is {block.get('version')!r}, this timm_lt reads {FORMAT_VERSION}"
        )
    digest = block.get("weights_sha256")
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise UsageError(f"{where}.weights_sha256 must be the 64 hexadecimal digits of a SHA-256")
    counts = _read_counts(where, block.get("class_counts"))
    num_classes = _read_num_classes(folder / CONFIG, config, counts)
    names = block.get("label_names")
    named = isinstance(names, list) and len(names) == num_classes
    if not (names is None or (named and all(isinstance(name, str) for name in names))):
        raise UsageError(f"{where}.label_names must be null or {num_classes} strings")
    heads = block.get("heads")
    if not isinstance(heads, dict):
        raise UsageError(f"{where}.heads must be an object")
    return CheckpointInfo(
        folder,
        config["architecture"],
        num_classes,
        digest,
        counts,
        names,
        *_read_origin(where, block),
        _read_background(where, block),
        {key: _read_entry(f"{where}.heads.{key}", key, value) for key, value in heads.items()},
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config of a timm checkpoint, with or without heads.

    Raises:
        UsageError: If there is none, or it is not as :func:`check_config` wants it.
    """
    if not folder.is_dir():
        raise UsageError(f"checkpoint folder {folder} does not exist")
    path = folder / CONFIG
    if not path.exists():
        raise UsageError(f"{folder} is no checkpoint: {path} does not exist")
    return check_config(path, read_json(path, limit=TEXT_LIMIT))


def check_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Checks what timm reads of a config, and returns it.

    Raises:
        UsageError: If a field is of the wrong type, or says where else weights should come from.
    """
    if not isinstance(config.get("architecture"), str):
        raise UsageError(f"{path}: architecture must be a string")
    arguments, settings = config.get("model_args", {}), config.get("pretrained_cfg", {})
    for key, value in (("model_args", arguments), ("pretrained_cfg", settings)):
        if not isinstance(value, dict):
            raise UsageError(f"{path}: {key} must be an object")
    classifier = settings.get("classifier")
    names = classifier if isinstance(classifier, list) else [classifier or ""]
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"{path}: pretrained_cfg.classifier must be a string or a list of them")
    reserved = sorted(RESERVED & set(arguments))
    if reserved:
        raise UsageError(f"{path}: model_args must not have {', '.join(reserved)}")
    return config


def _read_counts(where: str, counts: object) -> list[int] | None:
    if counts is None:
        return None
    # Sums of them must fit 64 bits.
    whole = isinstance(counts, list) and all(type(n) is int and 0 <= n < 2**40 for n in counts)
    if not (isinstance(counts, list) and whole and sum(counts)):
        raise UsageError(f"{where}.class_counts must be null or a list of integers >= 0, one > 0")
    return counts


def _read_num_classes(path: Path, config: dict[str, Any], counts: list[int] | None) -> int:
    """Reads C, on which all parts of the config must agree: timm would drop the classifier."""
    num_classes = config.get("num_classes")
    if type(num_classes) is not int or num_classes < 1:
        raise UsageError(f"{path}: num_classes must be an integer >= 1")
    if counts is not None and len(counts) != num_classes:
        raise UsageError(
            f"{path}: {BLOCK}.class_counts has {len(counts)} classes, num_classes is {num_classes}"
        )
    settings = config.get("pretrained_cfg", {})
    for key, part in (
        ("model_args.num_classes", config.get("model_args", {})),
        ("pretrained_cfg.num_classes", settings),
    ):
        value = part.get("num_classes", num_classes)
        if type(value) is not int or value != num_classes:
            raise UsageError(
                f"{path}: {key} is {value!r}, the checkpoint has {num_classes} classes"
            )
    named = [key for key in (*SOURCES, "label_offset") if settings.get(key)]
    if named:
        raise UsageError(f"{path}: pretrained_cfg must not have {', '.join(named)}")
    return num_classes


def _read_origin(
    where: str, block: dict[str, Any]
) -> tuple[str | None, ShotRule | None, SelectionProtocol | None, int | None]:
    dataset, seed = block.get("dataset"), block.get("seed")
    if not (dataset is None or isinstance(dataset, str)):
        raise UsageError(f"{where}.dataset must be null or a string")
    for key, choices in (
        ("shot_rule", get_args(ShotRule)),
        ("protocol", get_args(SelectionProtocol)),
    ):
        if not (block.get(key) is None or block[key] in choices):
            raise UsageError(f"{where}.{key} must be null or one of {', '.join(choices)}")
    if not (seed is None or (type(seed) is int and 0 <= seed < 2**63)):
        raise UsageError(f"{where}.seed must be null or an integer >= 0")
    return dataset, block.get("shot_rule"), block.get("protocol"), seed


def _read_background(where: str, block: dict[str, Any]) -> str:
    # Checkpoints of before it was recorded have none.
    background = block.get("background", WHITE)
    if not (isinstance(background, str) and COLOR.fullmatch(background)):
        raise UsageError(f"{where}.background must be a colour '#rrggbb', got {background!r}")
    return background


def _read_entry(where: str, name: str, entry: object) -> HeadEntry:
    if not isinstance(entry, dict):
        raise UsageError(f"{where} must be an object")
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in HEADS:
        raise unknown_name(f"head at {where}.kind:", kind, list(HEADS))
    check_head_name(where, name, kind)
    statistics = entry.get("backbone_statistics", False)
    if not isinstance(statistics, bool):
        raise UsageError(f"{where}.backbone_statistics must be true or false, got {statistics!r}")
    for key in ("options", "metrics", "selection"):
        if not isinstance(entry.get(key, {}), dict):
            raise UsageError(f"{where}.{key} must be an object")
    options, metrics = entry.get("options", {}), entry.get("metrics", {})
    _check_options(f"{where}.options", kind, options)
    _check_metrics(f"{where}.metrics", metrics)
    file, digest = _read_file(where, name, entry, needed=bool(HEADS[kind].own_state or statistics))
    return HeadEntry(
        name, kind, options, file, digest, statistics, metrics, entry.get("selection", {})
    )


def _read_file(
    where: str, name: str, entry: dict[str, Any], *, needed: bool
) -> tuple[str | None, str | None]:
    file, digest = entry.get("file"), entry.get("sha256")
    if file is not None and file != f"heads/{name}.safetensors":
        raise UsageError(f"{where}.file must be 'heads/{name}.safetensors' or null, got {file!r}")
    if (file is None) == needed:
        needs = "needs a file" if file is None else "has no file of its own"
        raise UsageError(f"{where}.file is {file!r}, but a {entry['kind']!r} head {needs}")
    if file is not None and not (isinstance(digest, str) and DIGEST.fullmatch(digest)):
        raise UsageError(f"{where}.sha256 must be the 64 hexadecimal digits of a SHA-256")
    return file, digest


def _check_options(where: str, kind: str, options: dict[str, Any]) -> None:
    if "class_counts" in options:
        raise UsageError(f"{where} must not have class_counts; they stand in {BLOCK}.class_counts")
    try:
        check_head_options(kind, options)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _check_metrics(where: str, metrics: dict[str, Any]) -> None:
    for key, value in metrics.items():
        group = value if isinstance(value, dict) else {"": value}
        if not all(n is None or type(n) in (int, float) for n in group.values()):
            raise UsageError(f"{where}.{key} must be a number or null, got {value!r}")
