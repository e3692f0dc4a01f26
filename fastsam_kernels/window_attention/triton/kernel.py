"""The Triton kernel of ``window_attention``: one kernel for windows of any size and for the whole grid.

A program takes BLOCK_Q queries of one head over all keys of their window with the online softmax. Positions are counted
in rows of COLS, the window's width rounded up to a power of two, so that a tile of keys is whole rows of it. Windows of
fewer than 64 positions are taken GROUP at a time, side by side, as one window in which a query sees the keys of its own
only. Padded keys are no keys: all of a window are the first value of the online softmax, with the score of the bias
plus the logarithm of their number, which is minus infinity where there are none.

What was weighed:

- A head of 96 channels is 64 + 32 and one of 72 is 64 + 16, not 128: less to multiply and to hold. One of 56 is 64.
  Channels that only round up are not loaded.
- Products of a query with the keys of other windows are thrown away, 4 times as many as needed for windows of 4 x 4;
  the tensor cores have no smaller tile of 64 queries, and these windows are 0.1 % of an encoder's products.
- Pooled queries are the maximum of four loads: a kernel before this one would write and read them once more.
- A program's tiles of queries come one after the other, so that the keys and values of a head are read from L2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton.launch import Launch
from ...triton.tiles import TileConfig

LOG2E = tl.constexpr(1 / math.log(2))


@triton.jit
def _load_queries(
    p,  # [BLOCK_Q] of the first token of each
    channels,  # [D]
    mask,  # [BLOCK_Q, D]
    stride_h,
    stride_w,
    POOL: tl.constexpr,
):
    """Load queries, pooled ones as the maximum of 2 x 2 tokens."""
    p = p[:, None] + channels[None, :]
    q = tl.load(p, mask=mask, other=0.0)
    if POOL:
        highest = q.to(tl.float32)
        highest = tl.maximum(highest, tl.load(p + stride_w, mask=mask, other=0.0).to(tl.float32))
        highest = tl.maximum(highest, tl.load(p + stride_h, mask=mask, other=0.0).to(tl.float32))
        highest = tl.maximum(highest, tl.load(p + stride_h + stride_w, mask=mask, other=0.0).to(tl.float32))
        q = highest.to(q.dtype)
    return q


@triton.jit
def window_attention_kernel(
    qkv_ptr,
    qkv_bias_ptr,
    out_ptr,
    height,
    width,
    down,  # groups of windows of an image
    across,
    tiles,  # tiles of queries per group
    stride_b,  # strides of qkv [B, H, W, 3 * C] in elements; that of the channels is 1
    stride_h,
    stride_w,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,  # D, or 64, rounded up to a power of two
    D2: tl.constexpr,  # what is left of D rounded up to a power of two, or 0
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    COLS: tl.constexpr,
    GROUP: tl.constexpr,
    POOL: tl.constexpr,
    PADDED: tl.constexpr,  # windows reach over the edge
    EXACT_FIT: tl.constexpr,  # every key of every tile is inside the window and the grid
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    C: tl.constexpr = HEADS * D
    STEP: tl.constexpr = 2 if POOL else 1
    ROWS: tl.constexpr = BLOCK_K // (COLS * GROUP)
    SCALE: tl.constexpr = LOG2E * D**-0.5
    first = (tl.program_id(0) % tiles) * BLOCK_Q
    head = (tl.program_id(0) // tiles) % HEADS
    group = tl.program_id(0) // (tiles * HEADS)
    left = (group % across) * (GROUP * WINDOW_W)
    top = (group // across % down) * WINDOW_H
    image = (group // (across * down)).to(tl.int64)
    if top + first // (COLS * GROUP // STEP) * STEP >= height:
        return  # all of the tile is padding

    i = first + tl.arange(0, BLOCK_Q)
    row = i // (COLS * GROUP // STEP) * STEP
    column = i % (COLS // STEP) * STEP
    window = i // (COLS // STEP) % GROUP
    begin = left + window * WINDOW_W
    valid = (row < WINDOW_H) & (column < WINDOW_W) & (top + row < height) & (begin + column < width)
    p_image = qkv_ptr + image * stride_b + head * D
    # int64: with the batch innermost the strides of rows and columns grow with it.
    p_q = p_image + (top + row).to(tl.int64) * stride_h + (begin + column).to(tl.int64) * stride_w
    d1 = tl.arange(0, D1)
    real1 = d1 < D
    q1 = _load_queries(p_q, d1, valid[:, None] & real1[None, :], stride_h, stride_w, POOL)
    q2 = q1
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        real2 = d2 < D
        q2 = _load_queries(p_q, d2, valid[:, None] & real2[None, :], stride_h, stride_w, POOL)

    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    if D2 > 0:
        out2 = tl.zeros([BLOCK_Q, D2], tl.float32)
    if PADDED:
        there = tl.minimum(height - top, WINDOW_H) * tl.minimum(width - begin, WINDOW_W)
        p_bias = qkv_bias_ptr + C + head * D
        bias = tl.load(p_bias + d1, mask=real1, other=0.0).to(tl.float32)
        score = tl.sum(q1.to(tl.float32) * bias[None, :], 1)
        out1 += tl.load(p_bias + C + d1, mask=real1, other=0.0).to(tl.float32)[None, :]
        if D2 > 0:
            bias = tl.load(p_bias + d2, mask=real2, other=0.0).to(tl.float32)
            score += tl.sum(q2.to(tl.float32) * bias[None, :], 1)
            out2 += tl.load(p_bias + C + d2, mask=real2, other=0.0).to(tl.float32)[None, :]
        highest = score * SCALE + tl.log2((WINDOW_H * WINDOW_W - there).to(tl.float32))
        total += 1.0
    j = tl.arange(0, BLOCK_K)
    key_column = j % COLS
    key_window = j // COLS % GROUP
    key_begin = left + key_window * WINDOW_W
    for start in tl.range(0, WINDOW_H, ROWS, num_stages=STAGES):
        key_row = start + j // (COLS * GROUP)
        p_k = p_image + C + (top + key_row).to(tl.int64) * stride_h
        p_k = (p_k + (key_begin + key_column).to(tl.int64) * stride_w)[:, None]
        inside = (key_row < WINDOW_H) & (key_column < WINDOW_W)
        inside = inside & (top + key_row < height) & (key_begin + key_column < width)
        loaded1 = real1[None, :] if EXACT_FIT else inside[:, None] & real1[None, :]
        k1 = tl.load(p_k + d1[None, :], mask=loaded1, other=0.0)
        scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        if D2 > 0:
            loaded2 = real2[None, :] if EXACT_FIT else inside[:, None] & real2[None, :]
            k2 = tl.load(p_k + d2[None, :], mask=loaded2, other=0.0)
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
        if GROUP > 1:
            scores = tl.where(inside[None, :] & (window[:, None] == key_window[None, :]), scores, float("-inf"))
        elif not EXACT_FIT:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * SCALE)
        weights = tl.exp2(scores * SCALE - higher[:, None])
        shrink = tl.exp2(highest - higher)
        highest = higher
        total = total * shrink + tl.sum(weights, 1)
        v1 = tl.load(p_k + C + d1[None, :], mask=loaded1, other=0.0)
        weights = weights.to(v1.dtype)
        out1 = tl.dot(weights, v1, out1 * shrink[:, None], input_precision=PRECISION)
        if D2 > 0:
            v2 = tl.load(p_k + C + d2[None, :], mask=loaded2, other=0.0)
            out2 = tl.dot(weights, v2, out2 * shrink[:, None], input_precision=PRECISION)

    p_out = (image * (height // STEP) + (top + row) // STEP) * (width // STEP) + (begin + column) // STEP
    p_out = out_ptr + (p_out * C + head * D)[:, None]
    out1 = out1 / total[:, None]
    tl.store(p_out + d1[None, :], out1.to(out_ptr.dtype.element_ty), mask=valid[:, None] & real1[None, :])
    if D2 > 0:
        out2 = out2 / total[:, None]
        tl.store(p_out + d2[None, :], out2.to(out_ptr.dtype.element_ty), mask=valid[:, None] & real2[None, :])


def plan(
    qkv: Tensor, qkv_bias: Tensor, out: Tensor, num_heads: int, window_size: int, pool_queries: bool, tile: TileConfig
) -> Launch:
    """Plan the launch that fills ``out``, contiguous; tensors may be on the meta device."""
    batch, height, width, channels = qkv.shape
    if qkv.stride(3) != 1:
        qkv = qkv.contiguous()  # no projection leaves it so
    head_dim, step = channels // (3 * num_heads), 2 if pool_queries else 1
    window_h, window_w = (window_size, window_size) if window_size else (height, width)
    cols = max(triton.next_power_of_2(window_w), step)
    positions = cols * triton.next_power_of_2(window_h)
    group = max(64 // positions, 1) if window_size else 1
    block_k = positions * group if group > 1 else max(tile.blocks["BLOCK_K"], cols, 16)
    down, across = -(-height // window_h), -(-width // (window_w * group))
    tiles = triton.cdiv(min(window_h, height) // step * (cols * group // step), tile.blocks["BLOCK_Q"])
    wide = min(64, max(16, triton.next_power_of_2(head_dim)))
    padded = height % window_h != 0 or width % window_w != 0
    filled = cols == window_w and window_h % max(block_k // (cols * group), 1) == 0
    return Launch(
        kernel=window_attention_kernel,
        grid=(batch * down * across * num_heads * tiles,),
        arguments={
            "qkv_ptr": qkv,
            "qkv_bias_ptr": qkv_bias.contiguous(),
            "out_ptr": out,
            "height": height,
            "width": width,
            "down": down,
            "across": across,
            "tiles": tiles,
            "stride_b": qkv.stride(0),
            "stride_h": qkv.stride(1),
            "stride_w": qkv.stride(2),
        },
        constants={
            "HEADS": num_heads,
            "D": head_dim,
            "D1": wide,
            "D2": max(16, triton.next_power_of_2(head_dim - wide)) if head_dim > wide else 0,
            "WINDOW_H": window_h,
            "WINDOW_W": window_w,
            "COLS": cols,
            "GROUP": group,
            "POOL": pool_queries,
            "PADDED": padded,
            "EXACT_FIT": filled and not padded and width % (window_w * group) == 0,
            "PRECISION": "ieee" if qkv.dtype == torch.float32 else "tf32",  # the latter says nothing to 16-bit operands
            "STAGES": tile.num_stages,
        },
        tile=TileConfig(
            {**tile.blocks, "BLOCK_K": block_k}, tile.num_warps, tile.num_stages, tile.provisional, tile.provenance
        ),
    )
