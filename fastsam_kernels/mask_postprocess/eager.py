"""Mask post-processing in PyTorch operations: tiles of 32 x 32 pixels, and only those that a threshold goes through.

A pixel lies between the smallest and the largest logit under its tile. Most tiles are therefore decided by two
comparisons; the others are evaluated a few hundred at a time, as small matrix products whose result stays in the
cache, and leave it as words of 32 bits, a word for a column of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .resize_map import TILE, Resizing, TiledAxis, tiled_axes
from .statistics import MaskStatistics
from .words import pack_bits

_MASK_CHUNK = 16
_MAX_ELEMENTS = 2**19  # of the pixels of undecided tiles and of the logits under them
# Rounding of a sum of taps, relative to the largest logit in it: nothing so close to a threshold is decided unseen.
_GUARD = 1e-6


class _DeviceAxis(NamedTuple):
    start: Tensor  # [tiles]
    matrix: Tensor  # [tiles, 32, patch]
    used: Tensor  # [tiles]
    offsets: Tensor  # [patch]

    @classmethod
    def of(cls, axis: TiledAxis, device: torch.device) -> _DeviceAxis:
        start, matrix, used = (torch.from_numpy(values).to(device) for values in axis)
        if device.type == "cuda":
            matrix = matrix.double()  # products of fp32 may be made in TF32 there
        return cls(start, matrix, used, torch.arange(matrix.shape[2], device=device))


class TileGrid:
    """Positions of the tiles of one resizing, and the logits under each."""

    def __init__(self, low_size: tuple[int, int], resizing: Resizing, device: torch.device) -> None:
        rows, columns = tiled_axes(low_size, resizing)
        self.rows, self.columns = _DeviceAxis.of(rows, device), _DeviceAxis.of(columns, device)
        self.shape = (len(rows.start), len(columns.start))
        self.pixels = self.rows.used[:, None] * self.columns.used  # [tile rows, tile columns]
        bit = torch.arange(TILE, device=device)
        self.row_bits = pack_bits(bit < self.rows.used[:, None])  # [tile rows], a bit a row in use
        self.column_bits = -(bit < self.columns.used[:, None]).int()  # [tile columns, 32], all or no bits
        per_tile = max(TILE * TILE, rows.matrix.shape[2] * columns.matrix.shape[2])
        self.tile_chunk = max(1, _MAX_ELEMENTS // per_tile)

    def bounds(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the largest possible value of the pixels of each tile, [N, tile rows, tile columns]."""
        rows = (self.rows.start[:, None] + self.rows.offsets).flatten()
        columns = (self.columns.start[:, None] + self.columns.offsets).flatten()
        strips = logits.index_select(1, rows).unflatten(1, (self.shape[0], -1))  # [N, tile rows, patch, w]

        def over_columns(strip: Tensor) -> Tensor:
            return strip.index_select(2, columns).unflatten(2, (self.shape[1], -1))

        low, high = over_columns(strips.amin(dim=2)).amin(dim=3), over_columns(strips.amax(dim=2)).amax(dim=3)
        guard = _GUARD * torch.maximum(low.abs(), high.abs())
        return low - guard, high + guard

    def words(self, logits: Tensor, tiles: Tensor, thresholds: tuple[float, ...]) -> Tensor:
        """Threshold tiles (mask, tile row, tile column) [K, 3] at each threshold, to [thresholds, K, 32] int32."""
        mask, row, column = tiles.unbind(1)
        rows = self.rows.start[row][:, None, None] + self.rows.offsets
        columns = self.columns.start[column][:, None, None] + self.columns.offsets[:, None]
        patches = logits[mask[:, None, None], rows, columns]  # [K, patch columns, patch rows]
        patches = patches.to(self.rows.matrix.dtype)
        pixels = self.columns.matrix[column] @ patches @ self.rows.matrix[row].transpose(1, 2)  # [K, column, row]
        inside = self.row_bits[row][:, None] & self.column_bits[column]
        return torch.stack([pack_bits(pixels > threshold) & inside for threshold in thresholds])


def _count_bits(words: Tensor) -> Tensor:
    """Count the bits set in [..., 32] int32 words, to [...] int64."""
    pairs = words.view(torch.int64)
    pairs = pairs - ((pairs >> 1) & 0x5555555555555555)
    pairs = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    pairs = (pairs + (pairs >> 4)) & 0x0F0F0F0F0F0F0F0F
    return pairs.sum(dim=-1).view(torch.uint8).unflatten(-1, (-1, 8)).sum(dim=-1)


