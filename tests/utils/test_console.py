import io
import logging
import re

from rich.console import Console

import timm_lt.utils.console as console_module
from timm_lt.utils.console import log, start_logging


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
    monkeypatch.setattr(console_module.log, "level", logging.INFO)
    with console_module.progress("training", 4, unit="updates") as bar:
        console_module.advance(bar)
        console_module.advance(bar, 2, "fitting crt")
        bar.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "fitting crt" in shown
    assert "3/4 updates" in " ".join(shown.split())
