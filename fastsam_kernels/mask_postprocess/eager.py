"""Mask post-processing in PyTorch operations: tiles of 32 x 32 pixels, and only those that a threshold goes through.

A pixel lies between the smallest and the largest logit under its tile. Most tiles are therefore decided by two
comparisons; the others are evaluated a few hundred at a time, as small matrix products whose result stays in the
cache, and leave it as words of 32 bits, a word for a column of a tile. A mask that no such comparison helps, as one
that is noise, is evaluated as a whole: in rows of tiles, by products that are as many times larger.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .resize_map import TILE, Resizing, TiledAxis, tiled_axes
from .statistics import MaskStatistics
from .words import above, pack_bits

_MASK_CHUNK = 16
_MAX_ELEMENTS = 2**19  # pixels of undecided tiles and logits under them, at a time
_MOST_CROSSED = 0.25  # share of tiles that a threshold crosses; with more a mask is evaluated as a whole
# Rounding of a sum of taps, relative to the largest logit in it: nothing so close to a threshold is decided unseen.
_GUARD = 1e-6


class _DeviceAxis(NamedTuple):
    start: Tensor  # [tiles]
    matrix: Tensor  # [tiles, 32, patch]
    used: Tensor  # [tiles]
    patches: Tensor  # [tiles, patch], the inputs that each reads

    @classmethod
    def of(cls, axis: TiledAxis, device: torch.device) -> _DeviceAxis:
        start, matrix, used = (torch.from_numpy(values).to(device) for values in axis)
        if device.type == "cuda":
            matrix = matrix.double()  # products of fp32 may be made in TF32 there
        return cls(start, matrix, used, start[:, None] + torch.arange(matrix.shape[2], device=device))


class TileGrid:
    """Positions of the tiles of one resizing, and the logits under each."""

    def __init__(self, low_size: tuple[int, int], resizing: Resizing, device: torch.device) -> None:
        rows, columns = tiled_axes(low_size, resizing)
        self.rows, self.columns = _DeviceAxis.of(rows, device), _DeviceAxis.of(columns, device)
        self.shape = (len(rows.start), len(columns.start))
        self.tile_areas = self.rows.used[:, None] * self.columns.used  # [tile rows, tile columns]
        bit = torch.arange(TILE, device=device)
        self.row_bits = pack_bits(bit < self.rows.used[:, None])  # [tile rows], a bit a row in use
        self.column_bits = -(bit < self.columns.used[:, None]).int()  # [tile columns, 32], all or no bits
        per_tile = max(TILE * TILE, rows.matrix.shape[2] * columns.matrix.shape[2])
        self.tile_chunk = max(1, _MAX_ELEMENTS // per_tile)
        self.row_chunk = max(1, self.tile_chunk // self.shape[1])

    def bounds(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the largest possible value of the pixels of each tile, [N, tile rows, tile columns]."""
        rows, columns = self.rows.patches.flatten(), self.columns.patches.flatten()
        strips = logits.index_select(1, rows).unflatten(1, (self.shape[0], -1))  # [N, tile rows, patch, w]

        def over_columns(strip: Tensor) -> Tensor:
            return strip.index_select(2, columns).unflatten(2, (self.shape[1], -1))

        low, high = over_columns(strips.amin(dim=2)).amin(dim=3), over_columns(strips.amax(dim=2)).amax(dim=3)
        guard = _GUARD * torch.maximum(low.abs(), high.abs())
        return low - guard, high + guard

    def evaluated(self, logits: Tensor, threshold: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return which tiles [N, tile rows, tile columns] are to be evaluated, and which others are wholly inside.

        Whether a mask is evaluated as a whole depends on its threshold alone, so that counts and bits of it are made
        of the same pixels, rounded alike.
        """
        low, high = self.bounds(logits)
        crossed = ~(low > threshold) & ~(high <= threshold)
        whole = crossed.float().mean(dim=(1, 2), keepdim=True) > _MOST_CROSSED
        full = low > threshold + abs(offset)
        evaluated = (~full & ~(high <= threshold - abs(offset))) | whole
        return evaluated, full & ~evaluated

    def pixels(self, logits: Tensor, evaluated: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tiles (mask, tile row, tile column) [K, 3], and their pixels [K, column, row]."""
        whole = evaluated.flatten(1).all(dim=1)
        for tiles in (evaluated & ~whole[:, None, None]).nonzero().split(self.tile_chunk):
            yield tiles, self._of_tiles(logits, tiles)
        columns = torch.arange(self.shape[1], device=logits.device)
        for mask in whole.nonzero()[:, 0]:
            lines = self._over_columns(logits[mask])
            for rows in torch.arange(self.shape[0], device=logits.device).split(self.row_chunk):
                inputs = self.rows.patches[rows]
                patches = lines.index_select(0, inputs.flatten()).unflatten(0, inputs.shape)
                pixels = patches.transpose(1, 2) @ self.rows.matrix[rows].transpose(1, 2)
                yield torch.cartesian_prod(mask[None], rows, columns), pixels.view(-1, TILE, TILE)

    def _of_tiles(self, logits: Tensor, tiles: Tensor) -> Tensor:
        mask, row, column = tiles.unbind(1)
        rows, columns = self.rows.patches[row][:, None], self.columns.patches[column][:, :, None]
        patches = logits[mask[:, None, None], rows, columns]  # [K, patch columns, patch rows]
        patches = patches.to(self.rows.matrix.dtype)
        return self.columns.matrix[column] @ patches @ self.rows.matrix[row].transpose(1, 2)

    def _over_columns(self, logits: Tensor) -> Tensor:
        """Resize the rows of a mask's logits: [h, w] -> [h, tile columns * 32]."""
        inputs, dtype = self.columns.patches, self.columns.matrix.dtype
        patches = logits.index_select(1, inputs.flatten()).unflatten(1, inputs.shape).transpose(0, 1).to(dtype)
        return (patches @ self.columns.matrix.transpose(1, 2)).transpose(0, 1).flatten(1)

    def words(self, pixels: Tensor, tiles: Tensor, thresholds: tuple[float, ...]) -> Tensor:
        """Threshold the pixels of tiles at each threshold, to [thresholds, K, 32] int32."""
        _, row, column = tiles.unbind(1)
        inside = self.row_bits[row][:, None] & self.column_bits[column]
        return torch.stack([pack_bits(above(pixels, threshold)) & inside for threshold in thresholds])


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
        evaluated, full = grid.evaluated(logits, threshold, offset)
        counts[:, part] += (full * grid.tile_areas).sum(dim=(1, 2))
        edges[part] = _tile_edges(full.nonzero(), len(logits), far)
        for tiles, pixels in grid.pixels(logits, evaluated):
            words = grid.words(pixels, tiles, cuts)
            counts.scatter_add_(1, (start + tiles[:, 0]).expand(3, -1), _count_bits(words))
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
        evaluated, full = grid.evaluated(logits, threshold)
        out[start : start + len(logits)] = -full.int().transpose(1, 2)[:, :, None] & inside
        for tiles, pixels in grid.pixels(logits, evaluated):
            mask, row, column = tiles.unbind(1)
            out[start + mask, column, :, row] = grid.words(pixels, tiles, (threshold,))[0]
    return out.flatten(1, 2)[:, : resizing.output_size[1]]


def _blocks(low_res: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(low_res), _MASK_CHUNK):
        yield start, low_res[start : start + _MASK_CHUNK].float()
