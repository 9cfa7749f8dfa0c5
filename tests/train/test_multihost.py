"""Runs of two processes with four devices each, as users start and machines end them."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from blocktx.checkpoint.folder import find
from blocktx.train.metrics import read
from tests.helpers.fake_devices import fake_devices
from tests.helpers.processes import started
from tests.helpers.tiny_run import write_corpus

ROOT = pathlib.Path(__file__).parents[2]
# With a marker that names a step, the save of that step stops for good just before it is finished.
CONFIG = """
import os, pathlib, sys, time
sys.path.insert(0, {tests!r})
from blocktx.config import DataConfig, to_config_dict
from tests.helpers.tiny_run import run_config

rename = os.rename

def stopping_rename(source, target):
    marker = pathlib.Path({folder!r}, f"stop_at_{{pathlib.Path(target).name}}")
    if pathlib.Path(target).parent.name == "checkpoints" and marker.exists():
        marker.with_name("stopped").touch()
        time.sleep(1000)
    rename(source, target)

os.rename = stopping_rename

def get_config():
    settings = dict(steps=8, batch_size=8, checkpoint_every=2)
    return to_config_dict(run_config({data!r}, optimizer=dict(schedule="constant"), **settings))
"""
HEARTBEAT = 8
PATIENCE = 550  # seconds: a busy machine is no failure, and pytest ends what hangs after 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multihost")
    data = write_corpus(folder)
    text = CONFIG.format(tests=str(ROOT), folder=str(folder), data=data)
    (folder / "config.py").write_text(text)
    return folder


class Run:
    """Processes that train together, for use in a `with` block, at whose end they are killed."""

    def __init__(self, folder, name, *flags, processes=2, each=(), heartbeat=100):
        """`each` has further flags of single processes."""
        self.workdir = folder / name
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        self._env = os.environ | fake_devices(8 // processes)
        self._env |= {
            "PYTHONUNBUFFERED": "1",
            # Most of the time is compilation, of the same small programs again and again.
            "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        base = [sys.executable, "launch/train.py", f"--config={folder / 'config.py'}", *flags]
        base += [f"--workdir={self.workdir}", f"--compilation_cache={folder / 'compiled'}"]
        if processes > 1:
            base += [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}"]
            base += [f"--heartbeat_timeout={heartbeat}", "--initialization_timeout=300"]
        self.port, self.logs = port, [folder / f"{name}.{i}.log" for i in range(processes)]
        own = [*each, *[()] * processes][:processes]
        index = [[f"--process_id={i}"] if processes > 1 else [] for i in range(processes)]
        self._commands = [[*base, *index[i], *own[i]] for i in range(processes)]
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        self.processes = [
            self._stack.enter_context(
                started(
                    [command],
                    cwd=ROOT,
                    env=self._env,
                    stdout=self._stack.enter_context(log.open("a")),
                    stderr=subprocess.STDOUT,
                )
            )[0]
            for command, log in zip(self._commands, self.logs, strict=True)
        ]
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def codes(self):
        return [process.wait(timeout=PATIENCE) for process in self.processes]

    def log(self, index=0):
        return self.logs[index].read_text()

    def wait_for(self, there):
        end = time.monotonic() + PATIENCE
        while not there():
            assert time.monotonic() < end, self.log()
            assert all(p.poll() is None for p in self.processes), self.log() + self.log(-1)
            time.sleep(0.01)


def losses(workdir):
    return {line["step"]: line["train/loss"] for line in read(workdir) if "train/loss" in line}


def assert_same_losses(workdir, alone):
    got, wanted = losses(workdir), losses(alone)
    assert list(got) == list(wanted) == list(range(1, 9))
    np.testing.assert_allclose(list(got.values()), list(wanted.values()), rtol=1e-5)


@pytest.fixture(scope="module")
def alone(folder):
    """The folder of the run that one process with eight devices has trained."""
    with Run(folder, "alone", processes=1) as run:
        assert run.codes() == [0], run.log()
    return run.workdir


def test_two_processes_train_as_one(folder, alone):
    with Run(folder, "two") as run:
        assert run.codes() == [0, 0], run.log(0) + run.log(1)
    assert_same_losses(run.workdir, alone)
    assert "in 2 processes" in run.log(0)
    assert "step=" not in run.log(1)
    assert (run.workdir / "loss.png").exists()


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save(folder, alone):
    """What is there is the save before, from which two processes go on, or one."""
    (folder / "stop_at_6").touch()
    evaluate = "--config.training.evaluate_every=4"
    with Run(folder, "killed", evaluate) as run:
        run.wait_for((folder / "stopped").exists)
        for process in run.processes:
            process.send_signal(signal.SIGKILL)
        assert run.codes() == [-signal.SIGKILL] * 2
    (folder / "stop_at_6").unlink()
    names = {path.name for path in (run.workdir / "checkpoints").iterdir()}
    assert any(name.startswith("6.") for name in names)  # half of it is there
    assert find(run.workdir).name == "4"
    shutil.copytree(run.workdir, folder / "killed_one")
    with (
        Run(folder, "killed", "--resume", evaluate) as two,
        Run(folder, "killed_one", "--resume", evaluate, processes=1) as one,
    ):
        assert (two.codes(), one.codes()) == ([0, 0], [0]), two.log() + one.log()
    for resumed in (one, two):
        assert_same_losses(resumed.workdir, alone)
        evaluated = [line["step"] for line in read(resumed.workdir) if "heldout/loss" in line]
        assert evaluated == [4, 8]  # that of step 4 not again
        assert find(resumed.workdir).name == "8"


@contextlib.contextmanager
def endless(folder, name, **settings):
    """A run that goes on after its tenth step, and the seconds that it took until then."""
    begin = time.monotonic()
    with Run(folder, name, "--config.training.steps=1000000", **settings) as run:
        run.wait_for(lambda: "step=10 " in run.log())
        yield run, time.monotonic() - begin


@pytest.mark.slow
def test_sigterm_to_one_saves_all_and_loses_no_step(folder, alone):
    with endless(folder, "stopped_one") as (run, _):
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.codes() == [143, 143], run.log(0) + run.log(1)
    saved = int(find(run.workdir).name)
    assert list(losses(run.workdir)) == list(range(1, saved + 1))
    assert f"saved at step {saved} of 1000000" in run.log(0)
    first = [losses(run.workdir)[step] for step in range(1, 9)]
    np.testing.assert_allclose(first, list(losses(alone).values()), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_ends_the_other(folder, victim):
    """After the heartbeat timeout, with a code after which to try again.

    The bound grows with the time that this machine takes for a start.
    """
    with endless(folder, f"dies_{victim}", heartbeat=HEARTBEAT) as (run, start):
        begin = time.monotonic()
        run.processes[victim].send_signal(signal.SIGKILL)
        code = run.processes[1 - victim].wait(timeout=PATIENCE)
        assert time.monotonic() - begin < HEARTBEAT + 10 + 2 * start
    assert code in (70, -signal.SIGABRT)
    assert find(run.workdir)


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--config.training.log_every=3", "config"),
        pytest.param("--workdir={folder}/elsewhere", "workdir", marks=pytest.mark.slow),
    ],
)
def test_processes_that_disagree_say_so_and_end(folder, flag, named):
    flag = flag.format(folder=folder)
    with Run(folder, f"disagree_{named}", each=[(), (flag,)]) as run:
        assert run.codes() == [2, 2], run.log(0) + run.log(1)
    for index in range(2):
        log = run.log(index)
        assert f"error: --{named}: that of process 1 differs from that of process 0" in log
        assert len(log) < 2000
    assert not run.workdir.exists()


@pytest.mark.slow
def test_the_coordinator_listens_on_its_address_alone(folder):
    with Run(folder, "listens", "--config.training.steps=1000000") as run:
        run.wait_for(lambda: "step=1 " in run.log())
        rows = [
            line.split()[1].split(":")
            for table in ("tcp", "tcp6")
            for line in pathlib.Path("/proc/net", table).read_text().splitlines()[1:]
            if line.split()[3] == "0A"
        ]
        hosts = [host for host, port in rows if int(port, 16) == run.port]
    # 127.0.0.1, on a socket of IPv4, or of IPv6 where the machine has it.
    assert hosts in (["0100007F"], ["0000000000000000FFFF00000100007F"])
