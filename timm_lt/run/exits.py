"""How the main job ends: a status, and one line on standard error that says why."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch

from timm_lt.data.decode import is_worker_death
from timm_lt.data.loader import describe_worker_death
from timm_lt.utils.accelerator import is_lost_process, process_rank
from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import error_text, log_traceback
from timm_lt.utils.files import sha256

LOST_PROCESS = "another process of this run has ended; go on with --resume and without --overwrite"
INTERRUPTED = "interrupted; run it again with --resume and without --overwrite to go on"
# How torch reports SIGTERM to a data worker.
WORKER_TERMINATED = "killed by signal: Terminated"
# Where the processes count what they have said.
PREFIX = "timm_lt/exits"


class Terminated(KeyboardInterrupt):
    """SIGTERM, with which a scheduler ends a job."""


def run_to_exit(command: Callable[[], object], interrupted: str = INTERRUPTED) -> int:
    """Runs a command and returns its exit status.

    Of several processes that fail for the same reason, one says so; those that only lost another
    one say nothing if that one did.

    Args:
        command: What to run.
        interrupted: What is said after Ctrl-C and SIGTERM: how to go on.

    Returns:
        0; 2 for a :class:`UsageError`, a data worker that died and another process that ended; 130
        after Ctrl-C, 143 after SIGTERM.
    """
    try:
        with _terminable():
            command()
    except KeyboardInterrupt as error:
        _say(interrupted)
        return 143 if isinstance(error, Terminated) else 130
    except UsageError as error:
        log_traceback(error)
        _say(f"error: {error_text(str(error))}")
    except RuntimeError as error:
        if is_worker_death(error):
            _say(f"error: {describe_worker_death(error)}")
        elif is_lost_process(error):
            _say(f"error: {LOST_PROCESS}", if_silent=True)
        else:
            raise
    else:
        return 0
    return 2


@contextmanager
def _terminable() -> Iterator[None]:
    """Turns SIGTERM into :class:`Terminated`.

    Not among several processes: one that waits for another in a collective would not notice, and
    their launcher wants them to end. A scheduler ends the data workers as well, and torch may
    report that first.
    """
    alone = _num_processes() == 1
    if not alone or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        # Not in the middle of ending: a second one, and the death of a worker.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (UsageError, RuntimeError) as error:
        if WORKER_TERMINATED in str(error):
            raise Terminated from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _say(message: str, *, if_silent: bool = False) -> None:
    """Prints a line unless another process has printed it, or with ``if_silent`` any."""
    if _num_processes() == 1 or _is_first(message, if_silent=if_silent):
        print(message, file=sys.stderr)  # noqa: T201


def _is_first(message: str, *, if_silent: bool) -> bool:
    """Asks the store over which the processes found each other."""
    run = f"{PREFIX}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=5),
        )
        said = store.add(f"{run}/number", 1)
        first: bool = store.add(f"{run}/{sha256(message.encode())}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        # Without a launcher, the store is gone with the first process.
        return process_rank() == 0
    return first and not (if_silent and said > 1)
