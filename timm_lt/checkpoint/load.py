"""Loading from a checkpoint folder: its heads, and its weights after a check of their sizes."""

import itertools
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from timm_lt.checkpoint.format import (
    CONFIG,
    STATISTICS,
    WEIGHTS,
    CheckpointInfo,
    HeadEntry,
    is_statistic,
    read_checkpoint,
)
from timm_lt.heads import HEADS, Head, as_joint, get_heads, head_option_names
from timm_lt.utils.checks import UsageError, unknown_name, user_errors
from timm_lt.utils.files import file_sha256
from timm_lt.utils.longtail import check_class_counts

Shapes = dict[str, tuple[int, ...]]
# Largest integer that is accepted as an argument whatever the weights: a width, say.
ORDINARY = 2**16
# Most parameters and elements of a model that is built without weights.
MOST_PARAMETERS, MOST_ELEMENTS = 20_000, 2**30
# Elements that a model may have beyond its weights, for buffers that are not stored.
FREE_ELEMENTS = 2**24
# Elements that timm's adaptation may add to the weights of another project.
FREE_ADAPTED = 10**6


def load_head(folder: str | Path, name: str, classifier: nn.Module, **options: Any) -> Head:
    """Loads a head of a checkpoint whose model has one classifier.

    Args:
        folder: Folder of the checkpoint.
        name: Name of the head in the checkpoint; every checkpoint has the heads that need nothing
            but the joint classifier (``linear``, ``tau_norm``, ``logit_adjusted``).
        classifier: The joint classifier (C, D) of the checkpoint, as returned by
            ``model.get_classifier()``, or a head that keeps its weight.
        **options: Options of the head; the stored ones are the defaults.

    Returns:
        The head. Batch-norm statistics in its file become its ``backbone_statistics``, which
        :func:`timm_lt.set_head` copies into the model.

    Raises:
        UsageError: If there is no such head, an option is wrong or fixed by the fit, or the file of
            the head is missing, altered, or has other shapes; nothing is loaded then.
    """
    return _load_heads(read_checkpoint(folder), name, {"": as_joint(classifier)}, options)[""]


def load_heads(folder: str | Path, name: str, model: nn.Module, **options: Any) -> dict[str, Head]:
    """Loads a head for each joint classifier of a model, by path; the model is unchanged."""
    return _load_heads(read_checkpoint(folder), name, get_heads(model), options)


def find_entry(info: CheckpointInfo | None, name: str, source: str) -> HeadEntry:
    """Returns the entry of a head; every checkpoint has the heads without own tensors.

    A plain timm checkpoint has no ``info``; ``source`` is the name of the checkpoint in messages.
    """
    heads = {} if info is None else info.heads
    if name in heads:
        return heads[name]
    free = [key for key in HEADS if not HEADS[key].own_state and key not in heads]
    if name not in free:
        raise unknown_name(f"head of {source}:", name, [*heads, *free])
    return HeadEntry(name, name, {}, None, None, False, {}, {})


def from_joint(
    cls: type[Head], joint: nn.Linear, options: dict[str, Any], counts: list[int] | None
) -> Head:
    """Makes a head from the joint classifier (C, D), its options and the class counts (C,)."""
    if "class_counts" in head_option_names(cls.kind):
        options = {"class_counts": counts, **options}
    return cls.from_classifier(joint, **options)


def own_tensors(heads: Mapping[str, Head]) -> dict[str, Tensor]:
    """Returns the tensors that the file of a head has, for one head per classifier, by path."""
    return {
        f"{path}.{key}" if len(heads) > 1 else key: getattr(head, key)
        for path, head in heads.items()
        for key in head.own_state
        if getattr(head, key) is not None
    }


def _load_heads(
    info: CheckpointInfo, name: str, classifiers: dict[str, nn.Linear], options: dict[str, Any]
) -> dict[str, Head]:
    entry = find_entry(info, name, str(info.folder))
    cls, heads = HEADS[entry.kind], {}
    if options.get("class_counts") is not None:
        counts = check_class_counts(options["class_counts"], info.num_classes, info.label_names)
        options = {**options, "class_counts": counts}
    for path, joint in classifiers.items():
        is_replaced = isinstance(joint, Head) and (
            "weight" in joint.own_state or joint.backbone_statistics is not None
        )
        if is_replaced or joint.out_features != info.num_classes:
            raise UsageError(
                f"head {name!r} of {info.folder} starts from the joint classifier of "
                f"{info.num_classes} classes, but the model has {joint}; create the model again"
            )
        stored = from_joint(cls, joint, entry.options, info.class_counts).options()
        for key in cls.fixed_options:
            if options.get(key, stored[key]) != stored[key]:
                raise UsageError(
                    f"head {name!r} was fitted with {key}={stored[key]!r}, which cannot change "
                    "afterwards; fit it again with timm_lt.fit_head"
                )
        head = from_joint(cls, joint, {**entry.options, **options}, info.class_counts)
        # The recorded selection does not apply to a value that the caller chose.
        head.selection = dict(entry.selection) if head.options() == stored else {}
        heads[path] = head
    if entry.file is not None:
        _load_tensors(heads, entry, info.folder / entry.file)
    for head in heads.values():
        head.check_fitted()
    return heads


