"""The Triton kernels of ``image_to_token_attention``: one pass over the image tokens, from scores to the layer norm.

A program takes TILES tiles of BLOCK_N image tokens of one prompt, one after the other: scores against the tokens of
HEADS heads in one product, a softmax over each head's few tokens in registers, the folded values added to the residual
in a second product, and after all heads the norm. The prompt's operands are loaded once where those of all heads fit
the shared memory, else a group of heads at a time for every tile, from the cache. Every image token is independent, so
that no batch changes a bit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...cross_attention.operands import AbsorbedTokens, ImageTokens, LayerNormWeights
from ...cross_attention.shapes import padded_tokens
from ...token_to_image_attention.triton.kernel import dense_rows, load_rows
from ...triton.launch import Launch
from ...triton.tiles import TileConfig


@triton.jit
def update_image_tokens(
    p_image,  # the image tokens of a prompt, [N, C]
    key_pe_ptr,
    p_token_keys,  # keys of a prompt's tokens, [H, T, C]
    p_token_bias,  # [H, T]
    p_token_values,  # [H, T, C]
    norm_weight_ptr,
    norm_bias_ptr,
    p_out,  # [N, C]
    begin,
    end,
    tokens,
    eps,
    H: tl.constexpr,
    C: tl.constexpr,
    T_PADDED: tl.constexpr,
    EXACT: tl.constexpr,  # every tile is full
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Attend from the image tokens ``begin`` to ``end`` of a prompt to its tokens, and update them."""
    c = tl.arange(0, C)
    if HEADS == H:
        token_keys, token_bias, token_values = load_tokens(
            p_token_keys, p_token_bias, p_token_values, 0, tokens, C, T_PADDED, HEADS
        )
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        place = n[:, None] * C + c[None, :]
        keys = load_rows(p_image + place, n, end, EXACT)
        key_pe = load_rows(key_pe_ptr + place, n, end, EXACT)
        keys_with_pe = (keys.to(tl.float32) + key_pe.to(tl.float32)).to(keys.dtype)
        y = keys.to(tl.float32)
        if HEADS == H:
            y = attend(y, keys_with_pe, token_keys, token_bias, token_values, T_PADDED, PRECISION, BLOCK_N, HEADS)
        else:
            for group in tl.range(0, H, HEADS):
                token_keys, token_bias, token_values = load_tokens(
                    p_token_keys, p_token_bias, p_token_values, group, tokens, C, T_PADDED, HEADS
                )
                y = attend(y, keys_with_pe, token_keys, token_bias, token_values, T_PADDED, PRECISION, BLOCK_N, HEADS)
        # Loaded here and not before the loop, where they would take 128 registers of a thread for all of it.
        norm_weight = tl.load(norm_weight_ptr + c).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + c).to(tl.float32)
        y -= tl.sum(y, 1)[:, None] / C
        variance = tl.sum(y * y, 1) / C
        y = y * tl.rsqrt(variance + eps)[:, None] * norm_weight[None, :] + norm_bias[None, :]
        if EXACT:
            tl.store(p_out + place, y.to(p_out.dtype.element_ty))
        else:
            tl.store(p_out + place, y.to(p_out.dtype.element_ty), mask=(n < end)[:, None])


