"""Takes the features of every image once, into memory or into a cache.

A model as a function from images to features, in float32 or in bfloat16.

The order in which a loader shows its images: is it fixed, and how is a part of it left out.

The features of a forward pass, beside its logits and with their gradients.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_lt.data.decode import UNREADABLE, is_worker_death
from timm_lt.data.fingerprint import digest
from timm_lt.data.items import images_and_labels
from timm_lt.data.loader import loaded
from timm_lt.features.cache import (
    LAYOUT,
    NO_IMAGES,
    FeatureFile,
    Journal,
    Writer,
    backbone_fingerprint,
    check_order,
    check_shown,
    images_at_once,
    is_prepared,
    num_images,
    samples_fingerprint,
    without_first,
)
from timm_lt.features.values import Features, check_finite
from timm_lt.heads import classifier_name, find_classifiers
from timm_lt.utils.accelerator import torch_defaults, unwrapped
from timm_lt.utils.checks import UsageError, check_integer, check_literals, unknown_name
from timm_lt.utils.console import log
from timm_lt.utils.longtail import check_labels

ComputeDtype = Literal["float32", "bfloat16"]


class _BeforeClassifier(Exception):  # noqa: N818
    """Ends a forward pass just before the classifier, which may not be fitted yet."""


def chosen_classifier(model: nn.Module, name: str | None) -> str:
    """Returns the path of the classifier whose input is taken: the one given, or the only one.

    Raises:
        UsageError: If there is no such classifier, or none is named and there are several.
    """
    classifiers = find_classifiers(model)
    if name is None and len(classifiers) > 1:
        raise UsageError(
            f"{type(model).__name__} has {len(classifiers)} classifiers, each with features of its "
            f"own: pass classifier= with one of {', '.join(classifiers)}"
        )
    name = classifier_name(model) if name is None else name
    if name not in classifiers:
        raise unknown_name(f"classifier of {type(model).__name__}:", name, list(classifiers))
    return name


@contextmanager
def backbone(
    model: nn.Module, classifier: str, compute_dtype: ComputeDtype
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields a function from images (B, 3, H, W) to features (B, D), float32.

    Images get the type of the model's weights, so that a model in bfloat16, float16 or float64
    computes in it. Of a model that accelerate prepared, the mixed precision is off.
    Meanwhile the model is in evaluation mode; afterwards it is as it came, each module in its mode
    and each weight where it lay in memory.

    Args:
        model: A timm model.
        classifier: Path of the classifier whose input is taken.
        compute_dtype: ``"bfloat16"`` is autocast with the channels last in memory; what is pooled
            over the image is summed and kept in float32.

    Raises:
        UsageError: If the weights are float16 or float64 and ``compute_dtype`` is ``"bfloat16"``.
            By the function, if the model does not call its classifier, or calls it for more than
            one vector an image.
    """
    taken_from = find_classifiers(model)[classifier]
    device = taken_from.weight.device
    low = compute_dtype == "bfloat16"
    dtypes = (weight.dtype for weight in model.parameters() if weight.is_floating_point())
    dtype = next(dtypes, None)
    if low and dtype in (torch.float16, torch.float64):
        raise UsageError(
            f"compute_dtype='bfloat16' is for a model with float32 weights, and these are {dtype}: "
            "pass compute_dtype='float32', which then computes in the type of the weights"
        )
    taken: list[Tensor] = []

    def take(_: nn.Module, inputs: tuple[Tensor]) -> None:
        taken.append(inputs[0])
        raise _BeforeClassifier

    def features(images: Tensor) -> Tensor:
        images = images.to(device, dtype if images.is_floating_point() else None)
        if low and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with _autocast(device, enabled=low), contextlib.suppress(_BeforeClassifier):
            model(images)
        if not taken:
            raise UsageError(
                f"{type(model).__name__} computes its output without calling its classifier"
            )
        return as_rows(taken.pop(), taken_from).float()

    with ExitStack() as stack:
        stack.enter_context(_evaluation_mode(model))
        stack.enter_context(_own_precision(model))
        # Not forward_head(pre_logits=True): for some architectures that is not the classifier's
        # input.
        stack.callback(taken_from.register_forward_pre_hook(take).remove)
        # Of a caller's autocast, too. Within it, weights are cast once and not for each batch.
        stack.enter_context(_autocast(device, enabled=False))
        if low:
            stack.enter_context(_channels_last(model))
            for module in model.modules():
                if isinstance(module, SelectAdaptivePool2d | nn.AdaptiveAvgPool2d):
                    stack.callback(module.register_forward_pre_hook(_in_float32).remove)
        yield features


