"""Features of a backbone: of every image once, into memory or a cache, or of a forward pass."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_lt.data.decode import UNREADABLE, is_worker_death
from timm_lt.data.items import images_and_labels
from timm_lt.data.loader import loaded
from timm_lt.features.cache import (
    FeatureCache,
    backbone_fingerprint,
    is_prepared,
    loader_sizes,
    samples_fingerprint,
    without_first,
)
from timm_lt.features.values import Features, check_finite, check_views
from timm_lt.heads import classifier_name, find_classifiers
from timm_lt.utils.accelerator import torch_defaults, unwrapped
from timm_lt.utils.checks import UsageError, check_integer, check_literals, unknown_name
from timm_lt.utils.console import log
from timm_lt.utils.longtail import check_labels

ComputeDtype = Literal["float32", "bfloat16"]
StoredDtype = Literal["float32", "float16", "bfloat16"]
AGAIN = "extract the features again (with cache_dir=, it continues after the last whole batch)"
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

    The model runs in evaluation mode without gradients. Afterwards each module is in its mode
    again, and random states are restored.

    With ``cache_dir`` the features are written to NumPy files batch by batch and mapped from them,
    so memory holds one batch however many there are. The files are named by a digest of the
    backbone (not of the classifier), of the samples in their order with their transform, and of
    the options; batch size, processes and workers do not count. Finished files are opened without
    running the model. Files of a killed process are continued after the last whole batch, if
    batch size and number of processes are the same. If two processes ask for the same features,
    one extracts them and the other waits.

    Args:
        model: A timm model with a classifier, which may be wrapped in DistributedDataParallel,
            DataParallel or torch.compile.
        loader: Yields images (B, 3, H, W), floating point and normalized, and targets (B,), in a
            fixed order, as a tuple, a list or a mapping with keys such as ``"image"`` and
            ``"label"``. Images with target -1, which could not be read, are left out.
        classifier: Path of the classifier whose input is taken, for a model with several (such as
            ``head_dist`` of a distilled one); None takes the only one.
        accelerator: The one that prepared the loader. Every process gets the features of all, in
            the order of the data set. The processes share ``cache_dir``.
        cache_dir: Folder of the cache, created if missing. None keeps the features in memory.
        dtype: Type of the stored values. float16 has 11 significant bits up to 65,504, bfloat16
            has 8.
        compute_dtype: Type in which the backbone computes. ``"bfloat16"`` is fast where
            :func:`~timm_lt.utils.accelerator.native_precision` says so and slow elsewhere; the
            features of a ResNet-50 then differ by about 0.4 % from those in float32. A model in
            another type than float32 computes in its own.
        views: Passes over the loader, K >= 1, each with other augmented views of the same images.
            ``loader.set_epoch(view)`` is called before each, if it exists. With the loaders of
            ``views_loader``, view v of an image has the same augmentation whatever came before.
        key: Stands for the samples in their order with their transform where these cannot be
            identified, as for a list of batches; see
            :func:`~timm_lt.data.items.dataset_fingerprint`. It must change with the samples.

    Returns:
        Features on the CPU: values (K N, D) in ``dtype``, and targets (K N,).

    Raises:
        UsageError: If a batch is not images and labels, the model does not take them to one vector
            per image for its classifier, a feature is not finite in ``dtype``, or the loader is not
            prepared for several processes. With ``cache_dir``, also if the loader draws its images,
            its samples cannot be identified without a key, or the folder cannot be written.
    """
    options = {"dtype": dtype, "compute_dtype": compute_dtype, "views": views}
    check_literals("extract_features", extract_features, options)
    check_integer("views", views, minimum=1)
    if isinstance(loader, Dataset | datasets.Dataset | Tensor) or not hasattr(loader, "__iter__"):
        raise UsageError(
            f"{type(loader).__name__} is not a loader, which yields batches of images and labels: "
            "make one of a data set with timm_lt.create_loader"
        )
    if accelerator is not None and accelerator.num_processes > 1 and not is_prepared(loader):
        raise UsageError(
            f"accelerate runs {accelerator.num_processes} processes, and each of them would show "
            "all images of this loader: prepare it with the accelerator, as "
            "timm_lt.data.create_loader(..., accelerator=accelerator) does"
        )
    model = unwrapped(model)
    name = chosen_classifier(model, classifier)
    job = _Extraction(model, name, loader, accelerator, getattr(torch, dtype), compute_dtype, views)
    features = job.in_memory() if cache_dir is None else job.cached(Path(cache_dir), key)
    rows, width = features.values.shape
    log.debug("features: %d rows, %d wide, %s, in %s", rows, width, dtype, cache_dir or "memory")
    return features


def chosen_classifier(model: nn.Module, name: str | None) -> str:
    """Returns the path of the classifier whose input is taken: the given one, or the only one."""
    classifiers = find_classifiers(model)
    if name is None and len(classifiers) < 2:
        return classifier_name(model)
    if name not in classifiers:
        raise unknown_name(f"classifier of {type(model).__name__}:", name, list(classifiers))
    return name


