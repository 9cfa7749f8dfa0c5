"""Processes that end with the test that has started them, whatever happens to it."""

import contextlib
import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """Make Linux kill this process when the thread that has started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def started(commands: list[list[Any]], **options: Any) -> Iterator[list[subprocess.Popen]]:
    """Start a process for each command; kill those that are left at the end of the block."""
    processes: list[subprocess.Popen] = []
    try:
        for command in commands:
            words = [str(word) for word in command]
            processes.append(subprocess.Popen(words, preexec_fn=_die_with_parent, **options))
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
