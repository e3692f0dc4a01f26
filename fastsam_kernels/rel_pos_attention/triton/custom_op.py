"""``torch.ops.fastsam.rel_pos_attention``: an operation that compiled graphs and exports keep whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton.tiles import arch_of, lookup
from .kernel import plan
from .shapes import AttentionShape


@torch.library.custom_op("fastsam::rel_pos_attention", mutates_args=())
def rel_pos_attention_triton(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor, num_heads: int, window_size: int
) -> Tensor:
    """Run the registered operation; see :func:`fastsam_kernels.rel_pos_attention` for the arguments."""
    channels = qkv.shape[3] // 3
    out = qkv.new_empty((*qkv.shape[:3], channels))
    tile = lookup(
        "rel_pos_attention", arch_of(qkv.device), qkv.dtype, AttentionShape.of(channels // num_heads, window_size)
    )
    plan(qkv, rel_pos_h, rel_pos_w, qkv_bias, out, num_heads, window_size, tile).run()
    return out


@rel_pos_attention_triton.register_fake
def _(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor, num_heads: int, window_size: int) -> Tensor:
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))
