"""One run at a time in a folder; a lock that a killed process does not leave behind."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from blocktx.config.errors import UserError
from blocktx.train import run_lock
from blocktx.train.loop import train
from blocktx.train.run_lock import RunLock
from tests.helpers.processes import started

ROOT = pathlib.Path(__file__).parents[2]
HOLDER = """
import sys, time
from blocktx.train.run_lock import RunLock
with RunLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_and_disturbs_nothing(finished):
    config, workdir, _ = finished
    before = sorted(path.stat().st_mtime_ns for path in workdir.rglob("*.*") if path.is_file())
    with RunLock(workdir), pytest.raises(UserError, match=f"another run .*process {os.getpid()} "):
        train(config, workdir, resume=True)
    after = sorted(path.stat().st_mtime_ns for path in workdir.rglob("*.*") if path.is_file())
    assert before == after
    assert not (workdir / ".lock").exists()


def test_a_killed_process_leaves_no_lock(tmp_path):
    command = [sys.executable, "-c", HOLDER, tmp_path / "run"]
    with started([command], cwd=ROOT, stdout=subprocess.PIPE) as (process,):
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=f"process {process.pid} on {socket.gethostname()}"):
            RunLock(tmp_path / "run").__enter__()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / "run" / ".lock").exists()
        with RunLock(tmp_path / "run"):
            pass


def test_folders_that_stay_empty_are_removed(tmp_path):
    with RunLock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert not (tmp_path / "a").exists()
    with RunLock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert os.listdir(tmp_path / "a" / "b") == ["file"]


@pytest.fixture
def heartbeats(monkeypatch):
    """Locks as in a bucket, with fast heartbeats."""
    monkeypatch.setattr(run_lock, "_BEAT", 0.1)
    monkeypatch.setattr(RunLock, "_lock_file", lambda self: False)


def test_a_heartbeat_keeps_others_out(heartbeats, tmp_path):
    with RunLock(tmp_path) as first:
        with pytest.raises(UserError, match="another run uses this folder"):
            RunLock(tmp_path).__enter__()
        first.check()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("host", ["elsewhere", socket.gethostname()])
def test_a_heartbeat_that_has_stopped_is_taken_over(heartbeats, host, tmp_path):
    with started([["true"]]) as (dead,):
        pass
    (tmp_path / ".lock").write_text(json.dumps({"id": "x", "host": host, "pid": dead.pid}))
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_the_previous_owner_notices(heartbeats, tmp_path):
    with RunLock(tmp_path) as lock:
        (tmp_path / ".lock").write_text(json.dumps({"id": "other", "host": "x", "pid": 1}))
        for _ in range(100):
            if lock._lost:
                break
            run_lock.time.sleep(0.05)
        with pytest.raises(UserError, match="another run has taken over"):
            lock.check()
    assert (tmp_path / ".lock").exists()  # it is the other's
