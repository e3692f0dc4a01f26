"""The Triton kernels of mask post-processing: one program per tile of 32 rows, counting or packing bits in one pass.

A tile whose logits all lie on one side of the thresholds is taken as one value; the others gather their taps, at most
three an axis, from the cache. Counts and boxes are joined by integer atomics, whose order does not show: none orders
anything else, so they are relaxed, and a tile of which nothing counts ends before them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton.launch import Launch, stream_key
from ...triton.tiles import TileConfig
from ..resize_map import TILE, Axis, Resizing, axes

_MAX_PATCH = 2048  # logits under a tile; where more are, in images of a few pixels, every tile is evaluated


# Images have all sizes: the compiler is to know nothing about them, or some would be compiled for while serving.
@triton.jit(do_not_specialize=["height", "width", "tile_rows", "tile_columns", "row_taps", "column_taps"])
def mask_postprocess_kernel(
    low_ptr,
    row_first_ptr,  # [height]
    row_weights_ptr,  # [height, row_taps]
    column_first_ptr,  # [width]
    column_weights_ptr,  # [width, column_taps]
    out_ptr,  # [N, 7] if STATISTICS else [N, width, tile_rows], int32
    height,
    width,
    tile_rows,
    tile_columns,
    row_taps,
    column_taps,
    low_width,  # w
    stride_n,  # stride of low [N, h, w] along the masks, in elements; each is contiguous
    threshold,
    above,  # threshold + offset
    below,  # threshold - offset
    STATISTICS: tl.constexpr,
    PATCH_ROWS: tl.constexpr,
    PATCH_COLUMNS: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    tile_column = tl.program_id(0) % tile_columns
    tile_row = tl.program_id(0) // tile_columns % tile_rows
    mask = (tl.program_id(0) // tile_columns // tile_rows).to(tl.int64)
    y = tile_row * 32 + tl.arange(0, 32)
    x = tile_column * BLOCK_W + tl.arange(0, BLOCK_W)
    used = (y < height)[:, None] & (x < width)[None, :]
    p_low = low_ptr + mask * stride_n

    if BOUNDED:
        # The first taps only grow along an axis: those of a tile lie between its corners'.
        top = tl.load(row_first_ptr + tile_row * 32)
        bottom = tl.load(row_first_ptr + tl.minimum(tile_row * 32 + 31, height - 1)) + row_taps - 1
        left = tl.load(column_first_ptr + tile_column * BLOCK_W)
        right = tl.load(column_first_ptr + tl.minimum(tile_column * BLOCK_W + BLOCK_W - 1, width - 1)) + column_taps - 1
        # One axis of threads, so that each of the sums over the patch is one.
        logit = tl.arange(0, PATCH_ROWS * PATCH_COLUMNS)
        patch_row = tl.minimum(top + logit // PATCH_COLUMNS, bottom)
        patch_column = tl.minimum(left + logit % PATCH_COLUMNS, right)
        b_patch = tl.load(p_low + patch_row * low_width + patch_column).to(tl.float32)
        least = tl.min(b_patch, 0)
        greatest = tl.max(b_patch, 0)
        guard = 1e-6 * tl.maximum(tl.abs(least), tl.abs(greatest))
        # The least and the greatest leave NaN out, which no threshold is below.
        known = tl.sum((b_patch != b_patch).to(tl.int32), 0) == 0
        if STATISTICS:
            if known & (greatest + guard <= tl.minimum(threshold, tl.minimum(above, below))):
                return  # most tiles of most masks: nothing of it counts
            decided = known & (least - guard > tl.maximum(threshold, tl.maximum(above, below)))
        else:
            decided = known & ((least - guard > threshold) | (greatest + guard <= threshold))
        pixels = tl.zeros([32, BLOCK_W], tl.float32) + least
        if not decided:
            pixels = evaluate(
                p_low, row_first_ptr, column_first_ptr, tl.minimum(y, height - 1), tl.minimum(x, width - 1),
                row_weights_ptr, column_weights_ptr, row_taps, column_taps, low_width, BLOCK_W,
            )  # fmt: skip
    else:
        pixels = evaluate(
            p_low, row_first_ptr, column_first_ptr, tl.minimum(y, height - 1), tl.minimum(x, width - 1),
            row_weights_ptr, column_weights_ptr, row_taps, column_taps, low_width, BLOCK_W,
        )  # fmt: skip

    inside = (pixels > threshold) & used
    if STATISTICS:
        p_out = out_ptr + mask * 7
        # Down the columns first, of which a thread has its own.
        outside = tl.sum(tl.sum(((pixels > below) & used).to(tl.int32), 0), 0)
        area = tl.sum(tl.sum(inside.to(tl.int32), 0), 0)
        high = tl.sum(tl.sum(((pixels > above) & used).to(tl.int32), 0), 0)
        if high > 0:
            tl.atomic_add(p_out, high, sem="relaxed")
        if outside > 0:
            tl.atomic_add(p_out + 1, outside, sem="relaxed")
        if area > 0:
            tl.atomic_add(p_out + 2, area, sem="relaxed")
            any_column = tl.max(inside.to(tl.int32), 0) > 0
            first_row = tl.min(tl.where(inside, y[:, None], height), 0)
            last_row = tl.max(tl.where(inside, y[:, None], -1), 0)
            tl.atomic_min(p_out + 3, tl.min(tl.where(any_column, x, width), 0), sem="relaxed")
            tl.atomic_min(p_out + 4, tl.min(first_row, 0), sem="relaxed")
            tl.atomic_max(p_out + 5, tl.max(tl.where(any_column, x, -1), 0), sem="relaxed")
            tl.atomic_max(p_out + 6, tl.max(last_row, 0), sem="relaxed")
    else:
        words = tl.sum(inside.to(tl.int32) << tl.arange(0, 32)[:, None], 0)  # [BLOCK_W]
        p_out = out_ptr + mask * (width * tile_rows) + x * tile_rows + tile_row
        tl.store(p_out, words, mask=x < width)


@triton.jit
def evaluate(
    p_low,
    row_first_ptr,
    column_first_ptr,
    y,
    x,
    row_weights_ptr,
    column_weights_ptr,
    row_taps,
    column_taps,
    low_width,
    BLOCK_W: tl.constexpr,
):
    """Sum up the logits [32, BLOCK_W] of a tile from their taps."""
    # One offset of 32 bits per pixel, and taps as scalars beside it: pointers of 64 bits would spill.
    first = (tl.load(row_first_ptr + y) * low_width)[:, None] + tl.load(column_first_ptr + x)[None, :]
    pixels = tl.zeros([32, BLOCK_W], tl.float32)
    for i in range(row_taps):
        line = tl.zeros([32, BLOCK_W], tl.float32)
        for j in range(column_taps):
            taps = tl.load(p_low + (i * low_width + j) + first).to(tl.float32)
            line += taps * tl.load(column_weights_ptr + x * column_taps + j)[None, :]
        pixels += line * tl.load(row_weights_ptr + y * row_taps + i)[:, None]
    return pixels


def plan(
    low_res: Tensor,
    resizing: Resizing,
    threshold: float,
    offset: float,
    out: Tensor,
    tile: TileConfig,
    statistics: bool,
) -> Launch:
    """Plan the launch that joins numbers into ``out`` [N, 7] or fills ``out`` [N, width, words]."""
    size = (low_res.shape[1], low_res.shape[2])
    if low_res.stride(1) != size[1] or low_res.stride(2) != 1:
        low_res = low_res.contiguous()  # no decoder leaves them so
    height, width = resizing.output_size
    block_w = min(tile.blocks["BLOCK_W"], max(16, triton.next_power_of_2(width)))
    rows, columns = axes(size, resizing)
    patch_rows, patch_columns = _patch(rows, TILE), _patch(columns, block_w)
    tile_rows, tile_columns = triton.cdiv(height, TILE), triton.cdiv(width, block_w)
    row_first, row_weights, column_first, column_weights = _tables(
        size, resizing, low_res.device, stream_key(low_res.device)
    )
    return Launch(
        kernel=mask_postprocess_kernel,
        grid=(len(low_res) * tile_rows * tile_columns,),
        arguments={
            "low_ptr": low_res,
            "row_first_ptr": row_first,
            "row_weights_ptr": row_weights,
            "column_first_ptr": column_first,
            "column_weights_ptr": column_weights,
            "out_ptr": out,
            "height": height,
            "width": width,
            "tile_rows": tile_rows,
            "tile_columns": tile_columns,
            "row_taps": row_weights.shape[1],
            "column_taps": column_weights.shape[1],
            "low_width": size[1],
            "stride_n": low_res.stride(0),
            "threshold": float(threshold),
            "above": float(threshold + offset),
            "below": float(threshold - offset),
        },
        constants={
            "STATISTICS": statistics,
            "PATCH_ROWS": patch_rows,
            "PATCH_COLUMNS": patch_columns,
            "BOUNDED": patch_rows * patch_columns <= _MAX_PATCH,
        },
        tile=TileConfig({"BLOCK_W": block_w}, tile.num_warps, tile.num_stages, tile.provisional, tile.provenance),
    )


def _patch(axis: Axis, block: int) -> int:
    """Return the largest number of logits under a block of pixels, as a power of two."""
    begins = np.arange(0, len(axis.first), block)
    lasts = np.minimum(begins + block, len(axis.first)) - 1
    spread = int((axis.first[lasts] - axis.first[begins]).max()) + axis.weights.shape[1]
    return triton.next_power_of_2(spread)


@lru_cache(maxsize=64)
def _tables(low_size: tuple[int, int], resizing: Resizing, device: torch.device, stream: int) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(table).to(device) for axis in axes(low_size, resizing) for table in axis)


def no_pixels(masks: int, device: torch.device) -> Tensor:
    """Return the numbers [N, 7] of masks without a pixel (inside, outside, area, box), to be joined to."""
    numbers = torch.zeros(masks, 7, dtype=torch.int32, device=device)
    numbers[:, 3:5] = 2**31 - 1
    numbers[:, 5:] = -1
    return numbers
