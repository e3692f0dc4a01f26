"""Mask post-processing in PyTorch operations: tiles of 32 x 32 pixels, and only those that a threshold goes through.

A pixel lies between the smallest and the largest logit under its tile. Most tiles are therefore decided by two
comparisons; the others are evaluated a few hundred at a time, as small matrix products whose result stays in the
cache, and leave it as words of 32 bits, a word for a column of a tile. A mask that no such comparison helps, as one
that is noise, is evaluated as a whole: in rows of tiles, by products that are as many times larger.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
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
    matrix: Tensor  # [tiles, 32, patch]
    patches: Tensor  # [tiles, patch], the inputs that each reads

    @classmethod
    def of(cls, axis: TiledAxis, device: torch.device) -> _DeviceAxis:
        matrix, patches = (torch.from_numpy(values).to(device) for values in (axis.matrix, axis.patches))
        # Products of fp32 may be made in TF32 on a GPU.
        return cls(matrix.double() if device.type == "cuda" else matrix, patches)


class _Decided(NamedTuple):
    """Hold which tiles of N masks their bounds decide.

    Attributes:
        full: [N, tile rows, tile columns], tiles that are wholly inside.
        undecided: [N, tile rows, tile columns], tiles to be evaluated one by one.
        whole: [N, tile rows, tile columns], all tiles of the masks that are evaluated as a whole.
    """

    full: Tensor
    undecided: Tensor
    whole: Tensor


class TileGrid:
    """Positions of the tiles of one resizing, and the logits under each."""

    def __init__(self, low_size: tuple[int, int], resizing: Resizing, device: torch.device) -> None:
        rows, columns = tiled_axes(low_size, resizing)
        self.rows, self.columns = _DeviceAxis.of(rows, device), _DeviceAxis.of(columns, device)
        self.shape = (len(rows.used), len(columns.used))
        row_bits = np.packbits(rows.used, axis=1, bitorder="little").view(np.int32)  # [tile rows, 1]
        inside = row_bits[:, None] & -columns.used.astype(np.int32)
        self.inside = torch.from_numpy(inside).to(device)  # [tile rows, tile columns, 32], a bit a pixel of the mask
        per_tile = max(TILE * TILE, rows.matrix.shape[2] * columns.matrix.shape[2])
        self.tile_chunk = max(1, _MAX_ELEMENTS // per_tile)
        self.row_chunk = max(1, self.tile_chunk // self.shape[1])

    def decide(self, logits: Tensor, threshold: float, offset: float = 0.0) -> _Decided:
        """Sort the tiles of masks by the least and the largest value that their pixels may have.

        Whether a mask is evaluated as a whole depends on its threshold alone, so that counts and bits of it are made
        of the same pixels, rounded alike.
        """
        low, high = self._bounds(logits)
        full = low > threshold
        undecided = ~(full | (high <= threshold))
        whole = undecided.mean(dim=(1, 2), keepdim=True, dtype=torch.float32) > _MOST_CROSSED
        if offset:
            full = low > threshold + abs(offset)
            undecided = ~(full | (high <= threshold - abs(offset)))
        by_tile = ~whole
        return _Decided(full & by_tile, undecided & by_tile, whole.expand_as(full))

    def _bounds(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the largest possible value of the pixels of each tile, [N, tile rows, tile columns]."""
        rows, columns = self.rows.patches.flatten(), self.columns.patches.flatten()
        strips = logits.index_select(1, rows).unflatten(1, (self.shape[0], -1))  # [N, tile rows, patch, w]

        def over_columns(strip: Tensor) -> Tensor:
            return strip.index_select(2, columns).unflatten(2, (self.shape[1], -1))

        low, high = over_columns(strips.amin(dim=2)).amin(dim=3), over_columns(strips.amax(dim=2)).amax(dim=3)
        largest = torch.maximum(-low, high)
        return low.sub(largest, alpha=_GUARD), high.add(largest, alpha=_GUARD)

    def pixels(self, logits: Tensor, decided: _Decided) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the tiles (mask, tile row, tile column) [K, 3] to evaluate, and their pixels [K, column, row]."""
        for tiles in decided.undecided.nonzero().split(self.tile_chunk):
            if len(tiles):
                yield tiles, self._of_tiles(logits, tiles)
        for tiles in decided.whole.nonzero().split(self.shape[0] * self.shape[1]):
            if len(tiles):
                rows = self._of_mask(logits[int(tiles[0, 0])])
                yield from zip(tiles.split(self.row_chunk * self.shape[1]), rows, strict=True)

    def _of_tiles(self, logits: Tensor, tiles: Tensor) -> Tensor:
        mask, row, column = tiles.unbind(1)
        rows, columns = self.rows.patches[row][:, None], self.columns.patches[column][:, :, None]
        patches = logits[mask[:, None, None], rows, columns]  # [K, patch columns, patch rows]
        patches = patches.to(self.rows.matrix.dtype)
        return self.columns.matrix[column].bmm(patches).bmm(self.rows.matrix[row].transpose(1, 2))

    def _of_mask(self, logits: Tensor) -> Iterator[Tensor]:
        """Yield the pixels [K, column, row] of all tiles of one mask [h, w], some rows of tiles at a time."""
        inputs, dtype = self.columns.patches, self.columns.matrix.dtype
        patches = logits.index_select(1, inputs.flatten()).unflatten(1, inputs.shape).transpose(0, 1).to(dtype)
        lines = patches.bmm(self.columns.matrix.transpose(1, 2)).transpose(0, 1).flatten(1)  # [h, tile columns * 32]
        for start in range(0, self.shape[0], self.row_chunk):
            inputs, matrix = (
                values[start : start + self.row_chunk] for values in (self.rows.patches, self.rows.matrix)
            )
            patches = lines.index_select(0, inputs.flatten()).unflatten(0, inputs.shape)
            yield patches.transpose(1, 2).bmm(matrix.transpose(1, 2)).view(-1, TILE, TILE)

    def words(self, pixels: Tensor, tiles: Tensor, threshold: float) -> Tensor:
        """Pack the pixels [K, column, row] of tiles above the threshold into [K, 32] int32."""
        _, row, column = tiles.unbind(1)
        return pack_bits(above(pixels, threshold)) & self.inside[row, column]


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
    tile_areas = _count_bits(grid.inside)
    for start, logits in _blocks(low_res):
        part = slice(start, start + len(logits))
        decided = grid.decide(logits, threshold, offset)
        counts[:, part] += (decided.full * tile_areas).sum(dim=(1, 2))
        edges[part] = _tile_edges(decided.full.nonzero(), len(logits), far)
        for tiles, pixels in grid.pixels(logits, decided):
            words = torch.stack([grid.words(pixels, tiles, cut) for cut in cuts])
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
    inside = grid.inside.permute(1, 2, 0)  # [tile columns, 32, tile rows]
    out = torch.empty(len(low_res), tile_columns, TILE, tile_rows, dtype=torch.int32, device=low_res.device)
    for start, logits in _blocks(low_res):
        decided = grid.decide(logits, threshold)
        out[start : start + len(logits)] = -decided.full.int().transpose(1, 2)[:, :, None] & inside
        for tiles, pixels in grid.pixels(logits, decided):
            mask, row, column = tiles.unbind(1)
            out[start + mask, column, :, row] = grid.words(pixels, tiles, threshold)
    return out.flatten(1, 2)[:, : resizing.output_size[1]]


def _blocks(low_res: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(low_res), _MASK_CHUNK):
        yield start, low_res[start : start + _MASK_CHUNK].float()
