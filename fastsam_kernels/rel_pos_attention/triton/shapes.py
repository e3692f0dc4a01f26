"""The classes of shapes that ``rel_pos_attention`` has tiles for."""

from __future__ import annotations

from ...triton.tiles import ShapeClass


class AttentionShape(ShapeClass):
    """Windows and the whole grid, each for heads of up to 64 channels and of more."""

    WINDOWED_64 = "windowed, d 64"
    WINDOWED_80 = "windowed, d 80"
    GLOBAL_64 = "global, d 64"
    GLOBAL_80 = "global, d 80"

    @classmethod
    def of(cls, head_dim: int, window_size: int) -> AttentionShape:
        """Return the class of a call; a window of 0 is the whole grid."""
        if window_size:
            return cls.WINDOWED_64 if head_dim <= 64 else cls.WINDOWED_80
        return cls.GLOBAL_64 if head_dim <= 64 else cls.GLOBAL_80
