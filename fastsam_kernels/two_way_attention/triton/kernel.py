"""The Triton kernels of ``two_way_attention``: image tokens are updated and attended to while they are near.

A program takes one of SPLITS shares of a prompt's image tokens. It updates them as ``image_to_token_kernel`` does,
waits until all of its own threads have written theirs, and attends to them as ``token_to_image_kernel`` does, so
memory sees the updated tokens once, on their way out: a share of 512 tokens is 256 KB in bf16 and comes back from the
cache. The results are bit-equal to those of the two kernels with the same tiles.

Weighed, by instructions and registers on sm_90: with a warpgroup and the operands of all heads loaded once, each half
by itself keeps two programs on a multiprocessor, and so do both in one kernel; apart they would read the tokens twice.
Attending to a tile while it is in registers reads nothing back, but the sums of all heads (64 x 256 in fp32, for a
click) then live beside the norm of the tile. Not writing the tokens of the first block at all and computing them twice
saves as many bytes as it costs products (0.2 GFLOP per prompt), where products are the tighter limit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...cross_attention.operands import AbsorbedTokens, ImageTokens, LayerNormWeights, ValueProjection
from ...cross_attention.shapes import padded_tokens
from ...image_to_token_attention.triton.kernel import update_image_tokens
from ...token_to_image_attention.triton.kernel import (
    attend_share,
    combine,
    dense_rows,
    shares_of,
    tiles_are_full,
)
from ...triton.launch import Launch, Launches
from ...triton.tiles import TileConfig


@triton.jit
def two_way_kernel(
    keys_ptr,
    key_pe_ptr,  # [N, C]
    token_keys_ptr,  # [P, H, T, C]
    token_bias_ptr,  # [P, H, T]
    token_values_ptr,  # [P, H, T, C]
    norm_weight_ptr,  # [C]
    norm_bias_ptr,
    queries_ptr,  # [P, H, T, C]
    value_weight_ptr,  # [H * D, C]
    index_ptr,  # [P] or None
    out_ptr,  # [P, N, C]
    partial_ptr,  # [P, SPLITS, H * T_PADDED, D] fp32
    stats_ptr,  # [P, SPLITS, 2, H * T_PADDED] fp32
    image_tokens,  # N
    share,  # image tokens of a share, at most
    tokens,  # T
    stride_ki,  # stride of keys [I, N, C] along the images, in elements; each is contiguous
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    T_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    EXACT: tl.constexpr,  # every tile of both attentions is full
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
    ASKED_N: tl.constexpr,
    ASKING_HEADS: tl.constexpr,
    ASKING_STAGES: tl.constexpr,
):
    prompt = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    image = prompt
    if HAS_INDEX:
        image = tl.load(index_ptr + prompt)
    begin = split * share
    end = tl.minimum(begin + share, image_tokens)
    p_out = out_ptr + prompt * image_tokens * C
    update_image_tokens(
        keys_ptr + image * stride_ki,
        key_pe_ptr,
        token_keys_ptr + prompt * (H * tokens * C),
        token_bias_ptr + prompt * (H * tokens),
        token_values_ptr + prompt * (H * tokens * C),
        norm_weight_ptr,
        norm_bias_ptr,
        p_out,
        begin,
        end,
        tokens,
        eps,
        H,
        C,
        T_PADDED,
        EXACT,
        PRECISION,
        STAGES,
        BLOCK_N,
        HEADS,
    )
    tl.debug_barrier()  # what the threads of this program wrote is seen by all of them
    place = (prompt * SPLITS + split) * (H * T_PADDED)
    for first_head in tl.range(0, H, ASKING_HEADS, num_stages=1):
        attend_share(
            queries_ptr + prompt * (H * tokens * C),
            p_out,
            key_pe_ptr,
            value_weight_ptr,
            partial_ptr + place * D,
            stats_ptr + place * 2,
            first_head,
            begin,
            end,
            tokens,
            H,
            D,
            C,
            T_PADDED,
            EXACT,
            PRECISION,
            ASKING_STAGES,
            ASKED_N,
            ASKING_HEADS,
        )


def plan(
    image: ImageTokens,
    absorbed: AbsorbedTokens,
    norm: LayerNormWeights,
    queries: Tensor,
    value: ValueProjection,
    out_keys: Tensor,
    out: Tensor,
    tile: TileConfig,
) -> Launches:
    """Plan the two launches that fill ``out_keys`` [P, N, C] and ``out`` [P, T, H * d], both contiguous.

    Tensors may be on the meta device.
    """
    keys, (prompts, heads, tokens, channels) = dense_rows(image.tokens), queries.shape
    few = {name: min(tile.blocks[name], heads) for name in ("HEADS", "ASKING_HEADS")}
    tile = replace(tile, blocks={**tile.blocks, **few})
    larger, rows = max(tile.blocks["BLOCK_N"], tile.blocks["ASKED_N"]), heads * padded_tokens(tokens)
    splits, share = shares_of(prompts, keys.shape[1])
    head_dim = len(value.weight) // heads
    partial = queries.new_empty((prompts, splits, rows, head_dim), dtype=torch.float32)
    stats = queries.new_empty((prompts, splits, 2, rows), dtype=torch.float32)
    update_and_ask = Launch(
        kernel=two_way_kernel,
        grid=(prompts * splits,),
        arguments={
            "keys_ptr": keys,
            "key_pe_ptr": image.pe.contiguous(),
            "token_keys_ptr": absorbed.keys.contiguous(),
            "token_bias_ptr": absorbed.bias.contiguous(),
            "token_values_ptr": absorbed.values.contiguous(),
            "norm_weight_ptr": norm.weight.contiguous(),
            "norm_bias_ptr": norm.bias.contiguous(),
            "queries_ptr": queries.contiguous(),
            "value_weight_ptr": value.weight.contiguous(),
            "index_ptr": None if image.image_index is None else image.image_index.contiguous(),
            "out_ptr": out_keys,
            "partial_ptr": partial,
            "stats_ptr": stats,
            "image_tokens": keys.shape[1],
            "share": share,
            "tokens": tokens,
            "stride_ki": keys.stride(0),
            "eps": norm.eps,
        },
        constants={
            "H": heads,
            "D": head_dim,
            "C": channels,
            "T_PADDED": padded_tokens(tokens),
            "SPLITS": splits,
            "HAS_INDEX": image.image_index is not None,
            "EXACT": tiles_are_full(keys.shape[1], share, larger),
            "PRECISION": "ieee" if queries.dtype == torch.float32 else "tf32",
            "STAGES": tile.num_stages,
        },
        tile=tile,
    )
    return Launches((update_and_ask, combine(partial, stats, value.bias, tokens, out, tile)))
