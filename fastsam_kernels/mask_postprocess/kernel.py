"""The Triton form of mask post-processing: a program a tile of 32 rows, counting or packing bits in one pass.

A tile whose logits all lie on one side of the thresholds is taken as one value; the others gather their taps, at most
three an axis, from the cache. Counts and boxes are joined by integer atomics, whose order does not show.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch
from ..tile_config import TileConfig, arch_of, lookup
from .resize_map import TILE, Axis, Resizing, axes

_LARGEST_PATCH = 2048  # logits under a tile; where more are, in images of a few pixels, every tile is evaluated


@triton.jit
def mask_postprocess_kernel(
    low_ptr,
    row_first_ptr,  # [height]
    row_weights_ptr,  # [height, ROW_TAPS]
    column_first_ptr,  # [width]
    column_weights_ptr,  # [width, COLUMN_TAPS]
    out_ptr,  # [N, 7] if STATISTICS else [N, width, tile_rows], int32
    height,
    width,
    tile_rows,
    tile_columns,
    stride_n,  # of low [N, h, w], in elements
    stride_h,
    stride_w,
    threshold,
    above,  # threshold + offset
    below,  # threshold - offset
    STATISTICS: tl.constexpr,
    ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr,
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
    y_in = tl.minimum(y, height - 1)
    x_in = tl.minimum(x, width - 1)
    rows = tl.load(row_first_ptr + y_in)
    columns = tl.load(column_first_ptr + x_in)
    # int64: with the masks innermost a row's stride grows with the batch too.
    p_low = low_ptr + mask * stride_n

    if BOUNDED:
        patch_rows = tl.minimum(tl.min(rows, 0) + tl.arange(0, PATCH_ROWS), tl.max(rows, 0) + ROW_TAPS - 1)
        patch_columns = tl.min(columns, 0) + tl.arange(0, PATCH_COLUMNS)
        patch_columns = tl.minimum(patch_columns, tl.max(columns, 0) + COLUMN_TAPS - 1)
        p_patch = p_low + patch_rows.to(tl.int64)[:, None] * stride_h + patch_columns.to(tl.int64)[None, :] * stride_w
        b_patch = tl.load(p_patch).to(tl.float32)
        least = tl.min(tl.min(b_patch, 1), 0)
        greatest = tl.max(tl.max(b_patch, 1), 0)
        guard = 1e-6 * tl.maximum(tl.abs(least), tl.abs(greatest))
        if STATISTICS:
            decided = (least - guard > tl.maximum(above, below)) | (greatest + guard <= tl.minimum(above, below))
        else:
            decided = (least - guard > threshold) | (greatest + guard <= threshold)
        # The least and the greatest leave NaN out, which no threshold is below.
        decided = decided & (tl.sum(tl.sum((b_patch != b_patch).to(tl.int32), 1), 0) == 0)
        pixels = tl.zeros([32, BLOCK_W], tl.float32) + least
        if not decided:
            pixels = evaluate(
                p_low, rows, columns, y_in, x_in, row_weights_ptr, column_weights_ptr, stride_h, stride_w,
                ROW_TAPS, COLUMN_TAPS, BLOCK_W,
            )  # fmt: skip
    else:
        pixels = evaluate(
            p_low, rows, columns, y_in, x_in, row_weights_ptr, column_weights_ptr, stride_h, stride_w,
            ROW_TAPS, COLUMN_TAPS, BLOCK_W,
        )  # fmt: skip

    inside = (pixels > threshold) & used
    if STATISTICS:
        p_out = out_ptr + mask * 7
        outside = tl.sum(tl.sum(((pixels > below) & used).to(tl.int32), 1), 0)
        area = tl.sum(tl.sum(inside.to(tl.int32), 1), 0)
        high = tl.sum(tl.sum(((pixels > above) & used).to(tl.int32), 1), 0)
        if high > 0:
            tl.atomic_add(p_out, high)
        if outside > 0:
            tl.atomic_add(p_out + 1, outside)
        if area > 0:
            tl.atomic_add(p_out + 2, area)
            any_row = tl.max(inside.to(tl.int32), 1) > 0
            any_column = tl.max(inside.to(tl.int32), 0) > 0
            tl.atomic_min(p_out + 3, tl.min(tl.where(any_column, x, width), 0))
            tl.atomic_min(p_out + 4, tl.min(tl.where(any_row, y, height), 0))
            tl.atomic_max(p_out + 5, tl.max(tl.where(any_column, x, -1), 0))
            tl.atomic_max(p_out + 6, tl.max(tl.where(any_row, y, -1), 0))
    else:
        words = tl.sum(inside.to(tl.int32) << tl.arange(0, 32)[:, None], 0)  # [BLOCK_W]
        p_out = out_ptr + mask * (width * tile_rows) + x * tile_rows + tile_row
        tl.store(p_out, words, mask=x < width)


@triton.jit
def evaluate(
    p_low,
    rows,
    columns,
    y,
    x,
    row_weights_ptr,
    column_weights_ptr,
    stride_h,
    stride_w,
    ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The logits [32, BLOCK_W] of a tile from their taps."""
    pixels = tl.zeros([32, BLOCK_W], tl.float32)
    for i in tl.static_range(ROW_TAPS):
        p_line = p_low + (rows + i).to(tl.int64)[:, None] * stride_h
        line = tl.zeros([32, BLOCK_W], tl.float32)
        for j in tl.static_range(COLUMN_TAPS):
            taps = tl.load(p_line + (columns + j).to(tl.int64)[None, :] * stride_w).to(tl.float32)
            line += taps * tl.load(column_weights_ptr + x * COLUMN_TAPS + j)[None, :]
        pixels += line * tl.load(row_weights_ptr + y * ROW_TAPS + i)[:, None]
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
    """The launch that joins numbers into ``out`` [N, 7] or fills ``out`` [N, width, words]; meta tensors are fine."""
    size = (low_res.shape[1], low_res.shape[2])
    height, width = resizing.output_size
    block_w = min(tile.blocks["BLOCK_W"], max(16, triton.next_power_of_2(width)))
    rows, columns = axes(size, resizing)
    patch_rows, patch_columns = _patch(rows, TILE), _patch(columns, block_w)
    tile_rows, tile_columns = triton.cdiv(height, TILE), triton.cdiv(width, block_w)
    row_first, row_weights, column_first, column_weights = _tables(size, resizing, low_res.device)
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
            "stride_n": low_res.stride(0),
            "stride_h": low_res.stride(1),
            "stride_w": low_res.stride(2),
            "threshold": float(threshold),
            "above": float(threshold + offset),
            "below": float(threshold - offset),
        },
        constants={
            "STATISTICS": statistics,
            "ROW_TAPS": row_weights.shape[1],
            "COLUMN_TAPS": column_weights.shape[1],
            "PATCH_ROWS": patch_rows,
            "PATCH_COLUMNS": patch_columns,
            "BOUNDED": patch_rows * patch_columns <= _LARGEST_PATCH,
        },
        tile=TileConfig({"BLOCK_W": block_w}, tile.num_warps, tile.num_stages, tile.provisional, tile.provenance),
    )


