"""Loading heads from a checkpoint folder onto a joint classifier."""

from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from timm_lt.checkpoint.format import (
    CONFIG,
    STATISTICS,
    CheckpointInfo,
    HeadEntry,
    is_statistic,
    read_checkpoint,
)
from timm_lt.heads import HEADS, Head, as_joint, get_heads, head_option_names, set_head
from timm_lt.utils.checks import UsageError, unknown_name
from timm_lt.utils.files import sha256
from timm_lt.utils.longtail import check_class_counts


def load_head(folder: str | Path, name: str, classifier: nn.Module, **options: Any) -> Head:
    """Loads a head of a checkpoint of a model with one classifier.

    A head that needs nothing but the joint classifier (``linear``, ``tau_norm``,
    ``logit_adjusted``) can be had from every checkpoint; stored options are its defaults.

    Args:
        folder: The checkpoint's folder.
        name: Name of the head there.
        classifier: The checkpoint's joint classifier (C, D), as ``model.get_classifier()`` gives
            it, or a head that keeps its weight.
        **options: Options that take the place of the stored ones.

    Returns:
        The head; if its file has batch-norm statistics, they are its ``backbone_statistics``, which
        :func:`timm_lt.set_head` copies into the model.

    Raises:
        UsageError: If there is no such head, an option is wrong or cannot change any more, or the
            head's file is missing, altered, or of another shape; nothing is loaded then.
    """
    info = read_checkpoint(folder)
    return _load_heads(info, name, {"": as_joint(classifier)}, options)[""]


def load_heads(folder: str | Path, name: str, model: nn.Module, **options: Any) -> dict[str, Head]:
    """Loads a head of a checkpoint for each classifier of a model that has the checkpoint's.

    Returns:
        Heads by the path of their classifier; the model stays as it is.

    Raises:
        UsageError: As :func:`load_head`.
    """
    classifiers = get_heads(model)
    if len(classifiers) > 1:
        return _load_heads(read_checkpoint(folder), name, classifiers, options)
    path, classifier = next(iter(classifiers.items()))
    return {path: load_head(folder, name, classifier, **options)}


def load_model_head(folder: str | Path, model: nn.Module, name: str, **options: Any) -> nn.Module:
    """Puts a head of a checkpoint on a model that carries the checkpoint's joint classifier.

    Returns:
        The same model.

    Raises:
        UsageError: As :func:`load_head`.
    """
    return set_head(model, load_heads(folder, name, model, **options))


def _load_heads(
    info: CheckpointInfo, name: str, classifiers: dict[str, nn.Linear], options: dict[str, Any]
) -> dict[str, Head]:
    """Loads what a head of a checkpoint is for each classifier, by path; "" is an only one."""
    entry = find_entry(info, name, str(info.folder))
    for classifier in classifiers.values():
        _check_is_joint(classifier, info, name)
    cls = HEADS[entry.kind]
    if options.get("class_counts") is not None:
        num_classes = next(iter(classifiers.values())).out_features
        counts = check_class_counts(options["class_counts"], num_classes, info.label_names)
        options = {**options, "class_counts": counts}
    heads = {}
    for path, classifier in classifiers.items():
        stored = from_joint(cls, classifier, entry.options, info.class_counts).options()
        for key, value in options.items():
            if key in cls.fixed_options and value != stored[key]:
                raise UsageError(
                    f"head {name!r} was fitted with {key}={stored[key]!r}, which cannot change "
                    "afterwards; fit it again with timm_lt.fit_head"
                )
        head = from_joint(cls, classifier, {**entry.options, **options}, info.class_counts)
        # A value that the caller chose was not selected the way that the checkpoint records.
        head.selection = dict(entry.selection) if head.options() == stored else {}
        heads[path] = head
    if entry.file is not None:
        _load_tensors(heads, entry, info.folder)
    for head in heads.values():
        head.check_fitted()
    return heads


def find_entry(info: CheckpointInfo, name: str, place: str) -> HeadEntry:
    """Returns what a checkpoint says of a head, or what every checkpoint has of one without a file.

    Args:
        info: What the checkpoint says of itself.
        name: Name of the head.
        place: What the checkpoint is called in messages.

    Raises:
        UsageError: If there is no such head; it lists those that there are.
    """
    if name in info.heads:
        return info.heads[name]
    if name not in HEADS or HEADS[name].own_state:
        free = [key for key in HEADS if not HEADS[key].own_state and key not in info.heads]
        raise unknown_name(f"head of {place}:", name, [*info.heads, *free])
    return HeadEntry(name, name, {}, None, None, False, {}, {})


def _check_is_joint(classifier: nn.Linear, info: CheckpointInfo, name: str) -> None:
    if classifier.out_features != info.num_classes:
        raise UsageError(
            f"{info.folder} has {info.num_classes} classes, the classifier for its head {name!r} "
            f"{classifier.out_features}"
        )
    if not isinstance(classifier, Head):
        return
    if "weight" in classifier.own_state or classifier.backbone_statistics is not None:
        raise UsageError(
            f"a {classifier.kind!r} head has taken the place of the joint classifier, from which "
            f"head {name!r} of {info.folder} starts; create the model again"
        )


def _load_tensors(heads: dict[str, Head], entry: HeadEntry, folder: Path) -> None:
    assert entry.file is not None
    path = folder / entry.file
    tensors = _read_tensors(path, entry)
    statistics = {
        key.removeprefix(STATISTICS): tensors.pop(key)
        for key in list(tensors)
        if entry.backbone_statistics and key.startswith(STATISTICS)
    }
    if entry.backbone_statistics and not (statistics and all(map(is_statistic, statistics))):
        raise UsageError(f"head file {path} should hold batch-norm statistics and does not")
    own = {
        f"{where}.{key}" if where else key: (head, key)
        for where, head in heads.items()
        for key in head.own_state
        if getattr(head, key) is not None
    }
    wanted = {name: tuple(getattr(head, key).shape) for name, (head, key) in own.items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if wanted != found:
        raise UsageError(
            f"head file {path} holds {found}, a {entry.kind!r} head here needs {wanted}"
        )
    for name, value in {**tensors, **statistics}.items():
        # NaN stands for a state that is not fitted.
        if not value.isfinite().all() and not value.isnan().all():
            raise UsageError(f"{name} in head file {path} has values that are not finite")
    for head in heads.values():
        loaded = {key: tensors[name] for name, (owner, key) in own.items() if owner is head}
        head.load_state_dict({**head.state_dict(), **loaded})
        head.backbone_statistics = statistics or None


def _read_tensors(path: Path, entry: HeadEntry) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"head file {path} cannot be read: {error.strerror}") from error
    if sha256(content) != entry.sha256:
        raise UsageError(
            f"head file {path} is not the one that {CONFIG} describes (SHA-256 differs)"
        )
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise UsageError(f"head file {path} is no safetensors file: {error}") from error


def from_joint(
    cls: type[Head], joint: nn.Linear, options: dict[str, Any], counts: list[int] | None
) -> Head:
    """Makes a head from the joint classifier (C, D), its options and the class counts (C,)."""
    if "class_counts" in head_option_names(cls.kind):
        options = {"class_counts": counts, **options}
    return cls.from_classifier(joint, **options)
