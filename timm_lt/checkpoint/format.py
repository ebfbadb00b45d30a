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
from typing import Any, get_args

from torch import nn

from timm_lt.heads import HEADS, check_head_options
from timm_lt.utils.checks import WHITE, UsageError
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
COLOR = re.compile(r"#[0-9a-f]{6}")
DIGEST, SHA256 = re.compile(r"[0-9a-f]{64}"), "the 64 hexadecimal digits of a SHA-256"
# Arguments of timm.create_model that do not belong to the architecture.
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
# Fields of pretrained_cfg that name another source of weights.
SOURCES = ("file", "url", "state_dict", "hf_hub_id", "hf_hub_filename", "custom_load")
HEAD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class TimmBase:
    """The model of plain timm that a registered ``lt_*`` model is.

    A bilateral model, which timm lacks, has a registered ``lt_*`` model here.

    Attributes:
        architecture: Name in timm's registry.
        model_args: Further arguments of ``timm.create_model``.
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
    """Checks a name of a head, which is also that of its file; ``where`` is for the message.

    Raises:
        UsageError: If it is not valid, or is the name of another kind of head.
    """
    if not HEAD_NAME.fullmatch(name):
        raise UsageError(
            f"{where} may have ASCII letters, digits, '_', '-' and '.' only, up to 100"
        )
    if kind is not None and name in HEADS and kind != name:
        raise UsageError(f"{where} is a {kind!r} head, but {name!r} is the name of another kind")


class _Fields:
    """Fields of a JSON object in a config, each checked as it is read.

    Args:
        where: File and path of the object, in front of a field's name in messages.
        content: The object.
    """

    def __init__(self, where: str, content: dict[str, Any]) -> None:
        self.where, self.content = where, content

    def read(
        self,
        key: str,
        is_valid: Callable[[Any], object],
        expected: str,
        *,
        default: object = None,
        optional: bool = False,
    ) -> Any:  # noqa: ANN401
        """Returns a field; one that is not valid raises UsageError."""
        value = self.content.get(key, default)
        if not (is_valid(value) or (optional and value is None)):
            expected = f"null or {expected}" if optional else expected
            raise UsageError(f"{self.where}{key} must be {expected}, found {reprlib.repr(value)}")
        return value

    def read_choice(self, key: str, choices: Iterable[str], *, optional: bool = False) -> Any:  # noqa: ANN401
        """Returns a field that is one of several strings."""
        names = list(choices)
        return self.read(
            key, lambda value: value in names, f"one of {', '.join(names)}", optional=optional
        )

    def read_object(self, key: str, default: object = None) -> "_Fields":
        """Returns the fields of an object inside of this one."""
        content = self.read(key, _is(dict), "an object", default=default)
        return _Fields(f"{self.where}{key}.", content)

    def refuse(self, keys: Iterable[str]) -> None:
        """Refuses fields that have a value."""
        for key in sorted(keys):
            self.read(key, lambda value: not value, "absent")


def _is(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind)


def read_checkpoint(folder: str | Path) -> CheckpointInfo:
    """Reads the description of a decoupled checkpoint, without its weights.

    Raises:
        UsageError: If the folder has no valid ``timm_lt`` block; the message names the field.
    """
    folder = Path(folder)
    return parse_checkpoint(folder, read_config(folder))


def find_info(folder: str | Path) -> CheckpointInfo | None:
    """Reads the description of a decoupled checkpoint; returns None for a plain timm checkpoint.

    Raises:
        UsageError: If the folder has no valid ``config.json``; the message names the field.
    """
    config = read_config(Path(folder))
    return parse_checkpoint(Path(folder), config) if BLOCK in config else None


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config of a timm checkpoint, with or without heads.

    Raises:
        UsageError: If there is none, a field that timm reads has the wrong type, or it asks for
            other weights than those of the folder.
    """
    path = folder / CONFIG
    return _timm_fields(path, read_json(path, limit=TEXT_LIMIT)).content


def parse_text(folder: Path, text: str) -> CheckpointInfo:
    """Parses the text of a config that is about to be written into a folder.

    Raises:
        UsageError: If it could not be read back; the message names the field.
    """
    if len(text.encode()) > TEXT_LIMIT:
        raise UsageError(f"{folder / CONFIG} would have more than {TEXT_LIMIT:,} bytes")
    return parse_checkpoint(folder, json.loads(text))


