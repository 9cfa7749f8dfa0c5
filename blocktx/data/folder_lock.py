"""A lock on a prepared folder that a process which crashes does not leave behind."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from etils import epath

from blocktx.config import UserError
from blocktx.files import bucket_filesystem, is_bucket

_RENEWED_EVERY = 20  # seconds
_STALE_AFTER = 120  # seconds without renewal


@contextlib.contextmanager
def folder_lock(folder: epath.Path, task: tuple[int, int], field: str) -> Iterator[None]:
    """Hold the lock of a task on a folder.

    On a disk it is an advisory lock on a file, which ends with the process. In a bucket it is an
    object that is renewed, and counts as left behind after two minutes without that.

    Raises:
      UserError: another process holds it.
    """
    name = f".lock-{task[0]}-of-{task[1]}"
    taken = f"{field}: {folder}: another process is preparing it (task {task[0]}/{task[1]}"
    if is_bucket(folder):
        with _lease(os.fspath(folder / name), taken):
            yield
        return
    with open(folder / name, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{taken}); wait for it, or use another folder") from None
        except OSError:  # a file system without locks
            pass
        yield


@contextlib.contextmanager
def _lease(path: str, taken: str) -> Iterator[None]:
    filesystem = bucket_filesystem("--output", path)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}

    def write(mode: str) -> None:
        content = json.dumps({**owner, "time": time.time()}).encode()
        filesystem.pipe_file(path, content, mode=mode)

    try:
        write("create")
    except (FileExistsError, OSError) as error:
        filesystem.invalidate_cache()
        if not filesystem.exists(path):
            raise error
        holder = json.loads(filesystem.cat_file(path))
        age = time.time() - holder["time"]
        if age < _STALE_AFTER and not _has_ended(holder):
            raise UserError(
                f"{taken}, process {holder['pid']} on {holder['host']}); wait for it, or if it was "
                f"killed, try again in {_STALE_AFTER - age:.0f} seconds"
            ) from None
        write("overwrite")
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(_RENEWED_EVERY):
            with contextlib.suppress(OSError):  # the next renewal may do
                write("overwrite")

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm_file(path)


def _has_ended(holder: dict) -> bool:
    """Return whether the holder was a process of this host that is no more."""
    if holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return holder["pid"] == os.getpid()
