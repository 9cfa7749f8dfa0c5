"""The pictures of studies."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from blocktx import plotting
from blocktx.reproduce.study import Chart, Panels, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 2  # of a picture with several pairs of axes


def draw(chart: Chart | Panels) -> Figure:
    """Draw the mean of each point, with the range of its seeds or repeats as error bars."""
    charts = chart.charts if isinstance(chart, Panels) else [chart]
    columns = min(_COLUMNS, len(charts))
    rows = -(-len(charts) // columns)
    size = dict(width=5.8 * columns, height=4.0 * rows) if len(charts) > 1 else {}
    figure, grid = plotting.new_grid(rows, columns, **size)
    for axes, each in zip(grid.flat, charts, strict=False):
        _draw(axes, each)
    if isinstance(chart, Panels):
        figure.suptitle(plotting.plain(chart.title))
    for axes, each in zip(grid.flat, charts, strict=False):
        _label(axes, each)
    return figure


def _draw(axes: Axes, chart: Chart) -> None:
    axes.set(title=chart.title, xlabel=chart.xlabel, ylabel=chart.ylabel)
    if not any(series.joined for series in chart.series) and chart.ticks is not None:
        (series,) = chart.series
        plotting.draw_categories(axes, list(chart.ticks.values()), series.y)
        return
    for series, color in _colored(chart):
        _draw_series(axes, series, color)
    if any(series.point_labels for series in chart.series):
        axes.margins(x=0.16, y=0.12)
    if "y" in chart.log:
        plotting.log_axis(axes.yaxis)
    if "x" in chart.log and chart.ticks is not None:
        plotting.log2_axis(axes.xaxis, list(chart.ticks))
    elif "x" in chart.log:
        plotting.log_axis(axes.xaxis)
    elif chart.ticks is not None:
        axes.set_xticks(list(chart.ticks), list(chart.ticks.values()))
    plotting.legend(axes)


def _colored(chart: Chart) -> list[tuple[Series, str]]:
    others = iter(color for color in plotting.PALETTE if color != plotting.VANILLA)
    return [(s, plotting.VANILLA if s.label == "vanilla" else next(others)) for s in chart.series]


def _label(axes: Axes, chart: Chart) -> None:
    points = [
        (x, statistics.mean(values), text, color)
        for series, color in _colored(chart)
        for x, values, text in zip(series.x, series.y, series.point_labels, strict=False)
    ]
    plotting.label_points(axes, points)


def _draw_series(axes: Axes, series: Series, color: str) -> None:
    means = [statistics.mean(values) for values in series.y]
    below = [mean - min(values) for mean, values in zip(means, series.y, strict=True)]
    above = [max(values) - mean for mean, values in zip(means, series.y, strict=True)]
    left = [x - low for x, (low, _) in zip(series.x, series.x_range, strict=False)]
    right = [high - x for x, (_, high) in zip(series.x, series.x_range, strict=False)]
    plotting.draw_line(
        axes,
        list(series.x),
        means,
        color=color,
        label=series.label,
        error=[below, above],
        xerr=[left, right] if left else None,
        linestyle="-" if series.joined else "none",
    )