def _ends(words: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest bit set in each word, int32 and not zero."""
    wide = words.long() & 0xFFFFFFFF
    # Without the second highest bit, nothing rounds to the next power of two: not every device has fp64.
    lowest, highest = (torch.frexp(value.float()).exponent.long() - 1 for value in (wide & -wide, wide & ~(wide >> 1)))
    return lowest, highest


def _any_row(words: Tensor) -> Tensor:
    """Return the union of 32 words, [K, 32] -> [K]."""
    while words.shape[1] > 1:
        half = words.shape[1] // 2
        words = words[:, :half] | words[:, half:]
    return words[:, 0]


def statistics_eager(low_res: Tensor, resizing: Resizing, threshold: float, offset: float) -> MaskStatistics:
    """Compute ``mask_statistics``."""
    device, size = low_res.device, low_res.shape[1:]
    grid = TileGrid((size[0], size[1]), resizing, device)
    counts = torch.zeros(3, len(low_res), dtype=torch.int64, device=device)
    # Left, top, and how far right and bottom are from the far corner: the smallest of each is the box.
    far = torch.tensor([2**31 - 1] * 4, device=device)
    edges = far.repeat(len(low_res), 1)
    cuts = (threshold + offset, threshold - offset, threshold)
    for start, logits in _blocks(low_res):
        part = slice(start, start + len(logits))
        low, high = grid.bounds(logits)
        full = low > max(cuts)
        counts[:, part] += (full * grid.pixels).sum(dim=(1, 2))
        edges[part] = _tile_edges(full.nonzero(), len(logits), far)
        undecided = (~full & ~(high <= min(cuts))).nonzero()
        for tiles in undecided.split(grid.tile_chunk):
            words = grid.words(logits, tiles, cuts)
            rows = start + tiles[:, 0]
            counts.index_add_(1, rows, _count_bits(words))
            _word_edges(words[2], tiles, edges[part])
    height, width = resizing.output_size
    last = torch.tensor([width - 1, height - 1], device=device)
    boxes = torch.cat([edges[:, :2], torch.minimum(-edges[:, 2:], last)], dim=1)
    return MaskStatistics(counts[0], counts[1], counts[2], boxes * (counts[2] > 0)[:, None])


def _tile_edges(full: Tensor, masks: int, far: Tensor) -> Tensor:
    """Return the edges [masks, 4] of the tiles (mask, tile row, tile column) that are wholly inside."""
    mask, row, column = full.unbind(1)
    top, left = row * TILE, column * TILE
    values = torch.stack([left, top, -(left + TILE - 1), -(top + TILE - 1)], dim=1)
    return far.repeat(masks, 1).scatter_reduce_(0, mask[:, None].expand(-1, 4), values, "amin")


def _word_edges(words: Tensor, tiles: Tensor, edges: Tensor) -> None:
    """Move ``edges`` out to what the words [K, 32] of tiles contain."""
    rows = _any_row(words)
    filled = rows.nonzero()[:, 0]
    mask, row, column = tiles[filled].unbind(1)
    (top, bottom), (left, right) = _ends(rows[filled]), _ends(pack_bits(words[filled] != 0))
    x, y = column * TILE, row * TILE
    values = torch.stack([x + left, y + top, -(x + right), -(y + bottom)], dim=1)
    edges.scatter_reduce_(0, mask[:, None].expand(-1, 4), values, "amin")


def packed_eager(low_res: Tensor, resizing: Resizing, threshold: float) -> Tensor:
    """Compute ``packed_masks``."""
    size = low_res.shape[1:]
    grid = TileGrid((size[0], size[1]), resizing, low_res.device)
    tile_rows, tile_columns = grid.shape
    inside = (grid.row_bits[:, None, None] & grid.column_bits).permute(1, 2, 0)  # [tile columns, 32, tile rows]
    out = torch.empty(len(low_res), tile_columns, TILE, tile_rows, dtype=torch.int32, device=low_res.device)
    for start, logits in _blocks(low_res):
        low, high = grid.bounds(logits)
        full = low > threshold
        out[start : start + len(logits)] = -full.int().transpose(1, 2)[:, :, None] & inside
        for tiles in (~full & ~(high <= threshold)).nonzero().split(grid.tile_chunk):
            mask, row, column = tiles.unbind(1)
            out[start + mask, column, :, row] = grid.words(logits, tiles, (threshold,))[0]
    return out.flatten(1, 2)[:, : resizing.output_size[1]]


def _blocks(low_res: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(low_res), _MASK_CHUNK):
        yield start, low_res[start : start + _MASK_CHUNK].float()
