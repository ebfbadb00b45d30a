"""Open-set recognition: images of no known class are to be rejected, by a threshold."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from torch import Tensor

from timm_lt.metrics.streaming import check_finite, check_logits, judge
from timm_lt.utils.checks import UsageError, check_choice, check_integer, check_number
from timm_lt.utils.longtail import Labels, check_labels

OpenSetRule = Literal["fb", "oltr"]
# Target of an image of no known class.
OPEN = -1


@dataclass(frozen=True)
class OpenSetReport:
    """What a classifier that may reject images gets right; all figures are fractions.

    Attributes:
        f_measure: ``2 P R / (P + R)``, 0 if nothing is right; None without any image that P or R
            counts.
        precision: P, None if nothing is accepted (with the rule ``"oltr"``, without known images).
        recall: R, None if no known image is right and no open one accepted.
        all: Share of all images that are right: known ones in their class, open ones rejected.
        known: Share of the known images that are accepted and in their class, None without any.
        open: Share of the open images that are rejected, None without any.
        rejected_known: Share of the known images that are rejected, None without any.
        threshold: Confidence below which images are rejected.
        rule: Whether rejected known images are false positives.
        images: Number of known and of open images.
    """

    f_measure: float | None
    precision: float | None
    recall: float | None
    all: float
    known: float | None
    open: float | None
    rejected_known: float | None
    threshold: float
    rule: OpenSetRule
    images: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Returns every field in types that JSON has."""
        return asdict(self) | {"images": list(self.images)}


class OpenSetMetrics:
    """Counts what a classifier says of known images and of open ones, which have no known class.

    An image is rejected if its largest softmax probability is below the threshold. With TP known
    images that are accepted and right, FP those that are accepted and wrong, and FN open images
    that are accepted, ``P = TP / (TP + FP)`` and ``R = TP / (TP + FN)``, both as in the authors'
    code. (Elsewhere an open image that is accepted is a false positive.) Known images that are
    rejected are false positives too in the code of OLTR (``rule="oltr"``), and are not in that of
    Kang et al. (``"fb"``), which so costs nothing but the right answers that are lost.

    All that is kept are five integers: the report is the same for any order of the images, any
    batches and any number of processes. As with :class:`ShotMetrics`, drop the duplicates that fill
    up the last batch first, and images that could not be read: a loader gives them the target -1,
    which is that of an open image here.

    Args:
        num_classes: Number of known classes C.
        threshold: Confidence below which an image is rejected, in [0, 1]; 0.1 in the paper. See
            :func:`choose_threshold`.
        rule: Whether rejected known images are false positives.

    Raises:
        UsageError: If an argument is out of range.

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019,
        https://arxiv.org/abs/1904.05160

    >>> metrics = OpenSetMetrics(2, threshold=0.6)
    >>> logits = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.1, 0.0], [0.0, 0.0]])
    >>> metrics.update(logits, [0, 0, 0, -1])  # right, wrong, rejected, an open one rejected
    >>> report = metrics.compute()
    >>> report.precision, report.recall, report.all
    (0.3333333333333333, 1.0, 0.5)
    """

    def __init__(
        self, num_classes: int, *, threshold: float = 0.1, rule: OpenSetRule = "oltr"
    ) -> None:
        self.num_classes = check_integer("num_classes", num_classes, minimum=1)
        self.threshold = check_number("threshold", threshold, "[0, 1]")
        check_choice("rule", rule, get_args(OpenSetRule))
        self.rule = rule
        # Known: right, wrong, rejected; open: accepted, rejected.
        self._counts = torch.zeros(5, dtype=torch.long)

    def update(self, logits: Tensor, targets: Labels) -> None:
        """Counts some images; a mistake in them leaves the counts as they were.

        Args:
            logits: Finite scores of the known classes, on any device.
            targets: True classes, integers in [0, C), and -1 for open images.

        Shape:
            logits (N, C), targets (N,); N may be 0.

        Raises:
            UsageError: If the shapes do not fit together, a target is out of range, or a logit is
                not finite.
        """
        confidences, right, known = _judged(logits, targets, self.num_classes)
        accepted = confidences >= self.threshold
        self._counts += torch.stack(
            [
                (accepted & right).sum(),
                (accepted & known & ~right).sum(),
                (~accepted & known).sum(),
                (accepted & ~known).sum(),
                (~accepted & ~known).sum(),
            ]
        )

    def merge(self, other: "OpenSetMetrics") -> None:
        """Counts the images that another accumulator counted.

        Raises:
            UsageError: If the two differ in classes, threshold or rule.
        """
        for name in ("num_classes", "threshold", "rule"):
            if getattr(self, name) != getattr(other, name):
                raise UsageError(f"only metrics with the same {name} can be merged")
        self._counts += other._counts

    def reduce(self, accelerator: Accelerator) -> "OpenSetMetrics":
        """Returns the metrics of the images that all processes have counted, the same on each.

        Every process must call it, unless it gathered the logits of all before it counted them.
        This accumulator keeps what this process has counted.

        Args:
            accelerator: Adds up over the processes.
        """
        whole = OpenSetMetrics(self.num_classes, threshold=self.threshold, rule=self.rule)
        counts = self._counts.to(accelerator.device)
        whole._counts = accelerator.reduce(counts, reduction="sum").cpu()
        return whole

    def compute(self) -> OpenSetReport:
        """Returns the report on all images that were counted.

        Raises:
            UsageError: If there are none.
        """
        right, wrong, rejected, accepted_open, rejected_open = self._counts.tolist()
        known, of_none = right + wrong + rejected, accepted_open + rejected_open
        if known + of_none == 0:
            raise UsageError("no images have been counted: call update with some first")
        positives = right + wrong + (rejected if self.rule == "oltr" else 0)
        return OpenSetReport(
            f_measure=_share(2 * right, positives + right + accepted_open),
            precision=_share(right, positives),
            recall=_share(right, right + accepted_open),
            all=(right + rejected_open) / (known + of_none),
            known=_share(right, known),
            open=_share(rejected_open, of_none),
            rejected_known=_share(rejected, known),
            threshold=self.threshold,
            rule=self.rule,
            images=(known, of_none),
        )


