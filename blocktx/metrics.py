"""What a run measures, kept: metrics.jsonl, TensorBoard files, plot of the loss."""

import json
import math
import os
import tempfile
import time
from collections.abc import Sequence

import jax
import tensorboardX
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from blocktx.run_folder import Lines, copy_folder, is_bucket, write_png

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
        self._lines = Lines(path, [json.dumps(line) for line in kept])
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


def plot_loss(workdir: str | os.PathLike[str]) -> epath.Path:
    """Draws training and held-out loss by step, and returns where: `workdir/loss.png`.

    Raises:
      FileNotFoundError: if `workdir` has no metrics.jsonl.
      ValueError: if no loss is in it.
    """
    workdir = epath.Path(workdir)
    lines = read(workdir)
    train, heldout = _series(lines, "train/loss"), _series(lines, "heldout/loss")
    if not train and not heldout:
        raise ValueError(f"{workdir / 'metrics.jsonl'}: no loss in it to plot")
    figure, axes = _loss_axes(workdir.name)
    if train:
        axes.plot(*zip(*train, strict=True), color="#4c78a8", linewidth=1.2, label="training")
    if heldout:
        _draw_heldout(axes, heldout, "#e45756", "held-out")
    return _save(figure, axes, workdir / "loss.png")


def plot_runs(
    workdirs: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]
) -> epath.Path:
    """Draws the held-out losses of several runs into one PNG at `path`, and returns `path`.

    Raises:
      FileNotFoundError: if one of `workdirs` has no metrics.jsonl.
      ValueError: if there is no run, or no held-out loss in one of them.
    """
    if not workdirs:
        raise ValueError("no run to plot")
    runs = {os.fspath(w): _series(read(w), "heldout/loss") for w in workdirs}
    empty = [workdir for workdir, heldout in runs.items() if not heldout]
    if empty:
        raise ValueError(f"no held-out loss to plot in {', '.join(empty)}")
    figure, axes = _loss_axes("held-out loss")
    for i, (workdir, heldout) in enumerate(runs.items()):
        _draw_heldout(axes, heldout, f"C{i}", epath.Path(workdir).name)
    return _save(figure, axes, epath.Path(path))


def _series(lines: list[dict[str, float | None]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def _loss_axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", xlabel="step", ylabel="loss (nats per token)", title=title)
    plain = ScalarFormatter()  # 1000 and 4.5, not powers of ten
    plain.set_scientific(False)
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_heldout(axes: Axes, heldout: list[tuple[float, float]], color: str, label: str) -> None:
    """Draws a curve with its last value beside it."""
    style = dict(color=color, linewidth=1.6, marker="o", markersize=5, zorder=3)
    axes.plot(*zip(*heldout, strict=True), label=label, **style)
    axes.annotate(
        f"{heldout[-1][1]:.3f}",
        heldout[-1],
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        color=color,
    )


def _save(figure: Figure, axes: Axes, path: epath.Path) -> epath.Path:
    axes.legend(frameon=False)
    return write_png(path, figure)
