"""Feature matrix with its labels, in memory or in a mapped file."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from timm_lt.data.items import as_tensor
from timm_lt.utils.checks import UsageError, check_integer
from timm_lt.utils.longtail import check_labels

# Values read at a time, which bounds the part of a mapped file in memory.
BLOCK = 2**20


@dataclass(frozen=True, eq=False)
class Features:
    """Features of a data set with its labels.

    The values may lie in a mapped file and be larger than memory: they are read block by block.

    Args:
        values: (N, D), floating point: a tensor, or an array, which is not copied. With K views
            (K N, D), view by view: row ``v N + i`` is view v of image i.
        targets: Labels (N,) of any integer type, also as an array or a list; kept as int64 on the
            CPU, wherever the values are.
        views: Augmented views of each image, K >= 1.

    Raises:
        UsageError: If the shapes do not match, a value is not finite, a label is not a
            non-negative integer, or the views have different labels; the message names the row.

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
        self.__dict__["feature_mean"] = _finite_mean(self.values)

    @classmethod
    def from_checked(cls, values: Tensor, targets: Tensor, views: int = 1) -> "Features":
        """Returns features that were checked before, without reading their values."""
        features = object.__new__(cls)
        for name, value in (("values", values), ("targets", targets), ("views", views)):
            object.__setattr__(features, name, value)
        return features

    @cached_property
    def feature_mean(self) -> Tensor:
        """Mean of each column over all rows, (D,) float64; read once, block by block."""
        return _finite_mean(self.values)

    @property
    def num_features(self) -> int:
        """Width D."""
        return self.values.shape[1]

    @property
    def num_images(self) -> int:
        """Number of images N; each has one row per view."""
        return len(self.targets) // self.views

    def first_views(self, views: int) -> "Features":
        """Returns the first views of every image, sharing their memory.

        Raises:
            UsageError: If there are fewer views.
        """
        rows = check_integer("views", views, minimum=1, maximum=self.views) * self.num_images
        return Features.from_checked(self.values[:rows], self.targets[:rows], views)

    def __len__(self) -> int:
        return len(self.targets)


def check_features(features: object, noun: str) -> None:
    """Checks that an argument is :class:`Features`.

    Raises:
        UsageError: If it is not; the message says how to make it.
    """
    if not isinstance(features, Features):
        raise UsageError(
            f"{noun} must be timm_lt.Features, got a {type(features).__name__}: pass "
            "timm_lt.Features(values, targets), or the result of timm_lt.extract_features"
        )


def check_views(
    targets: Tensor, views: int, images: int | None = None, expected: int | None = None
) -> None:
    """Checks that all views have the same images in the same order, as far as labels show it.

    Args:
        targets: Labels of the rows, view by view.
        views: Number of views.
        images: Images that a loader gave over all views, readable or not.
        expected: Images that it should give, if known.

    Raises:
        UsageError: If the loader gave no readable images or another number, or the views have
            different labels; names the first such row.
    """
    check_integer("views", views, minimum=1)
    if images is not None and (len(targets) == 0 or expected not in (None, images)):
        raise UsageError(
            f"the loader gave {images} images, {len(targets)} of them readable; expected "
            f"{expected or 'at least 1'}, each once in each view. With several processes, prepare "
            "the loader with the accelerator and pass accelerator="
        )
    rows = len(targets) // views
    expected_targets = targets[:rows].repeat(views)
    if not targets.equal(expected_targets):
        where = ""
        if len(expected_targets) == len(targets):
            row = int((targets != expected_targets).nonzero()[0])
            where = f": row {row} has label {targets[row]}, not {expected_targets[row]}"
        raise UsageError(
            f"{len(targets)} feature rows are not {views} views of the same images in the same "
            f"order{where}"
        )


def check_finite(values: Tensor, first: int = 0, dtype: torch.dtype | None = None) -> None:
    """Checks that every value (B, D) is finite, also in the type in which it will be stored.

    Raises:
        UsageError: If a value is not finite; names its column, and its row counted from ``first``.
    """
    bad = ~values.to(dtype or values.dtype).isfinite()
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        fault = "; features must be finite"
        if values[row, column].isfinite():
            largest = torch.finfo(dtype or values.dtype).max
            name = str(dtype).removeprefix("torch.")
            fault = f", beyond the largest {name}, {largest:g}: take dtype='float32'"
        raise UsageError(
            f"feature row {first + row} has {float(values[row, column])} in column {column}{fault}"
        )


def _finite_mean(values: Tensor) -> Tensor:
    """Returns the mean of the columns, (D,) float64, after checking that every value is finite."""
    total = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
    rows = max(BLOCK // max(values.shape[1], 1), 1)
    for first in range(0, len(values), rows):
        block = values.detach()[first : first + rows]
        # In float64 the sum of finite values is finite, except for values that need float64.
        sums = block.double().sum(0)
        if not sums.isfinite().all():
            check_finite(block, first)
        total += sums
    return total / len(values)
