"""Multi-process initialization, and the error when processes are missing."""

import contextlib
import ipaddress
import os
import pathlib
import socket
import sys
import threading
import time
from typing import NoReturn

import jax

from blocktx.config import UserError
from blocktx.parallel.google_vm import is_google_vm, metadata

MODES = ("auto", "on", "off")
HEARTBEAT_TIMEOUT = 60  # seconds
_EXIT_TOGETHER = 5  # seconds; shorter than all timeouts of `jax.distributed`


def initialize(
    mode: str = "auto",
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> bool:
    """Connect this process to the other processes of its run, if there are any.

    Call it before JAX uses a device. Every process then sees all devices. If a process dies, the
    others abort (SIGABRT) a few seconds after `heartbeat_timeout`.

    Args:
      mode: "auto" connects where several processes form one run: on Cloud TPU pod slices and
        multislices, also in GKE; in SLURM steps and Open MPI jobs with several tasks. "on" connects
        wherever `jax.distributed` can detect the other processes. "off" does not connect.
      coordinator_address: `host:port` of process 0. Required with `num_processes` and `process_id`
        if the environment does not give them. Process 0 listens on this address only, if it is an
        address of this machine.
      num_processes: number of processes.
      process_id: index of this process, from 0.
      initialization_timeout: seconds to wait for all processes. The program then exits with code 1
        and a message with the number of processes that connected.
      heartbeat_timeout: seconds without a heartbeat after which a process is considered dead.

    Returns:
      Whether it connected.

    Raises:
      UserError: an argument is invalid, or "on" cannot detect the other processes.
    """
    explicit = _check(mode, coordinator_address, num_processes, process_id)
    for name, value in [
        ("initialization_timeout", initialization_timeout),
        ("heartbeat_timeout", heartbeat_timeout),
    ]:
        if value < 1:
            raise UserError(f"{name}: got {value}, expected a number of seconds from 1")
    if mode == "off" or not (explicit or mode == "on" or environment_has_others()):
        return False
    connected = threading.Event()
    watchdog = threading.Thread(
        target=_end_after, args=(initialization_timeout, connected), daemon=True
    )
    watchdog.start()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            # Its own timeout ends with a C++ stack trace.
            initialization_timeout=initialization_timeout + 60,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=heartbeat_timeout,
            coordinator_bind_address=_bind_address(coordinator_address) if explicit else None,
        )
    except ValueError as error:
        raise UserError(
            f"distributed: {error} The environment names no other processes; pass "
            "coordinator_address, num_processes and process_id"
        ) from error
    finally:
        connected.set()
    return True


def exit_process(code: int) -> NoReturn:
    """Exit this process with `code`, even if other processes of the run continue.

    `jax.distributed.shutdown` blocks until every process calls it, and aborts on a timeout. So wait
    5 seconds for processes that met the same error, then exit.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        leave = threading.Timer(_EXIT_TOGETHER, os._exit, [code])
        leave.daemon = True
        leave.start()
        jax.distributed.shutdown()
    sys.exit(code)


def _check(mode: str, address: str | None, count: int | None, index: int | None) -> bool:
    """Return whether the last three are given. Raise a UserError if they are invalid."""
    if mode not in MODES:
        raise UserError(f"distributed: got {mode!r}, expected {', '.join(MODES)}")
    values = {"coordinator_address": address, "num_processes": count, "process_id": index}
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == len(values):
        return False
    if mode == "off":
        given = ", ".join(name for name in values if name not in missing)
        raise UserError(f"{given}: makes no sense with distributed=off; leave out one of them")
    if missing:
        raise UserError(
            f"{', '.join(missing)}: missing; {', '.join(values)} are given together, or all left "
            "to the environment"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"coordinator_address: got {address!r}, expected host:port, as in 10.0.0.2:8476"
        )
    if count < 1:
        raise UserError(f"num_processes: got {count}, expected at least 1")
    if not 0 <= index < count:
        raise UserError(
            f"process_id: got {index}, expected 0 to {count - 1} (num_processes is {count})"
        )
    return True


def _bind_address(address: str) -> str | None:
    """Return the address that process 0 should listen on, or None for all interfaces.

    It is the given one if this machine has it. It may not: behind a NAT the address belongs to a
    router, and a host name can resolve to 127.0.1.1 on its own host alone.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind((where[0], 0))
    except OSError:
        return None
    ip = ipaddress.ip_address(where[0].partition("%")[0])
    if ip.is_loopback and host not in ("localhost", where[0]):
        return None
    return f"[{where[0]}]:{port}" if ip.version == 6 else f"{where[0]}:{port}"


