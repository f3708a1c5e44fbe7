"""Places for the labels of a scatter plot, so that none covers another label or a point."""

from __future__ import annotations

import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]  # left, bottom, right, top
_POINT = 3.0  # half of a point's size
_ANGLES = (0.6, 2.5, -0.6, -2.5, 1.57, -1.57, 0.0, 3.14, 1.1, 2.0, -1.1, -2.0)  # preferred first
_DISTANCES = (10, 15, 21, 28, 36, 45, 55, 66)


def label_places(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], within: Box
) -> list[tuple[float, float]]:
    """Choose a place for each label, one after the other: the nearest that is free.

    Where none is free within reach, a label takes the place where it covers least.

    Args:
        points: the points that are labelled, each (x, y). The unit of all arguments is the typographic point.
        sizes: width and height of each label.
        within: the area that labels may take.

    Returns: the middle of each label.
    """
    taken: list[Box] = [(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in points]
    places = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        best = (math.inf, (x, y))
        for distance in _DISTANCES:
            for angle in _ANGLES:
                middle = x + distance * math.cos(angle), y + distance * math.sin(angle)
                box = _around(middle, width, height)
                covered = sum(_shared(box, other) for other in taken) + _outside(box, within)
                best = min(best, (covered, middle), key=lambda choice: choice[0])
            if best[0] == 0:
                break
        places.append(best[1])
        taken.append(_around(best[1], width, height))
    return places


def _around(middle: tuple[float, float], width: float, height: float) -> Box:
    x, y = middle
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _shared(a: Box, b: Box) -> float:
    """Return the area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box, within: Box) -> float:
    """Return the area of a box that lies outside another."""
    return (box[2] - box[0]) * (box[3] - box[1]) - _shared(box, within)
