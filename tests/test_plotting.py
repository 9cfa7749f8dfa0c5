"""The style of plots: ticks, labels and files."""

import itertools

import numpy as np
import pytest
from matplotlib.text import Text

from blocktx import plotting
from blocktx.files import check_picture


def _tick_labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_files_are_readable_pictures_of_the_stated_size(tmp_path):
    figure, axes = plotting.new_figure("a $5 title", "x", "y", width=3, height=2)
    plotting.draw_line(axes, [1, 2], [3.0, 4.0], color=plotting.BLOCK, error=[0.1, 0.2])
    path = plotting.save(figure, tmp_path / "new" / "plot.png")
    import matplotlib.image

    image = matplotlib.image.imread(path)
    assert image.shape[:2] == (240, 360)
    assert [p.name for p in path.parent.iterdir()] == ["plot.png"]


@pytest.mark.parametrize(
    ("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_a_picture_has_the_format_of_its_ending(tmp_path, ending, start):
    path = tmp_path / f"plot.{ending}"
    check_picture(str(path))
    plotting.save(plotting.new_figure()[0], path)
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (1, 1000, ["1", "10", "100", "1,000"]),
        (20, 300, ["20", "50", "100", "200"]),
        (4.1, 7.6, ["4.5", "5", "5.5", "6", "6.5", "7", "7.5"]),
    ],
)
def test_logarithmic_axes_have_plain_numbers(low, high, wanted):
    figure, axes = plotting.new_figure()
    axes.set(xlim=(low, high), ylim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        plotting.log_axis(axis)
    figure.draw_without_rendering()
    for axis in (axes.xaxis, axes.yaxis):
        assert _tick_labels(axis) == wanted
        assert axis.get_scale() == "log"


@pytest.mark.parametrize("steps", [3, 20, 2000])
def test_counts_have_integers_at_ticks(steps):
    figure, axes = plotting.new_figure()
    axes.set(xlim=(0, steps))
    plotting.count_axis(axes.xaxis)
    figure.draw_without_rendering()
    labels = _tick_labels(axes.xaxis)
    assert len(labels) >= 3
    assert all(label.replace(",", "").isdecimal() for label in labels)


def test_base_2_axes_have_the_values_as_ticks():
    figure, axes = plotting.new_figure()
    plotting.draw_line(axes, [1, 2, 8, 2048], [1, 2, 3, 4], color=plotting.GREY)
    plotting.log2_axis(axes.xaxis, [1, 2, 8, 2048])
    figure.draw_without_rendering()
    assert _tick_labels(axes.xaxis) == ["1", "2", "8", "2,048"]
    assert len(axes.xaxis.get_minorticklocs()) == 0


@pytest.mark.parametrize("values", [[1, 1, 1], [1, 1.01, 3, 3.001, 3.002], [5, 1]])
def test_end_labels_do_not_overlap_and_keep_their_order(values):
    figure, axes = plotting.new_figure()
    axes.set(xlim=(0, 1), ylim=(0, 6))
    plotting.label_ends(axes, [(1, y, f"{y}", "black") for y in values])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    centres = [(box.y0 + box.y1) / 2 for box in boxes]
    assert np.argsort(centres, kind="stable").tolist() == np.argsort(values, kind="stable").tolist()


@pytest.mark.parametrize("seed", range(3))
def test_labels_of_points_cover_nothing(seed):
    """Lines that are close, points between them, error bars and a legend."""
    rng = np.random.default_rng(seed)
    figure, axes = plotting.new_figure(width=5.8, height=4)
    points = []
    for i, count in enumerate([4, 4, 1, 1]):
        x = np.sort(10 ** rng.uniform(2.5, 4, count))
        y = 3.2 + 0.2 * np.arange(count) + rng.uniform(-0.1, 0.1, count) + 0.2 * (count == 1)
        style = dict(color=plotting.PALETTE[i], label=f"family {i}")
        plotting.draw_line(axes, x, y, error=0.01 + 0 * y, xerr=0.1 * x, **style)
        points += [(*point, f"3+3 x {64 * i}", style["color"]) for point in zip(x, y, strict=True)]
    axes.margins(x=0.16, y=0.12)
    plotting.log_axis(axes.xaxis)
    plotting.legend(axes)
    plotting.label_points(axes, points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(label) for label in axes.texts]
    for box, line in itertools.product(boxes, axes.lines):
        path = line.get_transform().transform_path(line.get_path())
        assert not any(box.contains(*point) for point in path.vertices)
        assert line.get_linestyle() == "None" or not path.intersects_bbox(box, filled=False)
    for box in boxes:
        assert all(axes.bbox.contains(*corner) for corner in box.corners())
    for a, b in itertools.combinations([*boxes, axes.get_legend().get_window_extent()], 2):
        assert not a.overlaps(b)


def test_a_label_far_from_its_point_has_a_line_to_it():
    _, axes = plotting.new_figure()
    plotting.draw_line(axes, [0, 0.5, 1], [0, 0.5, 1], color=plotting.BLOCK)
    at_one_place = [(0.5, 0.5, f"load {i}", "black") for i in range(9)]
    plotting.label_points(axes, [(0.1, 0.8, "alone", "black"), *at_one_place])
    alone, *others = [label.arrow_patch.get_visible() for label in axes.texts]
    assert not alone
    assert any(others)


def test_a_legend_is_for_two_or_more():
    _, axes = plotting.new_figure()
    plotting.draw_line(axes, [1], [1], color=plotting.BLOCK, label="one")
    plotting.legend(axes)
    assert axes.get_legend() is None
    plotting.draw_line(axes, [1], [1], color=plotting.VANILLA, label="other", error=[1])
    plotting.legend(axes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "other"]


def test_categories_are_not_joined():
    _, axes = plotting.new_figure()
    plotting.draw_categories(axes, ["a", "b"], [[1.0, 2.0], [3.0]])
    assert _tick_labels(axes.xaxis) == ["a", "b"]
    assert all(line.get_linestyle() == "None" for line in axes.lines)


def test_dots_lie_above_the_bar_and_beside_each_other():
    _, axes = plotting.new_figure()
    plotting.draw_categories(axes, ["a", "b"], [[1.0, 1.0, 1.0], [3.0] * 20])
    for i, dots in enumerate(axes.lines):
        x = dots.get_xdata()
        assert len(set(x)) == len(x)
        assert all(abs(each - i) < 0.25 for each in x)  # over the bar
        assert dots.get_zorder() > axes.collections[i].get_zorder()


def test_equal_lines_are_all_visible():
    styles = [plotting.line_style(i) for i in range(9)]
    for above, below in zip(styles[1:], styles, strict=False):
        assert above["color"] != below["color"]
        assert above["linestyle"] != below["linestyle"]
        assert above["markersize"] <= below["markersize"]
    assert styles[0]["markersize"] > styles[1]["markersize"] > styles[2]["markersize"]
