"""The Triton kernels of ``rel_pos_attention``: one kernel for windows and for the whole grid, which is one window.

A program takes BLOCK_Q queries of one window and head over all keys of the window with the online softmax. Positions
are counted in rows of COLS, the window's width rounded up to a power of two, so that a tile of keys is whole rows of
it and the bias of a tile is a row of rel_w, kept in registers, plus one number a query and row of keys, rel_h. Keys
outside the grid are read from the bias of the projection, by a choice of pointers.

What was weighed:

- The bias rows come from two products of the queries with the tables, at the start of a program. A query needs other
  distances than its neighbour, so the products are written to a place of the program's own in fp32, each to the key
  that it belongs to, and read back as tiles: 4 * (H + COLS) bytes a query and head, soon after and from the cache.
  Kept in registers, rel_h of a whole grid costs 32 of them and a selection a tile; a gather in registers goes through
  shared memory for every tile; both products in a kernel before this one read the queries twice.
- Where a tile is one row of keys, rel_h is a number a query and enters through the maximum alone.
- A head of 80 channels is 64 + 16, not 128: 1.6 times less to multiply and to hold.
- Softmax in base 2, its scale and the scale of the scores folded into one factor.
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
def _spread_rel_pos(
    q1,
    q2,
    table_ptr,  # [2 * SIZE - 1, D]
    position,  # [BLOCK_Q] of the queries along this axis
    bias_ptr,  # [SIZE, BLOCK_Q]
    SIZE: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Compute bias[j, i] = q_i . table[position_i - j + SIZE - 1] * log2(e), one block of table rows at a time."""
    i = tl.arange(0, BLOCK_Q)
    for start in tl.range(0, 2 * SIZE - 1, BLOCK_T, num_stages=1):
        t = start + tl.arange(0, BLOCK_T)
        p_table = table_ptr + t[:, None] * (D1 + D2)
        inside = (t < 2 * SIZE - 1)[:, None]
        rows1 = tl.load(p_table + tl.arange(0, D1)[None, :], mask=inside, other=0.0)
        products = tl.dot(q1, tl.trans(rows1), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_T]
        if D2 > 0:
            rows2 = tl.load(p_table + D1 + tl.arange(0, D2)[None, :], mask=inside, other=0.0)
            products = tl.dot(q2, tl.trans(rows2), products, input_precision=PRECISION)
        j = position[:, None] - t[None, :] + (SIZE - 1)
        tl.store(bias_ptr + j * BLOCK_Q + i[:, None], products * LOG2E, mask=(j >= 0) & (j < SIZE))


