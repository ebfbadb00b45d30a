"""Writing a checkpoint folder: everything is checked first, the config is written last."""

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

from timm_lt.checkpoint.format import CONFIG, FORMAT_VERSION, WEIGHTS, TimmBase, check_head_name
from timm_lt.checkpoint.load import from_joint
from timm_lt.files import sha256, write_atomic
from timm_lt.heads import Head, LinearHead, get_head, head_option_names, put_head
from timm_lt.longtail import check_class_counts
from timm_lt.registry import UsageError, unknown_name


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
    check_head_name(f"head name {name!r}", name)
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


def _check_restorable(name: str, head: Head, joint: nn.Linear, counts: list[int]) -> None:
    """Checks that what a checkpoint leaves out of a head's file comes back when it is loaded."""
    if head.uses_bias and (head.bias is None) != (joint.bias is None):
        only = "head" if joint.bias is None else "model's classifier"
        raise UsageError(f"head {name!r} does not belong to the model: only the {only} has a bias")
    restored = from_joint(type(head), joint, head.options(), counts).state_dict()
    for key, value in head.state_dict().items():
        if key in head.own_state or (key == "bias" and not head.uses_bias):
            continue
        if not torch.equal(value.cpu(), restored[key].to(value.dtype).cpu()):
            origin = "class counts" if key == "log_prior" else "joint classifier"
            raise UsageError(
                f"head {name!r} has another {key} than the {origin} of this checkpoint, from "
                f"which a {head.kind!r} head is made; fit it again with those"
            )


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
        plain.__dict__["pretrained_cfg"] = {
            **{key: value for key, value in config.items() if key != "tag"},
            "architecture": base.architecture,
        }
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
