"""Format of a checkpoint folder: its files, and the ``timm_lt`` block of ``config.json``.

A folder may come from anybody: every field is checked before it is used, names are looked up in
registries and never imported, and only the folder's own files are opened.
"""

import json
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from torch import nn

from timm_lt.heads import HEADS, check_head_options
from timm_lt.utils.checks import WHITE, UsageError, user_errors
from timm_lt.utils.files import read_json
from timm_lt.utils.longtail import SelectionProtocol, ShotRule

FORMAT_VERSION = 1
# Attribute of a loaded model: colour behind transparent pixels of its training images.
BACKGROUND = "_background"
BLOCK = "timm_lt"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
METRICS = "metrics.json"
RECIPE = "recipe.yaml"
CARD = "README.md"
PLOTS = "plots"
# In a recipe, for a model and data that were given as objects; such a recipe cannot run again.
GIVEN_MODEL = "a model given in Python"
GIVEN_DATA = "data given in Python"
# Most bytes of a config or another text of a checkpoint; enough for 30,000 classes.
TEXT_LIMIT = 4 * 2**20
# Prefix of batch-norm statistics in a head's file.
STATISTICS = "backbone."
# Arguments of timm.create_model that do not belong to the architecture.
RESERVED = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args"),
    *("checkpoint_path", "cache_dir", "model_name", "head"),
}
# Fields of pretrained_cfg that name another source of weights, or move the labels.
FOREIGN = {
    *("file", "url", "state_dict", "hf_hub_id", "hf_hub_filename", "custom_load", "label_offset"),
}
HEAD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class TimmBase(NamedTuple):
    """Name and arguments with which ``timm.create_model`` builds an ``lt_*`` model."""

    architecture: str
    model_args: dict[str, Any]


@dataclass(frozen=True)
class HeadEntry:
    """One head of a checkpoint, as ``config.json`` describes it.

    Attributes:
        name: Name in the checkpoint.
        kind: Registered head.
        options: Options of the head.
        file: Path of its tensors relative to the folder; None for a head without own tensors.
        sha256: Digest of that file.
        backbone_statistics: The file also has the backbone's batch-norm statistics.
        metrics: Metrics on the test split, fractions.
        selection: How the options were selected.
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
    """Description of a decoupled checkpoint; unknown values are None.

    Attributes:
        folder: Folder of the checkpoint.
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
    """Returns the background colour that a model's checkpoint records, or white."""
    return str(getattr(model, BACKGROUND, WHITE))


def is_statistic(key: str) -> bool:
    """Returns whether a key of a state dict belongs to the batch-norm statistics."""
    return key.endswith((".running_mean", ".running_var", ".num_batches_tracked"))


def check_head_name(where: str, name: str, kind: str | None = None) -> None:
    """Checks a name of a head, which is also that of its file; ``where`` is for the message."""
    problem = None
    if not HEAD_NAME.fullmatch(name):
        problem = "may have ASCII letters, digits, '_', '-' and '.' only, up to 100"
    elif kind is not None and name in HEADS and kind != name:
        problem = f"is a {kind!r} head, but {name!r} is the name of another kind"
    if problem is not None:
        raise UsageError(f"{where} {problem}")


def read_checkpoint(folder: str | Path) -> CheckpointInfo:
    """Reads the description of a decoupled checkpoint, without its weights.

    Raises:
        UsageError: If the folder has no valid ``timm_lt`` block; the message names the field.
    """
    info = find_info(folder)
    if info is None:
        path = Path(folder, CONFIG)
        raise UsageError(f"{path} is a plain timm checkpoint without heads ({BLOCK})")
    return info


