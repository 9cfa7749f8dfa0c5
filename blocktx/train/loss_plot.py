"""Plots of the loss of runs."""

import os
from collections.abc import Sequence

from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from blocktx.files import write_png
from blocktx.train.metrics import read


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
