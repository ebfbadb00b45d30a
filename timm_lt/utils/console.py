"""Console output: help text, and logging and progress bars on standard error."""

import logging
import shutil
import textwrap
import traceback
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)
log = logging.getLogger("timm_lt")
# Width of tables that are not on a terminal.
WIDE = 130
STATUS = "Exit status: 0 on success, 2 for a mistake (one line on stderr), 130 after Ctrl-C."


def start_logging(*, quiet: bool = False, verbose: bool = False) -> None:
    """Sends timm_lt's log to the console, without Pillow's warnings."""
    ignore_pillow_warnings()
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
    else:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)


def ignore_pillow_warnings() -> None:
    """Ignores Pillow's warnings in this process, a command or data worker: one per file."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


@contextmanager
def pillow_warnings_ignored() -> Iterator[None]:
    """Ignores Pillow's warnings in a block or, as a decorator, in a function."""
    with warnings.catch_warnings():
        ignore_pillow_warnings()
        yield


def result_console() -> Console:
    """Returns a console for results on standard output; wide if it is not a terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=WIDE)


def log_traceback(error: BaseException) -> None:
    """Logs the traceback of an error at level debug, without control characters."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        indent = len(line) - len(line.lstrip(" "))
        log.debug("%s%s", " " * indent, one_line(line, 2000))


@contextmanager
def progress(description: str, total: int | None, *, unit: str = "") -> Iterator[Progress]:
    """Shows a progress bar, or a pulse without a total, if standard error is a terminal.

    :func:`advance` moves the bar.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal or log.level > logging.INFO
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        bar.add_task(description, total=total)
        yield bar


def advance(bar: Progress, steps: int = 1, description: str | None = None) -> None:
    """Advances the bar, and changes its description if one is given."""
    bar.update(bar.task_ids[0], advance=steps, description=description)


def wrapped(text: str) -> str:
    """Wraps a paragraph to the width of the terminal."""
    return textwrap.fill(text, max(40, shutil.get_terminal_size().columns - 2))


def epilog(examples: Sequence[str]) -> str:
    """Returns the text below the options in the help of a command: examples and exit status."""
    lines = [f"  {example}" for example in examples]
    return "\n".join(["examples:", *lines, "", wrapped(STATUS)])


def one_line(text: str, limit: int = 80) -> str:
    """Returns an untrusted text as one line without control characters, cut to a length."""
    # Control and format characters, lone surrogates; line and paragraph separators.
    odd = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    text = "".join(" " if unicodedata.category(c) in odd else c for c in text[: 4 * limit])
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def error_text(message: str) -> str:
    """Returns an error message, which may quote a file or a repo, without control characters."""
    lines = [one_line(line, 2000) for line in message.split("\n")[:100]]
    return "\n".join(line for line in lines if line)
