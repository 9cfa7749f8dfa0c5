"""Folders that are computed once: found again by a key, whole or not at all."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

_MANIFEST = "manifest.json"


_UNFINISHED = ".unfinished-"


_ABANDONED_AFTER = 24 * 3600  # seconds without a write


def cached_folder(
    cache_dir: str, key: dict[str, Any], build: Callable[[pathlib.Path], None]
) -> pathlib.Path:
    """The folder that `build(folder)` filled with files, now or in an earlier call with this key.

    A failing or interrupted `build` leaves nothing behind; what one that was killed has left is
    removed by the first build a day later. A folder whose files have been touched since is thrown
    away and built again. Processes that build the same folder at once each do the
    work, and all get the result of the first to finish.

    Args:
      cache_dir: a local folder, made if missing; `~` is the home folder.
      key: everything that the result depends on, for JSON.
      build: fills an empty folder with files.

    Raises:
      ValueError: `cache_dir` cannot be written to.
    """
    if "://" in cache_dir:
        raise ValueError(
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
        raise ValueError(
            f"config.data.cache_dir: cannot write to {cache_dir!r} ({error.strerror}); "
            "use a folder that you may write to"
        ) from error
    _remove_abandoned(root)
    with temporary:
        if folder.exists():  # broken
            aside = pathlib.Path(temporary.name, "broken")
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        unfinished = pathlib.Path(temporary.name, "unfinished")
        unfinished.mkdir()
        build(unfinished)
        _write_manifest(unfinished, key)
        try:
            unfinished.rename(folder)
        except OSError:
            if not _is_whole(folder):  # else another process was faster
                raise
    return folder


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
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # a power cut must not leave a manifest without its files
        files[path.name] = _stat(path)
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
