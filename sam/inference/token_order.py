"""Tokens of an image in the order of windows, as blocks with windows take them on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsam_kernels.windows import Region, regions


class Order(NamedTuple):
    """The order of the tokens [T, C] of one image: region by region, and in each window by window.

    Attributes:
        size: (height, width) of the grid.
        window: side of the windows.
    """

    size: tuple[int, int]
    window: int

    @property
    def regions(self) -> list[Region]:
        return list(regions(*self.size, (self.window, self.window)))

    def pooled(self) -> Order:
        """Return the order after each 2 x 2 tokens became one."""
        return Order((self.size[0] // 2, self.size[1] // 2), self.window // 2)

    def from_grid(self, grid: Tensor) -> Tensor:
        """Reorder a grid [1, H, W, C] into tokens [T, C]."""
        parts = [region.cut(grid).transpose(2, 3).reshape(-1, grid.shape[-1]) for region in self.regions]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def to_grid(self, tokens: Tensor) -> Tensor:
        """Restore the grid [1, H, W, C] of tokens [T, C]."""
        grid, start = tokens.new_empty((1, *self.size, tokens.shape[-1])), 0
        for region in self.regions:
            target = region.cut(grid).transpose(2, 3)
            stop = start + target[..., 0].numel()
            target.copy_(tokens[start:stop].view(target.shape))
            start = stop
        return grid

    def chunks(self, tokens: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
        """Yield ranges of whole windows of about so many ``tokens``, and the (rows, columns) of these windows."""
        start = 0
        for region in self.regions:
            area = region.window[0] * region.window[1]
            stop, step = start + region.windows[0] * region.windows[1] * area, max(tokens // area, 1) * area
            yield from ((at, min(at + step, stop), region.window) for at in range(start, stop, step))
            start = stop


class Level(NamedTuple):
    """The tokens of a stage: [B, H, W, C], or [T, C] of one image in an order."""

    tokens: Tensor
    order: Order | None

    @classmethod
    def of(cls, grid: Tensor, window: int) -> Level:
        """Return tokens [B, H, W, C] as a level, in the order of windows for one image on a CPU."""
        if grid.device.type != "cpu" or len(grid) > 1:
            return cls(grid, None)
        order = Order((grid.shape[1], grid.shape[2]), window)
        return cls(order.from_grid(grid), order)

    def grid(self) -> Tensor:
        """Return them as [B, H, W, C]."""
        return self.tokens if self.order is None else self.order.to_grid(self.tokens)

    def project(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Return their projection as [B, H, W, C']."""
        return Level(F.linear(self.tokens, weight, bias), self.order).grid()

    def ordered(self, window: int) -> Level:
        """Return them in the order of the windows of a block."""
        if self.order is None or not window or self.order.window == window:
            return self
        order = Order(self.order.size, window)
        return Level(order.from_grid(self.grid()), order)
