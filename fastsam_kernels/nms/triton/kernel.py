"""The Triton kernels of ``nms``: the overlaps of all pairs as bits, then one program that goes through them.

The second takes 32 boxes at a time. Whether they suppress each other is settled in registers, a round for each link
of the longest chain; the words of those that stay are joined to the bits of what is suppressed. Nothing waits for the
host, and bits leave no room for an order of operations to show.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...triton.launch import Launch
from ...triton.tiles import TileConfig

_WORD = 32


# There are as many boxes as there happen to be: of their number the compiler knows WORDS and nothing else.
@triton.jit(do_not_specialize=["count"])
def overlap_bits_kernel(
    boxes_ptr,  # [N, 4] fp32
    bits_ptr,  # [N, WORDS] int32: bit b of [i, w] is that i suppresses box 32 w + b behind it
    count,  # N
    threshold,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.program_id(1)
    if word * 32 + 31 <= tl.program_id(0) * BLOCK_N:
        return  # boxes before those of the block: the sweep does not look at them again
    bit = tl.arange(0, 32)
    j = word * 32 + bit
    p_i = boxes_ptr + tl.minimum(i, count - 1) * 4
    p_j = boxes_ptr + tl.minimum(j, count - 1) * 4
    x0, y0, x1, y1 = tl.load(p_i), tl.load(p_i + 1), tl.load(p_i + 2), tl.load(p_i + 3)
    u0, v0, u1, v1 = tl.load(p_j), tl.load(p_j + 1), tl.load(p_j + 2), tl.load(p_j + 3)
    width = tl.minimum(x1[:, None], u1[None, :]) - tl.maximum(x0[:, None], u0[None, :])
    height = tl.minimum(y1[:, None], v1[None, :]) - tl.maximum(y0[:, None], v0[None, :])
    both = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    own = (x1 - x0) * (y1 - y0)
    other = (u1 - u0) * (v1 - v0)
    union = own[:, None] + other[None, :] - both
    overlap = (tl.div_rn(both, union) > threshold) & (i[:, None] < j[None, :]) & (j < count)[None, :]
    words = tl.sum(overlap.to(tl.int32) << bit[None, :], 1)
    tl.store(bits_ptr + i.to(tl.int64) * WORDS + word, words, mask=i < count)


@triton.jit
def join(a, b):
    return a | b


@triton.jit(do_not_specialize=["count"])
def sweep_kernel(
    bits_ptr,  # [N, WORDS] int32
    keep_ptr,  # [N] bool
    count,  # N
    WORDS: tl.constexpr,
):
    word = tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    suppressed = tl.zeros([WORDS], tl.int32)
    for block in range((count + 31) // 32):
        i = block * 32 + bit
        p_rows = bits_ptr + i.to(tl.int64) * WORDS
        rivals = tl.load(p_rows + block, mask=i < count, other=0)  # [32], whom each suppresses within the block
        already = tl.sum(tl.where(word == block, suppressed, 0), 0)
        free = ((already >> bit) & 1 == 0) & (i < count)
        stays = free
        changed = 1
        while changed > 0:
            fallen = tl.reduce(tl.where(stays, rivals, 0), 0, join)
            again = free & ((fallen >> bit) & 1 == 0)
            changed = tl.sum((again != stays).to(tl.int32), 0)
            stays = again
        rows = tl.load(p_rows[:, None] + word[None, :], mask=stays[:, None], other=0)
        suppressed = suppressed | tl.reduce(rows, 0, join)
        tl.store(keep_ptr + i, stays, mask=i < count)


def plan(boxes: Tensor, threshold: float, bits: Tensor, keep: Tensor, tile: TileConfig) -> list[Launch]:
    """Plan the two launches that fill ``bits`` and ``keep`` [N]; tensors may be on the meta device."""
    count, words = len(boxes), bits.shape[1]
    block_n = tile.blocks["BLOCK_N"]
    of_sweep = TileConfig({}, max(1, min(16, words // 16)), 1, tile.provisional, tile.provenance)
    return [
        Launch(
            kernel=overlap_bits_kernel,
            grid=(triton.cdiv(count, block_n), triton.cdiv(count, _WORD)),
            arguments={"boxes_ptr": boxes, "bits_ptr": bits, "count": count, "threshold": threshold},
            constants={"WORDS": words},
            tile=tile,
            fuse_multiply_add=False,  # a product that is not rounded would decide otherwise
        ),
        Launch(
            kernel=sweep_kernel,
            grid=(1,),
            arguments={"bits_ptr": bits, "keep_ptr": keep, "count": count},
            constants={"WORDS": words},
            tile=of_sweep,
        ),
    ]


def words_of(count: int) -> int:
    """Return the number of 32-bit words for that many boxes, as a power of two."""
    return max(16, triton.next_power_of_2(triton.cdiv(count, _WORD)))