def find_info(folder: str | Path) -> CheckpointInfo | None:
    """Reads the description of a decoupled checkpoint; returns None for a plain timm checkpoint."""
    config = read_config(Path(folder))
    return _parse(Path(folder), config) if BLOCK in config else None


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config of a timm checkpoint and checks the fields that timm reads."""
    path = folder / CONFIG
    return _timm_fields(path, read_json(path, limit=TEXT_LIMIT)).content


def parse_text(folder: Path, text: str) -> CheckpointInfo:
    """Parses the text of a config that is about to be written; one that cannot be read raises."""
    if len(text.encode()) > TEXT_LIMIT:
        raise UsageError(f"{folder / CONFIG} would have more than {TEXT_LIMIT:,} bytes")
    return _parse(folder, json.loads(text))


# Check of a field's value, and the valid values in words.
Rule = tuple[Callable[[Any], object], str]


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _are_counts(value: object) -> bool:
    # Their sum must fit 64 bits.
    counts = value if isinstance(value, list) else []
    return all(type(n) is int and 0 <= n < 2**40 for n in counts) and sum(counts) > 0


def _is_metric(value: object) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return all(number is None or type(number) in (int, float) for number in values)


def _matches(pattern: str) -> Callable[[Any], object]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value)


def _one_of(names: Iterable[str]) -> Rule:
    choices = list(names)
    return lambda value: value in choices, f"one of {', '.join(choices)}"


def _optional(is_valid: Callable[[Any], object], expected: str) -> Rule:
    return lambda value: value is None or is_valid(value), f"null or {expected}"


STRING: Rule = (lambda value: isinstance(value, str), "a string")
FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
OBJECT: Rule = (lambda value: isinstance(value, dict), "an object")
ABSENT: Rule = (lambda value: not value, "absent")
POSITIVE: Rule = (lambda value: type(value) is int and value > 0, "an integer >= 1")
METRIC: Rule = (_is_metric, "a number or null, or an object of these")
DIGEST: Rule = (_matches(r"[0-9a-f]{64}"), "the 64 hexadecimal digits of a SHA-256")
COLOR: Rule = (_matches(r"#[0-9a-f]{6}"), "a colour '#rrggbb'")
NAMES: Rule = (
    lambda value: _are_texts(value if isinstance(value, list) else [value or ""]),
    "a string or a list of strings",
)


class _Fields:
    """Fields of a JSON object; ``where`` is the file and the object's path for messages."""

    def __init__(self, where: str, content: dict[str, Any]) -> None:
        self.where, self.content = where, content

    def read(self, key: str, rule: Rule, default: object = None) -> Any:  # noqa: ANN401
        """Returns a field; one that is not valid raises UsageError."""
        is_valid, expected = rule
        value = self.content.get(key, default)
        if not is_valid(value):
            raise UsageError(f"{self.where}{key} must be {expected}, found {reprlib.repr(value)}")
        return value

    def read_object(self, key: str, default: object = None) -> "_Fields":
        """Returns the fields of an object inside of this one."""
        return _Fields(f"{self.where}{key}.", self.read(key, OBJECT, default))

    def refuse(self, keys: Iterable[str]) -> None:
        """Refuses fields that have a value."""
        for key in sorted(keys):
            self.read(key, ABSENT)


def _block_rules(classes: int) -> dict[str, Rule]:
    """Returns the fields of the block, but for the heads, by their name in CheckpointInfo."""
    return {
        "weights_sha256": DIGEST,
        "class_counts": _optional(
            lambda value: _are_counts(value) and len(value) == classes,
            f"{classes} integers >= 0, not all 0",
        ),
        "label_names": _optional(
            lambda value: _are_texts(value) and len(value) == classes, f"{classes} strings"
        ),
        "dataset": _optional(*STRING),
        "shot_rule": _optional(*_one_of(get_args(ShotRule))),
        "protocol": _optional(*_one_of(get_args(SelectionProtocol))),
        "seed": _optional(lambda v: type(v) is int and 0 <= v < 2**63, "an integer >= 0"),
    }


def _parse(folder: Path, content: dict[str, Any]) -> CheckpointInfo:
    """Returns the description in the config of a decoupled checkpoint."""
    config = _timm_fields(folder / CONFIG, content)
    block = config.read_object(BLOCK)
    block.read("version", (lambda v: v == FORMAT_VERSION, f"{FORMAT_VERSION} for this timm_lt"))
    num_classes = config.read("num_classes", POSITIVE)
    # With another number, timm would drop the classifier.
    same: Rule = (lambda v: v == num_classes, f"{num_classes} as in the checkpoint")
    for part in ("model_args", "pretrained_cfg"):
        config.read_object(part, {}).read("num_classes", same, num_classes)
    config.read_object("pretrained_cfg", {}).refuse(FOREIGN)
    heads = block.read_object("heads")
    return CheckpointInfo(
        folder=folder,
        architecture=content["architecture"],
        num_classes=num_classes,
        # Not recorded in the first checkpoints.
        background=block.read("background", COLOR, WHITE),
        heads={name: _read_entry(name, heads.read_object(name)) for name in heads.content},
        **{key: block.read(key, rule) for key, rule in _block_rules(num_classes).items()},
    )


def _timm_fields(path: Path, content: dict[str, Any]) -> _Fields:
    """Returns a config after checking the fields that timm reads."""
    config = _Fields(f"{path}: ", content)
    config.read("architecture", STRING)
    config.read_object("model_args", {}).refuse(RESERVED)
    config.read_object("pretrained_cfg", {}).read("classifier", NAMES)
    return config


def _read_entry(name: str, entry: _Fields) -> HeadEntry:
    kind = entry.read("kind", _one_of(HEADS))
    check_head_name(entry.where.removesuffix("."), name, kind)
    options, metrics = entry.read_object("options", {}), entry.read_object("metrics", {})
    # They are those of the block.
    options.refuse(["class_counts"])
    with user_errors(options.where.removesuffix("."), UsageError):
        check_head_options(kind, options.content)
    for key in metrics.content:
        metrics.read(key, METRIC)
    statistics = entry.read("backbone_statistics", FLAG, default=False)
    has_file = bool(HEADS[kind].own_state or statistics)
    file = f"heads/{name}.safetensors" if has_file else None
    return HeadEntry(
        name=name,
        kind=kind,
        options=options.content,
        file=entry.read("file", (lambda value: value == file, json.dumps(file))),
        sha256=entry.read("sha256", DIGEST) if has_file else None,
        backbone_statistics=statistics,
        metrics=metrics.content,
        selection=entry.read_object("selection", {}).content,
    )
