import io
import logging
import re

from rich.console import Console

import timm_lt.utils.console as console_module
from timm_lt.utils.console import advance, log, progress, start_logging


def test_the_log_goes_to_standard_error_once(capsys):
    start_logging()
    start_logging()
    log.info("one %d", 1)
    start_logging(quiet=True)
    log.info("fine")
    log.warning("careful")
    out, err = capsys.readouterr()
    assert (out, err.count("one 1"), err.count("careful")) == ("", 1, 1)
    assert "fine" not in err


def test_a_terminal_shows_the_description_and_the_steps(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(console_module, "console", terminal)
    monkeypatch.setattr(log, "level", logging.INFO)
    with progress("training", 4, unit="updates") as bar:
        advance(bar)
        advance(bar, 2, "fitting crt")
        bar.refresh()
        assert (bar.tasks[0].completed, bar.tasks[0].total) == (3, 4)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "fitting crt" in shown
    assert "3/4 updates" in " ".join(shown.split())
