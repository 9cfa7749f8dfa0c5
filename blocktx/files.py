"""Files on a local disk and in Google Cloud Storage: atomic writes, logs, listings.

An object in a bucket is always written whole, but cannot be appended to.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import os
import stat
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from etils import epath

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BUCKET = "gs://"
_PICTURES = (".png", ".svg", ".pdf")  # what Matplotlib writes
_READ_AHEAD = 8 << 20  # bytes of a bucket's object fetched at a time


def is_bucket(path: epath.PathLike) -> bool:
    return os.fspath(path).startswith(_BUCKET)


def absolute(path: epath.PathLike) -> epath.Path:
    """Return the absolute path, with `~` expanded. A path in a bucket is returned as it is.

    Raises:
      ValueError: the path is in a bucket, and gcsfs is not installed.
    """
    if is_bucket(path):
        _require_gcsfs("path", path)
        return epath.Path(path)
    return epath.Path(path).expanduser().absolute()


def bucket_filesystem(field: str, path: epath.PathLike) -> Any:
    """Return the fsspec filesystem of gs:// paths.

    Args:
      field: the field or flag that holds `path`, for the error message.
      path: a path in a bucket, for the error message.

    Raises:
      ValueError: gcsfs is not installed.
    """
    _require_gcsfs(field, path)
    import fsspec

    return fsspec.filesystem("gs", finalize_on_close=True)  # the instance that epath uses


def _require_gcsfs(field: str, path: epath.PathLike) -> None:
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{field}: {os.fspath(path)} needs gcsfs: pip install -e '.[gcs]'")


def run_folder(workdir: epath.PathLike) -> epath.Path:
    """Return the path of a run folder that exists or can be created. Creates nothing.

    Args:
      workdir: a local path, made absolute, or `gs://bucket/...`.

    Raises:
      ValueError: `workdir` is of another kind, or gcsfs is missing.
      NotADirectoryError, PermissionError: a local folder cannot be created or written to.
    """
    return writable_folder("workdir", workdir)


def writable_folder(field: str, folder: epath.PathLike) -> epath.Path:
    """`run_folder`, with the field or flag that errors name."""
    name = os.fspath(folder)
    if is_bucket(name):
        if not name.removeprefix(_BUCKET).strip("/"):
            raise ValueError(f"{field}: {name} names no bucket; use gs://bucket/folder")
        bucket_filesystem(field, name)
        return epath.Path(name)
    if "://" in name:
        raise ValueError(f"{field}: {name} is neither a local folder nor gs://bucket/folder")
    path = absolute(folder)
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        raise NotADirectoryError(f"{field}: cannot make {path}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{field}: cannot write to {path}: no permission for {existing}")
    return path


def check_picture(path: str) -> None:
    """Raise a ValueError if no picture can be written to `path`, the value of a flag."""
    picture = epath.Path(path)
    if picture.suffix not in _PICTURES:
        raise ValueError(f"must end with {', '.join(_PICTURES[:-1])} or {_PICTURES[-1]}")
    if is_bucket(path):
        return
    if not picture.parent.is_dir():
        raise ValueError(f"there is no folder {os.fspath(picture.parent)!r}; make it first")
    if not os.access(picture.parent, os.W_OK | os.X_OK):
        raise ValueError(f"no permission to write to {os.fspath(picture.parent)!r}")
    if picture.is_dir():
        raise ValueError("is a folder; give the name of a file")


def write_atomic(path: epath.PathLike, data: str | bytes) -> None:
    """Write a file, or replace it, whole or not at all. Missing parent folders are created."""
    path = epath.Path(path)
    data = data.encode() if isinstance(data, str) else data
    if is_bucket(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: epath.Path) -> epath.Path:
    """Return a new name beside `path` that no other writer of `path` uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def write_picture(path: epath.PathLike, figure: Figure) -> epath.Path:
    """Write a figure atomically in the format of its ending, and return the path."""
    path, picture = epath.Path(path), io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:])
    write_atomic(path, picture.getvalue())
    return path


