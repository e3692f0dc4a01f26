"""Limitations of the Triton kernel of ``rel_pos_attention`` and the way to call it; imports no triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import triton_implementation

_HEAD_DIMS = (32, 64, 80)


def _run(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor, num_heads: int, window_size: int
) -> Tensor:
    from .custom_op import rel_pos_attention_triton

    return rel_pos_attention_triton(qkv, rel_pos_h, rel_pos_w, qkv_bias, num_heads, window_size)


def _limitation(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor, num_heads: int, window_size: int
) -> str | None:
    if qkv.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"qkv must be fp32, fp16 or bf16, got {qkv.dtype}"
    head_dim = qkv.shape[3] // (3 * num_heads)
    if head_dim not in _HEAD_DIMS:
        return f"the head dimension must be one of {', '.join(map(str, _HEAD_DIMS))}, got {head_dim}"
    if qkv.numel() == 0:
        return "qkv is empty"
    return None


TRITON = triton_implementation(_run, _limitation, multiplies=True)
