"""The classes that a model's classifier is for, by name."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm.data
from torch import nn

from timm_lt.utils.console import log

WORDNET = re.compile(r"n\d{8}")
# Share of classes whose names must be those of ImageNet: lists spell a few in different ways.
SHARE = 0.9


def label_names(model: nn.Module) -> list[str] | None:
    """Returns the names of a model's classes: its own, or those of ImageNet; None if unknown."""
    if _config(model).get("label_names"):
        return own_names(model)
    imagenet = _imagenet(model)
    return None if imagenet is None else imagenet.label_descriptions()


def own_names(model: nn.Module) -> list[str] | None:
    """Returns the class names in a model's configuration; None if it has none for each class.

    timm takes a list there, or names by label.
    """
    names = _config(model).get("label_names") or ()
    if isinstance(names, Mapping):
        # The keys are texts in JSON.
        by_label = {str(label): name for label, name in names.items()}
        names = [by_label[label] for label in map(str, range(len(names))) if label in by_label]
    if not names or len(names) != _num_classes(model):
        return None
    return [str(name) for name in names]


def is_for(model: nn.Module, names: Sequence[str] | None) -> bool | None:
    """Returns whether a model's classes have these names; None if it is unknown.

    The model's own names may come in another order. Names of ImageNet's classes are WordNet ids, or
    one of the words or all of them. Numbers in their order are not names.

    Args:
        model: A model for as many classes.
        names: Names of the classes, (C,), if known.
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
    """Returns whether a classifier is for classes, as many as it has, and says so if unknown.

    Args:
        model: The model.
        names: Names of the classes, (C,), if known.
        what: What the model is called in the log.
        cure: What to give for another classifier.
    """
    known = is_for(model, names)
    if known is None:
        # Of as many classes as an ImageNet, it may be ImageNet's.
        doubtful = names and timm.data.infer_imagenet_subset(model)
        log.log(
            logging.WARNING if doubtful else logging.INFO,
            "%s has no names for its %d classes: its classifier is taken to be for those of the "
            "data; %s fits another",
            *(what, _num_classes(model), cure),
        )
    return known is not False


def shown_as(model: nn.Module, names: Sequence[str]) -> list[str] | None:
    """Returns the names of a model's classes, WordNet ids if the given names are such."""
    imagenet = _imagenet(model)
    if imagenet is not None and any(WORDNET.fullmatch(name) for name in names):
        return list(imagenet.label_names())
    return label_names(model)


def _imagenet(model: nn.Module) -> Any:  # noqa: ANN401
    """Returns timm's names of an ImageNet, if the model's weights are timm's own for it.

    A folder or another repo may have any weights, and has the tag of timm's own nevertheless.
    """
    config = _config(model)
    repo, source = config.get("hf_hub_id") or "", config.get("source")
    timms = not source or (source == "hf-hub" and repo.startswith("timm/"))
    trusted = timms and config.get("tag") and not config.get("label_names")
    subset = timm.data.infer_imagenet_subset(model)
    if not trusted or subset is None or config.get("num_classes") != _num_classes(model):
        return None
    return timm.data.ImageNetInfo(subset)


def _config(model: nn.Module) -> dict[str, Any]:
    return getattr(model, "pretrained_cfg", None) or {}


def _num_classes(model: nn.Module) -> int | None:
    return getattr(model, "num_classes", None)


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[\W_]+", " ", name.casefold()).split())
