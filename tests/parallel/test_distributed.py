"""When processes connect, and real ones on this machine: all there, one missing, one dying."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from blocktx.parallel import google_vm
from blocktx.parallel.distributed import _bind_address, environment_has_others, initialize
from tests.helpers.fake_devices import fake_devices
from tests.helpers.metadata_server import metadata_server
from tests.helpers.processes import started

ROOT = pathlib.Path(__file__).parents[2]
PROCESS = """
import sys, time
from blocktx.parallel import exit_process, initialize
address, count, index, timeout, heartbeat, then = sys.argv[1:]
initialize(
    "auto", address, int(count), int(index),
    initialization_timeout=int(timeout), heartbeat_timeout=int(heartbeat),
)
import jax, jax.numpy as jnp
from jax.experimental import multihost_utils
total = multihost_utils.process_allgather(jnp.array(jax.process_index() + 1)).sum()
print(f"devices={jax.device_count()} local={jax.local_device_count()} total={total}", flush=True)
if then == "fail":
    exit_process(1)
time.sleep(500 if then == "wait" else 0)
"""
PATIENCE = 550  # seconds: a busy machine is no failure, and pytest ends what hangs after 600
CLUSTER_VARIABLES = ("SLURM_", "OMPI_", "MEGASCALE_", "TPU_", "GCE_", "JAX_COORDINATOR")


@contextlib.contextmanager
def start(indices, count=2, timeout=300, heartbeat=10, then="leave"):
    """Processes that share an address, each with 4 devices; ends those that are left."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    thens = then if isinstance(then, tuple) else (then,) * count
    env = {k: v for k, v in os.environ.items() if not k.startswith(CLUSTER_VARIABLES)}
    env |= fake_devices(4) | {"PYTHONPATH": str(ROOT)}
    commands = [
        [sys.executable, "-c", PROCESS, address, count, index, timeout, heartbeat, thens[index]]
        for index in indices
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with started(commands, env=env, **pipes) as processes:
        yield processes


def test_two_processes_are_one():
    with start([0, 1]) as processes:
        for process in processes:
            out, err = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, err
            assert "devices=8 local=4 total=3" in out


def test_missing_process_is_counted():
    with start([0, 1], count=3, timeout=15) as processes:
        first, second = (process.communicate(timeout=PATIENCE)[1] for process in processes)
    assert [process.returncode for process in processes] == [1, 1]
    assert "error: distributed: process 0 of 3 waited 15 seconds" in first
    assert ": 2 of 3 came (itself included); start the same command on every host" in first
    assert "error: distributed: process 1 of 3 waited 15 seconds for process 0 at 127." in second
    assert "stack trace" not in first + second


def test_missing_coordinator():
    with start([1], timeout=3) as (process,):
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert err.startswith("error: distributed: process 1 of 2 waited 3 seconds for process 0 at")
    assert err.count("\n") == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_ends_the_other(victim):
    """Within the heartbeat timeout and a few seconds, though it is not in a collective."""
    heartbeat, begin = 6, time.monotonic()
    with start([0, 1], then="wait", heartbeat=heartbeat) as processes:
        for process in processes:
            break_at_devices(process)
        start_took = time.monotonic() - begin  # a measure of how busy this machine is
        processes[victim].kill()
        begin = time.monotonic()
        processes[1 - victim].communicate(timeout=PATIENCE)
        assert time.monotonic() - begin < heartbeat + 5 + start_took
        assert processes[1 - victim].returncode == -signal.SIGABRT


def test_one_that_fails_keeps_its_code():
    """It does not wait for others that go on; those end too."""
    begin = time.monotonic()
    with start([0, 1], then=("wait", "fail"), heartbeat=8) as processes:
        break_at_devices(processes[1])
        start_took, begin = time.monotonic() - begin, time.monotonic()
        assert processes[1].wait(timeout=PATIENCE) == 1
        assert time.monotonic() - begin < 7 + start_took
        processes[0].communicate(timeout=PATIENCE)
        assert processes[0].returncode == -signal.SIGABRT


def break_at_devices(process):
    for line in process.stdout:
        if line.startswith("devices="):
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(mode="yes"), "distributed: got 'yes', expected auto, on, off"),
        (dict(num_processes=2, process_id=0), "coordinator_address: missing; coordinator_addr"),
        (dict(coordinator_address="a:1"), "num_processes, process_id: missing"),
        (
            dict(coordinator_address="a", num_processes=2, process_id=0),
            "coordinator_address: got 'a', expected host:port",
        ),
        (
            dict(coordinator_address="a:70000", num_processes=2, process_id=0),
            "coordinator_address: got 'a:70000'",
        ),
        (
            dict(coordinator_address="a:1", num_processes=0, process_id=0),
            "num_processes: got 0, expected at least 1",
        ),
        (
            dict(coordinator_address="a:1", num_processes=2, process_id=2),
            r"process_id: got 2, expected 0 to 1 \(num_processes is 2\)",
        ),
        (dict(mode="off", process_id=1), "process_id: makes no sense with distributed=off"),
        (dict(initialization_timeout=0), "initialization_timeout: got 0"),
        (dict(heartbeat_timeout=-1), "heartbeat_timeout: got -1"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        initialize(**arguments)


@pytest.fixture
def nowhere(monkeypatch):
    """An environment that says nothing of clusters."""
    for name in list(os.environ):
        if name.startswith(CLUSTER_VARIABLES):
            monkeypatch.delenv(name)
    monkeypatch.setattr(google_vm, "_PRODUCT_NAME", pathlib.Path("/nowhere"))
    return monkeypatch


def test_laptop_is_alone(nowhere):
    assert not environment_has_others()
    assert initialize() is False


SLURM = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="n[1-2]", SLURM_PROCID="0", SLURM_LOCALID="0")


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        (SLURM | dict(SLURM_NTASKS="16"), True),
        (SLURM | dict(SLURM_NTASKS="1"), False),
        (dict(SLURM_JOB_ID="7", SLURM_NTASKS="16"), False),  # the batch script, or salloc's shell
        (dict(OMPI_MCA_orte_hnp_uri="1;tcp://10.0.0.1:9", OMPI_COMM_WORLD_SIZE="2"), True),
        (dict(OMPI_MCA_orte_hnp_uri="1;tcp://10.0.0.1:9", OMPI_COMM_WORLD_SIZE="1"), False),
        (dict(TPU_WORKER_HOSTNAMES="t-0,t-1", TPU_WORKER_ID="0"), True),
        (dict(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0"), False),
        (dict(TPU_WORKER_HOSTNAMES="localhost", MEGASCALE_NUM_SLICES="2"), True),
        (dict(TPU_WORKER_HOSTNAMES="localhost", MEGASCALE_NUM_SLICES="1"), False),
    ],
)
def test_environments(variables, several, nowhere):
    for name, value in variables.items():
        nowhere.setenv(name, value)
    assert environment_has_others() is several


