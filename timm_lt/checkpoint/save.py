"""Writing a checkpoint folder: everything is checked first, the config is written last.

What plain timm knows of a model: its name for the architecture, and plain classifiers.
"""

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from timm_lt.checkpoint.format import (
    BLOCK,
    CONFIG,
    FORMAT_VERSION,
    STATISTICS,
    TEXT_LIMIT,
    WEIGHTS,
    CheckpointInfo,
    TimmBase,
    background_of,
    check_config,
    check_head_name,
    is_statistic,
    parse_checkpoint,
)
from timm_lt.checkpoint.load import from_joint
from timm_lt.heads import Head, LinearHead, fold_head, get_heads, head_option_names
from timm_lt.utils.checks import UsageError, check_background, check_number, unknown_name
from timm_lt.utils.files import sha256, write_atomic
from timm_lt.utils.longtail import ClassCounts, SelectionProtocol, ShotRule, check_class_counts


def save_plain(
    folder: str | Path, model: nn.Module, *, label_names: list[str] | None = None
) -> Path:
    """Writes a model with its heads folded as an ordinary timm checkpoint, without heads.

    Args:
        folder: Where to write; made if missing.
        model: The model, with a head that can be folded.
        label_names: Class names in label order, (C,).

    Returns:
        The folder.

    Raises:
        UsageError: If a head is not fitted or cannot be folded, or needs a bias where timm's model
            has none; nothing is written then.
    """
    folder = Path(folder)
    plain = plain_copy(model)
    for path, head in get_heads(model).items():
        folded = plain.get_submodule(path)
        if head.bias is None and folded.bias is not None:
            raise UsageError(
                f"the folded head needs a bias, but the classifier {path!r} of timm's "
                f"{type(model).__name__} has none, so timm could not load it"
            )
    content = safetensors.torch.save(contiguous(plain.state_dict()))
    config = config_text(plain, label_names, {})
    write_atomic(folder / WEIGHTS, content)
    write_atomic(folder / CONFIG, config)
    return folder


def plain_copy(model: nn.Module) -> nn.Module:
    """Copies a model as what plain timm knows it: timm's architecture name, plain classifiers."""
    plain = fold_head(copy.deepcopy(model).cpu())
    recorded: dict[str, Any] = getattr(model, "_model_args", {})
    head = recorded.get("head")
    ours = {"head", *(head_option_names(head) if head else ())}
    arguments = {key: value for key, value in recorded.items() if key not in ours}
    config: Any = model.pretrained_cfg
    config = {key: value for key, value in config.items() if key != "state_dict"}
    base: TimmBase | None = getattr(model, "timm_base", None)
    if base is not None:
        config.pop("tag", None)
        config["architecture"] = base.architecture
        arguments = {**base.model_args, **arguments}
    # timm keeps both as plain instance attributes, which nn.Module's types do not know.
    plain.__dict__["pretrained_cfg"] = config
    plain.__dict__["_model_args"] = arguments
    return plain