def parse_checkpoint(folder: Path, content: dict[str, Any]) -> CheckpointInfo:
    """Returns the description of a decoupled checkpoint with this config; it need not exist yet.

    Raises:
        UsageError: If a field is not valid; the message names it.
    """
    config = _timm_fields(folder / CONFIG, content)
    if BLOCK not in content:
        raise UsageError(f"{folder / CONFIG} is a plain timm checkpoint without heads ({BLOCK})")
    block = config.read_object(BLOCK)
    block.read("version", lambda v: v == FORMAT_VERSION, f"{FORMAT_VERSION} for this timm_lt")
    num_classes = config.read("num_classes", lambda c: type(c) is int and c > 0, "an integer >= 1")
    for part in ("model_args", "pretrained_cfg"):
        # With another number, timm would drop the classifier.
        fields, same = config.read_object(part, {}), f"{num_classes} as in the checkpoint"
        fields.read("num_classes", lambda c: c == num_classes, same, default=num_classes)
    fields.refuse((*SOURCES, "label_offset"))
    heads = block.read_object("heads")
    return CheckpointInfo(
        folder=folder,
        architecture=content["architecture"],
        num_classes=num_classes,
        weights_sha256=block.read("weights_sha256", _is_digest, SHA256),
        class_counts=block.read(
            "class_counts",
            lambda counts: _are_counts(counts) and len(counts) == num_classes,
            f"{num_classes} integers >= 0, not all 0",
            optional=True,
        ),
        label_names=block.read(
            "label_names",
            lambda names: _are_texts(names) and len(names) == num_classes,
            f"{num_classes} strings",
            optional=True,
        ),
        dataset=block.read("dataset", _is(str), "a string", optional=True),
        shot_rule=block.read_choice("shot_rule", get_args(ShotRule), optional=True),
        protocol=block.read_choice("protocol", get_args(SelectionProtocol), optional=True),
        seed=block.read("seed", _is_seed, "an integer >= 0", optional=True),
        # Not recorded in the first checkpoints.
        background=block.read("background", _is_color, "a colour '#rrggbb'", default=WHITE),
        heads={name: _read_entry(name, heads.read_object(name)) for name in heads.content},
    )


def _timm_fields(path: Path, content: dict[str, Any]) -> _Fields:
    """Returns a config after checking the fields that timm reads."""
    config = _Fields(f"{path}: ", content)
    config.read("architecture", _is(str), "a string")
    config.read_object("model_args", {}).refuse(RESERVED)
    config.read_object("pretrained_cfg", {}).read(
        "classifier",
        lambda names: _are_texts(names if isinstance(names, list) else [names or ""]),
        "a string or a list of strings",
    )
    return config


def _read_entry(name: str, entry: _Fields) -> HeadEntry:
    kind = entry.read_choice("kind", HEADS)
    check_head_name(entry.where.removesuffix("."), name, kind)
    options, metrics = entry.read_object("options", {}), entry.read_object("metrics", {})
    # They are those of the block.
    options.refuse(["class_counts"])
    try:
        check_head_options(kind, options.content)
    except UsageError as error:
        raise UsageError(f"{options.where.removesuffix('.')}: {error}") from error
    for key in metrics.content:
        metrics.read(key, _is_metric, "a number or null, or an object of these")
    statistics = entry.read("backbone_statistics", _is(bool), "true or false", default=False)
    has_file = bool(HEADS[kind].own_state or statistics)
    file = f"heads/{name}.safetensors" if has_file else None
    return HeadEntry(
        name=name,
        kind=kind,
        options=options.content,
        file=entry.read("file", lambda value: value == file, json.dumps(file)),
        sha256=entry.read("sha256", _is_digest, SHA256) if has_file else None,
        backbone_statistics=statistics,
        metrics=metrics.content,
        selection=entry.read_object("selection", {}).content,
    )


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and DIGEST.fullmatch(value) is not None


def _is_seed(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_color(value: object) -> bool:
    return isinstance(value, str) and COLOR.fullmatch(value) is not None


def _are_counts(value: object) -> bool:
    # Their sum must fit 64 bits.
    counts = value if isinstance(value, list) else []
    return all(type(n) is int and 0 <= n < 2**40 for n in counts) and sum(counts) > 0


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_metric(value: object) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return all(number is None or type(number) in (int, float) for number in values)
