"""One style for all plots: figures, colours, ticks, error bars, labels that do not overlap.

A figure is made for the width of a README on GitHub (840 pixels) unless a size is given. Matplotlib
is imported on first use.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from blocktx import label_places
from blocktx.files import write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
BLOCK, VANILLA = PALETTE[:2]  # the two kinds of model, in all plots
GREY = "#7a7a7a"  # references and bounds
HEAT = "viridis"  # colour map of heat maps
ATTENTION = "magma_r"  # of attention, most of which is near 0: white

_DPI = 120
_DASHES = ("-", (0, (4, 3)), ":", "-.")
_LABEL_SIZE = 9


def new_figure(
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    *,
    width: float = 7.0,
    height: float = 4.2,
) -> tuple[Figure, Axes]:
    """Return a figure of `width` x `height` inches with one styled pair of axes."""
    figure, ((axes,),) = new_grid(1, 1, width=width, height=height)
    axes.set_title(plain(title))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def new_grid(
    rows: int, columns: int, *, width: float = 7.0, height: float = 4.2, **options: Any
) -> tuple[Figure, Any]:
    """Return a figure with `[rows, columns]` styled axes; `options` as for `Figure.subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_size(11)
    return figure, grid


def save(figure: Figure, path: str | os.PathLike[str]) -> epath.Path:
    """Write `figure` atomically as a PNG, SVG or PDF, by the ending, and return its path."""
    return write_picture(path, figure)


def plain(text: str) -> str:
    """Return `text` with the dollar signs escaped that would begin Matplotlib's mathematics."""
    return text.replace("$", r"\$")


def draw_line(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    *,
    color: str,
    label: str = "",
    error: Sequence[float] | None = None,
    marker: str = "o",
    **options: Any,
) -> None:
    """Draw points joined by a line, with error bars of `y` plus and minus `error` if given."""
    style = dict(color=color, marker=marker, markersize=4.5, linewidth=1.5, zorder=3) | options
    axes.errorbar(x, y, yerr=error, label=label or None, capsize=3, elinewidth=1.2, **style)


def line_style(i: int) -> dict[str, Any]:
    """Return the style of line `i` of several, for `draw_line`.

    If lines are equal, all are visible: the later ones, above, have gaps and smaller points.
    """
    return dict(
        color=PALETTE[i % len(PALETTE)],
        linestyle=_DASHES[i % len(_DASHES)],
        markersize=max(6.5 - 2 * i, 2.5),
    )


def draw_categories(
    axes: Axes, names: Sequence[str], values: Sequence[Sequence[float]], *, color: str = BLOCK
) -> None:
    """Draw dots of the values side by side and a bar at the mean, for each named category.

    Categories have no order, so no line joins them.
    """
    for i, of_category in enumerate(values):
        mean = sum(of_category) / len(of_category)
        axes.hlines(mean, i - 0.25, i + 0.25, color=color, alpha=0.4, linewidth=2.5, zorder=3)
        style = dict(color=color, markersize=5, markeredgecolor="white", markeredgewidth=0.6)
        count = len(of_category)
        x = [i + min(0.1, 0.45 / count) * (j - (count - 1) / 2) for j in range(count)]
        axes.plot(x, of_category, "o", zorder=4, **style)
    axes.set_xticks(range(len(names)), [plain(name) for name in names])
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(axis="x", visible=False)


def plain_axis(axis: Axis) -> None:
    """Write 10,000 at ticks in place of 10000 or 1e4."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def count_axis(axis: Axis) -> None:
    """Write plain numbers at ticks, at integers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    plain_axis(axis)


def log_axis(axis: Axis) -> None:
    """Make an axis logarithmic with plain numbers at ticks; call it after drawing."""
    from matplotlib.ticker import FixedLocator, NullLocator

    _scale(axis, "log")
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(FixedLocator(_log_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    plain_axis(axis)


def log2_axis(axis: Axis, values: Sequence[float]) -> None:
    """Make an axis logarithmic to base 2, with one tick at each of `values` (1, 2, 4, ...)."""
    from matplotlib.ticker import NullLocator

    _scale(axis, "log", base=2)
    axis.set_ticks(list(values), [number(value) for value in values])
    axis.set_minor_locator(NullLocator())


def number(value: float) -> str:
    """Return a number as a reader writes it: 1,000 and 0.25, never 10^3."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write labels right of the points `(x, y, text, color)`, moved apart where they would overlap.

    Call it last: the distances are those of the axes as they are drawn at this moment.
    """
    if not ends:
        return
    figure = axes.get_figure()
    figure.draw_without_rendering()
    points = 72 / figure.dpi
    heights = [axes.transData.transform(end[:2])[1] * points for end in ends]
    for (x, y, text, color), own, shown in zip(
        ends, heights, label_places.apart(heights, _LABEL_SIZE * 1.25), strict=True
    ):
        axes.annotate(
            plain(text),
            (x, y),
            xytext=(7, shown - own),
            textcoords="offset points",
            va="center",
            fontsize=_LABEL_SIZE,
            color=color,
            annotation_clip=False,
        )


def label_points(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write labels around the points `(x, y, text, color)`, where they cover least.

    A label stays within the axes and keeps clear of lines, points, the legend and other labels; the
    nearest such place is taken, with a thin line to the point if it is far. Call it last: the
    legend stays where it is at this moment.
    """
    from matplotlib.text import Text

    if not points:
        return
    figure = axes.get_figure()
    figure.draw_without_rendering()
    pixels = figure.dpi / 72
    taken = []
    if (key := axes.get_legend()) is not None:
        taken.append(key.get_window_extent().get_points())
        key.borderaxespad = 0
        key.set_loc(tuple(axes.transAxes.inverted().transform(taken[0][0])))
    labels, drawn = [], label_places.drawn_pixels(axes)
    for x, y, text, color in points:
        at = dict(xytext=(0, 0), textcoords="offset points", ha="center", va="center")
        leader = dict(arrowstyle="-", color=color, linewidth=0.6, shrinkA=1, shrinkB=3)
        style = dict(fontsize=_LABEL_SIZE, color=color, arrowprops=leader, in_layout=False)
        labels.append(axes.annotate(plain(text), (x, y), annotation_clip=False, **at, **style))
    centres = [axes.transData.transform(label.xy) for label in labels]
    # Of the text alone: an annotation's own extent has its line in it.
    sizes = [Text.get_window_extent(label).size for label in labels]
    inside = axes.bbox.get_points()
    offsets = label_places.around(centres, sizes, inside, taken, drawn, pixels)
    for label, (offset, is_near) in zip(labels, offsets, strict=True):
        label.set_position(offset / pixels)
        label.arrow_patch.set_visible(not is_near)


def legend(axes: Axes, **options: Any) -> None:
    """Add a legend if there is more than one entry to tell apart."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        handles = [h[0] if isinstance(h, tuple) else h for h in handles]  # no error bars
        axes.legend(handles, labels, **dict(frameon=False, fontsize=_LABEL_SIZE) | options)


def _scale(axis: Axis, scale: str, **options: Any) -> None:
    set_scale = getattr(axis.axes, f"set_{axis.axis_name}scale")
    set_scale(scale, **options)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return three to about ten round numbers between `low` and `high`, both positive."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        ticks = [d * 10.0**e for e in decades for d in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            return ticks
    narrow = MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [tick for tick in narrow if low <= tick <= high]
