"""The attention as its formula says, with the whole bias in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .tables import gather_rel_pos


def reference(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor, num_heads: int, window_size: int
) -> Tensor:
    """Pad, cut into windows, attend with the whole bias in memory, and put together again."""
    batch, height, width, channels = qkv.shape
    size_h, size_w = (window_size, window_size) if window_size else (height, width)
    rows, columns = -(-height // size_h), -(-width // size_w)
    padded = qkv_bias.expand(batch, rows * size_h, columns * size_w, channels).clone()
    padded[:, :height, :width] = qkv
    windows = padded.view(batch, rows, size_h, columns, size_w, 3, num_heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = windows  # [B, rows, columns, heads, size_h, size_w, d] each
    rel_h = torch.einsum("...hwc,hkc->...hwk", q, gather_rel_pos(rel_pos_h))
    rel_w = torch.einsum("...hwc,wkc->...hwk", q, gather_rel_pos(rel_pos_w))
    bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2).flatten(-3, -2)  # [..., tokens, tokens]
    q, k, v = (x.flatten(-3, -2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    out = scores.softmax(dim=-1) @ v  # [B, rows, columns, heads, tokens, d]
    out = out.unflatten(-2, (size_h, size_w)).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(batch, rows * size_h, columns * size_w, -1)[:, :height, :width].contiguous()
