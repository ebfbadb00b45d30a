"""Calibration: how often predictions of each confidence are right."""

from typing import Any

import torch
from torch import Tensor

from timm_lt.utils.checks import UsageError, check_integer

ECE_BINS = 15


def reliability(confidences: Tensor, right: Tensor, bins: int = ECE_BINS) -> list[dict[str, Any]]:
    """Computes the accuracy of predictions in each confidence bin, JSON-ready.

    With 15 bins, bin b has the images with a confidence in ``((b - 1) / 15, b / 15]``; confidence 0
    is in the first.

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
        Number of images, mean confidence and accuracy of each bin; the last two are None for an
        empty bin.

    Raises:
        UsageError: If there are no images, the shapes differ, or a value is out of range.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017,
        https://arxiv.org/abs/1706.04599
    """
    check_integer("bins", bins, minimum=1)
    if confidences.ndim != 1 or confidences.shape != right.shape or len(right) == 0:
        shapes = f"{tuple(confidences.shape)} and {tuple(right.shape)}"
        raise UsageError(f"confidences and right must be (N,) with N >= 1, got {shapes}")
    # NaN is in no range, since every comparison with it is false.
    in_range = (confidences >= 0) & (confidences <= 1)
    for noun, values, valid, wanted in (
        ("confidences", confidences, in_range, "in [0, 1]"),
        ("right", right, (right == 0) | (right == 1), "0 or 1"),
    ):
        if not valid.all():
            index = int((~valid).nonzero()[0])
            raise UsageError(f"{noun} must be {wanted}: {noun}[{index}] = {values[index].item()}")
    confidences = confidences.double()
    bin_of = confidence_bins(confidences, bins)
    images = torch.bincount(bin_of, minlength=bins)
    sums = [torch.bincount(bin_of, v, minlength=bins) for v in (right.double(), confidences)]
    return describe_bins(images, *sums)


def confidence_bins(confidences: Tensor, bins: int = ECE_BINS) -> Tensor:
    """Returns the bin of each confidence (N,) float64; see :func:`reliability`."""
    # Not torchmetrics: it puts confidences of exactly 1, frequent in float32, into a bin of their
    # own, which overstates the error.
    return (confidences * bins).ceil().long().sub(1).clamp(0, bins - 1)


def describe_bins(images: Tensor, right: Tensor, confidence: Tensor) -> list[dict[str, Any]]:
    """Returns the bins of :func:`reliability` from sums over the images, each (bins,)."""
    return [
        {"images": n, "confidence": c / n if n else None, "accuracy": r / n if n else None}
        for n, r, c in zip(images.tolist(), right.tolist(), confidence.tolist(), strict=True)
    ]


def bin_error(bins: list[dict[str, Any]]) -> float:
    """Returns the calibration error of the bins of :func:`reliability`, not all empty."""
    gaps = [
        part["images"] * abs(part["accuracy"] - part["confidence"])
        for part in bins
        if part["images"]
    ]
    return float(sum(gaps) / sum(part["images"] for part in bins))


def calibration_error(confidences: Tensor, right: Tensor, bins: int = ECE_BINS) -> float:
    """Returns the expected calibration error: ``sum_b |B_b| / N |acc(B_b) - conf(B_b)|``.

    Arguments and errors are those of :func:`reliability`.

    >>> round(calibration_error(torch.tensor([0.9, 0.9, 0.9, 0.5]), torch.tensor([1, 1, 0, 1])), 3)
    0.3

    References:
        Guo et al., ICML 2017, equation 3, https://arxiv.org/abs/1706.04599
    """
    return bin_error(reliability(confidences, right, bins))