@triton.jit
def load_tokens(
    p_token_keys,  # keys of a prompt's tokens, [H, T, C]
    p_token_bias,  # [H, T]
    p_token_values,  # [H, T, C]
    first_head,
    tokens,
    C: tl.constexpr,
    T_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Load keys [C, R], bias in bits [R] and values [R, C] of R = HEADS * T_PADDED tokens."""
    r = tl.arange(0, HEADS * T_PADDED)
    c = tl.arange(0, C)
    real = r % T_PADDED < tokens
    row = (first_head + r // T_PADDED) * tokens + r % T_PADDED
    token_keys = tl.load(p_token_keys + row[None, :] * C + c[:, None], mask=real[None, :], other=0.0)
    token_bias = tl.load(p_token_bias + row, mask=real, other=float("-inf")).to(tl.float32) * 1.4426950408889634
    token_values = tl.load(p_token_values + row[:, None] * C + c[None, :], mask=real[:, None], other=0.0)
    return token_keys, token_bias, token_values


@triton.jit
def attend(
    y,  # [BLOCK_N, C] fp32
    keys_with_pe,  # [BLOCK_N, C]
    token_keys,
    token_bias,
    token_values,
    T_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Add what the image tokens learn from the tokens of HEADS heads to ``y``."""
    scores = tl.dot(keys_with_pe, token_keys, input_precision=PRECISION)
    scores = scores * 1.4426950408889634 + token_bias[None, :]  # in bits
    scores = tl.reshape(scores, [BLOCK_N, HEADS, T_PADDED])
    weights = tl.exp2(scores - tl.max(scores, 2)[:, :, None])
    weights = weights * (1.0 / tl.sum(weights, 2))[:, :, None]
    weights = tl.reshape(weights, [BLOCK_N, HEADS * T_PADDED]).to(keys_with_pe.dtype)
    return tl.dot(weights, token_values, y, input_precision=PRECISION)


@triton.jit
def image_to_token_kernel(
    keys_ptr,
    key_pe_ptr,  # [N, C]
    token_keys_ptr,  # [P, H, T, C]
    token_bias_ptr,  # [P, H, T]
    token_values_ptr,  # [P, H, T, C]
    norm_weight_ptr,  # [C]
    norm_bias_ptr,
    index_ptr,  # [P] or None
    out_ptr,  # [P, N, C]
    image_tokens,  # N
    tokens,  # T
    programs,  # a prompt
    stride_ki,  # stride of keys [I, N, C] along the images, in elements; each is contiguous
    eps,
    H: tl.constexpr,
    C: tl.constexpr,
    T_PADDED: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    HEADS: tl.constexpr,
):
    prompt = (tl.program_id(0) // programs).to(tl.int64)
    begin = (tl.program_id(0) % programs) * (TILES * BLOCK_N)
    image = prompt
    if HAS_INDEX:
        image = tl.load(index_ptr + prompt)
    update_image_tokens(
        keys_ptr + image * stride_ki,
        key_pe_ptr,
        token_keys_ptr + prompt * (H * tokens * C),
        token_bias_ptr + prompt * (H * tokens),
        token_values_ptr + prompt * (H * tokens * C),
        norm_weight_ptr,
        norm_bias_ptr,
        out_ptr + prompt * image_tokens * C,
        begin,
        tl.minimum(begin + TILES * BLOCK_N, image_tokens),
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


def plan(image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights, out: Tensor, tile: TileConfig) -> Launch:
    """Plan the launch that fills ``out`` [P, N, C], contiguous; tensors may be on the meta device."""
    prompts, heads, tokens, channels = absorbed.keys.shape
    tile = replace(tile, blocks={**tile.blocks, "HEADS": min(tile.blocks["HEADS"], heads)})
    keys, image_tokens = dense_rows(image.tokens), image.tokens.shape[1]
    programs = triton.cdiv(image_tokens, tile.blocks["BLOCK_N"] * tile.blocks["TILES"])
    return Launch(
        kernel=image_to_token_kernel,
        grid=(prompts * programs,),
        arguments={
            "keys_ptr": keys,
            "key_pe_ptr": image.pe.contiguous(),
            "token_keys_ptr": absorbed.keys.contiguous(),
            "token_bias_ptr": absorbed.bias.contiguous(),
            "token_values_ptr": absorbed.values.contiguous(),
            "norm_weight_ptr": norm.weight.contiguous(),
            "norm_bias_ptr": norm.bias.contiguous(),
            "index_ptr": None if image.image_index is None else image.image_index.contiguous(),
            "out_ptr": out,
            "image_tokens": image_tokens,
            "tokens": tokens,
            "programs": programs,
            "stride_ki": keys.stride(0),
            "eps": norm.eps,
        },
        constants={
            "H": heads,
            "C": channels,
            "T_PADDED": padded_tokens(tokens),
            "HAS_INDEX": image.image_index is not None,
            "EXACT": image_tokens % tile.blocks["BLOCK_N"] == 0,
            "PRECISION": "ieee" if keys.dtype == torch.float32 else "tf32",
            "STAGES": tile.num_stages,
        },
        tile=tile,
    )