def copy_folder(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copy all files below a local folder. Files of the same name are replaced."""
    for folder, _, names in os.walk(source):
        below = epath.Path(target) / os.path.relpath(folder, source)
        for name in names:
            write_atomic(below / name, epath.Path(folder, name).read_bytes())


@dataclasses.dataclass(frozen=True)
class FileInfo:
    """A regular file.

    Attributes:
      path: absolute path, or gs://...
      size: bytes.
      version: modification time in nanoseconds, or the generation of an object in a bucket.
    """

    path: str
    size: int
    version: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


def file_info(path: epath.PathLike) -> FileInfo:
    """Return the `FileInfo` of a file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a regular file (a FIFO or a device).
    """
    name = os.fspath(path)
    if is_bucket(name):
        fs = bucket_filesystem("path", name)
        fs.invalidate_cache()
        return _object_info(fs.info(name))
    found = os.stat(name)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{name}: not a regular file")
    return FileInfo(os.path.abspath(name), found.st_size, str(found.st_mtime_ns))


def _object_info(info: dict[str, Any]) -> FileInfo:
    version = info.get("generation") or info.get("updated") or ""
    return FileInfo(_BUCKET + info["name"].removeprefix(_BUCKET), int(info["size"]), str(version))


def list_files(folder: epath.PathLike, suffixes: tuple[str, ...]) -> Iterator[FileInfo]:
    """Yield the files below a folder whose names end so, sorted by path component.

    Hidden files are skipped. Each real local directory is visited once, however many symbolic links
    lead to it.

    Raises:
      ValueError: a FIFO or device is among them.
    """
    name = os.fspath(folder)
    if not is_bucket(name):
        yield from _walk(os.path.abspath(name), suffixes, set())
        return
    fs = bucket_filesystem("path", name)
    fs.invalidate_cache()
    root = name.removeprefix(_BUCKET).rstrip("/") + "/"
    found = {path.removeprefix(root): info for path, info in fs.find(root, detail=True).items()}
    for path in sorted(found, key=lambda path: path.split("/")):
        hidden = any(part.startswith(".") for part in path.split("/"))
        if path.endswith(suffixes) and not hidden:
            yield _object_info(found[path])


def _walk(
    folder: str, suffixes: tuple[str, ...], visited: set[tuple[int, int]]
) -> Iterator[FileInfo]:
    found = os.stat(folder)
    if (found.st_dev, found.st_ino) in visited:
        return
    visited.add((found.st_dev, found.st_ino))
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name.startswith("."):
            continue
        if os.path.isdir(path):
            yield from _walk(path, suffixes, visited)
        elif name.endswith(suffixes):
            yield file_info(path)


def open_binary(path: epath.PathLike) -> BinaryIO:
    """Open a file on disk or in a bucket for reading and seeking."""
    if is_bucket(path):
        return bucket_filesystem("path", path).open(os.fspath(path), "rb", block_size=_READ_AHEAD)
    return open(path, "rb")


class AppendLog:
    """A file of lines. On disk a line is written at once, in a bucket on `flush` and `close`."""

    def __init__(self, path: epath.PathLike, lines: list[str]):
        """Write the file anew, with `lines`."""
        self._path = epath.Path(path)
        self._lines = list(lines) if is_bucket(path) else None
        self._file = None
        write_atomic(path, "".join(f"{line}\n" for line in lines))
        if self._lines is None:
            self._file = self._path.open("a")

    def write(self, line: str) -> None:
        if self._file is None:
            self._lines.append(line)
        else:
            self._file.write(line + "\n")
            self._file.flush()  # readers follow the file

    def flush(self) -> None:
        if self._file is None:
            write_atomic(self._path, "".join(f"{line}\n" for line in self._lines))

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
