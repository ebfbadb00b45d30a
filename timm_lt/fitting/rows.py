"""Reading features some rows at a time: they may lie in a file that is larger than memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Entries of what is made of the rows at a time,
# but at least so many rows, or products would be slow.
ENTRIES, ROWS = 2**22, 64


def row_blocks(values: Tensor, width: int) -> Iterator[Tensor]:
    """Yields features in order, a block at a time, as float32 on the CPU.

    Args:
        values: Features (N, D) of any floating type, which may lie in a mapped file.
        width: Entries that are made of a row; with the row's own they size the blocks.
    """
    step = max(ENTRIES // max(width, values.shape[1]), ROWS)
    for start in range(0, len(values), step):
        yield values[start : start + step].detach().to("cpu", torch.float32)


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Returns some rows of features as float32 on the CPU."""
    # Several times as fast as indexing with them.
    return values.detach().index_select(0, rows.to(values.device)).to("cpu", torch.float32)
