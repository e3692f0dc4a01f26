"""Limitations of the Triton kernels of the cross-attentions."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_TOKENS = 16  # per prompt, for which absorption saves work, and which the kernels hold in registers
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def token_limitation(tokens: Tensor, head_dim: int) -> str | None:
    """Return what keeps the kernels from absorbed ``tokens`` [P, H, T, C], None where nothing does."""
    prompts, heads, count, channels = tokens.shape
    if tokens.dtype not in _DTYPES:
        return f"the tensors must be fp32, fp16 or bf16, got {tokens.dtype}"
    if count > MAX_TOKENS:
        return f"a prompt may have up to {MAX_TOKENS} tokens, got {count}"
    for name, number, least in (("channels", channels, 64), ("heads", heads, 2), ("channels per head", head_dim, 1)):
        if number < least or number & (number - 1):
            return f"the {name} must be a power of two of at least {least}, got {number}"
    if prompts == 0:
        return "there are no prompts"
    return None