def open_set_report(
    logits: Tensor, targets: Labels, *, threshold: float = 0.1, rule: OpenSetRule = "oltr"
) -> OpenSetReport:
    """Computes the figures of :class:`OpenSetMetrics` for images that are there at once.

    Args:
        logits: Finite scores of the known classes, (N, C).
        targets: True classes in [0, C), and -1 for open images, (N,).
        threshold: As there.
        rule: As there.

    Raises:
        UsageError: As there.
    """
    check_logits(logits)
    metrics = OpenSetMetrics(logits.shape[1], threshold=threshold, rule=rule)
    metrics.update(logits, targets)
    return metrics.compute()


def choose_threshold(logits: Tensor, targets: Labels, *, rule: OpenSetRule = "oltr") -> float:
    """Returns the threshold with the highest F measure on validation, exactly; of equals the least.

    Args:
        logits: Finite scores of the known classes, (N, C), of all processes together.
        targets: True classes in [0, C), and -1 for open images, (N,).
        rule: As of :class:`OpenSetMetrics`.

    Raises:
        UsageError: As there, or if there are no open images, or no known one is right at any
            threshold.

    >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
    >>> round(choose_threshold(logits, [0, 0, -1]), 3)  # that of the second, 1 / (1 + e^-1)
    0.731
    """
    check_choice("rule", rule, get_args(OpenSetRule))
    check_logits(logits)
    confidences, right, known = _judged(logits, targets, logits.shape[1])
    if known.all():
        raise UsageError(
            "a threshold is chosen on open images too, targets -1, and there are none: give some, "
            "or take the paper's 0.1"
        )
    if not right.any():
        raise UsageError("no known image is right, so every threshold has an F measure of 0")
    # At each confidence as the threshold, from high to low: what is accepted.
    confidences, order = confidences.sort(descending=True)
    right, known = right[order], known[order]
    hits, positives = right.cumsum(0), known.cumsum(0)
    accepted_open = (~known).cumsum(0)
    if rule == "oltr":
        positives = known.sum().expand_as(positives)
    f_measure = 2 * hits.double() / (positives + hits + accepted_open).clamp_min(1)
    # Of equal confidences all are accepted or none.
    last = torch.ones_like(known)
    last[:-1] = confidences[1:] != confidences[:-1]
    f_measure, candidates = f_measure[last], confidences[last]
    return float(candidates[f_measure == f_measure.max()].min())


def _judged(logits: Tensor, targets: Labels, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns confidences, and whether images are known and right, and known; (N,) on the CPU."""
    check_logits(logits)
    given = torch.as_tensor(targets).cpu()
    known = given != OPEN
    if logits.shape != (len(given), num_classes):
        raise UsageError(
            f"logits must be (N, C) = {(len(given), num_classes)} as targets and num_classes have "
            f"it, got {tuple(logits.shape)}"
        )
    if len(given) == 0:
        return torch.zeros(0, dtype=torch.float64), known, known
    classes = check_labels(given.masked_fill(~known, 0), num_classes, noun="targets")
    check_finite(logits)
    preds, confidences, _ = judge(logits, classes)
    return confidences.double(), known & (preds == classes), known


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
