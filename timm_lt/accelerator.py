"""The processes and processors of a run: accelerate, threads and numerical precision."""

import ctypes
import os
import platform
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs

from timm_lt.registry import UsageError, check_choice, check_integer

MixedPrecision = Literal["auto", "no", "bf16", "fp16"]


def check_precision(precision: MixedPrecision) -> None:
    """Checks that this machine has a precision.

    Raises:
        UsageError: If not.
    """
    if precision == "fp16" and not torch.accelerator.is_available():
        raise UsageError("mixed_precision fp16 needs a GPU: take auto, bf16 or no")


def create_accelerator(
    *,
    mixed_precision: MixedPrecision = "auto",
    accumulation_steps: int = 1,
    compiled: bool = False,
    tracker: str = "none",
    folder: Path | None = None,
) -> Accelerator:
    """Creates the accelerator of a run: the batch size counts images over all processes.

    Whatever is not given here is as ``accelerate config`` left it: processes, machines, FSDP, a
    compiler.

    Args:
        mixed_precision: ``"auto"`` takes bf16 where the processor computes it natively (a GPU that
            can, or a CPU with avx512_bf16) and full precision elsewhere, unless ``accelerate
            launch`` asks for another than its default, ``"no"``.
        accumulation_steps: Batches over which the gradient of an update is summed, >= 1.
        compiled: Compile the model with torch.compile.
        tracker: ``"none"`` or a tracker that accelerate knows and that is installed.
        folder: Where a tracker that writes files writes.

    Raises:
        UsageError: If the tracker is unknown or not installed, or the precision is not one of this
            machine's.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if tracker != "none":
        known = [str(kind) for kind in LOGGER_TYPE_TO_CLASS]
        check_choice("tracker", tracker, ("none", *known))
        if tracker not in [str(kind) for kind in get_available_trackers()]:
            raise UsageError(f"tracker {tracker!r} is not installed: pip install {tracker}")
    precision = mixed_precision
    if mixed_precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        precision = native_precision() if launched == "no" else launched  # type: ignore[assignment]
    check_precision(precision)
    check_integer("accumulation_steps", accumulation_steps, minimum=1)
    try:
        return Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=accumulation_steps,
            dynamo_backend="inductor" if compiled else None,
            log_with=None if tracker == "none" else tracker,
            project_dir=folder,
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            # The main process fits heads while the others wait for it.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
        )
    except ValueError as error:
        raise UsageError(f"mixed_precision {precision}: {error}") from error


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Restores the random states of Python, NumPy and torch (CPU and CUDA) afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    # Asking for the state of a GPU would initialize CUDA.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def set_cpu_threads(threads: int | None = None) -> int:
    """Sets the number of threads that torch computes with in this process.

    ``accelerate launch`` gives every process one thread unless told otherwise, which leaves cores
    idle; under it, the default is this process's share of the cores. Elsewhere it is torch's own.

    Args:
        threads: The number, >= 1; None is the default.

    Returns:
        The number.
    """
    if threads is None and "ACCELERATE_MIXED_PRECISION" in os.environ:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        threads = max(available_cores() // processes, 1)
    if threads is not None:
        torch.set_num_threads(check_integer("threads", threads, minimum=1))
    return torch.get_num_threads()


def keep_freed_memory() -> bool:
    """Makes the C library keep memory that is freed, for what is allocated next.

    The activations and gradients of an update are freed at its end. glibc would return the large
    ones to the system, which clears their pages and maps them again at every update: a few percent
    of the time of training on a CPU. The process stays as large as it was at its largest.

    Returns:
        Whether the C library is one that does.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0))


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def native_precision() -> Literal["no", "bf16"]:
    """Returns ``"bf16"`` where this machine computes it faster than float32, else ``"no"``."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"


def is_lost_process(error: BaseException) -> bool:
    """Tells whether torch reports that another process of the run is gone."""
    if not torch.distributed.is_available() or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)
