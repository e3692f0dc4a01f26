"""The Triton kernels of ``token_to_image_attention``: image tokens are read once for all heads and tokens of a prompt.

A program takes HEADS heads of one prompt and one of SPLITS shares of the image tokens. Its folded queries stay on the
chip; an online softmax runs over tiles of BLOCK_N image tokens, whose sum with their positions exists in registers
only. What a share attends to, [HEADS * T, C], goes through W_v before it is stored, which is linear and leaves d of C
channels. A second kernel adds the shares up in their order. How many shares there are is a matter of the class of
request, by its prompts: within a class no batch changes a bit.

Weighed: one program a prompt would need no second kernel and leave a single click to one multiprocessor; as many
shares for a thousand prompts as for one would load the operands and store the sums of each for nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...cross_attention.operands import ImageTokens, ValueProjection
from ...cross_attention.shapes import padded_tokens
from ...triton.launch import Launch, Launches
from ...triton.tiles import TileConfig

# Shares are whole multiples of so many image tokens, whatever the tile, so that no tile of a power of two up to it
# reaches into the next share.
_UNIT = 64
# Up to so many prompts, so many shares. As many programs as fill a large GPU; and even of many prompts a share must be
# so small (256 KB in bf16) that what all programs have updated and not yet attended to stays in the cache.
_SPLITS = ((4, 32), (16, 16))
_SPLITS_OF_MANY = 8


@triton.jit
def load_rows(p_rows, n, end, EXACT: tl.constexpr):
    """Load the rows ``n`` [BLOCK_N] before ``end``; all of them are if EXACT."""
    if EXACT:
        return tl.load(p_rows)
    return tl.load(p_rows, mask=(n < end)[:, None], other=0.0)


@triton.jit
def attend_share(
    p_queries,  # queries of a prompt, [H, T, C]
    p_image,  # its image tokens, [N, C]
    key_pe_ptr,
    value_weight_ptr,
    p_partial,  # sums of a share, [H * T_PADDED, D]
    p_stats,  # maxima and sums of a share, [2, H * T_PADDED]
    first_head,
    begin,
    end,
    tokens,
    H: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    T_PADDED: tl.constexpr,
    EXACT: tl.constexpr,  # every tile is full
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Attend from HEADS heads of a prompt to its image tokens ``begin`` to ``end``."""
    R: tl.constexpr = HEADS * T_PADDED
    r = tl.arange(0, R)
    c = tl.arange(0, C)
    head = first_head + r // T_PADDED
    token = r % T_PADDED
    p_rows = p_queries + (head * tokens + token)[:, None] * C + c[None, :]
    queries = tl.load(p_rows, mask=(token < tokens)[:, None], other=0.0)  # [R, C]

    largest = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    attended = tl.zeros([R, C], tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        place = n[:, None] * C + c[None, :]
        keys = load_rows(p_image + place, n, end, EXACT)
        key_pe = load_rows(key_pe_ptr + place, n, end, EXACT)
        keys_with_pe = (keys.to(tl.float32) + key_pe.to(tl.float32)).to(keys.dtype)
        scores = tl.dot(queries, tl.trans(keys_with_pe), input_precision=PRECISION) * 1.4426950408889634  # in bits
        if not EXACT:
            scores = tl.where((n < end)[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        attended = attended * shrink[:, None]
        attended = tl.dot(weights.to(keys.dtype), keys, attended, input_precision=PRECISION)
        # It always is, and costs nothing once compiled. A dot whose result is used in its own iteration is waited for
        # there; in flight over the end of one, ptxas would serialise every wgmma of the loop (C7515). The dot itself
        # must stand in the loop's own block: in an `if`, the copy of the next tile passes it and takes its keys.
        attended = tl.where(start < end, attended, 0.0)
        largest = larger

    # A share may be empty when there are few image tokens: its weights are zero, and so is its part of the sum.
    attended = attended / tl.where(total > 0.0, total, 1.0)[:, None]
    attended = attended.to(value_weight_ptr.dtype.element_ty)
    # All rows by the weights of PART heads at a time, of which each row keeps its own head's.
    PART: tl.constexpr = HEADS if HEADS * D <= 64 else 64 // D
    values = tl.zeros([R, D], tl.float32)
    for part in tl.range(first_head, first_head + HEADS, PART, num_stages=1):
        hd = part * D + tl.arange(0, PART * D)
        value_weight = tl.load(value_weight_ptr + hd[None, :] * C + c[:, None])  # [C, PART * D]
        product = tl.dot(attended, value_weight, input_precision=PRECISION)
        own = (head[:, None] == hd[None, :] // D).to(tl.float32)
        values += tl.sum(tl.reshape(product * own, [R, PART, D]), 1)
    row = first_head * T_PADDED + r
    tl.store(p_partial + row[:, None] * D + tl.arange(0, D)[None, :], values)
    tl.store(p_stats + row, largest)
    tl.store(p_stats + H * T_PADDED + row, total)


@triton.jit
def token_to_image_kernel(
    queries_ptr,  # [P, H, T, C]
    keys_ptr,
    key_pe_ptr,  # [N, C]
    value_weight_ptr,  # [H * D, C]
    index_ptr,  # [P] or None
    partial_ptr,  # [P, SPLITS, H * T_PADDED, D] fp32
    stats_ptr,  # [P, SPLITS, 2, H * T_PADDED] fp32: the largest score, in bits, and the sum of weights
    image_tokens,  # N
    share,  # image tokens of a share, at most
    tokens,  # T
    stride_ki,  # stride of keys [I, N, C] along the images, in elements; each is contiguous
    H: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    T_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
):
    GROUPS: tl.constexpr = H // HEADS
    prompt = (tl.program_id(0) // (SPLITS * GROUPS)).to(tl.int64)
    split = tl.program_id(0) // GROUPS % SPLITS
    first_head = tl.program_id(0) % GROUPS * HEADS
    image = prompt
    if HAS_INDEX:
        image = tl.load(index_ptr + prompt)
    begin = split * share
    place = (prompt * SPLITS + split) * (H * T_PADDED)
    attend_share(
        queries_ptr + prompt * (H * tokens * C),
        keys_ptr + image * stride_ki,
        key_pe_ptr,
        value_weight_ptr,
        partial_ptr + place * D,
        stats_ptr + place * 2,
        first_head,
        begin,
        tl.minimum(begin + share, image_tokens),
        tokens,
        H,
        D,
        C,
        T_PADDED,
        EXACT,
        PRECISION,
        STAGES,
        BLOCK_N,
        HEADS,
    )


@triton.jit
def combine_kernel(
    partial_ptr,
    stats_ptr,
    value_bias_ptr,  # [H * D]
    out_ptr,  # [P, T, H * D]
    tokens,
    H: tl.constexpr,
    D: tl.constexpr,
    T_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Add up the shares of one head of a prompt."""
    R: tl.constexpr = H * T_PADDED
    prompt = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    token = tl.arange(0, T_PADDED)
    r = head * T_PADDED + token
    d = tl.arange(0, D)
    p_stats = stats_ptr + prompt * (SPLITS * 2 * R) + r
    largest = tl.load(p_stats)
    for split in tl.static_range(1, SPLITS):
        largest = tl.maximum(largest, tl.load(p_stats + split * (2 * R)))
    total = tl.zeros([T_PADDED], tl.float32)
    values = tl.zeros([T_PADDED, D], tl.float32)
    for split in tl.static_range(SPLITS):
        weight = tl.exp2(tl.load(p_stats + split * (2 * R)) - largest) * tl.load(p_stats + split * (2 * R) + R)
        p_partial = partial_ptr + (prompt * SPLITS + split) * (R * D) + r[:, None] * D + d[None, :]
        values += weight[:, None] * tl.load(p_partial)
        total += weight
    bias = tl.load(value_bias_ptr + head * D + d).to(tl.float32)
    values = values / total[:, None] + bias[None, :]
    p_out = out_ptr + prompt * (tokens * H * D) + token[:, None] * (H * D) + head * D + d[None, :]
    tl.store(p_out, values.to(out_ptr.dtype.element_ty), mask=(token < tokens)[:, None])


def shares_of(prompts: int, image_tokens: int) -> tuple[int, int]:
    """Return how many programs share a prompt's image tokens, many where few prompts leave a GPU idle, and the size."""
    units = triton.cdiv(image_tokens, _UNIT)
    splits = min(next((splits for most, splits in _SPLITS if prompts <= most), _SPLITS_OF_MANY), units)
    return splits, triton.cdiv(units, splits) * _UNIT


def tiles_are_full(image_tokens: int, share: int, block: int) -> bool:
    """Return whether tiles of ``block`` image tokens cut every share without a rest."""
    return image_tokens % block == share % block == 0


def dense_rows(keys: Tensor) -> Tensor:
    """Return image tokens [I, N, C] with each image contiguous: themselves as the decoder has them, else a copy."""
    return keys if keys.stride(1) == keys.shape[2] and keys.stride(2) == 1 else keys.contiguous()


def plan(queries: Tensor, image: ImageTokens, value: ValueProjection, out: Tensor, tile: TileConfig) -> Launches:
    """Plan the two launches that fill ``out`` [P, T, H * d], contiguous; tensors may be on the meta device."""
    prompts, heads, tokens, channels = queries.shape
    tile = replace(tile, blocks={**tile.blocks, "HEADS": min(tile.blocks["HEADS"], heads)})
    keys, padded = dense_rows(image.tokens), padded_tokens(tokens)
    splits, share = shares_of(prompts, keys.shape[1])
    head_dim = len(value.weight) // heads
    rows = heads * padded
    partial = queries.new_empty((prompts, splits, rows, head_dim), dtype=torch.float32)
    stats = queries.new_empty((prompts, splits, 2, rows), dtype=torch.float32)
    attend = Launch(
        kernel=token_to_image_kernel,
        grid=(prompts * splits * (heads // tile.blocks["HEADS"]),),
        arguments={
            "queries_ptr": queries.contiguous(),
            "keys_ptr": keys,
            "key_pe_ptr": image.pe.contiguous(),
            "value_weight_ptr": value.weight.contiguous(),
            "index_ptr": None if image.image_index is None else image.image_index.contiguous(),
            "partial_ptr": partial,
            "stats_ptr": stats,
            "image_tokens": keys.shape[1],
            "share": share,
            "tokens": tokens,
            "stride_ki": keys.stride(0),
        },
        constants={
            "H": heads,
            "D": head_dim,
            "C": channels,
            "T_PADDED": padded,
            "SPLITS": splits,
            "HAS_INDEX": image.image_index is not None,
            "EXACT": tiles_are_full(keys.shape[1], share, tile.blocks["BLOCK_N"]),
            "PRECISION": "ieee" if queries.dtype == torch.float32 else "tf32",
            "STAGES": tile.num_stages,
        },
        tile=tile,
    )
    return Launches((attend, combine(partial, stats, value.bias, tokens, out, tile)))


def combine(
    partial: Tensor, stats: Tensor, value_bias: Tensor, tokens: int, out: Tensor, attending: TileConfig
) -> Launch:
    """Plan the launch that adds up what the shares of ``attending`` left, into ``out`` [P, T, H * d]."""
    prompts, splits, rows, head_dim = partial.shape
    padded = padded_tokens(tokens)
    return Launch(
        kernel=combine_kernel,
        grid=(prompts * (rows // padded),),
        arguments={
            "partial_ptr": partial,
            "stats_ptr": stats,
            "value_bias_ptr": value_bias.contiguous(),
            "out_ptr": out,
            "tokens": tokens,
        },
        constants={"H": rows // padded, "D": head_dim, "T_PADDED": padded, "SPLITS": splits},
        tile=TileConfig({}, 1, 1, attending.provisional, attending.provenance),
    )
