"""Writing a checkpoint folder: everything is checked first, and the config is written last."""

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
    WEIGHTS,
    TimmBase,
    background_of,
    parse_text,
)
from timm_lt.checkpoint.load import from_joint, own_tensors
from timm_lt.heads import Head, LinearHead, classifier_name, fold_head, get_heads, head_option_names
from timm_lt.utils.checks import (
    UsageError,
    check_background,
    check_number,
    unknown_name,
    user_errors,
)
from timm_lt.utils.files import sha256, write_atomic
from timm_lt.utils.longtail import ClassCounts, SelectionProtocol, ShotRule, check_class_counts

# Metrics of a ShotReport that are fractions.
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
    """Writes a model with its joint classifier and any number of fitted heads into one folder.

    Everything is checked before anything is written. A folder with a ``config.json`` is complete:
    the old one is removed first, and the new one written last.

    Args:
        folder: The folder; made if missing.
        model: The model with its joint classifier: a plain one or a ``linear`` head.
        heads: Fitted heads (C, D) by name; for a model with several classifiers, a mapping of their
            paths to heads of one kind. Heads that start from the joint classifier or the class
            counts must start from these.
        class_counts: Training images per class, (C,), in label order or by label or class name;
            None if unknown.
        metrics: Metrics of each head on the test split, by head.
        label_names: Class names in label order, (C,).
        dataset: Name of the training data, for the model card.
        shot_rule: Rule of the shot groups in the metrics.
        protocol: ``"paper"`` if hyper-parameters and the epoch were selected on the test split.
        seed: Seed of the run.
        background: Colour behind transparent pixels of the training images, such as ``"black"``;
            None is that of the checkpoint from which the model was loaded, or white.
        dtype: Floating-point type of the stored tensors; but a head's statistics are float32.

    Returns:
        The folder.

    Raises:
        UsageError: If a head does not belong to the model, is not fitted, or not finite in the
            type, or another argument is not valid.
    """
    folder, metrics = Path(folder), metrics or {}
    for name in metrics:
        if name not in heads:
            raise unknown_name("head in metrics:", name, list(heads))
    joint = next(iter(get_heads(model).values()))
    if isinstance(joint, Head) and not isinstance(joint, LinearHead):
        raise UsageError(
            f"the model carries a {joint.kind!r} head; save it with its joint classifier, and pass "
            "other heads in heads="
        )
    counts: list[int] | None = None
    if class_counts is not None:
        counts = check_class_counts(class_counts, joint.out_features, label_names).tolist()
    entries, files = {}, {}
    for name, head in heads.items():
        entries[name], content = head_entry(
            name, head, model, class_counts=counts, metrics=metrics.get(name), dtype=dtype
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
        **({} if protocol is None else {"protocol": protocol}),
    }
    config = config_text(plain, label_names, {BLOCK: block})
    parse_text(Path(), config)
    (folder / CONFIG).unlink(missing_ok=True)
    for path, content in files.items():
        write_atomic(folder / path, content)
    write_atomic(folder / CONFIG, config)
    return folder


def head_entry(
    name: str,
    head: nn.Linear | Mapping[str, nn.Linear],
    model: nn.Module,
    *,
    class_counts: list[int] | None,
    metrics: Mapping[str, Any] | None,
    dtype: torch.dtype,
) -> tuple[dict[str, Any], bytes | None]:
    """Returns the entry of a head in the config, and the content of its file, if it has one."""
    joint, parts = get_heads(model), _by_classifier(name, head, model)
    for path, part in parts.items():
        _check_restorable(name, part, joint[path], class_counts)
    statistics = {
        f"{STATISTICS}{key}": value
        for part in parts.values()
        for key, value in (part.backbone_statistics or {}).items()
    }
    # A small variance could become 0 in half precision.
    own = _in_type(own_tensors(parts), dtype, f"head {name!r}", finite=True)
    stored = own | _in_type(statistics, torch.float32, f"head {name!r}", finite=True)
    content = safetensors.torch.save(stored) if stored else None
    first = next(iter(parts.values()))
    entry: dict[str, Any] = {
        "kind": first.kind,
        "options": first.options(),
        "file": None if content is None else f"heads/{name}.safetensors",
        "sha256": None if content is None else sha256(content),
        "backbone_statistics": bool(statistics),
        "selection": first.selection,
        "metrics": dict(metrics or {}),
    }
    for key, value in entry["metrics"].items():
        if key in FRACTIONS and value is not None:
            check_number(f"{key} of head {name!r} in metrics", value, "[0, 1]")
    fault = f"metrics or selection of head {name!r} cannot be JSON"
    with user_errors(fault, TypeError, ValueError):
        json.dumps(entry, allow_nan=False)
    return entry, content


