"""Calibration: how often predictions of each confidence are right."""

from typing import Any

import torch
from torch import Tensor

from timm_lt.utils.checks import UsageError, check_integer

ECE_BINS = 15


def reliability(confidences: Tensor, right: Tensor, bins: int = ECE_BINS) -> list[dict[str, Any]]:
    """Returns how often predictions of each confidence are right, JSON-ready.

    Bin ``B_b`` has the images with a confidence in ``((b - 1) / 15, b / 15]``, for 15 bins; the
    first has those of confidence 0 too.

    >>> reliability(torch.tensor([0.25, 1.0, 0.75]), torch.tensor([1, 1, 0]), bins=2)
    [{'images': 1, 'confidence': 0.25, 'accuracy': 1.0},
     {'images': 2, 'confidence': 0.875, 'accuracy': 0.5}]

    Args:
        confidences: Probability of the predicted class, in [0, 1].
        right: Whether the prediction is right.
        bins: Number of bins of equal width.

    Shape:
        confidences (N,), right (N,) with N >= 1.

    Returns:
        For each bin its number of images, their mean confidence and their accuracy; the last two
        are None for an empty bin.

    Raises:
        UsageError: If there are no images, the shapes differ, a confidence is not in [0, 1], a
            value of ``right`` is not 0 or 1, or ``bins`` is not an integer >= 1.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017,
        https://arxiv.org/abs/1706.04599
    """
    check_integer("bins", bins, minimum=1)
    _check_confidences(confidences, right)
    confidences = confidences.double()
    bin_of = confidence_bins(confidences, bins)
    images = torch.bincount(bin_of, minlength=bins)
    sums = [torch.bincount(bin_of, v, minlength=bins) for v in (right.double(), confidences)]
    return describe_bins(images, *sums)


def _check_confidences(confidences: Tensor, right: Tensor) -> None:
    for noun, values in (("confidences", confidences), ("right", right)):
        if not isinstance(values, Tensor) or values.ndim != 1 or len(values) == 0:
            shape = tuple(getattr(values, "shape", ()))
            raise UsageError(
                f"{noun} must be a tensor (N,) with N >= 1, got {type(values).__name__} {shape}"
            )
    if confidences.shape != right.shape:
        raise UsageError(
            f"confidences {tuple(confidences.shape)} and right {tuple(right.shape)} must have one "
            "shape"
        )
    # Of NaN both comparisons are false.
    _check_all((confidences >= 0) & (confidences <= 1), confidences, "confidences", "in [0, 1]")
    _check_all((right == 0) | (right == 1), right, "right", "0 or 1, true or false")


def _check_all(valid: Tensor, values: Tensor, noun: str, wanted: str) -> None:
    if not valid.all():
        index = int((~valid).nonzero()[0])
        raise UsageError(f"{noun} must be {wanted}: {noun}[{index}] = {values[index].item()}")


def confidence_bins(confidences: Tensor, bins: int = ECE_BINS) -> Tensor:
    """Returns the bin of each confidence, (N,) float64, as :func:`reliability` has them."""
    # Not torchmetrics: it puts a confidence of exactly 1, which well-trained networks often reach
    # in float32, into a sixteenth bin and so overstates the error.
    return (confidences * bins).ceil().long().sub(1).clamp(0, bins - 1)


def describe_bins(images: Tensor, right: Tensor, confidence: Tensor) -> list[dict[str, Any]]:
    """Returns the bins of :func:`reliability` from their sums over the images, each (bins,)."""
    return [
        {"images": n, "confidence": c / n if n else None, "accuracy": r / n if n else None}
        for n, r, c in zip(images.tolist(), right.tolist(), confidence.tolist(), strict=True)
    ]


def bin_error(bins: list[dict[str, Any]]) -> float:
    """Returns the calibration error of bins as :func:`reliability` has them, not all empty."""
    gaps = [
        part["images"] * abs(part["accuracy"] - part["confidence"])
        for part in bins
        if part["images"]
    ]
    return float(sum(gaps) / sum(part["images"] for part in bins))


def calibration_error(confidences: Tensor, right: Tensor, bins: int = ECE_BINS) -> float:
    """Returns the expected calibration error: ``sum_b |B_b| / N |acc(B_b) - conf(B_b)|``.

    The bins are those of :func:`reliability`.

    >>> round(calibration_error(torch.tensor([0.9, 0.9, 0.9, 0.5]), torch.tensor([1, 1, 0, 1])), 3)
    0.3

    Args:
        confidences: As there, (N,) in [0, 1].
        right: As there, (N,).
        bins: As there.

    Raises:
        UsageError: As there.

    References:
        Guo et al., ICML 2017, equation 3, https://arxiv.org/abs/1706.04599
    """
    return bin_error(reliability(confidences, right, bins))
