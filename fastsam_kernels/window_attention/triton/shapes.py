"""The classes of shapes that ``window_attention`` has tiles for."""

from __future__ import annotations

from ...triton.tiles import ShapeClass

_SMALL = 8


class WindowShape(ShapeClass):
    """Windows of at most 64 tokens, with queries of each or pooled, larger ones and the whole grid, by head width."""

    SMALL = "windows up to 8"
    SMALL_POOLED = "pooled windows up to 8"
    WINDOWED_64 = "windowed, d 64"
    WINDOWED_96 = "windowed, d 96"
    GLOBAL_64 = "global, d 64"
    GLOBAL_96 = "global, d 96"

    @classmethod
    def of(cls, head_dim: int, window_size: int, pool_queries: bool) -> WindowShape:
        """Return the class of a call; a window of 0 is the whole grid."""
        if 0 < window_size <= _SMALL:
            return cls.SMALL_POOLED if pool_queries else cls.SMALL
        if window_size:
            return cls.WINDOWED_64 if head_dim <= 64 else cls.WINDOWED_96
        return cls.GLOBAL_64 if head_dim <= 64 else cls.GLOBAL_96
