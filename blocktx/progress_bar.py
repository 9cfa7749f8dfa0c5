"""Progress of long work on stderr: a bar on a terminal, otherwise a line every few seconds."""

import contextlib
import io
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
_LINE_EVERY = 10  # seconds, where stderr is not a terminal
_DELAY = 2  # seconds of a call before its time is shown


class ProgressBar(tqdm):
    """A `tqdm` bar that shows counts, speed and the time left.

    On a terminal it is redrawn in place. In a log file or a pipe it prints a line every 10 seconds,
    so work shorter than that prints nothing.
    """

    def __init__(self, *args: Any, **options: Any):
        self._terminal = sys.stderr.isatty()
        if not self._terminal:
            options |= dict(mininterval=_LINE_EVERY, delay=_LINE_EVERY, miniters=1)
        super().__init__(*args, **dict(file=sys.stderr, dynamic_ncols=self._terminal) | options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self._terminal:
            return super().display(msg, pos)
        text = str(self) if msg is None else msg
        if text:
            print(text, file=sys.stderr, flush=True)
        return True

    def close(self) -> None:
        if not self._terminal:
            self.fp = io.StringIO()  # takes the end of a redrawn line
        super().close()

    def count(self, done: float) -> None:
        """Show that `done` of `total` are done."""
        self.update(int(done) - self.n)


@contextlib.contextmanager
def elapsed(what: str) -> Iterator[None]:
    """Show on a terminal how long a call takes that reports no progress, such as a compilation.

    The line appears after 2 seconds and is removed at the end.
    """
    if not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()

    def show() -> None:
        with ProgressBar(
            desc=what, bar_format="{desc}: {elapsed}", leave=False, delay=_DELAY, miniters=0
        ) as bar:
            while not ended.wait(1):
                bar.update(0)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def until_interrupted(
    results: Iterator[T], show: Callable[[T], None], *, none: bool = False
) -> tuple[T | None, bool]:
    """Return the last of growing results, and False if Ctrl-C came before their end.

    Args:
      results: each holds all that was computed so far.
      show: called with each, to move a bar.
      none: return None if Ctrl-C comes before the first result; otherwise it is raised.
    """
    last = None
    try:
        for last in results:
            show(last)
    except KeyboardInterrupt:
        if last is None and not none:
            raise
        return last, False
    return last, True
