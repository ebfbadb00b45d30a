"""Conversion of weights of other projects to a decoupled checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from timm_lt.checkpoint import is_statistic, save_checkpoint
from timm_lt.heads import HEADS, Head, classifier_name, get_head
from timm_lt.models.lt_resnet import ARCHITECTURES, expected_state
from timm_lt.models.pretrained import PUBLISHED, batch_norm_statistics, read_url, set_scale
from timm_lt.models.weights_file import Weights, WeightsFile, build, read_weights
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import ClassCounts

T = TypeVar("T")


@dataclass(frozen=True)
class Conversion:
    """Description of a converted checkpoint.

    Attributes:
        name: Name of the model.
        num_classes: Number of classes C.
        heads: Heads of the checkpoint; ``linear`` is the joint classifier.
        found: Origin of the name: "given", "in the file" or "by shape".
    """

    name: str
    num_classes: int
    heads: list[str]
    found: str


def convert_checkpoint(
    source: str,
    folder: str | Path,
    *,
    model: str | None = None,
    heads: Mapping[str, str] | None = None,
    class_counts: ClassCounts | None = None,
    cache_dir: str | Path | None = None,
    key: str | None = None,
    image_size: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Conversion:
    """Writes the weights of another project as a decoupled checkpoint.

    Args:
        source: A published name (``lt_resnext50.imagenet_lt``, with all of its heads), a URL, or a
            file: a checkpoint of timm's ``train.py``, or any pickle or safetensors with tensors by
            name.
        folder: The folder to write; made if missing.
        model: The architecture, with a tag for its normalisation. None finds it: files of timm's
            ``train.py`` name it, and registered ones are recognised by the shapes of their tensors.
        heads: URL or path of further files by the name of their head. Each has the same backbone
            and a re-trained classifier (``crt``) or learned scales (``lws``). Other batch-norm
            statistics in that file become part of the head.
        class_counts: Training images per class, (C,); None if unknown.
        cache_dir: Folder of downloads; None is timm's cache.
        key: Key or prefix of the weights, if the source has several networks.
        image_size: Side of the images in pixels; None is that of the file, or of the model.
        options: Arguments of ``timm.create_model``, such as ``global_pool``, and mean, std,
            interpolation, crop_pct and crop_mode of the images. The defaults are those of the
            training, if the file has its arguments.

    Raises:
        UsageError: If a file cannot be read, is of another architecture or another number of
            classes, or the file of a head has another backbone; nothing is written then.
    """
    for entry in PUBLISHED.values():
        if source == entry.urls.get("crt"):
            raise UsageError(
                f"{source} is the crt head of {entry.name}; convert {entry.name}, which includes it"
            )
    if source in PUBLISHED:
        urls = PUBLISHED[source].urls
        if not urls:
            raise UsageError(f"{source!r} has no files to convert")
        model, source, heads = model or source, urls.pop("linear"), {**urls, **(heads or {})}
    file = _fetch(source, cache_dir, lambda path: read_weights(path, source))
    name, found = (model, "given") if model is not None else _name_of_file(file)
    classes = PUBLISHED[name].num_classes if name in PUBLISHED else None
    network, weights = build(
        file, name, num_classes=classes, key=key, image_size=image_size, **(options or {})
    )
    joint = get_head(network)
    fitted: dict[str, Head] = {"linear": HEADS["linear"].from_classifier(joint)}
    if weights.scale is not None:
        fitted["lws"] = set_scale(HEADS["lws"].from_classifier(joint), weights.scale)
    path, expected = classifier_name(network), network.state_dict()
    for head, location in (heads or {}).items():

        def read_head(file: Path, location: str = location) -> Weights:
            state = read_weights(file, location).select(expected, name, path)
            return state.fit(expected, name, path)

        other = _fetch(location, cache_dir, read_head)
        fitted[head] = _other_head(f"head {head!r} of {location}", weights, other, network)
    save_checkpoint(folder, network, heads=fitted, class_counts=class_counts)
    return Conversion(name, joint.out_features, list(fitted), found)


def _fetch(location: str, cache_dir: str | Path | None, read: Callable[[Path], T]) -> T:
    """Reads a file or URL; a download that cannot be read is not kept in the cache."""
    return read_url(location, read, cache_dir) if "://" in location else read(Path(location))


def _name_of_file(file: WeightsFile) -> tuple[str, str]:
    """Returns the architecture of weights, with the tag for their number of classes."""
    if file.architecture is not None:
        return file.architecture, "in the file"
    for architecture in ARCHITECTURES:
        try:
            state = file.select(expected_state(architecture, 1), architecture)
            classes = state.num_classes("fc") or 1
            state.fit(expected_state(architecture, classes), architecture)
        except UsageError:
            continue
        for entry in PUBLISHED.values():
            if (entry.architecture, entry.num_classes) == (architecture, classes):
                return entry.name, "by shape"
        return architecture, "by shape"
    raise UsageError(
        f"{file.name} has the tensors of none of {', '.join(ARCHITECTURES)}; name its architecture "
        "with --model, e.g. --model convnext_tiny"
    )


def _other_head(what: str, weights: Weights, other: Weights, network: nn.Module) -> Head:
    """Makes a head from weights whose backbone must be that of the checkpoint."""
    joint, path = get_head(network), classifier_name(network)
    own = () if other.scale is not None else (f"{path}.weight", f"{path}.bias")
    for key, value in weights.tensors.items():
        if not is_statistic(key) and key not in own and not torch.equal(value, other.tensors[key]):
            raise UsageError(f"{what} has another {key} than the checkpoint; convert it on its own")
    if other.scale is not None:
        new: Head = set_scale(HEADS["lws"].from_classifier(joint), other.scale)
    else:
        new = HEADS["crt"].from_classifier(joint)
        with torch.no_grad():
            for part, key in zip((new.weight, new.bias), own, strict=True):
                if key in other.tensors:
                    part.copy_(other.tensors[key].view_as(part))
    moved = batch_norm_statistics(other.tensors)
    if any(not torch.equal(value, weights.tensors[key]) for key, value in moved.items()):
        new.backbone_statistics = moved
    return new
