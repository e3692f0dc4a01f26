"""Windows of a grid of tokens as views of it, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Region(NamedTuple):
    """A rectangle of the grid filled by windows of one size: all whole ones, or those cut at an edge."""

    top: int
    left: int
    windows: tuple[int, int]
    window: tuple[int, int]

    def cut(self, x: Tensor) -> Tensor:
        """Cut [B, H, W, C] into a view [B, windows down, rows, windows across, columns, C]."""
        (down, across), (rows, columns) = self.windows, self.window
        x = x[:, self.top : self.top + down * rows, self.left : self.left + across * columns]
        return x.unflatten(2, (across, columns)).unflatten(1, (down, rows))


def regions(height: int, width: int, window: tuple[int, int]) -> Iterator[Region]:
    """Yield the regions of a grid cut into windows from its upper left corner."""

    def spans(length: int, size: int) -> list[tuple[int, int, int]]:
        whole, rest = divmod(length, size)
        return [(0, whole, size)] * (whole > 0) + [(whole * size, 1, rest)] * (rest > 0)

    for top, down, rows in spans(height, window[0]):
        for left, across, columns in spans(width, window[1]):
            yield Region(top, left, (down, across), (rows, columns))
