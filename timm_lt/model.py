"""Models with a chosen head: any timm architecture, a registered one, or a decoupled checkpoint."""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs
from torch import nn

from timm_lt.checkpoint import WEIGHTS, load_model_head, read_checkpoint
from timm_lt.heads import HEADS, head_option_names, set_absent_head, set_head
from timm_lt.registry import UsageError, unknown_name

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
        UsageError: For an unknown architecture or head, a wrong option, or a checkpoint that is not
            whole.

    >>> create_model("test_resnet", num_classes=3, head="cosine").get_classifier()
    CosineHead(in_features=96, out_features=3, bias=True, scale=16.0, learn_scale=False)
    """
    if name.startswith(LOCAL_DIR):
        return _create_from_folder(name, pretrained is not False, head, options)
    pretrained = bool(pretrained)
    architecture = name.partition(".")[0]
    _check_architecture(name)
    with _named_options(name, head):
        if head is None:
            return timm.create_model(name, pretrained=pretrained, **options)
        if timm.models.is_model(architecture):
            entrypoint = timm.models.model_entrypoint(architecture)
            if entrypoint.__module__.startswith("timm_lt."):
                return timm.create_model(name, pretrained=pretrained, head=head, **options)
        ours, theirs = split_options(head, options)
        model = timm.create_model(name, pretrained=pretrained, **theirs)
        headless = theirs.get("num_classes") == 0 and hasattr(model, "get_classifier")
        absent = theirs.get("features_only") or headless
        return (set_absent_head if absent else set_head)(model, head, **ours)


@contextmanager
def _named_options(name: str, head: str | None) -> Iterator[None]:
    # timm hands an option that it does not know to the architecture, whose error names neither.
    try:
        yield
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None:
            raise
        hint = "is head= missing?"
        if head is not None and head in HEADS:
            hint = f"options of head {head!r}: {', '.join(head_option_names(head)) or 'none'}"
        raise UsageError(f"{name} has no option {found[1]!r}; {hint}") from error


def _check_architecture(name: str) -> None:
    """Raises UsageError for an architecture or a tag that timm does not know."""
    if ":" in name:
        return
    architecture, _, tag = name.partition(".")
    if not timm.models.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        hint = f"; close to it are {', '.join(close)}" if close else ""
        if Path(name).is_dir():
            hint = f"; the checkpoint in that folder is {LOCAL_DIR}{name}"
        raise UsageError(f"unknown architecture {architecture!r}{hint}; timm.list_models() has all")
    tags = [key.partition(".")[2] for key in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise unknown_name(f"tag of {architecture!r}:", tag, [key for key in tags if key])


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
    if pretrained and not (folder / WEIGHTS).is_file():
        raise UsageError(f"{folder / WEIGHTS} does not exist")
    if head is None:
        return _create_joint(name, pretrained, None, options)
    if not pretrained:
        raise UsageError(f"head {head!r} of {folder} needs its backbone; leave pretrained as it is")
    kind = info.heads[head].kind if head in info.heads else head
    ours, theirs = split_options(kind, options)
    classes = theirs.get("num_classes", info.num_classes)
    if classes != info.num_classes:
        raise UsageError(
            f"head {head!r} of {folder} has {info.num_classes} classes, not {classes}: "
            "create the model without head=, train it, and fit the head again"
        )
    model = _create_joint(name, True, head, theirs)
    return load_model_head(folder, model, head, **ours)


def _create_joint(
    name: str, pretrained: bool, head: str | None, options: dict[str, Any]
) -> nn.Module:
    with _named_options(name, head):
        try:
            return timm.create_model(name, pretrained=pretrained, **options)
        except TypeError as error:
            if "unexpected keyword argument" in str(error):
                raise
            raise _unloadable(name, error) from error
        except UsageError:
            raise
        except Exception as error:
            # The configuration in the folder may hold anything, and timm does not check it.
            raise _unloadable(name, error) from error


def _unloadable(name: str, error: Exception) -> UsageError:
    reason = " ".join(str(error).split())[:300]
    folder = name.removeprefix(LOCAL_DIR)
    return UsageError(f"the checkpoint {folder} cannot be loaded: {type(error).__name__}: {reason}")