def _autocast(device: torch.device, *, enabled: bool) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _in_float32(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.float() for tensor in inputs)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    # Module by module: a part of a model in training may have been frozen in evaluation mode.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _own_precision(model: nn.Module) -> Iterator[None]:
    """Calls the ``forward`` that accelerate's mixed precision is wrapped around."""
    wrapped = [module for module in model.modules() if "_original_forward" in vars(module)]
    forwards = [vars(module).get("forward") for module in wrapped]
    try:
        for module in wrapped:
            vars(module)["forward"] = vars(module)["_original_forward"]
        yield
    finally:
        for module, forward in zip(wrapped, forwards, strict=True):
            vars(module)["forward"] = forward


@contextmanager
def _channels_last(model: nn.Module) -> Iterator[None]:
    """Has the weights of convolutions with the channels last in memory."""
    # Put back afterwards, not converted back: optimizers and others may share their memory.
    weights = [(weight, weight.data) for weight in model.parameters() if weight.ndim == 4]
    try:
        for weight, data in weights:
            weight.data = data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight, data in weights:
            weight.data = data


def as_rows(values: Tensor, classifier: nn.Module) -> Tensor:
    """Returns a classifier's input as (B, D); a 1×1 convolution's is (B, D, 1, 1)."""
    spatial = isinstance(classifier, nn.Conv2d) or getattr(classifier, "spatial", False)
    if spatial and values.shape[2:] == (1, 1):
        values = values.flatten(1)
    if values.ndim != 2:
        raise UsageError(
            f"the classifier's input has shape {tuple(values.shape)}, but features are one vector "
            "an image, (batch, width)"
        )
    return values


StoredDtype = Literal["float32", "float16", "bfloat16"]
NO_BATCHES = "the loader has no batches, so there are no features to extract"
AGAIN = "extract the features again (with cache_dir=, it goes on behind what is whole)"
CHANNELS = (1, 3, 4)
T = TypeVar("T")


