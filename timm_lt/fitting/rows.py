"""Reading features some rows at a time: they may lie in a file that is larger than memory."""

import mmap
import os
import tempfile
from collections.abc import Iterator

import torch
from torch import Tensor

# Entries of what is made of the rows at a time; but at least so many rows, or products are slow.
ENTRIES, ROWS = 2**22, 64
# Bytes beyond which a scratch matrix lies in a file.
MAX_BYTES = 4 * 2**30
# Bytes of such a file that are written at a time.
BLOCK_BYTES = 2**24


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


def scratch_matrix(rows: int, columns: int) -> Tensor:
    """Returns a float32 matrix to be filled; a large one lies in a file that goes away with it.

    Raises:
        OSError: If there is no room for the file.
    """
    if 4 * rows * columns <= MAX_BYTES:
        return torch.empty(rows, columns)
    size = 4 * rows * columns
    # Without a name: Windows would neither open it twice nor remove it while it is mapped.
    with tempfile.TemporaryFile() as file:
        # All of it now: a full disk would end the process when a page is written.
        if hasattr(os, "posix_fallocate"):  # Linux only
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            for start in range(0, size, BLOCK_BYTES):
                file.write(bytes(min(BLOCK_BYTES, size - start)))
            file.flush()
        mapped = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(mapped, dtype=torch.float32).view(rows, columns)
