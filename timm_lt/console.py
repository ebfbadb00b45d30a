"""What a person sees while something runs: a console on standard error, logs, progress bars."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)
log = logging.getLogger("timm_lt")


def start_logging(*, quiet: bool = False) -> None:
    """Sends timm_lt's log to the console; with ``quiet`` only warnings and errors."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
    else:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)


@contextmanager
def progress(description: str, total: int | None, *, unit: str = "") -> Iterator[Progress]:
    """Shows a progress bar while the block runs, if there is a terminal to show it on.

    The bar is the first task of the yielded ``Progress``: ``bar.update(bar.task_ids[0],
    advance=1)``.

    Args:
        description: What is going on.
        total: Number of steps; None shows a pulse.
        unit: What is counted.
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
    """Moves the bar on, and changes its description if one is given."""
    bar.update(bar.task_ids[0], advance=steps, description=description)
