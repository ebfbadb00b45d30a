"""For which tau each image is right: one interval per image, from one pass over its logits.

At any tau the label t of a row beats class c where ``tau·rise_c >= lead_c``:

- Logit adjustment, ``z_c − tau·log prior_c``: lead is ``z_c − z_t``, rise is ``log prior_c −
  log prior_t``.
- Tau-normalisation, ``z_c / ‖w_c‖^tau``, with ``z_t > 0``: the logarithm of a positive logit is the
  line ``log z_c − tau·log‖w_c‖``, so lead is ``log(z_c / z_t)`` and rise is ``log‖w_c‖ −
  log‖w_t‖``. A logit that is not positive never wins: its lead is −∞.
- Tau-normalisation with ``z_t < 0``: a class with ``z_c >= 0`` wins at every tau, its lead is ∞.
  Of negative logits the one of least magnitude wins: lead and rise change their signs.
- Tau-normalisation with ``z_t = 0``, which no tau changes: a positive logit always wins, a negative
  one never; lead is the sign of ``z_c``, rise is 0.

So each class gives one bound: a heavier one (``rise > 0``) holds tau to ``>= lead / rise``, a
lighter one (``rise < 0``) to ``<= lead / rise``, one of equal weight allows every tau or none. The
label wins on the interval from the highest lower to the lowest upper bound. A lighter class of
greater lead leaves no ``tau >= 0``: with the classes ordered by norm, only running maxima of the
positive logits ever win, and rows with other labels are dropped before a logarithm is taken.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Entries of the logits that one product gives; with few rows a product is slow.
BLOCK, BLOCK_ROWS = 2**21, 128
# Entries of the logits that are judged at a time, in a few matrices of this size.
PART = 2**18
# Ratios of logits below this count as not positive, and as this, since the logarithm of zero and
# less is slow. It is the smallest difference between lines, too.
SMALLEST, LOG_SMALLEST = 1e-35, -80.0


class IntervalFinder:
    """Finds the taus at which labels win, for a few rows of logits at a time.

    All is computed in the type of the logits: each bound is right for logits that differ from the
    given ones by a few of their roundings, and right at ``tau = 0`` for the given ones.

    Args:
        slopes: What tau counts against each class: ``log‖w_c‖`` or ``log prior_c``, (C,) float64.
        logarithmic: The lines are logarithms of the logits (tau-normalisation), not the logits.
        dtype: Type of the logits.
    """

    def __init__(self, slopes: Tensor, *, logarithmic: bool, dtype: torch.dtype) -> None:
        self.slopes = slopes
        self.logarithmic = logarithmic
        self.classes = torch.arange(len(slopes)).to(dtype)
        # They differ where slopes do; float32 counts exactly up to 16 million.
        self.ranks = slopes.unique(return_inverse=True)[1].to(dtype)
        # By this share of its lead a class that wins ties lies higher: it exceeds the rounding of
        # the bounds, and no order at tau = 0 depends on it.
        self.tie = 4 * torch.finfo(dtype).eps
        self.largest = torch.finfo(dtype).max
        self.max_rows = max(PART // len(slopes), 1)
        # Fresh memory for each step would take longer than the step.
        self.work = torch.empty(4, self.max_rows, len(slopes), dtype=dtype)

    def __call__(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the first and the last tau >= 0 at which each label wins; (inf, -inf) if none.

        Shape:
            logits (B, C) with B <= ``max_rows``, targets (B,); (B,) each.
        """
        low = torch.full((len(logits),), math.inf, dtype=logits.dtype)
        high = -low
        alive = (~self._hopeless(logits, targets)).nonzero().flatten()
        low[alive], high[alive] = self._bounds(logits, targets[alive], alive)
        return low, high

    def _hopeless(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns which labels (B,) surely win at no tau >= 0, from comparisons alone."""
        column = targets[:, None]
        own = logits.gather(1, column)
        above, lighter = self.work[:2, : len(logits)]
        torch.sub(logits, own, out=above)
        torch.sub(self.ranks[column], self.ranks, out=lighter)
        # The smaller of the two is positive where both are: a lighter class lies higher.
        beaten = torch.minimum(above, lighter, out=lighter).amax(1) > 0
        if not self.logarithmic:
            return beaten
        return torch.where(own[:, 0] > 0, beaten, logits.amax(1) > 0)

    def _bounds(self, logits: Tensor, targets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the interval of the labels (B,) of some rows of the logits."""
        lead, rise, heavier, lighter = self.work[:, : len(rows)]
        torch.index_select(logits, 0, rows, out=lead)
        column = targets[:, None]
        own = lead.gather(1, column)
        # The difference in float64, or norms that are almost equal would count as equal.
        torch.sub(self.slopes, self.slopes[column], out=rise)
        if self.logarithmic:
            _log_ratios(lead, rise, own)
        else:
            lead -= own
        # Classes before the label win ties, those after it lose them.
        before = torch.sub(column.to(lead.dtype), self.classes, out=heavier).clamp_(-1, 1)
        size = torch.abs(lead, out=lighter).clamp_(max=self.largest)
        lead += size.mul_(self.tie).add_(SMALLEST).mul_(before)
        # The label itself sets no bound.
        lead.scatter_(1, column, -1.0)
        torch.clamp(rise, min=0, out=heavier)
        torch.sub(heavier, rise, out=lighter)
        # Divided by the 0 of a class that is not heavier, a lead below 0 gives -inf, no bound, and
        # one above 0 inf, no tau at all.
        low = torch.div(lead, heavier, out=heavier).amax(1).clamp_min_(0)
        # A class that is not lighter gives -inf, no bound.
        high = -torch.div(lead.clamp_max_(-SMALLEST), lighter, out=lighter).amax(1)
        return low, high.masked_fill_(low == math.inf, -math.inf)


def _log_ratios(logits: Tensor, rise: Tensor, own: Tensor) -> None:
    """Turns logits (B, C) into their leads over the label's, in place, and rises with them."""
    sign = own.sign()
    zero = (own[:, 0] == 0).nonzero().flatten()
    signs = logits[zero].sign()
    # Not by 0: the logarithms of what comes out are slow.
    logits.div_(own.masked_fill(own == 0, 1)).clamp_min_(SMALLEST).log_()
    F.threshold(logits, LOG_SMALLEST, -math.inf, inplace=True)
    if (sign != 1).any():
        logits.mul_(sign)
        # Adding 0 turns -0 into 0, which division tells apart.
        rise.mul_(sign).add_(0.0)
    logits[zero] = signs


def winning_intervals(
    blocks: Iterator[Tensor], targets: Tensor, find: IntervalFinder
) -> tuple[Tensor, Tensor]:
    """Returns the interval of tau of every row of the blocks of logits, one after the other.

    Shape:
        blocks of (any, C), together N rows; targets (N,); (N,) float64 each.
    """
    low, high = torch.empty(2, len(targets), dtype=torch.float64)
    start = 0
    for block in blocks:
        for logits in block.split(find.max_rows):
            rows = slice(start, start + len(logits))
            low[rows], high[rows] = find(logits, targets[rows])
            start += len(logits)
    return low, high


def logit_blocks(
    values: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None
) -> Iterator[Tensor]:
    """Yields the logits, some rows at a time, so that memory does not grow with the features.

    Args:
        values: Features (N, D), which may lie in a mapped file.
        weight: The classifier, (C, D) on the CPU; logits are computed in its type.
        bias: Its bias, (C,), or None.
        rows: Indices of the rows to take, (M,); None for all.
    """
    count = len(values) if rows is None else len(rows)
    step = max(BLOCK // max(weight.shape), BLOCK_ROWS)
    for start in range(0, count, step):
        chosen = slice(start, start + step)
        block = values[chosen if rows is None else rows[chosen].to(values.device)]
        yield F.linear(block.detach().to("cpu", weight.dtype), weight, bias)