class _Batch(NamedTuple):
    """Features (B, D) and targets (B,) of a batch of all processes, and its number of images."""

    values: Tensor
    targets: Tensor
    view: int
    images: int


@dataclass(frozen=True)
class _Extraction:
    """Extraction of the features of a loader by a model."""

    model: nn.Module
    classifier: str
    loader: Any
    accelerator: Accelerator | None
    dtype: torch.dtype
    compute_dtype: ComputeDtype
    views: int

    @property
    def num_images(self) -> int | None:
        """Number of images over all views; None if unknown."""
        number = loader_sizes(self.loader)[1]
        return None if number is None else number * self.views

    def in_memory(self) -> Features:
        """Returns the features in memory."""
        values, targets = torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
        rows = images = 0
        with closing(self._batches()) as batches:
            for batch in batches:
                end, width = rows + len(batch.values), batch.values.shape[1]
                if not images:
                    values = torch.empty(self.num_images or end, width, dtype=self.dtype)
                    targets = targets.resize_(len(values))
                if end > len(values):
                    # Doubled, so that each row is copied about once.
                    values.resize_(2 * end, width)
                    targets.resize_(2 * end)
                values[rows:end], targets[rows:end] = batch.values, batch.targets
                rows, images = end, images + batch.images
        check_views(targets[:rows], self.views, images, self.num_images)
        return Features.from_checked(values[:rows], targets[:rows], self.views)

    def cached(self, folder: Path, key: str | None) -> Features:
        """Returns the features of a cache; without them, all processes make them together."""
        cache = self._on_main(self._cache, folder, key)
        if self._on_main(lambda: cache.read() is None):
            with ExitStack() as stack:
                progress = self._on_main(lambda: stack.enter_context(cache.growing()))
                if progress is not None:
                    start = (progress.view, progress.batches, progress.rows)
                    with closing(self._batches(*start, in_order=True)) as batches:
                        for batch in batches:
                            self._on_main(cache.append, *batch)
                    self._on_main(cache.finish, self.num_images)
        features = cache.read()
        if features is None:
            raise UsageError(f"all processes must share cache_dir {folder}: no features are in it")
        return features

    def _cache(self, folder: Path, key: str | None) -> FeatureCache:
        description = {
            "architecture": type(self.model).__name__,
            "backbone": backbone_fingerprint(self.model, self.classifier),
            "classifier": self.classifier,
            "samples": samples_fingerprint(self.loader, key),
            "compute_dtype": self.compute_dtype,
        }
        processes = 1 if self.accelerator is None else self.accelerator.num_processes
        settings = {"batch_size": loader_sizes(self.loader)[0], "processes": processes}
        return FeatureCache(folder, description, settings, self.dtype, self.views)

    def _batches(
        self, view: int = 0, skipped: int = 0, row: int = 0, *, in_order: bool = False
    ) -> Generator[_Batch]:
        """Yields the features batch by batch, from a view without its first batches on.

        The model has hooks until this is closed. ``row`` is the index of the first row in messages;
        with ``in_order``, a single view is of epoch 0, too.
        """
        with backbone(self.model, self.classifier, self.compute_dtype) as features:
            for number in range(view, self.views):
                if hasattr(self.loader, "set_epoch") and (in_order or self.views > 1):
                    self.loader.set_epoch(number)
                first = skipped if number == view else 0
                with without_first(self.loader, first) as rest:
                    for index, batch in enumerate(loaded(rest, again=AGAIN), first):
                        images, labels = images_and_labels(batch, f"batch {index} of the loader")
                        values, targets = self._gathered(features, images, labels)
                        readable = targets != UNREADABLE
                        values, kept = values[readable], targets[readable]
                        if len(kept):
                            noun = f"targets[{row}:]" if row else "targets"
                            kept = check_labels(kept, noun=noun)
                        check_finite(values, row, self.dtype)
                        row += len(kept)
                        yield _Batch(values.to(self.dtype), kept, number, len(targets))

    def _gathered(
        self, features: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the features and labels of a batch of all processes, on the CPU."""
        with torch.inference_mode():
            if len(images) == 0 and self.accelerator is None:
                # Not every model takes an empty batch.
                width = int(find_classifiers(self.model)[self.classifier].weight.shape[1])
                return torch.empty(0, width), torch.empty(0, dtype=torch.int64)
            try:
                values = features(images)
            except (RuntimeError, AssertionError, ValueError) as error:
                known = isinstance(error, UsageError | torch.OutOfMemoryError)
                if known or is_worker_death(error):
                    raise
                shape, reason = tuple(images.shape), str(error).strip().partition("\n")[0]
                last = shape[1] not in CHANNELS and shape[3] in CHANNELS
                hint = ", with the channels last: pass images.permute(0, 3, 1, 2)" if last else ""
                raise UsageError(
                    f"{type(self.model).__name__} fails on images of shape {shape}{hint} ({reason})"
                ) from error
            batch = (values, labels.to(values.device))
            if self.accelerator is not None:
                batch = self.accelerator.gather_for_metrics(batch)
            return batch[0].float().cpu(), batch[1].cpu()

    def _on_main(self, act: Callable[..., T], *arguments: Any) -> T:
        """Acts in the main process; the result or the error is that of every process."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return act(*arguments)
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                outcome[0] = act(*arguments)
            except UsageError as error:
                failure, outcome[1] = error, str(error)
            except Exception as error:  # noqa: BLE001 - else the other processes wait for ever
                failure = error
                outcome[1] = f"the main process failed with {type(error).__name__}: {error}"
        result, problem = broadcast_object_list(outcome)
        if failure is not None:
            raise failure
        if problem is not None:
            raise UsageError(problem)
        return cast(T, result)


class _BeforeClassifier(Exception):  # noqa: N818
    """Ends a forward pass just before the classifier, which may not be fitted yet."""


class FeatureTap:
    """Keeps the input of a timm model's classifier, forward pass by forward pass.

    >>> import timm, torch
    >>> model = timm.create_model("test_resnet", num_classes=3)
    >>> tap = FeatureTap(model)
    >>> logits = model(torch.zeros(2, 3, 32, 32))
    >>> features = tap.take()
    >>> features.shape, torch.equal(model.fc(features), logits)
    (torch.Size([2, 96]), True)

    The classifier is given by its path, or the only one. With ``ends``, a forward pass ends before
    it.
    """

    def __init__(
        self, model: nn.Module, classifier: str | None = None, *, ends: bool = False
    ) -> None:
        self._model, self._ends = model, ends
        self._classifier = find_classifiers(model)[chosen_classifier(model, classifier)]
        self._taken: Tensor | None = None
        # Not forward_head(pre_logits=True): for some architectures that is not the input.
        self._hook = self._classifier.register_forward_pre_hook(self._take)

    def _take(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._taken = inputs[0]
        if self._ends:
            raise _BeforeClassifier

    def take(self) -> Tensor:
        """Returns the features (N, D) of the last forward pass, once.

        Raises:
            UsageError: If the model did not call the classifier, or called it for more than one
                vector per image.
        """
        taken, self._taken = self._taken, None
        spatial = isinstance(self._classifier, nn.Conv2d)
        spatial = spatial or getattr(self._classifier, "spatial", False)
        if taken is not None and spatial and taken.shape[2:] == (1, 1):
            # A 1×1 convolution takes (N, D, 1, 1).
            taken = taken.flatten(1)
        if taken is None or taken.ndim != 2:
            found = "did not call it" if taken is None else f"gave it {tuple(taken.shape)}"
            raise UsageError(
                f"features are the input of the classifier, one vector per image (batch, width), "
                f"but {type(self._model).__name__} {found}"
            )
        return taken

    def remove(self) -> None:
        """Removes the hook from the model."""
        self._hook.remove()


@contextmanager
def backbone(
    model: nn.Module, classifier: str, compute_dtype: ComputeDtype
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields a function from images (B, 3, H, W) to the classifier's input (B, D), float32.

    Images get the type of the model's weights, so a model in bfloat16, float16 or float64 computes
    in it. ``"bfloat16"`` is autocast with the channels last in memory; global pooling sums and
    keeps float32. The mixed precision of accelerate is off. Afterwards each module is in its mode
    again and the weights have their old memory format.
    """
    device = find_classifiers(model)[classifier].weight.device
    dtype = next((w.dtype for w in model.parameters() if w.is_floating_point()), None)
    low = compute_dtype == "bfloat16" and dtype == torch.float32

    def features(images: Tensor) -> Tensor:
        images = images.to(device, dtype if images.is_floating_point() else None)
        if low and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(enabled=low), contextlib.suppress(_BeforeClassifier):
            model(images)
        return tap.take().float()

    autocast = partial(torch.autocast, device.type, torch.bfloat16)
    with ExitStack() as stack:
        _prepare(model, stack, low=low)
        tap = FeatureTap(model, classifier, ends=True)
        stack.callback(tap.remove)
        # Off also for the caller's autocast; within it, weights are cast once, not per batch.
        stack.enter_context(autocast(enabled=False))
        yield features


def _prepare(model: nn.Module, stack: ExitStack, *, low: bool) -> None:
    """Puts a model in evaluation mode, for bfloat16 with the channels last, until a stack ends."""
    for module in model.modules():
        # Module by module: parts of a model in training may be frozen in evaluation mode.
        stack.callback(setattr, module, "training", module.training)
        state = vars(module)
        if "_original_forward" in state:
            # Without the mixed precision that accelerate wraps around it.
            stack.callback(state.__setitem__, "forward", state.get("forward"))
            state["forward"] = state["_original_forward"]
        if low and isinstance(module, SelectAdaptivePool2d | nn.AdaptiveAvgPool2d):
            stack.callback(module.register_forward_pre_hook(_in_float32).remove)
    model.eval()
    for weight in model.parameters():
        if low and weight.ndim == 4:
            # Restored, not converted back: optimizers and others may share their memory.
            stack.callback(setattr, weight, "data", weight.data)
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _in_float32(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.float() for tensor in inputs)
