"""The decoupled checkpoint: one folder with one backbone and many small heads (DESIGN section 4).

``config.json`` and ``model.safetensors`` are an ordinary timm checkpoint with the joint classifier;
plain timm loads them. A block ``timm_lt`` in the config lists the heads, and
``heads/*.safetensors`` hold what each adds.
"""

import copy
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from timm_lt.files import read_json, sha256, write_atomic
from timm_lt.heads import HEADS, Head, LinearHead, get_head, head_option_names, put_head
from timm_lt.longtail import check_class_counts
from timm_lt.registry import UsageError, unknown_name

FORMAT_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
METRICS = "metrics.json"
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
        metrics: Its figures on the test split, fractions.
        selection: How its options were chosen.
    """

    name: str
    kind: str
    options: dict[str, Any]
    file: str | None
    sha256: str | None
    metrics: dict[str, Any]
    selection: dict[str, Any]


@dataclass(frozen=True)
class CheckpointInfo:
    """The ``timm_lt`` block of a checkpoint.

    Attributes:
        folder: Where the checkpoint lies.
        class_counts: Training images per class, (C,).
        label_names: Class names, or None.
        heads: The heads by name.
    """

    folder: Path
    class_counts: list[int]
    label_names: list[str] | None
    heads: dict[str, HeadEntry]


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    *,
    heads: Mapping[str, nn.Linear],
    class_counts: Tensor | list[int],
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    label_names: list[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a model with its joint classifier and any number of fitted heads as one folder.

    Nothing is written before all is checked. Each file is written atomically and ``config.json``
    last, an older one being removed first, so a folder with a config is whole.

    Args:
        folder: Where to write; made if missing.
        model: The model with its joint classifier: a plain ``nn.Linear`` or a ``linear`` head.
        heads: Fitted heads (C, D) by name. One that starts from the joint classifier must start
            from this model's, one that knows class counts must have these.
        class_counts: Training images per class, (C,).
        metrics: Figures of each head on the test split, by head.
        label_names: Class names in label order, (C,).
        dtype: Type in which floating-point tensors are stored.

    Returns:
        The folder.

    Raises:
        UsageError: If a head does not belong to the model, is not fitted or not finite, or does not
            fit the type; or if metrics name no head or are no JSON.
    """
    folder = Path(folder)
    if not dtype.is_floating_point:
        raise UsageError(f"dtype must be a floating-point type, got {dtype}")
    for name in metrics or {}:
        if name not in heads:
            raise unknown_name("head in metrics:", name, list(heads))
    joint = get_head(model)
    if isinstance(joint, Head) and not isinstance(joint, LinearHead):
        raise UsageError(
            f"the model carries a {joint.kind!r} head; a checkpoint is saved with the joint "
            "classifier on the model and the other heads in heads="
        )
    counts = [int(n) for n in check_class_counts(class_counts)]
    if len(counts) != joint.out_features:
        raise UsageError(f"class_counts has {len(counts)} classes, the model {joint.out_features}")
    if label_names is not None and len(label_names) != len(counts):
        raise UsageError(f"label_names has {len(label_names)} names for {len(counts)} classes")
    entries, files = {}, {}
    for name, head in heads.items():
        entries[name], content = _head_entry(name, head, joint, counts, dtype)
        if content is not None:
            files[entries[name]["file"]] = content
        entries[name]["metrics"] = dict((metrics or {}).get(name, {}))
    block = {
        "version": FORMAT_VERSION,
        "class_counts": counts,
        "label_names": label_names,
        "heads": entries,
    }
    plain = _plain_copy(model)
    files[WEIGHTS] = _to_bytes(plain.state_dict(), dtype, "the model")
    config = _timm_config(plain, block)
    (folder / CONFIG).unlink(missing_ok=True)
    for path, content in files.items():
        write_atomic(folder / path, content)
    write_atomic(folder / CONFIG, config)
    return folder


def _head_entry(
    name: str, head: nn.Linear, joint: nn.Linear, counts: list[int], dtype: torch.dtype
) -> tuple[dict[str, Any], bytes | None]:
    _check_head_name(f"head name {name!r}", name)
    if not isinstance(head, Head):
        raise UsageError(f"head {name!r} is {type(head).__name__}, not a timm_lt head")
    if head.weight.shape != joint.weight.shape:
        raise UsageError(
            f"head {name!r} is {tuple(head.weight.shape)} (classes, features), the model's "
            f"classifier {tuple(joint.weight.shape)}"
        )
    head.check_fitted()
    _check_restorable(name, head, joint, counts)
    own = {key: head.state_dict()[key] for key in head.own_state if key in head.state_dict()}
    for key, value in own.items():
        if not value.isfinite().all():
            raise UsageError(f"{key} of head {name!r} has values that are not finite")
    content = _to_bytes(own, dtype, f"head {name!r}") if own else None
    entry = {
        "kind": head.kind,
        "options": head.options(),
        "file": f"heads/{name}.safetensors" if own else None,
        "sha256": None if content is None else sha256(content),
        "backbone_statistics": False,
        "selection": head.selection,
    }
    return entry, content


