"""Features: what the backbone hands to the classifier, taken once for every image."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from timm_lt.data.reading import UNREADABLE, loaded
from timm_lt.heads import classifier_name, find_classifiers
from timm_lt.longtail import check_labels
from timm_lt.registry import UsageError, unknown_name


class _BeforeClassifier(Exception):  # noqa: N818
    """Ends a forward pass just before the classifier, which may not be fitted yet."""


@dataclass(frozen=True, eq=False)
class Features:
    """Features of a data set with its labels.

    Args:
        values: (N, D), floating point.
        targets: Labels, (N,), of any integer type; kept as int64.

    Raises:
        UsageError: If the shapes do not match, a value is not finite, or a label is not a
            non-negative integer; the message names the row.

    >>> Features(torch.zeros(2, 3), torch.tensor([0, 1])).num_features
    3
    """

    values: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or not self.values.is_floating_point():
            raise UsageError(
                f"feature values must be a floating-point (N, D) matrix, got {self.values.dtype} "
                f"{tuple(self.values.shape)}"
            )
        if self.targets.shape != (len(self.values),):
            raise UsageError(
                f"{len(self.values)} feature rows need as many targets, got targets of shape "
                f"{tuple(self.targets.shape)}"
            )
        check_labels(self.targets, noun="targets")
        object.__setattr__(self, "targets", self.targets.long())
        # A sum over the row is finite unless a value is not, or the row overflows.
        suspects = torch.nonzero(~self.values.sum(1).isfinite()).flatten()
        for row in suspects.tolist():
            bad = ~self.values[row].isfinite()
            if bad.any():
                column = int(bad.nonzero()[0])
                raise UsageError(
                    f"feature row {row} has {float(self.values[row, column])} in column {column}; "
                    "features must be finite"
                )

    @property
    def num_features(self) -> int:
        """Width D."""
        return self.values.shape[1]

    def __len__(self) -> int:
        return len(self.targets)


def extract_features(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    classifier: str | None = None,
    accelerator: Accelerator | None = None,
) -> Features:
    """Runs the backbone once over a data set and keeps the input of the classifier.

    The model runs in evaluation mode without gradients; afterwards each of its modules is in the
    mode in which it came.

    Args:
        model: A timm model with a classifier.
        loader: Yields (images (B, 3, H, W), targets (B,)), in a fixed order. Images with target -1,
            which could not be read, are left out.
        classifier: Path of the classifier whose input is taken, for a model with several (as
            ``head_dist`` of a distilled one); None takes the only one.
        accelerator: If the loader is prepared by one, features are gathered from all processes and
            every process gets all of them, in the order of the data set.

    Returns:
        Features on the CPU, float32: values (N, D) and targets (N,).

    Raises:
        UsageError: If the loader is empty, the model does not call its classifier, calls it for
            more than one vector an image, or has several; or a feature is not finite.
    """
    taken_from = _classifier(model, classifier)
    device = taken_from.weight.device
    taken: list[Tensor] = []

    def take(_: nn.Module, inputs: tuple[Tensor]) -> None:
        taken.append(inputs[0])
        raise _BeforeClassifier

    # Not forward_head(pre_logits=True): for some architectures that is not the classifier's input.
    hook = taken_from.register_forward_pre_hook(take)
    # Module by module: a part of a model in training may have been frozen in evaluation mode.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    values, targets = [], []
    try:
        with torch.inference_mode():
            for images, labels in loaded(loader):
                with contextlib.suppress(_BeforeClassifier):
                    model(images.to(device))
                if not taken:
                    raise UsageError(
                        f"{type(model).__name__} computes its output without calling its classifier"
                    )
                batch = (_as_rows(taken.pop(), taken_from), labels.to(device))
                if accelerator is not None:
                    batch = accelerator.gather_for_metrics(batch)
                values.append(batch[0].float().cpu())
                targets.append(batch[1].cpu())
    finally:
        hook.remove()
        for module, mode in modes:
            module.training = mode
    if not values:
        raise UsageError("the loader has no batches, so there are no features to extract")
    labels = torch.cat(targets)
    readable = labels != UNREADABLE
    return Features(torch.cat(values)[readable], labels[readable])


def _classifier(model: nn.Module, name: str | None) -> nn.Linear | nn.Conv2d:
    classifiers = find_classifiers(model)
    if name is None and len(classifiers) > 1:
        raise UsageError(
            f"{type(model).__name__} has {len(classifiers)} classifiers, each with features of its "
            f"own: pass classifier= with one of {', '.join(classifiers)}"
        )
    name = classifier_name(model) if name is None else name
    if name not in classifiers:
        raise unknown_name(f"classifier of {type(model).__name__}:", name, list(classifiers))
    return classifiers[name]


def _as_rows(values: Tensor, classifier: nn.Module) -> Tensor:
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
