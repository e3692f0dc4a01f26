"""Polygons back to masks."""

from __future__ import annotations

import itertools

import numpy as np


def fill(polygons: list[list[list[list[int]]]], shape: tuple[int, ...]) -> np.ndarray:
    """Even-odd filling: a pixel is inside when an odd number of vertical edges lie to its left."""
    crossings = np.zeros((shape[0], shape[1] + 1), int)
    for polygon in polygons:
        for ring in polygon:
            for (x0, y0), (x1, y1) in itertools.pairwise(ring):
                assert (x0 == x1) != (y0 == y1)
                if x0 == x1:
                    crossings[min(y0, y1) : max(y0, y1), x0] += 1
    return np.cumsum(crossings, axis=1)[:, :-1] % 2 == 1
