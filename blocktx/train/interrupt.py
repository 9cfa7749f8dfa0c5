"""What asks a run to stop, noted until it can: signals, and notices of Google Cloud."""

import contextlib
import os
import signal
import threading
import time
import urllib.error
from collections.abc import Iterator
from typing import Any

from blocktx.parallel import is_google_vm, metadata

# What a VM is told a minute before its host is serviced, or 30 seconds before it is preempted
# (https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice). Live migration,
# which is another value of the first, stops nothing.
_NOTICES = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}


_STOPPING = b"stopping after this step, then saving; Ctrl-C to stop at once\n"


_WAIT = 60  # seconds that the metadata server holds a question back for an answer to change


class StopSignals:
    """Notes SIGINT or SIGTERM in `signal`, or a Google VM's notice that it will be stopped.

    The notice counts as SIGTERM. Further SIGTERMs change nothing: a machine that shuts down sends
    one to every process, and its parents may pass it on. SIGINT after any of these is handled as it
    was before.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._left = False

    def __enter__(self) -> "StopSignals":
        if _in_main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        if is_google_vm():
            for path, notice in _NOTICES.items():
                threading.Thread(target=self._watch, args=(path, notice), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        for number in list(self._previous):
            self._restore(number)

    def _restore(self, number: signal.Signals) -> None:
        if number in self._previous:
            signal.signal(number, self._previous.pop(number))

    def _note(self, number: int, _: object) -> None:
        self._restore(signal.SIGINT)
        self._stop(signal.Signals(number), b"")

    def _stop(self, number: signal.Signals, why: bytes) -> None:
        if self.signal is not None:
            return
        self.signal = number
        with contextlib.suppress(OSError):
            # Not through sys.stderr, which may be in the middle of a write; below a progress bar.
            os.write(2, b"\n" * os.isatty(2) + why + _STOPPING)

    def _watch(self, path: str, notice: str) -> None:
        """Waits for the metadata at `path` to be `notice`; runs in a thread of its own."""
        etag = "0"  # of no value: the first answer comes at once
        while not self._left and self.signal is None:
            query = dict(wait_for_change="true", last_etag=etag, timeout_sec=_WAIT)
            try:
                value, etag = metadata(path, timeout=_WAIT + 10, **query)
            except urllib.error.HTTPError as error:
                if error.code == 404:  # in a container whose metadata server knows less
                    return
                time.sleep(1)
            except OSError:
                time.sleep(1)
            else:
                if value == notice and not self._left:
                    self._stop(signal.SIGTERM, f"Google Cloud says {path}={value}: ".encode())


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