def _check_head_name(where: str, name: str) -> None:
    if not HEAD_NAME.fullmatch(name):
        raise UsageError(f"{where} may have ASCII letters, digits, '_', '-' and '.' only")


def _check_restorable(name: str, head: Head, joint: nn.Linear, counts: list[int]) -> None:
    """Checks that what a checkpoint leaves out of a head's file comes back when it is loaded."""
    if head.uses_bias and (head.bias is None) != (joint.bias is None):
        only = "head" if joint.bias is None else "model's classifier"
        raise UsageError(f"head {name!r} does not belong to the model: only the {only} has a bias")
    restored = _from_joint(type(head), joint, head.options(), counts).state_dict()
    for key, value in head.state_dict().items():
        if key in head.own_state or (key == "bias" and not head.uses_bias):
            continue
        if not torch.equal(value.cpu(), restored[key].to(value.dtype).cpu()):
            origin = "class counts" if key == "log_prior" else "joint classifier"
            raise UsageError(
                f"head {name!r} has another {key} than the {origin} of this checkpoint, from "
                f"which a {head.kind!r} head is made; fit it again with those"
            )


def _from_joint(
    cls: type[Head], joint: nn.Linear, options: dict[str, Any], counts: list[int]
) -> Head:
    if "class_counts" in head_option_names(cls.kind):
        options = {"class_counts": counts, **options}
    return cls.from_classifier(joint, **options)


