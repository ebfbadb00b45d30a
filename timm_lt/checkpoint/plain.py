"""What plain timm knows of a model: its name for the architecture, and plain classifiers."""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from timm_lt.checkpoint.format import CONFIG, WEIGHTS, TimmBase
from timm_lt.heads import fold_head, get_heads, head_option_names
from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import write_atomic


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
