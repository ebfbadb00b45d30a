"""Models with a chosen head: any timm architecture, a registered one, or a decoupled checkpoint."""

from pathlib import Path
from typing import Any

import timm
from torch import nn

from timm_lt.checkpoint import load_model_head, read_checkpoint
from timm_lt.heads import head_option_names, set_head
from timm_lt.registry import UsageError

LOCAL_DIR = "local-dir:"


def create_model(
    name: str, pretrained: bool | None = None, *, head: str | None = None, **options: Any
) -> nn.Module:
    """Creates a timm model with a head.

    Args:
        name: Any timm architecture, a registered ``lt_*`` one, or ``"local-dir:FOLDER"`` with a
            decoupled checkpoint.
        pretrained: Load weights; None means yes for a checkpoint folder and no otherwise.
        head: One of :func:`timm_lt.list_heads`, or the name of a head of the checkpoint; None
            leaves the joint classifier.
        **options: Options of the head (they take the place of stored ones), and anything that
            ``timm.create_model`` takes.

    Returns:
        The model, in training mode as timm's.

    Raises:
        UsageError: For an unknown head, a wrong option, or a checkpoint that is not whole.

    >>> create_model("test_resnet", num_classes=3, head="cosine").get_classifier()
    CosineHead(in_features=96, out_features=3, bias=True, scale=16.0, learn_scale=False)
    """
    if name.startswith(LOCAL_DIR):
        return _create_from_folder(name, pretrained is not False, head, options)
    pretrained = bool(pretrained)
    if head is None:
        return timm.create_model(name, pretrained=pretrained, **options)
    if timm.models.is_model(name.partition(".")[0]):
        entrypoint = timm.models.model_entrypoint(name.partition(".")[0])
        if entrypoint.__module__.startswith("timm_lt."):
            return timm.create_model(name, pretrained=pretrained, head=head, **options)
    ours, theirs = split_options(head, options)
    return set_head(timm.create_model(name, pretrained=pretrained, **theirs), head, **ours)


def split_options(
    head: str | None, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits keyword arguments into those of the head and the others."""
    names = head_option_names(head) if head else []
    ours = {key: value for key, value in options.items() if key in names}
    return ours, {key: value for key, value in options.items() if key not in names}


def _create_from_folder(
    name: str, pretrained: bool, head: str | None, options: dict[str, Any]
) -> nn.Module:
    folder = Path(name.removeprefix(LOCAL_DIR))
    info = read_checkpoint(folder)
    if head is None:
        return timm.create_model(name, pretrained=pretrained, **options)
    if not pretrained:
        raise UsageError(f"head {head!r} of {folder} needs its backbone; leave pretrained as it is")
    kind = info.heads[head].kind if head in info.heads else head
    ours, theirs = split_options(kind, options)
    model = timm.create_model(name, pretrained=True, **theirs)
    return load_model_head(folder, model, head, **ours)
