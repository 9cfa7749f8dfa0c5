"""Processes that end with the test that has started them, whatever happens to it."""

import contextlib
import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def _prepare() -> None:
    """Make Linux kill this process when the thread that has started it ends.

    Ctrl-C works in it, too: a shell starts what it puts in the background with SIGINT ignored.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def started(commands: list[list[Any]], **options: Any) -> Iterator[list[subprocess.Popen]]:
    """Start a process for each command; kill those that are left at the end of the block."""
    processes: list[subprocess.Popen] = []
    try:
        for command in commands:
            words = [str(word) for word in command]
            processes.append(subprocess.Popen(words, preexec_fn=_prepare, **options))
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
