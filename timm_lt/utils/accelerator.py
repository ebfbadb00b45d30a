"""Processes, devices, threads and numerical precision of a run."""

import os
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState, is_initialized
from accelerate.utils import (
    DataLoaderConfiguration,
    InitProcessGroupKwargs,
    extract_model_from_parallel,
    parse_flag_from_env,
)
from torch import nn

from timm_lt.utils.checks import UsageError, check_choice, check_integer, user_errors

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
MixedPrecision = Literal["auto", "no", "bf16", "fp16"]
# Held while the settings of the process differ from the caller's: calls in threads take turns.
STATE_LOCK = threading.RLock()


def create_accelerator(
    *,
    mixed_precision: MixedPrecision = "auto",
    accumulation_steps: int = 1,
    compiled: bool = False,
    tracker: str = "none",
    folder: Path | None = None,
) -> Accelerator:
    """Creates the accelerator of a run: the batch size counts images over all processes.

    The precision ``"auto"`` is that of ``accelerate launch``, unless it is ``"no"``, its default;
    then it is that of :func:`native_precision`. The folder is for trackers that write files.
    """
    from accelerate.tracking import get_available_trackers

    trackers = ("none", *map(str, get_available_trackers()))
    check_choice("or not installed tracker", tracker, trackers)
    precision = mixed_precision
    if mixed_precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        precision = native_precision() if launched == "no" else launched  # type: ignore[assignment]
    if precision == "fp16" and not torch.accelerator.is_available():
        raise UsageError("mixed_precision fp16 needs a GPU; choose auto, bf16 or no")
    check_integer("accumulation_steps", accumulation_steps, minimum=1)
    with user_errors(f"mixed_precision {precision}", ValueError):
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


@contextmanager
def temporary_accelerator() -> Iterator[Accelerator]:
    """Yields an accelerator in full precision, and restores accelerate's state afterwards."""
    with fresh_accelerate():
        yield create_accelerator(mixed_precision="no")


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Lets a block create an accelerator of any precision; restores accelerate's state afterwards.

    Accelerate has one state per process: a second ``Accelerator`` of another precision or
    accumulation fails or changes the first. The caller's device and processes are kept.
    """
    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    kept, environment = [dict(state) for state in states], set(os.environ)
    had_group = _has_process_group()
    try:
        for state in states[1:]:
            state.clear()
        yield
    finally:
        for state, before in zip(states, kept, strict=True):
            state.clear()
            state.update(before)
        if _has_process_group() and not had_group:
            # Left open, gloo may abort when the interpreter ends.
            torch.distributed.destroy_process_group()
        for name in os.environ.keys() - environment:
            del os.environ[name]


def _has_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


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


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Runs a block with torch's defaults, and restores the caller's settings afterwards.

    These are the random states, inference mode, autocast, and the default device and type of
    tensors. One thread at a time runs a block.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(STATE_LOCK)
        stack.enter_context(kept_random_state())
        stack.enter_context(torch.inference_mode(mode=False))
        for device in {"cpu", default_device().type}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


def default_device() -> torch.device:
    """Returns the device that accelerate computes on, without initializing accelerate."""
    if is_initialized():
        return torch.device(PartialState().device)
    if name := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        return torch.device(name)
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the module inside DistributedDataParallel, DataParallel and torch.compile."""
    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner if inner is model else unwrapped(inner)


def process_rank() -> int:
    """Returns the rank of this process under a launcher; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def set_cpu_threads(threads: int | None = None) -> int:
    """Sets and returns the number of threads that torch uses in this process.

    None is its share of the cores under ``accelerate launch``, and torch's own default elsewhere.
    """
    if threads is None and "ACCELERATE_MIXED_PRECISION" in os.environ:
        threads = max(available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    if threads is not None:
        torch.set_num_threads(check_integer("threads", threads, minimum=1))
    return torch.get_num_threads()


def visible_devices() -> list[str]:
    """Returns the GPUs, each as ``CUDA_VISIBLE_DEVICES`` names it to a process."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = os.environ.get(VISIBLE_DEVICES)
    return names.split(",")[:count] if names else [str(number) for number in range(count)]


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    # Only Linux has the affinity of a process.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def native_precision() -> Literal["no", "bf16"]:
    """Returns ``"bf16"`` where this machine computes it faster than float32, else ``"no"``."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"


def is_lost_process(error: BaseException) -> bool:
    """Returns whether torch reports that another process of the run is gone."""
    if not torch.distributed.is_available() or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)
