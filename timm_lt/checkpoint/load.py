"""Loading heads from a checkpoint folder onto a joint classifier."""

from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from timm_lt.checkpoint.format import CONFIG, HeadEntry, read_checkpoint
from timm_lt.files import sha256
from timm_lt.heads import HEADS, Head, get_head, head_option_names, put_head
from timm_lt.registry import UsageError, unknown_name


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


def from_joint(
    cls: type[Head], joint: nn.Linear, options: dict[str, Any], counts: list[int]
) -> Head:
    """Makes a head from the joint classifier (C, D), its options and the class counts (C,)."""
    if "class_counts" in head_option_names(cls.kind):
        options = {"class_counts": counts, **options}
    return cls.from_classifier(joint, **options)
