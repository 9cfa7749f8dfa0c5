"""Loss by place in a long context: does it fall to the end (the paper shows PG19)?"""

import os
import pathlib
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from blocktx.files import write_png


class Bin(NamedTuple):
    """The mean loss of the tokens at places `begin` to `end - 1` of their contexts."""

    begin: int
    end: int
    loss: float  # nats a token; nan where `tokens` is 0
    tokens: int  # that were scored


def position_curve(sums_2xMxK: np.ndarray, bin_tokens: int) -> list[Bin]:
    """The loss in bins of `bin_tokens` places, from `blocktx.evaluate.heldout.sums_by_place`.

    Places are counted from the first block, which is never predicted, and with padding.

    Raises:
      ValueError: a bin is smaller than a token.
    """
    if bin_tokens < 1:
        raise ValueError(f"bin: got {bin_tokens} tokens, must be 1 or greater")
    _, predicted, block_length = sums_2xMxK.shape
    end = (predicted + 1) * block_length
    bin_T = np.arange(block_length, end) // bin_tokens
    nats, count = (np.bincount(bin_T, sums.ravel()) for sums in sums_2xMxK)
    with np.errstate(invalid="ignore"):
        loss = nats / count
    return [
        Bin(i * bin_tokens, min((i + 1) * bin_tokens, end), float(loss[i]), int(count[i]))
        for i in range(len(count))
    ]


def plot_curve(bins: list[Bin], path: str | os.PathLike[str], title: str = "") -> pathlib.Path:
    """Draws a curve into a PNG at `path`, and returns `path`.

    Raises:
      ValueError: no bin holds a token.
    """
    seen = [bin_ for bin_ in bins if bin_.tokens]
    if not seen:
        raise ValueError("there is no curve to plot: no token was scored")
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    places = [(bin_.begin + bin_.end) / 2 for bin_ in seen]
    axes.plot(places, [bin_.loss for bin_ in seen], color="#4c78a8", marker="o", markersize=4)
    axes.set(xlabel="place in the context (tokens)", ylabel="loss (nats per token)", title=title)
    axes.set_xlim(0, bins[-1].end)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return pathlib.Path(write_png(path, figure))
