"""Tensors in a safetensors file that is mapped into memory, however large."""

import json
import math
import mmap
import os
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def content(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor, without a copy of them if it is contiguous."""
    array: NDArray[np.uint8] = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return array.data


def map_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a safetensors file, mapped, and its metadata.

    The file may be larger than the memory. ``safetensors.safe_open`` reserves as much as it maps,
    which Linux then refuses. What is written to the tensors does not reach the file.

    Raises:
        ValueError: If it is no such file, or has another length than its header says.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        room = int.from_bytes(file.read(8), "little")
        length = os.fstat(file.fileno()).st_size
        if not 0 < room <= length - 8:
            raise ValueError("its header is cut off")
        header = json.loads(file.read(room))
        metadata = header.pop("__metadata__", {})
        ends = [entry["data_offsets"][1] for entry in header.values()]
        if length != 8 + room + max(ends, default=0):
            raise ValueError(f"{length:,} bytes, but its header says {8 + room + max(ends):,}")
        mapped = _mapped(file)
    tensors = {}
    for name, entry in header.items():
        if name != "padding":
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            offset, count = 8 + room + entry["data_offsets"][0], math.prod(shape)
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset)
            tensors[name] = flat.view(shape)
    return tensors, metadata


def _mapped(file: BinaryIO) -> mmap.mmap:
    if sys.platform == "linux":
        # Python has its name since 3.13.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
