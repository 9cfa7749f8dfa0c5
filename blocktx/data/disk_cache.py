"""Folders that are computed once: found again by a key, whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

from blocktx.config import UserError

_MANIFEST = "cache.json"
_UNFINISHED = ".unfinished-"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_ABANDONED_AFTER = 24 * 3600  # seconds without a write


def cached_folder(
    cache_dir: str, key: dict[str, Any], build: Callable[[pathlib.Path], None]
) -> pathlib.Path:
    """Return the folder that `build(folder)` filled, now or in an earlier call with this key.

    A failing or interrupted `build` leaves nothing behind. What a killed one leaves is removed by
    the first build a day later. A folder whose files were changed since is replaced. Processes that
    build the same folder at once each do the work, and all get the result of the first to finish.

    Args:
      cache_dir: a local folder, made if missing; `~` is the home folder.
      key: everything that the result depends on, for JSON.
      build: fills an empty folder with files.

    Raises:
      UserError: `cache_dir` cannot be written to.
    """
    if "://" in cache_dir:
        raise UserError(
            f"config.data.cache_dir: {cache_dir!r} is not a local folder; tokens are memory-mapped"
        )
    root = pathlib.Path(cache_dir).expanduser().absolute()
    folder = root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    if _is_whole(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=root)
    except OSError as error:
        raise _unwritable(cache_dir, error) from error
    _remove_abandoned(root)
    with temporary:
        unfinished = pathlib.Path(temporary.name, "unfinished")
        unfinished.mkdir()
        try:
            build(unfinished)
            _write_manifest(unfinished, key)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise _unwritable(cache_dir, error) from error
        _publish(unfinished, folder, pathlib.Path(temporary.name, "broken"))
    return folder


def _unwritable(cache_dir: str, error: OSError) -> UserError:
    would = "make room" if error.errno in _NO_ROOM else "use a folder that you may write to"
    reason = os.strerror(error.errno) if error.errno else str(error)
    return UserError(f"config.data.cache_dir: cannot write to {cache_dir!r} ({reason}); {would}")


def _publish(unfinished: pathlib.Path, folder: pathlib.Path, aside: pathlib.Path) -> None:
    """Give a folder its name, in place of a broken one, unless another process was faster."""
    for _ in range(100):
        try:
            unfinished.rename(folder)
            return
        except OSError:
            if _is_whole(folder):
                return
            if not folder.exists():
                raise
        # What is moved aside is looked at again: it may be another process's good one.
        with contextlib.suppress(OSError):
            folder.rename(aside)
            if _is_whole(aside):
                with contextlib.suppress(OSError):  # another one has taken its place
                    aside.rename(folder)
            shutil.rmtree(aside, ignore_errors=True)
    raise UserError(f"config.data.cache_dir: cannot replace the broken folder {folder}; remove it")


def _remove_abandoned(root: pathlib.Path) -> None:
    for folder in root.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(OSError):  # it is finished, or removed, at this moment
            newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
            if time.time() - newest > _ABANDONED_AFTER:
                shutil.rmtree(folder, ignore_errors=True)


def _stat(path: pathlib.Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _write_manifest(folder: pathlib.Path, key: dict[str, Any]) -> None:
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # a power cut must not leave a manifest without its files
        files[os.fspath(path.relative_to(folder))] = _stat(path)
    with (folder / _MANIFEST).open("w") as file:
        json.dump({"key": key, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _is_whole(folder: pathlib.Path) -> bool:
    try:
        files = json.loads((folder / _MANIFEST).read_text())["files"]
        return all(_stat(folder / name) == stat for name, stat in files.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
