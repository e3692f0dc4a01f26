"""Masks as polygons whose edges run along pixel edges: exact, so that filling them gives the mask back."""

from __future__ import annotations

from typing import Any

import numpy as np

Corner = tuple[int, int]


def multipolygon(mask: np.ndarray) -> dict[str, Any]:
    """Convert a mask [H, W] bool to a GeoJSON-style ``MultiPolygon`` in pixels, x to the right and y down.

    Pixels that touch at a corner only are apart. A polygon is a list of rings, its outline first (clockwise as
    seen on a screen) and its holes after it; a ring's last corner is its first.
    """
    padded = np.pad(mask.astype(np.int8), 1)
    # 1 where the mask begins below or to the right of the edge, -1 where it ends.
    rows = np.diff(padded, axis=0)[:, 1:-1]  # [H + 1, W] horizontal edges
    columns = np.diff(padded, axis=1)[1:-1]  # [H, W + 1] vertical edges
    across = {(x0 if kind > 0 else x1, y, kind): x1 if kind > 0 else x0 for y, x0, x1, kind in _runs(rows)}
    # With the mask on the right hand: down where it ends at its right, up where it begins.
    vertical = list(_runs(columns.T))
    along = {(x, y1 if kind > 0 else y0, -kind): y0 if kind > 0 else y1 for x, y0, y1, kind in vertical}
    ring_at_edge: dict[tuple[int, int, int], int] = {}

    rings: list[list[Corner]] = []
    for start in list(across):
        if start not in across:  # it is part of a ring before
            continue
        x, y, step = start
        ring: list[Corner] = [(x, y)]
        while True:
            x = across.pop((x, y, step))
            ring.append((x, y))
            # To the right hand first: at a checkered corner that keeps to the same pixel.
            turn = step if (x, y, step) in along else -step
            ring_at_edge[x, y, turn] = len(rings)
            y = along[x, y, turn]
            ring.append((x, y))
            step = -turn if (x, y, -turn) in across or (x, y, -turn) == start else turn
            if (x, y, step) == start:
                break
        rings.append(ring)
    return {"type": "MultiPolygon", "coordinates": _nest(rings, columns, vertical, ring_at_edge)}


def _runs(edges: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Return (line, start, stop, kind) of the runs of equal, non-zero edges along the lines of [N, L]."""
    padded = np.pad(edges, ((0, 0), (1, 1)))
    lines, positions = np.nonzero(np.diff(padded, axis=1))
    before, after = padded[lines, positions], padded[lines, positions + 1]
    starts, stops = after != 0, before != 0
    return list(
        zip(
            lines[starts].tolist(),
            positions[starts].tolist(),
            positions[stops].tolist(),
            after[starts].tolist(),
            strict=True,
        )
    )


def _nest(
    rings: list[list[Corner]],
    columns: np.ndarray,
    vertical: list[tuple[int, int, int, int]],
    ring_at_edge: dict[tuple[int, int, int], int],
) -> list[list[list[list[int]]]]:
    """Group each hole with the outline of the pixels around it, found at the next edge to its left."""
    # A ring's first edge is a topmost one: an outline goes to the right there, a hole to the left.
    holes = [index for index, ring in enumerate(rings) if ring[1] < ring[0]]
    polygons = {index: [ring] for index, ring in enumerate(rings) if ring[1] > ring[0]}
    if holes:
        ring_of = np.full(columns.shape, -1, np.int32)
        for x, y0, y1, kind in vertical:
            ring_of[y0:y1, x] = ring_at_edge[x, y1 if kind > 0 else y0, -kind]
        owner: dict[int, int] = {}

        def outline(hole: int) -> int:
            trail = []
            while hole not in polygons and hole not in owner:
                trail.append(hole)
                x, y = min(rings[hole], key=lambda corner: (corner[1], corner[0]))
                row = ring_of[y - 1, :x]  # the pixel above the hole's first edge belongs to what surrounds it
                edges = np.flatnonzero(row >= 0)
                hole = int(row[edges[-1]])
            result = owner.get(hole, hole)
            owner.update(dict.fromkeys(trail, result))
            return result

        for hole in holes:
            polygons[outline(hole)].append(rings[hole])
    return [[[list(corner) for corner in ring] for ring in polygon] for polygon in polygons.values()]
