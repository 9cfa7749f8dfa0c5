"""What a run measures, kept: metrics.jsonl, TensorBoard files, plot of the loss."""

import json
import math
import os
import tempfile
import time

import jax
import tensorboardX
from etils import epath

from blocktx.files import AppendLog, copy_folder, is_bucket

_FLUSH_EVERY = 30  # seconds


class MetricsWriter:
    """Appends to `workdir/metrics.jsonl` and `workdir/tensorboard`, for use in a `with` block.

    Of several processes only the first writes.

    Attributes:
      began: when the first line of the run was written, in seconds since 1970; now, if none was.
      productive: seconds that its steps had taken by the last line.
    """

    def __init__(self, workdir: str | os.PathLike[str], after_step: int = 0):
        """Drops what was written for steps later than `after_step`, from where the run goes on."""
        self.began, self.productive = time.time(), 0.0
        self._lines = self._board = self._temporary = None
        if jax.process_index() > 0:
            return
        path = epath.Path(workdir) / "metrics.jsonl"
        kept = []
        if path.exists():
            kept = [line for line in read(workdir) if line["step"] <= after_step]
            for line in reversed(kept):
                self.began = line.get("time", self.began)
                self.productive = max(self.productive, line.get("train/productive_seconds", 0.0))
        self._lines = AppendLog(path, [json.dumps(line) for line in kept])
        self._board_folder = path.with_name("tensorboard")
        if is_bucket(path):
            self._temporary = tempfile.TemporaryDirectory()
        local = self._temporary.name if self._temporary else os.fspath(self._board_folder)
        self._board = tensorboardX.SummaryWriter(
            local, purge_step=after_step + 1, flush_secs=_FLUSH_EVERY
        )
        self._flushed = time.monotonic()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is None:
            return
        self._board.close()
        self.flush()
        self._lines.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes one line `{"step": step, "time": now, name: value, ...}`; not finite is null."""
        if self._lines is None:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        line = {"step": step, "time": round(time.time(), 3), **finite}
        self._lines.write(json.dumps(line))
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        if self._temporary is not None and time.monotonic() - self._flushed > _FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Brings what was written to a bucket; without, that is done every half a minute."""
        if self._temporary is not None:
            self._lines.flush()
            self._board.flush()
            copy_folder(self._temporary.name, self._board_folder)
            self._flushed = time.monotonic()


def read(workdir: str | os.PathLike[str]) -> list[dict[str, float | None]]:
    """The lines of `workdir/metrics.jsonl`; a last line that was cut off while written is left out.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a line other than the last is not JSON with a step.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    texts = path.read_text().splitlines()
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        elif number < len(texts):
            raise ValueError(f"{path}: line {number} is not a line of metrics: {text!r}")
    return lines