def config_text(plain: nn.Module, label_names: list[str] | None, more: dict[str, Any]) -> str:
    """Returns the text of ``config.json`` as timm writes it, with more at its top level."""
    labels = {"label_names": label_names} if label_names else {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / CONFIG
        save_config_for_hf(plain, str(path), model_config={**more, **labels})
        return path.read_text(encoding="utf-8") + "\n"


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors on the CPU as safetensors takes them."""
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


# Metrics that are fractions, as a ShotReport has them.
FRACTIONS = {
    *("all", "class_mean", "many_shot", "medium_shot", "few_shot", "macro_f1", "worst_class"),
    *("harmonic_mean", "geometric_mean", "group_harmonic_mean", "macro_precision", "top5"),
}


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    *,
    heads: Mapping[str, nn.Linear | Mapping[str, nn.Linear]],
    class_counts: ClassCounts | None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    label_names: list[str] | None = None,
    dataset: str | None = None,
    shot_rule: ShotRule | None = None,
    protocol: SelectionProtocol | None = None,
    seed: int | None = None,
    background: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a model with its joint classifier and any number of fitted heads as one folder.

    Nothing is written before all is checked. Each file is written atomically and ``config.json``
    last, an older one being removed first, so a folder with a config is whole.

    Args:
        folder: Where to write; made if missing.
        model: The model with its joint classifier: a plain one or a ``linear`` head.
        heads: Fitted heads (C, D) by name; for a model with several classifiers a mapping of their
            paths to heads of one kind. A head that starts from the joint classifier must start from
            this model's, one that knows class counts must have these.
        class_counts: Training images per class, (C,), in label order or by label or class name;
            None if they are not known.
        metrics: Figures of each head on the test split, by head.
        label_names: Class names in label order, (C,).
        dataset: Name of the training data, for the model card.
        shot_rule: Rule of the shot groups in the metrics.
        protocol: ``"paper"`` if hyper-parameters and the epoch were selected on the test split.
        seed: Seed of the run.
        background: Colour behind transparent pixels of the training images, such as ``"black"``;
            None is that of the checkpoint that the model was loaded from, or white.
        dtype: Type in which floating-point tensors are stored; batch-norm statistics of a head are
            float32.

    Returns:
        The folder.

    Raises:
        UsageError: If a head does not belong to the model, is not fitted or not finite, or does not
            fit the type; or if metrics name no head or are no JSON.
    """
    folder = Path(folder)
    for name in metrics or {}:
        if name not in heads:
            raise unknown_name("head in metrics:", name, list(heads))
    joint = get_heads(model)
    num_classes = next(iter(joint.values())).out_features
    counts: list[int] | None = None
    if class_counts is not None:
        counts = check_class_counts(class_counts, num_classes, label_names).tolist()
    _check_joint(joint, counts, label_names)
    entries, files = {}, {}
    for name, head in heads.items():
        entries[name], content = head_entry(
            name, head, model, class_counts=counts, metrics=(metrics or {}).get(name), dtype=dtype
        )
        if content is not None:
            files[entries[name]["file"]] = content
    plain = plain_copy(model)
    files[WEIGHTS] = safetensors.torch.save(_in_type(plain.state_dict(), dtype, "the model"))
    block = {
        "version": FORMAT_VERSION,
        "weights_sha256": sha256(files[WEIGHTS]),
        "class_counts": counts,
        "label_names": label_names,
        "dataset": dataset,
        "shot_rule": shot_rule,
        "seed": seed,
        "background": check_background(background or background_of(model)),
        "heads": entries,
    }
    if protocol is not None:
        block["protocol"] = protocol
    config = config_text(plain, label_names, {BLOCK: block})
    check_text(folder, config)
    (folder / CONFIG).unlink(missing_ok=True)
    for path, content in files.items():
        write_atomic(folder / path, content)
    write_atomic(folder / CONFIG, config)
    return folder


def check_text(folder: Path, text: str) -> CheckpointInfo:
    """Checks that a config that is about to be written can be read again.

    Returns:
        What it says.

    Raises:
        UsageError: If it cannot; the message names the field.
    """
    if len(text.encode()) > TEXT_LIMIT:
        raise UsageError(f"{folder / CONFIG} would have more than {TEXT_LIMIT:,} bytes")
    return parse_checkpoint(folder, check_config(folder / CONFIG, json.loads(text)))


def _check_joint(
    joint: Mapping[str, nn.Linear], counts: list[int] | None, label_names: list[str] | None
) -> None:
    for classifier in joint.values():
        if isinstance(classifier, Head) and not isinstance(classifier, LinearHead):
            raise UsageError(
                f"the model carries a {classifier.kind!r} head; a checkpoint is saved with the "
                "joint classifier on the model and the other heads in heads="
            )
    num_classes = next(iter(joint.values())).out_features
    if counts is not None and len(counts) != num_classes:
        raise UsageError(f"class_counts has {len(counts)} classes, the model {num_classes}")
    if label_names is not None and len(label_names) != num_classes:
        raise UsageError(f"label_names has {len(label_names)} names for {num_classes} classes")


def _by_classifier(
    name: str, head: nn.Linear | Mapping[str, nn.Linear], joint: Mapping[str, nn.Linear]
) -> dict[str, Head]:
    """Returns a head for each joint classifier, by path in their order."""
    if not isinstance(head, Mapping):
        if len(joint) > 1:
            raise UsageError(
                f"head {name!r} is one head, but the model has the classifiers {', '.join(joint)}: "
                "pass a mapping of these to heads"
            )
        head = dict.fromkeys(joint, head)
    if set(head) != set(joint):
        raise UsageError(
            f"head {name!r} has parts for {', '.join(head)}, the model's classifiers are "
            f"{', '.join(joint)}"
        )
    parts: dict[str, Head] = {}
    for path in joint:
        part = head[path]
        if not isinstance(part, Head):
            raise UsageError(f"head {name!r} is {type(part).__name__}, not a timm_lt head")
        parts[path] = part
    first = next(iter(parts.values()))
    if any((p.kind, p.options()) != (first.kind, first.options()) for p in parts.values()):
        raise UsageError(f"head {name!r} differs in kind or options between the classifiers")
    return parts


def _check_belongs(name: str, head: Head, joint: nn.Linear, counts: list[int] | None) -> None:
    if head.weight.shape != joint.weight.shape:
        raise UsageError(
            f"head {name!r} is {tuple(head.weight.shape)} (classes, features), the model's "
            f"classifier {tuple(joint.weight.shape)}"
        )
    head.check_fitted()
    _check_restorable(name, head, joint, counts)


def head_entry(
    name: str,
    head: nn.Linear | Mapping[str, nn.Linear],
    model: nn.Module,
    *,
    class_counts: list[int] | None,
    metrics: Mapping[str, Any] | None,
    dtype: torch.dtype,
) -> tuple[dict[str, Any], bytes | None]:
    """Makes what a checkpoint has of a head: its entry in the config and the content of its file.

    Args:
        name: Name in the checkpoint.
        head: As in :func:`save_checkpoint`.
        model: The model with the checkpoint's joint classifier.
        class_counts: Those of the checkpoint, (C,).
        metrics: Figures of the head on the test split.
        dtype: Type in which the head's tensors are stored.

    Raises:
        UsageError: If the head does not belong to the model, is not fitted or not finite, or the
            metrics or its selection are no JSON.
    """
    joint = get_heads(model)
    parts = _by_classifier(name, head, joint)
    for part, classifier in zip(parts.values(), joint.values(), strict=True):
        _check_belongs(name, part, classifier, class_counts)
    entry, content = _describe(name, parts, dtype)
    check_head_name(f"head name {name!r}", name, entry["kind"])
    entry["metrics"] = dict(metrics or {})
    for key in FRACTIONS & set(entry["metrics"]):
        if entry["metrics"][key] is not None:
            check_number(f"{key} of head {name!r} in metrics", entry["metrics"][key], "[0, 1]")
    try:
        json.dumps(entry, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"metrics or selection of head {name!r} cannot be JSON: {error}"
        ) from error
    return entry, content


def _describe(
    name: str, parts: dict[str, Head], dtype: torch.dtype
) -> tuple[dict[str, Any], bytes | None]:
    head = next(iter(parts.values()))
    statistics = {
        f"{STATISTICS}{key}": value
        for part in parts.values()
        for key, value in (part.backbone_statistics or {}).items()
    }
    if not all(map(is_statistic, statistics)):
        raise UsageError(f"backbone_statistics of head {name!r} holds more than statistics")
    own = {
        f"{path}.{key}" if len(parts) > 1 else key: getattr(part, key)
        for path, part in parts.items()
        for key in head.own_state
        if getattr(part, key) is not None
    }
    for key, value in {**own, **statistics}.items():
        if not value.isfinite().all():
            raise UsageError(f"{key} of head {name!r} has values that are not finite")
    content = None
    if own or statistics:
        stored = _in_type(own, dtype, f"head {name!r}")
        # In half precision a small variance could become 0.
        stored |= _in_type(statistics, torch.float32, f"head {name!r}")
        content = safetensors.torch.save(stored)
    entry = {
        "kind": head.kind,
        "options": head.options(),
        "file": None if content is None else f"heads/{name}.safetensors",
        "sha256": None if content is None else sha256(content),
        "backbone_statistics": bool(statistics),
        "selection": head.selection,
    }
    return entry, content


def _check_restorable(name: str, head: Head, joint: nn.Linear, counts: list[int] | None) -> None:
    """Checks that what a checkpoint leaves out of a head's file comes back when it is loaded."""
    if head.uses_bias and (head.bias is None) != (joint.bias is None):
        only = "head" if joint.bias is None else "model's classifier"
        raise UsageError(f"head {name!r} does not belong to the model: only the {only} has a bias")
    made = from_joint(type(head), joint, head.options(), counts)
    # The state dict has the form of a 1×1 convolution then.
    made.spatial = head.spatial
    restored = made.state_dict()
    for key, value in head.state_dict().items():
        if key in head.own_state or (key == "bias" and not head.uses_bias):
            continue
        if not torch.equal(value.cpu(), restored[key].to(value.dtype).cpu()):
            origin = "class counts" if key == "log_prior" else "joint classifier"
            raise UsageError(
                f"head {name!r} has another {key} than the {origin} of this checkpoint, from "
                f"which a {head.kind!r} head is made; fit it again with those"
            )


def _in_type(tensors: Mapping[str, Tensor], dtype: torch.dtype, what: str) -> dict[str, Tensor]:
    if not dtype.is_floating_point:
        raise UsageError(f"dtype must be a floating-point type, got {dtype}")
    stored = {}
    for key, tensor in contiguous(tensors).items():
        stored[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if not torch.equal(stored[key].isfinite(), tensor.isfinite()):
            raise UsageError(f"{key} of {what} is beyond the range of {dtype}")
    return stored
