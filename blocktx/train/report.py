"""Evaluations and the plot of a run, whatever has interrupted it."""

import sys

from etils import epath

from blocktx.train.loss_plot import plot_loss
from blocktx.train.metrics import MetricsWriter, read


def complete_run(workdir: epath.Path, step: int, heldout: dict[str, float] | None) -> None:
    """Write the last evaluation and the plot of a finished run if they are missing."""
    missing = heldout is not None and not is_evaluated(workdir, step)
    if missing:
        with MetricsWriter(workdir, after_step=step) as writer:
            writer.write(step, heldout)
    if missing or not (workdir / "loss.png").exists():
        plot_or_warn(workdir)


def is_evaluated(workdir: epath.Path, step: int) -> bool:
    """Return whether metrics.jsonl has the evaluation of this step."""
    lines = read(workdir) if (workdir / "metrics.jsonl").exists() else []
    return any(line["step"] == step and "heldout/loss" in line for line in lines)


def plot_or_warn(workdir: epath.Path) -> None:
    """Draw loss.png. An error is a warning."""
    try:
        plot_loss(workdir)
    except Exception as error:  # such as a full disk
        print(f"warning: {workdir / 'loss.png'}: {error}", file=sys.stderr, flush=True)
