"""The attention as modules compute it, with the padded tokens in memory."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def reference(qkv: Tensor, qkv_bias: Tensor, num_heads: int, window_size: int, pool_queries: bool) -> Tensor:
    """Pad, cut into windows, pool the queries, attend, and put together again."""
    batch, height, width, channels = qkv.shape
    size_h, size_w = (window_size, window_size) if window_size else (height, width)
    down, across = -(-height // size_h), -(-width // size_w)
    padded = qkv_bias.expand(batch, down * size_h, across * size_w, channels).clone()
    padded[:, :height, :width] = qkv
    windows = padded.view(batch, down, size_h, across, size_w, channels).transpose(2, 3).flatten(0, 2)
    q, k, v = windows.chunk(3, -1)  # [B * down * across, size_h, size_w, C] each
    if pool_queries:
        q = F.max_pool2d(q.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        height, width, size_h, size_w = height // 2, width // 2, size_h // 2, size_w // 2
    q, k, v = (x.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [.., tokens, heads, d]
    grid = attended.reshape(batch, down, across, size_h, size_w, -1).transpose(2, 3)
    return grid.reshape(batch, down * size_h, across * size_w, -1)[:, :height, :width].contiguous()
