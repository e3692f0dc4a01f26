"""The Triton kernels of ``hypernetwork_masks``: one pass, nothing between in memory.

A program takes BLOCK_N tokens of one prompt through all of it, one quadrant (a, b) of the first upscaling after the
other: the loop keeps a quadrant's accumulators [BLOCK_N, C1] and [BLOCK_N, 4 * C2] in registers, and the quadrant's
16 pixels a mask go straight to their places. No result depends on what else is in the batch.

Features of finer grids are added where they are needed, 128 bytes a token and quadrant of each where their channels
are last. All prompts of an image add the same: programs of one tile and many prompts come one after the other, so that
they are read from L2. The choice among masks is the caller's, by the vectors that it gives.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton.launch import Launch
from ...triton.math import gelu
from ...triton.tiles import TileConfig
from ..weights import UpscalingWeights


@triton.jit
def hypernetwork_masks_kernel(
    keys_ptr,
    weight1_ptr,
    bias1_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight2_ptr,
    bias2_ptr,
    hyper_ptr,
    fine_ptr,  # s0 [I, C2, 4h, 4w] or None
    coarse_ptr,  # s1 [I, C1, 2h, 2w] or None
    index_ptr,  # [P] or None
    out_ptr,
    prompts,
    tokens,  # h * w
    width,  # w
    tiles,  # programs a prompt
    stride_kp,  # strides of keys [P, N, C] in elements
    stride_kn,
    stride_kc,
    stride_fi,  # strides of s0
    stride_fc,
    stride_fh,
    stride_fw,
    stride_ci,  # strides of s1
    stride_cc,
    stride_ch,
    stride_cw,
    eps,
    C: tl.constexpr,
    MASKS: tl.constexpr,
    FINER: tl.constexpr,  # s0 and s1 are added
    HAS_INDEX: tl.constexpr,
    EXACT_GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C1: tl.constexpr = C // 4
    C2: tl.constexpr = C // 8
    prompt = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    if FINER:
        prompt = tl.program_id(0) % prompts
        tile = tl.program_id(0) // prompts
    prompt = prompt.to(tl.int64)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = n < tokens
    # int64: with the prompts innermost a token's stride grows with the batch too.
    p_keys = keys_ptr + prompt * stride_kp + n.to(tl.int64)[:, None] * stride_kn  # [BLOCK_N, 1]

    c1 = tl.arange(0, C1)
    c2 = tl.arange(0, C2)
    c2_4 = tl.arange(0, 4 * C2)
    norm_weight = tl.load(norm_weight_ptr + c1).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + c1).to(tl.float32)
    bias1 = tl.load(bias1_ptr + c1).to(tl.float32)  # the same for each quadrant
    bias2 = tl.load(bias2_ptr + c2_4).to(tl.float32)
    weight2 = tl.load(weight2_ptr + c1[:, None] * (4 * C2) + c2_4[None, :])  # [C1, 4 * C2]
    if BLOCK_C == C:
        b_keys = tl.load(p_keys + tl.arange(0, C)[None, :] * stride_kc, mask=valid[:, None], other=0.0)

    cd = tl.arange(0, 4)
    top = 4 * (n // width)
    left = 4 * (n % width)
    p_out = out_ptr + prompt * (MASKS * 16 * tokens)
    if FINER:
        image = prompt
        if HAS_INDEX:
            image = tl.load(index_ptr + prompt)
        # int64: the strides of rows and columns may be those of a view.
        y_s1 = (top // 2).to(tl.int64)
        x_s1 = (left // 2).to(tl.int64)
        p_coarse = coarse_ptr + image * stride_ci + (y_s1 * stride_ch + x_s1 * stride_cw)[:, None]
        p_coarse += c1[None, :] * stride_cc
        p_fine = fine_ptr + image * stride_fi + (2 * y_s1 * stride_fh + 2 * x_s1 * stride_fw)[:, None]
        p_fine += (c2_4 // C2 // 2 * stride_fh + c2_4 // C2 % 2 * stride_fw + c2_4 % C2 * stride_fc)[None, :]
    for ab in tl.range(0, 4, num_stages=STAGES):
        p_weight1 = weight1_ptr + ab * C1 + c1[None, :]
        if BLOCK_C == C:
            b_weight1 = tl.load(p_weight1 + tl.arange(0, C)[:, None] * (4 * C1))  # [C, C1]
            y = tl.dot(b_keys, b_weight1, input_precision=PRECISION)
        else:
            y = tl.zeros([BLOCK_N, C1], tl.float32)
            for start in range(0, C, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                b_keys = tl.load(p_keys + c[None, :] * stride_kc, mask=valid[:, None], other=0.0)
                b_weight1 = tl.load(p_weight1 + c[:, None] * (4 * C1))
                y = tl.dot(b_keys, b_weight1, y, input_precision=PRECISION)
        y += bias1[None, :]  # [BLOCK_N, C1]
        if FINER:
            s1 = tl.load(p_coarse + (ab // 2 * stride_ch + ab % 2 * stride_cw), mask=valid[:, None], other=0.0)
            y += s1.to(tl.float32)
        y -= tl.sum(y, 1)[:, None] / C1
        variance = tl.sum(y * y, 1) / C1
        y = y * tl.rsqrt(variance + eps)[:, None] * norm_weight[None, :] + norm_bias[None, :]
        y = gelu(y, EXACT_GELU).to(weight2.dtype)
        z = tl.dot(y, weight2, input_precision=PRECISION) + bias2[None, :]
        if FINER:
            s0 = tl.load(p_fine + 2 * (ab // 2 * stride_fh + ab % 2 * stride_fw), mask=valid[:, None], other=0.0)
            z += s0.to(tl.float32)
        z = gelu(z, EXACT_GELU)
        z = tl.reshape(z, [BLOCK_N, 4, C2])

        row = top + 2 * (ab // 2)
        column = left + 2 * (ab % 2)
        place = (row[:, None] + cd[None, :] // 2) * (4 * width) + column[:, None] + cd[None, :] % 2  # [BLOCK_N, 4]
        for mask in tl.static_range(MASKS):
            vector = tl.load(hyper_ptr + (prompt * MASKS + mask) * C2 + c2).to(tl.float32)
            pixels = tl.sum(z * vector[None, None, :], 2)  # [BLOCK_N, 4]
            p_pixels = p_out + mask * (16 * tokens) + place
            tl.store(p_pixels, pixels.to(out_ptr.dtype.element_ty), mask=valid[:, None])


def plan(
    keys: Tensor,
    weights: UpscalingWeights,
    hyper: Tensor,
    out: Tensor,
    grid: tuple[int, int],
    eps: float,
    tile: TileConfig,
    high_res: tuple[Tensor, Tensor] | None = None,
    image_index: Tensor | None = None,
) -> Launch:
    """Plan the launch that fills ``out`` [P, M, 4h, 4w], contiguous; tensors may be on the meta device."""
    prompts, tokens, channels = keys.shape
    block_n = tile.blocks["BLOCK_N"]
    tiles = triton.cdiv(tokens, block_n)
    blocks = {"BLOCK_N": block_n, "BLOCK_C": min(tile.blocks["BLOCK_C"], channels)}
    exact = keys.dtype == torch.float32
    fine, coarse = (None, None) if high_res is None else high_res
    return Launch(
        kernel=hypernetwork_masks_kernel,
        grid=(prompts * tiles,),
        arguments={
            "keys_ptr": keys,
            "weight1_ptr": weights.weight1.contiguous(),
            "bias1_ptr": weights.bias1.contiguous(),
            "norm_weight_ptr": weights.norm_weight.contiguous(),
            "norm_bias_ptr": weights.norm_bias.contiguous(),
            "weight2_ptr": weights.weight2.contiguous(),
            "bias2_ptr": weights.bias2.contiguous(),
            "hyper_ptr": hyper.contiguous(),
            "fine_ptr": fine,
            "coarse_ptr": coarse,
            "index_ptr": None if image_index is None or fine is None else image_index.contiguous(),
            "out_ptr": out,
            "prompts": prompts,
            "tokens": tokens,
            "width": grid[1],
            "tiles": tiles,
            "stride_kp": keys.stride(0),
            "stride_kn": keys.stride(1),
            "stride_kc": keys.stride(2),
            **_strides("f", fine),
            **_strides("c", coarse),
            "eps": eps,
        },
        constants={
            "C": channels,
            "MASKS": hyper.shape[1],
            "FINER": fine is not None,
            "HAS_INDEX": image_index is not None and fine is not None,
            "EXACT_GELU": exact,
            "PRECISION": "ieee" if exact else "tf32",  # the latter says nothing to 16-bit operands
            "STAGES": tile.num_stages,
        },
        tile=TileConfig(blocks, tile.num_warps, tile.num_stages, tile.provisional, tile.provenance),
    )


def _strides(letter: str, features: Tensor | None) -> dict[str, int]:
    """Return the strides of features [I, C, H, W] by their names in the kernel; one image serves all prompts."""
    names = [f"stride_{letter}{axis}" for axis in "ichw"]
    if features is None:
        return dict.fromkeys(names, 0)
    images, *others = features.stride()
    return dict(zip(names, (images if len(features) > 1 else 0, *others), strict=True))
