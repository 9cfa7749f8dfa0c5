"""Processes that tests start end with them, whatever happens."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.processes import started

TESTS = pathlib.Path(__file__).parent
SLEEPER = [sys.executable, "-c", "import time; time.sleep(1000)"]
STARTER = f"""
from tests.helpers.processes import started
with started([{SLEEPER!r}]) as (process,):
    print(process.pid, flush=True)
    process.wait()
"""


def test_an_error_in_the_block_kills():
    with contextlib.suppress(ZeroDivisionError), started([SLEEPER, SLEEPER]) as processes:
        1 / 0  # noqa: B018
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is of Linux")
def test_a_killed_test_kills():
    pipes = dict(stdout=subprocess.PIPE, text=True)
    with started([[sys.executable, "-c", STARTER]], cwd=TESTS.parent, **pipes) as (starter,):
        child = int(starter.stdout.readline())
        os.kill(child, 0)  # it is there
        starter.kill()
        end = time.monotonic() + 60
        while is_running(child):
            assert time.monotonic() < end
            time.sleep(0.01)


def is_running(process: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        status = pathlib.Path(f"/proc/{process}/stat").read_text()
        return status.rpartition(")")[2].split()[0] != "Z"
    return False


def test_no_test_starts_processes_in_another_way():
    # subprocess.run kills its process on an error; Popen alone does not.
    allowed = {TESTS / "helpers" / "processes.py", pathlib.Path(__file__)}
    for path in sorted(set(TESTS.rglob("*.py")) - allowed):
        assert not re.search(r"\bPopen\(", path.read_text()), path
