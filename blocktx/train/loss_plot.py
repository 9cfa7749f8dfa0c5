"""Plots of the loss of runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from blocktx import plotting
from blocktx.train.metrics import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WARM_UP = 0.03  # of the steps: the loss before is above the plot
_WINDOWS = 30  # of the smoothed training loss

Curve = list[tuple[float, float]]  # steps and losses


def plot_loss(workdir: str | os.PathLike[str]) -> epath.Path:
    """Draw training and held-out loss by step, and return the path: `workdir/loss.png`.

    Raises:
      FileNotFoundError: `workdir` has no metrics.jsonl.
      ValueError: no loss is in it.
    """
    workdir = epath.Path(workdir)
    lines = read(workdir)
    train, heldout = _curve(lines, "train/loss"), _curve(lines, "heldout/loss")
    if not train and not heldout:
        raise ValueError(f"{workdir / 'metrics.jsonl'}: no loss in it to plot")
    figure, axes = plotting.new_figure(workdir.name, "step", "loss (nats per token)")
    ends = []
    if train:
        smooth = _smoothed(train)
        color = plotting.BLOCK
        axes.plot(*zip(*train, strict=True), color=color, linewidth=0.8, alpha=0.3)
        axes.plot(*zip(*smooth, strict=True), color=color, linewidth=1.5, label="training")
        ends.append((*smooth[-1], f"{smooth[-1][1]:.3f}", color))
    if heldout:
        color = plotting.VANILLA
        plotting.draw_line(axes, *zip(*heldout, strict=True), color=color, label="held-out")
        ends.append((*heldout[-1], f"{heldout[-1][1]:.3f}", color))
    _fit(axes, [train, heldout])
    plotting.legend(axes)
    plotting.label_ends(axes, ends)
    return plotting.save(figure, workdir / "loss.png")


def plot_runs(
    workdirs: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]
) -> epath.Path:
    """Draw the held-out losses of several runs into one picture at `path`, and return `path`.

    Raises:
      ValueError: there is no run, or one of `workdirs` has no metrics.jsonl or no held-out loss.
    """
    if not workdirs:
        raise ValueError("no run to plot")
    runs = {os.fspath(workdir): _heldout(workdir) for workdir in workdirs}
    empty = [workdir for workdir, curve in runs.items() if not curve]
    if empty:
        raise ValueError(f"no held-out loss to plot in {', '.join(empty)}")
    figure, axes = plotting.new_figure("held-out loss", "step", "loss (nats per token)")
    ends = []
    for i, (workdir, curve) in enumerate(runs.items()):
        style, name = plotting.line_style(i), epath.Path(workdir).name
        plotting.draw_line(axes, *zip(*curve, strict=True), label=name, **style)
        ends.append((*curve[-1], f"{name} {curve[-1][1]:.3f}", style["color"]))
    _fit(axes, list(runs.values()))
    plotting.label_ends(axes, ends)
    return plotting.save(figure, path)


def _heldout(workdir: str | os.PathLike[str]) -> Curve:
    try:
        return _curve(read(workdir), "heldout/loss")
    except FileNotFoundError:
        raise ValueError(
            f"{os.fspath(workdir)}: no metrics.jsonl; give the folder of a run of launch/train.py"
        ) from None


def _curve(lines: list[dict[str, float | None]], name: str) -> Curve:
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def _smoothed(curve: Curve) -> Curve:
    """Return the means over windows of equal numbers of points."""
    parts = np.array_split(np.array(curve), min(len(curve), _WINDOWS))
    means = [tuple(part.mean(0)) for part in parts]
    means[-1] = (curve[-1][0], means[-1][1])  # ends where the run does
    return means


def _fit(axes: Axes, curves: list[Curve]) -> None:
    """Set limits by what follows the first steps, where the loss falls from that of chance."""
    curves = [curve for curve in curves if curve]
    begin = _WARM_UP * max(curve[-1][0] for curve in curves)
    losses = [loss for curve in curves for step, loss in curve if step >= begin]
    low, high = min(losses), max(losses)
    margin = 0.06 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(left=0)
    plotting.count_axis(axes.xaxis)