def plain_copy(model: nn.Module) -> nn.Module:
    """Returns a copy for plain timm: folded classifiers, and timm's name of the architecture."""
    plain = fold_head(copy.deepcopy(model).cpu())
    arguments: dict[str, Any] = dict(getattr(model, "_model_args", {}))
    head = arguments.pop("head", None)
    for key in head_option_names(head) if head else ():
        arguments.pop(key, None)
    config: Any = model.pretrained_cfg
    config = {key: value for key, value in config.items() if key != "state_dict"}
    base: TimmBase | None = getattr(model, "timm_base", None)
    if base is not None:
        config.pop("tag", None)
        config["architecture"] = base.architecture
        arguments = {**base.model_args, **arguments}
    # Plain instance attributes, unknown to the types of nn.Module.
    plain.__dict__.update(pretrained_cfg=config, _model_args=arguments)
    return plain


def config_text(
    plain: nn.Module, label_names: list[str] | None, more: dict[str, Any] | None = None
) -> str:
    """Returns timm's text of ``config.json`` for a plain model, with more top-level fields."""
    labels = {"label_names": label_names} if label_names else {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / CONFIG
        save_config_for_hf(plain, str(path), model_config={**(more or {}), **labels})
        return path.read_text(encoding="utf-8") + "\n"


def _by_classifier(
    name: str, head: nn.Linear | Mapping[str, nn.Linear], model: nn.Module
) -> dict[str, Head]:
    """Returns a head for each classifier of a model, by path in their order."""
    paths = list(get_heads(model))
    given = dict(head) if isinstance(head, Mapping) else {classifier_name(model): head}
    parts = {path: part for path in paths if isinstance(part := given.get(path), Head)}
    are_equal = len({repr((part.kind, part.options())) for part in parts.values()}) == 1
    if not (len(parts) == len(paths) == len(given) and are_equal):
        found = ", ".join(f"{path}: {part}" for path, part in given.items())
        raise UsageError(
            f"head {name!r} must have a timm_lt head for {', '.join(paths)}, all of one kind and "
            f"with the same options; got {found or 'none'}"
        )
    return parts


def _check_restorable(name: str, head: Head, joint: nn.Linear, counts: list[int] | None) -> None:
    """Checks that loading restores the tensors of a head that are not stored in its file."""
    head.check_fitted()
    made = from_joint(type(head), joint, head.options(), counts)
    # The weight of a pointwise convolution has two dimensions more in the state dict.
    made.spatial = head.spatial
    restored, given = made.state_dict(), head.state_dict()
    for key in {**restored, **given}:
        if key == "bias" and not head.uses_bias:
            continue
        wanted, found = (part.get(key, torch.empty(0)).cpu() for part in (restored, given))
        is_same = key in head.own_state or torch.equal(found, wanted.to(found.dtype))
        if wanted.shape != found.shape or not is_same:
            origin = "class counts" if key == "log_prior" else "joint classifier"
            shapes = f"shapes {tuple(found.shape)} and {tuple(wanted.shape)}"
            raise UsageError(
                f"head {name!r} has another {key} than the {origin} of this checkpoint ({shapes}), "
                f"from which a {head.kind!r} head is made; fit it again with those"
            )


def _in_type(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, what: str, *, finite: bool = False
) -> dict[str, Tensor]:
    """Returns tensors in a floating-point type, whose range they must not exceed."""
    if not dtype.is_floating_point:
        raise UsageError(f"dtype must be a floating-point type, got {dtype}")
    stored = {}
    for key, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        stored[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        lost = ~stored[key].isfinite() & (tensor.isfinite() | finite)
        if lost.any():
            raise UsageError(f"{key} of {what} has values that are not finite in {dtype}")
    return stored
