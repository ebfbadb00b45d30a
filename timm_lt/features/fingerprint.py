"""The key of a feature cache: a digest of all that decides the bits of the features, but rounding.

Not part of it: how many images a batch has, how many processes and workers there are, and where the
cache lies.
"""

from typing import Any

from timm.data.loader import PrefetchLoader, fast_collate
from torch import nn
from torch.utils.data import DataLoader, default_collate

from timm_lt.data.described import described, plain_options, qualified_name, tensor_fingerprint
from timm_lt.data.fingerprint import dataset_fingerprint, digest
from timm_lt.data.images import as_it_is
from timm_lt.data.stored import collate
from timm_lt.features.order import layers_of, num_images
from timm_lt.utils.checks import UsageError

# Functions that make a batch of the samples as they are.
COLLATING = (default_collate, fast_collate, collate, as_it_is)


def backbone_fingerprint(model: nn.Module, classifier: str) -> str:
    """Returns a digest of a model without its classifier: weights, buffers, and what its parts are.

    Args:
        model: The model.
        classifier: Path of the classifier; it may be any, fitted or not.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    state = {
        name: tensor_fingerprint(tensor)
        for name, tensor in tensors
        if not _within(name, classifier)
    }
    # Strides, the kind of pooling and the like are in no tensor.
    parts = {
        name: [qualified_name(type(part)), part.extra_repr(), plain_options(part)]
        for name, part in model.named_modules()
        if not _within(name, classifier)
    }
    return digest(state, parts)


def _within(name: str, classifier: str) -> bool:
    return name == classifier or name.startswith(f"{classifier}.")


def samples_fingerprint(loader: object) -> str:
    """Returns a digest of what a loader shows: the samples in their order, and their transform.

    Raises:
        UsageError: If it is not known, see
            :func:`~timm_lt.data.fingerprint.dataset_fingerprint`, or the loader has a
            ``collate_fn`` of its own.
    """
    data = getattr(loader, "dataset", None)
    if data is None:
        raise UsageError(
            f"what a {type(loader).__name__} shows is not known: pass key= with a word that stands "
            "for its samples and their transform"
        )
    inner = layers_of(loader)[-1]
    if isinstance(inner, DataLoader) and inner.collate_fn not in COLLATING:
        raise UsageError(
            f"what collate_fn={inner.collate_fn!r} does to the images is not known: leave it out, "
            "or pass key= with a word that stands for the samples and what is done to them"
        )
    return digest(dataset_fingerprint(data), num_images(loader), _normalization(loader))


def _normalization(loader: object) -> list[Any]:
    """Returns what timm's prefetcher does to the images beside their transform."""
    found = [part for part in layers_of(loader) if isinstance(part, PrefetchLoader)]
    if not found:
        return []
    inner = found[0]
    erasing = {} if inner.random_erasing is None else vars(inner.random_erasing)
    shown = {name: value for name, value in erasing.items() if name != "device"}
    return [inner.mean.tolist(), inner.std.tolist(), str(inner.img_dtype), described(shown)]
