"""The pictures of studies."""

import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, ScalarFormatter

from blocktx.reproduce.study import Chart, Panels

_COLORS = ("#4c78a8", "#e45756", "#54a24b", "#f58518", "#b279a2", "#9d755d")
_COLUMNS = 2  # of a picture with several pairs of axes


def draw(chart: Chart | Panels) -> Figure:
    """Draw means over seeds with their range; points of one series are joined unless it says no."""
    charts = chart.charts if isinstance(chart, Panels) else [chart]
    columns = min(_COLUMNS, len(charts))
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(6.5 * columns, 4.3 * rows), dpi=110, layout="constrained")
    for axes, each in zip(figure.subplots(rows, columns, squeeze=False).flat, charts, strict=False):
        _draw(axes, each)
    if isinstance(chart, Panels):
        figure.suptitle(chart.title)
    return figure


def _draw(axes: Axes, chart: Chart) -> None:
    for series, color in zip(chart.series, _COLORS, strict=False):
        means = [statistics.mean(values) for values in series.y]
        below = [mean - min(values) for mean, values in zip(means, series.y, strict=True)]
        above = [max(values) - mean for mean, values in zip(means, series.y, strict=True)]
        left = [x - low for x, (low, _) in zip(series.x, series.x_range, strict=False)]
        right = [high - x for x, (_, high) in zip(series.x, series.x_range, strict=False)]
        axes.errorbar(
            list(series.x),
            means,
            yerr=[below, above],
            xerr=[left, right] if left else None,
            color=color,
            marker="o",
            capsize=4,
            linewidth=1.5,
            linestyle="-" if series.joined else "none",
            label=series.label or None,
        )
        for x, y, label in zip(series.x, means, series.point_labels, strict=False):
            axes.annotate(
                label, (x, y), (6, 5), textcoords="offset points", fontsize=8, color=color
            )
    _set_scales(axes, chart)
    if any(series.point_labels for series in chart.series):
        axes.margins(x=0.18, y=0.12)
    if sum(bool(series.label) for series in chart.series) > 1:
        axes.legend(frameon=False, loc="best")
    axes.set(title=chart.title, xlabel=chart.xlabel, ylabel=chart.ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _set_scales(axes: Axes, chart: Chart) -> None:
    if "x" in chart.log:
        axes.set_xscale("log")
    if "y" in chart.log:
        axes.set_yscale("log")
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if name in chart.log:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(ScalarFormatter())
    if chart.ticks is not None:
        axes.xaxis.set_major_locator(FixedLocator(list(chart.ticks)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(list(chart.ticks), list(chart.ticks.values()))
        if "x" not in chart.log:
            axes.margins(x=0.1)
