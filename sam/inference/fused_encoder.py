"""The image encoder with fused operations in its blocks.

A block's windows are cut inside the attention, and its MLP writes to the tokens in place. What a program hooked,
patched or replaced in a block gets what the official modules give it, and the rest of the block stays fused.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsam_kernels import rel_pos_attention, requires_autograd

from ..modeling import image_encoder
from ..modeling.common import MLPBlock, uncompiled
from ..modeling.image_encoder import Attention, Block, ImageEncoderViT, resize_rel_pos
from ..modeling.quantized_linear import check_whole
from ..system.device_profile import device_profile
from . import quantized_block
from .eligibility import has_no_hooks, is_stock, look

# What the official blocks call by these names of their module.
_FUNCTIONS = {
    function.__name__: function
    for function in (
        image_encoder.window_partition,
        image_encoder.window_unpartition,
        image_encoder.get_rel_pos,
        image_encoder.add_decomposed_rel_pos,
    )
}


class Attend(Enum):
    """The ways to compute a block's attention."""

    GRID = "all of it; the kernel cuts the windows"
    WINDOWS = "the attention between two projections that are called with windows"
    MODULE = "nothing; the module is called with windows"


class BlockPlan(NamedTuple):
    """The parts of a block that are fused."""

    attention: Attend
    mlp: bool
    quantized: bool = False  # all of it, by linear layers in 8 bits


Plans = tuple[BlockPlan | None, ...]


def plan_blocks(encoder: ImageEncoderViT) -> Plans:
    """Return what is fused of each block of ``encoder`` as it is now; None for a block that is called as a module."""
    return tuple(_plan_of(block) for block in encoder.blocks)


def _plans_of_generation(encoder: ImageEncoderViT, _: int) -> Plans:
    return plan_blocks(encoder)


def _plan_of(block: Any) -> BlockPlan | None:
    if not is_stock(block, Block):
        return None
    if quantized_block.is_fused(block):
        return BlockPlan(Attend.GRID, mlp=True, quantized=True)
    attention, norm, mlp = block.attn, block.norm2, block.mlp
    plain_mlp = is_stock(mlp, MLPBlock) and mlp.is_plain and has_no_hooks(mlp)
    is_mlp_fused = plain_mlp and is_stock(norm, nn.LayerNorm)
    if not is_stock(attention, Attention):
        return BlockPlan(Attend.MODULE, is_mlp_fused)
    linears = all(is_stock(layer, nn.Linear) for layer in (attention.qkv, attention.proj))
    return BlockPlan(Attend.GRID if linears else Attend.WINDOWS, is_mlp_fused)


def encode(
    encoder: ImageEncoderViT,
    pixels: Tensor,
    kernels: str,
    run: Callable[[Any, Tensor, str, BlockPlan | None], Tensor] | None = None,
) -> Tensor:
    """Encode normalised pixels [B, 3, H, W] as [B, out_chans, grid_h, grid_w].

    Args:
        encoder: the module, or what ``torch.compile`` made of it.
        pixels: see :class:`ImageEncoderViT`.
        kernels: implementation of the attention; "reference" calls the official blocks.
        run: :func:`run_block`, compiled.

    Raises:
        ValueError: pixels that the encoder refuses; or an adapter in a quantised encoder.
    """
    encoder, run = uncompiled(encoder), run or run_block
    check_whole(encoder)
    x = encoder.embed_patches(pixels)
    plans: Plans = (None,) * len(encoder.blocks)
    if kernels != "reference" and all(getattr(image_encoder, name) is f for name, f in _FUNCTIONS.items()):
        # Where autograd records, weights may be a program's own tensors, which a snapshot would keep alive.
        plans = plan_blocks(encoder) if torch.is_grad_enabled() else look(encoder).packed(_plans_of_generation, encoder)
    for block, plan in zip(encoder.blocks, plans, strict=True):
        x = run(block, x, kernels, plan)
    return encoder.neck(x.permute(0, 3, 1, 2))


def run_block(block: Any, x: Tensor, kernels: str, plan: BlockPlan | None) -> Tensor:
    """Run one block on tokens [B, H, W, dim], fused as far as ``plan`` says."""
    if plan is None:
        return block(x)
    if plan.quantized:
        attention, window = block.attn, block.window_size
        return quantized_block.run_block(
            block, x, kernels, lambda qkv: _attend_projected(attention, qkv, window, kernels)
        )
    x = x + attend(block, block.norm1(x), kernels, plan.attention)
    return _add_mlp(block, x) if plan.mlp else x + block.mlp(block.norm2(x))


def attend(block: Any, x: Tensor, kernels: str, mode: Attend = Attend.GRID) -> Tensor:
    """Return the attention of [B, H, W, dim], normalised, in the block's windows, with its projection."""
    attention, window = block.attn, block.window_size
    if mode is Attend.GRID:
        return attention.proj(_attend_projected(attention, attention.qkv(x), window, kernels))
    # The zero padding passes through qkv, so a padded key is the qkv bias and takes part in the softmax.
    windows, padded = image_encoder.window_partition(x, window) if window else (x, (0, 0))
    if mode is Attend.MODULE:
        attended = attention(windows)
    else:
        attended = attention.proj(_attend_projected(attention, attention.qkv(windows), 0, kernels))
    size = (x.shape[1], x.shape[2])
    return image_encoder.window_unpartition(attended, window, padded, size) if window else attended


def _attend_projected(attention: Attention, qkv: Tensor, window_size: int, kernels: str) -> Tensor:
    """Attend with the output of ``attention.qkv``, [B, H, W, 3 * dim]; return what goes into ``attention.proj``."""
    height, width = (window_size, window_size) if window_size else qkv.shape[1:3]
    bias = attention.qkv.bias if window_size else None  # what the projection makes of padding
    return rel_pos_attention(
        qkv,
        *_tables(attention, qkv, (2 * height - 1, 2 * width - 1)),
        num_heads=attention.num_heads,
        window_size=window_size,
        qkv_bias=None if bias is None else bias.to(qkv.dtype),
        kernels=kernels,
    )


def _tables(attention: Attention, qkv: Tensor, lengths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the tables of relative position [length, head_dim] of both axes; zeros for an attention without."""
    if not attention.use_rel_pos:
        head_dim = qkv.shape[3] // (3 * attention.num_heads)
        return qkv.new_zeros(lengths[0], head_dim), qkv.new_zeros(lengths[1], head_dim)
    rows, columns = (
        resize_rel_pos(table, length).to(qkv.dtype)  # autocast may have narrowed the projection
        for table, length in zip((attention.rel_pos_h, attention.rel_pos_w), lengths, strict=True)
    )
    return rows, columns


def _add_mlp(block: Any, x: Tensor) -> Tensor:
    """Return x + mlp(norm2(x)), written to ``x`` unless autograd or autocast would notice."""
    weights = [weight for layer in (block.norm2, block.mlp) for weight in layer.parameters()]
    if requires_autograd(x, *weights) or torch.is_autocast_enabled(x.device.type):
        return x + block.mlp(block.norm2(x))
    tokens = x.reshape(-1, x.shape[-1])
    # Chunks keep the hidden channels near a CPU's cache.
    for chunk in tokens.split(device_profile(x.device).mlp_tokens_per_chunk or len(tokens)):
        chunk += block.mlp(block.norm2(chunk))
    return tokens.view(x.shape)
