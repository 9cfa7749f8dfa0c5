"""Bars in logs, and results of work that Ctrl-C ends."""

import io
import sys
import time

import pytest

from blocktx import progress_bar
from blocktx.progress_bar import ProgressBar, elapsed, until_interrupted


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_short_work_is_silent_in_a_log(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with ProgressBar(total=3) as bar:
        for _ in range(3):
            bar.update()
    assert sys.stderr.getvalue() == ""


def test_long_work_has_lines_with_the_time_left_in_a_log(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress_bar, "_LINE_EVERY", 0)
    with ProgressBar(total=4, desc="text", unit=" rows") as bar:
        for done in (1, 3):
            bar.count(done)
    lines = sys.stderr.getvalue().splitlines()
    assert lines[-1].startswith("text:  75%")
    assert "3/4" in lines[-1]
    assert "<" in lines[-1]  # elapsed<left
    assert all("\r" not in line for line in lines)


def test_a_terminal_is_redrawn(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with ProgressBar(total=2, mininterval=0) as bar:
        bar.update()
    assert "\r" in sys.stderr.getvalue()


def test_a_terminal_shows_the_time_of_a_call_without_progress(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress_bar, "_DELAY", 0.5)

    def compile_until_shown():
        end = time.monotonic() + 30
        while "compiling: 00:0" not in sys.stderr.getvalue() and time.monotonic() < end:
            time.sleep(0.05)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), elapsed("compiling"):
        compile_until_shown()
    printed = sys.stderr.getvalue()
    assert "compiling: 00:0" in printed
    assert printed.split("\r")[-2].strip() == ""  # the line is removed


@pytest.mark.parametrize(("stream", "delay"), [(Terminal, 60), (io.StringIO, 0)])
def test_a_short_call_and_a_log_are_silent(stream, delay, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr(progress_bar, "_DELAY", delay)
    with elapsed("compiling"):
        time.sleep(0.01)
    assert sys.stderr.getvalue().strip() == ""


def growing(last, *, interrupted):
    yield from range(1, last + 1)
    if interrupted:
        raise KeyboardInterrupt


def test_results_until_ctrl_c():
    shown = []
    assert until_interrupted(growing(3, interrupted=False), shown.append) == (3, True)
    assert shown == [1, 2, 3]
    assert until_interrupted(growing(2, interrupted=True), shown.append) == (2, False)
    with pytest.raises(KeyboardInterrupt):
        until_interrupted(growing(0, interrupted=True), shown.append)
    assert until_interrupted(growing(0, interrupted=True), print, none=True) == (None, False)
