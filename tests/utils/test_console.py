import io
import logging
import re

import pytest
from rich.console import Console

import timm_lt.utils.console as console_module
from timm_lt.utils.console import advance, console, error_text, log, progress, start_logging


@pytest.fixture(autouse=True)
def _restore():
    before = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.level, log.propagate = before


def test_the_log_goes_to_standard_error_once(capsys):
    start_logging()
    start_logging()
    log.info("one %d", 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("one 1") == 1


def test_quiet_keeps_warnings(capsys):
    start_logging(quiet=True)
    log.info("fine")
    log.warning("careful")
    err = capsys.readouterr().err
    assert "fine" not in err
    assert "careful" in err
    assert log.level == logging.WARNING


def test_progress_counts_and_shows_nothing_without_a_terminal(capsys):
    assert not console.is_terminal
    with progress("counting", 3, unit="steps") as bar:
        advance(bar)
        advance(bar, 2, "done")
        task = bar.tasks[0]
        assert (task.completed, task.total, task.description) == (3, 3, "done")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_what_is_done_and_how_far(monkeypatch):
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


def test_an_error_keeps_its_lines_and_loses_what_moves_the_cursor():
    assert error_text("2 problems\n- a\x1b[2J\rb\n\n- c") == "2 problems\n- a [2J b\n- c"
