"""Where the labels of a plot stand so that they cover nothing. Places are in pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIDES = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))  # by preference
_GAPS = (4, 7, 11, 16, 24)  # between a point and its label, in points (1/72 inch)
_NEAR = 7  # a label so far off is still seen to belong to its point
_ROUNDS = 3  # the first does not know the later labels


def apart(heights: Sequence[float], distance: float) -> list[float]:
    """Return `heights`, moved as little as a simple pass can for all to be `distance` apart."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[tuple[float, list[int]]] = []  # centre and members, from below
    for i in order:
        groups.append((heights[i], [i]))
        while len(groups) > 1:
            (below, lower), (above, upper) = groups[-2:]
            if above - below >= distance * (len(lower) + len(upper)) / 2:
                break
            members = lower + upper
            centre = sum(heights[j] for j in members) / len(members)
            groups[-2:] = [(centre, members)]
    placed = list(heights)
    for centre, members in groups:
        for rank, i in enumerate(members):
            placed[i] = centre + distance * (rank - (len(members) - 1) / 2)
    return placed


def around(
    centres: Sequence[Any],
    sizes: Sequence[Any],
    inside: Any,
    taken: Sequence[Any],
    drawn: Any,
    pixels: float,
) -> list[tuple[Any, bool]]:
    """Return for each label the offset of its centre from its point, and whether it is near.

    Each takes the nearest place that is free, or that covers least.

    Args:
      centres: of the labelled points, `[2]` each.
      sizes: width and height of the labels.
      inside: the box `[[x0, y0], [x1, y1]]` that labels stay in.
      taken: boxes that they keep out of.
      drawn: points `[n, 2]` that they keep clear of.
      pixels: of a point (1/72 inch).
    """
    found: list[Any] = [None] * len(centres)
    boxes: list[Any] = [None] * len(centres)
    for _ in range(_ROUNDS):
        for i, (centre, size) in enumerate(zip(centres, sizes, strict=True)):
            others = [*taken, *(box for j, box in enumerate(boxes) if j != i and box is not None)]
            best = np.inf
            for gap, side in itertools.product(_GAPS, _SIDES):
                offset = np.array(side) * (np.array(size) / 2 + gap * pixels)
                box = centre + offset + np.outer([-0.5, 0.5], size)
                cost = gap + _covered(box, inside, others, drawn, 3 * pixels)
                if cost < best:
                    best, boxes[i], found[i] = cost, box, (offset, gap <= _NEAR)
    return found


def drawn_pixels(axes: Axes) -> Any:
    """Return pixels `[n, 2]` of the points, lines and error bars of `axes`, some 3 apart."""
    from matplotlib.cbook import STEP_LOOKUP_MAP
    from matplotlib.collections import LineCollection

    found = [np.empty((0, 2))]
    pieces = []
    for line in axes.lines:
        corners = STEP_LOOKUP_MAP[line.get_drawstyle()](*line.get_data(orig=False))
        corners = line.get_transform().transform(np.transpose(corners).reshape(-1, 2))
        found.append(corners)
        pieces += [] if line.get_linestyle() in ("None", "") else itertools.pairwise(corners)
    for lines in axes.collections:
        if isinstance(lines, LineCollection):
            for segment in lines.get_segments():
                pieces += itertools.pairwise(lines.get_transform().transform(segment))
    for start, end in pieces:
        if np.isfinite([start, end]).all():
            found.append(np.linspace(start, end, 2 + int(np.hypot(*(end - start)) / 3)))
    return np.concatenate(found)


def _covered(box: Any, inside: Any, others: Sequence[Any], drawn: Any, distance: float) -> float:
    """Return what it costs that a label is in `box`, one `[[x0, y0], [x1, y1]]` of pixels."""
    low, high = box[0] - distance, box[1] + distance
    cost = 10.0 * np.sum(np.all((low < drawn) & (drawn < high), axis=1))
    cost += 1000.0 * (np.any(box[0] < inside[0]) or np.any(box[1] > inside[1]))
    return cost + 1000.0 * sum(np.all((low < b[1]) & (b[0] < high)) for b in others)