def _load_tensors(heads: dict[str, Head], entry: HeadEntry, path: Path) -> None:
    with open_weights(path, entry.sha256) as file:
        # Copies: the file may be replaced while the heads are in use.
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    statistics = {
        key.removeprefix(STATISTICS): tensors.pop(key)
        for key in list(tensors)
        if entry.backbone_statistics and key.startswith(STATISTICS) and is_statistic(key)
    }
    own = own_tensors(heads)
    wanted, found = ({k: tuple(v.shape) for k, v in part.items()} for part in (own, tensors))
    if wanted != found or bool(statistics) != entry.backbone_statistics:
        more = " and batch-norm statistics" if entry.backbone_statistics else ""
        raise UsageError(
            f"head file {path} has {found} and {len(statistics)} batch-norm statistics; a "
            f"{entry.kind!r} head here needs {wanted}{more}"
        )
    for name, value in {**tensors, **statistics}.items():
        # All NaN means not fitted, which the head itself refuses.
        if not value.isfinite().all() and not value.isnan().all():
            raise UsageError(f"{name} in head file {path} has values that are not finite")
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(tensors[name])
    for head in heads.values():
        head.backbone_statistics = statistics or None


@contextmanager
def open_weights(path: Path, digest: str | None) -> Iterator[Any]:
    """Opens a safetensors file of a checkpoint, whose SHA-256 is ``digest`` unless None."""
    with user_errors(f"{path} is not a readable safetensors file", SafetensorError, OSError):
        if digest is not None and file_sha256(path) != digest:
            raise UsageError(f"{path} is not the file that {CONFIG} describes (SHA-256 differs)")
        with safetensors.safe_open(path, "pt") as file:
            yield file


def read_shapes(folder: Path, info: CheckpointInfo | None) -> Shapes:
    """Returns the shape of each tensor in the weights of a checkpoint; ``info`` has the digest."""
    with open_weights(folder / WEIGHTS, info.weights_sha256 if info else None) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def check_build(
    folder: Path, config: dict[str, Any], info: CheckpointInfo | None, *, pretrained: bool
) -> None:
    """Checks that the model of a config is that of the weights, before memory is taken for it.

    timm adapts the weights of a plain timm checkpoint, which has no ``info``. Without
    ``pretrained``, only the size of the model is checked.
    """
    shapes = read_shapes(folder, info) if pretrained else {}
    check_sizes(folder / CONFIG, config, shapes)
    model = _build_on_meta(folder, config["architecture"], shapes)
    if model is None:
        return
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    stored, needed = (sum(map(math.prod, part.values())) for part in (shapes, wanted))
    # Buffers that are not stored count, too.
    elements = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    limit = 5 * stored + FREE_ELEMENTS if pretrained else MOST_ELEMENTS
    other = [key for key in {**wanted, **shapes} if wanted.get(key) != shapes.get(key)]
    problem = None
    if elements > limit:
        problem = f"has {elements:,} numbers, more than the {limit:,} that are accepted for it"
    elif pretrained and info is None and needed > 2 * stored + FREE_ADAPTED:
        problem = f"has {needed:,} numbers, {WEIGHTS} {stored:,}"
    elif pretrained and info is not None and other:
        here, there = (part.get(other[0], "nothing") for part in (wanted, shapes))
        problem = f"has {here} for {other[0]}, {WEIGHTS} {there}"
    if problem is not None:
        raise UsageError(f"the model of {folder / CONFIG} {problem}")


def check_sizes(path: Path, config: dict[str, Any], shapes: Shapes) -> None:
    """Refuses a config with numbers far beyond the sizes in its weights."""
    # A tensor without elements costs nothing, whatever its other sizes are.
    sizes = [size for shape in shapes.values() if 0 not in shape for size in shape]
    limit = max([ORDINARY, *sizes])
    for key in ("model_args", "pretrained_cfg"):
        with user_errors(f"{path}: {key} is nested too deeply", RecursionError):
            for name, size in _integers(config.get(key, {}), key):
                if abs(size) > limit:
                    raise UsageError(f"{path}: {name} is {size}, far beyond the sizes in {WEIGHTS}")


def _integers(value: object, name: str) -> Iterator[tuple[str, int]]:
    """Yields the integers in nested objects by path; those of a list, layers say, as their sum."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _integers(part, f"{name}.{key}")
    elif isinstance(value, list):
        inside = [pair for part in value for pair in _integers(part, name)]
        yield name, sum(abs(size) for _, size in inside)
        yield from inside
    elif type(value) is int:
        yield name, value


def _build_on_meta(folder: Path, architecture: str, shapes: Shapes) -> nn.Module | None:
    """Builds a model without memory; returns None for an architecture of the user that cannot."""
    builder, count = threading.get_ident(), itertools.count(1)
    limit = 2 * len(shapes) + 1000 if shapes else MOST_PARAMETERS

    def count_parameter(*_: object) -> None:
        if threading.get_ident() == builder and next(count) > limit:
            raise UsageError(f"the model of {folder / CONFIG} has far more layers than {WEIGHTS}")

    handle = register_module_parameter_registration_hook(count_parameter)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=False)
            return model
    except UsageError:
        raise
    except Exception as error:
        if timm.models.is_model(architecture):
            module = timm.models.model_entrypoint(architecture).__module__
            if not module.startswith(("timm.", "timm_lt.")):
                # Its constructor may read values of its tensors.
                return None
        raise load_error(folder, error) from error
    finally:
        handle.remove()


def load_error(folder: Path, error: Exception) -> UsageError:
    """Returns the error for a folder whose model cannot be built or loaded."""
    reason = " ".join(str(error).split())[:300]
    return UsageError(f"the checkpoint {folder} cannot be loaded: {type(error).__name__}: {reason}")