@torch_defaults()
def extract_features(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    classifier: str | None = None,
    accelerator: Accelerator | None = None,
    cache_dir: str | Path | None = None,
    dtype: StoredDtype = "float32",
    compute_dtype: ComputeDtype = "float32",
    views: int = 1,
    key: str | None = None,
) -> Features:
    """Runs the backbone once over a data set and keeps the input of the classifier.

    The model runs in evaluation mode without gradients; afterwards it is as it came, each module in
    its mode. Random states of the process are restored, too.

    With ``cache_dir`` the features are written to a safetensors file as they come and read from it
    as a mapped file: the memory holds a batch of them, however many there are. The file's name is a
    digest of the backbone (not of the classifier), of the samples in their order with their
    transform, and of the options here, so that whatever changes one of them makes another file;
    batch size, processes and workers do not. A file that is there is opened without running the
    model. One that a killed process left unfinished is gone on with, behind its last whole batch,
    if batch size and number of processes are the same. Two processes may ask for the same: one
    extracts, the other waits.

    Args:
        model: A timm model with a classifier, which may be wrapped in DistributedDataParallel,
            DataParallel or torch.compile.
        loader: Yields images (B, 3, H, W), floating point and normalized, and targets (B,), in a
            fixed order: as a tuple or list that may have more parts behind them, or as a mapping
            with keys such as ``"image"`` and ``"label"``; as tensors, NumPy arrays or lists. Images
            with target -1, which could not be read, are left out.
        classifier: Path of the classifier whose input is taken, for a model with several (as
            ``head_dist`` of a distilled one); None takes the only one.
        accelerator: If the loader is prepared by one, features are gathered from all processes and
            every process gets all of them, in the order of the data set. They share ``cache_dir``.
        cache_dir: A folder for files of features; it is made if need be. None keeps the features in
            memory.
        dtype: How the values are kept. float16 has 11 significant bits up to 65,504, bfloat16 has
            8.
        compute_dtype: What the backbone computes in. ``"bfloat16"`` is fast where
            :func:`~timm_lt.utils.accelerator.native_precision` says so and slow elsewhere; the
            features of a ResNet-50 are then about 0.4 % from those in float32.
        views: Passes over the loader, K >= 1, each of which shows other augmented views of the same
            images. Before each, ``loader.set_epoch(view)`` is called if there is such a method. The
            loaders of ``views_loader`` give view v of an image the same augmentation whatever came
            before; of another loader, it is the one that random numbers happen to give.
        key: Stands for the samples in their order and all that is done to them, where that is not
            known, as for a list of batches; see
            :func:`~timm_lt.data.fingerprint.dataset_fingerprint`. It must be another for other
            samples.

    Returns:
        Features on the CPU: values (K N, D) in ``dtype``, and targets (K N,).

    Raises:
        UsageError: If the loader is empty, shows another number of images than it has, or is not
            prepared where there are several processes; a batch has no labels, or has images or
            labels of another shape or type; the model fails on the images, does not call its
            classifier, calls it for more than one vector an image, or has several; or a feature is
            not finite, or too large for ``dtype``. With ``cache_dir``, also if the loader draws its
            images; its samples, their order or its ``collate_fn`` are not known and there is no
            key; or the folder cannot be written.
    """
    options = {"dtype": dtype, "compute_dtype": compute_dtype, "views": views}
    check_literals("extract_features", extract_features, options)
    check_integer("views", views, minimum=1)
    if isinstance(loader, Dataset | datasets.Dataset | Tensor) or not hasattr(loader, "__iter__"):
        raise UsageError(
            f"{type(loader).__name__} is not a loader, which yields batches of images and labels: "
            "make one of a data set with timm_lt.create_loader"
        )
    _check_processes(accelerator, loader)
    model = unwrapped(model)
    name = chosen_classifier(model, classifier)
    job = _Pass(model, name, loader, accelerator, getattr(torch, dtype), compute_dtype, views)
    features = _in_memory(job) if cache_dir is None else _cached(job, Path(cache_dir), key)
    rows, width = features.values.shape
    log.debug("features: %d rows, %d wide, %s, in %s", rows, width, dtype, cache_dir or "memory")
    return features


def _check_processes(accelerator: Accelerator | None, loader: object) -> None:
    if accelerator is not None and accelerator.num_processes > 1 and not is_prepared(loader):
        raise UsageError(
            f"accelerate runs {accelerator.num_processes} processes, and each of them would show "
            "all images of this loader: prepare it with the accelerator, as "
            "timm_lt.data.create_loader(..., accelerator=accelerator) does"
        )


