"""The Triton kernel of ``preprocess_image``: one program per tile of the result gathers its taps from the image."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton.launch import Launch, stream_key
from ...triton.tiles import TileConfig
from ..taps import axis


# Images have all sizes: the compiler is to know nothing about them, or some would be compiled for while serving.
@triton.jit(do_not_specialize=["height", "width", "row_taps", "column_taps", "stride_h", "stride_w", "stride_c"])
def preprocess_image_kernel(
    image_ptr,  # [H, W, 3] uint8
    row_first_ptr,  # [height]
    row_weights_ptr,  # [height, row_taps]
    column_first_ptr,  # [width]
    column_weights_ptr,  # [width, column_taps]
    mean_ptr,  # [3]
    std_ptr,  # [3]
    out_ptr,  # [3, image_size, image_size]
    height,
    width,
    image_size,
    row_taps,
    column_taps,
    stride_h,  # strides of the image in elements
    stride_w,
    stride_c,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    y = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    x = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    red = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    green = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    blue = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    if (tl.program_id(0) * BLOCK_H < height) & (tl.program_id(1) * BLOCK_W < width):
        y_in = tl.minimum(y, height - 1)
        x_in = tl.minimum(x, width - 1)
        rows = tl.load(row_first_ptr + y_in)
        columns = tl.load(column_first_ptr + x_in)
        for i in range(row_taps):
            p_line = image_ptr + (rows + i).to(tl.int64)[:, None] * stride_h
            row_weight = tl.load(row_weights_ptr + y_in * row_taps + i)[:, None]
            for j in range(column_taps):
                p_taps = p_line + (columns + j).to(tl.int64)[None, :] * stride_w
                weight = row_weight * tl.load(column_weights_ptr + x_in * column_taps + j)[None, :]
                red += weight * tl.load(p_taps).to(tl.float32)
                green += weight * tl.load(p_taps + stride_c).to(tl.float32)
                blue += weight * tl.load(p_taps + stride_c + stride_c).to(tl.float32)
    p_out = out_ptr + y[:, None] * image_size + x[None, :]
    used = (y < image_size)[:, None] & (x < image_size)[None, :]
    inside = (y < height)[:, None] & (x < width)[None, :]
    plane = image_size * image_size
    store_channel(p_out, red, mean_ptr, std_ptr, inside, used)
    store_channel(p_out + plane, green, mean_ptr + 1, std_ptr + 1, inside, used)
    store_channel(p_out + 2 * plane, blue, mean_ptr + 2, std_ptr + 2, inside, used)


@triton.jit
def store_channel(p_out, levels, mean_ptr, std_ptr, inside, used):
    normalized = tl.where(inside, (levels - tl.load(mean_ptr)) / tl.load(std_ptr), 0.0)
    tl.store(p_out, normalized.to(p_out.dtype.element_ty), mask=used)


def plan(image: Tensor, size: tuple[int, int], mean: Tensor, std: Tensor, out: Tensor, tile: TileConfig) -> Launch:
    """Plan the launch that fills ``out`` [3, side, side]; tensors may be on the meta device."""
    side = out.shape[1]
    stream = stream_key(image.device)
    row_first, row_weights = _tables(image.shape[0], size[0], image.device, stream)
    column_first, column_weights = _tables(image.shape[1], size[1], image.device, stream)
    return Launch(
        kernel=preprocess_image_kernel,
        grid=(triton.cdiv(side, tile.blocks["BLOCK_H"]), triton.cdiv(side, tile.blocks["BLOCK_W"])),
        arguments={
            "image_ptr": image,
            "row_first_ptr": row_first,
            "row_weights_ptr": row_weights,
            "column_first_ptr": column_first,
            "column_weights_ptr": column_weights,
            "mean_ptr": mean.contiguous(),
            "std_ptr": std.contiguous(),
            "out_ptr": out,
            "height": size[0],
            "width": size[1],
            "image_size": side,
            "row_taps": row_weights.shape[1],
            "column_taps": column_weights.shape[1],
            "stride_h": image.stride(0),
            "stride_w": image.stride(1),
            "stride_c": image.stride(2),
        },
        constants={},
        tile=tile,
    )


@lru_cache(maxsize=64)
def _tables(inputs: int, outputs: int, device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    first, weights = axis(inputs, outputs)
    return torch.from_numpy(first).to(device), torch.from_numpy(weights).to(device)
