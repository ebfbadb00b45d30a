"""Converting: weights of other projects as a decoupled checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_lt.checkpoint import is_statistic, save_checkpoint
from timm_lt.heads import HEADS, Head, classifier_name, get_head
from timm_lt.models.lt_resnet import ARCHITECTURES, expected_state
from timm_lt.models.pretrained import batch_norm_statistics, read_url
from timm_lt.models.published import PUBLISHED
from timm_lt.models.third_party import Weights, WeightsFile, check_weights, read_weights
from timm_lt.models.weights_file import build
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import ClassCounts


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        name: The model that the weights were taken for.
        num_classes: Number of classes C.
        heads: Heads of the checkpoint, of which ``linear`` is the joint classifier.
        found: How the name was found: "given", "published", "in the file" or "by shape".
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
        source: A published name (``lt_resnext50.imagenet_lt``: with all of its heads), a URL, or a
            file, as for :func:`timm_lt.models.third_party.read_weights`.
        folder: Where to write; made if missing.
        model: The architecture, with a tag for its normalisation; None finds it: a published URL
            says it, and so do files of timm's ``train.py``; the registered ones are known by the
            shapes of their tensors.
        heads: Further files with the same backbone and another classifier, URL or path by the name
            that the head gets: a re-trained classifier (``crt``) or learned scales (``lws``), with
            the batch-norm statistics of that file if they are others.
        class_counts: Training images per class, (C,); None if they are not known.
        cache_dir: Where downloads are kept; None is timm's cache.
        key: The key or prefix of the weights, where the source has several networks.
        image_size: Side of the images in pixels; None is that of the file, or the model's.
        options: Arguments of ``timm.create_model``, such as ``global_pool``, and the mean, std,
            interpolation, crop_pct and crop_mode of the images. What is not given is as the file
            says, if it has its training's arguments.

    Raises:
        UsageError: If a file cannot be read, is of another architecture or another number of
            classes, or a head's file has another backbone; nothing is written then.
    """
    if not source:
        raise UsageError("the source is empty: give a published name, a URL, or a file")
    published = PUBLISHED.get(source)
    if published is not None:
        if not published.urls:
            where = published.folder or "no weights are published under it"
            raise UsageError(f"{source} has no files to convert: {where}")
        model = model or source
        others = {name: url for name, url in published.urls.items() if name != "linear"}
        source, heads = published.urls["linear"], {**others, **(heads or {})}
    _check_is_joint(source)

    def check_published(file: WeightsFile) -> None:
        if model in PUBLISHED:
            expected = expected_state(model, PUBLISHED[model].num_classes)
            check_weights(file.select(expected, model, key=key), expected, model)

    file = _read(source, cache_dir, check_published)
    name, found = (model, "given") if model else _find_name(source, file)
    published = PUBLISHED.get(name)
    network, weights = build(
        file,
        name,
        num_classes=None if published is None else published.num_classes,
        key=key,
        image_size=image_size,
        **(options or {}),
    )
    joint, path, expected = get_head(network), classifier_name(network), network.state_dict()
    fitted: dict[str, Head] = {"linear": HEADS["linear"].from_classifier(joint)}
    if weights.scale is not None:
        fitted["lws"] = _scaled(joint, weights.scale)
    for head, place in (heads or {}).items():

        def check(other: WeightsFile) -> Weights:
            return check_weights(other.select(expected, name, path), expected, name, path)

        fitted[head] = _other_head(
            head, place, check(_read(place, cache_dir, check)), weights, network
        )
    save_checkpoint(folder, network, heads=fitted, class_counts=class_counts)
    return Conversion(name, joint.out_features, list(fitted), found)


def _check_is_joint(source: str) -> None:
    """Refuses a published file whose classifier is not the joint one of its backbone."""
    for entry in PUBLISHED.values():
        if source == entry.urls.get("crt"):
            raise UsageError(
                f"{source} is the crt head of {entry.name}: convert {entry.name}, which has it "
                "beside the joint classifier"
            )


def _read(
    place: str, cache_dir: str | Path | None, check: Callable[[WeightsFile], object]
) -> WeightsFile:
    """Reads a file or URL; a download that fails the check is not kept in the cache."""

    def read(path: Path) -> WeightsFile:
        file = read_weights(path, place)
        check(file)
        return file

    return read_url(place, read, cache_dir) if "://" in place else read(Path(place))


def _find_name(source: str, file: WeightsFile) -> tuple[str, str]:
    """Finds the architecture of weights, and the tag with their number of classes."""
    for entry in PUBLISHED.values():
        if source in entry.urls.values():
            return entry.name, "published"
    if file.architecture is not None:
        return file.architecture, "in the file"
    for architecture in ARCHITECTURES:
        classes = _classes_if(file, architecture)
        if classes is not None:
            tags = [
                entry.name
                for entry in PUBLISHED.values()
                if (entry.architecture, entry.num_classes) == (architecture, classes)
            ]
            return next(iter(tags), architecture), "by shape"
    raise UsageError(
        f"{source} has the tensors of none of {', '.join(ARCHITECTURES)}: say which model it is "
        "with --model, e.g. --model convnext_tiny"
    )


def _classes_if(file: WeightsFile, architecture: str) -> int | None:
    """Returns the number of classes of weights; None if they are not of this architecture."""
    try:
        state = file.select(expected_state(architecture, 1), architecture)
        classes = state.num_classes("fc")
        if classes:
            check_weights(state, expected_state(architecture, classes), architecture)
    except UsageError:
        return None
    return classes or None


def _other_head(
    head: str, place: str, other: Weights, weights: Weights, network: nn.Module
) -> Head:
    """Makes a head of a file whose backbone must be that of the checkpoint."""
    joint, path = get_head(network), classifier_name(network)
    own = () if other.scale is not None else (f"{path}.weight", f"{path}.bias")
    for key, value in weights.tensors.items():
        if not is_statistic(key) and key not in own and not torch.equal(value, other.tensors[key]):
            raise UsageError(
                f"head {head!r} of {place} has another {key} than the checkpoint: it is another "
                "model, convert it on its own"
            )
    if other.scale is not None:
        new: Head = _scaled(joint, other.scale)
    else:
        new = HEADS["crt"].from_classifier(joint)
        parts = {
            key.removeprefix(f"{path}."): other.tensors[key] for key in own if key in other.tensors
        }
        new.load_state_dict({**parts, "weight": parts["weight"].flatten(1)})
    moved = batch_norm_statistics(other.tensors)
    if any(not torch.equal(value, weights.tensors[key]) for key, value in moved.items()):
        new.backbone_statistics = moved
    if head in HEADS and head != new.kind:
        raise UsageError(
            f"{place} holds a {new.kind} head, which cannot be called {head!r}: give it that name "
            "or one of your own"
        )
    return new


def _scaled(joint: nn.Linear, scale: Tensor) -> Head:
    head = HEADS["lws"].from_classifier(joint)
    head.load_state_dict({**head.state_dict(), "scale": scale})
    return head