@dataclass(frozen=True)
class _Pass:
    """A pass over a data set: what to run on which batches, and how."""

    model: nn.Module
    classifier: str
    loader: Any
    accelerator: Accelerator | None
    dtype: torch.dtype
    compute_dtype: ComputeDtype
    views: int

    @property
    def num_images(self) -> int | None:
        """Images that are shown over all views, if known."""
        number = num_images(self.loader)
        return None if number is None else number * self.views

    def batches(
        self, view: int = 0, skipped: int = 0, row: int = 0, *, in_order: bool = False
    ) -> Generator[tuple[Tensor, Tensor, int, int]]:
        """Yields values (B, D), targets (B,), view and images of each batch, of all processes.

        Images that cannot be read have no row, but count. To be closed: until then the model has
        hooks.

        Args:
            view: The first view.
            skipped: Batches of that view that are left out.
            row: Number of the first row, for messages.
            in_order: Have even the only view begin at epoch 0.
        """
        with backbone(self.model, self.classifier, self.compute_dtype) as features:
            for number in range(view, self.views):
                if hasattr(self.loader, "set_epoch") and (in_order or self.views > 1):
                    self.loader.set_epoch(number)
                with without_first(self.loader, skipped if number == view else 0) as rest:
                    batches = loaded(rest, again=AGAIN)
                    for place, batch in enumerate(batches, skipped if number == view else 0):
                        images, labels = images_and_labels(batch, f"batch {place} of the loader")
                        values, targets = self._gathered(features, images, labels)
                        shown = len(targets)
                        values, targets = _kept(values, targets, self.dtype, row)
                        row += len(values)
                        yield values, targets, number, shown

    @property
    def num_features(self) -> int:
        """Width of the classifier's input."""
        return int(find_classifiers(self.model)[self.classifier].weight.shape[1])

    def _gathered(
        self, features: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            if len(images) == 0 and self.accelerator is None:
                # Not every model takes an empty batch.
                return torch.empty(0, self.num_features), torch.empty(0, dtype=torch.int64)
            try:
                values = features(images)
            except (RuntimeError, AssertionError, ValueError) as error:
                if (explained := _wrong_size(error, self.model, images)) is None:
                    raise
                raise explained from error
            batch = (values, labels.to(values.device))
            if self.accelerator is not None:
                batch = self.accelerator.gather_for_metrics(batch)
            return batch[0].float().cpu(), batch[1].cpu()


def _wrong_size(error: Exception, model: nn.Module, images: Tensor) -> UsageError | None:
    """Returns what to say if a model fails on images; None if they are not the cause."""
    if isinstance(error, UsageError | torch.OutOfMemoryError) or is_worker_death(error):
        return None
    shape = tuple(images.shape)
    last = shape[1] not in CHANNELS and shape[3] in CHANNELS
    hint = ", with the channels last: pass images.permute(0, 3, 1, 2)" if last else ""
    reason = str(error).strip().partition("\n")[0]
    return UsageError(f"{type(model).__name__} fails on images of shape {shape}{hint} ({reason})")


def _kept(values: Tensor, targets: Tensor, dtype: torch.dtype, first: int) -> tuple[Tensor, Tensor]:
    """Leaves out what could not be read, and checks what is kept."""
    readable = targets != UNREADABLE
    if not readable.all():
        values, targets = values[readable], targets[readable]
    if len(targets):
        targets = check_labels(targets, noun=f"targets[{first}:]" if first else "targets")
    kept = values.to(dtype)
    if not kept.isfinite().all():
        check_finite(values, first)
        row, column = (~kept.isfinite()).nonzero()[0].tolist()
        name = str(dtype).removeprefix("torch.")
        raise UsageError(
            f"feature row {first + row} has {float(values[row, column])} in column {column}, "
            f"beyond the largest {name}, {torch.finfo(dtype).max:g}: take dtype='float32'"
        )
    return kept, targets


def _in_memory(job: _Pass) -> Features:
    expected = job.num_images or 0
    values, targets, rows = torch.empty(0, 0), torch.empty(0, dtype=torch.int64), 0
    seen = 0
    with closing(job.batches()) as batches:
        for new_values, new_targets, _, shown in batches:
            if not seen:
                values = torch.empty(expected, new_values.shape[1], dtype=job.dtype)
                targets = torch.empty(expected, dtype=torch.int64)
            end = rows + len(new_values)
            if end > len(values):
                # Twice as many each time, so that a row is copied about once.
                values, targets = _longer(values, rows + end), _longer(targets, rows + end)
            values[rows:end], targets[rows:end] = new_values, new_targets
            rows, seen = end, seen + shown
    if not rows:
        raise UsageError(NO_IMAGES if seen else NO_BATCHES)
    check_shown(seen, job.num_images)
    return Features(values[:rows], targets[:rows], job.views)


def _longer(tensor: Tensor, length: int) -> Tensor:
    longer = tensor.new_empty(length, *tensor.shape[1:])
    longer[: len(tensor)] = tensor
    return longer


def _cached(job: _Pass, folder: Path, key: str | None) -> Features:
    """Opens the file of a pass; if there is none, one process makes it, with the help of all."""
    file = _on_main(job.accelerator, _file, job, folder, key)
    writer: Writer | None = None

    def begin() -> Journal | None:
        nonlocal writer
        if file.open() is not None:
            return None
        held.enter_context(file.locked())
        # Made while this process waited?
        if file.open() is not None:
            return None
        writer = Writer(file, job.dtype, _settings(job))
        held.callback(writer.close)
        return writer.journal

    with ExitStack() as held:
        journal = _on_main(job.accelerator, begin)
        if journal is not None:
            append, finish = (writer.append, writer.finish) if writer else (_nothing, _nothing)
            begun = (journal.view, journal.batches, journal.rows)
            with closing(job.batches(*begun, in_order=True)) as rest:
                for batch in rest:
                    _on_main(job.accelerator, append, *batch)
            _on_main(job.accelerator, finish, job.num_images)
    features = file.open()
    if features is None:
        raise UsageError(f"{file.path} is not there: all processes must share one cache_dir")
    return features


def _nothing(*_: Any) -> None:
    """What a process does that is not the main one."""


def _settings(job: _Pass) -> dict[str, Any]:
    """Returns what decides into which batches the images are divided, and so the rounding."""
    processes = 1 if job.accelerator is None else job.accelerator.num_processes
    batch_size = images_at_once(job.loader)
    return {"batch_size": batch_size, "processes": processes, "views": job.views}


def _file(job: _Pass, folder: Path, key: str | None) -> FeatureFile:
    """Returns the file of a pass, after checking that there can be one."""
    check_order(job.loader, key)
    samples = samples_fingerprint(job.loader) if key is None else f"key {key}"
    description = {
        "architecture": type(job.model).__name__,
        "backbone": backbone_fingerprint(job.model, job.classifier),
        "classifier": job.classifier,
        "samples": samples,
        "dtype": str(job.dtype).removeprefix("torch."),
        "compute_dtype": job.compute_dtype,
        "views": str(job.views),
        "layout": str(LAYOUT),
    }
    return FeatureFile(folder, digest(description), description)


def _on_main(accelerator: Accelerator | None, act: Callable[..., T], *arguments: Any) -> T:
    """Does something on the main process; all get what it returns, or raise what it raises."""
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if accelerator is None or accelerator.is_main_process:
        try:
            outcome[0] = act(*arguments)
        except Exception as error:  # noqa: BLE001 - else the other processes wait for ever
            failure = error
    if accelerator is not None and accelerator.num_processes > 1:
        if failure is not None:
            unknown = f"the main process failed with {type(failure).__name__}: {failure}"
            outcome[1] = str(failure) if isinstance(failure, UsageError) else unknown
        outcome = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise UsageError(outcome[1])
    result: T = outcome[0]
    return result


class FeatureTap:
    """Keeps what a model's only classifier takes, forward pass by forward pass.

    >>> import timm, torch
    >>> model = timm.create_model("test_resnet", num_classes=3)
    >>> tap = FeatureTap(model)
    >>> logits = model(torch.zeros(2, 3, 32, 32))
    >>> features = tap.take()
    >>> features.shape, torch.equal(model.fc(features), logits)
    (torch.Size([2, 96]), True)

    Args:
        model: A timm model, not wrapped for several processes.

    Raises:
        UsageError: If it has several classifiers, or none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._classifier = find_classifiers(model)[chosen_classifier(model, None)]
        self._taken: Tensor | None = None
        self._hook = self._classifier.register_forward_pre_hook(self._take)

    def _take(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._taken = inputs[0]

    def take(self) -> Tensor:
        """Returns the features (N, D) of the last forward pass, once.

        Raises:
            UsageError: If there was none, or it did without the classifier.
        """
        if self._taken is None:
            raise UsageError("the model computed its output without calling its classifier")
        taken, self._taken = self._taken, None
        return as_rows(taken, self._classifier)

    def remove(self) -> None:
        """Leaves the model as it was."""
        self._hook.remove()
