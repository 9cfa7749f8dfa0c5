"""Metrics of a run: metrics.jsonl and TensorBoard files."""

import contextlib
import json
import math
import os
import sys
import tempfile
import time

import jax
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from blocktx.files import AppendLog, copy_folder, is_bucket

_FLUSH_EVERY = 30  # seconds


class MetricsWriter:
    """Appends to `workdir/metrics.jsonl` and `workdir/tensorboard`, for use in a `with` block.

    Only process 0 writes. An error while writing is a warning: training is worth more than its log.
    What could not be written to metrics.jsonl is written as soon as that is possible again.

    Attributes:
      began: time of the run's first line, in seconds since 1970, or now.
      productive: seconds that the run's steps had taken by its last line.
    """

    def __init__(self, workdir: str | os.PathLike[str], after_step: int = 0):
        """Drop the lines of steps after `after_step`, from which the run continues."""
        self.began, self.productive = time.time(), 0.0
        self._lines: list[str] | None = None
        if jax.process_index() > 0:
            return
        self._path = epath.Path(workdir) / "metrics.jsonl"
        kept = []
        if self._path.exists():
            kept = [line for line in read(workdir) if line["step"] <= after_step]
            for line in reversed(kept):
                self.began = line.get("time", self.began)
                self.productive = max(self.productive, line.get("train/productive_seconds", 0.0))
        self._lines = [json.dumps(line) for line in kept]
        self._log: AppendLog | None = None
        self._flushed = self._tried = -math.inf
        self._open_log()
        self._board = _Board(self._path.with_name("tensorboard"), purge_step=after_step + 1)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is None:
            return
        self._tried = -math.inf
        self.flush()
        self._board.close()
        if self._log is not None:
            try:
                self._log.close()
            except Exception as error:
                _warn(self._path, error)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Write a line `{"step": step, "time": now, name: value, ...}`. Not finite is null."""
        if self._lines is None:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite})
        self._lines.append(line)
        if self._log is None:
            self._open_log()
        else:
            try:
                self._log.write(line)
            except Exception as error:
                self._fail(error)
        self._board.add(step, scalars)
        if time.monotonic() - self._flushed > _FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Flush to disk, and upload to a bucket. Never raises."""
        if self._lines is None:
            return
        self._flushed = time.monotonic()
        if self._log is None:
            self._open_log()
        else:
            try:
                self._log.flush()
            except Exception as error:
                self._fail(error)
        self._board.flush()

    def _open_log(self) -> None:
        """Write metrics.jsonl anew, atomically, unless that has failed a moment ago."""
        if time.monotonic() - self._tried < _FLUSH_EVERY:
            return
        self._tried = time.monotonic()
        try:
            self._log = AppendLog(self._path, self._lines)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        log, self._log, self._tried = self._log, None, time.monotonic()
        with contextlib.suppress(Exception):
            if log is not None:
                log.close()
        _warn(self._path, error)


class _Board:
    """Scalars in a TensorBoard folder, written by the calling thread: a full disk blocks nothing.

    After the first error nothing more is written.
    """

    def __init__(self, folder: epath.Path, purge_step: int):
        self._folder, self._temporary = folder, None
        self._writer: EventsWriter | None = None
        try:
            if is_bucket(folder):
                self._temporary = tempfile.TemporaryDirectory()
            else:
                folder.mkdir(parents=True, exist_ok=True)
            local = self._temporary.name if self._temporary else os.fspath(folder)
            self._writer = EventsWriter(os.path.join(local, "events"))
            # TensorBoard drops what earlier files hold of this step and later ones.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(session_log=start, step=purge_step))
        except Exception as error:
            self._fail(error)

    def _write(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)

    def add(self, step: int, scalars: dict[str, float]) -> None:
        if self._writer is None:
            return
        try:
            for name, value in scalars.items():
                self._write(event_pb2.Event(summary=scalar(name, value), step=step))
        except Exception as error:
            self._fail(error)

    def flush(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.flush()
            if self._temporary is not None:
                copy_folder(self._temporary.name, self._folder)
        except Exception as error:
            if self._temporary is None:  # a bucket may answer the next time
                self._fail(error)
            else:
                _warn(self._folder, error)

    def close(self) -> None:
        self.flush()
        try:
            if self._writer is not None:
                self._writer.close()
            if self._temporary is not None:
                self._temporary.cleanup()
        except Exception as error:
            _warn(self._folder, error)

    def _fail(self, error: Exception) -> None:
        self._writer = None
        _warn(self._folder, error)


def _warn(path: epath.Path, error: Exception) -> None:
    print(f"warning: {path}: cannot be written: {error}", file=sys.stderr, flush=True)


def read(workdir: str | os.PathLike[str]) -> list[dict[str, float | None]]:
    """Return the lines of `workdir/metrics.jsonl`, without an incomplete last line.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line other than the last is not JSON with a step.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    texts = path.read_text().splitlines()
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        elif number < len(texts):
            raise ValueError(f"{path}: line {number} is not a line of metrics: {text[:200]!r}")
    return lines