def _to_bytes(tensors: Mapping[str, Tensor], dtype: torch.dtype, what: str) -> bytes:
    stored = {}
    for key, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        stored[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if not torch.equal(stored[key].isfinite(), tensor.isfinite()):
            raise UsageError(f"{key} of {what} is beyond the range of {dtype}")
    return safetensors.torch.save(stored)


def _plain_copy(model: nn.Module) -> nn.Module:
    """Copies a model as what plain timm knows it: timm's architecture name, an nn.Linear."""
    plain = copy.deepcopy(model).cpu()
    joint = get_head(plain)
    if isinstance(joint, Head):
        put_head(plain, joint.fold())
    base: TimmBase | None = getattr(model, "timm_base", None)
    if base is not None:
        recorded: dict[str, Any] = getattr(model, "_model_args", {})
        head = recorded.get("head")
        ours = {"head", *(head_option_names(head) if head else ())}
        theirs = {key: value for key, value in recorded.items() if key not in ours}
        config: Any = model.pretrained_cfg
        # timm keeps both as plain instance attributes, which nn.Module's types do not know.
        plain.__dict__["pretrained_cfg"] = {**config, "architecture": base.architecture}
        plain.__dict__["_model_args"] = {**base.model_args, **theirs}
    return plain


def _timm_config(plain: nn.Module, block: dict[str, Any]) -> str:
    try:
        json.dumps(block, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"metrics or a head's selection cannot be JSON: {error}") from error
    labels = {"label_names": block["label_names"]} if block["label_names"] else {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / CONFIG
        save_config_for_hf(plain, str(path), model_config={"timm_lt": block, **labels})
        return path.read_text(encoding="utf-8") + "\n"


def read_checkpoint(folder: str | Path) -> CheckpointInfo:
    """Reads what a checkpoint folder says of itself, without its weights.

    Raises:
        UsageError: If the folder has no readable ``timm_lt`` block; the message names the field.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"checkpoint folder {folder} does not exist")
    block = read_json(folder / CONFIG).get("timm_lt")
    where = f"{folder / CONFIG}: timm_lt"
    if not isinstance(block, dict):
        raise UsageError(f"{where}: missing; this is a plain timm checkpoint without heads")
    if block.get("version") != FORMAT_VERSION:
        raise UsageError(
            f"{where}.version is {block.get('version')!r}, this timm_lt reads {FORMAT_VERSION}"
        )
    counts, names = block.get("class_counts"), block.get("label_names")
    if not (isinstance(counts, list) and counts and all(type(n) is int and n >= 0 for n in counts)):
        raise UsageError(f"{where}.class_counts must be a list of integers >= 0")
    named = isinstance(names, list) and len(names) == len(counts)
    if not (names is None or (named and all(isinstance(name, str) for name in names))):
        raise UsageError(f"{where}.label_names must be null or {len(counts)} strings")
    heads = block.get("heads")
    if not isinstance(heads, dict):
        raise UsageError(f"{where}.heads must be an object")
    entries = {key: _read_entry(f"{where}.heads.{key}", key, value) for key, value in heads.items()}
    return CheckpointInfo(folder, counts, names, entries)


def _read_entry(where: str, name: str, entry: object) -> HeadEntry:
    _check_head_name(where, name)
    if not isinstance(entry, dict):
        raise UsageError(f"{where} must be an object")
    kind, file, digest = (entry.get(key) for key in ("kind", "file", "sha256"))
    if not isinstance(kind, str) or kind not in HEADS:
        raise unknown_name(f"head at {where}.kind:", kind, list(HEADS))
    for key in ("options", "metrics", "selection"):
        if not isinstance(entry.get(key, {}), dict):
            raise UsageError(f"{where}.{key} must be an object")
    if file is not None and file != f"heads/{name}.safetensors":
        raise UsageError(f"{where}.file must be 'heads/{name}.safetensors' or null, got {file!r}")
    if (file is None) == bool(HEADS[kind].own_state):
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
        entry.get("metrics", {}),
        entry.get("selection", {}),
    )


def load_head(folder: str | Path, name: str, classifier: nn.Linear, **options: Any) -> Head:
    """Loads a head of a checkpoint.

    A head that needs nothing but the joint classifier (``linear``, ``tau_norm``,
    ``logit_adjusted``) can be had from every checkpoint; stored options are its defaults.

    Args:
        folder: The checkpoint's folder.
        name: Name of the head there.
        classifier: The checkpoint's joint classifier (C, D), or a head that keeps its weight.
        **options: Options that take the place of the stored ones.

    Raises:
        UsageError: If there is no such head, an option is wrong or cannot change any more, or the
            head's file is missing, altered, or of another shape; nothing is loaded then.
    """
    info = read_checkpoint(folder)
    entry = info.heads.get(name)
    if entry is None:
        if name not in HEADS or HEADS[name].own_state:
            free = [key for key in HEADS if not HEADS[key].own_state and key not in info.heads]
            raise unknown_name(f"head of {folder}:", name, [*info.heads, *free])
        entry = HeadEntry(name, name, {}, None, None, {}, {})
    if isinstance(classifier, Head) and "weight" in classifier.own_state:
        raise UsageError(
            f"a {classifier.kind!r} head has taken the place of the joint classifier, from which "
            f"head {name!r} of {folder} starts; create the model again"
        )
    cls = HEADS[entry.kind]
    stored = _from_joint(cls, classifier, entry.options, info.class_counts).options()
    for key, value in options.items():
        if key in cls.fixed_options and value != stored[key]:
            raise UsageError(
                f"head {name!r} was fitted with {key}={stored[key]!r}, which cannot change "
                "afterwards; fit it again with timm_lt.fit_head"
            )
    head = _from_joint(cls, classifier, {**entry.options, **options}, info.class_counts)
    # A value that the caller chose was not selected the way that the checkpoint records.
    head.selection = dict(entry.selection) if head.options() == stored else {}
    if entry.file is not None:
        _load_tensors(head, entry, info.folder)
    head.check_fitted()
    return head


def _load_tensors(head: Head, entry: HeadEntry, folder: Path) -> None:
    assert entry.file is not None
    path = folder / entry.file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"head file {path} cannot be read: {error.strerror}") from error
    if sha256(content) != entry.sha256:
        raise UsageError(
            f"head file {path} is not the one that {CONFIG} describes (SHA-256 differs)"
        )
    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as error:
        raise UsageError(f"head file {path} is no safetensors file: {error}") from error
    state = head.state_dict()
    wanted = {key: tuple(state[key].shape) for key in head.own_state if key in state}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if wanted != found:
        raise UsageError(
            f"head file {path} holds {found}, a {head.kind!r} head here needs {wanted}"
        )
    head.load_state_dict({**state, **tensors})


def load_model_head(folder: str | Path, model: nn.Module, name: str, **options: Any) -> nn.Module:
    """Puts a head of a checkpoint on a model that carries the checkpoint's joint classifier.

    Returns:
        The same model.

    Raises:
        UsageError: As :func:`load_head`.
    """
    head = load_head(folder, name, get_head(model), **options)
    put_head(model, head.train(model.training))
    return model
