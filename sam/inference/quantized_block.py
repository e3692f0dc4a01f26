"""A block of SAM's image encoder with linear layers in 8 bits, each with the norm before it and the sum after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..modeling.image_encoder import Attention
from ..modeling.quantized_linear import QuantizedLinear, linear_dtype, norm_of, places_of
from ..system.device_profile import device_profile
from .eligibility import has_no_hooks, is_stock


def is_fused(block: Any) -> bool:
    """Return whether a block's norms, linear layers and GELU are as they are written, the linear layers in 8 bits."""
    return (
        is_stock(block.attn, Attention)
        and has_no_hooks(block)
        and all(type(place.layer) is QuantizedLinear for place in places_of(block))
        and type(block.norm1) is type(block.norm2) is nn.LayerNorm
        and type(block.mlp.act) is nn.GELU
        and block.mlp.act.approximate == "none"
    )


def run_block(block: Any, x: Tensor, kernels: str, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """Run a block on tokens [B, H, W, dim]; ``attend`` maps the output of its qkv to the input of its projection."""
    qkv, proj, first, second = (place.layer for place in places_of(block))
    dtype = linear_dtype(x)
    rows = qkv.quantize(x, kernels, norm_of(block.norm1))
    attended = attend(qkv.multiply(rows, dtype, kernels))
    x = proj.multiply(proj.quantize(attended, kernels), x.dtype, kernels, residual=x)
    tokens = x.view(-1, x.shape[-1])
    # Chunks keep the hidden channels near a CPU's cache.
    for chunk in tokens.split(device_profile(x.device).mlp_tokens_per_chunk or len(tokens)):
        rows = first.quantize(chunk, kernels, norm_of(block.norm2))
        hidden = first.multiply(rows, dtype, kernels, gelu=True)
        chunk.copy_(second.multiply(second.quantize(hidden, kernels), x.dtype, kernels, residual=chunk))
    return x
