"""The classes of shapes that ``hypernetwork_masks`` has tiles for."""

from __future__ import annotations

from ...triton.tiles import ShapeClass


class UpscalingShape(ShapeClass):
    """Masks of any shape, and those with features of finer grids, which take registers."""

    ANY = "any"
    FINER = "finer features"
