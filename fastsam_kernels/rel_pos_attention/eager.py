"""The attention by PyTorch's fused attention, on any device and differentiable."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import requires_autograd
from ..windows import regions
from .tables import gather_rel_pos

# Biases alive at once: on a CPU 4 MB in fp32 per thread; a GPU is better off with larger products.
_SCORES_PER_THREAD = 2**20
_GRAPH_THREADS = 4
_SCORES_GPU = 2**26
_QUERY_CHUNK = 1024  # per head: PyTorch's attention on a CPU takes its large tiles from 768 on


def eager(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor, num_heads: int, window_size: int
) -> Tensor:
    """Run PyTorch's attention on real tokens only, the windows of a region at once, a block of biases at a time."""
    batch, height, width, channels = qkv.shape
    size = (window_size, window_size) if window_size else (height, width)
    gathered_h, gathered_w = gather_rel_pos(rel_pos_h), gather_rel_pos(rel_pos_w)
    _, k_bias, v_bias = qkv_bias.view(3, num_heads, -1)
    out = qkv.new_empty((batch, height, width, channels // 3))
    for region in regions(height, width, size):
        rows, columns = region.window
        windows = region.cut(qkv).unflatten(-1, (3, num_heads, -1)).permute(5, 0, 1, 3, 6, 2, 4, 7)
        # [windows, heads, rows, columns, d] each; views of a whole grid
        q, k, v = (part.flatten(0, 2) for part in windows)
        rel_h = torch.einsum("nmhwc,hkc->nmhwk", q, gathered_h[:rows])  # for all keys of the window, padded ones too
        rel_w = torch.einsum("nmhwc,wkc->nmhwk", q, gathered_w[:columns])
        k, v, padding = k.flatten(2, 3), v.flatten(2, 3), None
        if region.window != size:
            # All padded keys have one k and one v: together they are one key, with the sum of their weights.
            k, v = (
                torch.cat([x, b.expand(len(x), 1, -1, -1).transpose(1, 2)], 2) for x, b in ((k, k_bias), (v, v_bias))
            )
            padding = _padding_bias(rel_h, rel_w, region.window)
        attended = _attend(q, k, v, rel_h[..., :rows, None], rel_w[..., None, :columns], padding)
        attended = attended.view(*windows.shape[1:]).permute(0, 1, 4, 2, 5, 3, 6)
        region.cut(out).unflatten(-1, (num_heads, -1)).copy_(attended)
    return out


def _padding_bias(rel_h: Tensor, rel_w: Tensor, window: tuple[int, int]) -> Tensor:
    """Return the log of the sum of e^bias over the padded keys of a cut window: below the grid, then beside it.

    ``rel_h`` and ``rel_w`` are those of all keys, [windows, heads, rows, columns, size]; the result ends in 1.
    """
    rows, columns = window
    parts = []
    if rows < rel_h.shape[-1]:
        parts.append(rel_h[..., rows:].logsumexp(-1) + rel_w.logsumexp(-1))
    if columns < rel_w.shape[-1]:
        parts.append(rel_h[..., :rows].logsumexp(-1) + rel_w[..., columns:].logsumexp(-1))
    return torch.stack(parts, -1).logsumexp(-1, keepdim=True).to(rel_h.dtype)  # autocast widens it


def _max_scores(on_cpu: bool) -> int:
    if not on_cpu:
        return _SCORES_GPU
    # A graph cannot ask for the number of threads.
    return _SCORES_PER_THREAD * (_GRAPH_THREADS if torch.compiler.is_compiling() else torch.get_num_threads())


def _attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, padding: Tensor | None) -> Tensor:
    """Attend from queries [N, heads, rows, columns, d] to keys [N, heads, keys, d].

    The bias is the sum of ``rel_h`` [N, heads, rows, columns, key rows, 1] and ``rel_w`` [..., 1, key columns], and
    ``padding`` [N, heads, rows, columns, 1] for a last key that has no place.
    """
    count, heads, rows, columns, _ = q.shape
    limit = _max_scores(q.device.type == "cpu")
    row_chunk = min(max(_QUERY_CHUNK // columns, 1), rows)
    head_chunk = min(max(limit // (row_chunk * columns * k.shape[2]), 1), heads)
    window_chunk = max(limit // (heads * rows * columns * k.shape[2]), 1)
    out = q.new_empty(q.shape)
    differentiates = requires_autograd(q, k, v, rel_h, rel_w)
    # Memory fresh from the system for every block would cost a CPU as much as the attention itself.
    block_shape = (min(window_chunk, count), head_chunk, row_chunk, columns, rel_h.shape[4], rel_w.shape[5])
    buffer = None if differentiates or torch.compiler.is_compiling() else q.new_empty(block_shape)
    for n in range(0, count, window_chunk):
        for head in range(0, heads, head_chunk):
            windows = (slice(n, n + window_chunk), slice(head, head + head_chunk))
            for top in range(0, rows, row_chunk):
                block = (*windows, slice(top, top + row_chunk))
                bias = _outer_sum(rel_h[block], rel_w[block], buffer).flatten(-2)
                if padding is not None:
                    bias = torch.cat([bias, padding[block]], -1)
                q_block = q[block].flatten(2, 3)
                attended = F.scaled_dot_product_attention(q_block, k[windows], v[windows], bias.flatten(2, 3))
                out[block] = attended.unflatten(2, (-1, columns))
    return out


def _outer_sum(rel_h: Tensor, rel_w: Tensor, buffer: Tensor | None) -> Tensor:
    """Add them, into the first cells of ``buffer`` if there is one."""
    if buffer is None:
        return rel_h + rel_w
    shape = (*rel_h.shape[:-1], rel_w.shape[-1])
    return torch.add(rel_h, rel_w, out=buffer.flatten()[: math.prod(shape)].view(shape))
