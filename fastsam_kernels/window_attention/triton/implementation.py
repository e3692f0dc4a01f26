"""Limitations of the Triton kernel of ``window_attention`` and the way to call it; imports no triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import triton_implementation

_MAX_HEAD_DIM = 128


def _run(qkv: Tensor, qkv_bias: Tensor, num_heads: int, window_size: int, pool_queries: bool) -> Tensor:
    from .custom_op import window_attention_triton

    return window_attention_triton(qkv, qkv_bias, num_heads, window_size, pool_queries)


def _limitation(qkv: Tensor, qkv_bias: Tensor, num_heads: int, window_size: int, pool_queries: bool) -> str | None:
    if qkv.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"qkv must be fp32, fp16 or bf16, got {qkv.dtype}"
    head_dim = qkv.shape[3] // (3 * num_heads)
    if head_dim % 8 or head_dim > _MAX_HEAD_DIM:
        return f"the head dimension must be a multiple of 8 up to {_MAX_HEAD_DIM}, got {head_dim}"
    if qkv.numel() == 0:
        return "qkv is empty"
    return None


TRITON = triton_implementation(_run, _limitation, multiplies=True)
