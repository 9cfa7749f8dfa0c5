"""Deferred stop requests: signals and preemption notices of Google Cloud."""

import contextlib
import os
import signal
import threading
import time
import urllib.error
from collections.abc import Iterator
from typing import Any

from blocktx.parallel import is_google_vm, metadata

# Metadata of a VM 60 seconds before maintenance of its host, or 30 seconds before preemption
# (https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice). Live migration is
# another value of the first, and stops nothing.
_NOTICES = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}
_STOPPING = b"stopping after this step, then saving; Ctrl-C to stop at once\n"
_WAIT = 60  # seconds that the metadata server waits for a value to change


class StopSignals:
    """Records SIGINT, SIGTERM or a Google VM's preemption notice (as SIGTERM) in `signal`.

    Further SIGTERMs are ignored: a machine that shuts down sends one to every process, and parents
    may forward it. A further SIGINT has its previous effect.
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
            # Not sys.stderr, which may be in the middle of a write. The line break ends a bar.
            os.write(2, b"\n" * os.isatty(2) + why + _STOPPING)

    def _watch(self, path: str, notice: str) -> None:
        """Wait for the metadata at `path` to be `notice`. Runs in a thread."""
        etag = "0"  # of no value: the first answer is immediate
        while not self._left and self.signal is None:
            asked = time.monotonic()
            query = dict(wait_for_change="true", last_etag=etag, timeout_sec=_WAIT)
            try:
                value, etag = metadata(path, timeout=_WAIT + 10, **query)
            except urllib.error.HTTPError as error:
                if error.code == 404:  # a container whose metadata server lacks the value
                    return
                time.sleep(1)
            except OSError:
                time.sleep(1)
            else:
                if value == notice and not self._left:
                    self._stop(signal.SIGTERM, f"Google Cloud says {path}={value}: ".encode())
                elif time.monotonic() - asked < 1:  # a server that does not wait
                    time.sleep(1)


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Make an unhandled SIGTERM raise `SystemExit(143)`, so that `with` blocks clean up.

    A context manager and decorator.
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
