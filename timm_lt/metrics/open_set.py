"""Open-set recognition: a confidence threshold rejects images of unknown classes."""

import copy
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Annotated, Any, Literal, get_args

import torch
from accelerate import Accelerator
from torch import Tensor

from timm_lt.metrics.streaming import check_logits, judge
from timm_lt.utils.checks import UsageError, check_choice, check_fields
from timm_lt.utils.longtail import Labels, check_labels

OpenSetRule = Literal["fb", "oltr"]
# Target of an image of an unknown class.
OPEN = -1


@dataclass(frozen=True)
class OpenSetReport:
    """Open-set accuracies, as fractions; None where the denominator is 0.

    Attributes:
        f_measure: ``2 P R / (P + R)``.
        precision: P.
        recall: R.
        all: Share of images that are right: known ones classified, open ones rejected.
        known: Share of the known images that are accepted and right.
        open: Share of the open images that are rejected.
        rejected_known: Share of the known images that are rejected.
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
        """Returns all fields, JSON-ready."""
        return asdict(self) | {"images": list(self.images)}


@dataclass(eq=False, repr=False)
class OpenSetMetrics:
    """Accumulates the outcomes of known images and of open ones, which have an unknown class.

    An image is rejected if its largest softmax probability is below the threshold. With TP the
    known images that are accepted and right, FP those accepted and wrong, and FN the open images
    that are accepted, ``P = TP / (TP + FP)`` and ``R = TP / (TP + FN)`` as in the authors' code
    (elsewhere an accepted open image is a false positive). Rejected known images are false
    positives in the code of OLTR (``rule="oltr"``), but not in that of Kang et al. (``"fb"``).

    The state is five integers: the report is the same for any order, batches and number of
    processes. First drop the duplicates of the last batch, and images that could not be read, whose
    target -1 would make them open images here.

    Args:
        num_classes: Number of known classes C.
        threshold: Confidence below which an image is rejected, in [0, 1]; 0.1 in the paper; see
            :func:`choose_threshold`.
        rule: Whether rejected known images are false positives.

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019,
        https://arxiv.org/abs/1904.05160

    >>> metrics = OpenSetMetrics(2, threshold=0.6)
    >>> logits = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.1, 0.0], [0.0, 0.0]])
    >>> metrics.update(logits, [0, 0, 0, -1])  # right, wrong, rejected, an open one rejected
    >>> metrics.compute().recall, metrics.compute().all
    (1.0, 0.5)
    """

    num_classes: Annotated[int, 1]
    _: KW_ONLY
    threshold: Annotated[float, "[0, 1]"] = 0.1
    rule: OpenSetRule = "oltr"

    def __post_init__(self) -> None:
        check_fields(self)
        # Known: right, wrong, rejected; open: accepted, rejected.
        self._counts = torch.zeros(5, dtype=torch.long)

    def update(self, logits: Tensor, targets: Labels) -> None:
        """Counts a batch; an error leaves the counts unchanged.

        Args:
            logits: Finite scores of the known classes, (N, C), on any device; N may be 0.
            targets: True classes, (N,), integers in [0, C), and -1 for open images.

        Raises:
            UsageError: If the shapes do not match, or a value is out of range.
        """
        confidences, right, known = _judged(logits, targets, self.num_classes)
        accepted = confidences >= self.threshold
        outcomes = (
            *(accepted & right, accepted & known & ~right, ~accepted & known),
            *(accepted & ~known, ~accepted & ~known),
        )
        self._counts += torch.stack(outcomes).sum(1)

    def merge(self, other: "OpenSetMetrics") -> None:
        """Adds the counts of another accumulator; UsageError if their options differ."""
        for name in ("num_classes", "threshold", "rule"):
            if getattr(self, name) != getattr(other, name):
                raise UsageError(f"only metrics with the same {name} can be merged")
        self._counts += other._counts

    def reduce(self, accelerator: Accelerator) -> "OpenSetMetrics":
        """Returns the sum over all processes, which must all call it; ``self`` keeps its counts."""
        total = copy.copy(self)
        counts = self._counts.to(accelerator.device)
        total._counts = accelerator.reduce(counts, reduction="sum").cpu()
        return total

    def compute(self) -> OpenSetReport:
        """Returns the report on all counted images; UsageError if there are none."""
        right, wrong, rejected, accepted_open, rejected_open = self._counts.tolist()
        known, unknown = right + wrong + rejected, accepted_open + rejected_open
        if known + unknown == 0:
            raise UsageError("no images have been counted: call update with some first")
        positives = right + wrong + (rejected if self.rule == "oltr" else 0)
        return OpenSetReport(
            f_measure=_share(2 * right, positives + right + accepted_open),
            precision=_share(right, positives),
            recall=_share(right, right + accepted_open),
            all=(right + rejected_open) / (known + unknown),
            known=_share(right, known),
            open=_share(rejected_open, unknown),
            rejected_known=_share(rejected, known),
            threshold=self.threshold,
            rule=self.rule,
            images=(known, unknown),
        )


def open_set_report(
    logits: Tensor, targets: Labels, *, threshold: float = 0.1, rule: OpenSetRule = "oltr"
) -> OpenSetReport:
    """Computes the report of :class:`OpenSetMetrics`, with the same arguments, in one call."""
    metrics = OpenSetMetrics(logits.shape[-1], threshold=threshold, rule=rule)
    metrics.update(logits, targets)
    return metrics.compute()


def choose_threshold(logits: Tensor, targets: Labels, *, rule: OpenSetRule = "oltr") -> float:
    """Returns the threshold with the highest F measure, exactly; the lowest of ties.

    The arguments are those of :func:`open_set_report`, on validation, of all processes.

    Raises:
        UsageError: Without open images or right known ones, or as :class:`OpenSetMetrics`.

    >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
    >>> round(choose_threshold(logits, [0, 0, -1]), 3)  # of the second image, 1 / (1 + e^-1)
    0.731
    """
    check_choice("rule", rule, get_args(OpenSetRule))
    confidences, right, known = _judged(logits, targets, logits.shape[-1])
    if known.all() or not right.any():
        raise UsageError(
            "choosing a threshold needs open images (targets -1) and known ones that are right; "
            "or use the paper's 0.1"
        )
    # Cumulative counts with each confidence as the threshold, from high to low.
    confidences, order = confidences.sort(descending=True)
    right, known = right[order], known[order]
    hits, positives = right.cumsum(0), known.cumsum(0)
    accepted_open = (~known).cumsum(0)
    if rule == "oltr":
        positives = known.sum().expand_as(positives)
    f_measure = 2 * hits.double() / (positives + hits + accepted_open).clamp_min(1)
    # Equal confidences are accepted together.
    last = torch.ones_like(known)
    last[:-1] = confidences[1:] != confidences[:-1]
    f_measure, candidates = f_measure[last], confidences[last]
    return float(candidates[f_measure == f_measure.max()].min())


def _judged(logits: Tensor, targets: Labels, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns confidences, known and right, known, each (N,) on the CPU."""
    labels = torch.as_tensor(targets).cpu()
    known = labels != OPEN
    check_logits(logits, len(labels), num_classes)
    if len(labels) == 0:
        return torch.zeros(0, dtype=torch.float64), known, known
    classes = check_labels(labels.masked_fill(~known, 0), num_classes, noun="targets")
    preds, confidences, _ = judge(logits, classes)
    return confidences.double(), known & (preds == classes), known


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
