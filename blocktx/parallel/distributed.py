"""Several processes, one run: when to connect them, and what to say when they do not all come."""

import contextlib
import os
import pathlib
import sys
import threading
import time
from typing import NoReturn

import jax

from blocktx.parallel.google_vm import is_google_vm, metadata

MODES = ("auto", "on", "off")


HEARTBEAT_TIMEOUT = 60  # seconds


_END_TOGETHER = 5  # seconds; shorter than all timeouts of `jax.distributed`


def initialize(
    mode: str = "auto",
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> bool:
    """Connects this process to the others of its run, if there are others.

    To be called before anything touches a device. The processes of a run are then one: each sees
    all devices, and when one dies, the others end within `heartbeat_timeout` seconds (and a few),
    by SIGABRT, instead of waiting for it forever.

    Args:
      mode: "auto" connects where several processes are meant to be one run: on Cloud TPU pod
        slices and multislices, also in GKE; in SLURM steps and Open MPI jobs of several tasks.
        "on" connects wherever `jax.distributed` finds out with whom, "off" does not.
      coordinator_address: `host:port` on which process 0 waits for the others; with
        `num_processes` and `process_id`, where the environment does not say it.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      initialization_timeout: seconds to wait for all to come; then the program ends with code 1
        and a message that says how many came.
      heartbeat_timeout: seconds without a sign of life after which a process counts as dead.

    Returns:
      Whether it did connect.

    Raises:
      ValueError: if an argument cannot be, or "on" cannot find out with whom to connect.
    """
    explicit = _check(mode, coordinator_address, num_processes, process_id)
    for name, value in [
        ("initialization_timeout", initialization_timeout),
        ("heartbeat_timeout", heartbeat_timeout),
    ]:
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected a number of seconds from 1")
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
        )
    except ValueError as error:  # found nobody
        raise ValueError(
            f"distributed: {error} This is no environment that jax knows; pass "
            "coordinator_address, num_processes and process_id"
        ) from error
    finally:
        connected.set()
    return True


def end_with(code: int) -> NoReturn:
    """Ends this process with `code` although the others of its run may go on.

    Processes leave a run together. They would wait for one that stays longer than anyone wants to,
    and then crash, whatever had gone wrong. So this waits for a moment only, in which those that
    met the same error come to the same end.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        leave = threading.Timer(_END_TOGETHER, os._exit, [code])
        leave.daemon = True
        leave.start()
        jax.distributed.shutdown()
    sys.exit(code)


def _check(mode: str, address: str | None, count: int | None, index: int | None) -> bool:
    """Whether the last three are given; raises a ValueError if they cannot be."""
    if mode not in MODES:
        raise ValueError(f"distributed: got {mode!r}, expected {', '.join(MODES)}")
    values = {"coordinator_address": address, "num_processes": count, "process_id": index}
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == len(values):
        return False
    if mode == "off":
        given = ", ".join(name for name in values if name not in missing)
        raise ValueError(f"{given}: makes no sense with distributed=off; leave out one of them")
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: missing; {', '.join(values)} are given together, or all left "
            "to the environment"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f"coordinator_address: got {address!r}, expected host:port, as in 10.0.0.2:8476"
        )
    if count < 1:
        raise ValueError(f"num_processes: got {count}, expected at least 1")
    if not 0 <= index < count:
        raise ValueError(
            f"process_id: got {index}, expected 0 to {count - 1} (num_processes is {count})"
        )
    return True


def environment_has_others() -> bool:
    """Whether the environment says that this is one of several processes of a run.

    Stricter than `jax.distributed`, which connects single processes with themselves as well.
    """
    count = _environment_integer
    if "SLURM_STEP_NODELIST" in os.environ and "SLURM_PROCID" in os.environ:  # below srun
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
        # One TPU VM: there is one worker, and the environment of slices has no other slice.
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
    """Ends the program with code 1 unless `connected` comes in time. Runs in a thread."""
    end, came = time.monotonic() + seconds, None
    while time.monotonic() < end:
        if connected.wait(1):
            return
        # Those that came may leave a moment before this one gives up as well.
        came = max((n for n in (came, _connections()) if n is not None), default=None)
    # jax.distributed ends the process from C++, so this has to come before and tell.
    print(f"error: {_who_is_missing(seconds, came)}", file=sys.stderr, flush=True)
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
    """How many connections there are to ports on which this process listens; None: unknown.

    While processes come together, each has one with process 0, also process 0 itself.
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