@pytest.mark.parametrize(
    ("endpoints", "tpu_env", "several"),
    [
        ("unknown:unknown:10.0.0.2", "ACCELERATOR_TYPE: 'v5litepod-4'\n", False),
        ("10.0.0.2,10.0.0.3", "ACCELERATOR_TYPE: 'v5litepod-8'\n", True),
        ("10.0.0.2", "MEGASCALE_NUM_SLICES: '2'\n", True),
        ("10.0.0.2", "MEGASCALE_NUM_SLICES: '1'\n", False),
        (None, None, False),  # a VM without TPU
    ],
)
def test_tpu_virtual_machines(endpoints, tpu_env, several, nowhere):
    values = {"attributes/worker-network-endpoints": endpoints, "attributes/tpu-env": tpu_env}
    with metadata_server({k: v for k, v in values.items() if v is not None}) as host:
        nowhere.setenv("GCE_METADATA_HOST", host)
        assert environment_has_others() is several


@pytest.mark.parametrize(
    ("address", "bound"),
    [
        ("127.0.0.1:84", "127.0.0.1:84"),
        ("localhost:84", "127.0.0.1:84"),
        ("203.0.113.7:84", None),  # of no interface here, as behind a NAT
        ("no.such.host.invalid:84", None),
    ],
)
def test_the_coordinator_listens_on_the_address_that_was_given(address, bound):
    assert _bind_address(address) in (bound, bound and bound.replace("127.0.0.1", "[::1]"))
