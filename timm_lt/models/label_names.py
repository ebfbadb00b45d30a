"""Class names of a model, and whether they are those of the data."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm.data
from torch import nn

from timm_lt.utils.console import log

WORDNET = re.compile(r"n\d{8}")
# Share of class names that must be those of ImageNet; lists differ in the spelling of a few.
SHARE = 0.9


def label_names(model: nn.Module) -> list[str] | None:
    """Returns the class names of a model: its own, or those of ImageNet; None if unknown."""
    if _config(model).get("label_names"):
        return own_names(model)
    imagenet = _imagenet(model)
    return None if imagenet is None else imagenet.label_descriptions()


def own_names(model: nn.Module) -> list[str] | None:
    """Returns the class names in a model's configuration, a list or a mapping by label, or None."""
    names = _config(model).get("label_names") or ()
    if isinstance(names, Mapping):
        # Labels are strings in JSON.
        by_label = {str(label): name for label, name in names.items()}
        names = [by_label[label] for label in map(str, range(len(names))) if label in by_label]
    if not names or len(names) != getattr(model, "num_classes", None):
        return None
    return [str(name) for name in names]


def is_for(model: nn.Module, names: Sequence[str] | None) -> bool | None:
    """Returns whether a model's classes have these names, in any order; None if unknown.

    Names of ImageNet's classes are WordNet ids, or one or all words of their synset. The numbers 0
    to C - 1 are not names.

    """
    own = label_names(model)
    if own is None or not names or [*names] == [str(label) for label in range(len(names))]:
        return None
    if sorted(own) == sorted(names):
        return True
    imagenet = _imagenet(model)
    if imagenet is None:
        return False
    same = 0
    for synset, text, name in zip(imagenet.label_names(), own, names, strict=False):
        words = {_plain(text), *map(_plain, text.split(","))}
        same += name == synset or _plain(name) in words
    return same >= SHARE * len(names)


def keeps_classifier(model: nn.Module, names: Sequence[str] | None, what: str, cure: str) -> bool:
    """Returns whether to keep the classifier of a model with as many classes as the data.

    If that is unclear, the log says so, with ``what`` as the name of the model and ``cure`` as the
    option that fits another classifier.
    """
    known = is_for(model, names)
    if known is None:
        # With the number of classes of an ImageNet, it may be that of ImageNet.
        doubtful = names and timm.data.infer_imagenet_subset(model)
        log.log(
            logging.WARNING if doubtful else logging.INFO,
            "%s has no names for its %d classes; its classifier is assumed to be for the classes "
            "of the data (%s fits another)",
            *(what, getattr(model, "num_classes", None), cure),
        )
    return known is not False


def shown_as(model: nn.Module, names: Sequence[str]) -> list[str] | None:
    """Returns the class names of a model, as WordNet ids if the given names are such."""
    imagenet = _imagenet(model)
    if imagenet is not None and any(WORDNET.fullmatch(name) for name in names):
        return list(imagenet.label_names())
    return label_names(model)


def _imagenet(model: nn.Module) -> Any:  # noqa: ANN401
    """Returns timm's class names of an ImageNet if the model has timm's weights for it, or None.

    A folder or a repo of others may have any weights together with timm's tag.
    """
    config = _config(model)
    repo, source = config.get("hf_hub_id") or "", config.get("source")
    timms = not source or (source == "hf-hub" and repo.startswith("timm/"))
    trusted = timms and config.get("tag") and not config.get("label_names")
    subset = timm.data.infer_imagenet_subset(model)
    if (
        not trusted
        or subset is None
        or config.get("num_classes") != getattr(model, "num_classes", None)
    ):
        return None
    return timm.data.ImageNetInfo(subset)


def _config(model: nn.Module) -> dict[str, Any]:
    return getattr(model, "pretrained_cfg", None) or {}


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[\W_]+", " ", name.casefold()).split())