def _patch(axis: Axis, block: int) -> int:
    """Logits under a block of pixels, at the most, as a power of two."""
    begins = np.arange(0, len(axis.first), block)
    lasts = np.minimum(begins + block, len(axis.first)) - 1
    spread = int((axis.first[lasts] - axis.first[begins]).max()) + axis.weights.shape[1]
    return triton.next_power_of_2(spread)


@lru_cache(maxsize=64)
def _tables(low_size: tuple[int, int], resizing: Resizing, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(table).to(device) for axis in axes(low_size, resizing) for table in axis)


def no_pixels(masks: int, device: torch.device) -> Tensor:
    """Numbers [N, 7] of masks without a pixel (inside, outside, area, left, top, right, bottom), to be joined to."""
    numbers = torch.zeros(masks, 7, dtype=torch.int32, device=device)
    numbers[:, 3:5] = 2**31 - 1
    numbers[:, 5:] = -1
    return numbers


@torch.library.custom_op("fastsam::mask_statistics", mutates_args=())
def mask_statistics_triton(
    low_res: Tensor,
    image_size: int,
    input_height: int,
    input_width: int,
    height: int,
    width: int,
    threshold: float,
    offset: float,
) -> Tensor:
    """[N, 7] int32: inside, outside, area, left, top, right, bottom; see :func:`fastsam_kernels.mask_statistics`."""
    out = no_pixels(len(low_res), low_res.device)
    resizing = Resizing(image_size, (input_height, input_width), (height, width))
    tile = lookup("mask_postprocess", arch_of(low_res.device), low_res.dtype)
    if len(low_res) > 0:
        plan(low_res, resizing, threshold, offset, out, tile, statistics=True).run()
    return out


@mask_statistics_triton.register_fake
def _(
    low_res: Tensor,
    image_size: int,
    input_height: int,
    input_width: int,
    height: int,
    width: int,
    threshold: float,
    offset: float,
) -> Tensor:
    return low_res.new_empty((low_res.shape[0], 7), dtype=torch.int32)


@torch.library.custom_op("fastsam::packed_masks", mutates_args=())
def packed_masks_triton(
    low_res: Tensor,
    image_size: int,
    input_height: int,
    input_width: int,
    height: int,
    width: int,
    threshold: float,
) -> Tensor:
    """The registered operation; see :func:`fastsam_kernels.packed_masks` for the arguments."""
    out = low_res.new_empty((len(low_res), width, triton.cdiv(height, TILE)), dtype=torch.int32)
    resizing = Resizing(image_size, (input_height, input_width), (height, width))
    tile = lookup("mask_postprocess", arch_of(low_res.device), low_res.dtype)
    if len(low_res) > 0:
        plan(low_res, resizing, threshold, 0.0, out, tile, statistics=False).run()
    return out


@packed_masks_triton.register_fake
def _(
    low_res: Tensor,
    image_size: int,
    input_height: int,
    input_width: int,
    height: int,
    width: int,
    threshold: float,
) -> Tensor:
    return low_res.new_empty((low_res.shape[0], width, (height + TILE - 1) // TILE), dtype=torch.int32)
