"""Features: the input of the classifier for every image, in memory or in a mapped file."""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast, get_args

import datasets
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import broadcast_object_list
from timm.data.loader import PrefetchLoader
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn
from torch.utils.data import BatchSampler, Dataset

from timm_lt.data.decode import UNREADABLE, is_worker_death
from timm_lt.data.items import as_tensor, images_and_labels
from timm_lt.data.loader import Loader, loaded
from timm_lt.heads import classifier_name, find_classifiers
from timm_lt.utils.accelerator import torch_defaults, unwrapped
from timm_lt.utils.checks import UsageError, check_choice, check_integer, unknown_name
from timm_lt.utils.console import log
from timm_lt.utils.longtail import check_labels

if TYPE_CHECKING:
    from timm_lt.features.cache import FeatureCache

ComputeDtype = Literal["float32", "bfloat16"]
StoredDtype = Literal["float32", "float16", "bfloat16"]
AGAIN = "extract the features again (with cache_dir=, it continues after the last whole batch)"
# Values read at a time, which bounds the part of a mapped file in memory.
BLOCK = 2**20
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Features:
    """Features of a data set with its labels.

    The values may lie in a mapped file and be larger than memory: they are read block by block.

    Args:
        values: (N, D), floating point: a tensor, or an array, which is not copied. With K views
            (K N, D), view by view: row ``v N + i`` is view v of image i.
        targets: Labels (N,) of any integer type, also as an array or a list; kept as int64 on the
            CPU.
        views: Augmented views of each image, K >= 1.

    Raises:
        UsageError: If the shapes do not match, a value is not finite, a label is not a
            non-negative integer, or the views have different labels.

    >>> features = Features(torch.eye(4, 3), torch.tensor([0, 1, 0, 1]), views=2)
    >>> features.num_features, features.num_images, len(features.first_views(1))
    (3, 2, 2)
    """

    values: Tensor
    targets: Tensor
    views: int = 1

    def __post_init__(self) -> None:
        values, targets = as_tensor(self.values), check_labels(self.targets, noun="targets")
        is_matrix = values is not None and values.ndim == 2 and values.is_floating_point()
        if values is None or not is_matrix or targets.shape != (len(values),):
            shape = "" if values is None else f" of {values.dtype} and shape {tuple(values.shape)}"
            raise UsageError(
                "feature values must be a floating-point (N, D) matrix with N targets, got a "
                f"{type(self.values).__name__}{shape} with {len(targets)} targets"
            )
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "targets", targets)
        check_views(self.targets, self.views)
        # Refuses values that are not finite.
        _ = self.feature_mean

    @classmethod
    def from_checked(cls, values: Tensor, targets: Tensor, views: int = 1) -> "Features":
        """Returns features that were checked before, without reading their values."""
        features = object.__new__(cls)
        vars(features).update(values=values, targets=targets, views=views)
        return features

    @cached_property
    def feature_mean(self) -> Tensor:
        """Mean of each column over all rows, (D,) float64; read once, block by block."""
        values = self.values.detach()
        total = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
        rows = max(BLOCK // max(values.shape[1], 1), 1)
        for first in range(0, len(values), rows):
            block = values[first : first + rows]
            # In float64 the sum of finite values is finite, except for values that need float64.
            sums = block.double().sum(0)
            if not sums.isfinite().all():
                check_finite(block, first)
            total += sums
        return total / len(values)

    @property
    def num_features(self) -> int:
        """Width D."""
        return self.values.shape[1]

    @property
    def num_images(self) -> int:
        """Number of images N; each has one row per view."""
        return len(self.targets) // self.views

    def first_views(self, views: int) -> "Features":
        """Returns the first views of every image, sharing their memory."""
        rows = check_integer("views", views, minimum=1, maximum=self.views) * self.num_images
        return Features.from_checked(self.values[:rows], self.targets[:rows], views)

    def __len__(self) -> int:
        return len(self.targets)


def check_features(features: object, noun: str) -> None:
    """Checks that an argument is :class:`Features`; the error says how to make it."""
    if not isinstance(features, Features):
        raise UsageError(
            f"{noun} must be timm_lt.Features, got a {type(features).__name__}: pass "
            "timm_lt.Features(values, targets), or the result of timm_lt.extract_features"
        )


def check_views(
    targets: Tensor, views: int, images: int | None = None, expected: int | None = None
) -> None:
    """Checks that all views have the same images in the same order, as far as labels show it.

    ``images`` is the number that a loader gave over all views, readable or not; ``expected`` the
    number that it should give, if known.
    """
    check_integer("views", views, minimum=1)
    if images is not None and (len(targets) == 0 or expected not in (None, images)):
        raise UsageError(
            f"the loader gave {images} images, {len(targets)} of them readable; expected "
            f"{expected or 'at least 1'}, each once in each view. With several processes, prepare "
            "the loader with the accelerator and pass accelerator="
        )
    if not targets.equal(targets[: len(targets) // views].repeat(views)):
        raise UsageError(
            f"{len(targets)} feature rows are not {views} views of the same images in the same "
            "order, as their labels show"
        )


def check_finite(values: Tensor, first: int = 0, dtype: torch.dtype | None = None) -> None:
    """Checks that values (B, D), from row ``first`` on, are finite, also in the stored type."""
    bad = ~values.to(dtype or values.dtype).isfinite()
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        fault = "; features must be finite"
        if values[row, column].isfinite():
            largest, name = torch.finfo(dtype or values.dtype).max, str(dtype)[6:]
            fault = f", beyond the largest {name}, {largest:g}: take dtype='float32'"
        raise UsageError(
            f"feature row {first + row} has {float(values[row, column])} in column {column}{fault}"
        )


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

    The model runs in evaluation mode without gradients, and is afterwards as it was before.

    With ``cache_dir`` the features are written to NumPy files batch by batch and mapped from them,
    so memory holds one batch. The files are named by a digest of the backbone (not the classifier),
    the samples in their order with their transform, and the options. Finished files are opened
    without running the model. Files of a killed process are continued after the last whole batch,
    if batch size and number of processes are the same; a second process waits for the first.

    Args:
        model: A timm model with a classifier, which may be wrapped in DistributedDataParallel,
            DataParallel or torch.compile.
        loader: Yields images (B, 3, H, W), floating point and normalized, and targets (B,), in a
            fixed order, as a tuple, a list or a mapping with keys such as ``"image"`` and
            ``"label"``. Images with target -1, which could not be read, are omitted.
        classifier: Path of the classifier whose input is taken, for a model with several (such as
            ``head_dist`` of a distilled one); None takes the only one.
        accelerator: The one that prepared the loader. Every process gets the features of all, in
            the order of the data set. The processes share ``cache_dir``.
        cache_dir: Folder of the cache, created if missing. None keeps the features in memory.
        dtype: Type of the stored values.
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
    check_choice("dtype", dtype, get_args(StoredDtype))
    check_choice("compute_dtype", compute_dtype, get_args(ComputeDtype))
    check_integer("views", views, minimum=1)
    if isinstance(loader, Dataset | datasets.Dataset | Tensor) or not hasattr(loader, "__iter__"):
        raise UsageError(
            f"{type(loader).__name__} is not a loader, which yields batches of images and labels: "
            "make one of a data set with timm_lt.create_loader"
        )
    shards = (DataLoaderShard, DataLoaderDispatcher)
    is_prepared = any(isinstance(layer, shards) for layer in layers_of(loader))
    if accelerator is not None and accelerator.num_processes > 1 and not is_prepared:
        raise UsageError(
            f"accelerate runs {accelerator.num_processes} processes, and each of them would read "
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


# Features (B, D) and targets (B,) of a batch of all processes, its view and number of images.
_Batch: TypeAlias = tuple[Tensor, Tensor, int, int]


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
            for part, labels, _, number in batches:
                end, width = rows + len(part), part.shape[1]
                if not images:
                    values = torch.empty(self.num_images or end, width, dtype=self.dtype)
                    targets = targets.resize_(len(values))
                if end > len(values):
                    # Doubled, so that each row is copied about once.
                    values.resize_(2 * end, width)
                    targets.resize_(2 * end)
                values[rows:end], targets[rows:end] = part, labels
                rows, images = end, images + number
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
                    self._on_main(cache.finish, partial(check_views, expected=self.num_images))
        stored = cache.read()
        if stored is None:
            raise UsageError(f"all processes must share cache_dir {folder}: no features are in it")
        return Features.from_checked(*stored, views=self.views)

    def _cache(self, folder: Path, key: str | None) -> "FeatureCache":
        from timm_lt.features.cache import FeatureCache, backbone_fingerprint, samples_fingerprint

        size, images = loader_sizes(self.loader)
        batches, _ = batch_sampler_of(self.loader)
        description = {
            "architecture": type(self.model).__name__,
            "backbone": backbone_fingerprint(self.model, self.classifier),
            "classifier": self.classifier,
            "samples": samples_fingerprint(layers_of(self.loader), batches, images, key),
            "compute_dtype": self.compute_dtype,
        }
        processes = getattr(self.accelerator, "num_processes", 1)
        settings = {"batch_size": size, "processes": processes}
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
                            kept = check_labels(kept, noun=f"targets[{row}:]" if row else "targets")
                        check_finite(values, row, self.dtype)
                        row += len(kept)
                        yield values.to(self.dtype), kept, number, len(targets)

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
                raise UsageError(
                    f"{type(self.model).__name__} fails on images of shape {shape} ({reason})"
                ) from error
            batch = (values, labels.to(values.device))
            if self.accelerator is not None:
                batch = self.accelerator.gather_for_metrics(batch)
            return batch[0].float().cpu(), batch[1].cpu()

    def _on_main(self, act: Callable[..., T], *arguments: Any) -> T:
        """Acts in the main process; every process gets the result, or the error of the user."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return act(*arguments)
        outcome: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                outcome[0] = act(*arguments)
            except UsageError as error:
                outcome[1] = str(error)
        result, problem = broadcast_object_list(outcome)
        if problem is not None:
            raise UsageError(problem)
        return cast(T, result)


def layers_of(loader: Any) -> list[Any]:  # noqa: ANN401
    """Returns a loader and those inside it; torch's ``DataLoader``, if any, is the last."""
    layers: list[Any] = []
    while loader is not None:
        layers.append(loader)
        wraps = isinstance(loader, Loader | PrefetchLoader)
        loader = loader.loader if wraps else getattr(loader, "base_dataloader", None)
    return layers


def batch_sampler_of(loader: object) -> tuple[BatchSampler | None, int]:
    """Returns a loader's batch sampler, if known, and how many of its batches are taken at once."""
    layers, at_once = layers_of(loader), 1
    batches = getattr(layers[-1], "batch_sampler", None)
    while isinstance(batches, BatchSamplerShard):
        at_once *= 1 if batches.split_batches else batches.num_processes
        batches = batches.batch_sampler
    is_dispatched = any(isinstance(layer, DataLoaderDispatcher) for layer in layers)
    return (None, 1) if is_dispatched or type(batches) is not BatchSampler else (batches, at_once)


def loader_sizes(loader: object) -> tuple[int | None, int | None]:
    """Returns the images per batch and per pass, over all processes; None if unknown."""
    batches, at_once = batch_sampler_of(loader)
    if batches is None or not isinstance(batches.sampler, Sized):
        return None, None
    size, number = batches.batch_size * at_once, len(batches.sampler)
    return size, number - number % size if batches.drop_last else number


@contextmanager
def without_first(loader: Iterable[Any], batches: int) -> Iterator[Iterable[Any]]:
    """Yields a loader without its first batches; if their order is known, they are not read."""
    of_all, at_once = batch_sampler_of(loader)
    if batches == 0 or of_all is None:
        yield itertools.islice(loader, batches, None) if batches else loader
        return
    order, first = of_all.sampler, batches * of_all.batch_size * at_once
    of_all.sampler = list(itertools.islice(order, first, None))
    try:
        yield loader
    finally:
        of_all.sampler = order


class _BeforeClassifier(Exception):  # noqa: N818
    """Ends a forward pass just before the classifier, which may not be fitted yet."""


class FeatureTap:
    """Keeps the input of a timm model's classifier, forward pass by forward pass.

    With ``ends``, a forward pass ends before the classifier.
    """

    def __init__(
        self, model: nn.Module, classifier: str | None = None, *, ends: bool = False
    ) -> None:
        self._model, self._ends = model, ends
        self._classifier = find_classifiers(model)[chosen_classifier(model, classifier)]
        self._taken: Tensor | None = None
        # Not forward_head(pre_logits=True): for some architectures that is not the input.
        self.hook = self._classifier.register_forward_pre_hook(self._take)

    def _take(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._taken = inputs[0]
        if self._ends:
            raise _BeforeClassifier

    def take(self) -> Tensor:
        """Returns the features (N, D) of the last forward pass, once."""
        taken, self._taken = self._taken, None
        spatial = isinstance(self._classifier, nn.Conv2d)
        spatial = spatial or getattr(self._classifier, "spatial", False)
        if taken is not None and spatial and taken.shape[2:] == (1, 1):
            # A 1×1 convolution takes (N, D, 1, 1).
            taken = taken.flatten(1)
        if taken is None or taken.ndim != 2:
            found = "did not call it" if taken is None else f"gave it {tuple(taken.shape)}"
            raise UsageError(
                "features are the input of the classifier, one vector per image (batch, width), "
                f"but {type(self._model).__name__} {found}"
            )
        return taken


@contextmanager
def backbone(
    model: nn.Module, classifier: str, compute_dtype: ComputeDtype
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields a function from images (B, 3, H, W) to the classifier's input (B, D), float32.

    ``"bfloat16"`` is autocast with the channels last in memory; global pooling keeps float32.
    """
    device = find_classifiers(model)[classifier].weight.device
    dtype = next((w.dtype for w in model.parameters() if w.is_floating_point()), None)
    low = compute_dtype == "bfloat16" and dtype == torch.float32
    autocast = partial(torch.autocast, device.type, torch.bfloat16)

    def features(images: Tensor) -> Tensor:
        images = images.to(device, dtype if images.is_floating_point() else None)
        if low and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(enabled=low), contextlib.suppress(_BeforeClassifier):
            model(images)
        return tap.take().float()

    with ExitStack() as stack:
        _prepare(model, stack, low=low)
        tap = FeatureTap(model, classifier, ends=True)
        stack.callback(tap.hook.remove)
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
            hook = module.register_forward_pre_hook(lambda _, inputs: inputs[0].float())
            stack.callback(hook.remove)
    model.eval()
    for weight in model.parameters():
        if low and weight.ndim == 4:
            # Restored, not converted back: optimizers and others may share their memory.
            stack.callback(setattr, weight, "data", weight.data)
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