def environment_has_others() -> bool:
    """Return whether the environment names several processes of one run.

    `jax.distributed` also connects single processes with themselves; this does not.
    """
    count = _environment_integer
    if "SLURM_STEP_NODELIST" in os.environ and "SLURM_PROCID" in os.environ:  # inside srun
        return count("SLURM_NTASKS") > 1
    if "OMPI_MCA_orte_hnp_uri" in os.environ:
        return count("OMPI_COMM_WORLD_SIZE") > 1
    if count("MEGASCALE_NUM_SLICES") > 1:
        return True
    workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if workers:  # GKE
        return "," in workers
    if "TPU_SKIP_MDS_QUERY" in os.environ or not is_google_vm():
        return False
    try:
        # A single TPU VM has one worker and one slice.
        workers, _ = metadata("attributes/worker-network-endpoints")
        tpu_env, _ = metadata("attributes/tpu-env")
    except OSError:  # a VM without TPU
        return False
    slices = [line for line in tpu_env.splitlines() if line.startswith("MEGASCALE_NUM_SLICES:")]
    return "," in workers or any(line.partition(":")[2].strip(" '") != "1" for line in slices)


def _environment_integer(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def _end_after(seconds: int, connected: threading.Event) -> None:
    """Exit with code 1 unless `connected` is set in time. Runs in a thread."""
    end, came = time.monotonic() + seconds, None
    while time.monotonic() < end:
        if connected.wait(1):
            return
        # Other processes may give up a moment earlier.
        came = max((n for n in (came, _connections()) if n is not None), default=None)
    # jax.distributed ends the process from C++, with a stack trace, after its own timeout.
    try:
        message = _who_is_missing(seconds, came)
    except Exception as error:  # JAX's private state has changed
        message = f"distributed: not all processes connected in {seconds} seconds ({error})"
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _who_is_missing(seconds: int, came: int | None) -> str:
    from jax._src.distributed import global_state as known  # only for the message

    index, count, address = known.process_id, known.num_processes, known.coordinator_address
    if address is None:
        return f"distributed: could not find out in {seconds} seconds who the other processes are"
    rest = (
        "start the same command on every host at about the same time (with its own --process_id, "
        "if that is how they are told apart), and see that hosts can reach each other's ports"
    )
    here = f"distributed: process {index} of {count} waited {seconds} seconds"
    if index:
        return (
            f"{here} for process 0 at {address} and the others; process 0, if it runs, says how "
            f"many came; {rest}"
        )
    said = "not all came" if came is None else f"{came} of {count} came (itself included)"
    return f"{here} at {address}: {said}; {rest}"


def _connections() -> int | None:
    """Return the number of connections to ports on which this process listens. None: unknown.

    During initialization every process has one connection to process 0, as has process 0 itself.
    """
    inodes, rows = set(), []
    try:
        for link in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                inodes.add(os.stat(f"/proc/self/fd/{link}").st_ino)
        for name in ("tcp", "tcp6"):
            lines = pathlib.Path("/proc/net", name).read_text().splitlines()
            rows += [line.split() for line in lines[1:]]
    except OSError:  # not Linux
        return None
    own = [row for row in rows if int(row[9]) in inodes]
    listen, established = "0A", "01"
    ports = {row[1].rpartition(":")[2] for row in own if row[3] == listen}
    return sum(row[3] == established and row[1].rpartition(":")[2] in ports for row in own)
