"""Signals that ask a run to stop, noted until it can."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

_NOTICE = b"stopping after this step, then saving; again to stop at once\n"


class StopSignals:
    """Notes SIGINT or SIGTERM in `signal`. The second one is handled as it was before."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if _in_main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, number: int, _: object) -> None:
        self.signal = signal.Signals(number)
        self._restore()
        with contextlib.suppress(OSError):
            # Not through sys.stderr, which may be in the middle of a write; below a progress bar.
            os.write(2, b"\n" * os.isatty(2) + _NOTICE)


@contextlib.contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Makes SIGTERM raise `SystemExit(143)`, so that `with` blocks clean up, unless it is handled.

    Also as a decorator.
    """
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # others cannot set handlers
