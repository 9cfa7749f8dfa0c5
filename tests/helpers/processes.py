"""Processes that end with the test that has started them, whatever happens to it."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

# Becomes the command. A `preexec_fn` would do the same after a fork of this process, which can
# deadlock because of JAX's threads. Linux kills the process when the thread that has started it
# ends. A shell starts what it puts in the background with SIGINT ignored, and Python ignores
# SIGPIPE.
_LAUNCHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):  # it ended before
    sys.exit(1)
for number in (signal.SIGINT, signal.SIGPIPE):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@contextlib.contextmanager
def started(commands: list[list[Any]], **options: Any) -> Iterator[list[subprocess.Popen]]:
    """Start a process for each command; kill those that are left at the end of the block."""
    processes: list[subprocess.Popen] = []
    try:
        for command in commands:
            launcher = [sys.executable, "-IS", "-c", _LAUNCHER, str(os.getpid())]
            words = [*launcher, *map(str, command)]
            processes.append(subprocess.Popen(words, **options))
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
