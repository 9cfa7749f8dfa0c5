"""A lock on a run folder that a crashed run does not leave behind."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from typing import Any

from etils import epath

from blocktx.config import UserError
from blocktx.files import is_bucket

_NAME = ".lock"
_BEAT = 15.0  # seconds between heartbeats where a file cannot be locked
_BEATS_MISSED = 4  # after which the owner of a heartbeat is considered dead
_ELSEWHERE = 100.0  # seconds until a file server releases the lock of a host that died


class RunLock:
    """Exclusive use of a run folder, for use in a `with` block by one process of the run.

    On a disk it is a lock of the operating system on `workdir/.lock`, which ends with the process.
    Where there are none (in a bucket) the file holds a heartbeat: a lock that is not renewed for a
    minute is taken over, and its previous owner notices at its next `check`.

    Folders that entering has created are removed on leaving if they are still empty.
    """

    def __init__(self, workdir: epath.PathLike):
        self._workdir = epath.Path(workdir)
        self._path = self._workdir / _NAME
        self._owner = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        self._file: int | None = None
        self._created: list[epath.Path] = []
        self._left, self._lost = threading.Event(), False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "RunLock":
        try:
            if is_bucket(self._workdir):
                self._begin_heartbeat()
                return self
            missing = [p for p in (self._workdir, *self._workdir.parents) if not p.exists()]
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._created = missing  # the innermost first
            if not self._lock_file():
                self._begin_heartbeat()
        except BaseException:
            self._remove_created()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._thread is not None:  # or it could write the file again after its removal
            self._thread.join(timeout=_BEAT)
        with contextlib.suppress(OSError):
            if self._file is not None:
                os.unlink(self._path)  # while it is locked
                os.close(self._file)
            elif not self._lost and self._read().get("id") == self._owner["id"]:
                self._path.unlink()
        self._remove_created()

    def check(self) -> None:
        """Raise a UserError if another run has taken the lock over."""
        if self._lost:
            raise UserError(
                f"{self._workdir}: another run has taken over, after this one was silent for "
                f"{_BEAT * _BEATS_MISSED:.0f} seconds; this one stops and saves nothing"
            )

    def _remove_created(self) -> None:
        with contextlib.suppress(OSError):
            for folder in self._created:
                os.rmdir(folder)

    def _lock_file(self) -> bool:
        """Lock the file. Return False if the file system has no locks."""
        end = time.monotonic() + _ELSEWHERE
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                owner = self._read()
                if owner.get("host") == self._owner["host"] or time.monotonic() > end:
                    raise self._taken(owner) from None
                time.sleep(2)
                continue
            except OSError:
                os.close(file)
                return False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(self._path)):
                    os.ftruncate(file, 0)
                    os.pwrite(file, json.dumps(self._owner).encode(), 0)
                    self._file = file
                    return True
            os.close(file)  # its owner has removed it meanwhile

    def _begin_heartbeat(self) -> None:
        seen = self._read()
        if seen and not self._is_dead(seen):
            for _ in range(_BEATS_MISSED):
                time.sleep(_BEAT)
                if self._read() != seen:
                    raise self._taken(seen)
        self._beat(0)
        time.sleep(0.5)  # of two that come at once, the one that writes last stays
        if self._read().get("id") != self._owner["id"]:
            raise self._taken(self._read())
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()

    def _keep_beating(self) -> None:
        count = 0
        while not self._left.wait(_BEAT):
            with contextlib.suppress(Exception):  # a bucket that does not answer for a moment
                owner = self._read()
                if owner and owner.get("id") != self._owner["id"]:
                    self._lost = True
                    return
                if not self._left.is_set():
                    count += 1
                    self._beat(count)

    def _beat(self, count: int) -> None:
        self._path.write_text(json.dumps(self._owner | {"beat": count}))

    def _is_dead(self, owner: dict[str, Any]) -> bool:
        """Return whether the owner ran on this host and is gone."""
        if owner.get("host") != self._owner["host"]:
            return False
        try:
            os.kill(int(owner["pid"]), 0)
        except ProcessLookupError:
            return True
        except (KeyError, ValueError, OSError):
            return False
        return False

    def _read(self) -> dict[str, Any]:
        try:
            owner = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _taken(self, owner: dict[str, Any]) -> UserError:
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
        return UserError(
            f"{self._workdir}: another run uses this folder ({who}); wait for it, stop it, or "
            "choose another workdir"
        )