@triton.jit
def rel_pos_attention_kernel(
    qkv_ptr,
    rel_pos_h_ptr,
    rel_pos_w_ptr,
    qkv_bias_ptr,
    scratch_ptr,
    out_ptr,
    height,
    width,
    down,  # windows of an image
    across,
    tiles,  # tiles of queries per window
    stride_b,  # strides of qkv [B, H, W, 3 * C] in elements; that of the channels is 1
    stride_h,
    stride_w,
    HEADS: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    COLS: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    EXACT_FIT: tl.constexpr,  # every key of every tile is inside the grid
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    D: tl.constexpr = D1 + D2
    C: tl.constexpr = HEADS * D
    ROWS: tl.constexpr = BLOCK_K // COLS
    SCALE: tl.constexpr = LOG2E * D**-0.5
    program = tl.program_id(0).to(tl.int64)
    first = (tl.program_id(0) % tiles) * BLOCK_Q
    head = (tl.program_id(0) // tiles) % HEADS
    window = tl.program_id(0) // (tiles * HEADS)
    left = (window % across) * WINDOW_W
    top = (window // across % down) * WINDOW_H
    image = (window // (across * down)).to(tl.int64)
    if top + first // COLS >= height:
        return  # all of the tile is padding

    d1 = tl.arange(0, D1)
    i = first + tl.arange(0, BLOCK_Q)
    row = i // COLS
    column = i % COLS
    valid = (row < WINDOW_H) & (column < WINDOW_W) & (top + row < height) & (left + column < width)
    p_image = qkv_ptr + image * stride_b + head * D
    # int64: with the batch innermost the strides of rows and columns grow with it.
    p_q = p_image + (top + row).to(tl.int64) * stride_h + (left + column).to(tl.int64) * stride_w
    q1 = tl.load(p_q[:, None] + d1[None, :], mask=valid[:, None], other=0.0)
    q2 = q1
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        q2 = tl.load(p_q[:, None] + d2[None, :], mask=valid[:, None], other=0.0)

    p_rel_h = scratch_ptr + program * ((WINDOW_H + WINDOW_W) * BLOCK_Q)
    p_rel_w = p_rel_h + WINDOW_H * BLOCK_Q
    at_row = tl.minimum(row, WINDOW_H - 1)
    at_column = tl.minimum(column, WINDOW_W - 1)
    _spread_rel_pos(q1, q2, rel_pos_h_ptr, at_row, p_rel_h, WINDOW_H, D1, D2, PRECISION, BLOCK_Q, BLOCK_T)
    _spread_rel_pos(q1, q2, rel_pos_w_ptr, at_column, p_rel_w, WINDOW_W, D1, D2, PRECISION, BLOCK_Q, BLOCK_T)
    tl.debug_barrier()  # other threads of this program wrote what is read from here on
    query = tl.arange(0, BLOCK_Q)
    cols = tl.arange(0, COLS)
    # Also what keeps the columns that only round up out of the softmax.
    rel_w = tl.load(
        p_rel_w + cols[None, :] * BLOCK_Q + query[:, None], mask=(cols < WINDOW_W)[None, :], other=float("-inf")
    )

    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    if D2 > 0:
        out2 = tl.zeros([BLOCK_Q, D2], tl.float32)
    j = tl.arange(0, BLOCK_K)
    key_column = j % COLS
    for start in tl.range(0, WINDOW_H, ROWS, num_stages=STAGES):
        key_row = start + j // COLS
        p_k = p_image + C + (top + key_row).to(tl.int64) * stride_h + (left + key_column).to(tl.int64) * stride_w
        if not EXACT_FIT:
            inside = (top + key_row < height) & (left + key_column < width)
            inside = inside & (key_row < WINDOW_H) & (key_column < WINDOW_W)
            p_k = tl.where(inside, p_k, qkv_bias_ptr + C + head * D)
        k1 = tl.load(p_k[:, None] + d1[None, :])
        scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        if D2 > 0:
            k2 = tl.load(p_k[:, None] + d2[None, :])
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
        if ROWS == 1:
            rel_h = tl.load(p_rel_h + start * BLOCK_Q + query)
            scores = scores * SCALE + rel_w
            higher = tl.maximum(highest, tl.max(scores, 1) + rel_h)
            weights = tl.exp2(scores - (higher - rel_h)[:, None])
        else:
            rows = start + tl.arange(0, ROWS)
            rel_h = tl.load(
                p_rel_h + rows[None, :] * BLOCK_Q + query[:, None], mask=(rows < WINDOW_H)[None, :], other=float("-inf")
            )
            scores = tl.reshape(scores, [BLOCK_Q, ROWS, COLS]) * SCALE + rel_w[:, None, :] + rel_h[:, :, None]
            scores = tl.reshape(scores, [BLOCK_Q, BLOCK_K])
            higher = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        highest = higher
        total = total * shrink + tl.sum(weights, 1)
        v1 = tl.load(p_k[:, None] + C + d1[None, :])
        weights = weights.to(v1.dtype)
        out1 = tl.dot(weights, v1, out1 * shrink[:, None], input_precision=PRECISION)
        if D2 > 0:
            v2 = tl.load(p_k[:, None] + C + d2[None, :])
            out2 = tl.dot(weights, v2, out2 * shrink[:, None], input_precision=PRECISION)

    p_out = out_ptr + ((image * height + top + row) * width + left + column) * C + head * D
    out1 = out1 / total[:, None]
    tl.store(p_out[:, None] + d1[None, :], out1.to(out_ptr.dtype.element_ty), mask=valid[:, None])
    if D2 > 0:
        out2 = out2 / total[:, None]
        tl.store(p_out[:, None] + d2[None, :], out2.to(out_ptr.dtype.element_ty), mask=valid[:, None])


def plan(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    qkv_bias: Tensor,
    out: Tensor,
    num_heads: int,
    window_size: int,
    tile: TileConfig,
) -> Launch:
    """Plan the launch that fills ``out`` [B, H, W, C], contiguous; tensors may be on the meta device."""
    batch, height, width, channels = qkv.shape
    if qkv.stride(3) != 1:
        qkv = qkv.contiguous()  # no projection leaves it so
    head_dim = channels // (3 * num_heads)
    window_h, window_w = (window_size, window_size) if window_size else (height, width)
    down, across = -(-height // window_h), -(-width // window_w)
    cols = triton.next_power_of_2(window_w)
    block_q = tile.blocks["BLOCK_Q"]
    block_k = max(tile.blocks["BLOCK_K"], cols)
    tiles = triton.cdiv(min(window_h, height) * cols, block_q)
    programs = batch * down * across * num_heads * tiles
    whole = height % window_h == 0 and width % window_w == 0
    wide = min(64, head_dim)
    return Launch(
        kernel=rel_pos_attention_kernel,
        grid=(programs,),
        arguments={
            "qkv_ptr": qkv,
            "rel_pos_h_ptr": rel_pos_h.contiguous(),
            "rel_pos_w_ptr": rel_pos_w.contiguous(),
            "qkv_bias_ptr": qkv_bias.contiguous(),
            "scratch_ptr": qkv.new_empty(programs * (window_h + window_w) * block_q, dtype=torch.float32),
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
            "WINDOW_H": window_h,
            "WINDOW_W": window_w,
            "COLS": cols,
            "D1": wide,
            "D2": head_dim - wide,
            "EXACT_FIT": whole and cols == window_w and window_h % (block_k // cols) == 0,
            "PRECISION": "ieee" if qkv.dtype == torch.float32 else "tf32",  # the latter says nothing to 16-bit operands
            "STAGES": tile.num_stages,
        },
        tile=TileConfig(
            {**tile.blocks, "BLOCK_K": block_k}, tile.num_warps, tile.num_stages, tile.provisional, tile.provenance
        ),
    )
