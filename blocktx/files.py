"""The folder of a run, on a disk or in a bucket of Google Cloud, and how files get into it.

In a bucket an object is written whole or not at all, but cannot be appended to.
"""

from __future__ import annotations

import importlib.util
import io
import os
from typing import TYPE_CHECKING

from etils import epath

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BUCKET = "gs://"


def is_bucket(path: epath.PathLike) -> bool:
    return os.fspath(path).startswith(_BUCKET)


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path; `~` is the home of the user. What is in a bucket is absolute already."""
    path = epath.Path(path)
    return path if is_bucket(path) else path.expanduser().absolute()


def run_folder(workdir: epath.PathLike) -> epath.Path:
    """The path of a run's folder that is there or can be made; makes nothing.

    Args:
      workdir: a local path, made absolute, or `gs://bucket/...`.

    Raises:
      ValueError: if it is of another kind, or Python cannot write to buckets.
      NotADirectoryError, PermissionError: if a local one cannot be made or written to.
    """
    name = os.fspath(workdir)
    if is_bucket(name):
        if not name.removeprefix(_BUCKET).strip("/"):
            raise ValueError(f"workdir: {name} names no bucket; use gs://bucket/folder")
        if importlib.util.find_spec("gcsfs") is None:
            raise ValueError(f"workdir: {name} needs gcsfs: pip install 'blocktx[gcs]'")
        return epath.Path(name)
    if "://" in name:
        raise ValueError(f"workdir: {name} is neither a local folder nor gs://bucket/folder")
    path = absolute(workdir)
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        raise NotADirectoryError(f"workdir: cannot make {path}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"workdir: cannot write to {path}: no permission for {existing}")
    return path


def write_whole(path: epath.PathLike, data: str | bytes) -> None:
    """Writes a file, or replaces it: all of it or nothing. Its folder is made if it is missing."""
    path = epath.Path(path)
    data = data.encode() if isinstance(data, str) else data
    if is_bucket(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_png(path: epath.PathLike, figure: Figure) -> epath.Path:
    """Draws a figure into a file, all of it or nothing, and returns the path."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_whole(path, png.getvalue())
    return epath.Path(path)


def copy_folder(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies all files below a local folder, over those of the same names."""
    for folder, _, names in os.walk(source):
        below = epath.Path(target) / os.path.relpath(folder, source)
        for name in names:
            write_whole(below / name, epath.Path(folder, name).read_bytes())


class Lines:
    """A file that grows by lines: on a disk at once, in a bucket when it is flushed or closed."""

    def __init__(self, path: epath.PathLike, lines: list[str]):
        """Writes the file anew, with `lines`."""
        self._path = epath.Path(path)
        self._lines = list(lines) if is_bucket(path) else None
        self._file = None
        write_whole(path, "".join(f"{line}\n" for line in lines))
        if self._lines is None:
            self._file = self._path.open("a")

    def write(self, line: str) -> None:
        if self._file is None:
            self._lines.append(line)
        else:
            self._file.write(line + "\n")
            self._file.flush()  # for whoever watches

    def flush(self) -> None:
        if self._file is None:
            write_whole(self._path, "".join(f"{line}\n" for line in self._lines))

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
