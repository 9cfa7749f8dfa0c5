"""Loss by place in a long context (the paper shows PG19)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath

from blocktx import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEAST_SPAN = 0.1  # of the loss: a smaller difference does not fill the plot
_INTERVAL = 1.96  # standard errors, for 95%

Runs = Sequence[tuple[str, np.ndarray]]  # names, and sums of `heldout.running_sums`


class Bin(NamedTuple):
    """The mean loss of the tokens at places `begin` to `end - 1` of their contexts."""

    begin: int
    end: int
    loss: float  # nats per token; nan if `tokens` is 0
    tokens: int  # scored ones
    error: float  # standard error of the mean, tokens taken as independent; nan below 2 tokens


def default_bin(context_length: int, block_length: int) -> int:
    """Return the tokens of a bin that divides a context into 16, in whole blocks."""
    return max(1, context_length // 16 // block_length) * block_length


def position_curve(sums_3xMxK: np.ndarray, bin_tokens: int) -> list[Bin]:
    """Return the loss in bins of `bin_tokens` places, from sums of `heldout.running_sums`.

    Places are counted from the first block, which is never predicted, and include padding.

    Raises:
      ValueError: a bin is smaller than a token.
    """
    if bin_tokens < 1:
        raise ValueError(f"bin: got {bin_tokens} tokens, must be 1 or greater")
    _, predicted, block_length = sums_3xMxK.shape
    end = (predicted + 1) * block_length
    bin_T = np.arange(block_length, end) // bin_tokens
    binned = [np.bincount(bin_T, sums.ravel()) for sums in sums_3xMxK]
    return [
        Bin(i * bin_tokens, min((i + 1) * bin_tokens, end), *mean_and_error(*sums))
        for i, sums in enumerate(zip(*binned, strict=True))
    ]


def mean_and_error(nats: float, tokens: float, squares: float) -> tuple[float, int, float]:
    """Return the mean loss, the number of tokens, and the standard error of the mean."""
    if not tokens:
        return math.nan, 0, math.nan
    mean = nats / tokens
    variance = max(squares / tokens - mean**2, 0)
    error = math.sqrt(variance / (tokens - 1)) if tokens > 1 else math.nan
    return float(mean), int(tokens), error


def plot_losses(
    runs: Runs, bin_tokens: int, path: str | os.PathLike[str], title: str = ""
) -> epath.Path:
    """Draw the loss by position in the block and by place in the context, and return `path`.

    Args:
      runs: names of models, and their sums of `heldout.running_sums`.
      bin_tokens: places in a bin of the context.
      path: the picture to write.
      title: of the figure.

    Raises:
      ValueError: no token was scored.
    """
    if not all(sums[1].sum() for _, sums in runs):
        raise ValueError("there is no curve to plot: no token was scored")
    figure, ((by_position, by_place),) = plotting.new_grid(
        1, 2, width=9, height=3.8, width_ratios=(1, 1.8)
    )
    draw_losses(by_position, by_place, runs, bin_tokens)
    figure.suptitle(plotting.plain(f"{title} (error bars: 95% confidence)".lstrip()), fontsize=11)
    return plotting.save(figure, path)


def draw_losses(by_position: Axes, by_place: Axes, runs: Runs, bin_tokens: int) -> None:
    """Draw the loss by position and by place, on one axis of losses."""
    by_place.sharey(by_position)
    by_place.tick_params(labelleft=False)
    _draw_by_position(by_position, runs)
    _draw_by_place(by_place, runs, bin_tokens)
    _widen(by_position)
    plotting.legend(by_place)


def _draw_by_position(axes: Axes, runs: Runs) -> None:
    for i, (name, sums_3xMxK) in enumerate(runs):
        means = [mean_and_error(*sums) for sums in sums_3xMxK.sum(1).T]
        plotting.draw_line(
            axes,
            range(1, len(means) + 1),
            [loss for loss, *_ in means],
            error=[_INTERVAL * error for *_, error in means],
            label=name,
            **plotting.line_style(i),
        )
    length = max(sums.shape[2] for _, sums in runs)
    axes.set(xlabel="position in the block", ylabel="loss (nats per token)")
    axes.set_xticks(range(1, length + 1))
    axes.set_xlim(0.5, length + 0.5)


def _draw_by_place(axes: Axes, runs: Runs, bin_tokens: int) -> None:
    for i, (name, sums_3xMxK) in enumerate(runs):
        bins = [bin_ for bin_ in position_curve(sums_3xMxK, bin_tokens) if bin_.tokens]
        plotting.draw_line(
            axes,
            [(bin_.begin + bin_.end) / 2 for bin_ in bins],
            [bin_.loss for bin_ in bins],
            error=[_INTERVAL * bin_.error for bin_ in bins],
            label=name,
            **plotting.line_style(i),
        )
    end = max((sums.shape[1] + 1) * sums.shape[2] for _, sums in runs)
    axes.set(xlabel=f"place in the context (bins of {bin_tokens} tokens)", xlim=(0, end))


def _widen(axes: Axes) -> None:
    """Let a small difference look small."""
    low, high = axes.get_ylim()
    missing = _LEAST_SPAN * (low + high) / 2 - (high - low)
    if missing > 0:
        axes.set_ylim(low - missing / 2, high + missing / 2)
