"""The pictures of studies: ticks, legends, lines and error bars."""

import pytest

from blocktx.reproduce.charts import draw
from blocktx.reproduce.study import Chart, Panels, Series


def axes_of(chart):
    figure = draw(chart)
    figure.draw_without_rendering()
    return figure.axes


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_categories_are_not_joined_and_have_their_names():
    points = Series("", range(3), [[1.0, 1.1], [2.0], [3.0]], joined=False)
    (axes,) = axes_of(Chart("c", "t", "x", "y", [points], ticks={0: "a", 1: "b", 2: "c"}))
    assert labels(axes.xaxis) == ["a", "b", "c"]
    assert all(line.get_linestyle() in ("None", "none") for line in axes.lines)
    assert axes.get_legend() is None


def test_numbers_are_joined_and_ticks_are_those_given():
    lines = [Series(name, [1, 2, 8], [[1.0, 1.2], [2.0], [3.0]]) for name in ("block", "vanilla")]
    chart = Chart("c", "t", "x", "y", lines, log="x", ticks={1: "1", 2: "2", 8: "8"})
    (axes,) = axes_of(chart)
    assert labels(axes.xaxis) == ["1", "2", "8"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["block", "vanilla"]
    assert axes.lines[0].get_linestyle() == "-"


@pytest.mark.parametrize("count", [1, 4])
def test_panels_have_axes_of_their_own(count):
    series = Series("", [1.0], [[1.0]], x_range=[(0.5, 2.0)], point_labels=["here"], joined=False)
    charts = [Chart("c", f"{i}", "x", "y", [series], log="x") for i in range(count)]
    found = axes_of(Panels("p", "all", charts))
    assert [axes.get_title() for axes in found] == [str(i) for i in range(count)]
    assert all(axes.texts[0].get_text() == "here" for axes in found)
    assert all(axes.get_legend() is None for axes in found)
